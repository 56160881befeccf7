"""Small sums over pytrees, in float32 whatever the leaves are."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

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


def num_parameters(tree: PyTree) -> int:
  """Number of entries over all leaves."""
  return sum(leaf.size for leaf in jax.tree.leaves(tree))
