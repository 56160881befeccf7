"""A scan whose reverse pass keeps cotangents where residuals were.

Book-keeping keeps the cotangent of every operation's output until the clip
weights are known. Under `jax.lax.scan` these are stacked beside the residuals
of the forward pass, although a residual is of no use once its iteration was
reversed. Here the reverse loop carries the stacked residuals and, after the
last use of a slice, overwrites it with a cotangent of the same size, so that
keeping one takes no memory of its own: XLA updates a loop's carry in place.
Nothing else differs from `jax.lax.scan`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

PyTree = Any
Source = tuple[str, int]


def scan(
  body: Callable[..., tuple[PyTree, PyTree, PyTree]],
  consts: PyTree,
  carry: PyTree,
  xs: PyTree,
  taps: PyTree,
  *,
  length: int,
  reverse: bool,
  unroll: int | bool,
) -> tuple[PyTree, PyTree, PyTree]:
  """Like `jax.lax.scan`, for one reverse-mode derivative.

  Args:
    body: (consts, carry, x, tap) -> (carry, y, aux).
    consts: the same in every iteration; all that is differentiated must be an
      argument, the body may close over nothing of it.
    carry: as in `jax.lax.scan`.
    xs: leaves [length, ...], sliced.
    taps: leaves [length, ...], sliced, floating point. Their cotangents are
      what takes the place of residuals.
    length: number of iterations.
    reverse: as in `jax.lax.scan`.
    unroll: as in `jax.lax.scan`.

  Returns:
    The last carry, the stacked ys, and the stacked aux, through which no
    gradient flows.
  """
  groups, structures = zip(
    *(jax.tree.flatten(part) for part in (consts, carry, xs, taps)),
    strict=True,
  )
  out_structures: list[Any] = []

  def flat_body(*groups):
    parts = (s.unflatten(g) for s, g in zip(structures, groups, strict=True))
    leaves, out_structures[:] = zip(
      *(jax.tree.flatten(part) for part in body(*parts)), strict=True
    )
    return leaves

  loop = _Loop(body=flat_body, length=length, reverse=reverse, unroll=unroll)
  outs = loop.run(groups)
  return tuple(
    s.unflatten(leaves) for s, leaves in zip(out_structures, outs, strict=True)
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Loop:
  """One scan over flat lists of arrays.

  Attributes:
    body: (consts, carry, x, tap) -> (carry, y, aux), lists all of them.
    length: number of iterations.
    reverse: whether the forward pass begins at the end.
    unroll: iterations per turn of the compiled loop.
  """

  body: Callable[..., Sequence[list[Any]]]
  length: int
  reverse: bool
  unroll: int | bool

  def run(self, groups: Sequence[list[Any]]) -> Sequence[list[Any]]:
    """Returns the last carry, ys and aux."""

    @jax.custom_vjp
    def scanned(consts, carry, xs, taps):
      def one(carry, slices):
        carry, *rest = self.body(consts, carry, *slices)
        return carry, rest

      carry, rest = self._scan(one, carry, (xs, taps), self.reverse)
      return carry, *rest

    scanned.defvjp(self._forward, self._backward, symbolic_zeros=True)
    return scanned(*groups)

  def _scan(self, one: Any, carry: Any, slices: Any, reverse: bool) -> Any:
    """`jax.lax.scan` over all iterations."""
    return jax.lax.scan(
      one,
      carry,
      slices,
      length=self.length,
      reverse=reverse,
      unroll=self.unroll,
    )

  def _forward(self, *primals: list[Any]) -> tuple[Any, "_Residuals"]:
    """Runs the loop and stacks what one iteration's pullback needs."""
    consts, carry, xs, taps = ([p.value for p in group] for group in primals)
    masks = [
      tuple(p.perturbed and _is_float(p.value) for p in group)
      for group in primals
    ]
    # What is carried may depend on anything that is differentiated.
    masks[1] = tuple(map(_is_float, carry))
    found: list[Any] = []

    def one(carry, slices):
      args = (consts, carry, *slices)

      def fun(*chosen):
        carry, y, aux = self.body(*map(_merge, chosen, args, masks))
        return (_floats(carry), _floats(y)), (carry, y, aux)

      _, pullback, (carry, y, aux) = jax.vjp(
        fun, *map(_pick, args, masks), has_aux=True
      )
      leaves, treedef = jax.tree.flatten(pullback)
      # A residual that is kept elsewhere anyway is not kept again.
      places = {
        id(leaf): (name, i)
        for name, part in (
          ("consts", consts),
          ("xs", slices[0]),
          ("ys", y),
          ("aux", aux),
        )
        for i, leaf in enumerate(part)
      }
      own = []
      for leaf in leaves:
        if id(leaf) not in places:
          places[id(leaf)] = ("own", len(own))
          own.append(leaf)
      found[:] = [treedef, tuple(places[id(leaf)] for leaf in leaves)]
      return carry, (y, aux, own)

    carry, (ys, aux, own) = self._scan(one, carry, (xs, taps), self.reverse)
    treedef, sources = found
    arrays = {"consts": consts, "xs": xs, "ys": ys, "aux": aux, "own": own}
    residuals = _Residuals(
      stored={(name, i): arrays[name][i] for name, i in sources},
      treedef=treedef,
      sources=sources,
      masks=tuple(masks),
      consts=tuple(map(_shape, _pick(consts, masks[0]))),
      xs=tuple(map(_shape, _pick(xs, masks[2]))),
      taps=tuple(map(_shape, taps)),
      slots=_slots(taps, own),
    )
    return (carry, ys, aux), residuals

  def _backward(self, residuals: "_Residuals", cotangents: Any) -> Any:
    """Runs the loop in reverse."""
    ct_carry, ct_ys, _ = cotangents
    ct_ys = _floats(ct_ys)
    slots = dict(residuals.slots)
    unplaced = [i for i in range(len(residuals.taps)) if i not in slots]
    fixed, sliced, whole = residuals.parts()
    # Not outputs of the scan: XLA would fill their stacks with zeros first,
    # as it does not see that a loop that runs backwards writes all of them.
    stacks = [
      jax.lax.empty(x.shape, x.dtype)
      for x in (*residuals.xs, *(residuals.taps[i] for i in unplaced))
    ]

    def one(state, slices):
      ct_carry, ct_consts, whole, stacks = state
      number, sliced, given = slices
      read, after = _read(whole, number, self.length)
      values = fixed | sliced | read
      pullback = residuals.treedef.unflatten(
        [values[source] for source in residuals.sources]
      )
      ct_y = [
        given.get(i, jnp.zeros(ct.shape[1:], ct.dtype))
        for i, ct in enumerate(ct_ys)
      ]
      more, ct_carry, ct_x, ct_tap = pullback((ct_carry, ct_y))
      ct_consts = [a + b for a, b in zip(ct_consts, more, strict=True)]
      for i, source in slots.items():
        stack = whole[source]
        whole[source] = jax.lax.dynamic_update_index_in_dim(
          stack, ct_tap[i].reshape(stack.shape[1:]), after, 0
        )
      stacks = [
        jax.lax.dynamic_update_index_in_dim(stack, ct, number, 0)
        for stack, ct in zip(
          stacks, (*ct_x, *(ct_tap[i] for i in unplaced)), strict=True
        )
      ]
      return (ct_carry, ct_consts, whole, stacks), None

    zeros = [jnp.zeros(x.shape, x.dtype) for x in residuals.consts]
    ct_carry = [_instantiated(ct) for ct in _floats(ct_carry)]
    given = {i: ct for i, ct in enumerate(ct_ys) if not _is_zero(ct)}
    (ct_carry, ct_consts, whole, stacks), _ = self._scan(
      one,
      (ct_carry, zeros, whole, stacks),
      (jnp.arange(self.length), sliced, given),
      not self.reverse,
    )
    ct_xs, rest = stacks[: len(residuals.xs)], stacks[len(residuals.xs) :]
    unused = iter(rest)
    ct_taps = [
      whole[slots[i]].reshape(tap.shape) if i in slots else next(unused)
      for i, tap in enumerate(residuals.taps)
    ]
    none = [[None] * len(mask) for mask in residuals.masks]
    found = (ct_consts, ct_carry, ct_xs, ct_taps)
    return tuple(map(_merge, found, none, residuals.masks))


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["stored"],
  meta_fields=[
    "treedef",
    "sources",
    "masks",
    "consts",
    "xs",
    "taps",
    "slots",
  ],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Residuals:
  """What the reverse pass reads.

  Attributes:
    stored: arrays by source, which is where one was found and its number there.
    treedef: of one iteration's pullback.
    sources: of the pullback's leaves.
    masks: which consts, carries, xs and taps have a cotangent.
    consts: shapes of the consts that have one.
    xs: shapes of the xs that have one.
    taps: shapes of the taps.
    slots: (tap, source): whose cotangent takes which residual's place.
  """

  stored: dict[Source, Any]
  treedef: Any
  sources: tuple[Source, ...]
  masks: tuple[tuple[bool, ...], ...]
  consts: tuple[jax.ShapeDtypeStruct, ...]
  xs: tuple[jax.ShapeDtypeStruct, ...]
  taps: tuple[jax.ShapeDtypeStruct, ...]
  slots: tuple[tuple[int, Source], ...]

  def parts(self) -> tuple[dict[Source, Any], ...]:
    """What is the same in every iteration, what is sliced, what is reused."""
    fixed, sliced, whole = {}, {}, {}
    reused = {source for _, source in self.slots}
    for source, value in self.stored.items():
      part = whole if source in reused else sliced
      if source[0] == "consts":
        part = fixed
      part[source] = value
    return fixed, sliced, whole


