"""Where arrays inside a step live: what the partitioner would else guess.

Shardings of a step's inputs and outputs say little about what is in between.
Where one mesh axis splits both the examples and the parameters (ZeRO), XLA may
keep a weight in parts and send the activations around instead, which are
larger. Models and engines therefore say what they mean, in logical axes:

- a weight is whole along the axes that split the batch while it is used (it is
  gathered in the compute dtype, and its gradient reduced, by XLA);
- an activation's examples stay where they are;
- what is kept of each example lies as its example and its weight do.

The rules and the mesh come from whoever traces a step (`within`), as the mesh
of the attention kernels does. Outside of it, and on one device, all of this is
nothing: the values are the same either way.
"""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ppnet.sharding import mesh as mesh_lib
from ppnet.sharding import rules as rules_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Layout:
  """What is traced within.

  Attributes:
    mesh: the devices.
    rules: strategy.
    specs: of the trained parameters, as they are between steps, flattened;
      empty where nobody said.
  """

  mesh: Mesh
  rules: rules_lib.Rules
  specs: tuple[P, ...]


_CURRENT: contextvars.ContextVar[_Layout | None] = contextvars.ContextVar(
  "ppnet_layout", default=None
)


def within(
  mesh: Mesh,
  rules: rules_lib.Rules,
  fn: Callable[..., Any],
  *,
  param_shardings: Any = None,
  **bound: Any,
) -> Callable[..., Any]:
  """`mesh.within`, and `fn` is traced with these rules at hand."""
  on_mesh = mesh_lib.within(mesh, fn, **bound)

  @functools.wraps(fn)
  def traced(*args, **kwargs):
    with using(mesh, rules, param_shardings=param_shardings):
      return on_mesh(*args, **kwargs)

  return traced


@contextlib.contextmanager
def using(
  mesh: Mesh, rules: rules_lib.Rules, *, param_shardings: Any = None
) -> Iterator[None]:
  """Lays out what is traced inside; nothing on a mesh of one device.

  Args:
    mesh: the devices.
    rules: the strategy.
    param_shardings: of the trained parameters, in their structure; None leaves
      what is kept of each example to the partitioner.
  """
  specs = tuple(each.spec for each in jax.tree.leaves(param_shardings))
  layout = _Layout(mesh=mesh, rules=rules, specs=specs)
  token = _CURRENT.set(layout if mesh.size > 1 else None)
  try:
    yield
  finally:
    _CURRENT.reset(token)


