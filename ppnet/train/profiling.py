"""A trace of a few steps, for TensorBoard's profile plugin.

Steps are numbered as in `metrics.jsonl`, from 1; both ends are traced.

>>> parse("10:13", num_steps=100)
(10, 13)
"""

import pathlib
import re
from typing import Any

import jax

from ppnet.core import checks

Steps = tuple[int, int]


def parse(text: str, *, num_steps: int) -> Steps:
  """The first and the last step of "FIRST:LAST".

  | text | steps |
  | --- | --- |
  | "10:13" | 10, 11, 12 and 13 |
  | "10:10" | 10 |
  | "0:3", "13:10", "10", "a:b" | `ValueError` |
  | a last step that the run does not have | `ValueError` |

  Args:
    text: what the flag says.
    num_steps: of the run.

  Raises:
    ValueError: see the table.
  """
  found = re.fullmatch(r"(\d+):(\d+)", text)
  if found is None or not 1 <= int(found[1]) <= int(found[2]):
    checks.fail(
      "--profile_steps=FIRST:LAST with 1 <= FIRST <= LAST",
      "--profile_steps=10:13 traces the steps 10, 11, 12 and 13.",
      profile_steps=text,
    )
  first, last = int(found[1]), int(found[2])
  if last > num_steps:
    checks.fail(
      f"--profile_steps within the run's {num_steps} steps",
      "Name earlier steps, or raise train.num_steps.",
      profile_steps=text,
    )
  return first, last


class Trace:
  """Traces a range of steps, once."""

  def __init__(self, folder: pathlib.Path, steps: Steps | None, *, log: Any):
    """Prepares a trace.

    Args:
      folder: what TensorBoard is given; the trace comes into
        `plugins/profile/<time>` below it, a file for each process.
      steps: the first and the last; None traces nothing.
      log: where it is said what was traced, a text file.
    """
    self._folder = folder
    self._steps = steps
    self._log = log
    self._is_tracing = False

  def changes_after(self, num_done: int) -> bool:
    """Whether the trace begins or ends when so many steps are done."""
    return self._steps is not None and num_done in (
      self._steps[0] - 1,
      self._steps[1],
    )

  def begin(self, num_done: int) -> None:
    """A run begins after so many steps; they may be in the range, or past it.

    A run that goes on is not refused: its launcher gives the same flags again.
    """
    if self._steps is None:
      return
    first, last = self._steps
    if num_done >= last:
      self._say(
        f"No trace of the steps {first} to {last}: {num_done} steps were done"
        " before."
      )
      self._steps = None
    elif num_done >= first:
      self._steps = (num_done + 1, last)
    self.reached(num_done)

  def reached(self, num_done: int) -> None:
    """Begins or ends the trace; the devices have done all that they were sent.

    Args:
      num_done: steps of the run.
    """
    if self._steps is None:
      return
    first, last = self._steps
    if num_done >= last:
      self.close()
    elif num_done == first - 1 and not self._is_tracing:
      jax.profiler.start_trace(str(self._folder))
      self._is_tracing = True

  def close(self) -> None:
    """Writes what was traced."""
    if not self._is_tracing:
      return
    self._is_tracing = False
    self._steps = None
    jax.profiler.stop_trace()
    self._say(f"Trace: tensorboard --logdir={self._folder}, tab PROFILE.")

  def _say(self, text: str) -> None:
    """Writes a line to the log."""
    print(f"\n{text}", file=self._log, flush=True)
