"""Initial parameters and optimizer state, and where they live on the mesh."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ppnet.core import prng
from ppnet.models import lora, multimodal
from ppnet.privacy import correlated
from ppnet.privacy import mechanism as mechanism_lib
from ppnet.sharding import rules as rules_lib
from ppnet.train import losses
from ppnet.train import state as state_lib

# Of a parameter's name; None where all are trained.
IsTrained = Callable[[str], bool] | None

FROZEN_DTYPE = jnp.bfloat16


def abstract(shapes: Any, shardings: Any) -> Any:
  """Shapes and dtypes with where their arrays live."""
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=sharding
    ),
    shapes,
    shardings,
  )


def init_state(
  root_key: jax.Array,
  *,
  model: multimodal.PPNet,
  tx: optax.GradientTransformation,
  example: Mapping[str, np.ndarray],
  clip_norm: float | None,
  is_trained: IsTrained,
  has_average: bool,
) -> state_lib.TrainState:
  """Initial parameters and optimizer state; a function of the key alone."""
  params = nn.meta.unbox(_boxed_params(root_key, model=model, example=example))
  params, _ = _split(params, is_trained)
  return state_lib.TrainState(
    step=np.int32(0),
    params=params,
    opt_state=tx.init(params),
    clip_norm=None if clip_norm is None else np.float32(clip_norm),
    average=params if has_average else None,
  )


def init_frozen(
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
  return lora.partition(params, is_trained, frozen_dtype=FROZEN_DTYPE)


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


def num_stacked_axes(
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


def shardings(
  model: multimodal.PPNet,
  tx: optax.GradientTransformation,
  example: Mapping[str, np.ndarray],
  mesh: Mesh,
  rules: rules_lib.Rules,
  mechanism: mechanism_lib.Mechanism,
  *,
  is_trained: IsTrained,
  has_average: bool,
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
    average=params if has_average else None,
  )
  return state, frozen


def noise_shardings(
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
