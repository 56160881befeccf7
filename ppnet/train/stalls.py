"""A watchdog that says what a run is waiting for when it waits too long.

It only speaks: whatever it finds, nothing is ended, and what comes late is
taken as if it had come in time. It says it again after each further limit, and
says when the wait is over.

| case | what happens |
| --- | --- |
| a wait ends before the limit | nothing |
| one wait inside another | the inner one counts; the outer one begins anew |
| nothing is being waited for | nothing, however long that takes |
| a report cannot be written | the next one is tried |
| a wait that keeps the interpreter's lock | not seen before it ends |

>>> import io, time
>>> log = io.StringIO()
>>> with Watchdog(limit_secs=0.05, log=log) as watchdog:
...   with watchdog.waiting_for("the data of step 3"):
...     time.sleep(0.08)
>>> log.getvalue().split(". ")[0].strip()
'Waiting for 0 s: the data of step 3'
"""

import contextlib
import pathlib
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

_DATA = str(pathlib.Path(__file__).parents[1] / "data")


class _Wait(NamedTuple):
  """What is being waited for, and since when."""

  what: str
  began: float


class Watchdog:
  """Watches the thread that makes it."""

  def __init__(
    self,
    *,
    limit_secs: float,
    log: Any,
    record: Callable[[str, float], Any] = lambda what, secs: None,
  ):
    """Starts to watch.

    Args:
      limit_secs: of a wait that is nothing to speak of.
      log: where the reports go, a text file.
      record: told of each report as well: what is being waited for, and for how
        many seconds so far. Called in another thread.
    """
    self._limit_secs = limit_secs
    self._log = log
    self._record = record
    self._watched = threading.get_ident()
    self._wait: _Wait | None = None
    self._seen: _Wait | None = None
    self._reported: _Wait | None = None
    self._times = 0
    self._closed = threading.Event()
    # A daemon: what hangs while it reports must not keep the process.
    self._thread = threading.Thread(
      target=self._watch, name="stall-watchdog", daemon=True
    )
    self._thread.start()

  def __enter__(self) -> "Watchdog":
    return self

  def __exit__(self, *error: object) -> None:
    self.close()

  @contextlib.contextmanager
  def waiting_for(self, what: str) -> Iterator[None]:
    """Says what the watched thread waits for in this block."""
    outer = self._wait
    self._wait = _Wait(what, time.monotonic())
    try:
      yield
    finally:
      ended, now = self._wait, time.monotonic()
      self._wait = outer and _Wait(outer.what, now)
      if ended is not None and ended is self._reported:
        secs = now - ended.began
        self._say(f"\nThe wait is over after {secs:.0f} s: {ended.what}.")

  def now(self, what: str) -> None:
    """Goes on to the next part of a wait, which has the whole limit again."""
    self._wait = _Wait(what, time.monotonic())

  def close(self) -> None:
    """Stops watching."""
    self._closed.set()
    self._thread.join(timeout=1.0)

  def look(self) -> float:
    """Reports a wait that is over its limit; returns when to look again, in s.

    The watchdog's own thread calls it.
    """
    wait, now = self._wait, time.monotonic()
    if wait is None:
      return self._limit_secs
    if wait is not self._seen:
      self._seen, self._times = wait, 0
    secs = now - wait.began
    if secs >= (self._times + 1) * self._limit_secs:
      self._times = int(secs / self._limit_secs)
      self._report(wait, secs)
    return max((self._times + 1) * self._limit_secs - secs, 0.001)

  def _watch(self) -> None:
    """The watchdog's thread."""
    pause = self._limit_secs
    # All waits have one limit, so none that began later is due earlier than
    # the one that was seen: nobody needs to wake this thread.
    while not self._closed.wait(pause):
      pause = self.look()

  def _report(self, wait: _Wait, secs: float) -> None:
    """Says and records that a wait takes long."""
    self._reported = wait
    self._say(
      f"\nWaiting for {secs:.0f} s: {wait.what}. Nothing is ended, and the run"
      " goes on when it comes. Where this is no surprise, raise"
      f" perf.stall_secs={self._limit_secs:g}.\n{self._stacks()}"
    )
    try:
      self._record(wait.what, secs)
    except (OSError, ValueError) as error:  # A full disk; a closed file.
      self._say(f"This could not be recorded: {error}")

  def _say(self, text: str) -> None:
    """Writes a line to the log."""
    with contextlib.suppress(OSError, ValueError):
      print(text, file=self._log, flush=True)

  def _stacks(self) -> str:
    """Where the watched thread is, and those that make its data."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = []
    for ident, frame in sys._current_frames().items():
      if ident == threading.get_ident():
        continue
      stack = traceback.extract_stack(frame)
      makes_data = any(entry.filename.startswith(_DATA) for entry in stack)
      if ident == self._watched or makes_data:
        # Its own frames tell nothing before the last ones.
        lines = "".join(traceback.format_list(stack[-12:]))
        name = names.get(ident, ident)
        parts.append((ident != self._watched, f"Thread {name}:\n{lines}"))
    return "".join(text for _, text in sorted(parts))
