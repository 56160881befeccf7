"""Tables say what a record says, and never a stronger guarantee."""

import csv
import math
import subprocess
import sys

import hypothesis
import pytest
from hypothesis import strategies as st

from ppnet.report import tables

_SUMMARY = {
  "accuracy": 0.9189,
  "f1": 0.9066,
  "auc_roc": 0.9897,
  "epsilon": 7.9812,
  "delta": 1e-5,
  "noise_multiplier": 1.1289,
  "num_steps": 1500,
  "charged_steps": 1500,
  "nonprivate/clipped_fraction": 0.8125,
  "leakage": None,
  "guarantee": "Nobody learns much.",
  "neighboring_relation": "ADD_OR_REMOVE_ONE",
  "seeded": False,
}


def _line(text: str, label: str) -> str:
  """The one line that starts with `label`, without it."""
  (line,) = [line for line in text.splitlines() if line.startswith(label)]
  return line.removeprefix(label).strip()


def test_summary_table_shows_every_number():
  text = tables.summary_table(_SUMMARY)
  assert _line(text, "accuracy") == "0.9189"
  assert _line(text, "macro F1") == "0.9066"
  assert _line(text, "AUC-ROC") == "0.9897"
  assert _line(text, "ε") == "7.99  (add or remove one)"
  assert _line(text, "δ") == "1e-5"
  assert _line(text, "noise multiplier") == "1.129"
  assert _line(text, "steps") == "1,500"
  assert _line(text, "clipped fraction †") == "81.2%"
  assert "Guarantee: Nobody learns much." in text
  assert "leakage" not in text
  assert "charged" not in text  # README shows the rows that there are.
  assert tables.SEEDED_MARK not in text


def test_summary_table_aligns_its_values():
  lines = tables.summary_table(_SUMMARY).splitlines()[:8]
  starts = {len(line) - len(line.split("  ", 1)[1].lstrip()) for line in lines}
  assert len(starts) == 1


def test_summary_table_shows_leakage_of_an_audited_run():
  summary = _SUMMARY | {"leakage": 0.031, "nonprivate/clipped_fraction": None}
  text = tables.summary_table(summary)
  assert _line(text, "leakage (membership advantage) †") == "0.0310"
  assert "not covered by the guarantee" in text  # Attacks read training data.


def test_summary_table_says_that_there_is_no_guarantee():
  text = tables.summary_table(_SUMMARY | {"epsilon": "inf"})
  assert _line(text, "ε") == "∞  (no guarantee)"
  assert _line(text, "δ") == tables.HOLE
  # Fails if: "inf" from the record is printed as a number or a hole.


def test_summary_table_marks_a_seeded_run():
  text = tables.summary_table(_SUMMARY | {"seeded": True})
  assert _line(text, "ε").startswith("7.99*")
  assert "knows the seed" in text
  # Fails if: the mark is dropped, as the table of an honest run has none.


def test_summary_table_of_an_empty_record_is_holes():
  text = tables.summary_table({})
  assert _line(text, "accuracy") == tables.HOLE
  assert _line(text, "ε").startswith(tables.HOLE)


@hypothesis.given(st.floats(min_value=1e-6, max_value=1e4))
def test_epsilon_is_never_rounded_down(epsilon):
  shown = float(tables.format_epsilon(epsilon))
  assert shown >= epsilon * (1 - 1e-9) - 1e-9
  assert shown <= epsilon + max(0.0100001, 0.2 * epsilon)
  # Fails if: format_epsilon uses round() or "%.2f".


@pytest.mark.parametrize(
  ("epsilon", "text"),
  [(0.0, "0.00"), (8.0, "8.00"), (8.000000000000002, "8.00"), (8.001, "8.01")],
)
def test_epsilon_keeps_round_numbers(epsilon, text):
  assert tables.format_epsilon(epsilon) == text
  assert tables.format_epsilon(math.nan) == tables.HOLE


def test_sweep_table_has_holes_marks_and_words():
  rows = [
    {"privacy.epsilon": 1, "clip": "NONE", "epsilon": "inf", "accuracy": 0.5},
    {"privacy.epsilon": 10, "clip": "PER_EXAMPLE", "epsilon": 9.991,
     "seeded": True},
  ]  # fmt: skip
  text = tables.sweep_table(rows, ["clip", "epsilon", "accuracy"])
  header, rule, first, second, *notes = text.splitlines()
  assert header.split() == ["clip", "ε", "accuracy"]
  assert set(rule) == {"-", " "}
  assert first.split() == ["NONE", "∞", "0.5000"]
  assert second.split() == ["PER_EXAMPLE", "10.00*", tables.HOLE]
  assert "knows the seed" in " ".join(notes)
  assert first.startswith("NONE ")  # Words to the left,
  assert first.endswith("  0.5000")  # numbers to the right.


def test_sweep_table_of_no_runs_is_a_header():
  assert len(tables.sweep_table([], ["seed", "f1"]).splitlines()) == 2
  with pytest.raises(ValueError, match="one column or more"):
    tables.sweep_table([{"seed": 1}], [])


def test_sweep_table_says_what_no_guarantee_covers():
  rows = [{"seed": 1, "leakage": 0.25}]
  last = tables.sweep_table(rows, ["seed", "leakage"]).splitlines()[-1]
  assert last.startswith("†")
  assert "†" not in tables.sweep_table(rows, ["seed"])


def test_sweep_table_leaves_seeds_whole():
  assert "12345" in tables.sweep_table([{"seed": 12345}], ["seed"])


def test_write_csv_keeps_every_digit(tmp_path):
  rows = [
    {"seed": 0, "epsilon": math.inf, "name": 'a "b", c'},
    {"seed": 1, "epsilon": 7.123456789012345, "name": None},
  ]
  path = tmp_path / "table.csv"
  tables.write_csv(path, rows, columns=["seed", "epsilon", "name", "missing"])
  with path.open(newline="") as file:
    read = list(csv.reader(file))
  assert read[0] == ["seed", "epsilon", "name", "missing"]
  assert read[1] == ["0", "inf", 'a "b", c', ""]
  assert float(read[2][1]) == rows[1]["epsilon"]
  assert read[2][2:] == ["", ""]


def test_report_runs_without_jax():
  code = (
    "import sys; from ppnet.report import figures, tables;"
    "sys.exit('jax' in sys.modules)"
  )
  subprocess.run([sys.executable, "-c", code], check=True)


def test_scores_are_those_of_the_task():
  words = tables.summary_table({"bits_per_byte": 2.5, "perplexity": 12.0})
  assert "bits per byte" in words
  assert "2.5000" in words
  assert "accuracy" not in words
  assert "bits per byte" not in tables.summary_table({"accuracy": 0.5})
