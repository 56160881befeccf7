"""From logical axes, which models name, to mesh axes, which only rules name."""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ppnet import config as config_lib
from ppnet.core import checks

Axis = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
  """Logical axis to mesh axis. A strategy is one value of this class.

  Attributes:
    batch: examples (and the microbatch).
    sequence: the tokens of an example.
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
  sequence: Axis = "sequence"
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
    used = [part for axis in axes for part in _parts(axis)]
    if len(used) != len(set(used)):
      checks.fail(
        "each mesh axis at most once in one array",
        "Change a field of Rules.",
        logical_axes=logical_axes,
        mesh_axes=tuple(axes),
      )
    return P(*axes)

  def own_sums(self, mesh: Mesh) -> tuple[str, ...]:
    """Axes whose devices can each keep a sum over their own examples.

    They share the batch, and each of them holds all parameters: a sum of its
    own takes no more memory than the sum of all, and needs no network before
    the step's end. Where other axes split what a replica computes there are
    none: XLA (jaxlib 0.10.2) ends the process at look-ups in programs whose
    axes belong to a replica in part ("Check failed: partition_group_list").
    """
    split = {
      part
      for field in dataclasses.fields(self)
      if field.name != "batch"
      for part in _parts(getattr(self, field.name))
    }
    used = [axis for axis in mesh.axis_names if mesh.shape[axis] > 1]
    own = [axis for axis in used if axis in _parts(self.batch)]
    return tuple(own) if own == used and not split & set(own) else ()

  def batch_sharding(
    self, mesh: Mesh, *, leading: int = 0, has_tokens: bool = False
  ) -> NamedSharding:
    """Examples over the mesh.

    Args:
      mesh: the devices.
      leading: how many unsharded axes come first.
      has_tokens: whether the axis behind the examples counts tokens.
    """
    tokens = (self.sequence,) if has_tokens else ()
    return NamedSharding(mesh, P(*[None] * leading, self.batch, *tokens))

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


_WHOLE = {"q_heads": None, "kv_heads": None, "mlp": None, "vocab": None}

STRATEGIES = {
  config_lib.Strategy.DATA_PARALLEL: Rules(
    batch=("data", "fsdp", "tensor"), embed=None, **_WHOLE
  ),
  config_lib.Strategy.ZERO3: Rules(
    batch=("data", "fsdp", "tensor"),
    embed=("fsdp", "sequence", "tensor"),
    **_WHOLE,
  ),
  config_lib.Strategy.TENSOR: Rules(embed=None),
  config_lib.Strategy.MIXED: Rules(),
  config_lib.Strategy.SLICES: Rules(batch=("slice", "data", "fsdp")),
}


def num_parts(mesh: Mesh, axis: Axis) -> int:
  """Into how many parts an array is cut along a mesh axis, or several."""
  return math.prod(mesh.shape[name] for name in _parts(axis))


def _parts(axis: Axis) -> tuple[str, ...]:
  """The mesh axes of a rule."""
  if axis is None:
    return ()
  return axis if isinstance(axis, tuple) else (axis,)


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
