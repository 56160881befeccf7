"""From logical axes, which models name, to mesh axes, which only rules name."""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ppnet.core import checks

Axis = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
  """Logical axis to mesh axis. A strategy is one value of this class.

  Attributes:
    batch: examples (and the microbatch).
    embed: model features.
    q_heads: query heads, flattened with their features.
    kv_heads: key and value heads, likewise.
    mlp: hidden features of the feed-forward block.
    vocab: rows of the embedding, columns of the head.
    layers: the scanned stack.
    stem: input features of the small image and audio stems.
    stem_out: their output features.
  """

  batch: Axis = ("data", "fsdp")
  embed: Axis = "fsdp"
  q_heads: Axis = "tensor"
  kv_heads: Axis = "tensor"
  mlp: Axis = "tensor"
  vocab: Axis = "tensor"
  layers: Axis = None
  stem: Axis = None
  stem_out: Axis = None

  def spec(self, logical_axes: tuple[str | None, ...]) -> P:
    """The partition of one array.

    Raises:
      ValueError: an unknown logical axis, or a mesh axis used twice.
    """
    known = {field.name for field in dataclasses.fields(self)}
    for name in logical_axes:
      if name is not None and name not in known:
        checks.fail(f"a logical axis in {sorted(known)}", logical_axis=name)
    axes = [
      None if name is None else getattr(self, name) for name in logical_axes
    ]
    used = [
      part
      for axis in axes
      if axis is not None
      for part in (axis if isinstance(axis, tuple) else (axis,))
    ]
    if len(used) != len(set(used)):
      checks.fail(
        "each mesh axis at most once in one array",
        "Change a field of Rules.",
        logical_axes=logical_axes,
        mesh_axes=tuple(axes),
      )
    return P(*axes)

  def batch_sharding(self, mesh: Mesh, *, leading: int = 0) -> NamedSharding:
    """Examples over the mesh; `leading` unsharded axes come first."""
    return NamedSharding(mesh, P(*[None] * leading, self.batch))

  def param_shardings(self, mesh: Mesh, abstract_params: Any) -> Any:
    """One sharding per parameter, from the logical axes its module declared.

    A parameter whose size does not divide by its mesh axis is an error that
    names it: a quiet replicate would show up as memory on the pod.

    Args:
      mesh: the device mesh.
      abstract_params: `jax.eval_shape` of a module's `init`, boxes included.

    Raises:
      ValueError: an axis that does not divide.
    """

    def sharding(path, leaf):
      axes = leaf.names if isinstance(leaf, nn.LogicallyPartitioned) else ()
      shape = nn.meta.unbox(leaf).shape
      spec = self.spec(tuple(axes) + (None,) * (len(shape) - len(axes)))
      for dimension, axis in zip(shape, spec, strict=True):
        ways = num_parts(mesh, axis)
        if dimension % ways:
          checks.fail(
            f"parameter {jax.tree_util.keystr(path)} to divide over mesh axis"
            f" {axis!r} ({ways})",
            "Change the model's size, the mesh or the Rules.",
            shape=shape,
          )
      return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(
      sharding,
      abstract_params,
      is_leaf=lambda leaf: isinstance(leaf, nn.meta.AxisMetadata),
    )


def num_parts(mesh: Mesh, axis: Axis) -> int:
  """Into how many parts an array is cut along a mesh axis, or several."""
  axes = axis if isinstance(axis, tuple) else (axis,)
  return math.prod(1 if name is None else mesh.shape[name] for name in axes)


def replicated(mesh: Mesh) -> NamedSharding:
  """The same value on every device."""
  return NamedSharding(mesh, P())


def put(value: Any, mesh: Mesh) -> Any:
  """Places a small value on every device; every process has the same one.

  Args:
    value: an array, a typed key, or a tree of them.
    mesh: the devices.
  """

  def place(leaf):
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(
      leaf.dtype, jax.dtypes.prng_key
    ):
      # Keys cannot be placed on devices of other processes; their words can.
      words = np.asarray(jax.random.key_data(leaf))
      return jax.random.wrap_key_data(
        jax.device_put(words, replicated(mesh)), impl=jax.random.key_impl(leaf)
      )
    if jax.process_count() > 1:
      leaf = np.asarray(leaf)
    return jax.device_put(leaf, replicated(mesh))

  return jax.tree.map(place, value)
