"""Means, intervals and paired tests."""

import math

import numpy as np
import pytest

from ppnet.report import comparison


def test_an_interval_covers_the_mean_as_often_as_it_says():
  rng = np.random.default_rng(0)
  hits = 0
  for values in rng.normal(3.0, 2.0, size=(4000, 5)):
    mean, half = comparison.interval(values, confidence=0.9)
    hits += abs(mean - 3.0) <= half
  # Four standard deviations of the count. A normal quantile covers 0.83.
  assert abs(hits / 4000 - 0.9) < 4 * math.sqrt(0.09 / 4000)


def test_one_run_has_no_interval():
  mean, half = comparison.interval([0.5])
  assert mean == 0.5
  assert math.isnan(half)


@pytest.mark.parametrize("values", [[], [0.5, math.nan], [math.inf]])
def test_a_mean_of_nothing_is_refused(values):
  with pytest.raises(ValueError, match="finite value"):
    comparison.interval(values)


def test_pairs_show_a_difference_that_the_spread_hides():
  rng = np.random.default_rng(1)
  seeds = rng.normal(0.0, 1.0, size=8)
  better = seeds + 0.1 + rng.normal(0, 0.01, size=8)
  assert comparison.paired_p_value(better, seeds) < 1e-6
  assert comparison.paired_p_value(better, np.roll(seeds, 1)) > 0.1


def test_equal_hypotheses_are_rejected_as_often_as_alpha():
  rng = np.random.default_rng(2)
  draws = rng.normal(size=(2, 4000, 6))
  p_values = [
    comparison.paired_p_value(a, b) for a, b in zip(*draws, strict=True)
  ]
  assert abs(np.mean(np.array(p_values) < 0.1) - 0.1) < 4 * math.sqrt(
    0.09 / 4000
  )


@pytest.mark.parametrize(
  ("values", "others", "p_value"),
  [([1, 2], [1, 2], 1.0), ([2, 3], [1, 2], 0.0), ([1], [2], math.nan)],
)
def test_differences_without_a_spread(values, others, p_value):
  found = comparison.paired_p_value(values, others)
  np.testing.assert_equal(found, p_value)


def test_runs_that_are_no_pairs_are_refused():
  with pytest.raises(ValueError, match="values=2, others=3"):
    comparison.paired_p_value([1, 2], [1, 2, 3])


def test_holm_keeps_order_and_the_family_s_error():
  assert comparison.holm({"a": 0.5, "b": 0.9, "c": 0.4})["c"] == 1.0
  missing = comparison.holm({"a": 0.02, "b": math.nan})
  assert missing["a"] == 0.02  # A test that was not made corrects nothing.
  assert math.isnan(missing["b"])
  rng = np.random.default_rng(3)
  rejected = [
    min(comparison.holm(dict(enumerate(row))).values()) <= 0.05
    for row in rng.uniform(size=(4000, 6))
  ]
  # Uncorrected, 0.26 of the families would have a rejection.
  assert abs(np.mean(rejected) - 0.05) < 4 * math.sqrt(0.05 * 0.95 / 4000)
