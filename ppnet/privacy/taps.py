"""Where a loss touches its parameters: found in its jaxpr, and tapped there.

An engine that never forms all per-example gradients needs, for each
parametrised operation, its input and the cotangent of its output. `MARKING` is
an implementation of `core.param_ops` that leaves one recognisable equation per
operation. `trace` follows every parameter from the arguments of the loss to
those equations, through scans, rematerialisation and calls, and `Program.run`
evaluates the same program with each equation replaced by a rule, whose extra
inputs and outputs are threaded through the loops. The model needs no second
form, no variables of its own and nothing from Flax.

*Formal guarantee.* A parameter influences the loss through the operations of
`Program.sites` alone. Anything else that a parameter enters (a plain product, a
`cond`, a custom derivative) raises and names the parameter. The one exception
is `stop_gradient`, after which no gradient flows. Every operation's input has
the batch as its leading axis, which is checked by tracing a batch with one
example more; that row i of it belongs to example i is the caller's promise.

Letters: B batch, L iterations of scans, m x n the weight of an operation.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.extend.core as jex_core
import jax.numpy as jnp

from ppnet.core import checks, param_ops
from ppnet.privacy import reusing_scan

PyTree = Any
Path = tuple[int, ...]  # Numbers of the equations that lead to one.

# By name, as they print: JAX exports no stable objects for all of them.
_CALLS = ("jit", "pjit", "closed_call")
_REMATS = ("checkpoint", "remat", "remat2")
_RENAMES = ("convert_element_type", "copy", "copy_p", "sharding_constraint")
_RESHAPES = ("reshape", "squeeze", "expand_dims")


def plain(kind: str, weight: jax.Array, x: jax.Array) -> jax.Array:
  """The operation itself; x holds ids for "embed"."""
  return getattr(param_ops.PLAIN, kind)(kind, weight, x)


_param_op = jex_core.Primitive("param_op")


@_param_op.def_impl
def _impl(weight, x, *, kind, name):
  del name  # For messages.
  return plain(kind, weight, x)


@_param_op.def_abstract_eval
def _abstract_eval(weight, x, *, kind, name):
  del name  # For messages.
  out = jax.eval_shape(
    functools.partial(plain, kind),
    jax.ShapeDtypeStruct(weight.shape, weight.dtype),
    jax.ShapeDtypeStruct(x.shape, x.dtype),
  )
  return jax.core.ShapedArray(out.shape, out.dtype)


class MarkingOps:
  """`core.param_ops.ParamOps` whose operations can be found in a jaxpr."""

  def dense(self, name, weight, x):
    """See `ParamOps.dense`."""
    return _param_op.bind(weight, x, kind="dense", name=name)

  def embed(self, name, table, ids):
    """See `ParamOps.embed`."""
    return _param_op.bind(table, ids, kind="embed", name=name)

  def scale(self, name, weight, x):
    """See `ParamOps.scale`."""
    return _param_op.bind(weight, x, kind="scale", name=name)

  def bias(self, name, weight, x):
    """See `ParamOps.bias`."""
    return _param_op.bind(weight, x, kind="bias", name=name)

  def standardised_dense(self, name, weight, x):
    """See `ParamOps.standardised_dense`."""
    return _param_op.bind(weight, x, kind="standardised_dense", name=name)

  def conv(self, name, weight, x, stride, *, is_standardised=False):
    """See `ParamOps.conv`: a product with each receptive field."""
    product = self.standardised_dense if is_standardised else self.dense
    return product(name, *param_ops.conv_factors(weight, x, stride))


MARKING = MarkingOps()


@dataclasses.dataclass(frozen=True, kw_only=True)
class View:
  """A parameter, or a part of it, under another shape or dtype.

  Attributes:
    leaf: number of the parameter in the flattened tree.
    scans: the scans that sliced it, outermost first; each takes an axis.
    shape: of the slice.
    steps: what was done to the slice, each either ("transpose", permutation)
      or ("reshape", shape before).
  """

  leaf: int
  scans: tuple[Path, ...]
  shape: tuple[int, ...]
  steps: tuple[tuple[str, tuple[int, ...]], ...] = ()

  def undo(self, grad: jax.Array) -> jax.Array:
    """Brings [B, *viewed shape] back to [B, *shape]."""
    for kind, what in reversed(self.steps):
      if kind == "reshape":
        grad = grad.reshape(grad.shape[0], *what)
      else:
        inverse = [what.index(axis) + 1 for axis in range(len(what))]
        grad = jnp.transpose(grad, (0, *inverse))
    return grad


@dataclasses.dataclass(frozen=True, kw_only=True)
class Site:
  """One operation on one parameter.

  Attributes:
    path: of its equation.
    kind: "dense", "standardised_dense", "embed", "scale" or "bias".
    name: what the model calls the parameter.
    view: the parameter as the operation sees it.
    scans: the scans around it, outermost first.
    lengths: their iterations.
    weight: shape of the weight, m x n or n.
    x: shape and dtype of the input, [B, ...].
    out: shape and dtype of the output, [B, ...].
    x_key: the same for operations that share their input.
  """

  path: Path
  kind: str
  name: str
  view: View
  scans: tuple[Path, ...]
  lengths: tuple[int, ...]
  weight: tuple[int, ...]
  x: jax.ShapeDtypeStruct
  out: jax.ShapeDtypeStruct
  x_key: tuple[Path, int]

  def by_slice(
    self, value: jax.Array, *, has_features: bool = True
  ) -> jax.Array:
    """From [*lengths, B, ..., (features)] to [L, B, tokens, (features)].

    L runs over the scans that slice the weight. Those around them that do not
    use the same weight again, as further tokens do.
    """
    depth = len(self.lengths)
    slicing = [i for i in range(depth) if self.scans[i] in self.view.scans]
    repeats = [i for i in range(depth) if i not in slicing]
    rest = range(depth + 1, value.ndim)
    features = value.shape[-1:] if has_features else ()
    value = jnp.transpose(value, (*slicing, depth, *repeats, *rest))
    count = math.prod(self.lengths[i] for i in slicing)
    return value.reshape(count, self.x.shape[0], -1, *features)


# Extra inputs of the rules are pytrees; a rule is
# (site, weight, x, frame) -> out, and may write to the frame.
Rule = Callable[[Site, jax.Array, jax.Array, "Frame"], jax.Array]


@dataclasses.dataclass(kw_only=True)
class Frame:
  """What a rule reads and writes; one per loop body.

  Attributes:
    rule: called for each site.
    by_leaf: inputs [*slices, ...] by parameter, sliced along with it.
    by_site: inputs [*lengths, ...] by path, sliced by every scan.
    records: outputs by `Site.x_key`, stacked by every scan.
    reuses_memory: whether scans keep the cotangents of `by_site` where
      residuals were; for a pullback that is called once.
  """

  rule: Rule
  by_leaf: Mapping[int, Any]
  by_site: Mapping[Path, Any]
  reuses_memory: bool
  records: dict[Any, jax.Array] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
  """A traced loss function.

  Attributes:
    sites: every operation on a parameter.
    num_rows: B.
    closed: the jaxpr; its inputs are the leaves of (params, batch).
    out_tree: structure of its outputs.
  """

  sites: tuple[Site, ...]
  num_rows: int
  closed: jex_core.ClosedJaxpr
  out_tree: Any

  @functools.cached_property
  def site_at(self) -> dict[Path, Site]:
    """Sites by path."""
    return {site.path: site for site in self.sites}

  def is_rematerialised(self, site: Site) -> bool:
    """Whether what the site computes is dropped and computed again."""
    jaxpr = self.closed.jaxpr
    for number in site.path[:-1]:
      eqn = jaxpr.eqns[number]
      if eqn.primitive.name in _REMATS:
        return True
      jaxpr, _ = _open(eqn.params["jaxpr"])
    return False

  def run(self, params: PyTree, batch: PyTree, frame: Frame) -> Any:
    """Evaluates the loss, calling `frame.rule` at every site."""
    args = jax.tree.leaves((params, batch))
    outs = _evaluate(
      self.closed.jaxpr, self.closed.consts, args, (), self, frame
    )
    return jax.tree.unflatten(self.out_tree, outs)


def trace(
  fun: Callable[[PyTree, PyTree], Any], params: PyTree, batch: PyTree
) -> Program:
  """Traces `fun(params, batch)`, a loss that uses `MARKING`.

  Raises:
    ValueError: a parameter has an influence that no site explains, or an
      operation whose input does not begin with the batch axis.
  """
  num_rows = jax.tree.leaves(batch)[0].shape[0]
  program = _trace(fun, params, batch)
  more = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(
      (num_rows + 1, *leaf.shape[1:]), leaf.dtype
    ),
    batch,
  )
  # A weight applied to [T, D] with T = B would pass a look at its shape alone.
  for site, other in zip(
    program.sites, _trace(fun, params, more).sites, strict=True
  ):
    if (site.x.shape[:1], other.x.shape[:1]) != ((num_rows,), (num_rows + 1,)):
      checks.fail(
        f"the input of {site.kind} on {site.name!r} to have the batch as its"
        " leading axis",
        "Use engine VMAP for this model.",
        shape=site.x.shape,
        batch_size=num_rows,
      )
  return program


def _trace(fun: Any, params: PyTree, batch: PyTree) -> Program:
  """`trace` without the check of the batch axis."""
  closed, out_shape = jax.make_jaxpr(fun, return_shape=True)(params, batch)
  with_paths, _ = jax.tree_util.tree_flatten_with_path(params)
  names = [jax.tree_util.keystr(path) for path, _ in with_paths]
  views: list[View | None] = [
    View(leaf=i, scans=(), shape=leaf.shape)
    for i, (_, leaf) in enumerate(with_paths)
  ]
  views += [None] * len(jax.tree.leaves(batch))
  finder = _Finder(names=names)
  outs = finder.visit(closed.jaxpr, views, (), (), ())
  for view in outs:
    if view is not None:
      finder.refuse(view, "the loss function's result")
  return Program(
    sites=tuple(finder.sites),
    num_rows=jax.tree.leaves(batch)[0].shape[0],
    closed=closed,
    out_tree=jax.tree.structure(out_shape),
  )


@dataclasses.dataclass(kw_only=True)
class _Finder:
  """Follows parameters through a jaxpr and collects the sites."""

  names: list[str]
  sites: list[Site] = dataclasses.field(default_factory=list)

  def refuse(self, view: View, where: str) -> None:
    """Raises: a parameter goes where no rule sees it."""
    checks.fail(
      "every parameter to be used through core.param_ops alone",
      "Give its operation a rule there, or use engine VMAP.",
      parameter=self.names[view.leaf],
      used_by=where,
    )

  def visit(
    self,
    jaxpr: jex_core.Jaxpr,
    views: list[View | None],
    path: Path,
    scans: tuple[Path, ...],
    lengths: tuple[int, ...],
  ) -> list[View | None]:
    """Returns the views among the results."""
    env = dict(zip(jaxpr.invars, views, strict=True))
    for number, eqn in enumerate(jaxpr.eqns):
      ins = [
        None if isinstance(v, jex_core.Literal) else env.get(v)
        for v in eqn.invars
      ]
      here = (*path, number)
      name = eqn.primitive.name
      outs: list[View | None] = [None] * len(eqn.outvars)
      if eqn.primitive is _param_op:
        self._visit_op(eqn, ins, here, scans, lengths)
      elif not _has_ops(eqn) and all(view is None for view in ins):
        continue
      elif name in _CALLS or name in _REMATS:
        inner, _ = _open(eqn.params["jaxpr"])
        outs = self.visit(inner, ins, here, scans, lengths)
      elif name == "scan":
        self._visit_scan(eqn, ins, here, scans, lengths)
      elif _has_ops(eqn):
        checks.fail(
          "parametrised operations under jit, scan and checkpoint alone",
          "Use engine VMAP for this model.",
          operations=sorted(_op_names(eqn)),
          inside=name,
        )
      elif name != "stop_gradient":
        outs = [self._step(ins[0], eqn)] if len(ins) == 1 else outs
        for view in ins:
          if view is not None and outs[0] is None:
            self.refuse(view, name)
      env.update(zip(eqn.outvars, outs, strict=True))
    return [
      None if isinstance(v, jex_core.Literal) else env.get(v)
      for v in jaxpr.outvars
    ]

  def _step(self, view: View | None, eqn: Any) -> View | None:
    """The view after an equation that keeps every entry, or None."""
    name = eqn.primitive.name
    if view is None or name in _RENAMES:
      return view
    if name == "transpose":
      step = ("transpose", tuple(eqn.params["permutation"]))
    elif name in _RESHAPES:
      step = ("reshape", tuple(eqn.invars[0].aval.shape))
    else:
      return None
    return dataclasses.replace(view, steps=(*view.steps, step))

  def _visit_scan(self, eqn, ins, here, scans, lengths) -> None:
    """Slices what is scanned; a parameter may not be carried or returned."""
    num_consts, first_x = _scan_parts(eqn)
    inner, _ = _open(eqn.params["jaxpr"])
    views = []
    for i, view in enumerate(ins):
      if view is not None and i >= num_consts:
        if i < first_x:
          self.refuse(view, "the carry of a scan")
        if view.steps:
          self.refuse(view, "a scan, after it was reshaped")
        view = dataclasses.replace(
          view, scans=(*view.scans, here), shape=view.shape[1:]
        )
      views.append(view)
    outs = self.visit(
      inner, views, here, (*scans, here), (*lengths, eqn.params["length"])
    )
    for view in outs:
      if view is not None:
        self.refuse(view, "the result of a scan")

  def _visit_op(self, eqn, ins, here, scans, lengths) -> None:
    """Adds a site, unless the weight is no parameter."""
    weight, x = eqn.invars
    view, x_view = ins
    if x_view is not None:
      self.refuse(x_view, f"the input of {eqn.params['name']!r}")
    if view is None:
      return  # Frozen, or computed from data: a plain operation.
    for other in self.sites:
      if other.view.leaf == view.leaf and other.view.shape != view.shape:
        self.refuse(view, "both a scan over it and an operation on all of it")
    out = eqn.outvars[0].aval
    self.sites.append(
      Site(
        path=here,
        kind=eqn.params["kind"],
        name=eqn.params["name"],
        view=view,
        scans=scans,
        lengths=lengths,
        weight=weight.aval.shape,
        x=jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype),
        out=jax.ShapeDtypeStruct(out.shape, out.dtype),
        x_key=(here[:-1], id(x)),
      )
    )


def _evaluate(
  jaxpr: jex_core.Jaxpr,
  consts: Any,
  args: Any,
  path: Path,
  program: Program,
  frame: Frame,
) -> list[Any]:
  """Evaluates a jaxpr, the rule standing in at each site."""
  env = dict(zip(jaxpr.constvars, consts, strict=True))
  env.update(zip(jaxpr.invars, args, strict=True))
  read = lambda v: v.val if isinstance(v, jex_core.Literal) else env[v]
  for number, eqn in enumerate(jaxpr.eqns):
    here = (*path, number)
    values = [read(v) for v in eqn.invars]
    name = eqn.primitive.name
    if eqn.primitive is _param_op:
      site = program.site_at.get(here)
      if site is None:
        outs = [plain(eqn.params["kind"], *values)]
      else:
        outs = [frame.rule(site, values[0], values[1], frame)]
    elif not _has_ops(eqn):
      outs = _bind(jaxpr, eqn, values)
    elif name == "scan":
      outs = _evaluate_scan(eqn, values, here, program, frame)
    elif name in _REMATS:
      outs = _evaluate_remat(eqn, values, here, program, frame)
    else:
      inner, inner_consts = _open(eqn.params["jaxpr"])
      outs = _evaluate(inner, inner_consts, values, here, program, frame)
    env.update(zip(eqn.outvars, outs, strict=True))
  return [read(v) for v in jaxpr.outvars]


def _bind(jaxpr: jex_core.Jaxpr, eqn: Any, values: list[Any]) -> list[Any]:
  """Evaluates one equation as it stands, through JAX's own evaluator."""
  known = {
    v: value
    for v, value in zip(eqn.invars, values, strict=True)
    if not isinstance(v, jex_core.Literal)
  }
  alone = jex_core.Jaxpr(
    constvars=(),
    invars=list(known),
    outvars=eqn.outvars,
    eqns=[eqn],
    effects=jaxpr.effects,
    debug_info=jaxpr.debug_info.with_unknown_names(),
  )
  return jax.core.eval_jaxpr(alone, (), *known.values())


