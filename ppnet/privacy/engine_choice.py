"""What AUTO stands for: an engine chosen by the loss's operations and shapes.

The measurements behind the rules are in BUILD_NOTES.md, "Clipping engines".
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ppnet import config
from ppnet.privacy import ghost, taps

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
  """An engine and the reason for it.

  Attributes:
    engine: never AUTO.
    why: for the record, a clause without a full stop.
  """

  engine: config.Engine
  why: str


def choose(
  fun: Callable[[PyTree, PyTree], Any],
  params: PyTree,
  batch: PyTree,
  *,
  rows_per_unit: int,
) -> Choice:
  """Chooses an engine for one microbatch. Traces; computes nothing.

  | the loss | engine |
  | --- | --- |
  | has an operation without a rule | VMAP |
  | keeps its activations | BOOKKEEPING: its cotangents take their places |
  | rematerialises, all in float32 | GHOST, which keeps nothing |
  | rematerialises, in lower precision | the one that keeps less of |
  | | BOOKKEEPING and VMAP |

  Args:
    fun: (params, batch) -> (losses [B], aux), with `taps.MARKING` operations.
    params: arrays or their shapes.
    batch: leaves [B, ...], arrays or their shapes.
    rows_per_unit: rows of one privacy unit.
  """
  try:
    program = taps.trace(fun, params, batch)
  except ValueError as error:
    return Choice(engine=config.Engine.VMAP, why=str(error).splitlines()[0])
  again = [site for site in program.sites if program.is_rematerialised(site)]
  if not again:
    return Choice(
      engine=config.Engine.BOOKKEEPING,
      why="activations are kept, and kept cotangents take their places",
    )
  if all(_is_float32(site) for site in program.sites):
    return Choice(
      engine=config.Engine.GHOST,
      why=f"activations of {len(again)} operations are computed again, and"
      " GHOST keeps none",
    )
  kept = _kept_bytes(again)
  num_units = program.num_rows // rows_per_unit
  grads = (
    4 * num_units * sum(math.prod(p.shape) for p in jax.tree.leaves(params))
  )
  is_less = kept < grads
  return Choice(
    engine=config.Engine.BOOKKEEPING if is_less else config.Engine.VMAP,
    why="activations are computed again, in lower precision than float32, and"
    f" a microbatch's kept cotangents take {_size(kept)}, its gradients"
    f" {_size(grads)}",
  )


def _is_float32(site: taps.Site) -> bool:
  """Whether GHOST's two passes agree (`ghost`, PROBE)."""
  return site.out.dtype == jnp.float32


def _kept_bytes(sites: Sequence[taps.Site]) -> int:
  """What BOOKKEEPING holds of these operations until weights are known."""
  uses: dict[int, list[taps.Site]] = {}
  for site in sites:
    uses.setdefault(site.view.leaf, []).append(site)
  total = 0
  for group in uses.values():
    if ghost.choose_way(group, may_probe=False) is ghost.Way.RECORD:
      for site in group:
        times = math.prod(site.lengths)
        for part in (site.x, site.out):
          total += times * math.prod(part.shape) * part.dtype.itemsize
    else:
      site = group[0]
      slices = math.prod(site.lengths)
      size = slices * site.x.shape[0] * math.prod(site.view.shape)
      total += size * jnp.dtype(ghost.kept_dtype(group)).itemsize
  return total


def _size(num_bytes: int) -> str:
  """For people."""
  return f"{num_bytes / 2**20:,.0f} MiB"
