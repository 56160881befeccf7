"""The compiled pieces of one experiment, and where their arrays live."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from ppnet import config as config_lib
from ppnet.core import checks, hosts, prng, trees
from ppnet.data import pipeline
from ppnet.models import linear, lora, multimodal, private_cut
from ppnet.privacy import engine_choice, input_privacy
from ppnet.privacy import mechanism as mechanism_lib
from ppnet.sharding import layout
from ppnet.sharding import mesh as mesh_lib
from ppnet.sharding import rules as rules_lib
from ppnet.train import (
  initial,
  losses,
  optimizer,
  own_sums,
  stored_weights,
)
from ppnet.train import state as state_lib
from ppnet.train import step as step_lib

# Arrays of a batch whose second axis counts tokens.
_PER_TOKEN = ("tokens", "targets", "loss_mask", "positions", "segment_ids")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pure:
  """What a program compiles: functions of arrays alone, on no mesh.

  For whoever runs a step otherwise than one after the other on one state, as
  audits do with many models side by side.

  Attributes:
    init: root key -> TrainState.
    accumulate: see `step.accumulate`, with what is frozen as a last argument.
    update: see `step.update`.
    evaluate: see `step.evaluate`, with what is frozen as a last argument.
  """

  init: Callable[..., Any]
  accumulate: Callable[..., Any]
  update: Callable[..., Any]
  evaluate: Callable[..., Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
  """Jitted functions of one experiment on one mesh.

  Attributes:
    mesh: the devices.
    rules: where parameters and examples live on them.
    model: the network, `multimodal.PPNet` or `linear.LinearClassifier`.
    engine: how clipped sums are computed, and why so; None if nothing is.
    mechanism: sampler, clip, noise and accountant.
    abstract_state: shapes, dtypes and shardings of the train state.
    abstract_frozen: the same of what is not trained.
    root_key: root of initial parameters and attention noise, from the seed.
    init: () -> TrainState.
    init_grad_sum: params -> an empty `step.GradSum`.
    weights: params -> what `accumulate` takes for them: themselves, or where
      `perf.gather_weights` asks for it a copy to compute with.
    abstract_weights: shapes, dtypes and shardings of that.
    accumulate: see `step.accumulate`; the running sum is donated.
    init_noise_state: params -> the state of the DP noise before step 0.
    replay_noise: see `step.replay_noise`; the noise state is donated.
    update: see `step.update`; both states are donated.
    evaluate: see `step.evaluate`.
    fingerprint: see `core.trees.fingerprint`.
    whole: a tree of batch arrays, each with the rows of all hosts.
    host: the rows of a batch that this process places.
    frozen: () -> the parameters that are not trained, computed or read once;
      `models.lora.combine` puts them and the trained ones together.
    pure: the functions that the jitted ones are made of.
    begins_from_disk: whether `init` begins from stored weights, and not from
      the root key alone.
    cut_keys: fresh keys of the private cut for a batch; None without one.
  """

  mesh: Mesh
  rules: rules_lib.Rules
  model: Any
  engine: engine_choice.Choice | None
  mechanism: mechanism_lib.Mechanism
  abstract_state: state_lib.TrainState
  abstract_frozen: Any
  root_key: jax.Array
  init: Any
  init_grad_sum: Any
  weights: Any
  abstract_weights: Any
  accumulate: Any
  init_noise_state: Any
  replay_noise: Any
  update: Any
  evaluate: Any
  fingerprint: Any
  whole: Any
  host: pipeline.Host
  frozen: Any
  pure: Pure
  begins_from_disk: bool = False
  cut_keys: Any = None

  @property
  def num_parameters(self) -> int:
    """Number of trained parameters."""
    return trees.num_parameters(self.abstract_state.params)

  def sharding_of(self, name: str) -> NamedSharding:
    """Where an array of a batch lives."""
    return self.rules.batch_sharding(self.mesh, has_tokens=name in _PER_TOKEN)

  def put_batch(self, batch: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Places a batch, its examples spread over the mesh.

    With a private cut, every batch that is placed gets keys of its own: a state
    that was noised twice with one draw would give away a difference.
    """
    shardings = {name: self.sharding_of(name) for name in batch}
    if jax.process_count() == 1:
      placed = jax.device_put(dict(batch), shardings)
    else:
      # The guard takes this for an implicit transfer; it is meant.
      with jax.transfer_guard("allow"):
        placed = {
          name: jax.make_array_from_process_local_data(
            shardings[name],
            value,
            (
              len(value) * self.host.of // len(self.host.own),
              *value.shape[1:],
            ),
          )
          for name, value in batch.items()
        }
    if self.cut_keys is not None:
      placed["cut_key"] = self.cut_keys(placed["index"], placed.get("view"))
    return placed

  def put(self, value: Any) -> Any:
    """Places a small value on every device."""
    return rules_lib.put(value, self.mesh)