def _slots(
  taps: Sequence[Any], own: Sequence[Any]
) -> tuple[tuple[int, Source], ...]:
  """A residual of the same size for each tap, as far as there are some."""
  free = dict(enumerate(own))
  slots = {}
  for exact in (True, False):  # The same shape needs no other layout.
    for i, tap in enumerate(taps):
      fits = [
        number
        for number, residual in free.items()
        if residual.dtype == tap.dtype
        and (
          residual.shape == tap.shape
          if exact
          else math.prod(residual.shape) == math.prod(tap.shape)
        )
      ]
      if i not in slots and fits:
        slots[i] = ("own", fits[0])
        del free[fits[0]]
  return tuple(slots.items())


def _read(
  whole: Mapping[Source, Any], number: jax.Array, length: int
) -> tuple[dict[Source, Any], jax.Array]:
  """One slice of each stack, and the number once all of them are read.

  XLA overwrites a stack in place if it knows that no read comes later. It does
  not fuse across a conditional, and cannot see that this one is always true.
  """

  def slices(whole):
    return {
      source: jax.lax.dynamic_index_in_dim(stack, number, keepdims=False)
      for source, stack in whole.items()
    }, number

  def never(whole):
    return {
      source: jnp.zeros(stack.shape[1:], stack.dtype)
      for source, stack in whole.items()
    }, number + 1

  return jax.lax.cond(number < length, slices, never, whole)


