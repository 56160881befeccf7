"""Curves of disturbed models: what is drawn is in the records."""

import numpy as np
import pytest

from ppnet.report import figures, results, robustness


def cell(row, accuracies, *, left_out=None):
  measured = {
    "input_noise": {
      "kind": "stddev",
      "levels": [0.0, 1.0],
      "accuracy": accuracies,
    }
  }
  if left_out is not None:
    measured["left_out"] = {
      "levels": ["nothing", "image"],
      "accuracy": left_out,
    }
  return results.Cell(
    task="digits",
    row=row,
    values={},
    claims={"epsilon": 1.0, "epsilon_lower_bound": 0.0},
    record={"robustness": measured},
  )


def collect(cells):
  return results.collect(
    cells,
    title="",
    tasks=("digits",),
    rows=("plain", "ppnet"),
    baseline="",
  )


@pytest.fixture
def found():
  return collect(
    [
      cell("plain", [[0.9, 0.7], [0.5, 0.3]]),
      cell(
        "ppnet", [[0.8, 0.8], [0.6, 0.6]], left_out=[[0.8, 0.8], [0.2, 0.4]]
      ),
    ]
  )


def points(container):
  return [np.asarray(v, float) for v in container.lines[0].get_data()]


def test_lines_are_means_over_models(found, tmp_path):
  fig = robustness.draw(found)
  noise, left_out = fig.axes  # Nobody measured attention noise.
  plain, private = map(points, noise.containers)
  np.testing.assert_allclose(plain[1], [0.8, 0.4])
  np.testing.assert_allclose(private, [[0, 1], [0.8, 0.6]])
  (only,) = left_out.containers
  np.testing.assert_allclose(points(only)[1], [0.8, 0.3])
  labels = [text.get_text() for text in left_out.get_xticklabels()]
  assert labels == ["nothing", "image"]
  assert robustness.write(found, tmp_path).exists()


def test_nothing_measured_is_no_figure(tmp_path):
  bare = results.Cell(
    task="digits", row="plain", values={}, claims={}, record={}
  )
  assert robustness.write(collect([bare]), tmp_path) is None
  assert not (tmp_path / "figures").exists()


def test_models_differ_in_more_than_colour():
  # The ablation has eight rows in a panel, and is printed in grey.
  assert len(figures.STYLES) >= 8
  for part in zip(*figures.STYLES, strict=True):
    assert len(set(part)) == len(part)


def test_the_legend_names_all_and_hides_no_curve(found):
  fig = robustness.draw(found)
  (legend,) = fig.legends
  assert [text.get_text() for text in legend.get_texts()] == ["plain", "ppnet"]
  assert all(ax.get_legend() is None for ax in fig.axes)
