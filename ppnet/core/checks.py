"""Checks that raise `ValueError` with the name, the value and the bound.

Each check takes its values by keyword, so that the message carries the
caller's own name for them:

>>> positive(l2_clip_norm=1.0)
>>> positive(l2_clip_norm=-1.0)
Traceback (most recent call last):
...
ValueError: Expected l2_clip_norm > 0, got l2_clip_norm=-1.0.
"""

import difflib
import math
from collections.abc import Iterable
from typing import NoReturn


def fail(expected: str, remedy: str = "", /, **values: object) -> NoReturn:
  """Raises `ValueError`: what was expected, what came, what to do."""
  got = ", ".join(f"{name}={value!r}" for name, value in values.items())
  raise ValueError(f"Expected {expected}, got {got}. {remedy}".rstrip())


def positive(remedy: str = "", /, **values: float) -> None:
  """Every value is finite and above zero."""
  for name, value in values.items():
    if not (math.isfinite(value) and value > 0):
      fail(f"{name} > 0", remedy, **{name: value})


def non_negative(remedy: str = "", /, **values: float) -> None:
  """Every value is finite and not below zero."""
  for name, value in values.items():
    if not (math.isfinite(value) and value >= 0):
      fail(f"{name} >= 0", remedy, **{name: value})


def in_open_unit_interval(remedy: str = "", /, **values: float) -> None:
  """Every value lies strictly between 0 and 1."""
  for name, value in values.items():
    if not 0 < value < 1:
      fail(f"0 < {name} < 1", remedy, **{name: value})


def probability(remedy: str = "", /, **values: float) -> None:
  """Every value lies in (0, 1]."""
  for name, value in values.items():
    if not 0 < value <= 1:
      fail(f"0 < {name} <= 1", remedy, **{name: value})


def at_most(bound: float, remedy: str = "", /, **values: float) -> None:
  """No value exceeds `bound`."""
  for name, value in values.items():
    if not value <= bound:
      fail(f"{name} <= {bound}", remedy, **{name: value})


def did_you_mean(name: str, known: Iterable[str]) -> str:
  """Returns " Did you mean 'x'?" for the closest known name, or nothing."""
  close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
  return f" Did you mean {close[0]!r}?" if close else ""
