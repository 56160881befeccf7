"""Per-unit gradient norms and weighted gradient sums, by rules.

A privacy unit is one row of the batch, an example, or `rows_per_unit` rows that
stand side by side: a user's records, or views of one record. Its gradient is
the weighted sum of its rows' gradients. The weights are cotangents of the
losses, and the tokens of all its rows are its tokens, so that the cross terms
between rows come by themselves. Below, "example" means a unit.

Every weight gradient of this codebase's operations is, for one example, a sum
over tokens of outer products a_t b_t' (the input and the output's cotangent;
for an embedding a_t is a unit vector) or, for scales and biases, a vector. A
parameter that is used several times (tied embeddings, a model applied twice, a
weight shared by the iterations of a scan) has the sum over all its uses. For
each parameter one of three ways is chosen:

- KEEP: the backward pass leaves the gradient of each example's own copy of the
  weight, [U, m, n], and automatic differentiation adds up the uses. Its norm
  and the weighted sum read the same array, as under `jax.vmap`.
- RECORD: a and b of all uses are kept. The norm is a Gram form,
  sum_st (a_s'a_t)(b_s'b_t) over the tokens of all uses, cross terms included;
  the weighted sum is one product per use.
- PROBE (one use only): the norm is computed inside the backward pass and
  nothing is kept; a second pullback computes the weighted sum. The weights
  enter as the cotangent of an extra output, so the second pass repeats the
  cotangents of the first and multiplies where the weight gradient is formed.
  The weights never pass through the network.

KEEP is taken where m n <= 0.4 T (m + n), T the tokens of all uses: it is then
the smaller array. In flops the products cost less than the Gram form up to
m n = T (m + n), but they are written and read again: measured on two CPU
cores, 0.4 took 1.2 to 1.3 of the non-private time on configs/quickstart.py
where 1 took 1.85, and as long within the noise at d 256 and T 128 with a tenth
less memory. A probe writes nothing that outlives it and changes over at
m n = T (m + n).

*Formal guarantee.* The norm that `Stats` leads to is not below that of the
example's contribution to the sum by more than a part in 10^5, in the rounding
model below. u = 2^-24, S = sum_t |a_t||b_t|. `Stats` are per parameter and per
slice of a stacked one; sums over any group of them bound the group's norm.

- A Gram form subtracts large numbers to find a small one. With the Grams P
  and Q off by at most c u |a_s||a_t| and c u |b_s||b_t| per entry, the squared
  norm is off by at most
  E = c u sum_st (|a_s||a_t||Q_st| + |b_s||b_t||P_st|). E is computed beside it
  and **added**. Where E is more than 10^-5 of the result for any example, the
  products themselves are formed, a few examples at a time
  (`_materialised_stats`).
- The sum is not formed by the same roundings as the norm. Each can be off by
  c u S; `Stats.spread` carries S^2 and `clipping` adds c u S where it exceeds
  the slack. KEEP needs none: norm and sum read one array.
- c = 4. Worst cases grow with the length of a sum; XLA's sums are blocked and
  roundings of independent sign grow with its root (Higham and Mary 2019,
  theorem 2.4, https://doi.org/10.1137/18M1226312), and S is itself a bound by
  absolute values. tests/privacy/ghost_test.py searches for counterexamples.
- Products that enter a norm or a sum have f32 accumulation and full f32
  precision on accelerators (`Precision.HIGHEST`), whatever the compute dtype.

| edge case | result |
| --- | --- |
| NaN or infinity in an example | NaN in its own `Stats`; in no sum |
| an example of weight 0 | selected away before any product |
| a parameter that the loss does not use | norm 0, sum 0 |
| squares beyond float32 | `Stats.shrunk`, in units of 2^80 |

Letters: U units, B = U rows_per_unit rows of the batch, L slices of a stacked
parameter, T tokens of all uses of a slice by all rows of a unit, s t tokens,
m x n a weight. *slices are the leading axes that scans run over.
"""

import dataclasses
import enum
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ppnet.core import checks
from ppnet.privacy import taps

PyTree = Any

# Where squares overflow, the same norm in units of 2^80 takes over.
SHRINK = 2.0**-80

_KEEP_SHARE = 0.4  # See the module's docstring.

# c u of the docstring.
ROUNDING = 4 * 2.0**-24

