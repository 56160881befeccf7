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
m n = T (m + n). A standardised weight is always kept: its gradient is that of
the matrix that multiplies, pulled back through the standardisation, which is no
outer product any more.

In bfloat16 a gradient of one use is kept in bfloat16, as the plain backward
pass has it, and its norm is that of what was kept, so that norm and sum agree.
It is kept where it takes up to 1.4 times the memory of the record: it saves a
product of every weight, which is a quarter of a rematerialised step. On a mesh
(`sharding.layout`) all sizes are those of one device.

| edge case | result |
| --- | --- |
| NaN or infinity in an example | NaN in its own `Stats`; in no sum |
| an example of weight 0 | selected away before any product |
| a parameter that the loss does not use | norm 0, sum 0 |
| squares beyond float32 | `outer_products.Stats.shrunk`, in units of 2^80 |

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

from ppnet.core import checks, param_ops
from ppnet.privacy import outer_products, taps
from ppnet.sharding import layout

PyTree = Any

# See the module's docstring.
_KEEP_SHARE = 0.4
_KEEP_SHARE_LOW = 1.4
_FEW_UNITS = 4  # On a device.


class Way(enum.Enum):
  """How one parameter's norms and sum are computed."""

  KEEP = "keep"
  RECORD = "record"
  PROBE = "probe"


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
  stats: list[outer_products.Stats]
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
  by_leaf = {
    leaf: _extra_input(ways[leaf], sites, leaves[leaf], num_units)
    for leaf, sites in uses.items()
    if ways[leaf] is not Way.RECORD
  }
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
      # A second pullback would need the residuals again.
      reuses_memory=not probed,
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
  stats = [outer_products.zero_stats((num_units,)) for _ in leaves]
  kept: dict[int, jax.Array] = {}
  for leaf, value in from_leaf.items():
    if ways[leaf] is Way.KEEP:
      kept[leaf] = _laid_out(value, leaf, slices[leaf])
      value = _kept_stats(kept[leaf], slices[leaf])
    stats[leaf] = value
  for leaf, factors in factors_of.items():
    stats[leaf] = jax.tree.map(
      lambda x, leaf=leaf: x.reshape(*slices[leaf], num_units),
      _per_slice(outer_products.gram_stats, factors),
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
      elif i in kept:
        grad = _kept_sum(kept[i], full[i], i)
      else:
        grad = jnp.zeros(leaf.shape)
      out.append(layout.grad(grad.reshape(leaf.shape).astype(jnp.float32), i))
    return structure.unflatten(out)

  return PerExample(
    losses=losses, aux=aux, stats=stats, weighted_sum=weighted_sum
  )


def _extra_input(
  way: Way, sites: Sequence[taps.Site], leaf: jax.Array, num_units: int
) -> Any:
  """Zeros whose cotangents bring out what KEEP or PROBE is to know."""
  num_slices = len(sites[0].view.scans)
  slices, rest = leaf.shape[:num_slices], leaf.shape[num_slices:]
  if way is Way.PROBE:
    return outer_products.zero_stats((*slices, num_units))
  copies = jnp.zeros((*slices, num_units, *rest), kept_dtype(sites))
  return layout.unit_grads(copies, sites[0].view.leaf, len(rest))


def choose_way(sites: Sequence[taps.Site], *, may_probe: bool) -> Way:
  """The way of one parameter, by local shapes; see the module's docstring."""
  is_matrix = all(site.kind in ("dense", "embed") for site in sites)
  if not is_matrix:
    # Vectors: [U, n] is less than any record. A standardised weight: its
    # gradient is no sum of outer products.
    return Way.KEEP
  if may_probe and _is_used_once(sites):
    return Way.PROBE
  aligned = all(_orientation(site, sites) is not None for site in sites)
  is_low = kept_dtype(sites) != jnp.float32
  share = _KEEP_SHARE_LOW if is_low else _KEEP_SHARE
  is_larger = _local_size(sites[0]) > share * sum(map(_local_record, sites))
  return Way.RECORD if aligned and is_larger else Way.KEEP


def kept_dtype(sites: Sequence[taps.Site]) -> Any:
  """In which dtype each unit's gradient of one parameter is kept.

  Uses are added up in float32, and float16 would overflow.
  """
  is_low = all(
    site.kind == "dense" and site.x.dtype == site.out.dtype == jnp.bfloat16
    for site in sites
  )
  return jnp.bfloat16 if is_low and _is_used_once(sites) else jnp.float32


def _local_size(site: taps.Site) -> float:
  """Entries of a slice of the parameter, on one device."""
  shape = site.view.shape
  parts = math.prod(layout.ways(site.view.leaf, len(shape)))
  return math.prod(shape) / parts


def _local_record(site: taps.Site) -> float:
  """Entries that a use leaves for each unit and slice, on one device."""
  again = math.prod(site.lengths) // _num_slices(site)
  tokens = again * math.prod(site.out.shape[1:-1])
  inputs = 1 if site.kind == "embed" else site.weight[0]
  parts = (1, 1)
  if not site.view.steps and len(site.view.shape) == 2:
    parts = layout.ways(site.view.leaf, 2)
  return tokens * (inputs / parts[0] + site.weight[1] / parts[1])


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
  copies = frame.by_leaf[site.view.leaf]
  dtype = copies.dtype

  @jax.custom_vjp
  def apply(weight, x, copies):
    del copies  # For its cotangent alone.
    return taps.plain(site.kind, weight, x)

  def forward(weight, x, copies):
    return apply(weight, x, copies), (weight, x)

  def backward(kept, g):
    weight, x = kept
    grads = _unit_grads(site, weight, x, g, num_units)
    if dtype == jnp.bfloat16:
      # XLA may leave out a cast to bfloat16 and back, for one reader and not
      # for another; this it may not.
      grads = jax.lax.reduce_precision(grads, exponent_bits=8, mantissa_bits=7)
    grads = layout.unit_grads(
      grads.astype(dtype), site.view.leaf, grads.ndim - 1
    )
    return None, _input_grad(site, weight, g), grads

  apply.defvjp(forward, backward)
  return apply(weight, x, copies)


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
  # A scan that reuses memory knows the input by its identity.
  kept = x if frame.reuses_memory else jax.lax.stop_gradient(x)
  frame.records[site.x_key] = kept
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
    stats = (
      outer_products.gram_stats if is_short else outer_products.product_stats
    )([factor])
    grad = outer_products.weighted_sum(factor, weights)
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
    case "standardised_dense":
      matrix = param_ops.standardised(weight)
      return jnp.einsum("...o,io->...i", g, matrix)
    case "embed":
      return None
    case "scale":
      return g * weight.reshape((1,) * (g.ndim - 1) + weight.shape)
    case "bias":
      return g
  raise AssertionError(f"No rule for {site.kind}; taps knows no other kinds.")


def _unit_grads(
  site: taps.Site,
  weight: jax.Array,
  x: jax.Array,
  g: jax.Array,
  num_units: int,
) -> jax.Array:
  """Gradient of each unit's own weight, f32[U, *slice]."""
  wide = g.astype(jnp.float32).reshape(num_units, -1, g.shape[-1])
  match site.kind:
    case "dense" | "embed":
      grads = outer_products.products(_factor(site, x, g, num_units=num_units))
    case "standardised_dense":
      # Of the matrix that multiplies; the parameter is what it is made of.
      grads = outer_products.products(_factor(site, x, g, num_units=num_units))
      wide = weight.astype(jnp.float32)
      _, pullback = jax.vjp(param_ops.standardised, wide)
      (grads,) = jax.vmap(pullback)(grads)
    case "scale":
      grads = jnp.sum(x.astype(jnp.float32).reshape(wide.shape) * wide, axis=1)
    case "bias":
      grads = jnp.sum(wide, axis=1)
    case _:
      raise AssertionError(f"No rule for {site.kind}.")
  return site.view.undo(grads)


def _factor(
  site: taps.Site,
  x: jax.Array,
  g: jax.Array,
  *,
  num_units: int,
  transpose: bool = False,
) -> outer_products.Factor:
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
    return outer_products.Factor(rows=cols, cols=rows, shape=(n, m))
  return outer_products.Factor(rows=rows, cols=cols, shape=(m, n))


def _factors(
  sites, records, cotangents, num_units: int
) -> list[outer_products.Factor]:
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


def _laid_out(kept: jax.Array, leaf: int, slices: tuple[int, ...]) -> jax.Array:
  """[*slices, U, *slice], each unit where its rows are."""
  return layout.unit_grads(kept, leaf, kept.ndim - len(slices) - 1)


def _kept_stats(
  kept: jax.Array, slices: tuple[int, ...]
) -> outer_products.Stats:
  """outer_products.Stats of [*slices, U, *slice]."""
  axis = len(slices)

  def squares(kept):  # [*slices, N, *slice]
    axes = tuple(range(axis + 1, kept.ndim))
    kept = kept.astype(jnp.float32)
    shrunk = kept * outer_products.SHRINK
    return [jnp.sum(jnp.square(x), axis=axes) for x in (kept, shrunk)]

  parts = [squares(part) for part in _few(kept, axis)]
  squared, shrunk = (
    jnp.stack(each, -1).reshape(kept.shape[: axis + 1])
    for each in zip(*parts, strict=True)
  )
  zeros = jnp.zeros_like(squared)
  return outer_products.Stats(
    squared=squared, shrunk=shrunk, spread=zeros, spread_shrunk=zeros
  )


def _kept_sum(kept: jax.Array, weights: jax.Array, leaf: int) -> jax.Array:
  """Sum over units of [*slices, U, *slice] times weights [*slices, U, 2]."""
  num_slices = weights.ndim - 2

  def weighted(kept, weights):  # [..., N, *slice], [..., N, 2]
    shape = weights.shape[:-1] + (1,) * (kept.ndim - weights.ndim + 1)
    first, second = (weights[..., i].reshape(shape) for i in (0, 1))
    keep = outer_products.is_kept(weights).reshape(shape)
    # Select, do not multiply by zero: 0 * NaN is NaN.
    return jnp.where(keep, kept.astype(jnp.float32) * first * second, 0.0)

  def total(pair):  # [..., U, *slice], [..., U, 2]
    axis = pair[1].ndim - 2
    parts = zip(*(_few(each, axis) for each in pair), strict=True)
    chosen = sum(weighted(*part) for part in parts)
    return layout.grad(jnp.sum(chosen, axis=axis), leaf)

  if not num_slices or not layout.is_spread():
    return total((kept, weights))
  # Slice by slice: devices reduce a whole slice each before it is divided.
  flat = jax.tree.map(
    lambda x: x.reshape(-1, *x.shape[num_slices:]), (kept, weights)
  )
  return jax.lax.map(total, flat)


def _few(value: jax.Array, axis: int) -> list[jax.Array]:
  """An axis of units, one of each device at a time where these are few.

  XLA reduces along a short leading axis, or for each entry of it, at a half to
  a third of the speed at which it goes through the entries one by one.
  """
  by_device = layout.by_device(value, axis)
  num_each = by_device.shape[axis + 1]
  if num_each > _FEW_UNITS:
    return [value]
  return [
    jax.lax.index_in_dim(by_device, i, axis + 1, keepdims=False)
    for i in range(num_each)
  ]


def _recorded_sum(
  factors: list[outer_products.Factor],
  weights: jax.Array,
  sites: Sequence[taps.Site],
) -> jax.Array:
  """Weighted sum of a recorded parameter, [L, *slice]; see `_kept_sum`."""

  def one_slice(pair):
    uses, own = pair
    return sum(outer_products.weighted_sum(use, own) for use in uses)

  by_slice = weights.reshape(-1, *weights.shape[-2:])  # [L, U, 2]
  total = _per_slice(one_slice, (factors, by_slice))
  if any(_orientation(site, sites) for site in sites):
    return total  # Matched in the slice's own shape.
  return sites[0].view.undo(total)
