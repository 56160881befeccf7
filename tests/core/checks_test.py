"""Errors carry the name, the value and what to do."""

import math

import pytest

from ppnet.core import checks


@pytest.mark.parametrize("value", [0, -1, math.inf, math.nan])
def test_positive_rejects(value):
  with pytest.raises(ValueError, match="l2_clip_norm > 0, got l2_clip_norm="):
    checks.positive(l2_clip_norm=value)


@pytest.mark.parametrize("value", [-1e-9, math.inf, math.nan])
def test_non_negative_rejects(value):
  checks.non_negative(x=0)
  with pytest.raises(ValueError, match="x >= 0"):
    checks.non_negative(x=value)


@pytest.mark.parametrize("value", [0, 1, -0.5, math.nan])
def test_open_unit_interval_rejects_its_ends(value):
  checks.in_open_unit_interval(delta=0.5)
  with pytest.raises(ValueError, match="0 < delta < 1"):
    checks.in_open_unit_interval(delta=value)


@pytest.mark.parametrize("value", [0, 1.1, math.nan])
def test_probability_accepts_one_and_rejects_zero(value):
  checks.probability(q=1.0)
  with pytest.raises(ValueError, match="0 < q <= 1"):
    checks.probability(q=value)


def test_at_most_names_bound_value_and_remedy():
  checks.at_most(3, tokens=3)
  with pytest.raises(
    ValueError, match=r"tokens <= 3, got tokens=4\. Shorten\."
  ):
    checks.at_most(3, "Shorten.", tokens=4)


def test_did_you_mean_suggests_the_closest_or_nothing():
  names = ["privacy.epsilon", "privacy.delta"]
  assert "'privacy.epsilon'" in checks.did_you_mean("privacy.epsilo", names)
  assert checks.did_you_mean("qqqq", names) == ""
