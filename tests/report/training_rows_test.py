"""Training of several runs beside each other: curves by epoch."""

import json

import numpy as np
import pytest

from ppnet.report import figures, training_rows


@pytest.fixture
def runs(tmp_path):
  """Two runs of four epochs, two steps each; one has no DP term."""
  found = {}
  for row, perturbation in (("plain", 0.0), ("ppnet", 0.5)):
    folder = tmp_path / row
    folder.mkdir()
    rows = [
      {
        "split": "train",
        "step": step,
        "epoch": step / 2,
        "epsilon": "inf" if row == "plain" else 0.1 * step,
        "nonprivate/loss/task": float(step),
        "nonprivate/loss/dp_perturbation": perturbation,
        "nonprivate/grad_norm/p10": 1.0,
        "nonprivate/grad_norm/p50": 2.0,
        "nonprivate/grad_norm/p90": 3.0,
      }
      for step in range(1, 9)
    ]
    rows += [
      {"split": "test", "step": step, "epoch": step / 2, "accuracy": step / 10}
      for step in (4, 8)
    ]
    (folder / "metrics.jsonl").write_text(
      "".join(f"{json.dumps(row)}\n" for row in rows)
    )
    found["digits", row] = figures.read(folder)
  return found


def lines(fig, title):
  (ax,) = [ax for ax in fig.axes if title in ax.get_title()]
  return {
    line.get_label(): np.array(line.get_data()) for line in ax.get_lines()
  }


def test_terms_are_epoch_means(runs):
  found = lines(training_rows.losses_figure(runs), "task loss")
  np.testing.assert_allclose(found["plain"][1], [1.5, 3.5, 5.5, 7.5])
  np.testing.assert_allclose(found["plain"][0], [0.75, 1.75, 2.75, 3.75])


def test_a_mechanism_that_is_off_has_no_curve(runs):
  found = lines(training_rows.losses_figure(runs), "DP term")
  assert list(found) == ["ppnet"]


def test_indicators_are_of_the_test_split_and_of_what_was_spent(runs):
  fig = training_rows.indicators_figure(runs)
  np.testing.assert_allclose(
    lines(fig, "accuracy")["ppnet"], [[2, 4], [0.4, 0.8]]
  )
  spent = lines(fig, "ε spent")
  assert list(spent) == ["ppnet"]  # No guarantee is no number.
  np.testing.assert_allclose(spent["ppnet"][1], 0.1 * np.arange(1, 9))


def test_figures_are_written_whole(runs, tmp_path):
  for path in training_rows.write(runs, tmp_path):
    assert path.exists()
    assert path.with_suffix(".pdf").exists()
