"""Tests of the ledger: it must never count fewer steps than were released."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from ppnet.core import records
from ppnet.privacy import ledger

_CLAIM = {
  "noise_multiplier": 1.25,
  "sampling_prob": 0.125,
  "sampler": "POISSON",
  "accountant": "PLD",
  "neighboring_relation": "ADD_OR_REMOVE_ONE",
  "unit": "EXAMPLE",
  "delta": 1e-6,
  "epsilon_budget": 3.0,
  "sensitivity": 1.5,
  "num_examples": 800,
  "expected_batch_size": 100,
  "sampler_seeded": False,
  "noise_seeded": False,
  "guarantee": "A sentence.",
}


def _epsilon_after(steps):
  """Reaches the budget at 30 steps."""
  return 0.1 * steps


def _create(path, epsilon_after=_epsilon_after, **changes):
  return ledger.Ledger.create(
    path, {**_CLAIM, **changes}, epsilon_after=epsilon_after
  )


def _load(path, resumed_at_step=0, epsilon_after=_epsilon_after, **changes):
  return ledger.Ledger.load(
    path,
    {**_CLAIM, **changes},
    epsilon_after=epsilon_after,
    resumed_at_step=resumed_at_step,
  )


def test_charge_is_on_disk_when_it_returns(tmp_path):
  path = tmp_path / "privacy.json"
  book = _create(path)
  assert ledger.read(path)["charged_steps"] == 0
  for step in range(4):
    book.charge(step)
    on_disk = ledger.read(path)
    assert on_disk["charged_steps"] == book.charged_steps == step + 1
    assert on_disk["epsilon"] == book.epsilon == _epsilon_after(step + 1)
    previous = json.loads((tmp_path / "privacy.json.previous").read_text())
    assert previous["charged_steps"] == step
  # Fails if: charge returns before it has written.


def test_record_holds_the_claim_and_the_history(tmp_path):
  path = tmp_path / "privacy.json"
  book = _create(path)
  for step in range(5):
    book.charge(step)
  _load(path, resumed_at_step=3)
  record = ledger.read(path)
  assert {name: record[name] for name in _CLAIM} == _CLAIM
  assert [
    (entry["resumed_at_step"], entry["charged_steps"])
    for entry in record["history"]
  ] == [(0, 0), (3, 5)]
  assert all(entry["time"].endswith("+00:00") for entry in record["history"])


@pytest.mark.parametrize(("seeded", "expected"), [(False, 9), (True, 6)])
def test_repeated_steps_are_new_releases_unless_seeded(
  tmp_path, seeded, expected
):
  path = tmp_path / "privacy.json"
  seeds = {"sampler_seeded": seeded, "noise_seeded": seeded}
  book = _create(path, **seeds)
  for step in range(5):
    book.charge(step)
  book = _load(path, resumed_at_step=2, **seeds)
  assert book.charged_steps == 5
  for step in range(2, 6):
    book.charge(step)
  assert book.charged_steps == ledger.read(path)["charged_steps"] == expected
  # Fails if: steps repeated with fresh noise are not charged again.


@pytest.mark.parametrize("which", ["sampler_seeded", "noise_seeded"])
def test_same_batch_or_same_noise_is_not_reused(tmp_path, which):
  path = tmp_path / "privacy.json"
  book = _create(path, **{which: True})
  for step in range(5):
    book.charge(step)
  before = path.read_bytes()
  with pytest.raises(ValueError, match="one batch under two noises"):
    _load(path, resumed_at_step=4, **{which: True})
  assert path.read_bytes() == before
  assert _load(path, resumed_at_step=5, **{which: True}).charged_steps == 5
  # Fails if: two releases of one Poisson draw are charged as two draws.


@pytest.mark.parametrize(
  ("resumed_at_step", "expected"), [(4, 8), (6, 10), (7, 11)]
)
def test_restart_inside_a_cycle_is_charged_to_its_ends(
  tmp_path, resumed_at_step, expected
):
  path = tmp_path / "privacy.json"
  book = _create(path, steps_per_release=4)
  for step in range(7):
    book.charge(step)
  book = _load(path, resumed_at_step=resumed_at_step, steps_per_release=4)
  assert book.charged_steps == expected  # 8 for the cut cycle; then its start.
  again = _load(path, resumed_at_step=resumed_at_step, steps_per_release=4)
  assert again.charged_steps == expected  # No step came in between.
  seeds = {"sampler_seeded": True, "noise_seeded": True}
  other = tmp_path / "seeded.json"
  book = _create(other, steps_per_release=4, **seeds)
  for step in range(7):
    book.charge(step)
  book = _load(other, resumed_at_step=6, steps_per_release=4, **seeds)
  assert book.charged_steps == 7
  # Fails if: an example that falls into two bins of one cycle is charged once.


def test_budget_stops_the_run_before_writing(tmp_path):
  path = tmp_path / "privacy.json"
  book = _create(path)
  for step in range(30):
    assert not book.would_exceed(step)
    book.charge(step)
  before = path.read_bytes()
  assert book.would_exceed(30)
  with pytest.raises(ledger.BudgetExhausted, match="budget of 3.0"):
    book.charge(30)
  assert path.read_bytes() == before
  assert book.charged_steps == 30
  # Fails if: the step that crosses the budget is still charged and run.


def test_restarts_use_up_the_budget(tmp_path):
  path = tmp_path / "privacy.json"
  book = _create(path)
  for step in range(20):
    book.charge(step)
  book = _load(path, resumed_at_step=8)
  for step in range(8, 18):
    book.charge(step)
  with pytest.raises(ledger.BudgetExhausted):
    book.charge(18)
  # Fails if: the budget is compared with the step number.


def test_rounding_of_the_budget_does_not_stop_a_calibrated_run(tmp_path):
  book = _create(
    tmp_path / "privacy.json",
    epsilon_after=lambda steps: 3.0 * (1 + 1e-12) if steps else 0.0,
  )
  book.charge(0)


def test_nan_epsilon_never_passes_for_within_budget(tmp_path):
  book = _create(
    tmp_path / "privacy.json",
    epsilon_after=lambda steps: math.nan if steps else 0.0,
  )
  with pytest.raises(ledger.BudgetExhausted):
    book.charge(0)
  # Fails if: the comparison is `spent > budget`.


def test_without_guarantee_epsilon_is_infinite_and_nothing_stops(tmp_path):
  path = tmp_path / "privacy.json"
  changes = {"epsilon_budget": None, "sensitivity": math.inf}
  infinite = lambda steps: math.inf
  book = _create(path, epsilon_after=infinite, **changes)
  book.charge(0)
  assert ledger.read(path)["epsilon"] == ledger.read(path)["sensitivity"]
  assert ledger.read(path)["epsilon"] == "inf"
  book = _load(path, epsilon_after=infinite, **changes)
  assert book.epsilon == math.inf
  # Fails if: a run without a guarantee records a finite epsilon.


@pytest.mark.parametrize("name", sorted(set(_CLAIM) - {"guarantee"}))
def test_other_mechanism_is_refused_by_name(tmp_path, name):
  path = tmp_path / "privacy.json"
  _create(path)
  before = path.read_bytes()
  with pytest.raises(ValueError, match=f"recorded_{name}=.*this_{name}="):
    _load(path, **{name: "something else"})
  assert path.read_bytes() == before
  # Fails if: a run continues another mechanism's ledger.


def test_unknown_and_missing_claims_are_refused(tmp_path):
  path = tmp_path / "privacy.json"
  _create(path)
  with pytest.raises(ValueError, match="recorded_new_knob='nothing'"):
    _load(path, new_knob=1)
  with pytest.raises(ValueError, match=r"missing=\['delta'\]"):
    ledger.Ledger.create(
      tmp_path / "other.json",
      {name: _CLAIM[name] for name in _CLAIM if name != "delta"},
      epsilon_after=_epsilon_after,
    )


def test_reworded_guarantee_is_accepted(tmp_path):
  path = tmp_path / "privacy.json"
  _create(path)
  _load(path, guarantee="Another sentence.")


def test_ledger_behind_the_checkpoint_is_refused(tmp_path):
  path = tmp_path / "privacy.json"
  book = _create(path)
  book.charge(0)
  with pytest.raises(ValueError, match="older than the checkpoint"):
    _load(path, resumed_at_step=2)
  # Fails if: a ledger copied from an earlier moment is continued.


def test_existing_ledger_is_not_overwritten(tmp_path):
  path = tmp_path / "privacy.json"
  _create(path).charge(0)
  with pytest.raises(ValueError, match="no ledger yet"):
    _create(path)
  assert ledger.read(path)["charged_steps"] == 1
  # Fails if: starting again resets the count.


def _cut(text):
  return text[: len(text) // 2]


@pytest.mark.parametrize(
  "damage",
  [
    lambda text: "",
    _cut,
    lambda text: "[]",
    lambda text: "null",
    lambda text: "\x00" * len(text),
    lambda text: text.replace('"charged_steps"', '"charged"'),
    lambda text: text.replace(
      '"charged_steps": 2,\n  "e', '"charged_steps": -2,\n  "e'
    ),
    lambda text: text.replace(
      '"charged_steps": 2,\n  "e', '"charged_steps": "2",\n  "e'
    ),
    lambda text: text.replace('"epsilon": 0.2', '"epsilon": "nan"'),
    lambda text: text.replace('"epsilon": 0.2', '"epsilon": null'),
    lambda text: text.replace('"unit"', '"units"'),
  ],
)
def test_damaged_ledger_is_refused(tmp_path, damage):
  path = tmp_path / "privacy.json"
  book = _create(path)
  book.charge(0)
  book.charge(1)
  text = path.read_text()
  path.write_text(damage(text))
  assert path.read_text() != text
  with pytest.raises(ValueError, match=r"privacy\.json"):
    _load(path)
  # Fails if: a damaged ledger is read as a fresh one.


def test_missing_ledger_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r"missing_file=.*privacy\.json"):
    _load(tmp_path / "privacy.json")


def test_negative_step_is_named(tmp_path):
  with pytest.raises(ValueError, match="step"):
    _create(tmp_path / "privacy.json").charge(-1)


@pytest.mark.parametrize("call", ["fsync", "replace", "open", "fdopen"])
@pytest.mark.parametrize("nth", [1, 2, 3, 4])
def test_failed_write_never_under_counts(tmp_path, monkeypatch, call, nth):
  path = tmp_path / "privacy.json"
  book = _create(path)
  released = 0
  real, seen = getattr(os, call), [0]

  def failing(*args, **kwargs):
    seen[0] += 1
    if seen[0] % 7 == nth:
      raise OSError(28, "No space left on device")
    return real(*args, **kwargs)

  monkeypatch.setattr(records.os, call, failing)
  failures = 0
  for step in range(10):
    try:
      book.charge(step)
    except OSError:
      failures += 1
    else:
      released += 1
    on_disk = ledger.read(path)["charged_steps"]
    assert on_disk >= released
    assert book.charged_steps >= released
  assert failures
  assert released
  monkeypatch.undo()
  assert _load(path).charged_steps >= released
  # Fails if: charge swallows an error of the disk.


_CHARGE_LOOP = """
import os, sys
from ppnet.privacy import ledger
folder, claim = sys.argv[1], {claim!r}
path = os.path.join(folder, "privacy.json")
load = dict(epsilon_after=lambda steps: 0.0)
if os.path.exists(path):
  book = ledger.Ledger.load(path, claim, resumed_at_step=0, **load)
else:
  book = ledger.Ledger.create(path, claim, **load)
with open(os.path.join(folder, "released"), "ab", buffering=0) as file:
  os.write(1, b"ready")
  for step in range(10**6):
    book.charge(step)
    file.write(b".")
"""


def test_killed_run_never_under_counts(tmp_path):
  script = _CHARGE_LOOP.format(claim=_CLAIM)
  delays = random.Random(0)
  for _ in range(8):
    process = subprocess.Popen(
      [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE
    )
    with process:
      process.stdout.read(5)
      time.sleep(delays.uniform(0, 0.1))
      process.send_signal(signal.SIGKILL)
    released = (tmp_path / "released").stat().st_size
    charged = ledger.read(tmp_path / "privacy.json")["charged_steps"]
    assert released <= charged <= released + 8  # One lost step for each kill.
  assert released > 0
  # Fails if: the step is released before it is charged.