def build(
  config: config_lib.ExperimentConfig,
  mechanism: mechanism_lib.Mechanism,
  example: Mapping[str, np.ndarray],
  *,
  placeholder_ids: Mapping[str, int],
  answer_ids: Sequence[int] = (),
  devices: list[jax.Device] | None = None,
  is_at_hand: bool = True,
) -> Program:
  """Puts model, mechanism and mesh together. Compiles nothing yet.

  Args:
    config: the experiment.
    mechanism: from `privacy.mechanism.build`.
    example: one example of the pipeline, for its shapes.
    placeholder_ids: modality to the token whose places it takes.
    answer_ids: tokens of the classes, which a linear model needs.
    devices: all of this job's devices when None.
    is_at_hand: False where this process cannot reach the devices: nothing is
      put on them, and the functions can be lowered and compiled, not called.

  Raises:
    ValueError: the mesh or the microbatch does not fit the devices, no
      parameter would be trained, or the decoder's weights are another model's.
  """
  rules = rules_lib.STRATEGIES[config.mesh.strategy]
  mesh = _mesh(config, devices, example, rules=rules)
  model = _model(config.model, placeholder_ids, answer_ids)
  tx = optimizer.build(config.optimizer, config.train.num_steps)
  root = prng.root(config.seed)
  root_key = rules_lib.put(root, mesh) if is_at_hand else root
  is_trained = lora.trained_names(config)
  has_average = config.optimizer.ema_decay is not None
  parts: Any = {"is_trained": is_trained, "has_average": has_average}
  init_fn = functools.partial(
    initial.init_state,
    model=model,
    tx=tx,
    example=example,
    clip_norm=mechanism.initial_clip_norm,
    **parts,
  )
  shardings, frozen_shardings = initial.shardings(
    model, tx, example, mesh, rules, mechanism, **parts
  )
  on_mesh = _on_mesh(mesh, rules, shardings.params)
  abstract_state = initial.abstract(
    jax.eval_shape(init_fn, root_key), shardings
  )
  noise_shardings = initial.noise_shardings(
    mechanism, abstract_state.params, shardings.params, mesh=mesh
  )
  loss_fn = losses.make_loss_fn(model, config.attention_noise)
  clipped_grad_of = _clipped_grad_of(
    mechanism, model, example, abstract_state.params, is_trained=is_trained
  )
  frozen_fn = functools.partial(
    initial.init_frozen,
    root_key,
    model=model,
    example=example,
    is_trained=is_trained,
  )
  abstract_frozen = initial.abstract(
    jax.eval_shape(frozen_fn), frozen_shardings
  )
  pure = _pure(
    config,
    mechanism,
    model,
    init=init_fn,
    tx=tx,
    loss_fn=loss_fn,
    clipped_grad_of=clipped_grad_of,
  )
  # Shardings of inputs travel with the arrays; outputs are pinned, so that no
  # step can change where the state lives.
  program = Program(
    mesh=mesh,
    rules=rules,
    model=model,
    engine=_engine(
      lambda frozen: clipped_grad_of(lora.with_frozen(loss_fn, frozen)),
      abstract_state.params,
      abstract_frozen,
      _abstract_batch(
        example,
        # An engine sees the rows of one replica.
        num_rows=config.perf.microbatch_size
        * mechanism.rows_per_unit
        // own_sums.num_replicas(mesh, rules),
        has_cut=model.cut is not None,
      ),
      on_mesh=on_mesh,
    ),
    mechanism=mechanism,
    abstract_state=abstract_state,
    abstract_frozen=abstract_frozen,
    root_key=root_key,
    init=jax.jit(functools.partial(init_fn, root_key), out_shardings=shardings),
    **_weights(config, abstract_state.params, rules),
    **_sum_programs(pure, on_mesh, shardings.params, mesh=mesh, rules=rules),
    **_noise_programs(mechanism, noise_shardings),
    update=_update(pure, shardings, noise_shardings, mesh=mesh, rules=rules),
    **_fetching_programs(pure, mesh, rules),
    host=_host(mesh, rules) if is_at_hand else pipeline.Host(),
    frozen=lambda: {},
    pure=pure,
    begins_from_disk=bool(config.model.decoder_weights),
    cut_keys=_cut_keys(config.model.private_cut, mesh) if is_at_hand else None,
  )
  is_whole = is_trained is None and not config.model.decoder_weights
  if is_whole or not is_at_hand:
    return program
  return _with_frozen(program, config, frozen_fn, frozen_shardings)


