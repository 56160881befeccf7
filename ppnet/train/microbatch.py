"""Which microbatch fits: found with few compiles.

A compile of a large model takes minutes. What a device holds grows with the
microbatch almost along a line, so two compiles say where it meets the limit and
a third confirms it.
"""

from collections.abc import Callable
from typing import Protocol, TypeVar

_MAX_TRIES = 4


class Sized(Protocol):
  """What was compiled."""

  @property
  def fits(self) -> bool:
    """Whether a device holds it."""
    ...

  @property
  def total_bytes(self) -> int | None:
    """What a device must hold; None where the compiler gave up."""
    ...


S = TypeVar("S", bound=Sized)


def search(
  compile_with: Callable[[int], S],
  *,
  start: int,
  unit: int,
  largest: int,
  available_bytes: int,
) -> dict[int, S]:
  """Compiles a few microbatches to find the largest that fits.

  | what is known | next |
  | --- | --- |
  | one that fits | as many as if all of it grew with the microbatch |
  | two that tell their bytes | where their line meets the limit |
  | none that fits | half of the smallest that was tried |
  | nothing new, or four compiles | the end |

  Args:
    compile_with: compiles a microbatch.
    start: the first one, a multiple of `unit`.
    unit: every microbatch is a multiple of it.
    largest: no larger one is of use: a whole batch.
    available_bytes: of a device.

  Returns:
    What was compiled, by microbatch, in the order of the tries.
  """
  found: dict[int, S] = {}
  size = start
  while size not in found and len(found) < _MAX_TRIES:
    found[size] = compile_with(size)
    size = _next(found, unit=unit, available_bytes=available_bytes)
    size = min(size, max(start, -(-largest // unit) * unit))
    too_large = [s for s, each in found.items() if not each.fits]
    if too_large:
      size = min(size, min(too_large) - unit)
    if size < unit:
      break
  return found


def _next(found: dict[int, S], *, unit: int, available_bytes: int) -> int:
  """The microbatch to try next."""
  known = sorted(
    (size, each.total_bytes)
    for size, each in found.items()
    if each.total_bytes is not None
  )
  if not known:
    return min(found) // 2 // unit * unit
  (low, low_bytes), (high, high_bytes) = known[0], known[-1]
  if len(known) > 1 and high_bytes > low_bytes:
    slope = (high_bytes - low_bytes) / (high - low)
    free = available_bytes - high_bytes
    # Down to whole units, also where there is less than nothing free.
    return high + int(free / slope // unit) * unit
  if high_bytes > available_bytes:
    return high // 2 // unit * unit
  return int(high * available_bytes / high_bytes) // unit * unit