def weight(value: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
  """A parameter as it is used: whole along the axes that split the batch.

  Args:
    value: the parameter, in the compute dtype, so that this is what is sent.
    axes: its logical axes.
  """
  if (current := _CURRENT.get()) is None:
    return value
  mesh, rules = current.mesh, current.rules
  spec = [_without_batch(axis, rules) for axis in rules.spec(axes)]
  return _constrained(value, mesh, spec)


def gathered(mesh: Mesh, rules: rules_lib.Rules, shardings: Any) -> Any:
  """Shardings of parameters that are whole along the axes of the batch.

  Args:
    mesh: the devices.
    rules: the strategy.
    shardings: a tree of `NamedSharding`, as they are between steps.
  """
  return jax.tree.map(
    lambda each: NamedSharding(
      mesh, P(*(_without_batch(axis, rules) for axis in each.spec))
    ),
    shardings,
  )


def activation(value: jax.Array, feature_axis: str | None = None) -> jax.Array:
  """[B, ..., F]: examples where the batch is, features as a weight's are.

  Args:
    value: one row per example. Where the rows do not divide among the devices
      (the one example of a vmapped function), they are left to the partitioner.
    feature_axis: logical axis of the last one; None keeps it whole.
  """
  if (current := _CURRENT.get()) is None:
    return value
  mesh, rules = current.mesh, current.rules
  rows: Any = rules.batch
  if value.shape[0] % rules_lib.num_parts(mesh, rules.batch):
    rows = P.UNCONSTRAINED
  (last,) = rules.spec((feature_axis,))
  # Tokens may be split as well, and only the partitioner knows which these are.
  is_split = rules_lib.num_parts(mesh, rules.sequence) > 1
  middle = [P.UNCONSTRAINED if is_split else None] * (value.ndim - 2)
  return _constrained(value, mesh, [rows, *middle, _without_batch(last, rules)])


def batch_axes() -> tuple[str, ...] | None:
  """Mesh axes that split examples, for `jax.vmap(spmd_axis_name=...)`."""
  if (current := _CURRENT.get()) is None:
    return None
  return _parts(current.rules.batch) or None


def ways(leaf: int, num_axes: int) -> tuple[int, ...]:
  """Into how many parts the last axes of a parameter are cut while it is used.

  Args:
    leaf: number of the trained parameter, flattened.
    num_axes: so many axes; those before them are stacks.
  """
  if (current := _CURRENT.get()) is None or not current.specs:
    return (1,) * num_axes
  return tuple(
    rules_lib.num_parts(current.mesh, _without_batch(axis, current.rules))
    for axis in _last(current.specs[leaf], num_axes)
  )


def unit_grads(value: jax.Array, leaf: int, num_axes: int) -> jax.Array:
  """Gradients of units, [*stacks, U, *axes]: as units and the weight are."""
  if (current := _CURRENT.get()) is None or not current.specs:
    return value
  axes = [
    _without_batch(axis, current.rules)
    for axis in _last(current.specs[leaf], num_axes)
  ]
  stacks = [None] * (value.ndim - num_axes - 1)
  return _constrained(
    value, current.mesh, [*stacks, current.rules.batch, *axes]
  )


def by_device(value: jax.Array, axis: int) -> jax.Array:
  """Splits an axis of units: [..., devices, of a device, ...].

  Where they do not divide, each is taken for one of another device.
  """
  num_units = value.shape[axis]
  parts = 1
  if (current := _CURRENT.get()) is not None:
    parts = rules_lib.num_parts(current.mesh, current.rules.batch)
  parts = parts if num_units % parts == 0 else num_units
  shape = (parts, num_units // parts)
  return value.reshape(*value.shape[:axis], *shape, *value.shape[axis + 1 :])


def grad(value: jax.Array, leaf: int) -> jax.Array:
  """A sum over units, of a parameter or of its slice: as the parameter is."""
  if (current := _CURRENT.get()) is None or not current.specs:
    return value
  return _constrained(
    value, current.mesh, _last(current.specs[leaf], value.ndim)
  )


def is_spread() -> bool:
  """Whether what is traced runs on several devices."""
  return _CURRENT.get() is not None


def _last(spec: P, num_axes: int) -> list[Any]:
  """The spec of the last axes."""
  return list(spec)[len(spec) - num_axes :] if num_axes else []


def _constrained(value: jax.Array, mesh: Mesh, spec: list[Any]) -> jax.Array:
  """Axes that do not divide are left whole, as they are nobody's intent."""
  checked = [
    axis
    if axis is P.UNCONSTRAINED or size % rules_lib.num_parts(mesh, axis) == 0
    else None
    for axis, size in zip(spec, value.shape, strict=True)
  ]
  return jax.lax.with_sharding_constraint(
    value, NamedSharding(mesh, P(*checked))
  )


def _without_batch(axis: rules_lib.Axis, rules: rules_lib.Rules) -> Any:
  """A mesh axis, or several, less those that split the batch."""
  split = set(_parts(rules.batch))
  kept = tuple(name for name in _parts(axis) if name not in split)
  return kept or None


def _parts(axis: rules_lib.Axis) -> tuple[str, ...]:
  """Names of mesh axes."""
  if axis is None:
    return ()
  return axis if isinstance(axis, tuple) else (axis,)
