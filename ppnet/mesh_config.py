"""How the devices are arranged, and what is split over them.

`ppnet.config` gives all of it its public names.
"""

import dataclasses
import enum

from ppnet.core import checks

AXES = ("slice", "data", "fsdp", "sequence", "tensor")


class Strategy(enum.Enum):
  """What is split over which mesh axis; `sharding.rules` has the values."""

  DATA_PARALLEL = "data_parallel"  # Every device holds all parameters.
  ZERO3 = "zero3"  # Parameters in parts, whole for the layer in use.
  TENSOR = "tensor"  # Heads and hidden features; the rest is on each device.
  MIXED = "mixed"  # ZeRO-3 over `fsdp`, heads and features over `tensor`.
  SLICES = "slices"  # MIXED in each slice; `slice` joins them by their sums.


@dataclasses.dataclass(slots=True, kw_only=True)
class MeshConfig:
  """Devices per mesh axis; one axis may be -1, "all that are left".

  Attributes:
    strategy: what the axes mean for parameters and examples.
    slice: parts of the job with a slower network between them, under SLICES.
    data: replicas, which share the batch.
    fsdp: devices that share the batch and split the parameters (ZeRO).
    sequence: devices that split the tokens of each example.
    tensor: devices that split each layer's heads and hidden features; under
      DATA_PARALLEL and ZERO3 they share the batch as well.
  """

  strategy: Strategy = Strategy.MIXED
  slice: int = 1
  data: int = -1
  fsdp: int = 1
  sequence: int = 1
  tensor: int = 1


def validate(config: MeshConfig) -> None:
  """Raises ValueError, naming the field, its value and what to do."""
  sizes = {axis: getattr(config, axis) for axis in AXES}
  if sum(size == -1 for size in sizes.values()) > 1 or any(
    size < 1 and size != -1 for size in sizes.values()
  ):
    checks.fail(
      "mesh sizes of at least 1, one of them -1 at most",
      "-1 takes all the devices that are left.",
      **sizes,
    )
  if config.slice != 1 and config.strategy is not Strategy.SLICES:
    checks.fail(
      "mesh.slice=1 unless mesh.strategy is SLICES",
      "Other strategies would do the same work in each slice.",
      **{"mesh.slice": config.slice, "mesh.strategy": config.strategy.name},
    )
