"""The device mesh; the first axis is the one between the slowest links.

`slice` (parts of a job, a slower network between them), `data` (replicas),
`fsdp` (ZeRO), `sequence` (the tokens of an example), `tensor`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh

from ppnet import config as config_lib
from ppnet.core import checks

AXES = config_lib.MESH_AXES


def build(
  config: config_lib.MeshConfig, devices: list[jax.Device] | None = None
) -> Mesh:
  """Arranges devices as config says; one axis may be -1.

  Args:
    config: devices per axis.
    devices: all of this job's devices when None.

  Raises:
    ValueError: the axes do not multiply to the number of devices, or the
      devices are of another number of slices.
  """
  devices = jax.devices() if devices is None else devices
  return Mesh(
    arranged(sizes(config, len(devices)), devices),
    AXES,
    axis_types=(jax.sharding.AxisType.Auto,) * len(AXES),
  )


def num_slices(devices: list[jax.Device]) -> int:
  """How many slices devices are of; 1 where they do not say."""
  return len({getattr(device, "slice_index", 0) for device in devices})


def arranged(shape: tuple[int, ...], devices: list[jax.Device]) -> np.ndarray:
  """Devices in the form of a mesh.

  | devices | order |
  | --- | --- |
  | TPUs of one slice | neighbours in the mesh are near each other in the pod |
  | of several slices | a slice of the mesh is a slice of the machines |
  | others | that in which they come |

  Args:
    shape: devices per axis of `AXES`.
    devices: of one job.

  Raises:
    ValueError: the axis `slice` is not the number of slices.
  """
  slices = num_slices(devices)
  if slices == 1 and devices[0].platform == "tpu":
    return mesh_utils.create_device_mesh(
      shape, devices, allow_split_physical_axes=True
    )
  if slices == 1:
    return np.asarray(devices).reshape(shape)
  if shape[0] != slices:
    checks.fail(
      f"mesh.slice to be the {slices} slices that the devices are of",
      f"Set --config.mesh.slice={slices} --config.mesh.strategy=SLICES.",
      **{"mesh.slice": shape[0]},
    )
  return mesh_utils.create_hybrid_device_mesh(
    (1, *shape[1:]),
    (slices, *[1] * len(shape[1:])),
    devices,
    allow_split_physical_axes=True,
  )


def sizes(config: config_lib.MeshConfig, num_devices: int) -> tuple[int, ...]:
  """Devices per axis of `AXES`.

  Raises:
    ValueError: the axes do not multiply to the number of devices.
  """
  asked = {axis: getattr(config, axis) for axis in AXES}
  fixed = math.prod(size for size in asked.values() if size != -1)
  rest = num_devices // fixed
  found = tuple(rest if size == -1 else size for size in asked.values())
  if math.prod(found) != num_devices:
    checks.fail(
      f"mesh axes that multiply to the {num_devices} devices at hand",
      "Set one of --config.mesh.{data,fsdp,sequence,tensor} to -1.",
      **asked,
    )
  return found


def within(
  mesh: Mesh, fn: Callable[..., Any], **bound: Any
) -> Callable[..., Any]:
  """`fn` with `bound` keyword arguments, traced with `mesh` at hand.

  The attention kernels ask for it (`jax.sharding.get_abstract_mesh`), because
  XLA does not split them. Its axes are Auto: nothing else takes notice.

  What has a step's examples is traced by `layout.within`. Where the rules do
  not say where activations are, jaxlib 0.10.2 can hand attention the example of
  another device (`tests/kernels/engines_test.py`).
  """

  @functools.wraps(fn)
  def on_mesh(*args, **kwargs):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return fn(*args, **bound, **kwargs)

  return on_mesh