# For products that enter a norm or a sum: TPUs and GPUs round f32 inputs else.
_EXACT = {
  "precision": jax.lax.Precision.HIGHEST,
  "preferred_element_type": jnp.float32,
}

_MAX_GRAM_ERROR = 1e-5  # Relative, of a squared norm.
_LARGEST_GRAM = 1e30
# Entries between these have squares and fourth powers that float32 holds.
_SMALLEST_ENTRY, _LARGEST_ENTRY = 1e-15, 1e15
# A clip norm is at least 1e-10; a norm below this may be rounded up to it.
_NEGLIGIBLE_NORM = 1e-14


class Way(enum.Enum):
  """How one parameter's norms and sum are computed."""

  KEEP = "keep"
  RECORD = "record"
  PROBE = "probe"


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerExample:
  """One pass over a batch, before clipping.

  Attributes:
    losses: f32[B], without the rows' weights.
    aux: what the loss returned beside them.
    stats: of each unit's gradient, one `Stats` per parameter leaf.
    weighted_sum: one f32[*leading slices, U, 2] per parameter leaf -> sum over
      units of gradient times both factors, f32, in the structure of the
      parameters. A unit whose factors are 0 is left out, whatever it holds.
  """

  losses: Any
  aux: PyTree
  stats: list[Stats]
  weighted_sum: Callable[[Sequence[jax.Array]], PyTree]


def per_example(
  fun: Callable[[PyTree, PyTree], tuple[jax.Array, PyTree]],
  params: PyTree,
  batch: PyTree,
  *,
  may_probe: bool,
  row_weights: jax.Array,
  rows_per_unit: int = 1,
) -> PerExample:
  """Runs `fun(params, batch) -> (losses f32[B], aux)` forward and backward.

  Args:
    fun: a loss that uses `taps.MARKING`; row i of everything in it depends on
      row i of the batch alone.
    params: floating-point arrays.
    batch: leaves [B, ...].
    may_probe: whether parameters with one use get a second pullback (GHOST), or
      all are kept or recorded (BOOKKEEPING).
    row_weights: f32[B], what each row's gradient counts in that of its unit.
    rows_per_unit: so many rows, side by side, are one unit.

  Raises:
    ValueError: see `taps.trace`; or a probed operation whose dtype is not f32.
  """
  program = taps.trace(fun, params, batch)
  num_units = program.num_rows // rows_per_unit
  leaves, structure = jax.tree.flatten(params)
  uses: dict[int, list[taps.Site]] = {}
  for site in program.sites:
    uses.setdefault(site.view.leaf, []).append(site)
  ways = {
    leaf: choose_way(
      [_with_units(site, rows_per_unit) for site in sites], may_probe=may_probe
    )
    for leaf, sites in uses.items()
  }
  slices = {
    leaf: leaves[leaf].shape[: len(sites[0].view.scans)]
    for leaf, sites in uses.items()
  }
  by_leaf: dict[int, Any] = {}
  for leaf in uses:
    if ways[leaf] is Way.KEEP:
      rest = leaves[leaf].shape[len(slices[leaf]) :]
      by_leaf[leaf] = jnp.zeros((*slices[leaf], num_units, *rest))
    elif ways[leaf] is Way.PROBE:
      by_leaf[leaf] = _zero_stats((*slices[leaf], num_units))
  by_site = {
    site.path: jnp.zeros((*site.lengths, *site.out.shape), site.out.dtype)
    for site in program.sites
    if ways[site.view.leaf] is Way.RECORD
  }
  # Weights only of probed parameters are differentiated.
  probed = {leaf: leaves[leaf] for leaf in uses if ways[leaf] is Way.PROBE}

  def forward(probed, by_leaf, by_site):
    frame = taps.Frame(
      rule=lambda site, weight, x, frame: _RULES[ways[site.view.leaf]](
        site, weight, x, frame, num_units
      ),
      by_leaf=by_leaf,
      by_site=by_site,
      everywhere=(),  # Probes go by parameter.
      total=jnp.zeros(()),
    )
    full = [probed.get(i, leaf) for i, leaf in enumerate(leaves)]
    losses, aux = program.run(structure.unflatten(full), batch, frame)
    doors = {leaf: frame.records.pop(_door_key(leaf)) for leaf in probed}
    return (losses, doors), (aux, frame.records)

  (losses, doors), pullback, (aux, records) = jax.vjp(
    forward, probed, by_leaf, by_site, has_aux=True
  )
  _, from_leaf, cotangents = pullback(
    (row_weights, jax.tree.map(jnp.zeros_like, doors))
  )
  factors_of = {
    leaf: _factors(sites, records, cotangents, num_units)
    for leaf, sites in uses.items()
    if ways[leaf] is Way.RECORD
  }
  stats = [_zero_stats((num_units,)) for _ in leaves]
  for leaf, value in from_leaf.items():
    is_kept = ways[leaf] is Way.KEEP
    stats[leaf] = _kept_stats(value, slices[leaf]) if is_kept else value
  for leaf, factors in factors_of.items():
    stats[leaf] = jax.tree.map(
      lambda x, leaf=leaf: x.reshape(*slices[leaf], num_units),
      _per_slice(_gram, factors),
    )

  def weighted_sum(weights):
    full = {  # [*slices, U, 2]
      leaf: _to_slices(weights[leaf], slices[leaf]) for leaf in uses
    }
    again = {}
    if probed:
      again = pullback((row_weights, {leaf: full[leaf] for leaf in probed}))[0]
    out = []
    for i, leaf in enumerate(leaves):
      if i in factors_of:
        grad = _recorded_sum(factors_of[i], full[i], uses[i])
      elif i in again:
        grad = again[i]
      elif i in from_leaf:
        grad = _kept_sum(from_leaf[i], full[i])
      else:
        grad = jnp.zeros(leaf.shape)
      out.append(grad.reshape(leaf.shape).astype(jnp.float32))
    return structure.unflatten(out)

  return PerExample(
    losses=losses, aux=aux, stats=stats, weighted_sum=weighted_sum
  )


