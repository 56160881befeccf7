"""Seconds from what a program does."""

import pytest

from ppnet.core import hlo
from ppnet.train import estimate

CHIP = estimate.Chip(
  available_bytes=1,
  flops=100.0,
  memory_bytes=10.0,
  link_bytes=2.0,
  cycles=50.0,
)
MESH = {"data": 1, "fsdp": 2, "tensor": 2}
GATHER = hlo.Collective(
  kind="all-gather", groups=((0, 2), (1, 3)), operand_bytes=12
)
COST = hlo.Cost(
  matmul_flops=300.0,
  cycles=200.0,
  memory_bytes=50.0,
  collectives={GATHER: 3},
  kernels={"attend": 2},
)


def test_each_part_is_a_quotient():
  found = estimate.estimate(COST, chip=CHIP, mesh=MESH, kernel_flops=100.0)
  assert found.compute_secs == 4.0
  assert found.kernel_secs == 1.0
  assert found.memory_secs == 5.0
  assert found.sent_bytes == [
    {"kind": "all-gather", "axes": "fsdp", "bytes": 36}
  ]
  assert found.collective_secs == 9.0
  assert found.least_secs == 9.0
  assert found.most_secs == 14.0


def test_products_at_the_peak_stand_in_for_cycles():
  cost = hlo.Cost(matmul_flops=300.0)
  found = estimate.estimate(cost, chip=CHIP, mesh=MESH, kernel_flops=0.0)
  assert found.compute_secs == 3.0


def test_a_step_is_as_many_microbatches_as_the_batch_needs_and_an_update():
  accumulate = estimate.estimate(COST, chip=CHIP, mesh=MESH, kernel_flops=100.0)
  update = estimate.estimate(
    hlo.Cost(cycles=50.0), chip=CHIP, mesh=MESH, kernel_flops=0.0
  )
  step = estimate.step(
    accumulate, update, expected_batch_size=100, microbatch_size=32
  )
  assert step["num_microbatches"] == 4
  assert step["compute_secs"] == 4 * 4.0 + 1.0
  assert step["most_secs"] == 4 * 14.0 + 1.0
  assert step["sent_bytes"] == 4 * 36
  assert step["left_out"]


@pytest.mark.parametrize("kind", sorted(estimate.CHIPS))
def test_a_chip_s_numbers_are_of_the_right_size(kind):
  chip = estimate.CHIPS[kind]
  assert 1e14 < chip.flops < 1e15
  assert 5e11 < chip.memory_bytes < 5e12
  assert 1e10 < chip.link_bytes < 5e11
  # The peak is a whole number of 128 x 128 products a cycle.
  units = chip.flops / (2 * 128 * 128 * chip.cycles)
  assert abs(units - round(units)) < 0.03
