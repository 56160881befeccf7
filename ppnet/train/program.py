"""The compiled pieces of one experiment, and where their arrays live."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from ppnet import config as config_lib
from ppnet.core import checks, hosts, prng, trees
from ppnet.data import pipeline
from ppnet.models import hf, lora, multimodal, private_cut
from ppnet.privacy import engine_choice, input_privacy
from ppnet.privacy import mechanism as mechanism_lib
from ppnet.sharding import mesh as mesh_lib
from ppnet.sharding import rules as rules_lib
from ppnet.train import initial, losses, optimizer
from ppnet.train import state as state_lib
from ppnet.train import step as step_lib


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
    model: the network.
    engine: how clipped sums are computed, and why so; None if nothing is.
    mechanism: sampler, clip, noise and accountant.
    abstract_state: shapes, dtypes and shardings of the train state.
    abstract_frozen: the same of what is not trained.
    root_key: root of initial parameters and attention noise, from the seed.
    init: () -> TrainState.
    init_grad_sum: params -> an empty `step.GradSum`.
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
  model: multimodal.PPNet
  engine: engine_choice.Choice | None
  mechanism: mechanism_lib.Mechanism
  abstract_state: state_lib.TrainState
  abstract_frozen: Any
  root_key: jax.Array
  init: Any
  init_grad_sum: Any
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

  def put_batch(self, batch: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Places a batch, its examples spread over the mesh.

    With a private cut, every batch that is placed gets keys of its own: a state
    that was noised twice with one draw would give away a difference.
    """
    sharding = self.rules.batch_sharding(self.mesh)
    if jax.process_count() == 1:
      placed = jax.device_put(dict(batch), sharding)
    else:
      # The guard takes this for an implicit transfer; it is meant.
      with jax.transfer_guard("allow"):
        placed = {
          name: jax.make_array_from_process_local_data(sharding, value)
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
  devices: list[jax.Device] | None = None,
  is_at_hand: bool = True,
) -> Program:
  """Puts model, mechanism and mesh together. Compiles nothing yet.

  Args:
    config: the experiment.
    mechanism: from `privacy.mechanism.build`.
    example: one example of the pipeline, for its shapes.
    placeholder_ids: modality to the token whose places it takes.
    devices: all of this job's devices when None.
    is_at_hand: False where this process cannot reach the devices: nothing is
      put on them, and the functions can be lowered and compiled, not called.

  Raises:
    ValueError: the mesh or the microbatch does not fit the devices, no
      parameter would be trained, or the decoder's weights are another model's.
  """
  mesh = _mesh(config, devices)
  rules = rules_lib.Rules()
  model = _model(config.model, placeholder_ids)
  tx = optimizer.build(config.optimizer, config.train.num_steps)
  root_key = prng.root(config.seed)
  if is_at_hand:
    root_key = rules_lib.put(root_key, mesh)
  is_trained = lora.trained_names(config)
  init_fn = functools.partial(
    initial.init_state,
    model=model,
    tx=tx,
    example=example,
    clip_norm=mechanism.initial_clip_norm,
    is_trained=is_trained,
  )
  shardings, frozen_shardings = initial.shardings(
    model, tx, example, mesh, rules, mechanism, is_trained=is_trained
  )
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
  num_rows = config.perf.microbatch_size * mechanism.rows_per_unit
  pure = Pure(
    init=init_fn,
    accumulate=functools.partial(
      _accumulate, loss_fn=loss_fn, clipped_grad_of=clipped_grad_of
    ),
    update=_update(config, mechanism, tx),
    evaluate=functools.partial(
      _evaluate, model=model, noise_config=config.attention_noise
    ),
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
        example, num_rows=num_rows, has_cut=model.cut is not None
      ),
      mesh=mesh,
    ),
    mechanism=mechanism,
    abstract_state=abstract_state,
    abstract_frozen=abstract_frozen,
    root_key=root_key,
    init=jax.jit(functools.partial(init_fn, root_key), out_shardings=shardings),
    **_step_programs(pure, mesh, shardings, noise_shardings),
    **_noise_programs(mechanism, noise_shardings),
    **_fetching_programs(pure, mesh),
    host=_host(mesh, rules) if is_at_hand else pipeline.Host(),
    frozen=lambda: {},
    pure=pure,
    begins_from_disk=bool(config.model.decoder_weights),
    cut_keys=_cut_keys(config.model.private_cut, mesh) if is_at_hand else None,
  )
  if not is_at_hand:
    return program
  if is_trained is None and not config.model.decoder_weights:
    return program
  return _with_frozen(program, config, frozen_fn, frozen_shardings)


def _mesh(
  config: config_lib.ExperimentConfig, devices: list[jax.Device] | None
) -> Mesh:
  """The devices; raises where a microbatch cannot be shared among them."""
  mesh = mesh_lib.build(config.mesh, devices)
  ways = mesh.shape["data"] * mesh.shape["fsdp"]
  if config.perf.microbatch_size % ways:
    checks.fail(
      f"perf.microbatch_size to be a multiple of the {ways} devices that share"
      " a batch",
      f"Use {-(-config.perf.microbatch_size // ways) * ways}.",
      **{"perf.microbatch_size": config.perf.microbatch_size},
    )
  return mesh