def _pure(
  config: config_lib.ExperimentConfig,
  mechanism: mechanism_lib.Mechanism,
  model: Any,
  *,
  init: Callable[..., Any],
  tx: optax.GradientTransformation,
  loss_fn: losses.LossFn,
  clipped_grad_of: Callable[[losses.LossFn], Any],
) -> Pure:
  """The functions that are compiled."""
  return Pure(
    init=init,
    accumulate=functools.partial(
      _accumulate, loss_fn=loss_fn, clipped_grad_of=clipped_grad_of
    ),
    update=functools.partial(
      step_lib.update,
      mechanism=mechanism,
      tx=tx,
      learning_rate_fn=optimizer.schedule(
        config.optimizer, config.train.num_steps
      ),
      ema_decay=config.optimizer.ema_decay,
    ),
    evaluate=functools.partial(
      _evaluate, model=model, noise_config=config.attention_noise
    ),
  )


def _mesh(
  config: config_lib.ExperimentConfig,
  devices: list[jax.Device] | None,
  example: Mapping[str, np.ndarray],
  *,
  rules: rules_lib.Rules,
) -> Mesh:
  """The devices; raises where a microbatch cannot be shared among them."""
  mesh = mesh_lib.build(config.mesh, devices)
  ways = rules_lib.num_parts(mesh, rules.batch)
  if config.perf.microbatch_size % ways:
    checks.fail(
      f"perf.microbatch_size to be a multiple of the {ways} devices that share"
      " a batch",
      f"Use {-(-config.perf.microbatch_size // ways) * ways}.",
      **{"perf.microbatch_size": config.perf.microbatch_size},
    )
  ways = rules_lib.num_parts(mesh, rules.sequence)
  lengths = config.data.lengths or np.shape(example["tokens"])[:1]
  if any(length % ways for length in lengths):
    checks.fail(
      f"lengths of sequences to be multiples of the {ways} devices that share"
      " one",
      "Set --config.data.lengths, or --config.mesh.sequence=1.",
      lengths=lengths,
    )
  return mesh


def _host(mesh: Mesh, rules: rules_lib.Rules) -> pipeline.Host:
  """The rows of a batch that this process's devices hold."""
  parts = rules_lib.num_parts(mesh, rules.batch)
  indices = rules.batch_sharding(mesh).addressable_devices_indices_map((parts,))
  slices = [index[0] for index in indices.values() if index is not None]
  own = sorted({rows.indices(parts)[0] for rows in slices})
  return pipeline.Host(own=tuple(own), of=parts)


def _fetched(mesh: Mesh) -> NamedSharding | None:
  """Where rows are that will be fetched: whole on every process."""
  return rules_lib.replicated(mesh) if jax.process_count() > 1 else None


def _sum_programs(
  pure: Pure,
  on_mesh: Callable[..., Any],
  param_shardings: Any,
  *,
  mesh: Mesh,
  rules: rules_lib.Rules,
) -> dict[str, Any]:
  """What begins the clipped sum of a step, and what adds to it."""
  by_replicas = own_sums.accumulate(pure.accumulate, mesh=mesh, rules=rules)
  shardings = own_sums.shardings(param_shardings, mesh=mesh, rules=rules)

  def accumulate(
    grad_sum, params, microbatch, root_key, step, clip_norm=None, frozen=None
  ):
    return by_replicas(
      grad_sum, params, microbatch, root_key, step, clip_norm, frozen
    )

  return {
    "init_grad_sum": jax.jit(
      functools.partial(own_sums.init, mesh=mesh, rules=rules),
      out_shardings=shardings,
    ),
    "accumulate": jax.jit(
      on_mesh(accumulate),
      donate_argnames="grad_sum",
      out_shardings=(shardings, _fetched(mesh)),
    ),
  }


