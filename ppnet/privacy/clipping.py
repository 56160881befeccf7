"""Per-example clipped gradient sums: what bounds the sensitivity.

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
from ppnet.privacy import ghost, taps

PyTree = Any
LossFn = Callable[..., Any]  # (params, batch, ops=PLAIN) -> losses.

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
_SHRINK = ghost.SHRINK
_LARGE_SQUARED_NORM = 1e30

# Squares of entries that matter to the norm neither overflow nor underflow for
# clip norms in this range, up to 10^10 parameters.
_MIN_CLIP_NORM = 1e-10
_MAX_CLIP_NORM = 1e15


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["grad_sum", "grad_norms", "losses", "aux", "is_nonfinite"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class ClippedGrad:
  """Result of a gradient callable of this module. All of it is private.

  Attributes:
    grad_sum: sum over examples, float32, in the structure of the parameters.
    grad_norms: f32[B], l2 norm of each example's gradient before clipping; 0
      for padding and for non-finite gradients, at most the largest float32.
      None from `unprotected_grad`, which never sees an example's gradient.
    losses: f32[B], each example's loss as computed; 0 for padding.
    aux: what the loss function returned beside the losses, leaves [B, ...],
      zero for padding; None without.
    is_nonfinite: bool[B], examples (not padding) with a NaN or infinite
      gradient or loss.
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
  ) -> ClippedGrad:
    """Returns the sum of gradients and the per-example diagnostics.

    Args:
      params: pytree of floating-point arrays.
      batch: pytree whose leaves have the leading axis B; typed PRNG keys [B]
        are such leaves.
      is_padding_example: bool[B], True for rows that stand for no example;
        None means that all rows are examples.
    """

  def sensitivity(
    self, neighboring_relation: config.NeighboringRelation
  ) -> float:
    """How far `grad_sum` can move in l2 norm between neighbours."""


def clipped_grad(
  loss_fn: LossFn,
  *,
  l2_clip_norm: float,
  engine: config.Engine | str = config.Engine.VMAP,
  microbatch_size: int | None = None,
  has_aux: bool = False,
) -> GradFn:
  """Returns a callable for the sum of clipped per-example gradients.

  The gradient g of each example is replaced by g * min(1, C / |g|), the norm
  taken over the whole tree in float32 (Abadi et al. 2016,
  https://arxiv.org/abs/1607.00133, Algorithm 1).

  *Formal guarantee.* Adding or removing one example moves `grad_sum` by at most
  C = `l2_clip_norm` in l2 norm, replacing one by at most 2C, whatever the data,
  the parameters and the loss function (up to the float32 rounding of the sum
  over examples, about 1e-7 of its norm). The VMAP engine calls `loss_fn` on
  batches of one example, so no example can enter another one's gradient, as
  long as the function closes over no private data. GHOST and BOOKKEEPING call
  it on whole microbatches: there the guarantee needs a loss function that does
  not couple examples (no batch statistics), which `check_examples_are_apart`
  tests on a batch. Randomness belongs in the batch, one key per example. Only
  `grad_sum` has bounded sensitivity; the norms, losses and aux are diagnostics,
  and private.

  *Operations.* GHOST and BOOKKEEPING call `loss_fn(params, batch, ops=ops)`
  with an `ops` of their own, and the function must touch its parameters through
  those alone (`core.param_ops`; a model of `ppnet.models` is cloned with them).
  Whatever else touches one is an error that names it. VMAP passes no `ops`: the
  function's own default, `param_ops.PLAIN`, is used. `privacy.ghost` has the
  rules, what each costs, and why a norm is never too small.

  | engine | backward passes | extra memory | for |
  | --- | --- | --- | --- |
  | VMAP | 1 | all examples' gradients | any loss function |
  | GHOST | 2, or 1 if no weight is used once | none for those | float32 |
  | BOOKKEEPING | 1 | inputs and cotangents, or small gradients | any dtype |

  | edge case | contribution |
  | --- | --- |
  | gradient of norm 0, or up to C(1 - 1e-5) | itself, unchanged |
  | huge finite gradient, its norm beyond float32 too | clipped to C |
  | any NaN or infinity in gradient or loss | exactly zero, and reported |
  | padding, whatever its content | exactly zero |
  | float16 or bfloat16 parameters | clipped and summed in float32 |
  | B = 0 | a sum of zeros |
  | clip norm 0, infinite, NaN, or outside [1e-10, 1e15] | `ValueError` |

  Args:
    loss_fn: `loss_fn(params, batch, ops=PLAIN) -> losses f32[B]`, or
      `(losses, aux)` with leaves [B, ...] if `has_aux`. VMAP does without
      `ops`.
    l2_clip_norm: C, in [1e-10, 1e15].
    engine: how the sum is computed; all give the same sum.
    microbatch_size: examples whose gradients are held at once; None means all.
      It changes memory and speed, not the result.
    has_aux: whether `loss_fn` returns aux.

  Returns:
    A callable `(params, batch, is_padding_example=None) -> ClippedGrad` with a
    method `sensitivity(neighboring_relation)`.

  Raises:
    ValueError: an argument out of range, an unknown engine, a loss function
      without `ops` for an engine that hands it some, or (when called) one whose
      losses do not have the shape [B] or whose parameters go elsewhere.
  """
  _check_clip_norm(l2_clip_norm)
  engine = _parse_engine(engine)
  if engine is not config.Engine.VMAP:
    _check_takes_ops(loss_fn)
  engine_fn = _ENGINES[engine]
  _check_microbatch_size(microbatch_size)
  return _PerExampleGrad(
    sum_fn=functools.partial(
      engine_fn, loss_fn, l2_clip_norm=l2_clip_norm, has_aux=has_aux
    ),
    l2_clip_norm=l2_clip_norm,
    microbatch_size=microbatch_size,
  )


