"""The compiled pieces of one experiment, and where their arrays live."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ppnet import config as config_lib
from ppnet.core import checks, prng, trees
from ppnet.models import multimodal
from ppnet.privacy import correlated
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
  """

  mesh: Mesh
  rules: rules_lib.Rules
  model: multimodal.PPNet
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

  @property
  def num_parameters(self) -> int:
    """Number of trained parameters."""
    return trees.num_parameters(self.abstract_state.params)

  def put_batch(self, batch: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Places a batch, its examples spread over the mesh."""
    return jax.device_put(dict(batch), self.rules.batch_sharding(self.mesh))

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
  model = multimodal.PPNet(config.model, dict(placeholder_ids))
  tx = optimizer.build(config.optimizer, config.train.num_steps)
  root_key = jax.device_put(prng.root(config.seed), rules_lib.replicated(mesh))
  init_fn = functools.partial(_init, model=model, tx=tx, example=example)
  shardings = _state_shardings(model, tx, example, mesh=mesh, rules=rules)
  abstract_state = jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=sharding
    ),
    jax.eval_shape(init_fn, root_key),
    shardings,
  )
  sum_sharding = step_lib.GradSum(
    total=shardings.params, num_examples=rules_lib.replicated(mesh)
  )
  noise_shardings = _noise_shardings(
    mechanism, abstract_state.params, shardings.params, mesh=mesh
  )
  loss_fn = losses.make_loss_fn(model, config.attention_noise)
  # Shardings of inputs travel with the arrays; outputs are pinned, so that no
  # step can change where the state lives.
  return Program(
    mesh=mesh,
    rules=rules,
    model=model,
    mechanism=mechanism,
    abstract_state=abstract_state,
    root_key=root_key,
    init=jax.jit(functools.partial(init_fn, root_key), out_shardings=shardings),
    init_grad_sum=jax.jit(step_lib.init_grad_sum, out_shardings=sum_sharding),
    accumulate=jax.jit(
      functools.partial(
        step_lib.accumulate,
        clipped_grad_fn=mechanism.clipped_grad_fn(loss_fn, has_aux=True),
      ),
      donate_argnames="grad_sum",
      out_shardings=(sum_sharding, None),
    ),
    init_noise_state=jax.jit(
      mechanism.privatizer().init, out_shardings=noise_shardings
    ),
    replay_noise=jax.jit(
      functools.partial(step_lib.replay_noise, mechanism=mechanism),
      donate_argnames="noise_state",
      out_shardings=noise_shardings,
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
      donate_argnames=("state", "noise_state"),
      out_shardings=(
        shardings,
        noise_shardings,
        rules_lib.replicated(mesh),
      ),
    ),
    evaluate=jax.jit(
      functools.partial(
        step_lib.evaluate, model=model, noise_config=config.attention_noise
      )
    ),
  )


def _init(
  root_key: jax.Array,
  *,
  model: multimodal.PPNet,
  tx: optax.GradientTransformation,
  example: Mapping[str, np.ndarray],
) -> state_lib.TrainState:
  """Initial parameters and optimizer state; a function of the key alone."""
  params = nn.meta.unbox(_boxed_params(root_key, model=model, example=example))
  return state_lib.TrainState(
    step=np.int32(0), params=params, opt_state=tx.init(params)
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