def _update(
  pure: Pure,
  shardings: state_lib.TrainState,
  noise_shardings: Any,
  *,
  mesh: Mesh,
  rules: rules_lib.Rules,
) -> Callable[..., Any]:
  """The optimizer's step by the sum over all replicas."""

  def update(state, grad_sum, noise_key, noise_state):
    grad_sum = own_sums.combine(grad_sum, mesh=mesh, rules=rules)
    return pure.update(state, grad_sum, noise_key, noise_state)

  return jax.jit(
    update,
    donate_argnames=("state", "noise_state"),
    out_shardings=(shardings, noise_shardings, rules_lib.replicated(mesh)),
  )


def _on_mesh(
  mesh: Mesh, rules: rules_lib.Rules, param_shardings: Any
) -> Callable[..., Any]:
  """What traces a function for the mesh."""
  if own_sums.num_replicas(mesh, rules) > 1:  # Each of them is one device.
    return functools.partial(mesh_lib.within, mesh)
  return functools.partial(
    layout.within, mesh, rules, param_shardings=param_shardings
  )


def _fetching_programs(
  pure: Pure, mesh: Mesh, rules: rules_lib.Rules
) -> dict[str, Any]:
  """What evaluates, and what brings values to the hosts."""
  return {
    "evaluate": jax.jit(
      layout.within(mesh, rules, pure.evaluate), out_shardings=_fetched(mesh)
    ),
    "fingerprint": jax.jit(
      trees.fingerprint, out_shardings=rules_lib.replicated(mesh)
    ),
    "whole": jax.jit(lambda tree: tree, out_shardings=_fetched(mesh)),
  }


def _noise_programs(
  mechanism: mechanism_lib.Mechanism, shardings: Any
) -> dict[str, Any]:
  """What begins the state of the DP noise, and what brings it back."""
  return {
    "init_noise_state": jax.jit(
      mechanism.privatizer().init, out_shardings=shardings
    ),
    "replay_noise": jax.jit(
      functools.partial(step_lib.replay_noise, mechanism=mechanism),
      donate_argnames="noise_state",
      out_shardings=shardings,
    ),
  }


def _with_frozen(
  program: Program,
  config: config_lib.ExperimentConfig,
  frozen_fn: Callable[[], Any],
  frozen_shardings: Any,
) -> Program:
  """Hands the steps what is not trained, and begins from weights on disk."""
  frozen = jax.jit(frozen_fn, out_shardings=frozen_shardings)
  begin_with = functools.partial(
    stored_weights.placed, config.model, mesh=program.mesh, rules=program.rules
  )
  if config.model.decoder_weights:
    stored_weights.check_same_decoder(
      config.model
    )  # Now, and not after an hour of waiting.

  def init():
    state = program.init()
    params = begin_with(state.params, dtype=jnp.float32)
    average = None
    if state.average is not None:  # Of its own arrays: both are donated.
      average = jax.tree.map(jnp.copy, params)
    return dataclasses.replace(state, params=params, average=average)

  @functools.cache
  def all_frozen():
    # Once, and before the first step: what the guard forbids is a stall.
    with jax.transfer_guard("allow"):
      return begin_with(frozen(), dtype=initial.FROZEN_DTYPE)

  def accumulate(*args):
    return program.accumulate(*args, frozen=all_frozen())

  def evaluate(*args):
    return program.evaluate(*args, frozen=all_frozen())

  return dataclasses.replace(
    program,
    init=init,
    accumulate=accumulate,
    evaluate=evaluate,
    frozen=all_frozen,
  )


def _weights(
  config: config_lib.ExperimentConfig, params: Any, rules: rules_lib.Rules
) -> dict[str, Any]:
  """`weights` and `abstract_weights` of a program.

  The decoder casts its parameters wherever it uses them, so that casting them
  first changes no value; other modules need not.
  """
  if not config.perf.gather_weights:
    return {"weights": lambda params: params, "abstract_weights": params}
  dtype = jnp.dtype(config.model.decoder.compute_dtype.value)

  def cast(params):
    low = lambda leaf: leaf.astype(dtype)
    return {
      name: jax.tree.map(low, part) if name == "decoder" else part
      for name, part in params.items()
    }

  sharding_of = lambda leaf: leaf.sharding
  shardings = jax.tree.map(sharding_of, params)
  mesh = jax.tree.leaves(shardings)[0].mesh
  shardings = layout.gathered(mesh, rules, shardings)
  return {
    "weights": jax.jit(cast, out_shardings=shardings),
    "abstract_weights": initial.abstract(
      jax.eval_shape(cast, params), shardings
    ),
  }


