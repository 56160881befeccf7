"""Where the time of a folder's processes went, from the first start on.

Goodput is the share of the wall time in which the devices worked on steps that
were taken for the first time. All other time has a name:

| name | what |
| --- | --- |
| step | the devices worked on a step |
| repeated | likewise, on a step that an earlier process had taken as well |
| compile | dispatching a step of a new shape, which traces and compiles it |
| evaluation | on the test split, compilation and reading included |
| checkpoint | what a save keeps the loop from doing, not the part behind it |
| profile | writing a trace |
| start | from the start of a process to its first step: data, restoring |
| idle | the devices were done: the data, or the loop itself, were late |
| stopped | no process ran, or what it did was not recorded before a kill |

The names but "stopped" add up to the time in which processes ran, and with it
to the wall time. A step that a kill took away counts once: its first taking as
"step" where that was recorded, else as "stopped"; its second one as "repeated"
or as "step".

The record is `machine.json`, replaced as a whole, durably: after a kill it is
as old as `Goodput.save`'s last call.
"""

import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any

from absl import logging

from ppnet.core import records

NAMES = (
  "step",
  "repeated",
  "compile",
  "evaluation",
  "checkpoint",
  "profile",
  "start",
  "idle",
  "stopped",
)
_FILE = "machine.json"
_SAVE_EVERY_SECS = 10.0


def process_start() -> float:
  """When this process began, in Unix time; now, where nobody knows.

  Linux knows. Imports, and finding the other processes, come after it.
  """
  try:
    stat = pathlib.Path("/proc/self/stat").read_text()
    # The name stands in brackets and may hold spaces; field 22 is the start.
    ticks = int(stat.rpartition(")")[2].split()[19])
    uptime = float(pathlib.Path("/proc/uptime").read_text().split()[0])
    age = uptime - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - max(age, 0.0)
  except (OSError, ValueError, IndexError):
    return time.time()


class Goodput:
  """The account of one folder's time. Its methods take and give seconds."""

  def __init__(
    self,
    workdir: pathlib.Path | None,
    facts: Mapping[str, Any],
    *,
    began: float,
  ):
    """Goes on with the folder's record, or begins one.

    Args:
      workdir: the folder; None keeps no record.
      facts: what the record says beside the times.
      began: when this process began, in Unix time.
    """
    self._path = None if workdir is None else workdir / _FILE
    self._facts = dict(facts)
    before = self._read()
    self._first_start = min(before.get("first_start_unix_secs", began), began)
    self._num_starts = before.get("num_starts", 0) + 1
    self._num_steps = before.get("num_steps", 0)
    self._running_before = before.get("nonprivate/running_secs", 0.0)
    self._secs = dict.fromkeys(NAMES, 0.0)
    for name, secs in before.get("nonprivate/secs", {}).items():
      if name in ("idle", "stopped"):
        continue  # What is left; computed.
      self._secs[name] = self._secs.get(name, 0.0) + secs
    # One clock per process that no one sets, and one that all share.
    self._began, self._now_at_start = began, time.time()
    self._clock_at_start = time.perf_counter()
    self._saved = 0.0

  def _read(self) -> dict[str, Any]:
    """What earlier processes recorded; nothing where there is nothing."""
    if self._path is None or not self._path.exists():
      return {}
    try:
      return records.read_json(self._path)
    except ValueError as error:
      # It tells how fast a run was; no reason not to run.
      logging.warning("Counting time anew: %s", error)
      return {}

  def add(self, name: str, secs: float) -> None:
    """Says where time went."""
    self._secs[name] += secs

  def add_step(self, num_done: int, secs: float) -> None:
    """Says how long the devices worked on a step.

    Args:
      num_done: steps that are done with it.
      secs: of the devices' work.
    """
    self.add("step" if num_done > self._num_steps else "repeated", secs)
    self._num_steps = max(self._num_steps, num_done)

  @property
  def wall_secs(self) -> float:
    """Since the first start of the first process."""
    return max(self._now() - self._first_start, 1e-9)

  @property
  def goodput(self) -> float:
    """The share of it in which steps were taken for the first time."""
    return min(self._secs["step"] / self.wall_secs, 1.0)

  def secs(self) -> dict[str, float]:
    """Where all of it went, by name."""
    running = self._running_secs()
    named = sum(self._secs.values())
    return self._secs | {
      "idle": max(running - named, 0.0),
      "stopped": max(self.wall_secs - running, 0.0),
    }

  def save(self, *, now: bool) -> None:
    """Writes the record, durably.

    Args:
      now: at once; else only where the last one is old.
    """
    clock = time.perf_counter()
    if self._path is None or not (
      now or clock - self._saved >= _SAVE_EVERY_SECS
    ):
      return
    self._saved = clock
    records.write_json(
      self._path,
      self._facts
      | {
        "first_start_unix_secs": self._first_start,
        "num_starts": self._num_starts,
        "num_steps": self._num_steps,
        "nonprivate/running_secs": self._running_secs(),
        "nonprivate/secs": self.secs(),
      },
    )

  def _now(self) -> float:
    """Unix time, which nobody sets while this process runs."""
    return self._now_at_start + time.perf_counter() - self._clock_at_start

  def _running_secs(self) -> float:
    """In which this process or one before it ran."""
    return self._running_before + max(self._now() - self._began, 0.0)
