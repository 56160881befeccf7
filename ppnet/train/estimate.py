"""How long a compiled program would take on chips that are not here.

>>> chip = CHIPS["TPU v5 lite"]
>>> cost = hlo.Cost(cycles=1.5e9, matmul_flops=1e14)
>>> estimate(cost, chip=chip, mesh={"data": 1}, kernel_flops=0).compute_secs
1.0

*What is left out.* `LEFT_OUT` says it in the record, too. An estimate compares
programs; it is not a measurement.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ppnet.core import hlo

LEFT_OUT = (
  "how much of the collectives hides behind the computation: a step takes at"
  " least the longest part, at most compute, kernels and collectives in turn",
  "latency of collectives, and links that two of them share: each has one axis"
  " of the torus to itself, in both directions, and a ring that closes",
  "what keeps a kernel from the chip's peak; blocks that a causal mask skips"
  " are counted",
  "conditionals' dearer branches, which are in `most`",
  "the host: dispatch, data, checkpoints, metrics, and the ledger's fsync",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """What a chip can do.

  Attributes:
    available_bytes: what the compiler lets a program have of its memory; it
      names the number where a program is larger (libtpu 0.0.51).
    flops: of bfloat16 products, per second.
    memory_bytes: to and from its main memory, per second.
    link_bytes: through one link to a neighbour, one way, per second.
    cycles: of the compiler's clock, per second.
  """

  available_bytes: int
  flops: float
  memory_bytes: float
  link_bytes: float
  cycles: float


# By `device_kind`. Peak, memory and interconnect are the specifications at
# https://cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}: 275, 197, 459 and 918
# TFLOP/s; 1,228, 819, 2,765 and 1,640 GB/s; and 2,400, 1,600, 4,800 and 3,200
# Gbit/s one way over the 6, 4, 6 and 4 links of a 3D or 2D torus. The clock is
# published for v4 (Jouppi et al. 2023, table 4,
# https://arxiv.org/abs/2304.01433); elsewhere it is the peak over the matrix
# units' products per cycle: 4 and 8 units of 128 x 128, and on v6e as many as 4
# of 256 x 256. One bfloat16 product of 8192 x 8192 is then estimated at 0.93 of
# the peak on v4, 0.88 on v5e, 0.90 on v5p and 0.70 on v6e.
CHIPS = {
  "TPU v4": Chip(
    available_bytes=int(30.75 * 2**30),
    flops=275e12,
    memory_bytes=1228e9,
    link_bytes=50e9,
    cycles=1.05e9,
  ),
  "TPU v5 lite": Chip(
    available_bytes=int(15.75 * 2**30),
    flops=197e12,
    memory_bytes=819e9,
    link_bytes=50e9,
    cycles=1.5e9,
  ),
  "TPU v5": Chip(
    available_bytes=int(95.73 * 2**30),
    flops=459e12,
    memory_bytes=2765e9,
    link_bytes=100e9,
    cycles=1.75e9,
  ),
  "TPU v6 lite": Chip(
    available_bytes=int(31.24 * 2**30),
    flops=918e12,
    memory_bytes=1640e9,
    link_bytes=100e9,
    cycles=1.75e9,
  ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
  """One execution, on one device.

  Attributes:
    matmul_flops: of products as they were compiled, kernels' excluded.
    kernel_flops: of custom kernels' products.
    memory_bytes: to and from main memory, kernels' excluded.
    sent_bytes: sent to other devices: {"kind", "axes", "bytes"}, most first.
    kernels: calls of custom kernels by name.
    compute_secs: the compiler's cycles at the chip's clock, which its memory
      traffic is a part of; products at the peak where it counts no cycles.
    kernel_secs: kernels' products at the chip's peak.
    memory_secs: memory traffic at its bandwidth.
    collective_secs: what is sent, through two links.
    least_secs: the longest of compute with kernels, memory, and collectives.
    most_secs: compute, kernels and collectives in turn.
    unknown_loops: loops that count once, since their length is not known.
  """

  matmul_flops: float
  kernel_flops: float
  memory_bytes: float
  sent_bytes: Sequence[Mapping[str, Any]]
  kernels: Mapping[str, float]
  compute_secs: float
  kernel_secs: float
  memory_secs: float
  collective_secs: float
  least_secs: float
  most_secs: float
  unknown_loops: Sequence[str]


def estimate(
  cost: hlo.Cost,
  *,
  chip: Chip,
  mesh: Mapping[str, int],
  kernel_flops: float,
) -> Estimate:
  """Turns what a program does into seconds.

  Args:
    cost: of the compiled program.
    chip: it runs on.
    mesh: devices per axis.
    kernel_flops: of one device's kernel calls, which the text does not tell.

  Raises:
    ValueError: the program is of another mesh.
  """
  sent = [
    {"kind": kind, "axes": axes, "bytes": num_bytes}
    for (kind, axes), num_bytes in cost.sent_bytes(mesh).items()
  ]
  sent.sort(key=lambda each: -each["bytes"])
  compute = cost.cycles / chip.cycles or cost.matmul_flops / chip.flops
  kernel = kernel_flops / chip.flops
  memory = cost.memory_bytes / chip.memory_bytes
  collective = sum(each["bytes"] for each in sent) / (2 * chip.link_bytes)
  return Estimate(
    matmul_flops=cost.matmul_flops,
    kernel_flops=kernel_flops,
    memory_bytes=cost.memory_bytes,
    sent_bytes=sent,
    kernels=dict(cost.kernels),
    compute_secs=compute,
    kernel_secs=kernel,
    memory_secs=memory,
    collective_secs=collective,
    least_secs=max(compute + kernel, memory, collective),
    most_secs=compute + kernel + collective,
    unknown_loops=cost.unknown_loops,
  )


def step(
  accumulate: Estimate,
  *once: Estimate,
  expected_batch_size: int,
  microbatch_size: int,
) -> dict[str, Any]:
  """A whole step: as many microbatches as a batch of expected size needs.

  Args:
    accumulate: one microbatch.
    *once: what runs once a step: the update, and what goes before.
    expected_batch_size: of privacy units.
    microbatch_size: likewise.

  Returns:
    "num_microbatches", the parts in seconds as in `Estimate`, "sent_bytes" in
    all, and "left_out".
  """
  times = math.ceil(expected_batch_size / microbatch_size)
  names = [
    field.name
    for field in dataclasses.fields(Estimate)
    if field.name.endswith("_secs")
  ]
  parts = {
    name: times * getattr(accumulate, name)
    + sum(getattr(each, name) for each in once)
    for name in names
  }
  sent = [
    sum(each["bytes"] for each in program.sent_bytes)
    for program in (accumulate, *once)
  ]
  return {
    "num_microbatches": times,
    **parts,
    "sent_bytes": times * sent[0] + sum(sent[1:]),
    "left_out": LEFT_OUT,
  }
