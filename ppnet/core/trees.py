"""Small sums over pytrees, in float32 whatever the leaves are."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt

PyTree = Any


def vdot(left: PyTree, right: PyTree) -> Float[Array, ""]:
  """Inner product of two pytrees of the same structure, float32."""
  products = jax.tree.map(
    lambda a, b: jnp.vdot(a.astype(jnp.float32), b.astype(jnp.float32)),
    left,
    right,
  )
  return sum(jax.tree.leaves(products), start=jnp.float32(0))


def all_finite(tree: PyTree) -> Array:
  """True where every entry of every leaf is finite, bool[]."""
  leaves = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]
  return jnp.stack(leaves).all() if leaves else jnp.bool_(True)


def fingerprint(tree: PyTree) -> UInt[Array, " n"]:
  """One word per leaf that changes, all but surely, when a bit of it does.

  The sum modulo 2^32 of every entry's bits times an odd number of its place:
  the same on every mesh, since integers add up in any order. Against accidents,
  not against an adversary.

  Args:
    tree: leaves of 8, 16 or 32 bits.

  Returns:
    uint32 [number of leaves], in the order of `jax.tree.leaves`.
  """
  words = [_leaf_fingerprint(leaf) for leaf in jax.tree.leaves(tree)]
  return jnp.stack(words) if words else jnp.zeros((0,), jnp.uint32)


def _leaf_fingerprint(leaf: Array) -> UInt[Array, ""]:
  """See `fingerprint`."""
  unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
  if leaf.dtype == jnp.bool_:
    leaf = leaf.astype(jnp.uint8)
  bits = jax.lax.bitcast_convert_type(leaf, unsigned[leaf.dtype.itemsize])
  place = jnp.zeros(leaf.shape, jnp.uint32)
  for axis, size in enumerate(leaf.shape):  # Row by row; it may wrap around.
    place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(
      jnp.uint32, leaf.shape, axis
    )
  # Knuth's multiplicative hash, made odd: no two near places weigh the same.
  weight = (place * jnp.uint32(2654435761) << 1) | jnp.uint32(1)
  return (bits.astype(jnp.uint32) * weight).sum(dtype=jnp.uint32)


def num_parameters(tree: PyTree) -> int:
  """Number of entries over all leaves."""
  return sum(leaf.size for leaf in jax.tree.leaves(tree))
