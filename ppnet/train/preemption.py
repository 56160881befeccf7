"""SIGTERM, as a machine that is about to be taken away sends it.

The loop finishes its step, saves, and ends with `EXIT_CODE`; whoever launched
it starts the same command again, and the run goes on from there.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
from jax.experimental import multihost_utils

# EX_TEMPFAIL of <sysexits.h>: "try again later". The launchers restart on it.
EXIT_CODE = 75


class PreemptedError(RuntimeError):
  """The run was told to end; it saved, and the same command goes on."""


class Notice:
  """Whether this job was told to end."""

  def __init__(self):
    self._received = threading.Event()

  def receive(self, signal_number: int, frame: Any) -> None:
    """Handles the signal: notes it and returns at once."""
    del signal_number, frame
    self._received.set()

  def reached(self, step: int) -> bool:
    """Whether to save and end after `step`; all hosts give one answer.

    With several processes JAX itself listens for the signal, on any of them,
    and agrees on a step that all of them will reach.
    """
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(step)
    return self._received.is_set()


@contextmanager
def listening() -> Iterator[Notice]:
  """Listens for SIGTERM; afterwards it does again what it did before.

  Python handles signals in its main thread; elsewhere nothing is heard.
  """
  notice = Notice()
  if (
    jax.process_count() > 1
    or threading.current_thread() is not threading.main_thread()
  ):
    yield notice
    return
  before = signal.signal(signal.SIGTERM, notice.receive)
  try:
    yield notice
  finally:
    signal.signal(signal.SIGTERM, before)
