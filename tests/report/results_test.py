"""The table of results: numbers from records alone, holes, tests, formats."""

import csv
import json
import math

import pytest

from ppnet.report import results

_TASKS, _ROWS = ("fsdd", "reviews"), ("plain", "private")


def write_cell(
  root, task, row, *, accuracies, epsilon="inf", bound=0.0, exceeds=False
):
  folder = root / task / row
  folder.mkdir(parents=True)
  record = {
    "claim": {"epsilon": epsilon},
    "utility": [{"accuracy": value} for value in accuracies],
    "membership": {"by_model": [{"leakage": 0.1}] * len(accuracies)},
    "bounds": [{"epsilon": bound, "exceeds": exceeds}] * (bound is not None),
  }
  (folder / "audit.json").write_text(json.dumps(record))


def collect(root, *, baseline="plain"):
  found = [
    results.read_cell(root / task / row, task=task, row=row)
    for task in _TASKS
    for row in _ROWS
  ]
  return results.collect(
    [cell for cell in found if cell is not None],
    title="Results",
    tasks=_TASKS,
    rows=_ROWS,
    baseline=baseline,
  )


@pytest.fixture
def root(tmp_path):
  write_cell(tmp_path, "fsdd", "plain", accuracies=(0.9, 0.92, 0.91))
  write_cell(
    tmp_path,
    "fsdd",
    "private",
    accuracies=(0.8, 0.821, 0.811),
    epsilon=7.9991,
    bound=1.239,
  )
  write_cell(tmp_path, "reviews", "plain", accuracies=(0.7, 0.6, 0.8))
  return tmp_path


def test_cells_say_mean_interval_claim_and_bound(root):
  found = collect(root)
  plain, private, _, hole = results.lines(found)
  assert plain[2] == "0.910 ± 0.025"
  assert private[2] == "0.811 ± 0.026 †"  # Paired: far apart.
  assert plain[-2:] == ["∞", "0.00"]
  # A claim is rounded up, a lower bound down.
  assert private[-2:] == ["8.00", "1.23"]
  assert private[3] == "–"  # No F1 in the records.
  assert set(hole[2:]) == {"–"}


def test_a_missing_record_is_named(root):
  found = collect(root)
  assert found.holes == [("reviews", "private")]
  assert "no record: reviews, private" in results.markdown(found)
  # Fails if: a hole counts as zero, or its row is left out.


def test_a_bound_above_the_claim_is_said_aloud(tmp_path):
  # A bound that assumes a Gaussian curve has a larger claim of its own.
  write_cell(tmp_path, "fsdd", "plain", accuracies=(0.5,), epsilon=1, bound=1.1)
  assert "CONTRADICTS" not in results.markdown(collect(tmp_path))
  write_cell(
    tmp_path,
    "fsdd",
    "private",
    accuracies=(0.5,),
    epsilon=1.0,
    bound=1.4,
    exceeds=True,
  )
  assert "CONTRADICTS THE CLAIM: fsdd, private" in results.markdown(
    collect(tmp_path)
  )


def test_tests_are_corrected_over_the_whole_table(root):
  write_cell(root, "reviews", "private", accuracies=(0.7, 0.61, 0.79))
  found = collect(root)
  # Accuracy and leakage of two tasks.
  assert len(found.p_values) == 4
  p_value = found.p_values["fsdd", "private", "accuracy"]
  assert 0 < p_value < 0.001
  assert found.p_values["reviews", "private", "accuracy"] == 1.0
  assert not collect(root, baseline="").p_values


def test_runs_that_are_no_pairs_are_refused(root):
  write_cell(root, "reviews", "private", accuracies=(0.7, 0.61))
  with pytest.raises(ValueError, match="paired runs"):
    collect(root)


def test_all_formats_hold_the_same_numbers(root):
  found = collect(root)
  text = results.write(found, root)
  assert (root / "table.md").read_text() == text + "\n"
  with (root / "table.csv").open() as file:
    rows = list(csv.DictReader(file))
  assert [row["accuracy"] for row in rows[3:6]] == ["0.8", "0.821", "0.811"]
  assert rows[0]["epsilon"] == "inf"
  record = json.loads((root / "table.json").read_text())
  assert record["holes"] == [["reviews", "private"]]
  assert record["rows"][1]["accuracy"] == [0.8, 0.821, 0.811]
  assert record["rows"][0]["epsilon"] == "inf"
  latex = (root / "table.tex").read_text()
  assert r"private & 0.811 $\pm$ 0.026 $^\dagger$" in latex
  assert latex.count(r"\midrule") == 2  # Under the header, between tasks.


def test_what_an_audit_did_not_find_is_no_number(tmp_path):
  write_cell(
    tmp_path, "fsdd", "plain", accuracies=(0.5, 0.6), epsilon=2.0, bound=None
  )
  cell = results.read_cell(
    tmp_path / "fsdd" / "plain", task="fsdd", row="plain"
  )
  assert math.isnan(cell.claims["epsilon_lower_bound"])


def test_a_metric_that_is_not_defined_is_no_number_and_said(tmp_path):
  for task in _TASKS:
    for row in _ROWS:
      values = ("nan",) * 3 if task == "fsdd" else (0.7, 0.6, 0.8)
      write_cell(tmp_path, task, row, accuracies=values)
  found = collect(tmp_path)
  first, *_, last = results.lines(found)
  assert first[2] == "–"
  assert last[2].startswith("0.700 ±")
  said = " ".join(results.notes(found))
  assert "– not defined on the test split: " in said
  assert "accuracy on fsdd" in said
  assert "accuracy on reviews" not in said
  # Fails if: a class without test records ends the whole table.