def _evaluate_scan(eqn, values, here, program, frame) -> list[Any]:
  """A scan whose body has sites: extra inputs sliced, outputs stacked."""
  first_carry, first_x = _scan_parts(eqn)
  inner, inner_consts = _open(eqn.params["jaxpr"])
  sites = [site for site in program.sites if here in site.scans]
  by_leaf = {
    site.view.leaf: frame.by_leaf[site.view.leaf]
    for site in sites
    if here in site.view.scans and site.view.leaf in frame.by_leaf
  }
  by_site = {
    site.path: frame.by_site[site.path]
    for site in sites
    if site.path in frame.by_site
  }

  def body(consts, carry, xs, taps):
    values, unsliced = consts
    xs, by_leaf_slice = xs
    own = dataclasses.replace(
      frame,
      by_leaf={**unsliced, **by_leaf_slice},
      by_site=taps,
      records={},
    )
    outs = _evaluate(
      inner, inner_consts, [*values, *carry, *xs], here, program, own
    )
    num_carry = first_x - first_carry
    return outs[:num_carry], outs[num_carry:], own.records

  scan = reusing_scan.scan if frame.reuses_memory else _plain_scan
  carry, ys, records = scan(
    body,
    (values[:first_carry], frame.by_leaf),
    values[first_carry:first_x],
    (values[first_x:], by_leaf),
    by_site,
    length=eqn.params["length"],
    reverse=eqn.params["reverse"],
    unroll=eqn.params["unroll"],
  )
  frame.records.update(records)
  return [*carry, *ys]


