"""The device mesh: axes `data` (replicas), `fsdp` (ZeRO), `tensor`."""

import functools
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
  sizes = {axis: getattr(config, axis) for axis in AXES}
  fixed = int(np.prod([size for size in sizes.values() if size != -1]))
  if -1 in sizes.values() and len(devices) % fixed == 0:
    sizes = {
      axis: len(devices) // fixed if size == -1 else size
      for axis, size in sizes.items()
    }
  if int(np.prod(list(sizes.values()))) != len(devices):
    checks.fail(
      f"mesh axes that multiply to the {len(devices)} devices at hand",
      "Set one of --config.mesh.{data,fsdp,tensor} to -1.",
      **sizes,
    )
  return Mesh(
    np.asarray(devices).reshape(tuple(sizes.values())),
    AXES,
    axis_types=(jax.sharding.AxisType.Auto,) * len(AXES),
  )


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
