"""Clipped gradient sums over privacy units: what bounds the sensitivity.

>>> import jax.numpy as jnp
>>> def loss_fn(params, batch):  # [B]
...   return batch @ params
>>> grad_fn = clipped_grad(loss_fn, l2_clip_norm=1.0)
>>> result = grad_fn(jnp.zeros(2), jnp.array([[3.0, 4.0], [0.3, 0.4]]))
>>> [round(float(x), 3) for x in result.grad_sum]
[0.9, 1.2]
>>> grad_fn.sensitivity(config.NeighboringRelation.ADD_OR_REMOVE_ONE)
1.0
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from ppnet import config
from ppnet.core import checks
from ppnet.privacy import (
  clip_rules,
  engine_choice,
  ghost,
  outer_products,
  taps,
  unit_rows,
)
from ppnet.sharding import layout

PyTree = Any
LossFn = Callable[..., Any]  # (params, batch, ops=PLAIN) -> losses.


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["grad_sum", "grad_norms", "losses", "aux", "is_nonfinite"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class ClippedGrad:
  """Result of a gradient callable of this module. All of it is private.

  U units, B = U rows_per_unit rows; they are the same where a unit is a row.

  Attributes:
    grad_sum: sum over units, float32, in the structure of the parameters.
    grad_norms: f32[U], l2 norm of each unit's gradient before clipping; 0 for
      padding and for non-finite gradients, at most the largest float32. None
      from `unprotected_grad`, which never sees a unit's gradient.
    losses: f32[B], each row's loss as computed; 0 for padding.
    aux: what the loss function returned beside the losses, leaves [B, ...],
      zero for padding; None without.
    is_nonfinite: bool[U], units with a NaN or infinite gradient, or such a loss
      in a row that is not padding.
  """

  grad_sum: PyTree
  grad_norms: Any
  losses: Any
  aux: PyTree
  is_nonfinite: Any


@runtime_checkable
class GradFn(Protocol):
  """A gradient callable that knows its sensitivity."""

  def __call__(
    self,
    params: PyTree,
    batch: PyTree,
    is_padding_example: jax.Array | None = None,
    *,
    scale: jax.Array | None = None,
  ) -> ClippedGrad:
    """Returns the sum of gradients and the diagnostics of each unit.

    Args:
      params: pytree of floating-point arrays.
      batch: pytree whose leaves have the leading axis B; typed PRNG keys [B]
        are such leaves.
      is_padding_example: bool[B], True for rows that stand for nothing; None
        means that there are none.
      scale: f32[], what every unit's gradient is divided by before it is
        clipped; the sensitivity stays what it is. None is 1.
    """

  def sensitivity(
    self, neighboring_relation: config.NeighboringRelation
  ) -> float:
    """How far `grad_sum` can move in l2 norm between neighbours."""

  def engine_choice(
    self, params: PyTree, batch: PyTree
  ) -> engine_choice.Choice | None:
    """Which engine a batch of these shapes goes through, and why.

    None where gradients are not clipped. Arrays or their shapes will do.
    """


def clipped_grad(
  loss_fn: LossFn,
  *,
  l2_clip_norm: float | PyTree,
  engine: config.Engine | str = config.Engine.VMAP,
  microbatch_size: int | None = None,
  has_aux: bool = False,
  rows_per_unit: int = 1,
  unit_reduction: config.UnitReduction = config.UnitReduction.SUM,
  clip_rule: config.ClipRule = config.ClipRule.CLIP,
  clip_scope: config.ClipScope = config.ClipScope.FLAT,
  stabilizer: float = 0.01,
) -> GradFn:
  """Returns a callable for the sum of clipped gradients of privacy units.

  The gradient g of each unit is replaced by g * min(1, C / |g|), the norm taken
  over the whole tree in float32 (Abadi et al. 2016,
  https://arxiv.org/abs/1607.00133, Algorithm 1). `privacy.clip_rules` has the
  other rules, and bounds for each layer.

  *Units.* A unit is one row of the batch, or `rows_per_unit` rows side by side:
  row i belongs to unit i // rows_per_unit. Its gradient is the sum of its rows'
  gradients (SUM: a user's records) or their mean (MEAN: views of one record, De
  et al. 2022, https://arxiv.org/abs/2204.13650); the mean is over
  rows that are not padding. That gradient is clipped, once.

  *Formal guarantee.* Adding or removing one unit moves `grad_sum` by at most C
  in l2 norm, replacing one by at most 2C, whatever the data, the parameters and
  the loss function (up to the float32 rounding of the sum over units, about
  1e-7 of its norm). C is `l2_clip_norm`, or the root of the sum of its squares
  where it holds a bound for each layer. A unit may have any number of rows up
  to `rows_per_unit`, whatever they are: the others are padding. The VMAP engine
  calls `loss_fn` on the rows of one unit, so no unit can enter another one's
  gradient, as long as the function closes over no private data. GHOST and
  BOOKKEEPING call it on whole microbatches: there the guarantee needs a loss
  function that does not couple rows (no batch statistics), which
  `check_examples_are_apart` tests on a batch. Randomness belongs in the batch,
  one key per row. Only `grad_sum` has bounded sensitivity; the norms, losses
  and aux are diagnostics, and private.

  *Operations.* GHOST and BOOKKEEPING call `loss_fn(params, batch, ops=ops)`
  with an `ops` of their own, and the function must touch its parameters through
  those alone (`core.param_ops`; a model of `ppnet.models` is cloned with them).
  Whatever else touches one is an error that names it. VMAP passes no `ops`: the
  function's own default, `param_ops.PLAIN`, is used. `privacy.ghost` has the
  rules, what each costs, and why a norm is never too small.

  | engine | backward passes | extra memory | for |
  | --- | --- | --- | --- |
  | VMAP | 1 | all units' gradients | any loss function |
  | GHOST | 2, or 1 if no weight is used once | none for those | float32 |
  | BOOKKEEPING | 1 | little; under remat inputs and cotangents | any dtype |
  | AUTO | | | one of these by shape, see `privacy.engine_choice` |

  | edge case | contribution |
  | --- | --- |
  | gradient of norm 0, or up to C(1 - 1e-5) | itself, unchanged (CLIP) |
  | huge finite gradient, its norm beyond float32 too | clipped to C |
  | any NaN or infinity in gradient or loss | exactly zero, and reported |
  | such a row beside good ones of its unit | the whole unit is zero |
  | a padding row, whatever its content | exactly zero; its unit stays |
  | a unit of nothing but padding | exactly zero |
  | float16 or bfloat16 parameters | clipped and summed in float32 |
  | B = 0 | a sum of zeros |
  | clip norm 0, infinite, NaN, or outside [1e-10, 1e15] | `ValueError` |
  | a scale outside [1e-10 / smallest bound, 1e15 / C] | the nearer end |

  A unit with a bad row is dropped whole: engines see the sum over its rows, and
  the rows that are left were not what the loss was asked for.

  Args:
    loss_fn: `loss_fn(params, batch, ops=PLAIN) -> losses f32[B]`, or
      `(losses, aux)` with leaves [B, ...] if `has_aux`. VMAP does without
      `ops`.
    l2_clip_norm: C, in [1e-10, 1e15]; under PER_LAYER also a pytree of bounds,
      see `clip_rules.ClipRule`.
    engine: how the sum is computed; all give the same sum.
    microbatch_size: units whose gradients are held at once; None means all. It
      changes memory and speed, not the result.
    has_aux: whether `loss_fn` returns aux.
    rows_per_unit: rows of a unit.
    unit_reduction: SUM or MEAN over a unit's rows.
    clip_rule: CLIP or NORMALIZE.
    clip_scope: FLAT, one norm over all parameters, or PER_LAYER. A number
      `l2_clip_norm` is then split evenly over the leaves.
    stabilizer: gamma of NORMALIZE, in [1e-9, 1e15].

  Returns:
    A callable `(params, batch, is_padding_example=None, *, scale=None) ->
    ClippedGrad` with a method `sensitivity(neighboring_relation)`.

  Raises:
    ValueError: an argument out of range, an unknown engine, a loss function
      without `ops` for an engine that hands it some, or (when called) one whose
      losses do not have the shape [B] or whose parameters go elsewhere, a batch
      that is not made of whole units, or a scale under NORMALIZE, which has no
      use for one.
  """
  engine = _parse_engine(engine)
  if engine in (config.Engine.GHOST, config.Engine.BOOKKEEPING):
    _check_takes_ops(loss_fn)
  rule = clip_rules.ClipRule(
    bounds=l2_clip_norm,
    rule=clip_rule,
    scope=clip_scope,
    stabilizer=stabilizer,
  )
  return _PerUnitGrad(
    loss_fn=loss_fn,
    engine=engine,
    has_aux=has_aux,
    rule=rule,
    rows=unit_rows.Rows(
      per_unit=rows_per_unit,
      reduction=unit_reduction,
      microbatch_size=microbatch_size,
    ),
  )


def unprotected_grad(
  loss_fn: LossFn,
  *,
  clipping: config.Clipping,
  l2_clip_norm: float,
  microbatch_size: int | None = None,
  has_aux: bool = False,
  rows_per_unit: int = 1,
  unit_reduction: config.UnitReduction = config.UnitReduction.SUM,
) -> GradFn:
  """Returns the ablations of `clipped_grad`: the same outputs, no guarantee.

  One backward pass of the summed losses per microbatch. Under `Clipping.NONE`
  the sum is left alone. Under `Clipping.BATCH` it goes through
  `clip_batch_mean` at the end of the call; a caller that adds up several calls
  asks for NONE and calls `clip_batch_mean` once, on the total.

  *Formal guarantee.* None: `sensitivity` is infinite for both.

  | edge case | result |
  | --- | --- |
  | a non-finite row | in the sum, and its unit reported in `is_nonfinite` |
  | padding, whatever its content | exactly zero |
  | `grad_norms` | None: no unit's gradient is ever formed |
  | `scale` | `ValueError`: there is no bound to be in units of |

  Args:
    loss_fn: as for `clipped_grad`. It sees whole microbatches, so an example
      may influence another one's loss.
    clipping: NONE or BATCH.
    l2_clip_norm: bound on the mean gradient under BATCH.
    microbatch_size: as for `clipped_grad`.
    has_aux: whether `loss_fn` returns aux.
    rows_per_unit: as for `clipped_grad`.
    unit_reduction: as for `clipped_grad`.

  Returns:
    A callable like that of `clipped_grad`.

  Raises:
    ValueError: an argument out of range, or `Clipping.PER_EXAMPLE`.
  """
  clip_rules.check_clip_norm(l2_clip_norm)
  if clipping not in (config.Clipping.NONE, config.Clipping.BATCH):
    checks.fail(
      "clipping to be NONE or BATCH",
      "Use clipped_grad for PER_EXAMPLE.",
      clipping=clipping,
    )
  return _UnprotectedGrad(
    sum_fn=functools.partial(_batch_sum, loss_fn, has_aux=has_aux),
    clip_norm=l2_clip_norm if clipping is config.Clipping.BATCH else None,
    rows=unit_rows.Rows(
      per_unit=rows_per_unit,
      reduction=unit_reduction,
      microbatch_size=microbatch_size,
    ),
  )


def check_examples_are_apart(
  loss_fn: LossFn, params: PyTree, batch: PyTree, *, has_aux: bool = False
) -> None:
  """Raises if examples of this batch enter each other's loss or gradient.

  A debugging aid for loss functions that GHOST and BOOKKEEPING are to run, on a
  batch with at least two different examples. *Formal guarantee.* None: a
  coupling that this batch does not show passes.

  Raises:
    ValueError: losses or gradient norms over the whole batch are not those of
      each example alone.
  """
  alone, together = (
    clipped_grad(loss_fn, l2_clip_norm=1.0, engine=engine, has_aux=has_aux)(
      params, rows
    )
    for engine, rows in (
      (config.Engine.VMAP, _cloned(batch)),
      (config.Engine.BOOKKEEPING, batch),
    )
  )
  for name in ("losses", "grad_norms"):
    one, all_of_them = getattr(alone, name), getattr(together, name)
    apart = jnp.abs(one - all_of_them) <= 1e-4 * (jnp.abs(one) + 1e-6)
    if not bool(jnp.all(apart | ~jnp.isfinite(one))):
      checks.fail(
        f"{name} of each example not to depend on the others",
        "Look for statistics over the batch axis, or use engine VMAP.",
        alone=one,
        in_the_batch=all_of_them,
      )


def clip_batch_mean(
  grad_sum: PyTree, *, num_examples: jax.Array, l2_clip_norm: float
) -> PyTree:
  """Clips the mean gradient of a batch, and returns it times `num_examples`.

  *Formal guarantee.* None. One example can turn the whole mean, so the
  sensitivity grows with the batch; this is the ablation that shows it.

  Args:
    grad_sum: sum of gradients over the batch, float32 leaves.
    num_examples: number of units in the sum that are not padding, a scalar; 0
      is allowed.
    l2_clip_norm: bound on the l2 norm of the mean.
  """
  count = jnp.maximum(num_examples, 1).astype(jnp.float32)
  mean = jax.tree.map(lambda leaf: leaf / count, grad_sum)
  squared = sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(mean))
  scale = jnp.minimum(1.0, l2_clip_norm / jnp.sqrt(squared)) * count
  return jax.tree.map(lambda leaf: leaf * scale, mean)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _PerUnitGrad:
  """The callable that `clipped_grad` returns."""

  loss_fn: LossFn
  engine: config.Engine
  has_aux: bool
  rule: clip_rules.ClipRule
  rows: unit_rows.Rows

  def __call__(
    self,
    params: PyTree,
    batch: PyTree,
    is_padding_example: jax.Array | None = None,
    *,
    scale: jax.Array | None = None,
  ) -> ClippedGrad:
    """See `GradFn`."""
    padding = unit_rows.padding_mask(batch, is_padding_example, self.rows)
    if scale is not None:
      if self.rule.rule is not config.ClipRule.CLIP:
        checks.fail(
          "no scale unless clip_rule is CLIP",
          "Normalised gradients all have the same norm.",
          clip_rule=self.rule.rule.name,
        )
      bounds = self.rule.group_bounds(params)
      scale = jnp.clip(
        jnp.asarray(scale, jnp.float32),
        clip_rules.MIN_CLIP_NORM / min(float(b.min()) for b in bounds),
        clip_rules.MAX_CLIP_NORM / self.rule.total,
      )
    return unit_rows.in_microbatches(
      functools.partial(
        _ENGINES[self.engine],
        self.loss_fn,
        has_aux=self.has_aux,
        rule=self.rule,
        rows=self.rows,
        scale=scale,
      ),
      params,
      batch,
      padding,
      self.rows,
    )

  def sensitivity(
    self, neighboring_relation: config.NeighboringRelation
  ) -> float:
    """See `clip_rules.ClipRule.sensitivity`."""
    return self.rule.sensitivity(neighboring_relation)

  def engine_choice(
    self, params: PyTree, batch: PyTree
  ) -> engine_choice.Choice:
    """The engine that a batch of these shapes goes through, and why."""
    if self.engine is not config.Engine.AUTO:
      return engine_choice.Choice(
        engine=self.engine, why="named by the configuration"
      )
    return _choose_engine(
      self.loss_fn, params, batch, rows=self.rows, has_aux=self.has_aux
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _UnprotectedGrad:
  """The callable that `unprotected_grad` returns."""

  sum_fn: Callable[..., ClippedGrad]
  clip_norm: float | None
  rows: unit_rows.Rows

  def __call__(
    self,
    params: PyTree,
    batch: PyTree,
    is_padding_example: jax.Array | None = None,
    *,
    scale: jax.Array | None = None,
  ) -> ClippedGrad:
    """See `GradFn`."""
    if scale is not None:
      checks.fail("no scale where nothing is clipped", scale=scale)
    padding = unit_rows.padding_mask(batch, is_padding_example, self.rows)
    sum_fn = functools.partial(self.sum_fn, rows=self.rows)
    result = unit_rows.in_microbatches(
      sum_fn, params, batch, padding, self.rows
    )
    if self.clip_norm is None:
      return result
    clipped = clip_batch_mean(
      result.grad_sum,
      num_examples=jnp.sum(~self.rows.unit_padding(padding)),
      l2_clip_norm=self.clip_norm,
    )
    return dataclasses.replace(result, grad_sum=clipped)

  def sensitivity(
    self, neighboring_relation: config.NeighboringRelation
  ) -> float:
    """Infinite: one unit moves the sum without bound."""
    del neighboring_relation  # It makes no difference.
    return math.inf

  def engine_choice(self, params: PyTree, batch: PyTree) -> None:
    """None: units are not told apart."""
    del params, batch  # Whatever they are.


def _vmap_engine(
  loss_fn: LossFn,
  params: PyTree,
  batch: PyTree,
  padding: jax.Array,
  *,
  rule: clip_rules.ClipRule,
  rows: unit_rows.Rows,
  scale: jax.Array | None,
  has_aux: bool,
) -> ClippedGrad:
  """Clipped sum by `jax.vmap` over batches of one unit: the reference."""

  def unit_loss(params, unit, weights):
    losses, aux = _call(loss_fn, params, unit, rows.per_unit, has_aux)
    return jnp.sum(losses * weights), (losses, aux)

  def unit_grad(unit, weights):
    (_, (losses, aux)), grad = jax.value_and_grad(unit_loss, has_aux=True)(
      params, unit, weights
    )
    # Widen first: float16 squares overflow at 256.
    return losses, aux, jax.tree.map(lambda x: x.astype(jnp.float32), grad)

  # Leaves [U, ...]; on a mesh the units stay where their rows are.
  losses, aux, grads = jax.vmap(unit_grad, spmd_axis_name=layout.batch_axes())(
    jax.tree.map(rows.by_unit, rows.without_padding(batch, padding)),
    rows.by_unit(rows.weights(padding)),
  )
  losses, aux = jax.tree.map(
    lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), (losses, aux)
  )
  leaves, structure = jax.tree.flatten(grads)
  decision = rule.decide(
    [
      _unit_stats(leaf, bound.ndim)
      for leaf, bound in zip(leaves, rule.group_bounds(params), strict=True)
    ],
    params=params,
    has_finite_loss=rows.finite_units(losses),
    padding=rows.unit_padding(padding),
    scale=scale,
  )

  def clipped_sum(leaf, weights):  # [U, *groups, ...], [*groups, U, 2]
    weights = jnp.moveaxis(weights, -2, 0)
    shape = weights.shape[:-1] + (1,) * (leaf.ndim - weights.ndim + 1)
    shrink, factor = (weights[..., i].reshape(shape) for i in (0, 1))
    keep = decision.keep.reshape(-1, *(1,) * (leaf.ndim - 1))
    # Select, do not multiply by zero: 0 * NaN is NaN.
    return jnp.sum(jnp.where(keep, leaf * shrink * factor, 0.0), axis=0)

  sums = map(clipped_sum, leaves, decision.weights)
  return _result(
    structure.unflatten(sums), losses, aux, padding, decision, rows, has_aux
  )


def _unit_stats(grads: jax.Array, num_group_axes: int) -> outer_products.Stats:
  """Squares of gradients f32[U, *groups, ...], f32[*groups, U]."""
  axes = tuple(range(1 + num_group_axes, grads.ndim))
  sums = lambda x: jnp.moveaxis(jnp.sum(jnp.square(x), axis=axes), 0, -1)
  squared, shrunk = sums(grads), sums(grads * outer_products.SHRINK)
  zeros = jnp.zeros_like(squared)
  return outer_products.Stats(
    squared=squared, shrunk=shrunk, spread=zeros, spread_shrunk=zeros
  )


def _tapped_engine(
  loss_fn: LossFn,
  params: PyTree,
  batch: PyTree,
  padding: jax.Array,
  *,
  rule: clip_rules.ClipRule,
  rows: unit_rows.Rows,
  scale: jax.Array | None,
  has_aux: bool,
  may_probe: bool,
) -> ClippedGrad:
  """Clipped sum by rules for each operation: GHOST and BOOKKEEPING."""
  out = ghost.per_example(
    _marked(loss_fn, has_aux),
    params,
    rows.without_padding(batch, padding),
    may_probe=may_probe,
    row_weights=rows.weights(padding),
    rows_per_unit=rows.per_unit,
  )
  decision = rule.decide(
    out.stats,
    params=params,
    has_finite_loss=rows.finite_units(out.losses),
    padding=rows.unit_padding(padding),
    scale=scale,
  )
  return _result(
    out.weighted_sum(decision.weights),
    out.losses,
    out.aux,
    padding,
    decision,
    rows,
    has_aux,
  )


def _result(
  grad_sum: PyTree,
  losses: jax.Array,
  aux: PyTree,
  padding: jax.Array,
  decision: clip_rules.Decision,
  rows: unit_rows.Rows,
  has_aux: bool,
) -> ClippedGrad:
  """Puts a result together, nothing of padding in it."""
  return ClippedGrad(
    grad_sum=grad_sum,
    grad_norms=decision.norms,
    losses=jnp.where(padding, 0.0, losses),
    aux=_zero_padding(aux, padding) if has_aux else None,
    is_nonfinite=~decision.is_finite & ~rows.unit_padding(padding),
  )


def _auto_engine(
  loss_fn: LossFn,
  params: PyTree,
  batch: PyTree,
  padding: jax.Array,
  *,
  rows: unit_rows.Rows,
  has_aux: bool,
  **options: Any,
) -> ClippedGrad:
  """Clipped sum by the engine that suits the shapes."""
  choice = _choose_engine(loss_fn, params, batch, rows=rows, has_aux=has_aux)
  return _ENGINES[choice.engine](
    loss_fn, params, batch, padding, rows=rows, has_aux=has_aux, **options
  )


def _choose_engine(
  loss_fn: LossFn,
  params: PyTree,
  batch: PyTree,
  *,
  rows: unit_rows.Rows,
  has_aux: bool,
) -> engine_choice.Choice:
  """What AUTO is for a batch of these shapes."""
  if not _takes_ops(loss_fn):
    return engine_choice.Choice(
      engine=config.Engine.VMAP,
      why="the loss function does not take its operations as `ops`",
    )
  return engine_choice.choose(
    _marked(loss_fn, has_aux), params, batch, rows_per_unit=rows.per_unit
  )


def _marked(loss_fn: LossFn, has_aux: bool) -> Callable[..., Any]:
  """(params, batch) -> (losses, aux), its operations to be found by `taps`."""
  with_ops = functools.partial(loss_fn, ops=taps.MARKING)

  def call(params, batch):
    num_rows = jax.tree.leaves(batch)[0].shape[0]
    return _call(with_ops, params, batch, num_rows, has_aux)

  return call


# An engine takes (loss_fn, params, batch, padding bool[B]) and, by keyword,
# rule, rows, scale and has_aux; it returns the same ClippedGrad as every other.
_ENGINES = {
  config.Engine.AUTO: _auto_engine,
  config.Engine.VMAP: _vmap_engine,
  config.Engine.GHOST: functools.partial(_tapped_engine, may_probe=True),
  config.Engine.BOOKKEEPING: functools.partial(_tapped_engine, may_probe=False),
}


def _batch_sum(
  loss_fn: LossFn,
  params: PyTree,
  batch: PyTree,
  padding: jax.Array,
  *,
  rows: unit_rows.Rows,
  has_aux: bool,
) -> ClippedGrad:
  """Unclipped sum by one backward pass."""
  num_rows = padding.shape[0]
  # A zero cotangent into a row that computes NaN still gives NaN, so padding
  # rows become copies of an example: then zero times finite is zero.
  places = jnp.where(padding, jnp.argmin(padding), jnp.arange(num_rows))
  batch = jax.tree.map(lambda leaf: leaf[places], batch)
  weights = rows.weights(padding)

  def total(params):
    losses, aux = _call(loss_fn, params, batch, num_rows, has_aux)
    losses = jnp.where(padding, 0.0, losses)
    return jnp.sum(losses * weights), (losses, aux)

  (_, (losses, aux)), grad_sum = jax.value_and_grad(total, has_aux=True)(params)
  any_example = ~jnp.all(padding)
  return ClippedGrad(
    grad_sum=jax.tree.map(
      lambda leaf: jnp.where(any_example, leaf.astype(jnp.float32), 0.0),
      grad_sum,
    ),
    grad_norms=None,
    losses=losses,
    aux=_zero_padding(aux, padding) if has_aux else None,
    is_nonfinite=~rows.finite_units(losses),
  )


def _call(
  loss_fn: LossFn, params: PyTree, batch: PyTree, num_rows: int, has_aux: bool
) -> tuple[jax.Array, PyTree]:
  """Calls the loss function; losses in float32, of checked shape."""
  losses, aux = loss_fn(params, batch), None
  if has_aux:
    losses, aux = losses
  if jnp.shape(losses) != (num_rows,):
    checks.fail(
      f"loss_fn to return one loss per example, shape ({num_rows},)",
      "Reduce over tokens, never over examples.",
      losses_shape=jnp.shape(losses),
    )
  for leaf in jax.tree.leaves(aux):
    if jnp.shape(leaf)[:1] != (num_rows,):
      checks.fail(
        f"every leaf of aux to have the leading axis {num_rows}",
        aux_shape=jnp.shape(leaf),
      )
  return losses.astype(jnp.float32), aux


def _zero_padding(aux: PyTree, padding: jax.Array) -> PyTree:
  """Zeroes padding rows, so that a NaN in one cannot enter a metric."""

  def zero(leaf):
    mask = padding.reshape((-1,) + (1,) * (leaf.ndim - 1))
    return jnp.where(mask, jnp.zeros_like(leaf), leaf)

  return jax.tree.map(zero, aux)


def _cloned(batch: PyTree) -> PyTree:
  """The batch with its keys to be used once more, on purpose."""
  return jax.tree.map(
    lambda leaf: (
      jax.random.clone(leaf)
      if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
      else leaf
    ),
    batch,
  )


def _takes_ops(loss_fn: LossFn) -> bool:
  """Whether the loss function has a parameter `ops`."""
  parameters = inspect.signature(loss_fn).parameters.values()
  return any(p.name == "ops" or p.kind is p.VAR_KEYWORD for p in parameters)


def _check_takes_ops(loss_fn: LossFn) -> None:
  """Raises unless the loss function has a parameter `ops`."""
  if not _takes_ops(loss_fn):
    checks.fail(
      "loss_fn to take the operations on its parameters as `ops`",
      "Write loss_fn(params, batch, ops=param_ops.PLAIN) and hand them to the"
      " model, or use engine VMAP.",
      loss_fn=loss_fn,
    )


def _parse_engine(engine: config.Engine | str) -> config.Engine:
  """Engine from a member or its string value; only those that exist."""
  known = [member.value for member in _ENGINES]
  value = engine.value if isinstance(engine, config.Engine) else engine
  if value not in known:
    checks.fail(
      f"engine to be one of {known}",
      checks.did_you_mean(str(value), known).strip(),
      engine=engine,
    )
  return config.Engine(value)
