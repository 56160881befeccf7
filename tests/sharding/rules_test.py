"""Logical axes land on mesh axes once, evenly, or not at all."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from ppnet import config as config_lib
from ppnet.models import llama
from ppnet.sharding import mesh as mesh_lib
from ppnet.sharding import rules as rules_lib


def mesh(data=2, fsdp=2, tensor=2):
  return mesh_lib.build(
    config_lib.MeshConfig(data=data, fsdp=fsdp, tensor=tensor)
  )


def boxed(shape, names):
  return nn.LogicallyPartitioned(
    jax.ShapeDtypeStruct(shape, jnp.float32), names
  )


def test_mesh_fills_the_free_axis():
  built = mesh(data=-1, fsdp=4, tensor=1)
  assert dict(built.shape) == {"data": 2, "fsdp": 4, "tensor": 1}


@pytest.mark.parametrize(
  "sizes", [(3, 1, 1), (-1, 3, 1), (2, 2, 1), (16, 1, 1)]
)
def test_mesh_that_does_not_use_every_device_is_refused(sizes):
  with pytest.raises(ValueError, match="multiply to the 8 devices"):
    mesh(*sizes)


def test_spec_follows_the_rules():
  rules = rules_lib.Rules()
  assert rules.spec(("embed", "mlp")) == P("fsdp", "tensor")
  assert rules.spec((None, "layers", "vocab")) == P(None, None, "tensor")
  assert rules.spec(("batch",)) == P(("data", "fsdp"))


def test_spec_refuses_unknown_and_doubled_axes():
  rules = rules_lib.Rules()
  with pytest.raises(ValueError, match="logical_axis='width'"):
    rules.spec(("width",))
  with pytest.raises(ValueError, match="at most once"):
    rules.spec(("mlp", "vocab"))


def test_a_parameter_that_does_not_divide_is_named():
  params = {"layer": {"kernel": boxed((6, 5), ("embed", "mlp"))}}
  with pytest.raises(
    ValueError, match=r"\['layer'\]\['kernel'\].*'tensor' \(2\)"
  ):
    rules_lib.Rules().param_shardings(mesh(), params)
  # Fails if: a parameter that does not fit is quietly replicated.


def test_every_llama_parameter_has_logical_axes_for_all_dimensions():
  model = llama.Llama(config_lib.LlamaConfig(num_layers=2))
  shapes = jax.eval_shape(
    lambda key: model.init(key, jnp.zeros((1, 2), jnp.int32)),
    jax.eval_shape(jax.random.key, 0),
  )["params"]
  leaves = jax.tree.leaves(
    shapes, is_leaf=lambda leaf: isinstance(leaf, nn.meta.AxisMetadata)
  )
  for leaf in leaves:
    assert isinstance(leaf, nn.LogicallyPartitioned)
    assert len(leaf.names) == leaf.value.ndim
  shardings = rules_lib.Rules().param_shardings(mesh(), shapes)
  kernel = shardings["layers"]["mlp"]["down_proj"]["kernel"]
  assert kernel.spec == P(None, "tensor", "fsdp")
