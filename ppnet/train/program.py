"""The compiled pieces of one experiment, and where their arrays live."""

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from ppnet import config as config_lib
from ppnet.core import checks, prng, trees
from ppnet.models import multimodal, private_cut
from ppnet.privacy import engine_choice, input_privacy
from ppnet.privacy import mechanism as mechanism_lib
from ppnet.sharding import mesh as mesh_lib
from ppnet.sharding import rules as rules_lib
from ppnet.train import losses, optimizer
from ppnet.train import state as state_lib
from ppnet.train import step as step_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
  """Jitted functions of one experiment on one mesh.

  Attributes:
    mesh: the devices.
    rules: where parameters and examples live on them.
    model: the network.
    engine: how clipped sums are computed, and why so; None if nothing is.
    mechanism: sampler, clip, noise and accountant.
    abstract_state: shapes, dtypes and shardings of the train state.
    root_key: root of initial parameters and attention noise, from the seed.
    init: () -> TrainState.
    init_grad_sum: params -> an empty `step.GradSum`.
    accumulate: see `step.accumulate`; the running sum is donated.
    update: see `step.update`; the state is donated.
    evaluate: see `step.evaluate`.
    cut_keys: fresh keys of the private cut for a batch; None without one.
  """

  mesh: Mesh
  rules: rules_lib.Rules
  model: multimodal.PPNet
  engine: engine_choice.Choice | None
  mechanism: mechanism_lib.Mechanism
  abstract_state: state_lib.TrainState
  root_key: jax.Array
  init: Any
  init_grad_sum: Any
  accumulate: Any
  update: Any
  evaluate: Any
  cut_keys: Any = None

  @property
  def num_parameters(self) -> int:
    """Number of trained parameters."""
    return trees.num_parameters(self.abstract_state.params)

  def put_batch(self, batch: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Places a batch, its examples spread over the mesh.

    With a private cut, every batch that is placed gets keys of its own: a state
    that was noised twice with one draw would give away a difference.
    """
    placed = jax.device_put(dict(batch), self.rules.batch_sharding(self.mesh))
    if self.cut_keys is not None:
      placed["cut_key"] = self.cut_keys(placed["index"], placed.get("view"))
    return placed

  def put(self, value: Any) -> Any:
    """Places a small value on every device."""
    return jax.device_put(value, rules_lib.replicated(self.mesh))


def build(
  config: config_lib.ExperimentConfig,
  mechanism: mechanism_lib.Mechanism,
  example: Mapping[str, np.ndarray],
  *,
  placeholder_ids: Mapping[str, int],
  devices: list[jax.Device] | None = None,
) -> Program:
  """Puts model, mechanism and mesh together. Compiles nothing yet.

  Args:
    config: the experiment.
    mechanism: from `privacy.mechanism.build`.
    example: one example of the pipeline, for its shapes.
    placeholder_ids: modality to the token whose places it takes.
    devices: all of this job's devices when None.

  Raises:
    ValueError: the mesh or the microbatch does not fit the devices.
  """
  mesh = mesh_lib.build(config.mesh, devices)
  rules = rules_lib.Rules()
  ways = mesh.shape["data"] * mesh.shape["fsdp"]
  if config.perf.microbatch_size % ways:
    checks.fail(
      f"perf.microbatch_size to be a multiple of the {ways} devices that share"
      " a batch",
      f"Use {-(-config.perf.microbatch_size // ways) * ways}.",
      **{"perf.microbatch_size": config.perf.microbatch_size},
    )
  cut = config.model.private_cut
  model = multimodal.PPNet(
    config.model, dict(placeholder_ids), cut=_private_cut(cut)
  )
  tx = optimizer.build(config.optimizer, config.train.num_steps)
  root_key = jax.device_put(prng.root(config.seed), rules_lib.replicated(mesh))
  init_fn = functools.partial(
    _init,
    model=model,
    tx=tx,
    example=example,
    clip_norm=mechanism.initial_clip_norm,
  )
  shardings = _state_shardings(model, tx, example, mesh=mesh, rules=rules)
  if mechanism.initial_clip_norm is not None:
    shardings = dataclasses.replace(
      shardings, clip_norm=rules_lib.replicated(mesh)
    )
  abstract_state = jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=sharding
    ),
    jax.eval_shape(init_fn, root_key),
    shardings,
  )
  replicated = rules_lib.replicated(mesh)
  sum_sharding = step_lib.GradSum(
    total=shardings.params, num_units=replicated, count=replicated
  )
  loss_fn = losses.make_loss_fn(model, config.attention_noise)
  clipped_grad_fn = mechanism.clipped_grad_fn(
    loss_fn,
    has_aux=True,
    params=abstract_state.params,
    num_stacked_axes=_num_stacked_axes(model, example),
  )
  # Shardings of inputs travel with the arrays; outputs are pinned, so that no
  # step can change where the state lives.
  return Program(
    mesh=mesh,
    rules=rules,
    model=model,
    engine=clipped_grad_fn.engine_choice(
      abstract_state.params,
      _abstract_batch(
        example,
        num_rows=config.perf.microbatch_size * mechanism.rows_per_unit,
        has_cut=cut.layer is not None,
      ),
    ),
    mechanism=mechanism,
    abstract_state=abstract_state,
    root_key=root_key,
    init=jax.jit(functools.partial(init_fn, root_key), out_shardings=shardings),
    init_grad_sum=jax.jit(step_lib.init_grad_sum, out_shardings=sum_sharding),
    accumulate=jax.jit(
      functools.partial(step_lib.accumulate, clipped_grad_fn=clipped_grad_fn),
      donate_argnames="grad_sum",
      out_shardings=(sum_sharding, None),
    ),
    update=jax.jit(
      functools.partial(
        step_lib.update,
        mechanism=mechanism,
        tx=tx,
        learning_rate_fn=optimizer.schedule(
          config.optimizer, config.train.num_steps
        ),
      ),
      donate_argnames="state",
      out_shardings=(shardings, rules_lib.replicated(mesh)),
    ),
    evaluate=jax.jit(
      functools.partial(
        step_lib.evaluate, model=model, noise_config=config.attention_noise
      )
    ),
    cut_keys=None if cut.layer is None else _cut_keys(cut, mesh),
  )


def _abstract_batch(
  example: Mapping[str, np.ndarray], *, num_rows: int, has_cut: bool
) -> Any:
  """Shapes of what the loss sees of a microbatch."""
  microbatch = {
    name: jax.ShapeDtypeStruct(
      (num_rows, *np.shape(value)), np.asarray(value).dtype
    )
    for name, value in example.items()
  }
  if has_cut:
    microbatch["cut_key"] = jax.eval_shape(
      lambda: jax.random.split(prng.root(0), num_rows)
    )
  return jax.eval_shape(
    lambda microbatch: step_lib.grad_batch(
      microbatch, prng.root(0), jnp.int32(0)
    ),
    microbatch,
  )


def _private_cut(
  config: config_lib.PrivateCutConfig,
) -> private_cut.PrivateCut | None:
  """The model's part of what the record claims."""
  if config.layer is None:
    return None
  claim = input_privacy.claim(config)
  return private_cut.PrivateCut(
    layer=claim["layer"],
    l2_clip_norm=claim["l2_clip_norm"],
    noise_stddev=claim["noise_stddev"],
  )


def _cut_keys(config: config_lib.PrivateCutConfig, mesh: Mesh) -> Any:
  """A function of a batch's records and views; each call draws anew."""
  replicated = rules_lib.replicated(mesh)
  root_key = jax.device_put(
    prng.root(input_privacy.noise_root_entropy(config)), replicated
  )
  numbers = itertools.count()

  @jax.jit
  def keys(root_key, number, index, view):
    stem = prng.stream(root_key, prng.Stream.PRIVATE_CUT, number)
    of_records = prng.per_record(stem, index)
    return of_records if view is None else prng.per_view(of_records, view)

  def fresh(index, view):
    number = jax.device_put(np.uint32(next(numbers)), replicated)
    return keys(root_key, number, index, view)

  return fresh


def _init(
  root_key: jax.Array,
  *,
  model: multimodal.PPNet,
  tx: optax.GradientTransformation,
  example: Mapping[str, np.ndarray],
  clip_norm: float | None,
) -> state_lib.TrainState:
  """Initial parameters and optimizer state; a function of the key alone."""
  params = nn.meta.unbox(_boxed_params(root_key, model=model, example=example))
  return state_lib.TrainState(
    step=np.int32(0),
    params=params,
    opt_state=tx.init(params),
    clip_norm=None if clip_norm is None else np.float32(clip_norm),
  )


def _num_stacked_axes(
  model: multimodal.PPNet, example: Mapping[str, np.ndarray]
) -> Any:
  """How many leading axes of each parameter count layers."""
  boxed = jax.eval_shape(
    functools.partial(_boxed_params, model=model, example=example),
    jax.eval_shape(lambda: prng.root(0)),
  )
  return jax.tree.map(
    lambda box: int(getattr(box, "names", ())[:1] == ("layers",)),
    boxed,
    is_leaf=lambda leaf: isinstance(leaf, nn.meta.AxisMetadata),
  )


def _boxed_params(
  root_key: jax.Array,
  *,
  model: multimodal.PPNet,
  example: Mapping[str, np.ndarray],
) -> Any:
  """Parameters with their logical axes still attached."""
  batch = {  # Shapes alone: no private value enters the initial parameters.
    name: jnp.zeros((1, *np.shape(value)), np.asarray(value).dtype)
    for name, value in example.items()
  }
  variables = model.init(
    prng.stream(root_key, prng.Stream.INIT, 0),
    batch["tokens"],
    media=losses.media(batch),
  )
  return variables["params"]


def _state_shardings(
  model: multimodal.PPNet,
  tx: optax.GradientTransformation,
  example: Mapping[str, np.ndarray],
  *,
  mesh: Mesh,
  rules: rules_lib.Rules,
) -> state_lib.TrainState:
  """One sharding per leaf of the train state."""
  boxed = jax.eval_shape(
    functools.partial(_boxed_params, model=model, example=example),
    jax.eval_shape(lambda: prng.root(0)),
  )
  params = rules.param_shardings(mesh, boxed)
  replicated = rules_lib.replicated(mesh)
  opt_state = optax.tree.map_params(
    tx.init,
    lambda _, sharding: sharding,
    jax.eval_shape(tx.init, nn.meta.unbox(boxed)),
    params,
    transform_non_params=lambda _: replicated,
  )
  return state_lib.TrainState(
    step=replicated, params=params, opt_state=opt_state
  )
