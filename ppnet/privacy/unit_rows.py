"""How the rows of a batch make up privacy units.

A unit is `per_unit` rows side by side: the records of one user that a step
takes, or the views of one record. Rows that a unit lacks are padding.

*Formal guarantee.* Every function here works on each unit by itself: nothing of
one unit enters another one's rows, weights or flags.

Letters: U units, B = U per_unit rows.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ppnet import config
from ppnet.core import checks

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
  """How the rows of a batch make up units, and microbatches.

  Attributes:
    per_unit: rows of a unit.
    reduction: of their gradients.
    microbatch_size: units computed at once; None means all.
  """

  per_unit: int
  reduction: config.UnitReduction
  microbatch_size: int | None

  def __post_init__(self) -> None:
    """Checks the fields."""
    checks.positive(rows_per_unit=self.per_unit)
    if self.microbatch_size is not None:
      checks.positive(microbatch_size=self.microbatch_size)

  def by_unit(self, rows: Any) -> Any:
    """From [B, ...] to [U, per_unit, ...]."""
    return rows.reshape(-1, self.per_unit, *rows.shape[1:])

  def weights(self, padding: jax.Array) -> jax.Array:
    """What each row's gradient counts in its unit's; padding bool[B] -> f32[B].

    Where a unit is a row, 1: a unit of padding is left out as a whole.
    """
    if self.per_unit == 1:
      return jnp.ones(padding.shape)
    real = self.by_unit(~padding).astype(jnp.float32)
    if self.reduction is config.UnitReduction.MEAN:
      real /= jnp.maximum(jnp.sum(real, axis=1, keepdims=True), 1.0)
    return real.reshape(-1)

  def unit_padding(self, padding: jax.Array) -> jax.Array:
    """Units of nothing but padding, bool[B] -> bool[U]."""
    return jnp.all(self.by_unit(padding), axis=1)

  def finite_units(self, losses: jax.Array) -> jax.Array:
    """Units all of whose losses are finite, bool[U].

    The losses are of rows `without_padding`.
    """
    return jnp.all(self.by_unit(jnp.isfinite(losses)), axis=1)

  def without_padding(self, batch: PyTree, padding: jax.Array) -> PyTree:
    """Puts a row of the same unit in the place of every padding row.

    A zero cotangent into a row that computes NaN still gives NaN. A copy
    computes what its original does, so zero times finite is zero, or else the
    unit is dropped anyway. Never a row of another unit.
    """
    if self.per_unit == 1:
      return batch
    by_unit = self.by_unit(padding)
    first = jnp.argmin(by_unit, axis=1)[:, None]  # The first that is none.
    source = jnp.where(by_unit, first, jnp.arange(self.per_unit)[None])
    pick = jax.vmap(lambda rows, places: rows[places])
    leaves, rewrap = without_keys(batch)
    return rewrap(
      [pick(self.by_unit(leaf), source).reshape(leaf.shape) for leaf in leaves]
    )


def without_keys(
  batch: PyTree,
) -> tuple[list[jax.Array], Callable[[list[jax.Array]], PyTree]]:
  """Leaves of a batch with keys replaced by their data, and the way back."""
  leaves, structure = jax.tree.flatten(batch)
  impls = [
    jax.random.key_impl(leaf)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    else None
    for leaf in leaves
  ]

  def rewrap(plain):
    return structure.unflatten(
      leaf if impl is None else jax.random.wrap_key_data(leaf, impl=impl)
      for leaf, impl in zip(plain, impls, strict=True)
    )

  plain = [
    leaf if impl is None else jax.random.key_data(leaf)
    for leaf, impl in zip(leaves, impls, strict=True)
  ]
  return plain, rewrap
