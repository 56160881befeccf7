"""The device mesh: axes `data` (replicas), `fsdp` (ZeRO), `tensor`."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ppnet import config as config_lib
from ppnet.core import checks

AXES = ("data", "fsdp", "tensor")


def build(
  config: config_lib.MeshConfig, devices: list[jax.Device] | None = None
) -> Mesh:
  """Arranges devices as config says; one axis may be -1.

  Args:
    config: devices per axis.
    devices: all of this job's devices when None.

  Raises:
    ValueError: the axes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  return Mesh(
    np.asarray(devices).reshape(sizes(config, len(devices))),
    AXES,
    axis_types=(jax.sharding.AxisType.Auto,) * len(AXES),
  )


def sizes(config: config_lib.MeshConfig, num_devices: int) -> tuple[int, ...]:
  """Devices per axis of `AXES`.

  Raises:
    ValueError: the axes do not multiply to the number of devices.
  """
  data, fsdp, tensor = (getattr(config, axis) for axis in AXES)
  fixed = math.prod(size for size in (data, fsdp, tensor) if size != -1)
  rest = num_devices // fixed
  found = tuple(rest if size == -1 else size for size in (data, fsdp, tensor))
  if math.prod(found) != num_devices:
    checks.fail(
      f"mesh axes that multiply to the {num_devices} devices at hand",
      "Set one of --config.mesh.{data,fsdp,tensor} to -1.",
      data=data,
      fsdp=fsdp,
      tensor=tensor,
    )
  return found


def within(
  mesh: Mesh, fn: Callable[..., Any], **bound: Any
) -> Callable[..., Any]:
  """`fn` with `bound` keyword arguments, traced with `mesh` at hand.

  The attention kernels ask for it (`jax.sharding.get_abstract_mesh`), because
  XLA does not split them. Its axes are Auto: nothing else takes notice.
  """

  @functools.wraps(fn)
  def on_mesh(*args, **kwargs):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return fn(*args, **bound, **kwargs)

  return on_mesh