def _host(mesh: Mesh, rules: rules_lib.Rules) -> pipeline.Host:
  """The rows of a batch that this process's devices hold."""
  parts = rules_lib.num_parts(mesh, rules.batch)
  indices = rules.batch_sharding(mesh).addressable_devices_indices_map((parts,))
  slices = [index[0] for index in indices.values() if index is not None]
  own = sorted({rows.indices(parts)[0] for rows in slices})
  if own != list(range(own[0], own[0] + len(own))):
    checks.fail(
      "a mesh that gives each process rows side by side",
      "Let the axes data and fsdp be whole machines, and tensor be within one.",
      rows=own,
      of=parts,
    )
  return pipeline.Host(first=own[0], parts=len(own), of=parts)


def _update(
  config: config_lib.ExperimentConfig,
  mechanism: mechanism_lib.Mechanism,
  tx: optax.GradientTransformation,
) -> Callable[..., Any]:
  """`step.update` of this experiment."""
  return functools.partial(
    step_lib.update,
    mechanism=mechanism,
    tx=tx,
    learning_rate_fn=optimizer.schedule(
      config.optimizer, config.train.num_steps
    ),
  )


def _fetched(mesh: Mesh) -> NamedSharding | None:
  """Where rows are that will be fetched: whole on every process."""
  return rules_lib.replicated(mesh) if jax.process_count() > 1 else None


def _step_programs(
  pure: Pure,
  mesh: Mesh,
  shardings: state_lib.TrainState,
  noise_shardings: Any,
) -> dict[str, Any]:
  """What a step is made of."""
  replicated = rules_lib.replicated(mesh)
  sum_sharding = step_lib.GradSum(
    total=shardings.params, num_units=replicated, count=replicated
  )
  return {
    "init_grad_sum": jax.jit(
      step_lib.init_grad_sum, out_shardings=sum_sharding
    ),
    "accumulate": jax.jit(
      mesh_lib.within(mesh, pure.accumulate),
      donate_argnames="grad_sum",
      out_shardings=(sum_sharding, _fetched(mesh)),
    ),
    "update": jax.jit(
      pure.update,
      donate_argnames=("state", "noise_state"),
      out_shardings=(shardings, noise_shardings, replicated),
    ),
  }


def _fetching_programs(pure: Pure, mesh: Mesh) -> dict[str, Any]:
  """What evaluates, and what brings values to the hosts."""
  return {
    "evaluate": jax.jit(
      mesh_lib.within(mesh, pure.evaluate), out_shardings=_fetched(mesh)
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
    _from_disk, config.model, mesh=program.mesh, rules=program.rules
  )
  if config.model.decoder_weights:
    _check_same_decoder(config.model)  # Now, and not after an hour of waiting.

  def init():
    state = program.init()
    params = begin_with(state.params, dtype=jnp.float32)
    return dataclasses.replace(state, params=params)

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


def _check_same_decoder(config: config_lib.ModelConfig) -> None:
  """Raises, naming the fields, unless the weights are of this decoder."""
  stored = hf.read_config(config.decoder_weights)
  free = ("lora", "remat", "compute_dtype", "max_seq_len")
  names = [field.name for field in dataclasses.fields(stored)]
  pairs = {
    name: (getattr(stored, name), getattr(config.decoder, name))
    for name in names
    if name not in free
  }
  wrong = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
  if wrong:
    checks.fail(
      f"model.decoder to be the one of {config.decoder_weights}",
      "Set these fields (stored, configured), or leave decoder_weights empty.",
      **wrong,
    )


def _from_disk(
  config: config_lib.ModelConfig,
  params: Any,
  *,
  mesh: Mesh,
  rules: rules_lib.Rules,
  dtype: Any,
) -> Any:
  """Parameters with the decoder's stored ones in their places.

  The arrays they replace are deleted first: no device holds both.
  """
  if not config.decoder_weights:
    return params
  replaced = {
    "/".join(entry.key for entry in path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(
      params.get("decoder", {})
    )
    if not lora.is_adapter(path[-1].key)
  }
  if not replaced:
    return params
  for leaf in replaced.values():
    leaf.delete()
  _, stored = hf.load(
    config.decoder_weights,
    dtype=dtype,
    mesh=mesh,
    rules=rules,
    is_wanted=replaced.__contains__,
  )

  def value(path, leaf):
    names = [entry.key for entry in path]
    if "/".join(names) not in replaced:
      return leaf
    return functools.reduce(lambda node, name: node[name], names, stored)

  decoder = jax.tree_util.tree_map_with_path(value, params["decoder"])
  return {**params, "decoder": decoder}


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
  config: config_lib.ModelConfig, placeholder_ids: Mapping[str, int]
) -> multimodal.PPNet:
  """The network, with the private cut that the record claims."""
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
  mesh: Mesh,
) -> engine_choice.Choice | None:
  """The engine for these shapes; what is refused is refused here."""
  choices = []

  def trace(frozen):  # Shapes of constants exist in a trace alone.
    grad_fn = clipped_grad_of_frozen(frozen)
    choices.append(grad_fn.engine_choice(params, batch))

  jax.eval_shape(mesh_lib.within(mesh, trace), frozen)
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
