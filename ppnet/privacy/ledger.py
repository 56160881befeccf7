"""The privacy ledger: what a run may have released, on disk before it does.

`privacy.json` counts the steps that were started. A step is charged, durably,
*before* it is dispatched, so at every moment, a kill or a power cut included,
the file counts at least the steps whose results exist anywhere. It also states
the mechanism that the count belongs to. No JAX in this module.
"""

import datetime
import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from ppnet.core import checks, records

_CLAIM_FIELDS = (
  "noise_multiplier",
  "sampling_prob",
  "sampler",
  "accountant",
  "neighboring_relation",
  "unit",
  "delta",
  "epsilon_budget",
  "sensitivity",
  "num_examples",
  "expected_batch_size",
  "sampler_seeded",
  "noise_seeded",
)
_PROSE_FIELDS = ("guarantee",)  # Derived from the others; may be reworded.
_STATE_FIELDS = ("charged_steps", "epsilon", "history")
# A calibrated epsilon is at most its target, but the target may have gone
# through a decimal string on its way here.
_BUDGET_ROUNDING = 1e-9


class BudgetExhausted(RuntimeError):
  """One more step would take epsilon above the budget. Nothing was charged."""


class Ledger:
  """Counts started steps in `privacy.json`, before they start.

  What counts as a release decides how a resumed run is charged. Suppose it
  restarts from the checkpoint of step t when s >= t steps were charged:

  - Roots drawn afresh (the default): steps t to s are run again with other
    batches and other noise. These are *new* releases, on top of the old ones
    that may have been seen, so the count goes on from s: it is the number of
    step starts ever, whatever their numbers.
  - Sampler and noise both seeded: the run repeats step k bit for bit, which
    releases nothing new, so charging step k leaves max(charged, k + 1).
    (Hardware that sums in another order does not repeat bit for bit, but a
    seeded run has no guarantee towards whoever knows the seed in any case.)
  - One of the two seeded: refused where steps would be repeated. The same batch
    under other noise is not another draw of the sampler, and other batches
    under the same noise give their difference away without any.

  Where the sampler draws for several steps at once (`steps_per_release`: a
  cycle of bins, an epoch, a turn of groups), a restart with fresh roots draws
  the rest of the cycle anew. So the interrupted cycle is charged to its end,
  and the new one from its beginning.

  One process owns the file; on many hosts, the first process charges before it
  takes part in a step, which the others cannot finish without it.

  *Formal guarantee.* When `charge` has returned, the file on disk counts the
  step. When it has raised, the caller must not dispatch the step, and the file
  is the old one or the one that counts it, never a mixture. `epsilon` in the
  file is at least the epsilon of the steps that it counts.

  | edge case | result |
  | --- | --- |
  | the step would exceed the budget | `BudgetExhausted`, nothing written |
  | no budget, or no guarantee | charged; epsilon reported, "inf" without |
  | the disk fails | `OSError`, and the step must not run |
  | killed between the charge and the step | counted though never run |

  Attributes:
    path: the file; the version before the last write is kept beside it, as
      `<name>.previous`. None on the other processes of a job.
    charged_steps: steps charged so far.
    epsilon: upper bound on epsilon for them.
  """

  def __init__(
    self,
    path: pathlib.Path | None,
    record: Mapping[str, Any],
    *,
    epsilon_after: Callable[[int], float],
  ) -> None:
    """Use `create`, `load` or `follow`."""
    self.path = None if path is None else pathlib.Path(path)
    self._record = dict(record)
    self._epsilon_after = epsilon_after

  @classmethod
  def create(
    cls,
    path: pathlib.Path,
    claim: Mapping[str, Any],
    *,
    epsilon_after: Callable[[int], float],
  ) -> "Ledger":
    """Starts a ledger and writes it.

    Args:
      path: where; no file may be there yet, in an existing folder.
      claim: the mechanism (`mechanism.Mechanism.claim()`).
      epsilon_after: upper bound on epsilon after so many steps, non-decreasing
        and exact at the planned number of steps (`accounting.EpsilonCurve`), so
        that a calibrated run is not stopped early.

    Raises:
      ValueError: a file is there, or a field of the claim is missing.
    """
    path = pathlib.Path(path)
    if path.exists():
      checks.fail(
        "no ledger yet", "Load it, or use an empty --workdir.", path=str(path)
      )
    missing = [name for name in _CLAIM_FIELDS if name not in claim]
    if missing:
      checks.fail("a complete claim", missing=missing)
    record = {
      **records.to_plain(claim),
      "charged_steps": 0,
      "epsilon": records.to_plain(epsilon_after(0)),
      "history": [],
    }
    ledger = cls(path, record, epsilon_after=epsilon_after)
    ledger._write(charged_steps=0, restart_at_step=0)
    return ledger

  @classmethod
  def load(
    cls,
    path: pathlib.Path,
    claim: Mapping[str, Any],
    *,
    epsilon_after: Callable[[int], float],
    resumed_at_step: int,
  ) -> "Ledger":
    """Continues a ledger, and notes the restart in it.

    Args:
      path: the file.
      claim: the mechanism of the resumed run; must equal the recorded one.
      epsilon_after: as for `create`.
      resumed_at_step: step of the checkpoint that the run continues from.

    Raises:
      ValueError: the file is missing or damaged, another mechanism wrote it,
        the checkpoint is ahead of it, or a run that is seeded by half would
        repeat steps.
    """
    record = read(path)
    now = records.to_plain(claim)
    state = (*_STATE_FIELDS, *_PROSE_FIELDS)
    for name in sorted({*record, *now} - set(state)):
      if name not in record or name not in now or record[name] != now[name]:
        checks.fail(
          f"{path} to record the mechanism of this run",
          "One ledger covers one mechanism: restore the setting, or use an"
          " empty --workdir.",
          **{
            f"recorded_{name}": record.get(name, "nothing"),
            f"this_{name}": now.get(name, "nothing"),
          },
        )
    charged = record["charged_steps"]
    if charged > resumed_at_step and (
      record["sampler_seeded"] != record["noise_seeded"]
    ):
      checks.fail(
        "sampler and noise both seeded, or neither, where steps are repeated",
        "Repeating them would show one batch under two noises, or two batches"
        " under one, which no accountant covers. Start again in an empty"
        " --workdir.",
        sampler_seeded=record["sampler_seeded"],
        noise_seeded=record["noise_seeded"],
        charged_steps=charged,
        resumed_at_step=resumed_at_step,
      )
    if resumed_at_step > charged:
      checks.fail(
        f"{path} to count the steps of the checkpoint",
        "This ledger is older than the checkpoint, so it under-counts. Restore"
        " the right one, or use an empty --workdir.",
        charged_steps=charged,
        resumed_at_step=resumed_at_step,
      )
    charged = _charged_on_restart(record, resumed_at_step)
    ledger = cls(path, record, epsilon_after=epsilon_after)
    ledger._write(charged_steps=charged, restart_at_step=resumed_at_step)
    return ledger

  @classmethod
  def follow(
    cls, record: Mapping[str, Any], *, epsilon_after: Callable[[int], float]
  ) -> "Ledger":
    """Counts as the first process does, and writes nothing.

    Its steps need the first process, which charges before it takes part, so
    nothing is released that is not on disk.

    Args:
      record: `record` of the first process's ledger.
      epsilon_after: as for `create`.
    """
    return cls(None, record, epsilon_after=epsilon_after)

  @property
  def record(self) -> dict[str, Any]:
    """What the file holds."""
    return dict(self._record)

  @property
  def charged_steps(self) -> int:
    """Steps charged so far."""
    return self._record["charged_steps"]

  @property
  def epsilon(self) -> float:
    """Upper bound on epsilon for the charged steps; inf without guarantee."""
    return float(self._record["epsilon"])

  def would_exceed(self, step: int) -> bool:
    """Whether charging `step` would raise `BudgetExhausted`."""
    budget = self._record["epsilon_budget"]
    if budget is None:
      return False
    spent = self._epsilon_after(self._charged_after(step))
    return not spent <= float(budget) * (1 + _BUDGET_ROUNDING)

  def charge(self, step: int) -> None:
    """Counts `step`, durably. Call it before the step is dispatched.

    Args:
      step: number of the step that is about to run, from 0.

    Raises:
      BudgetExhausted: the step would take epsilon above the budget.
      ValueError: `step` is negative.
      OSError: the ledger could not be written; do not run the step.
    """
    checks.non_negative(step=step)
    if self.would_exceed(step):
      after = self._charged_after(step)
      raise BudgetExhausted(
        f"Step {step} would be release {after} and take epsilon to"
        f" {self._epsilon_after(after):.6g}, above the budget of"
        f" {self._record['epsilon_budget']} (delta {self._record['delta']})."
        f" Spent so far: {self.epsilon:.6g} in {self.charged_steps} steps, of"
        " which a restart may have repeated some. The model so far is within"
        " the budget; training further needs a larger one, in a new --workdir."
      )
    self._write(charged_steps=self._charged_after(step))

  def _charged_after(self, step: int) -> int:
    """The count when `step` has been charged too."""
    if self._record["sampler_seeded"] and self._record["noise_seeded"]:
      return max(self.charged_steps, step + 1)
    return self.charged_steps + 1

  def _write(
    self, *, charged_steps: int, restart_at_step: int | None = None
  ) -> None:
    """Writes the new state; only then believes it."""
    record: dict[str, Any] = {
      **self._record,
      "charged_steps": charged_steps,
      "epsilon": records.to_plain(self._epsilon_after(charged_steps)),
    }
    if restart_at_step is not None:
      restart = {
        "resumed_at_step": restart_at_step,
        "charged_steps": charged_steps,
        "time": datetime.datetime.now(datetime.UTC).isoformat(),
      }
      record["history"] = [*record["history"], restart]
    if self.path is None:
      self._record = record
      return
    if self.path.exists():
      previous = self.path.with_name(self.path.name + ".previous")
      records.write_bytes(previous, self.path.read_bytes())
    records.write_json(self.path, record)
    self._record = record