def _plain_scan(body, consts, carry, xs, taps, **options) -> Any:
  """`reusing_scan.scan` as JAX differentiates it."""

  def one(carry, slices):
    carry, y, aux = body(consts, carry, *slices)
    return carry, (y, aux)

  carry, (ys, aux) = jax.lax.scan(one, carry, (xs, taps), **options)
  return carry, ys, aux


def _evaluate_remat(eqn, values, here, program, frame) -> list[Any]:
  """A rematerialised call; what it records is kept, the rest is not."""
  inner, inner_consts = _open(eqn.params["jaxpr"])

  def call(values, by_leaf, by_site):
    own = dataclasses.replace(
      frame,
      by_leaf=by_leaf,
      by_site=by_site,
      records={},
    )
    outs = _evaluate(inner, inner_consts, values, here, program, own)
    return outs, own.records

  outs, records = jax.checkpoint(
    call, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"]
  )(values, frame.by_leaf, frame.by_site)
  frame.records.update(records)
  return outs


def _scan_parts(eqn: Any) -> tuple[int, int]:
  """Where a scan's carry and its slices begin among its inputs."""
  if "num_consts" in eqn.params:  # JAX 0.10.
    num_consts, num_carry = eqn.params["num_consts"], eqn.params["num_carry"]
  else:
    num_consts, num_carry, _ = map(len, eqn.params["ft_in"].unpack())
  return num_consts, num_consts + num_carry


def _open(jaxpr: Any) -> tuple[jex_core.Jaxpr, Any]:
  """A jaxpr and its constants, whether it was closed or not."""
  return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def _inner_jaxprs(eqn: Any) -> Iterator[jex_core.Jaxpr]:
  """Every jaxpr among an equation's parameters."""
  for value in eqn.params.values():
    for item in value if isinstance(value, tuple | list) else (value,):
      if isinstance(item, jex_core.ClosedJaxpr | jex_core.Jaxpr):
        yield _open(item)[0]


def _op_names(eqn: Any) -> set[str]:
  """Names of the parametrised operations in an equation."""
  if eqn.primitive is _param_op:
    return {eqn.params["name"]}
  return {
    name
    for inner in _inner_jaxprs(eqn)
    for sub in inner.eqns
    for name in _op_names(sub)
  }


def _has_ops(eqn: Any) -> bool:
  """Whether an equation holds a parametrised operation."""
  return bool(_op_names(eqn))
