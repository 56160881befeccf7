"""Gradients that are sums of outer products: norms and weighted sums.

The gradient of a weight, for one unit, is sum_t a_t b_t' over tokens and uses
(see `privacy.ghost`). Its norm comes from the Gram form,

  |sum_t a_t b_t'|^2 = sum_st (a_s'a_t)(b_s'b_t),

which forms no gradient, or from the product itself. Goodfellow 2015
(https://arxiv.org/abs/1510.01799) has the case of one token, Li et al. 2021
(https://arxiv.org/abs/2110.05679, Section 4) that of a sequence.

*Formal guarantee.* The norm that `Stats` leads to is not below that of the
example's contribution to the sum by more than a part in 10^5, in the rounding
model below. u = 2^-24, S = sum_t |a_t||b_t|. `Stats` are per parameter and per
slice of a stacked one; sums over any group of them bound the group's norm.

- A Gram form subtracts large numbers to find a small one. With the Grams P
  and Q off by at most c u |a_s||a_t| and c u |b_s||b_t| per entry, the squared
  norm is off by at most
  E = c u sum_st (|a_s||a_t||Q_st| + |b_s||b_t||P_st|). E is computed beside it
  and **added**. Where E is more than 10^-5 of the result for any example (10^-3
  where factors are of lower precision than float32 and their own rounding is
  more), the products themselves are formed, a few examples at a time
  (`product_stats`).
- The sum is not formed by the same roundings as the norm. Each can be off by
  c u S; `Stats.spread` carries S^2 and `clipping` adds c u S where it exceeds
  the slack. KEEP needs none: norm and sum read one array.
- c = 4. Worst cases grow with the length of a sum; XLA's sums are blocked and
  roundings of independent sign grow with its root (Higham and Mary 2019,
  theorem 2.4, https://doi.org/10.1137/18M1226312), and S is itself a bound by
  absolute values. tests/privacy/ghost_test.py searches for counterexamples.
- Products that enter a norm or a sum have f32 accumulation and full f32
  precision on accelerators (`Precision.HIGHEST`), whatever the compute dtype.
- Tokens so small that their squares vanish in float32 are counted apart: where
  what they could add matters, the products are formed as well.

Letters: U units, T tokens of all uses by all rows of a unit, s t tokens,
m x n a weight.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

# Where squares overflow, the same norm in units of 2^80 takes over.
SHRINK = 2.0**-80

# c u of the docstring.
ROUNDING = 4 * 2.0**-24

# For products that enter a norm or a sum: TPUs and GPUs round f32 inputs else.
_EXACT = {
  "precision": jax.lax.Precision.HIGHEST,
  "preferred_element_type": jnp.float32,
}

# Relative, of a squared norm; what is accepted is added to it. Activations of
# lower precision than float32 are off by more than the second one.
_MAX_GRAM_ERROR = 1e-5
_MAX_GRAM_ERROR_LOW = 1e-3
_LARGEST_GRAM = 1e30
_FLUSHED = 1.1e-19  # The square of less may be 0 in float32.
# A clip norm is at least 1e-10; a norm below this may be rounded up to it.
_NEGLIGIBLE_NORM = 1e-14


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["squared", "shrunk", "spread", "spread_shrunk"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Stats:
  """Squares of one parameter's gradients; those of several add up.

  Each is f32[*slices, U].

  Attributes:
    squared: squared norm of the gradient, with the Gram error on top.
    shrunk: the same times SHRINK^2; NaN or infinite for a bad example.
    spread: S^2, the scale of the sum's rounding; 0 for kept gradients.
    spread_shrunk: the same times SHRINK^2.
  """

  squared: Any
  shrunk: Any
  spread: Any
  spread_shrunk: Any


def zero_stats(shape: tuple[int, ...]) -> Stats:
  """Stats of nothing."""
  zeros = jnp.zeros(shape)
  return Stats(squared=zeros, shrunk=zeros, spread=zeros, spread_shrunk=zeros)


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["rows", "cols"],
  meta_fields=["shape"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Factor:
  """One use of a weight: its gradient is sum_t rows_t cols_t'.

  Attributes:
    rows: [U, T, m], or i32[U, T] for unit vectors.
    cols: [U, T, n], or likewise.
    shape: (m, n).
  """

  rows: Any
  cols: Any
  shape: tuple[int, int]

  @property
  def gram_cost(self) -> int:
    """T^2 times what a Gram reads for a pair of tokens, over T."""
    widths = [x.shape[2] if x.ndim == 3 else 1 for x in (self.rows, self.cols)]
    return self.rows.shape[1] * sum(widths)


def gram_stats(factors: list[Factor]) -> Stats:
  """Stats by Gram forms of all pairs of uses, or by `_careful_stats`."""
  grams = {
    (i, j): (_dots(one.rows, other.rows), _dots(one.cols, other.cols))
    for i, one in enumerate(factors)
    for j, other in enumerate(factors[: i + 1])
  }  # [B, S, T] each.
  # Of every token, f32[B, T]; the diagonals are there already.
  row_norms, col_norms = (
    [_root_of_diagonal(grams[i, i][k]) for i in range(len(factors))]
    for k in (0, 1)
  )
  squared = error = jnp.float32(0.0)
  for (i, j), (p, q) in grams.items():
    times = 1.0 if i == j else 2.0
    squared += times * jnp.sum(p * q, axis=(1, 2))
    p_scale = row_norms[i][:, :, None] * row_norms[j][:, None, :]
    q_scale = col_norms[i][:, :, None] * col_norms[j][:, None, :]
    error += times * jnp.sum(
      p_scale * jnp.abs(q) + q_scale * jnp.abs(p), axis=(1, 2)
    )
  error = ROUNDING * error
  spread = jnp.square(_spread(row_norms, col_norms))
  m, n = factors[0].shape
  # Tokens below _FLUSHED vanish from the Grams; this is what they can add.
  flushed = _FLUSHED * (
    math.sqrt(m) * _total(col_norms) + math.sqrt(n) * _total(row_norms)
  )
  is_good = (
    # False for NaN as well.
    (squared < _LARGEST_GRAM)
    & (error <= _max_gram_error(factors) * squared)
    & (flushed <= jnp.maximum(_NEGLIGIBLE_NORM, 1e-6 * jnp.sqrt(squared)))
  )
  by_gram = _in_range(squared + error, spread)
  return jax.lax.cond(
    jnp.all(is_good),
    lambda _: by_gram,
    lambda factors: _careful_stats(factors, by_gram, is_good),
    factors,
  )


def _careful_stats(
  factors: list[Factor], by_gram: Stats, is_good: jax.Array
) -> Stats:
  """Stats where the Gram form did not do for some example.

  It may be no more than an example of gradient zero, or NaN; else the products
  themselves are formed.
  """
  top_row = _over_uses(jnp.maximum, [_largest(use.rows) for use in factors])
  top_col = _over_uses(jnp.maximum, [_largest(use.cols) for use in factors])
  num_tokens = sum(use.cols.shape[1] for use in factors)
  size = math.prod(factors[0].shape)
  ceiling = top_row * top_col * num_tokens * math.sqrt(size)
  is_tiny = ceiling <= _NEGLIGIBLE_NORM  # 0 among them.
  is_bad = ~(jnp.isfinite(top_row) & jnp.isfinite(top_col))
  squared = jnp.where(is_tiny, jnp.square(ceiling), by_gram.squared)
  squared = jnp.where(is_bad, jnp.nan, squared)
  spread = jnp.where(is_tiny, 0.0, by_gram.spread)
  mended = _in_range(squared, spread)
  return jax.lax.cond(
    jnp.all(is_good | is_tiny | is_bad),
    lambda _: mended,
    product_stats,
    factors,
  )


def _in_range(squared: jax.Array, spread: jax.Array) -> Stats:
  """Stats whose squares float32 holds."""
  return Stats(
    squared=squared,
    shrunk=squared * SHRINK * SHRINK,
    spread=spread,
    spread_shrunk=spread * SHRINK * SHRINK,
  )


def _max_gram_error(factors: list[Factor]) -> float:
  """Largest accepted error of a squared norm, relative."""
  dtypes = [x.dtype for x in jax.tree.leaves(factors)]
  is_low = any(jnp.finfo(d).bits < 32 for d in dtypes if d.kind != "i")
  return _MAX_GRAM_ERROR_LOW if is_low else _MAX_GRAM_ERROR


def _root_of_diagonal(gram: jax.Array) -> jax.Array:
  """Norms of tokens, f32[B, T], from their products [B, T, T]."""
  return jnp.sqrt(jnp.diagonal(gram, axis1=1, axis2=2))


def _total(norms: list[jax.Array]) -> jax.Array:
  """Sum over tokens and uses, f32[B]."""
  return _over_uses(jnp.add, [jnp.sum(x, axis=1) for x in norms])


def _over_uses(fun: Any, values: list[jax.Array]) -> jax.Array:
  """Folds one value per use."""
  return functools.reduce(fun, values)


def product_stats(factors: list[Factor]) -> Stats:
  """Stats of the products themselves, a few examples at a time."""
  recorded = sum(x.size for x in jax.tree.leaves(factors))

  def one_example(uses):  # Leaves [T, ...].
    uses = jax.tree.map(lambda x: x[None], uses)
    grad = sum(products(use)[0] for use in uses)
    spread = _spread(
      [_safe_token_norms(use.rows) for use in uses],
      [_safe_token_norms(use.cols) for use in uses],
    )[0]
    # Without the barrier XLA makes (s c)^2 into s^2 c^2, and c^2 is 0.
    small = jax.lax.optimization_barrier(spread * SHRINK)
    return Stats(
      squared=jnp.sum(jnp.square(grad)),
      shrunk=jnp.sum(jnp.square(grad * SHRINK)),
      spread=jnp.square(spread),
      spread_shrunk=jnp.square(small),
    )

  # No more memory than the factors take already.
  group = max(1, recorded // math.prod(factors[0].shape))
  return jax.lax.map(one_example, factors, batch_size=group)


def products(factor: Factor) -> jax.Array:
  """The gradients themselves, f32[U, m, n]."""
  rows, cols = factor.rows, factor.cols
  if rows.ndim == 3 and cols.ndim == 3:
    return jnp.einsum("btm,btn->bmn", rows, cols, **_EXACT)
  if cols.ndim == 2:
    flipped = Factor(rows=cols, cols=rows, shape=factor.shape[::-1])
    return jnp.swapaxes(products(flipped), 1, 2)
  zeros = jnp.zeros((rows.shape[0], *factor.shape), jnp.float32)
  examples = jnp.arange(rows.shape[0])[:, None]
  return zeros.at[examples, rows].add(cols.astype(jnp.float32), mode="drop")


def weighted_sum(factor: Factor, weights: jax.Array) -> jax.Array:
  """Weighted sum over examples of the gradients, f32[m, n].

  Both factors of an example of weight 0 are selected away, since one of them
  may be infinite or NaN.
  """
  rows, cols = factor.rows, factor.cols
  if cols.ndim == 2:
    flipped = Factor(rows=cols, cols=rows, shape=factor.shape[::-1])
    return weighted_sum(flipped, weights).T
  keep = is_kept(weights)[:, None, None]
  first, second = weights[:, :1, None], weights[:, 1:, None]  # [U, 1, 1]
  cols = jnp.where(keep, cols.astype(jnp.float32) * first * second, 0.0)
  if rows.ndim == 3:
    rows = jnp.where(keep, rows.astype(jnp.float32), 0.0)
    return jnp.einsum("btm,btn->mn", rows, cols, **_EXACT)
  zeros = jnp.zeros(factor.shape, jnp.float32)
  return zeros.at[rows].add(cols, mode="drop")


def is_kept(weights: jax.Array) -> jax.Array:
  """Units with a weight, [..., U, 2] -> bool[..., U]."""
  return jnp.all(weights > 0, axis=-1)


def _dots(one: jax.Array, other: jax.Array) -> jax.Array:
  """Products of all pairs of tokens, f32[U, S, T]."""
  if one.ndim == 2 and other.ndim == 2:
    return (one[:, :, None] == other[:, None, :]).astype(jnp.float32)
  if one.ndim == 2:
    return jnp.swapaxes(_dots(other, one), 1, 2)
  if other.ndim == 2:
    picked = jnp.take_along_axis(
      one, other[:, None, :], axis=2, mode="fill", fill_value=0
    )
    return picked.astype(jnp.float32)
  return jnp.einsum("bsm,btm->bst", one, other, **_EXACT)


def _token_norms(x: jax.Array) -> jax.Array:
  """l2 norm of every token, f32[U, T]; 1 for unit vectors."""
  if x.ndim == 2:
    return jnp.ones(x.shape)
  return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1))


def _safe_token_norms(x: jax.Array) -> jax.Array:
  """`_token_norms` of numbers whose squares overflow or vanish, too."""
  if x.ndim == 2:
    return jnp.ones(x.shape)
  top = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=-1, keepdims=True)
  top = jax.lax.optimization_barrier(jnp.where(top == 0, 1.0, top))
  return top[..., 0] * _token_norms(x.astype(jnp.float32) / top)


def _largest(x: jax.Array) -> jax.Array:
  """Largest absolute entry of every unit, f32[U]; 1 for unit vectors."""
  if x.ndim == 2:
    return jnp.ones(x.shape[:1])
  return jnp.max(jnp.abs(x.astype(jnp.float32)), axis=(1, 2))


def _spread(row_norms: list, col_norms: list) -> jax.Array:
  """S = sum over tokens of the factors' norms, f32[U]."""
  pairs = zip(row_norms, col_norms, strict=True)
  parts = [jnp.sum(rows * cols, axis=1) for rows, cols in pairs]
  return _over_uses(jnp.add, parts)
