"""Replicas add up their own examples, and meet once a step."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from ppnet import config as config_lib
from ppnet.sharding import mesh as mesh_lib
from ppnet.sharding import rules as rules_lib
from ppnet.train import own_sums
from ppnet.train import step as step_lib

NUM_ROWS = 16
RULES = rules_lib.STRATEGIES[config_lib.Strategy.DATA_PARALLEL]
MESH = config_lib.MeshConfig(data=4, fsdp=2)
REDUCTIONS = re.compile("all-reduce|reduce-scatter|all-gather|all-to-all")


def add_rows(grad_sum, params, microbatch, scale):
  """Stands for `step.accumulate`: a sum, a count, and a value of each row."""
  rows = scale * microbatch["x"] * params["w"][None]
  grad_sum = step_lib.GradSum(
    total={"w": grad_sum.total["w"] + rows.sum(axis=0)},
    num_units=grad_sum.num_units + len(rows),
    count=grad_sum.count + rows[:, 0].sum(),
  )
  return grad_sum, rows.max(axis=1)


def compiled(fn, *args):
  return jax.jit(fn).lower(*args).compile()


@pytest.mark.parametrize("axes", [{"data": 4, "fsdp": 2}, {"data": 1}])
def test_own_sums_are_combined_to_the_sum_of_all(axes):
  config = config_lib.MeshConfig(**axes)
  num_devices = np.prod(list(axes.values()))
  mesh = mesh_lib.build(config, jax.devices()[:num_devices])
  on_mesh = {"mesh": mesh, "rules": RULES}
  params = {"w": jnp.arange(1.0, 6.0)}
  shardings = own_sums.shardings(
    {"w": jax.NamedSharding(mesh, P(None))}, **on_mesh
  )
  init = jax.jit(
    lambda params: own_sums.init(params, **on_mesh), out_shardings=shardings
  )
  grad_sum = init(params)
  accumulate = own_sums.accumulate(add_rows, **on_mesh)
  rng = np.random.default_rng(0)
  batches = rng.integers(-9, 9, (3, NUM_ROWS, 5)).astype(np.float32)
  combine = lambda grad_sum: own_sums.combine(grad_sum, **on_mesh)
  for x in batches:  # Whole numbers: sums are exact in any order.
    rows = jax.device_put({"x": x}, RULES.batch_sharding(mesh))
    scale = jnp.float32(2)
    program = compiled(accumulate, grad_sum, params, rows, scale)
    assert not REDUCTIONS.search(program.as_text())
    grad_sum, largest = program(grad_sum, params, rows, scale)
    np.testing.assert_array_equal(
      largest, (2 * x * params["w"][None]).max(axis=1)
    )
  total = jax.jit(combine)(grad_sum)
  expected = (2 * batches * np.arange(1.0, 6.0)).sum(axis=(0, 1))
  np.testing.assert_array_equal(total.total["w"], expected)
  assert total.num_units == 3 * NUM_ROWS
  assert total.count == expected[0]
  if num_devices > 1:
    text = compiled(combine, grad_sum).as_text()
    assert REDUCTIONS.search(text)
  # Fails if: every microbatch is reduced over the network, or a replica's
  # examples are counted twice.