def _is_float(x: Any) -> bool:
  """Whether gradients flow through it."""
  return jnp.issubdtype(x.dtype, jnp.floating)


def _floats(leaves: Sequence[Any]) -> list[Any]:
  """Those through which gradients flow."""
  return [leaf for leaf in leaves if _is_float(leaf)]


def _is_zero(cotangent: Any) -> bool:
  """Whether nothing depends on the output."""
  return isinstance(cotangent, SymbolicZero)


def _instantiated(cotangent: Any) -> jax.Array:
  """The cotangent as an array."""
  if _is_zero(cotangent):
    return jnp.zeros(cotangent.shape, cotangent.dtype)
  return cotangent


def _shape(x: Any) -> jax.ShapeDtypeStruct:
  """Shape and dtype alone."""
  return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _pick(leaves: Sequence[Any], mask: Sequence[bool]) -> list[Any]:
  """The leaves where the mask is True."""
  return [leaf for leaf, chosen in zip(leaves, mask, strict=True) if chosen]


def _merge(
  chosen: Sequence[Any], leaves: Sequence[Any], mask: Sequence[bool]
) -> list[Any]:
  """The leaves, those where the mask is True replaced by `chosen`."""
  rest = iter(chosen)
  return [
    next(rest) if is_chosen else leaf
    for leaf, is_chosen in zip(leaves, mask, strict=True)
  ]
