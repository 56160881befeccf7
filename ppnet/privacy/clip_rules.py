"""Rules that turn a unit's gradient into a contribution of bounded norm.

An engine of `privacy.clipping` computes squared norms; a `ClipRule` answers
with the two factors by which each unit's gradient is multiplied. Nothing here
forms a gradient.

| rule | contribution | paper |
| --- | --- | --- |
| CLIP | g min(1, C / norm(g)) | Abadi et al. 2016, Algorithm 1 |
| NORMALIZE | g C / (norm(g) + gamma) | Bu et al. 2022, AUTO-S |

https://arxiv.org/abs/1607.00133, https://arxiv.org/abs/2206.07136. Under
PER_LAYER the rule holds for each group of parameters with its own bound C_g.

*Formal guarantee.* The contribution of one unit has l2 norm at most C, the root
of the sum of C_g^2 over groups: groups are disjoint, so their squared norms add
up. It holds in float32: the bounds are met with the slack below.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ppnet import config
from ppnet.core import checks
from ppnet.privacy import outer_products

PyTree = Any

# What is added is scaled to C * (1 - slack), so that roundings cannot lift its
# norm above C. In units of u = 2^-24 = 6.0e-8, relative to the norm: rounding
# C, the square root, the quotient and two products cost at most 6; a sum of
# squares whose additions nest to depth d costs d / 2, and whoever checks the
# norm in float32 makes the same error again. XLA reduces in trees and in lanes,
# so d is some tens for any tensor (5 * 10^7 equal entries on a CPU: the norm
# was off by 2 u); 1e-5 is 168 u, which leaves room for d = 160. It costs 1e-5
# of the signal.
_SLACK = 1e-5

# A second sum of squares, of gradients times 2^-80, takes over where the first
# overflows: the largest float32 squared is then 8e28, so a billion entries fit.
_LARGE_SQUARED_NORM = 1e30

# Squares of entries that matter to the norm neither overflow nor underflow for
# clip norms in this range, up to 10^10 parameters.
MIN_CLIP_NORM = 1e-10
MAX_CLIP_NORM = 1e15

# Norms below 1e-14 are only bounded by some engines (`privacy.ghost`); beside
# this stabilizer they change a contribution by a part in 10^5 at most.
_MIN_STABILIZER = 1e-9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decision:
  """What becomes of each unit.

  Attributes:
    keep: whether it counts, bool[U].
    is_finite: bool[U], of padding as well.
    norms: of its gradient, 0 unless kept, f32[U].
    weights: for each parameter leaf two factors, since C / norm may underflow;
      0 unless kept; f32[*groups, U, 2].
  """

  keep: jax.Array
  is_finite: jax.Array
  norms: jax.Array
  weights: list[jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ClipRule:
  """From squared norms to factors, and the sensitivity that follows.

  Attributes:
    bounds: C under FLAT; under PER_LAYER C, to be split evenly over the leaves,
      or a pytree like the parameters whose leaves hold C_g: a number, or an
      array over the leading axes of a stacked parameter, one for each slice.
    rule: CLIP or NORMALIZE.
    scope: FLAT or PER_LAYER.
    stabilizer: gamma of NORMALIZE, in the unit of a gradient's norm.

  Raises:
    ValueError: a bound outside [1e-10, 1e15], a stabilizer outside
      [1e-9, 1e15], or a pytree of bounds under FLAT.
  """

  bounds: Any
  rule: config.ClipRule
  scope: config.ClipScope
  stabilizer: float

  def __post_init__(self) -> None:
    """Checks the fields."""
    is_number = isinstance(self.bounds, int | float)
    if not is_number and self.scope is not config.ClipScope.PER_LAYER:
      checks.fail(
        "l2_clip_norm to be one number under clip_scope FLAT",
        "Bounds for each layer need PER_LAYER.",
        l2_clip_norm=self.bounds,
      )
    for bound in [self.bounds] if is_number else _flat(self.bounds):
      check_clip_norm(float(bound))
    checks.positive(stabilizer=self.stabilizer)
    checks.at_most(MAX_CLIP_NORM, stabilizer=self.stabilizer)
    if self.stabilizer < _MIN_STABILIZER:
      checks.fail(
        f"stabilizer >= {_MIN_STABILIZER}",
        "Below, engines round it away differently.",
        stabilizer=self.stabilizer,
      )

  @property
  def total(self) -> float:
    """C: the root of the sum of C_g^2."""
    if isinstance(self.bounds, int | float):
      return float(self.bounds)  # Split evenly, if at all.
    return math.sqrt(math.fsum(float(b) ** 2 for b in _flat(self.bounds)))

  def sensitivity(self, relation: config.NeighboringRelation) -> float:
    """C under ADD_OR_REMOVE_ONE, 2C under REPLACE_ONE."""
    match relation:
      case config.NeighboringRelation.ADD_OR_REMOVE_ONE:
        return self.total
      case config.NeighboringRelation.REPLACE_ONE:
        return 2 * self.total
    checks.fail(
      "neighboring_relation to be a config.NeighboringRelation",
      neighboring_relation=relation,
    )

  def group_bounds(self, params: PyTree) -> list[np.ndarray]:
    """C_g of each leaf's groups, f64[*groups]; () where a leaf is one group.

    Raises:
      ValueError: the bounds do not have the structure of the parameters, or
        not the leading axes of one of them, or are too small.
    """
    leaves = jax.tree.leaves(params)
    if self.scope is config.ClipScope.FLAT:
      return [np.asarray(self.total)] * len(leaves)
    bounds = self.bounds
    if isinstance(bounds, int | float):
      bounds = equal_layer_norms(params, l2_clip_norm=float(bounds))
    if jax.tree.structure(bounds) != jax.tree.structure(params):
      checks.fail(
        "l2_clip_norm to be a pytree like the parameters",
        parameters=jax.tree.structure(params),
        l2_clip_norm=jax.tree.structure(bounds),
      )
    arrays = [np.asarray(b, np.float64) for b in jax.tree.leaves(bounds)]
    for leaf, bound in zip(leaves, arrays, strict=True):
      if leaf.shape[: bound.ndim] != bound.shape:
        checks.fail(
          "bounds of a stacked parameter to have its leading axes",
          bounds=bound.shape,
          parameter=leaf.shape,
        )
      check_clip_norm(float(np.min(bound)))  # Each, if C was split.
    return arrays

  def decide(
    self,
    stats: Sequence[outer_products.Stats],
    *,
    params: PyTree,
    has_finite_loss: jax.Array,
    padding: jax.Array,
    scale: jax.Array | None,
  ) -> Decision:
    """Factors from squared norms.

    Args:
      stats: one per parameter leaf, each f32[*slices, U], the slices beginning
        with the leaf's groups.
      params: for the groups.
      has_finite_loss: bool[U].
      padding: units that stand for nothing, bool[U].
      scale: what gradients are divided by before the rule, f32[]; None is 1.
    """
    # NaN and infinity survive in `shrunk`; finite entries cannot overflow it.
    total_shrunk = _total([one.shrunk for one in stats])
    is_finite = jnp.isfinite(total_shrunk) & has_finite_loss
    keep = is_finite & ~padding
    total_squared = _total([one.squared for one in stats])
    total_norm, total_shrink = _norm(total_squared, total_shrunk)
    bounds = self.group_bounds(params)
    if self.scope is config.ClipScope.FLAT:
      whole = jax.tree.map(lambda *parts: _total(parts), *stats)
      weights = [self._weights(whole, bounds[0], keep, scale)] * len(bounds)
    else:
      weights = [
        self._weights(_by_group(one, bound.shape), bound, keep, scale)
        for one, bound in zip(stats, bounds, strict=True)
      ]
    largest = jnp.finfo(jnp.float32).max
    norms = jnp.minimum(total_norm / total_shrink, largest)
    return Decision(
      keep=keep,
      is_finite=is_finite,
      norms=jnp.where(keep, norms, 0.0),
      weights=weights,
    )

  def _weights(
    self,
    stats: outer_products.Stats,
    bounds: np.ndarray,
    keep: jax.Array,
    scale: jax.Array | None,
  ) -> jax.Array:
    """Factors of some groups, f32[*groups, U, 2]; stats f32[*groups, U]."""
    norm, shrink = _norm(stats.squared, stats.shrunk)  # Of grads * shrink.
    is_large = shrink < 1
    # Where a sum and its norm are formed apart, the sum may be this much more.
    rounding = outer_products.ROUNDING * jnp.sqrt(
      jnp.where(is_large, stats.spread_shrunk, stats.spread)
    )
    safe_norm = jnp.maximum(norm, norm * (1 - _SLACK / 2) + rounding)
    bound = jnp.asarray(bounds[..., None] * (1 - _SLACK), jnp.float32)
    if self.rule is config.ClipRule.NORMALIZE:
      factor = bound / (safe_norm + self.stabilizer * shrink)
    else:
      most = jnp.float32(1) if scale is None else 1 / scale
      # min(most, bound / 0) is `most`.
      factor = bound / safe_norm
      factor = jnp.where(is_large, factor, jnp.minimum(most, factor))
    weights = jnp.stack([shrink, factor], axis=-1)
    return jnp.where(keep[:, None], weights, 0.0)


def equal_layer_norms(
  params: PyTree, *, l2_clip_norm: float, num_stacked_axes: PyTree | None = None
) -> PyTree:
  """Bounds C / sqrt(G) for each of G groups: together they are C.

  Args:
    params: the parameters, or their shapes.
    l2_clip_norm: C.
    num_stacked_axes: pytree of integers like the parameters, the number of
      leading axes that count layers, each slice a group. None means 0: every
      leaf is one group.

  Returns:
    A pytree like the parameters; leaves f64[*leading axes].
  """
  if num_stacked_axes is None:
    num_stacked_axes = jax.tree.map(lambda leaf: 0, params)
  shapes = jax.tree.map(
    lambda leaf, n: leaf.shape[:n], params, num_stacked_axes
  )
  is_shape = lambda node: isinstance(node, tuple)
  count = sum(math.prod(s) for s in jax.tree.leaves(shapes, is_leaf=is_shape))
  return jax.tree.map(
    lambda shape: np.full(shape, l2_clip_norm / math.sqrt(max(count, 1))),
    shapes,
    is_leaf=is_shape,
  )


def check_clip_norm(l2_clip_norm: float) -> None:
  """Raises outside the range where float32 norms are right."""
  checks.positive(l2_clip_norm=l2_clip_norm)
  checks.at_most(MAX_CLIP_NORM, l2_clip_norm=l2_clip_norm)
  if l2_clip_norm < MIN_CLIP_NORM:
    checks.fail(
      f"l2_clip_norm >= {MIN_CLIP_NORM}",
      "Below, squares of gradients underflow in float32.",
      l2_clip_norm=l2_clip_norm,
    )


def _flat(bounds: PyTree) -> np.ndarray:
  """All bounds of a pytree in one array."""
  return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(bounds)])


def _total(parts: Sequence[jax.Array]) -> jax.Array:
  """Sum of f32[*slices, U] over parts and slices, f32[U]."""
  return functools.reduce(
    jnp.add, [jnp.sum(x, axis=tuple(range(x.ndim - 1))) for x in parts]
  )


def _by_group(
  stats: outer_products.Stats, groups: tuple[int, ...]
) -> outer_products.Stats:
  """From [*slices, U] to [*groups, U]; the slices begin with the groups."""

  def reduce(x):
    *slices, num_units = x.shape
    # No operation uses the parameter, or `ghost` refuses its bounds.
    missing = max(len(groups) - len(slices), 0)
    x = x.reshape(*slices, *(1,) * missing, num_units)
    x = jnp.sum(x, axis=tuple(range(len(groups), x.ndim - 1)))
    return jnp.broadcast_to(x, (*groups, num_units))

  return jax.tree.map(reduce, stats)


def _norm(squared: jax.Array, shrunk: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Norm of gradients times a shrink, and that shrink: 1 unless they are huge.

  `shrunk` are squares times SHRINK^2.
  """
  is_large = ~(squared < _LARGE_SQUARED_NORM)
  norm = jnp.sqrt(jnp.where(is_large, shrunk, squared))
  return norm, jnp.where(is_large, outer_products.SHRINK, 1.0)
