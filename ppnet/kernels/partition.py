"""A kernel's call on a mesh: each device computes its own examples and heads.

XLA cannot split a Pallas call (Mosaic refuses to, Triton would gather all of it
on each device), so it is split here, by `shard_map`. Examples and heads do not
meet in attention. The noise does not notice: its words are made before, of
global numbers (`counter_noise`).

`jax.vmap` puts its axis into the batch first. As an axis in front of it, it
would be whole on every device.
"""

import dataclasses
import enum
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

# Names of the mesh's axes. Axes of other names compute the same on all of
# their devices.
BATCH_AXES = ("slice", "data", "fsdp")
# Devices that share the tokens of an example share its heads here instead, each
# with all tokens (Jacobs et al. 2023, section 3, https://arxiv.org/abs/2309.14509):
# two all-to-alls, and every device has as much of the causal triangle.
HEAD_AXES = ("tensor", "sequence")

Tree = Any


class Leading(enum.Enum):
  """What the first axes of an operand or a result count."""

  QUERY_HEADS = "query_heads"  # [B, N, ...]
  KEY_HEADS = "key_heads"  # [B, K, ...]
  EXAMPLES = "examples"  # [B, ...]


def ambient_mesh() -> AbstractMesh | None:
  """The mesh of `jax.set_mesh` or `use_abstract_mesh`; None without one.

  None, too, where one device is all of it, or inside of a `shard_map` over all
  of it.
  """
  mesh = jax.sharding.get_abstract_mesh()
  return mesh if mesh.size > 1 and _free_axes(mesh) else None


def call(
  fn: Callable[..., tuple],
  operands: tuple[Tree, ...],
  *,
  leading: tuple[Leading, ...],
  out_leading: tuple[Leading, ...],
  mesh: AbstractMesh | None,
) -> tuple:
  """`fn(*operands)`, split over the mesh and batched by its own batch axis.

  An axis whose size does not divide by its mesh axes is computed by each of
  their devices. Where there are more devices than key heads, each device takes
  the key head of its query heads, and what it finds for it is summed.

  Args:
    fn: any number of trees of arrays to a tuple of trees.
    operands: its arguments, of one batch.
    leading: what the first axes of each operand's arrays count.
    out_leading: the same of each result's.
    mesh: see `ambient_mesh`.
  """

  @jax.custom_batching.custom_vmap
  def run(*operands):
    if mesh is None:
      return fn(*operands)
    return _on_mesh(fn, operands, leading, out_leading, mesh)

  @run.def_vmap
  def batched(size, is_batched, *operands):
    def fold(x, has_axis):
      if not has_axis:
        x = jnp.broadcast_to(x, (size, *x.shape))
      return x.reshape(size * x.shape[1], *x.shape[2:])

    leaves, tree = jax.tree.flatten(operands)
    folded = map(fold, leaves, jax.tree.leaves(is_batched))
    out = run(*jax.tree.unflatten(tree, folded))
    out = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), out)
    return out, jax.tree.map(lambda _: True, out)

  return run(*operands)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Layout:
  """Which mesh axes split what.

  Attributes:
    batch: axes that split the examples.
    heads: axes that split the query heads.
    splits_key_heads: whether they split the key heads as well.
    num_own_heads: query heads of one device.
    groups: query heads of a key head.
  """

  batch: tuple[str, ...]
  heads: tuple[str, ...]
  splits_key_heads: bool
  num_own_heads: int
  groups: int

  def spec(self, leading: Leading) -> P:
    """The partition of arrays that begin so."""
    if leading is Leading.EXAMPLES:
      return P(self.batch)
    if leading is Leading.KEY_HEADS and not self.splits_key_heads:
      return P(self.batch)
    return P(self.batch, self.heads)

  def own_key_head(self) -> jax.Array:
    """The number of the key head of this device's query heads."""
    first = jax.lax.axis_index(self.heads) * self.num_own_heads
    return first // self.groups


def _free_axes(mesh: AbstractMesh) -> list[str]:
  """Axes that no `shard_map` around has taken yet."""
  pairs = zip(mesh.axis_names, mesh.axis_types, strict=True)
  return [name for name, kind in pairs if kind is not AxisType.Manual]


def _ways(names: tuple[str, ...], mesh: AbstractMesh) -> int:
  """Into how many parts these axes split."""
  return math.prod(mesh.shape[name] for name in names)


def _dividing(
  names: tuple[str, ...], size: int, mesh: AbstractMesh
) -> tuple[str, ...]:
  """The first of these axes, as many as `size` divides by."""
  chosen, ways = [], 1
  for name in names:
    if name not in _free_axes(mesh):
      continue
    ways *= mesh.shape[name]
    if size % ways:
      break
    chosen.append(name)
  return tuple(chosen)


def _layout(
  operands: tuple[Tree, ...], leading: tuple[Leading, ...], mesh: AbstractMesh
) -> _Layout:
  """From the sizes of the operands."""
  shapes = {
    kind: leaf.shape
    for kind, operand in zip(leading, operands, strict=True)
    for leaf in jax.tree.leaves(operand)
  }
  batch, num_heads = shapes[Leading.QUERY_HEADS][:2]
  num_key_heads = shapes[Leading.KEY_HEADS][1]
  heads = _dividing(HEAD_AXES, num_heads, mesh)
  while num_key_heads % (ways := _ways(heads, mesh)) and ways % num_key_heads:
    heads = heads[:-1]  # Key heads would be shared by some devices in part.
  return _Layout(
    batch=_dividing(BATCH_AXES, batch, mesh),
    heads=heads,
    splits_key_heads=num_key_heads % ways == 0,
    num_own_heads=num_heads // ways,
    groups=num_heads // num_key_heads,
  )


def _on_mesh(
  fn: Callable[..., tuple],
  operands: tuple[Tree, ...],
  leading: tuple[Leading, ...],
  out_leading: tuple[Leading, ...],
  mesh: AbstractMesh,
) -> tuple:
  """`fn(*operands)` by `shard_map`."""
  layout = _layout(operands, leading, mesh)

  def on_device(*operands):
    if layout.splits_key_heads:
      return fn(*operands)
    head = layout.own_key_head()
    num_key_heads = 0
    own = []
    for kind, operand in zip(leading, operands, strict=True):
      if kind is Leading.KEY_HEADS:
        num_key_heads = jax.tree.leaves(operand)[0].shape[1]
        operand = jax.tree.map(
          lambda x: jax.lax.dynamic_slice_in_dim(x, head, 1, axis=1), operand
        )
      own.append(operand)

    def place_and_sum(x):
      # As many terms as there are devices at one key head: not in bfloat16.
      wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
      every = jnp.zeros((x.shape[0], num_key_heads, *x.shape[2:]), wide.dtype)
      every = jax.lax.dynamic_update_slice_in_dim(every, wide, head, axis=1)
      return jax.lax.psum(every, layout.heads).astype(x.dtype)

    return tuple(
      jax.tree.map(place_and_sum, out) if kind is Leading.KEY_HEADS else out
      for kind, out in zip(out_leading, fn(*own), strict=True)
    )

  return jax.shard_map(
    on_device,
    mesh=mesh,
    in_specs=tuple(layout.spec(kind) for kind in leading),
    out_specs=tuple(layout.spec(kind) for kind in out_leading),
    axis_names=set(_free_axes(mesh)),
    check_vma=False,  # A Pallas call does not say over what its result varies.
  )(*operands)