def choose_way(sites: Sequence[taps.Site], *, may_probe: bool) -> Way:
  """The way of one parameter, by local shapes; see the module's docstring."""
  size = math.prod(sites[0].view.shape)
  is_matrix = all(site.kind in ("dense", "embed") for site in sites)
  if not is_matrix:
    return Way.KEEP  # Vectors: [U, n] is less than any record.
  recorded = 0
  for site in sites:
    again = math.prod(site.lengths) // _num_slices(site)
    tokens = again * math.prod(site.out.shape[1:-1])
    inputs = 1 if site.kind == "embed" else site.weight[0]
    recorded += tokens * (inputs + site.weight[1])
  if may_probe and _is_used_once(sites):
    return Way.PROBE
  aligned = all(_orientation(site, sites) is not None for site in sites)
  return Way.RECORD if aligned and size > _KEEP_SHARE * recorded else Way.KEEP


def _num_slices(site: taps.Site) -> int:
  """L: how many slices of the parameter the site goes through."""
  return math.prod(
    length
    for scan, length in zip(site.scans, site.lengths, strict=True)
    if scan in site.view.scans
  )


def _is_used_once(sites: Sequence[taps.Site]) -> bool:
  """Whether every slice of a parameter is used by one operation, once."""
  (site, *others) = sites
  return not others and site.view.scans == site.scans


def _orientation(site: taps.Site, sites: Sequence[taps.Site]) -> bool | None:
  """True if the gradient is to be transposed to match the other uses'.

  None if it cannot be matched as a matrix.
  """
  steps = site.view.steps
  if all(other.view.steps == steps for other in sites):
    return False
  if len(site.view.shape) != 2 or steps not in ((), (("transpose", (1, 0)),)):
    return None
  return bool(steps)