def _accumulate(
  grad_sum: step_lib.GradSum,
  params: Any,
  microbatch: losses.Batch,
  root_key: jax.Array,
  step: jax.Array,
  clip_norm: jax.Array | None = None,
  frozen: Any = None,
  *,
  loss_fn: losses.LossFn,
  clipped_grad_of: Callable[[losses.LossFn], Any],
) -> tuple[step_lib.GradSum, step_lib.PerExample]:
  """`step.accumulate`; frozen parameters are constants of the loss."""
  loss_fn = lora.with_frozen(loss_fn, frozen or {})
  return step_lib.accumulate(
    grad_sum,
    params,
    microbatch,
    root_key,
    step,
    clip_norm,
    clipped_grad_fn=clipped_grad_of(loss_fn),
  )


def _evaluate(
  params: Any,
  batch: losses.Batch,
  root_key: jax.Array,
  frozen: Any = None,
  *,
  model: multimodal.PPNet,
  noise_config: config_lib.AttentionNoiseConfig,
) -> tuple[jax.Array, jax.Array | None]:
  """`step.evaluate` of trained and frozen parameters together."""
  return step_lib.evaluate(
    lora.combine(params, frozen or {}),
    batch,
    root_key,
    model=model,
    noise_config=noise_config,
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


def _model(
  config: config_lib.ModelConfig,
  placeholder_ids: Mapping[str, int],
  answer_ids: Sequence[int],
) -> Any:
  """The network, with the private cut that the record claims."""
  if config.linear is not None:
    if not len(answer_ids):
      checks.fail(
        "classes for a linear model",
        "Set --config.data.task=CLASSIFY, or --config.model.linear=none.",
        answer_ids=list(answer_ids),
      )
    return linear.LinearClassifier(
      config.linear, config.decoder.vocab_size, tuple(map(int, answer_ids))
    )
  cut = None
  if config.private_cut.layer is not None:
    claim = input_privacy.claim(config.private_cut)
    cut = private_cut.PrivateCut(
      layer=claim["layer"],
      l2_clip_norm=claim["l2_clip_norm"],
      noise_stddev=claim["noise_stddev"],
    )
  return multimodal.PPNet(config, dict(placeholder_ids), cut=cut)


def _cut_keys(config: config_lib.PrivateCutConfig, mesh: Mesh) -> Any:
  """A function of a batch's records and views, or None without a cut.

  Each call draws anew.
  """
  if config.layer is None:
    return None
  entropy = hosts.from_first(lambda: input_privacy.noise_root_entropy(config))
  root_key = rules_lib.put(prng.root(entropy), mesh)
  numbers = itertools.count()

  @jax.jit
  def keys(root_key, number, index, view):
    stem = prng.stream(root_key, prng.Stream.PRIVATE_CUT, number)
    of_records = prng.per_record(stem, index)
    return of_records if view is None else prng.per_view(of_records, view)

  def fresh(index, view):
    number = rules_lib.put(np.uint32(next(numbers)), mesh)
    return keys(root_key, number, index, view)

  return fresh


def _engine(
  clipped_grad_of_frozen: Callable[[Any], Any],
  params: Any,
  frozen: Any,
  batch: Any,
  *,
  on_mesh: Callable[..., Any],
) -> engine_choice.Choice | None:
  """The engine for these shapes; what is refused is refused here."""
  choices = []

  def trace(frozen):  # Shapes of constants exist in a trace alone.
    grad_fn = clipped_grad_of_frozen(frozen)
    choices.append(grad_fn.engine_choice(params, batch))

  jax.eval_shape(on_mesh(trace), frozen)
  return choices[0]


def _clipped_grad_of(
  mechanism: mechanism_lib.Mechanism,
  model: multimodal.PPNet,
  example: Mapping[str, np.ndarray],
  params: Any,
  *,
  is_trained: initial.IsTrained,
) -> Callable[[losses.LossFn], Any]:
  """From a loss of the trained parameters to its clipped gradients."""
  num_stacked_axes = initial.num_stacked_axes(model, example)
  if is_trained is not None:
    num_stacked_axes, _ = lora.partition(num_stacked_axes, is_trained)
  return functools.partial(
    mechanism.clipped_grad_fn,
    has_aux=True,
    params=params,
    num_stacked_axes=num_stacked_axes,
  )
