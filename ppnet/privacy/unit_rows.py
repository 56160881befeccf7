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
# A dataclass with `grad_sum`, and fields per row or per unit.
Result = Any


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


def in_microbatches(
  sum_fn: Callable[[PyTree, PyTree, jax.Array], Result],
  params: PyTree,
  batch: PyTree,
  padding: jax.Array,
  rows: Rows,
) -> Result:
  """Calls `sum_fn` on microbatches in a scan; adds sums, keeps the order."""
  num_rows, size = padding.shape[0], rows.microbatch_size
  if num_rows == 0:
    # Nothing to differentiate; one unit of padding gives the shapes.
    padding = jnp.ones(rows.per_unit, bool)
    leaves, rewrap = without_keys(batch)
    batch = rewrap(
      [_blank_rows(leaf, num_rows=rows.per_unit) for leaf in leaves]
    )
    return _head(sum_fn(params, batch, padding), 0)
  num_units = num_rows // rows.per_unit
  if size is None or size >= num_units:
    return sum_fn(params, batch, padding)
  num_microbatches = -(-num_units // size)
  missing = (num_microbatches * size - num_units) * rows.per_unit

  def split(leaf):  # [B, ...] -> [microbatches, rows of a microbatch, ...]
    leaf = jnp.concatenate([leaf, _blank_rows(leaf, num_rows=missing)])
    # Every num_microbatches-th unit goes together, so that a batch axis that is
    # sharded stays spread over all devices in every microbatch.
    shape = (size, num_microbatches, rows.per_unit, *leaf.shape[1:])
    leaf = jnp.swapaxes(leaf.reshape(shape), 0, 1)
    return leaf.reshape(num_microbatches, -1, *leaf.shape[3:])

  def join(leaf):  # The inverse of split, of what is per row or per unit.
    per_unit = leaf.shape[1] // size
    leaf = leaf.reshape(num_microbatches, size, per_unit, *leaf.shape[2:])
    leaf = jnp.swapaxes(leaf, 0, 1)
    return leaf.reshape(-1, *leaf.shape[3:])[: num_units * per_unit]

  # Keys travel as their data: the reuse checker loses track of moved axes.
  leaves, rewrap = without_keys(batch)

  def body(grad_sum, microbatch):
    plain, is_example = microbatch
    result = sum_fn(params, rewrap(plain), ~is_example)
    grad_sum = jax.tree.map(jnp.add, grad_sum, result.grad_sum)
    return grad_sum, dataclasses.replace(result, grad_sum=None)

  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
  grad_sum, parts = jax.lax.scan(
    body, zeros, ([split(leaf) for leaf in leaves], split(~padding))
  )
  return dataclasses.replace(jax.tree.map(join, parts), grad_sum=grad_sum)


def padding_mask(
  batch: PyTree, is_padding_example: jax.Array | None, rows: Rows
) -> jax.Array:
  """The mask, bool[B]; checks that all leaves agree on B, in whole units."""
  sizes = {leaf.shape[:1] for leaf in jax.tree.leaves(batch)}
  if len(sizes) != 1 or () in sizes:
    checks.fail(
      "all leaves of batch to share one leading axis",
      leading_axes=sorted(sizes),
    )
  (shape,) = sizes
  if shape[0] % rows.per_unit:
    checks.fail(
      f"a batch of whole units of {rows.per_unit} rows",
      "Fill the last unit with padding rows.",
      num_rows=shape[0],
    )
  if is_padding_example is None:
    return jnp.zeros(shape, bool)
  if is_padding_example.shape != shape or is_padding_example.dtype != bool:
    checks.fail(
      f"is_padding_example to be bool of shape {shape}",
      shape=is_padding_example.shape,
      dtype=str(is_padding_example.dtype),
    )
  return is_padding_example


def _blank_rows(leaf: jax.Array, *, num_rows: int) -> jax.Array:
  """Rows of zeros (False: no example) like those of a leaf [B, ...]."""
  return jnp.zeros((num_rows, *leaf.shape[1:]), leaf.dtype)


def _head(result: Result, num_rows: int) -> Result:
  """Keeps the first rows of what is per example."""
  rows = dataclasses.replace(result, grad_sum=None)
  rows = jax.tree.map(lambda leaf: leaf[:num_rows], rows)
  return dataclasses.replace(rows, grad_sum=result.grad_sum)