def unprotected_grad(
  loss_fn: LossFn,
  *,
  clipping: config.Clipping,
  l2_clip_norm: float,
  microbatch_size: int | None = None,
  has_aux: bool = False,
) -> GradFn:
  """Returns the ablations of `clipped_grad`: the same outputs, no guarantee.

  One backward pass of the summed losses per microbatch. Under `Clipping.NONE`
  the sum is left alone. Under `Clipping.BATCH` it goes through
  `clip_batch_mean` at the end of the call; a caller that adds up several calls
  asks for NONE and calls `clip_batch_mean` once, on the total.

  *Formal guarantee.* None: `sensitivity` is infinite for both.

  | edge case | result |
  | --- | --- |
  | a non-finite example | in the sum, and reported in `is_nonfinite` |
  | padding, whatever its content | exactly zero |
  | `grad_norms` | None: no example's gradient is ever formed |

  Args:
    loss_fn: as for `clipped_grad`. It sees whole microbatches, so an example
      may influence another one's loss.
    clipping: NONE or BATCH.
    l2_clip_norm: bound on the mean gradient under BATCH.
    microbatch_size: as for `clipped_grad`.
    has_aux: whether `loss_fn` returns aux.

  Returns:
    A callable like that of `clipped_grad`.

  Raises:
    ValueError: an argument out of range, or `Clipping.PER_EXAMPLE`.
  """
  _check_clip_norm(l2_clip_norm)
  _check_microbatch_size(microbatch_size)
  if clipping not in (config.Clipping.NONE, config.Clipping.BATCH):
    checks.fail(
      "clipping to be NONE or BATCH",
      "Use clipped_grad for PER_EXAMPLE.",
      clipping=clipping,
    )
  return _UnprotectedGrad(
    sum_fn=functools.partial(_batch_sum, loss_fn, has_aux=has_aux),
    clip_norm=l2_clip_norm if clipping is config.Clipping.BATCH else None,
    microbatch_size=microbatch_size,
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
    num_examples: number of real examples in the sum, a scalar; 0 is allowed.
    l2_clip_norm: bound on the l2 norm of the mean.
  """
  count = jnp.maximum(num_examples, 1).astype(jnp.float32)
  mean = jax.tree.map(lambda leaf: leaf / count, grad_sum)
  squared = sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(mean))
  scale = jnp.minimum(1.0, l2_clip_norm / jnp.sqrt(squared)) * count
  return jax.tree.map(lambda leaf: leaf * scale, mean)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _PerExampleGrad:
  """The callable that `clipped_grad` returns."""

  sum_fn: Callable[[PyTree, PyTree, jax.Array], ClippedGrad]
  l2_clip_norm: float
  microbatch_size: int | None

  def __call__(
    self,
    params: PyTree,
    batch: PyTree,
    is_padding_example: jax.Array | None = None,
  ) -> ClippedGrad:
    """See `GradFn`."""
    padding = _padding_mask(batch, is_padding_example)
    return _in_microbatches(
      self.sum_fn, params, batch, padding, self.microbatch_size
    )

  def sensitivity(
    self, neighboring_relation: config.NeighboringRelation
  ) -> float:
    """C under ADD_OR_REMOVE_ONE, 2C under REPLACE_ONE."""
    match neighboring_relation:
      case config.NeighboringRelation.ADD_OR_REMOVE_ONE:
        return self.l2_clip_norm
      case config.NeighboringRelation.REPLACE_ONE:
        return 2 * self.l2_clip_norm
    checks.fail(
      "neighboring_relation to be a config.NeighboringRelation",
      neighboring_relation=neighboring_relation,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _UnprotectedGrad:
  """The callable that `unprotected_grad` returns."""

  sum_fn: Callable[[PyTree, PyTree, jax.Array], ClippedGrad]
  clip_norm: float | None
  microbatch_size: int | None

  def __call__(
    self,
    params: PyTree,
    batch: PyTree,
    is_padding_example: jax.Array | None = None,
  ) -> ClippedGrad:
    """See `GradFn`."""
    padding = _padding_mask(batch, is_padding_example)
    result = _in_microbatches(
      self.sum_fn, params, batch, padding, self.microbatch_size
    )
    if self.clip_norm is None:
      return result
    clipped = clip_batch_mean(
      result.grad_sum,
      num_examples=jnp.sum(~padding),
      l2_clip_norm=self.clip_norm,
    )
    return dataclasses.replace(result, grad_sum=clipped)

  def sensitivity(
    self, neighboring_relation: config.NeighboringRelation
  ) -> float:
    """Infinite: one example moves the sum without bound."""
    del neighboring_relation  # It makes no difference.
    return math.inf


def _vmap_engine(
  loss_fn: LossFn,
  params: PyTree,
  batch: PyTree,
  padding: jax.Array,
  *,
  l2_clip_norm: float,
  has_aux: bool,
) -> ClippedGrad:
  """Clipped sum by `jax.vmap` over batches of one example: the reference."""

  def one_loss(params, example):
    losses, aux = _call(loss_fn, params, example, 1, has_aux)
    return losses[0], aux

  def one_grad(example):
    example = jax.tree.map(lambda leaf: leaf[None], example)
    (loss, aux), grad = jax.value_and_grad(one_loss, has_aux=True)(
      params, example
    )
    # Widen first: float16 squares overflow at 256.
    grad = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), grad)
    return loss, jax.tree.map(lambda leaf: leaf[0], aux), grad

  losses, aux, grads = jax.vmap(one_grad)(batch)  # Leaves [B, ...].
  leaves = jax.tree.leaves(grads)
  clip = _clip(
    losses,
    padding,
    squared=sum(_rows_sum(jnp.square(leaf)) for leaf in leaves),
    shrunk=sum(_rows_sum(jnp.square(leaf * _SHRINK)) for leaf in leaves),
    l2_clip_norm=l2_clip_norm,
  )

  def clipped_sum(leaf):  # [B, ...] -> [...]
    shape = (-1,) + (1,) * (leaf.ndim - 1)
    shrink, factor = (clip.weights[:, i].reshape(shape) for i in (0, 1))
    # Select, do not multiply by zero: 0 * NaN is NaN.
    return jnp.sum(
      jnp.where(clip.keep.reshape(shape), leaf * shrink * factor, 0.0), axis=0
    )

  return _result(
    jax.tree.map(clipped_sum, grads), losses, aux, padding, clip, has_aux
  )


def _tapped_engine(
  loss_fn: LossFn,
  params: PyTree,
  batch: PyTree,
  padding: jax.Array,
  *,
  l2_clip_norm: float,
  has_aux: bool,
  may_probe: bool,
) -> ClippedGrad:
  """Clipped sum by rules for each operation: GHOST and BOOKKEEPING."""
  with_ops = functools.partial(loss_fn, ops=taps.MARKING)

  def call(params, batch):
    num_rows = jax.tree.leaves(batch)[0].shape[0]
    return _call(with_ops, params, batch, num_rows, has_aux)

  out = ghost.per_example(call, params, batch, may_probe=may_probe)
  clip = _clip(
    out.losses,
    padding,
    squared=out.stats.squared,
    shrunk=out.stats.shrunk,
    spread=out.stats.spread,
    spread_shrunk=out.stats.spread_shrunk,
    l2_clip_norm=l2_clip_norm,
  )
  return _result(
    out.weighted_sum(clip.weights), out.losses, out.aux, padding, clip, has_aux
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Clip:
  """What becomes of each example.

  Attributes:
    keep: whether it counts, bool[B].
    is_finite: bool[B], of padding as well.
    norms: of its gradient, 0 unless kept, f32[B].
    weights: two factors, since C / |g| may underflow; 0 unless kept, f32[B, 2].
  """

  keep: jax.Array
  is_finite: jax.Array
  norms: jax.Array
  weights: jax.Array


def _clip(
  losses: jax.Array,
  padding: jax.Array,
  *,
  squared: Any,
  shrunk: Any,
  l2_clip_norm: float,
  spread: Any = 0.0,
  spread_shrunk: Any = 0.0,
) -> _Clip:
  """Weights from squared norms; `shrunk` are those times _SHRINK^2.

  `spread` is S^2 of `privacy.ghost`, the scale of a sum's rounding where sum
  and norm are formed apart.
  """
  # NaN and infinity survive in `shrunk`; finite entries cannot overflow it.
  is_finite = jnp.isfinite(shrunk) & jnp.isfinite(losses)
  keep = is_finite & ~padding
  large = ~(squared < _LARGE_SQUARED_NORM)
  norm = jnp.sqrt(jnp.where(large, shrunk, squared))  # Of grads * shrink.
  shrink = jnp.where(large, _SHRINK, 1.0)
  rounding = ghost.ROUNDING * jnp.sqrt(jnp.where(large, spread_shrunk, spread))
  safe_norm = jnp.maximum(norm, norm * (1 - _SLACK / 2) + rounding)
  bound = l2_clip_norm * (1 - _SLACK)
  # min(1, bound / 0) is 1.
  factor = jnp.where(
    large, bound / safe_norm, jnp.minimum(1.0, bound / safe_norm)
  )
  largest = jnp.finfo(jnp.float32).max
  weights = jnp.stack([shrink, factor], axis=1)
  return _Clip(
    keep=keep,
    is_finite=is_finite,
    norms=jnp.where(keep, jnp.minimum(norm / shrink, largest), 0.0),
    weights=jnp.where(keep[:, None], weights, 0.0),
  )


def _result(
  grad_sum: PyTree,
  losses: jax.Array,
  aux: PyTree,
  padding: jax.Array,
  clip: _Clip,
  has_aux: bool,
) -> ClippedGrad:
  """Puts a result together, nothing of padding in it."""
  return ClippedGrad(
    grad_sum=grad_sum,
    grad_norms=clip.norms,
    losses=jnp.where(padding, 0.0, losses),
    aux=_zero_padding(aux, padding) if has_aux else None,
    is_nonfinite=~clip.is_finite & ~padding,
  )


# An engine takes (loss_fn, params, batch, padding bool[B]) and, by keyword,
# l2_clip_norm and has_aux; it returns the same ClippedGrad as every other.
_ENGINES = {
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
  has_aux: bool,
) -> ClippedGrad:
  """Unclipped sum by one backward pass."""
  num_rows = padding.shape[0]
  # A zero cotangent into a row that computes NaN still gives NaN, so padding
  # rows become copies of an example: then zero times finite is zero.
  rows = jnp.where(padding, jnp.argmin(padding), jnp.arange(num_rows))
  batch = jax.tree.map(lambda leaf: leaf[rows], batch)

  def total(params):
    losses, aux = _call(loss_fn, params, batch, num_rows, has_aux)
    losses = jnp.where(padding, 0.0, losses)
    return jnp.sum(losses), (losses, aux)

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
    is_nonfinite=~jnp.isfinite(losses) & ~padding,
  )


def _in_microbatches(
  sum_fn: Callable[[PyTree, PyTree, jax.Array], ClippedGrad],
  params: PyTree,
  batch: PyTree,
  padding: jax.Array,
  microbatch_size: int | None,
) -> ClippedGrad:
  """Calls `sum_fn` on microbatches in a scan; adds sums, keeps the order."""
  num_rows = padding.shape[0]
  if num_rows == 0:
    # Nothing to differentiate; one padding row gives the shapes.
    padding = jnp.ones(1, bool)
    leaves, rewrap = _without_keys(batch)
    batch = rewrap([_blank_rows(leaf, num_rows=1) for leaf in leaves])
    return _head(sum_fn(params, batch, padding), 0)
  if microbatch_size is None or microbatch_size >= num_rows:
    return sum_fn(params, batch, padding)
  num_microbatches = -(-num_rows // microbatch_size)
  missing = num_microbatches * microbatch_size - num_rows

  def split(leaf):  # [B, ...] -> [microbatches, microbatch_size, ...]
    leaf = jnp.concatenate([leaf, _blank_rows(leaf, num_rows=missing)])
    # Every num_microbatches-th row goes together, so that a batch axis that is
    # sharded stays spread over all devices in every microbatch.
    leaf = leaf.reshape(microbatch_size, num_microbatches, *leaf.shape[1:])
    return jnp.swapaxes(leaf, 0, 1)

  def join(leaf):  # The inverse of split.
    leaf = jnp.swapaxes(leaf, 0, 1)
    return leaf.reshape(-1, *leaf.shape[2:])[:num_rows]

  # Keys travel as their data: the reuse checker loses track of moved axes.
  leaves, rewrap = _without_keys(batch)

  def body(grad_sum, microbatch):
    rows, is_example = microbatch
    result = sum_fn(params, rewrap(rows), ~is_example)
    grad_sum = jax.tree.map(jnp.add, grad_sum, result.grad_sum)
    return grad_sum, dataclasses.replace(result, grad_sum=None)

  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
  grad_sum, rows = jax.lax.scan(
    body, zeros, ([split(leaf) for leaf in leaves], split(~padding))
  )
  return dataclasses.replace(jax.tree.map(join, rows), grad_sum=grad_sum)


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


def _rows_sum(leaf: jax.Array) -> jax.Array:
  """Sum over all axes but the first, [B, ...] -> [B]."""
  return jnp.sum(leaf, axis=tuple(range(1, leaf.ndim)))


def _zero_padding(aux: PyTree, padding: jax.Array) -> PyTree:
  """Zeroes padding rows, so that a NaN in one cannot enter a metric."""

  def zero(leaf):
    mask = padding.reshape((-1,) + (1,) * (leaf.ndim - 1))
    return jnp.where(mask, jnp.zeros_like(leaf), leaf)

  return jax.tree.map(zero, aux)


def _without_keys(
  batch: PyTree,
) -> tuple[list[jax.Array], Callable[[list[jax.Array]], PyTree]]:
  """Leaves with keys replaced by their data, and the function back."""
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


def _blank_rows(leaf: jax.Array, *, num_rows: int) -> jax.Array:
  """Rows of zeros (False: no example) like those of a leaf [B, ...]."""
  return jnp.zeros((num_rows, *leaf.shape[1:]), leaf.dtype)


def _head(result: ClippedGrad, num_rows: int) -> ClippedGrad:
  """Keeps the first rows of what is per example."""
  rows = dataclasses.replace(result, grad_sum=None)
  rows = jax.tree.map(lambda leaf: leaf[:num_rows], rows)
  return dataclasses.replace(rows, grad_sum=result.grad_sum)


def _padding_mask(
  batch: PyTree, is_padding_example: jax.Array | None
) -> jax.Array:
  """The mask, bool[B]; checks that all leaves agree on B."""
  sizes = {leaf.shape[:1] for leaf in jax.tree.leaves(batch)}
  if len(sizes) != 1 or () in sizes:
    checks.fail(
      "all leaves of batch to share one leading axis",
      leading_axes=sorted(sizes),
    )
  (shape,) = sizes
  if is_padding_example is None:
    return jnp.zeros(shape, bool)
  if is_padding_example.shape != shape or is_padding_example.dtype != bool:
    checks.fail(
      f"is_padding_example to be bool of shape {shape}",
      shape=is_padding_example.shape,
      dtype=str(is_padding_example.dtype),
    )
  return is_padding_example


def _check_clip_norm(l2_clip_norm: float) -> None:
  """Raises outside the range where float32 norms are right."""
  checks.positive(l2_clip_norm=l2_clip_norm)
  checks.at_most(_MAX_CLIP_NORM, l2_clip_norm=l2_clip_norm)
  if l2_clip_norm < _MIN_CLIP_NORM:
    checks.fail(
      f"l2_clip_norm >= {_MIN_CLIP_NORM}",
      "Below, squares of gradients underflow in float32.",
      l2_clip_norm=l2_clip_norm,
    )


def _check_takes_ops(loss_fn: LossFn) -> None:
  """Raises unless the loss function has a parameter `ops`."""
  parameters = inspect.signature(loss_fn).parameters.values()
  if not any(p.name == "ops" or p.kind is p.VAR_KEYWORD for p in parameters):
    checks.fail(
      "loss_fn to take the operations on its parameters as `ops`",
      "Write loss_fn(params, batch, ops=param_ops.PLAIN) and hand them to the"
      " model, or use engine VMAP.",
      loss_fn=loss_fn,
    )


def _check_microbatch_size(microbatch_size: int | None) -> None:
  """Raises unless it is None or a positive integer."""
  if microbatch_size is not None:
    checks.positive(microbatch_size=microbatch_size)


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
