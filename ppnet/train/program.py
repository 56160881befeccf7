"""The compiled pieces of one experiment, and where their arrays live."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ppnet import config as config_lib
from ppnet.core import checks, prng, trees
from ppnet.models import hf, lora, multimodal, private_cut
from ppnet.privacy import correlated, engine_choice, input_privacy
from ppnet.privacy import mechanism as mechanism_lib
from ppnet.sharding import mesh as mesh_lib
from ppnet.sharding import rules as rules_lib
from ppnet.train import losses, optimizer
from ppnet.train import state as state_lib
from ppnet.train import step as step_lib

# Of a parameter's name; None where all are trained.
IsTrained = Callable[[str], bool] | None

_FROZEN_DTYPE = jnp.bfloat16


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
    init_noise_state: params -> the state of the DP noise before step 0.
    replay_noise: see `step.replay_noise`; the noise state is donated.
    update: see `step.update`; both states are donated.
    evaluate: see `step.evaluate`.
    fingerprint: see `core.trees.fingerprint`.
    frozen: () -> the parameters that are not trained, computed or read once;
      `models.lora.combine` puts them and the trained ones together.
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
  init_noise_state: Any
  replay_noise: Any
  update: Any
  evaluate: Any
  fingerprint: Any
  frozen: Any
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
    ValueError: the mesh or the microbatch does not fit the devices, no
      parameter would be trained, or the decoder's weights are another model's.
  """
  mesh = _mesh(config, devices)
  on_mesh = functools.partial(mesh_lib.within, mesh)
  rules = rules_lib.Rules()
  model = _model(config.model, placeholder_ids)
  tx = optimizer.build(config.optimizer, config.train.num_steps)
  root_key = jax.device_put(prng.root(config.seed), rules_lib.replicated(mesh))
  is_trained = lora.trained_names(config)
  init_fn = functools.partial(
    _init,
    model=model,
    tx=tx,
    example=example,
    clip_norm=mechanism.initial_clip_norm,
    is_trained=is_trained,
  )
  shardings, frozen_shardings = _shardings(
    model, tx, example, mesh, rules, mechanism, is_trained=is_trained
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
  noise_shardings = _noise_shardings(
    mechanism, abstract_state.params, shardings.params, mesh=mesh
  )
  loss_fn = losses.make_loss_fn(model, config.attention_noise)
  clipped_grad_of = _clipped_grad_of(
    mechanism, model, example, abstract_state.params, is_trained=is_trained
  )
  frozen_fn = functools.partial(
    _init_frozen, root_key, model=model, example=example, is_trained=is_trained
  )
  num_rows = config.perf.microbatch_size * mechanism.rows_per_unit
  # Shardings of inputs travel with the arrays; outputs are pinned, so that no
  # step can change where the state lives.
  program = Program(
    mesh=mesh,
    rules=rules,
    model=model,
    engine=_engine(
      lambda frozen: clipped_grad_of(lora.with_frozen(loss_fn, frozen)),
      abstract_state.params,
      jax.eval_shape(frozen_fn),
      _abstract_batch(
        example, num_rows=num_rows, has_cut=model.cut is not None
      ),
      mesh=mesh,
    ),
    mechanism=mechanism,
    abstract_state=abstract_state,
    root_key=root_key,
    init=jax.jit(functools.partial(init_fn, root_key), out_shardings=shardings),
    init_grad_sum=jax.jit(step_lib.init_grad_sum, out_shardings=sum_sharding),
    accumulate=jax.jit(
      on_mesh(_accumulate, loss_fn=loss_fn, clipped_grad_of=clipped_grad_of),
      donate_argnames="grad_sum",
      out_shardings=(sum_sharding, None),
    ),
    **_noise_programs(mechanism, noise_shardings),
    update=jax.jit(
      functools.partial(
        step_lib.update,
        mechanism=mechanism,
        tx=tx,
        learning_rate_fn=optimizer.schedule(
          config.optimizer, config.train.num_steps
        ),
      ),
      donate_argnames=("state", "noise_state"),
      out_shardings=(shardings, noise_shardings, replicated),
    ),
    evaluate=jax.jit(
      on_mesh(_evaluate, model=model, noise_config=config.attention_noise)
    ),
    fingerprint=jax.jit(trees.fingerprint, out_shardings=replicated),
    frozen=lambda: {},
    cut_keys=_cut_keys(config.model.private_cut, mesh),
  )
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
  begin_with = functools.partial(_from_disk, config.model)
  if config.model.decoder_weights:
    _check_same_decoder(config.model)  # Now, and not after an hour of waiting.

  def init():
    state = program.init()
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state.params)
    params = begin_with(state.params, shardings, dtype=jnp.float32)
    return dataclasses.replace(state, params=params)

  @functools.cache
  def all_frozen():
    # Once, and before the first step: what the guard forbids is a stall.
    with jax.transfer_guard("allow"):
      return begin_with(frozen(), frozen_shardings, dtype=_FROZEN_DTYPE)

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
  config: config_lib.ModelConfig, params: Any, shardings: Any, *, dtype: Any
) -> Any:
  """Parameters with the decoder's stored ones in their places."""
  if not config.decoder_weights or not params.get("decoder"):
    return params
  _, stored = hf.load(config.decoder_weights, dtype=dtype)
  stored = {"decoder": stored}

  def replaced(path, leaf, sharding):
    names = [entry.key for entry in path]
    if lora.is_adapter(names[-1]) or names[0] != "decoder":
      return leaf
    value = functools.reduce(lambda node, name: node[name], names, stored)
    return jax.device_put(value, sharding)

  return jax.tree_util.tree_map_with_path(replaced, params, shardings)


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
  is_trained: IsTrained,
) -> state_lib.TrainState:
  """Initial parameters and optimizer state; a function of the key alone."""
  params = nn.meta.unbox(_boxed_params(root_key, model=model, example=example))
  params, _ = _split(params, is_trained)
  return state_lib.TrainState(
    step=np.int32(0),
    params=params,
    opt_state=tx.init(params),
    clip_norm=None if clip_norm is None else np.float32(clip_norm),
  )


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
  is_trained: IsTrained,
) -> Callable[[losses.LossFn], Any]:
  """From a loss of the trained parameters to its clipped gradients."""
  num_stacked_axes = _num_stacked_axes(model, example)
  if is_trained is not None:
    num_stacked_axes, _ = lora.partition(num_stacked_axes, is_trained)
  return functools.partial(
    mechanism.clipped_grad_fn,
    has_aux=True,
    params=params,
    num_stacked_axes=num_stacked_axes,
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


def _init_frozen(
  root_key: jax.Array,
  *,
  model: multimodal.PPNet,
  example: Mapping[str, np.ndarray],
  is_trained: IsTrained,
) -> Any:
  """The other parameters, as the same key gives them."""
  params = nn.meta.unbox(_boxed_params(root_key, model=model, example=example))
  return _split(params, is_trained)[1]


def _split(params: Any, is_trained: IsTrained) -> tuple[Any, Any]:
  """(trained, frozen); all are trained where `is_trained` is None."""
  if is_trained is None:
    return params, {}
  return lora.partition(params, is_trained, frozen_dtype=_FROZEN_DTYPE)


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


def _shardings(
  model: multimodal.PPNet,
  tx: optax.GradientTransformation,
  example: Mapping[str, np.ndarray],
  mesh: Mesh,
  rules: rules_lib.Rules,
  mechanism: mechanism_lib.Mechanism,
  *,
  is_trained: IsTrained,
) -> tuple[state_lib.TrainState, Any]:
  """One sharding per leaf of the train state, and of what is frozen."""
  boxed = jax.eval_shape(
    functools.partial(_boxed_params, model=model, example=example),
    jax.eval_shape(lambda: prng.root(0)),
  )
  everything = rules.param_shardings(mesh, boxed)
  params, frozen = everything, {}
  if is_trained is not None:
    params, frozen = lora.partition(everything, is_trained)
  replicated = rules_lib.replicated(mesh)
  opt_state = optax.tree.map_params(
    tx.init,
    lambda _, sharding: sharding,
    jax.eval_shape(tx.init, _split(nn.meta.unbox(boxed), is_trained)[0]),
    params,
    transform_non_params=lambda _: replicated,
  )
  has_clip_norm = mechanism.initial_clip_norm is not None
  state = state_lib.TrainState(
    step=replicated,
    params=params,
    opt_state=opt_state,
    clip_norm=replicated if has_clip_norm else None,
  )
  return state, frozen


def _noise_shardings(
  mechanism: mechanism_lib.Mechanism,
  abstract_params: Any,
  param_shardings: Any,
  *,
  mesh: Mesh,
) -> Any:
  """One sharding per leaf of the noise state: noise lives as parameters do."""
  state = jax.eval_shape(mechanism.privatizer().init, abstract_params)
  if not isinstance(state, correlated.BandedState):
    return jax.tree.map(lambda _: rules_lib.replicated(mesh), state)
  return correlated.BandedState(
    step=rules_lib.replicated(mesh),
    history=jax.tree.map(
      lambda sharding: NamedSharding(mesh, PartitionSpec(None, *sharding.spec)),
      param_shardings,
    ),
  )
