"""Curves against scikit-learn; intervals and chance against known laws."""

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sklearn_metrics

from ppnet.audit import metrics
from tests.audit import tables


def test_curve_equals_scikit_learn_s_with_ties_and_weights():
  rng = np.random.default_rng(0)
  scores = rng.integers(0, 12, 300).astype(float)  # Many ties.
  labels = rng.random(300) < 0.4
  weights = rng.integers(0, 4, 300).astype(float)
  ranked = metrics.Ranked(scores, labels)
  for weight in (None, weights):
    curve = ranked.curve(weight)
    fpr, tpr, _ = sklearn_metrics.roc_curve(
      labels, scores, sample_weight=weight, drop_intermediate=False
    )
    np.testing.assert_allclose(curve.fpr, fpr, atol=1e-12)
    np.testing.assert_allclose(curve.tpr, tpr, atol=1e-12)
    assert curve.auc == pytest.approx(
      sklearn_metrics.roc_auc_score(labels, scores, sample_weight=weight)
    )
  repeated = np.repeat(np.arange(300), weights.astype(int))
  again = metrics.Ranked(scores[repeated], labels[repeated]).curve()
  assert again.advantage == pytest.approx(ranked.curve(weights).advantage)


def test_tpr_at_a_low_fpr_takes_no_threshold_that_is_not_there():
  scores = np.array([5.0, 4, 3, 3, 3, 2, 1, 0])
  labels = np.array([1, 1, 1, 0, 0, 1, 0, 0], bool)
  curve = metrics.Ranked(scores, labels).curve()
  assert curve.tpr_at(0.001) == 0.5  # Two of four without a false positive.
  assert curve.tpr_at(0.49) == 0.5  # The tied three come at once, or not.
  assert curve.tpr_at(0.5) == 1.0
  assert curve.advantage == 0.5
  assert curve.balanced_accuracy == 0.75
  # One false positive in a thousand is 0.1 %, whatever a division rounds to.
  scores = np.arange(1001.0)[::-1]
  labels = np.arange(1001) == 1
  assert metrics.Ranked(scores, labels).curve().tpr_at(0.001) == 1.0


def test_gaussian_scores_have_the_closed_forms():
  rng = np.random.default_rng(1)
  labels = rng.random((4, 20_000)) < 0.5
  found = metrics.measure(
    rng.normal(size=labels.shape) + labels,
    labels,
    partner=np.full(4, -1),
    confidence=0.95,
    num_draws=20,
  )
  advantage = 2 * stats.norm.cdf(0.5) - 1
  expected = {
    "auc": stats.norm.cdf(2**-0.5),
    "advantage": advantage,
    "balanced_accuracy": (1 + advantage) / 2,
    "tpr_at_0.001": stats.norm.sf(stats.norm.isf(0.001) - 1),
    "tpr_at_0.01": stats.norm.sf(stats.norm.isf(0.01) - 1),
  }
  assert set(found) == set(expected)
  for name, value in expected.items():
    assert found[name].value == pytest.approx(value, abs=0.01), name
    assert found[name].interval.low <= found[name].interval.high


