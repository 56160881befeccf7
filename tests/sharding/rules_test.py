"""Logical axes land on mesh axes once, evenly, or not at all."""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from ppnet import config as config_lib
from ppnet.models import llama
from ppnet.sharding import mesh as mesh_lib
from ppnet.sharding import rules as rules_lib

Strategy = config_lib.Strategy


def mesh(data=2, fsdp=2, tensor=2, **others):
  return mesh_lib.build(
    config_lib.MeshConfig(data=data, fsdp=fsdp, tensor=tensor, **others)
  )


def boxed(shape, names):
  return nn.LogicallyPartitioned(
    jax.ShapeDtypeStruct(shape, jnp.float32), names
  )


def test_mesh_fills_the_free_axis():
  built = mesh(data=-1, fsdp=4, tensor=1)
  assert built.axis_names == ("slice", "data", "fsdp", "sequence", "tensor")
  assert tuple(built.shape.values()) == (1, 2, 4, 1, 1)


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


def test_strategies_split_parameters_and_examples_as_their_names_say():
  spec = {
    strategy: (rules.spec(("embed", "mlp")), rules.spec(("batch", "sequence")))
    for strategy, rules in rules_lib.STRATEGIES.items()
  }
  everywhere = ("data", "fsdp", "tensor")
  assert spec == {
    Strategy.DATA_PARALLEL: (P(None, None), P(everywhere, "sequence")),
    Strategy.ZERO3: (
      P(("fsdp", "sequence", "tensor"), None),
      P(everywhere, "sequence"),
    ),
    Strategy.TENSOR: (P(None, "tensor"), P(("data", "fsdp"), "sequence")),
    Strategy.MIXED: (P("fsdp", "tensor"), P(("data", "fsdp"), "sequence")),
    Strategy.SLICES: (
      P("fsdp", "tensor"),
      P(("slice", "data", "fsdp"), "sequence"),
    ),
  }


def test_no_parameter_is_split_between_slices():
  rules = rules_lib.STRATEGIES[Strategy.SLICES]
  model = llama.Llama(config_lib.LlamaConfig(num_layers=2))
  shapes = jax.eval_shape(
    lambda key: model.init(key, jnp.zeros((1, 2), jnp.int32)),
    jax.eval_shape(jax.random.key, 0),
  )["params"]
  shardings = rules.param_shardings(mesh(slice=2, data=1), shapes)
  assert all(
    "slice" not in str(leaf.spec) for leaf in jax.tree.leaves(shardings)
  )
  # Fails if: parameters are gathered over the slow network.


@pytest.mark.parametrize(
  ("strategy", "sizes", "expected"),
  [
    (Strategy.DATA_PARALLEL, (2, 2, 2), ("data", "fsdp", "tensor")),
    (Strategy.MIXED, (8, 1, 1), ("data",)),
    (Strategy.MIXED, (4, 2, 1), ()),  # `fsdp` splits parameters.
    (Strategy.ZERO3, (8, 1, 1), ("data",)),
    (Strategy.TENSOR, (4, 2, 1), ("data", "fsdp")),
    (Strategy.TENSOR, (2, 2, 2), ()),
  ],
)
def test_replicas_keep_sums_of_their_own_where_they_hold_all_parameters(
  strategy, sizes, expected
):
  assert rules_lib.STRATEGIES[strategy].own_sums(mesh(*sizes)) == expected


def chips(num_slices, shape=(2, 2)):
  """What a device of several TPU slices says of itself."""
  return [
    types.SimpleNamespace(
      id=(i * shape[0] + x) * shape[1] + y,
      slice_index=i,
      process_index=i,
      coords=(x, y, 0),
      core_on_chip=0,
      platform="tpu",
      device_kind="TPU v5 lite",
    )
    for x in range(shape[0])
    for y in range(shape[1])
    for i in range(num_slices)  # Not in the order of the slices.
  ]


def test_a_slice_of_the_mesh_is_a_slice_of_the_machines():
  arranged = mesh_lib.arranged((2, 1, 2, 1, 2), chips(2))
  assert arranged.shape == (2, 1, 2, 1, 2)
  for number, part in enumerate(arranged):
    assert {device.slice_index for device in part.flat} == {number}
    assert len({device.id for device in part.flat}) == 4
  with pytest.raises(ValueError, match=r"to be the 2 slices.*mesh\.slice=1"):
    mesh_lib.arranged((1, 2, 2, 1, 2), chips(2))
  # Fails if: parameters are gathered between slices, over the slow network.


def test_neighbours_in_the_mesh_are_neighbours_in_the_pod():
  host = lambda chip: (chip.coords[0] // 2, chip.coords[1] // 2)
  devices = sorted(chips(1, (8, 8)), key=host)
  arranged = mesh_lib.arranged((1, 1, 8, 1, 8), devices)
  places = np.array([each.coords for each in arranged.flat]).reshape(8, 8, 3)
  for axis in (0, 1):
    steps = np.abs(np.diff(places, axis=axis)).sum(axis=-1)
    assert (steps == 1).all()
  # Fails if: devices stay in the order of their hosts, 2 x 2 at a time.