def _charged_on_restart(record: Mapping[str, Any], resumed_at_step: int) -> int:
  """The count with which a restarted run begins; never below the old one."""
  charged = record["charged_steps"]
  if record["sampler_seeded"] and record["noise_seeded"]:
    return charged  # It goes on in the same cycle, bit for bit.
  last = record["history"][-1] if record["history"] else {}
  if last.get("charged_steps") == charged > 0 and (
    last.get("resumed_at_step") == resumed_at_step
  ):
    return charged  # Nothing was released since the last restart.
  cycle = record.get("steps_per_release", 1)
  return -(-charged // cycle) * cycle + resumed_at_step % cycle


def read(path: pathlib.Path) -> dict[str, Any]:
  """Reads a ledger for a report or a summary, and checks its form.

  Raises:
    ValueError: the file is missing, damaged, or no ledger.
  """
  path = pathlib.Path(path)
  remedy = (
    f"{path.name}.previous, if it is there, is the state before the last"
    " charge: using it under-counts. Without the ledger nobody can say what"
    " was spent; start again in an empty --workdir."
  )
  if not path.exists():
    checks.fail("a privacy ledger", remedy, missing_file=str(path))
  try:
    record = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:  # Not JSON, or not UTF-8.
    raise ValueError(
      f"Expected {path} to hold JSON, but it is damaged ({error}). {remedy}"
    ) from error
  if not isinstance(record, dict):
    checks.fail(f"{path} to hold a JSON object", remedy, found=type(record))
  fields = (*_CLAIM_FIELDS, *_STATE_FIELDS)
  missing = [name for name in fields if name not in record]
  if missing:
    checks.fail(f"{path} to be a whole ledger", remedy, missing=missing)
  charged = record["charged_steps"]
  if type(charged) is not int or charged < 0:
    checks.fail(f"{path} to count steps", remedy, charged_steps=charged)
  try:
    is_bound = not math.isnan(float(record["epsilon"]))
  except (TypeError, ValueError):
    is_bound = False
  if not is_bound or not isinstance(record["history"], list):
    checks.fail(
      f"{path} to be a whole ledger",
      remedy,
      epsilon=record["epsilon"],
      history=record["history"],
    )
  return record
