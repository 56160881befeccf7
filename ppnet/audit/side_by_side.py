"""Many models as one program: the trainer's functions over a model axis.

Every array of the train state has a leading axis of models. The axis is cut
over the devices, each device goes through its own models, and what a model does
is what `train.step` does: microbatches are accumulated, noise is added, the
optimizer steps. A record travels once: the pool lives on the devices and a step
is told places in it.

On an accelerator a pass takes all of a device's models at once (`jax.vmap`), as
one small model would leave it idle. On a CPU it takes them one by one: a model,
its optimizer and one microbatch stay in a core's cache, which was faster than
any wider pass (BUILD_NOTES.md). There the cores are what works side by side, so
each should be a device of its own (`XLA_FLAGS=
--xla_force_host_platform_device_count=2`).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ppnet.audit import pool as pool_lib
from ppnet.core import checks, prng
from ppnet.data import batching
from ppnet.train import program as program_lib
from ppnet.train import state as state_lib
from ppnet.train import step as step_lib

PyTree = Any
_AXIS = "data"


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["state", "noise_state"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Carry:
  """Where M models are between two steps; holds no key.

  Attributes:
    state: leaves [M, ...].
    noise_state: of the DP noise, leaves [M, ...]; secret.
  """

  state: state_lib.TrainState
  noise_state: PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roots:
  """Words of the models' root keys; whoever has them can repeat the noise.

  Attributes:
    init: of initial parameters and attention noise, u32[M, 2].
    noise: of the DP noise, u32[M, 2].
  """

  init: np.ndarray = dataclasses.field(repr=False)
  noise: np.ndarray = dataclasses.field(repr=False)


def key_words(seeds: Sequence[int]) -> np.ndarray:
  """Words of the root key of each seed, u32[len(seeds), 2]."""
  return np.stack(
    [np.asarray(jax.random.key_data(prng.root(seed))) for seed in seeds]
  )


class SideBySide:
  """The compiled functions of M models of one experiment.

  Attributes:
    num_models: M.
    mesh: the devices that share them; as many as divide M.
    width: models of one pass on one device.
  """

  def __init__(
    self,
    program: program_lib.Program,
    *,
    num_models: int,
    microbatch_size: int,
    devices: Sequence[jax.Device] | None = None,
    width: int | None = None,
  ):
    """Compiles nothing yet.

    Args:
      program: of the experiment, for its pure functions.
      num_models: M.
      microbatch_size: rows of one model that are computed at once.
      devices: all of this process when None.
      width: models that a device computes at once; None is all of its own on an
        accelerator and one on a CPU.

    Raises:
      ValueError: a size is not positive, or `width` does not divide.
    """
    checks.positive(num_models=num_models, microbatch_size=microbatch_size)
    devices = list(jax.local_devices() if devices is None else devices)
    count = math.gcd(num_models, len(devices))
    own = num_models // count
    if width is None:
      width = 1 if devices[0].platform == "cpu" else own
    if width < 1 or own % width:
      checks.fail(
        f"a width that divides the {own} models of a device", width=width
      )
    self.num_models = num_models
    self.width = width
    self.mesh = Mesh(
      np.asarray(devices[:count]),
      (_AXIS,),
      axis_types=(jax.sharding.AxisType.Auto,),
    )
    self._program = program
    self._pure = program.pure
    self._microbatch_size = microbatch_size
    self._over: dict[Callable[..., Any], Callable[..., Any]] = {}
    self._start = self._jitted(self._start_local, num_shared=0)
    self._steps = self._jitted(self._steps_local, num_shared=2, donated=(0,))

  def put_models(self, tree: PyTree) -> PyTree:
    """Places arrays [M, ...], each device's models on it."""
    return jax.device_put(tree, NamedSharding(self.mesh, P(_AXIS)))

  def put_shared(self, tree: PyTree) -> PyTree:
    """Places arrays that all models read, whole, on every device."""
    return jax.device_put(tree, NamedSharding(self.mesh, P()))

  def put_pool(self, pool: pool_lib.Pool) -> dict[str, jax.Array]:
    """Places a pool, whole, on every device."""
    return self.put_shared(dict(pool.rows))

  @functools.cached_property
  def frozen(self) -> PyTree:
    """What is not trained, the same for all models, on every device."""
    return self.put_shared(self._program.frozen())

  def start(self, roots: Roots) -> Carry:
    """Every model before its first step.

    Where the program begins from weights on disk all begin from those.
    """
    carry = self._start(
      self.put_models({"init": roots.init, "noise": roots.noise})
    )
    if not self._program.begins_from_disk:
      return carry
    params = self._program.init().params
    stacked = jax.tree.map(
      lambda leaf: np.broadcast_to(
        np.asarray(leaf), (self.num_models, *leaf.shape)
      ),
      params,
    )
    state = dataclasses.replace(carry.state, params=self.put_models(stacked))
    return dataclasses.replace(carry, state=state)

  def put_roots(self, roots: Roots) -> dict[str, jax.Array]:
    """Places the words that `steps` is given again and again."""
    return self.put_models({"init": roots.init, "noise": roots.noise})

  def steps(
    self,
    carry: Carry,
    roots: Mapping[str, jax.Array],
    places: np.ndarray,
    pool: Mapping[str, jax.Array],
  ) -> tuple[Carry, step_lib.PerExample, dict[str, jax.Array]]:
    """Takes S steps of every model.

    Args:
      carry: from `start` or the last call; donated.
      roots: from `put_roots`.
      places: each model's batch of each step, of `pad_places`.
      pool: from `put_pool`.

    Returns:
      The models after the steps; and of each of them and each step, leaves
      [M, S, ...], the examples' diagnostics and the step's scalars.
    """
    return self._steps(carry, roots, self.put_models(places), pool, self.frozen)

  def pad_places(
    self, drawn: Sequence[Sequence[np.ndarray]], *, num_rounds: int
  ) -> np.ndarray:
    """Lays batches out in rounds of one microbatch.

    Args:
      drawn: for each model and step, places in the pool.
      num_rounds: at least so many. More only where a batch needs them, so that
        few shapes are compiled.

    Returns:
      i32[M, S, R, B], -1 where there is no record, which contributes zero.
    """
    size = self._microbatch_size
    most = max((len(batch) for own in drawn for batch in own), default=0)
    rounds = max(num_rounds, -(-most // size), 1)
    places = np.full(
      (len(drawn), len(drawn[0]), rounds * size), batching.NO_INDEX, np.int32
    )
    for model, own in enumerate(drawn):
      for step, batch in enumerate(own):
        places[model, step, : len(batch)] = batch
    return places.reshape(*places.shape[:2], rounds, size)

  def over_records(
    self,
    fn: Callable[[PyTree, Mapping[str, jax.Array], jax.Array, PyTree], PyTree],
    params: PyTree,
    roots: np.ndarray,
    pool: pool_lib.Pool,
    *,
    batch_size: int,
  ) -> PyTree:
    """Asks every model about every record.

    Args:
      fn: a pure function of (parameters of one model, batch [B, ...], the
        model's root key, what is frozen), leaves [B, ...]. One function is
        compiled once.
      params: leaves [M, ...].
      roots: words of the models' root keys, u32[M, 2].
      pool: n records.
      batch_size: B.

    Returns:
      What `fn` gives, NumPy leaves [M, n, ...].
    """
    size = len(pool)
    num_batches = -(-size // batch_size)
    rows = {
      name: np.concatenate(
        [array, np.repeat(array[:1], num_batches * batch_size - size, axis=0)]
      ).reshape(num_batches, batch_size, *array.shape[1:])
      for name, array in pool.rows.items()
    }

    if fn not in self._over:
      self._over[fn] = self._jitted(
        functools.partial(self._over_local, fn), num_shared=2
      )
    found = jax.device_get(
      self._over[fn](
        self.put_models(params),
        self.put_models(roots),
        self.put_shared(rows),
        self.frozen,
      )
    )
    return jax.tree.map(
      lambda leaf: leaf.reshape(len(leaf), -1, *leaf.shape[3:])[:, :size], found
    )

  def _jitted(
    self,
    local: Callable[..., Any],
    *,
    num_shared: int,
    donated: tuple[int, ...] = (),
  ) -> Callable[..., Any]:
    """`local` on each device's own models; the last arguments are shared."""

    def over_mesh(*args):
      own = len(args) - num_shared
      specs = (P(_AXIS),) * own + (P(),) * num_shared
      return jax.shard_map(
        local,
        mesh=self.mesh,
        in_specs=specs,
        out_specs=P(_AXIS),
        # Models never meet: nothing is reduced over the devices.
        check_vma=False,
      )(*args)

    return jax.jit(over_mesh, donate_argnums=donated)

  def _in_passes(self, fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` of leaves [width, ...] over a device's leaves [L, ...]."""

    def over_passes(*args):
      folded = jax.tree.map(
        lambda x: x.reshape(-1, self.width, *x.shape[1:]), args
      )
      out = jax.lax.map(lambda own: fn(*own), folded)
      return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), out)

    return over_passes

  def _vmap(self, fn: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.vmap`; of one model, the function itself.

    A batch axis of one would be an axis of every product all the same.
    """
    if self.width > 1:
      return jax.vmap(fn)

    def of_one(*args):
      out = fn(*jax.tree.map(lambda x: x[0], args))
      return jax.tree.map(lambda x: jnp.asarray(x)[None], out)

    return of_one

  def _over_local(
    self,
    fn: Callable[..., Any],
    params: PyTree,
    roots: jax.Array,
    rows: Mapping[str, jax.Array],
    frozen: PyTree,
  ) -> PyTree:
    """See `over_records`, of one device's models."""

    def one(params, words):
      key = jax.random.wrap_key_data(words, impl="threefry2x32")
      return jax.lax.map(lambda batch: fn(params, batch, key, frozen), rows)

    return self._in_passes(self._vmap(one))(params, roots)

  def _start_local(self, roots: Mapping[str, jax.Array]) -> Carry:
    """See `start`."""
    privatizer = self._program.mechanism.privatizer()

    def one(words):
      state = self._pure.init(
        jax.random.wrap_key_data(words, impl="threefry2x32")
      )
      state = jax.tree.map(jnp.asarray, state)
      return Carry(state=state, noise_state=privatizer.init(state.params))

    return jax.vmap(one)(roots["init"])

  def _steps_local(
    self,
    carry: Carry,
    roots: Mapping[str, jax.Array],
    places: jax.Array,
    pool: Mapping[str, jax.Array],
    frozen: PyTree,
  ) -> Any:
    """See `steps`, of one device's models."""

    def one_pass(carry, roots, places):
      keys = {
        name: jax.random.wrap_key_data(words, impl="threefry2x32")
        for name, words in roots.items()
      }
      step = functools.partial(self._step, keys, pool, frozen)
      # Steps lead in a scan, models everywhere else.
      swapped = lambda tree: jax.tree.map(lambda x: x.swapaxes(0, 1), tree)
      carry, found = jax.lax.scan(step, carry, swapped(places))
      return carry, *swapped(found)

    return self._in_passes(one_pass)(carry, roots, places)

  def _step(
    self,
    keys: Mapping[str, jax.Array],
    pool: Mapping[str, jax.Array],
    frozen: PyTree,
    carry: Carry,
    places: jax.Array,
  ) -> tuple[Carry, tuple[step_lib.PerExample, dict[str, jax.Array]]]:
    """One step of the models of a pass; places i32[width, R, B]."""
    state = carry.state

    def accumulate(grad_sum, params, places, key, step, clip_norm):
      return self._pure.accumulate(
        grad_sum, params, _rows(pool, places), key, step, clip_norm, frozen
      )

    own = (state.params, keys["init"], state.step, state.clip_norm)
    grad_sum = self._vmap(step_lib.init_grad_sum)(state.params)

    def add(grad_sum, places):
      params, key, step, clip_norm = own
      return self._vmap(accumulate)(
        grad_sum, params, places, key, step, clip_norm
      )

    def add_round(number, so_far):
      grad_sum, parts = so_far
      places_now = jax.lax.dynamic_index_in_dim(
        places, number, axis=1, keepdims=False
      )
      grad_sum, part = add(grad_sum, places_now)
      parts = jax.tree.map(
        lambda all_of, one: jax.lax.dynamic_update_index_in_dim(
          all_of, one, number, axis=1
        ),
        parts,
        part,
      )
      return grad_sum, parts

    shapes = jax.eval_shape(lambda: add(grad_sum, places[:, 0])[1])
    # Rows that no round fills: not counted, all zero.
    nothing = jax.tree.map(
      lambda x: jnp.zeros((x.shape[0], places.shape[1], *x.shape[1:]), x.dtype),
      shapes,
    )
    # As many as the model with most rows of this pass needs.
    rounds = (places[:, :, 0] >= 0).any(axis=0).sum()
    grad_sum, parts = jax.lax.fori_loop(
      0, rounds, add_round, (grad_sum, nothing)
    )
    state, noise_state, scalars = self._vmap(self._pure.update)(
      state, grad_sum, keys["noise"], carry.noise_state
    )
    parts = jax.tree.map(
      lambda x: x.reshape(x.shape[0], -1, *x.shape[3:]), parts
    )
    return Carry(state=state, noise_state=noise_state), (parts, scalars)


def _rows(
  pool: Mapping[str, jax.Array], places: jax.Array
) -> dict[str, jax.Array]:
  """A microbatch from the pool; a negative place is padding."""
  rows = {
    name: jnp.take(array, jnp.maximum(places, 0), axis=0)
    for name, array in pool.items()
  }
  return {
    **rows,
    batching.INDEX_KEY: places,
    batching.PADDING_KEY: places < 0,
  }
