"""How fast a step is against what its devices could do at most.

A model's FLOPs are those of its own forward and backward pass, as in MFU's
definition (Chowdhery et al. 2022, PaLM, appendix B,
https://arxiv.org/abs/2204.02311): what clipping, a second prediction,
rematerialisation and noise add is not counted, so that it shows as less MFU and
not as more work. COMPILE says what the programs themselves multiply.

For each position of a decoder with P parameters that multiply (all but a table
that is only looked up), L layers, N heads of size H and rows of T positions:

| part | FLOPs of a position |
| --- | --- |
| forward, and backward to the activations | 4 P |
| backward to the parameters that are trained | 2 P_trained |
| scores and values, forward and backward | 12 L N H T |

As in the paper the causal mask saves nothing, and neither do the segments of a
packed row. Stems and projectors are left out, since their parameters meet some
positions and not others: MFU is rather too small.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax

from ppnet import config as config_lib
from ppnet.train import program as program_lib

# Dense products in bfloat16, FLOP/s of one device of JAX, as published:
# https://cloud.google.com/tpu/docs/v4 (and v2, v3, v5e, v5p, v6e), of a chip:
# one device from v4 on, and two of v2 and v3, where a device is a core.
# https://www.nvidia.com/en-us/data-center/h200 (and v100, a100, l4, h100), the
# data sheets: without sparsity, with which they show the double from Ampere on.
_PEAK_FLOPS_PER_SEC = {
  "TPU v2": 22.5e12,
  "TPU v3": 61.5e12,
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5": 459e12,
  "TPU v6 lite": 918e12,
  "Tesla V100-SXM2-16GB": 125e12,
  "Tesla V100-SXM2-32GB": 125e12,
  "NVIDIA A100-SXM4-40GB": 312e12,
  "NVIDIA A100-SXM4-80GB": 312e12,
  "NVIDIA L4": 121e12,
  "NVIDIA H100 PCIe": 756e12,
  "NVIDIA H100 80GB HBM3": 989.4e12,
  "NVIDIA H200": 989.4e12,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
  """What an expected step is, and what the devices could do. All public.

  Attributes:
    units: of the expected batch.
    rows_per_unit: rows that stand for one of them.
    layers: L.
    attention_dim: N times H.
    flops_per_position: without attention, whose part grows with the row.
    device_kind: as JAX calls it.
    num_devices: of the mesh.
    peak_flops_per_sec: of one device; None where none is published.
  """

  units: float
  rows_per_unit: int
  layers: int
  attention_dim: int
  flops_per_position: int
  device_kind: str
  num_devices: int
  peak_flops_per_sec: float | None

  @property
  def no_mfu_because(self) -> str | None:
    """Why there is no MFU; None where there is."""
    if self.peak_flops_per_sec is not None:
      return None
    return f"No peak is published for devices of kind {self.device_kind!r}."

  def tokens(self, row_length: float) -> float:
    """Positions of a step of rows so long, padding to that length included."""
    return self.units * self.rows_per_unit * row_length

  def flops(self, row_length: float) -> float:
    """FLOPs of the model in such a step; see the module."""
    attention = 12 * self.layers * self.attention_dim * row_length
    return self.tokens(row_length) * (self.flops_per_position + attention)

  def rates(
    self, step_secs: float | None, row_length: float
  ) -> dict[str, float | None]:
    """Examples and tokens per second, and MFU where a peak is known.

    Args:
      step_secs: of one step; None where it was not measured.
      row_length: positions of a row, on average.
    """
    per_sec = None if step_secs is None else 1 / max(step_secs, 1e-9)

    def rate(count: float) -> float | None:
      return None if per_sec is None else count * per_sec

    rates = {
      "examples_per_sec": rate(self.units),
      "tokens_per_sec": rate(self.tokens(row_length)),
    }
    if self.peak_flops_per_sec is not None:
      most = self.num_devices * self.peak_flops_per_sec
      rates["mfu"] = rate(self.flops(row_length) / most)
    return rates


def work(
  config: config_lib.ExperimentConfig, program: program_lib.Program
) -> Work:
  """The work of a step of the expected batch size: the realised is private."""
  decoder = config.model.decoder
  device = program.mesh.devices.flat[0]
  num_trained, num_frozen = (
    _num_multiplied(params, is_tied=decoder.tie_embeddings)
    for params in (program.abstract_state.params, program.abstract_frozen)
  )
  return Work(
    units=program.mechanism.expected_batch_size,
    rows_per_unit=program.mechanism.rows_per_unit,
    layers=decoder.num_layers,
    attention_dim=decoder.num_heads * decoder.head_dim,
    flops_per_position=6 * num_trained + 4 * num_frozen,
    device_kind=device.device_kind,
    num_devices=program.mesh.size,
    peak_flops_per_sec=_PEAK_FLOPS_PER_SEC.get(device.device_kind),
  )


def _num_multiplied(params: Mapping[str, Any], *, is_tied: bool) -> int:
  """The decoder's parameters that a position is multiplied by."""
  return sum(
    math.prod(leaf.shape)
    for path, leaf in jax.tree_util.tree_leaves_with_path(
      params.get("decoder", {})
    )
    if is_tied or path[0].key != "token_embed"
  )