def coverage(seeds, *, num_models, shift, model_noise, draw):
  """How often 95 % intervals of the AUC and the advantage hold the truth."""
  spread = np.sqrt(1 + model_noise**2)
  auc = stats.norm.cdf(shift / spread / 2**0.5)
  advantage = 2 * stats.norm.cdf(shift / spread / 2) - 1
  held = np.zeros(2)
  for seed in seeds:
    rng = np.random.default_rng(seed)
    labels, partner = tables.design(num_models // 2, 120, rng)
    if draw == "target":
      labels, partner = labels[:1], np.array([-1])
    scores = rng.normal(size=labels.shape) + shift * labels
    scores += model_noise * rng.normal(size=(len(labels), 1))
    if draw == "records alone":
      # The fault: one long row has no models to draw again.
      scores, labels = scores.reshape(1, -1), labels.reshape(1, -1)
      partner = np.array([-1])
    found = metrics.measure(
      scores, labels, partner=partner, confidence=0.95, num_draws=100
    )
    for place, (name, truth) in enumerate(
      [("auc", auc), ("advantage", advantage)]
    ):
      low, high = found[name].interval
      held[place] += low <= truth <= high
  return held / len(seeds)


def test_intervals_hold_the_truth_as_often_as_they_say():
  for shift in (0.0, 1.0):
    held = coverage(
      range(60), num_models=2, shift=shift, model_noise=0, draw="target"
    )
    # 95 % less what 100 draws and a maximum over thresholds cost.
    assert (held >= stats.binom.ppf(0.001, 60, 0.9) / 60).all(), held


def test_models_are_drawn_again_because_they_differ():
  setting = {"num_models": 16, "shift": 1.0, "model_noise": 2.0}
  held = coverage(range(25), **setting, draw="both")
  assert (held >= 0.8).all(), held
  fault = coverage(range(25), **setting, draw="records alone")
  assert fault[0] < 0.75, fault
  # Fails if: scores of one model are taken for independent.


def test_a_threshold_chosen_elsewhere_has_no_upward_bias():
  best, elsewhere = [], []
  for seed in range(40):
    rng = np.random.default_rng(seed)
    labels, partner = tables.design(3, 60, rng)
    scores = {str(i): rng.normal(size=labels.shape) for i in range(5)}
    found = metrics.held_out(
      scores,
      labels,
      partner=partner,
      judged=range(6),
      confidence=0.95,
      num_draws=2,
    )
    elsewhere.append(found.advantage.value)
    draw = metrics.best_advantage(scores, labels)
    best.append(float(draw(labels)[0]))
  error = np.std(elsewhere) / np.sqrt(40)
  assert abs(np.mean(elsewhere)) < 4 * error
  assert np.mean(best) > 0.08
  # Fails if: the threshold, or the attack, is chosen on what it is judged on.


def test_held_out_reaches_what_is_there_and_names_the_attack():
  rng = np.random.default_rng(3)
  labels, partner = tables.design(4, 2000, rng)
  labels, partner = tables.with_target(labels, partner, rng)
  scores = {
    "noise": rng.normal(size=labels.shape),
    "good": rng.normal(size=labels.shape) + 2 * labels,
  }
  setting = {"partner": partner, "confidence": 0.95, "num_draws": 50}
  for judged in ([0], range(1, 9)):
    found = metrics.held_out(scores, labels, judged=judged, **setting)
    assert set(found.attacks) == {"good"}
    truth = 2 * stats.norm.cdf(1) - 1
    assert found.advantage.value == pytest.approx(truth, abs=0.05)
    low, high = found.advantage.interval
    assert low < truth < high
  alone = metrics.held_out(
    {"good": scores["good"][1:3]},
    labels[1:3],
    judged=[0, 1],
    **(setting | {"partner": np.array([1, 0])}),
  )
  assert alone is None  # The partner's threshold would know the answer.


def test_targets_membership_chooses_no_threshold():
  rng = np.random.default_rng(4)
  labels, partner = tables.design(2, 50, rng)
  labels, partner = tables.with_target(labels, partner, rng)
  scores = {"a": rng.normal(size=labels.shape)}
  setting = {"partner": partner, "confidence": 0.9, "num_draws": 2}
  found = metrics.held_out(scores, labels, judged=[0], **setting)
  other = labels.copy()
  other[0] = ~other[0]
  again = metrics.held_out(scores, other, judged=[0], **setting)
  # The same guesses judged by the opposite truth.
  assert again.advantage.value == pytest.approx(-found.advantage.value)


@pytest.mark.parametrize("has_partner", [True, False])
def test_chance_is_what_coins_reach(has_partner):
  """Against Smirnov's law: P(max of TPR - FPR > x) = exp(-2 N x^2)."""
  rng = np.random.default_rng(5)
  labels, partner = tables.design(2, 500, rng)
  if not has_partner:
    labels, partner = labels[:1], np.array([-1])
  scores = rng.normal(size=labels.shape) + 3 * labels  # A leak changes nothing.
  draws = metrics.chance(
    metrics.best_advantage({"x": scores}, labels),
    labels,
    partner=partner,
    num_draws=200,
  )
  size = labels.size / 4
  expected = np.sqrt(np.pi / 8) / np.sqrt(size)  # N = mn / (m + n).
  assert draws.mean() == pytest.approx(expected, rel=0.12)


def test_draws_keep_partners_together_and_count_every_model():
  resampler = metrics.Resampler(
    partner=np.array([-1, 2, 1, 4, 3]), num_records=7, num_draws=30
  )
  for models, records in resampler.weights():
    assert models[1] == models[2]
    assert models[3] == models[4]
    assert records.sum() == 7
    assert models[0] + models[1] + models[3] == 3
  partner = metrics.relabelled(np.array([-1, 2, 1, 4, 3]), [0, 3, 4])
  np.testing.assert_array_equal(partner, [-1, 2, 1])


@pytest.mark.parametrize(
  ("scores", "labels", "says"),
  [
    ([1.0, np.nan], [True, False], "finite"),
    ([1.0, 2.0], [True, True], "num_nonmembers=0"),
    ([1.0, 2.0], [False, False], "num_members=0"),
  ],
)
def test_what_has_no_curve_is_refused(scores, labels, says):
  with pytest.raises(ValueError, match=says):
    metrics.Ranked(np.array(scores), np.array(labels))
