"""Utility and leakage over a knob: what the figure shows is in the records."""

import math

import numpy as np
import pytest

from ppnet.report import results, tradeoff


def cell(row, accuracies, *, epsilon):
  return results.Cell(
    task="fsdd",
    row=row,
    values={"accuracy": accuracies, "leakage": [0.1, 0.2]},
    claims={"epsilon": epsilon, "epsilon_lower_bound": 0.0},
    record={"epsilon": "inf" if math.isinf(epsilon) else epsilon},
  )


def drawn_points(container):
  """x and y of an error bar's points."""
  return [np.asarray(v, float) for v in container.lines[0].get_data()]


@pytest.fixture
def found():
  cells = [
    cell("plain", [0.9, 0.7], epsilon=math.inf),
    cell("dp_8", [0.6, 0.8], epsilon=7.9),
    cell("dp_1", [0.3, 0.5], epsilon=1.0),
  ]
  return results.collect(
    cells,
    title="",
    tasks=("fsdd", "reviews"),
    rows=("plain", "dp_8", "dp_1"),
    baseline="",
  )


def test_points_are_means_in_the_order_of_the_knob(found, tmp_path):
  knobs = {
    key: tradeoff.knob_of(value, {}, "epsilon")
    for key, value in found.cells.items()
  }
  fig = tradeoff.draw(found, knobs, field="epsilon")
  left, right = fig.axes  # The task without a record has no panel.
  finite, infinite = [drawn_points(c) for c in left.containers]
  np.testing.assert_allclose(finite[1], [0.4, 0.7])
  np.testing.assert_allclose(infinite[1], [0.8])
  # No guarantee is no point on a line of guarantees.
  assert infinite[0][0] > finite[0][-1] + 1
  np.testing.assert_allclose(drawn_points(right.containers[0])[1], 0.15)
  labels = [text.get_text() for text in left.get_xticklabels()]
  assert labels == ["1", "7.9", "∞"]
  path = tradeoff.write(found, knobs, field="epsilon", workdir=tmp_path)
  assert path.exists()
  assert path.with_suffix(".pdf").exists()


def test_a_knob_of_the_configuration(found):
  config = {"config": {"attention_noise": {"stddev": 0.25}}}
  one = found.cells["fsdd", "dp_1"]
  assert tradeoff.knob_of(one, config, "attention_noise.stddev") == 0.25
  assert math.isnan(tradeoff.knob_of(one, config, "attention_noise.typo"))
