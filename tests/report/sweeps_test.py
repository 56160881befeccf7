"""The summary of a sweep: states from folders, and what choosing costs."""

import json
import math
import re

import pytest

from ppnet import config as config_lib
from ppnet.core import records
from ppnet.privacy import selection
from ppnet.report import sweeps

PUBLIC, PRIVATE = config_lib.Tuning.PUBLIC, config_lib.Tuning.PRIVATE


def folders(root, ledgers, **files):
  found = {}
  for number, ledger in enumerate(ledgers):
    folder = root / f"run-{number}"
    folder.mkdir()
    if ledger is not None:
      (folder / "privacy.json").write_text(json.dumps(ledger))
    for name in files.get(f"of_{number}", ()):
      (folder / name).write_text('{"accuracy": 0.75, "seed": 99}')
    found[(f"seed={number}",)] = folder
  return found


def ledger(noise_multiplier=2.0, **changes):
  return {
    "noise_multiplier": noise_multiplier,
    "sampling_prob": 0.25,
    "sampler": "POISSON",
    "noise_mechanism": "INDEPENDENT",
    "neighboring_relation": "ADD_OR_REMOVE_ONE",
    "clip_quantile": None,
    "delta": 1e-5,
    "num_steps": 100,
    "charged_steps": 100,
    "has_guarantee": True,
  } | changes


def test_states_are_read_from_the_folders(tmp_path):
  runs = folders(
    tmp_path,
    [ledger(), ledger(charged_steps=7), None, None],
    of_0=("config.json", "summary.json"),
    of_1=("config.json",),
    of_2=("config.json", "failed.json"),
  )
  found = sweeps.rows(runs)
  assert [row["state"] for row in found] == [
    "finished",
    "begun",
    "failed",
    "waiting",
  ]
  assert [row.get("charged_steps") for row in found] == [100, 7, None, None]
  # What was asked for stands, whatever the summary calls by that name.
  assert (found[0]["accuracy"], found[0]["seed"]) == (0.75, "0")
  assert "accuracy" not in found[1]


def test_the_summary_is_a_table_and_a_record(tmp_path):
  runs = folders(tmp_path, [ledger(), None], of_0=("summary.json",))
  text = sweeps.write(runs, tmp_path, tuning=PRIVATE)
  assert "1 finished, 0 failed, 0 begun, 1 waiting, of 2 runs." in text
  assert "0.75" in (tmp_path / "sweep.md").read_text()
  (heading,) = [line for line in text.splitlines() if "noise mult" in line]
  headings = re.split(" {2,}", heading.strip())
  assert len(set(headings)) == len(headings)  # Two are of steps.
  assert "Papernot and Steinke 2022" in text
  record = records.read_json(tmp_path / "sweep.json")
  assert record["counts"]["waiting"] == 1
  assert record["choosing"]["tuning"] == "PRIVATE"
  assert record["choosing"]["epsilon_all"] > 0


def test_the_summary_has_means_and_a_curve(tmp_path):
  runs = {}
  for number, (batch, seed) in enumerate(
    (b, s) for b in (8, 16) for s in (0, 1)
  ):
    folder = tmp_path / f"run-{number}"
    folder.mkdir()
    summary = {"bits_per_byte": 3 + number / 4, "epsilon": 1.0}
    (folder / "summary.json").write_text(json.dumps(summary))
    runs[(f"train.expected_batch_size={batch}", f"seed={seed}")] = folder
  text = sweeps.write(runs, tmp_path, tuning=PUBLIC)
  assert "3.1250 ± 1.5883" in text
  assert "accuracy" not in text  # None of these runs has it.
  markdown = (tmp_path / "sweep.md").read_text()
  assert "3.6250 ± 1.5883" in markdown
  assert "(figures/sweep.png)" in markdown
  assert (tmp_path / "figures" / "sweep.png").stat().st_size > 0
  means = records.read_json(tmp_path / "sweep.json")["means"]
  assert [group["runs"] for group in means] == [2, 2]
  # Fails if: whoever repeats a record has to compute its interval by hand.


def test_all_compose_and_the_worst_bounds_the_best(tmp_path):
  runs = folders(tmp_path, [ledger(2.0), ledger(4.0, charged_steps=50), None])
  found = sweeps.cost(list(runs.values()), num_runs=3, tuning=PRIVATE)
  one = {
    noise: selection.curve(
      noise_multiplier=noise, sampling_prob=0.25, num_steps=steps
    )
    for noise, steps in ((2.0, 100), (4.0, 50))
  }
  assert found["epsilon_all"] == pytest.approx(
    selection.epsilon(one[2.0] + one[4.0], delta=1e-5)
  )
  assert found["epsilon_best_poisson"] == pytest.approx(
    selection.epsilon(
      selection.best_of_poisson(one[2.0], mean_runs=3), delta=1e-5
    )
  )
  assert found["epsilon_best_geometric"] > selection.epsilon(
    one[2.0], delta=1e-5
  )
  # Fails if: a single run's epsilon is told as the cost of a choice.


def test_public_choices_cost_nothing_and_say_so(tmp_path):
  runs = folders(tmp_path, [ledger()])
  found = sweeps.cost(list(runs.values()), num_runs=1, tuning=PUBLIC)
  assert "public data alone" in found["sentence"]
  assert "ε" not in found["sentence"]


def test_a_run_without_a_guarantee_leaves_none(tmp_path):
  without = ledger(0.0, has_guarantee=False, sampler="SHUFFLE")
  runs = folders(tmp_path, [ledger(), without])
  found = sweeps.cost(list(runs.values()), num_runs=2, tuning=PRIVATE)
  assert math.isinf(found["epsilon_all"])
  assert math.isinf(found["epsilon_best_poisson"])
  assert "∞" in found["sentence"]


@pytest.mark.parametrize(
  ("ledgers", "why"),
  [
    ([None], "no run has a ledger"),
    ([ledger(sampler="BALLS_IN_BINS")], "sampler=BALLS_IN_BINS"),
    ([ledger(), ledger(noise_mechanism="BANDED")], "noise_mechanism=BANDED"),
    ([ledger(clip_quantile=0.5)], "clip_quantile=0.5"),
  ],
)
def test_what_is_not_known_is_not_made_up(tmp_path, ledgers, why):
  runs = folders(tmp_path, ledgers)
  found = sweeps.cost(list(runs.values()), num_runs=2, tuning=PRIVATE)
  assert found["epsilon_all"] is None
  assert why in found["sentence"]
