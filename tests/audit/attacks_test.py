"""The threshold attack against closed forms and planted leaks."""

import numpy as np
import pytest
from scipy import stats

from ppnet.audit import attacks


def attack(members, others):
  return attacks.threshold_attack(
    np.asarray(members, float), np.asarray(others, float), attack="loss"
  )


def test_separated_scores_leak_everything_and_equal_ones_nothing():
  full = attack([3, 4, 5], [0, 1])
  assert full.advantage == 1.0
  assert full.auc == 1.0
  assert full.tpr_at_fpr == {"0.001": 1.0, "0.01": 1.0}
  none = attack([1, 1, 1], [1, 1])
  assert none.advantage == 0.0
  assert none.auc == 0.5
  assert none.tpr_at_fpr == {"0.001": 0.0, "0.01": 0.0}


def test_members_with_lower_scores_do_not_count_as_a_leak():
  reverse = attack([0, 1], [3, 4, 5])
  assert reverse.auc == 0.0
  assert reverse.advantage == 0.0
  # Fails if: the attack is told the answer by an absolute value.


def test_gaussian_shift_matches_its_closed_form():
  rng = np.random.default_rng(0)
  result = attack(rng.normal(1, 1, 40_000), rng.normal(0, 1, 40_000))
  assert result.advantage == pytest.approx(
    2 * stats.norm.cdf(0.5) - 1, abs=0.02
  )
  assert result.auc == pytest.approx(stats.norm.cdf(2**-0.5), abs=0.01)
  for target, tpr in result.tpr_at_fpr.items():
    expected = stats.norm.sf(stats.norm.isf(float(target)) - 1)
    assert tpr == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("bad", [[], [np.nan, 1.0], [np.inf]])
def test_scores_that_cannot_be_ranked_are_refused(bad):
  with pytest.raises(ValueError, match="member_scores"):
    attack(bad, [1.0])
  with pytest.raises(ValueError, match="nonmember_scores"):
    attack([1.0], bad)