def _with_units(site: taps.Site, rows_per_unit: int) -> taps.Site:
  """The site as a unit sees it, its rows among its tokens: [U, rows, ...]."""
  if rows_per_unit == 1:
    return site

  def split(x):
    shape = (x.shape[0] // rows_per_unit, rows_per_unit, *x.shape[1:])
    return jax.ShapeDtypeStruct(shape, x.dtype)

  return dataclasses.replace(site, x=split(site.x), out=split(site.out))


def _zero_stats(shape: tuple[int, ...]) -> Stats:
  """Stats of nothing."""
  zeros = jnp.zeros(shape)
  return Stats(squared=zeros, shrunk=zeros, spread=zeros, spread_shrunk=zeros)


def _door_key(leaf: int) -> tuple[taps.Path, int]:
  """Where a probe leaves the output by which its weights come in."""
  return (-1,), leaf  # No equation has this path.


def _to_slices(weights: jax.Array, slices: tuple[int, ...]) -> jax.Array:
  """From [*leading slices, U, 2] to [*slices, U, 2]."""
  *given, num_units, two = weights.shape
  missing = len(slices) - len(given)
  if missing < 0:
    checks.fail(
      "bounds for the slices that a scan takes of a parameter, at most",
      "Give the parameter one bound, or use engine VMAP.",
      bounds=tuple(given),
      slices=slices,
    )
  weights = weights.reshape(*given, *(1,) * missing, num_units, two)
  return jnp.broadcast_to(weights, (*slices, num_units, two))


# Operations under the three ways. Each is a custom VJP with an extra input
# whose cotangent carries out what the way needs. The forward pass never reads
# that input, so the zeros that stand for it cost nothing.


def _keep(site, weight, x, frame, num_units) -> jax.Array:
  """KEEP: the extra input is each unit's own copy of the weight."""

  @jax.custom_vjp
  def apply(weight, x, copies):
    del copies  # For its cotangent alone.
    return taps.plain(site.kind, weight, x)

  def forward(weight, x, copies):
    return apply(weight, x, copies), (weight, x)

  def backward(kept, g):
    weight, x = kept
    grads = _unit_grads(site, x, g, num_units)
    return None, _input_grad(site, weight, g), grads

  apply.defvjp(forward, backward)
  return apply(weight, x, frame.by_leaf[site.view.leaf])


def _record(site, weight, x, frame, num_units) -> jax.Array:
  """RECORD: the extra input's cotangent is the output's."""
  del num_units  # Units are told apart when the records are read.

  @jax.custom_vjp
  def apply(weight, x, tap):
    del tap  # For its cotangent alone.
    return taps.plain(site.kind, weight, x)

  def forward(weight, x, tap):
    return apply(weight, x, tap), weight

  def backward(weight, g):
    return None, _input_grad(site, weight, g), g

  apply.defvjp(forward, backward)
  frame.records[site.x_key] = jax.lax.stop_gradient(x)
  return apply(weight, x, frame.by_site[site.path])


def _probe(site, weight, x, frame, num_units) -> jax.Array:
  """PROBE: norms leave by one extra input, weights enter by one more output."""
  for dtype in (weight.dtype, site.out.dtype):
    if dtype != jnp.float32:
      # The two passes may round differently, and a bfloat16 rounding of one
      # part in 256 is not within the slack of the clip norm.
      checks.fail(
        f"engine GHOST to compute {site.name!r} in float32",
        "Use engine BOOKKEEPING, which has one backward pass.",
        dtype=str(dtype),
      )

  @jax.custom_vjp
  def apply(weight, x, probe):
    del probe  # For its cotangent alone.
    out = taps.plain(site.kind, weight, x)
    return out, jnp.zeros((num_units, 2))

  def forward(weight, x, probe):
    return apply(weight, x, probe), (weight, x)

  def backward(kept, cotangents):
    weight, x = kept
    g, weights = cotangents
    factor = _factor(site, x, g, num_units=num_units)
    is_short = factor.gram_cost < math.prod(factor.shape)
    stats = (_gram if is_short else _materialised_stats)([factor])
    grad = _product_sum(factor, weights)
    return grad.astype(weight.dtype), _input_grad(site, weight, g), stats

  apply.defvjp(forward, backward)
  leaf = site.view.leaf
  out, frame.records[_door_key(leaf)] = apply(weight, x, frame.by_leaf[leaf])
  return out


# A rule of `taps`, given the number of units.
_RULES: dict[Way, Callable[..., jax.Array]] = {
  Way.KEEP: _keep,
  Way.RECORD: _record,
  Way.PROBE: _probe,
}


def _input_grad(site, weight, g) -> jax.Array | None:
  """Cotangent of an operation's input; None for ids."""
  match site.kind:
    case "dense":
      return jnp.einsum("...o,io->...i", g, weight)
    case "embed":
      return None
    case "scale":
      return g * weight.reshape((1,) * (g.ndim - 1) + weight.shape)
    case "bias":
      return g
  raise AssertionError(f"No rule for {site.kind}; taps knows no other kinds.")


def _unit_grads(
  site: taps.Site, x: jax.Array, g: jax.Array, num_units: int
) -> jax.Array:
  """Gradient of each unit's own weight, f32[U, *slice]."""
  wide = g.astype(jnp.float32).reshape(num_units, -1, g.shape[-1])
  match site.kind:
    case "dense" | "embed":
      grads = _products(_factor(site, x, g, num_units=num_units))
    case "scale":
      grads = jnp.sum(x.astype(jnp.float32).reshape(wide.shape) * wide, axis=1)
    case "bias":
      grads = jnp.sum(wide, axis=1)
    case _:
      raise AssertionError(f"No rule for {site.kind}.")
  return site.view.undo(grads)


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["rows", "cols"],
  meta_fields=["shape"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Factor:
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


def _factor(
  site: taps.Site,
  x: jax.Array,
  g: jax.Array,
  *,
  num_units: int,
  transpose: bool = False,
) -> _Factor:
  """Flattens rows and tokens; x [B, ..., m] or ids [B, ...], g [B, ..., n]."""
  cols = g.reshape(num_units, -1, g.shape[-1])
  if site.kind == "embed":
    # As jnp.take reads them: negative ids count from the end.
    ids = x.reshape(num_units, -1).astype(jnp.int32)
    rows = jnp.where(ids < 0, ids + site.weight[0], ids)
  else:
    rows = x.reshape(num_units, -1, x.shape[-1])
  m, n = site.weight
  if transpose:
    return _Factor(rows=cols, cols=rows, shape=(n, m))
  return _Factor(rows=rows, cols=cols, shape=(m, n))


def _factors(sites, records, cotangents, num_units: int) -> list[_Factor]:
  """All uses of a recorded parameter, with leading axis L."""
  out = []
  for site in sites:
    is_ids = site.kind == "embed"
    x = site.by_slice(records[site.x_key], has_features=not is_ids)
    g = site.by_slice(cotangents[site.path])
    factor = functools.partial(
      _factor,
      site,
      num_units=num_units,
      transpose=bool(_orientation(site, sites)),
    )
    out.append(jax.vmap(factor)(x, g))
  return out


def _per_slice(fun: Callable[[Any], Any], stacked: Any) -> Any:
  """Maps over the leading axis, one at a time unless it has length 1."""
  if jax.tree.leaves(stacked)[0].shape[0] == 1:
    out = fun(jax.tree.map(lambda leaf: leaf[0], stacked))
    return jax.tree.map(lambda leaf: leaf[None], out)
  return jax.lax.map(fun, stacked)


def _kept_stats(kept: jax.Array, slices: tuple[int, ...]) -> Stats:
  """Stats of [*slices, U, *slice]."""
  axes = tuple(range(len(slices) + 1, kept.ndim))
  zeros = jnp.zeros(kept.shape[: len(slices) + 1])
  return Stats(
    squared=jnp.sum(jnp.square(kept), axis=axes),
    shrunk=jnp.sum(jnp.square(kept * SHRINK), axis=axes),
    spread=zeros,
    spread_shrunk=zeros,
  )


def _kept_sum(kept: jax.Array, weights: jax.Array) -> jax.Array:
  """Sum over units of [*slices, U, *slice] times weights [*slices, U, 2]."""
  shape = weights.shape[:-1] + (1,) * (kept.ndim - weights.ndim + 1)
  first, second = (weights[..., i].reshape(shape) for i in (0, 1))
  keep = _is_kept(weights).reshape(shape)
  # Select, do not multiply by zero: 0 * NaN is NaN.
  chosen = jnp.where(keep, kept * first * second, 0.0)
  return jnp.sum(chosen, axis=weights.ndim - 2)


def _recorded_sum(
  factors: list[_Factor], weights: jax.Array, sites: Sequence[taps.Site]
) -> jax.Array:
  """Weighted sum of a recorded parameter, [L, *slice]; see `_kept_sum`."""

  def one_slice(pair):
    uses, own = pair
    return sum(_product_sum(use, own) for use in uses)

  by_slice = weights.reshape(-1, *weights.shape[-2:])  # [L, U, 2]
  total = _per_slice(one_slice, (factors, by_slice))
  if any(_orientation(site, sites) for site in sites):
    return total  # Matched in the slice's own shape.
  return sites[0].view.undo(total)


def _gram(factors: list[_Factor]) -> Stats:
  """Stats by Gram forms of all pairs of uses, or by `_materialised_stats`."""
  row_norms = [_token_norms(factor.rows) for factor in factors]
  col_norms = [_token_norms(factor.cols) for factor in factors]
  squared = error = 0.0
  for i, one in enumerate(factors):
    for j, other in enumerate(factors[: i + 1]):
      times = 1.0 if i == j else 2.0
      p = _dots(one.rows, other.rows)  # [U, S, T]
      q = _dots(one.cols, other.cols)
      p_scale = row_norms[i][:, :, None] * row_norms[j][:, None, :]
      q_scale = col_norms[i][:, :, None] * col_norms[j][:, None, :]
      squared += times * jnp.sum(p * q, axis=(1, 2))
      error += times * jnp.sum(
        p_scale * jnp.abs(q) + q_scale * jnp.abs(p), axis=(1, 2)
      )
  error = ROUNDING * error
  spread = _spread(row_norms, col_norms)
  top_row = _over_uses(jnp.maximum, [_largest(use.rows) for use in factors])
  top_col = _over_uses(jnp.maximum, [_largest(use.cols) for use in factors])
  num_tokens = sum(use.cols.shape[1] for use in factors)
  ceiling = top_row * top_col * num_tokens * math.sqrt(math.prod(one.shape))
  is_tiny = ceiling <= _NEGLIGIBLE_NORM  # 0 among them.
  is_bad = ~(jnp.isfinite(top_row) & jnp.isfinite(top_col))
  is_good = (
    (jnp.minimum(top_row, top_col) >= _SMALLEST_ENTRY)
    & (jnp.maximum(top_row, top_col) <= _LARGEST_ENTRY)
    & (squared < _LARGEST_GRAM)
    & (error <= _MAX_GRAM_ERROR * squared)
  )
  squared = jnp.where(is_tiny, jnp.square(ceiling), squared + error)
  squared = jnp.where(is_bad, jnp.nan, squared)
  spread = jnp.where(is_tiny, 0.0, jnp.square(spread))
  by_gram = Stats(
    squared=squared,
    shrunk=squared * SHRINK * SHRINK,
    spread=spread,
    spread_shrunk=spread * SHRINK * SHRINK,
  )
  return jax.lax.cond(
    jnp.all(is_good | is_tiny | is_bad),
    lambda _: by_gram,
    _materialised_stats,
    factors,
  )


def _over_uses(fun: Any, values: list[jax.Array]) -> jax.Array:
  """Folds one value per use."""
  return functools.reduce(fun, values)


def _materialised_stats(factors: list[_Factor]) -> Stats:
  """Stats of the products themselves, a few examples at a time."""
  recorded = sum(x.size for x in jax.tree.leaves(factors))

  def one_example(uses):  # Leaves [T, ...].
    uses = jax.tree.map(lambda x: x[None], uses)
    grad = sum(_products(use)[0] for use in uses)
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


def _products(factor: _Factor) -> jax.Array:
  """The gradients themselves, f32[U, m, n]."""
  rows, cols = factor.rows, factor.cols
  if rows.ndim == 3 and cols.ndim == 3:
    return jnp.einsum("btm,btn->bmn", rows, cols, **_EXACT)
  if cols.ndim == 2:
    flipped = _Factor(rows=cols, cols=rows, shape=factor.shape[::-1])
    return jnp.swapaxes(_products(flipped), 1, 2)
  zeros = jnp.zeros((rows.shape[0], *factor.shape), jnp.float32)
  examples = jnp.arange(rows.shape[0])[:, None]
  return zeros.at[examples, rows].add(cols.astype(jnp.float32), mode="drop")


def _product_sum(factor: _Factor, weights: jax.Array) -> jax.Array:
  """Weighted sum over examples of the gradients, f32[m, n].

  Both factors of an example of weight 0 are selected away, since one of them
  may be infinite or NaN.
  """
  rows, cols = factor.rows, factor.cols
  if cols.ndim == 2:
    flipped = _Factor(rows=cols, cols=rows, shape=factor.shape[::-1])
    return _product_sum(flipped, weights).T
  keep = _is_kept(weights)[:, None, None]
  first, second = weights[:, :1, None], weights[:, 1:, None]  # [U, 1, 1]
  cols = jnp.where(keep, cols.astype(jnp.float32) * first * second, 0.0)
  if rows.ndim == 3:
    rows = jnp.where(keep, rows.astype(jnp.float32), 0.0)
    return jnp.einsum("btm,btn->mn", rows, cols, **_EXACT)
  zeros = jnp.zeros(factor.shape, jnp.float32)
  return zeros.at[rows].add(cols, mode="drop")


def _is_kept(weights: jax.Array) -> jax.Array:
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
