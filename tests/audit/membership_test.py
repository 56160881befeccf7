"""Attacks against closed forms, slow twins, and the rule about partners."""

import numpy as np
import pytest
from scipy import stats

from ppnet.audit import lira, membership, metrics, references, rmia
from tests.audit import tables

REFERENCED = (
  "calibrated_loss",
  "reference_ratio",
  "lira_offline",
  "lira_online",
  "rmia_offline",
  "rmia_online",
)


def run(margins, members, partner):
  scores = {"margin": margins, "loss": tables.losses_of(margins)}
  attacks, left_out = membership.run_all(
    scores, membership=members, partner=partner
  )
  assert not left_out
  return {name: attack.scores for name, attack in attacks.items()}


def auc(scores, members):
  return metrics.Ranked(scores, members).curve().auc


def test_lira_reaches_the_optimum_of_gaussian_margins():
  """A known shift d of unit Gaussians: AUC is Phi(d / sqrt 2)."""
  rng = np.random.default_rng(0)
  members, partner = tables.design(40, 500, rng)
  margins = tables.gaussian_margins(members, rng, shift=1.5)
  found = run(margins, members, partner)
  best = stats.norm.cdf(1.5 / np.sqrt(2))
  # 39 references on a side blur each mean by 1/sqrt(39): a loss of 1 %.
  for name in ("lira_online", "lira_offline"):
    assert auc(found[name], members) == pytest.approx(best, abs=0.012), name
  # Offline, the blur of the mean of 39 references is all there is.
  seen = 1.5 / np.sqrt(1 + 1 / 39)
  curve = metrics.Ranked(found["lira_offline"], members).curve()
  for fpr, tolerance in ((0.01, 0.015), (0.001, 0.015)):
    expected = stats.norm.sf(stats.norm.isf(fpr) - seen)
    assert curve.tpr_at(fpr) == pytest.approx(expected, abs=tolerance)
  assert curve.auc == pytest.approx(stats.norm.cdf(seen / 2**0.5), abs=0.006)
  # The raw margin drowns in how much records differ.
  assert auc(found["margin"], members) < 0.62
  # Fails if: in and out are exchanged, or a record's own level stays in.


def test_rmia_and_calibration_see_what_one_threshold_cannot():
  rng = np.random.default_rng(1)
  members, partner = tables.design(16, 800, rng)
  margins = tables.gaussian_margins(members, rng, shift=2.0)
  found = run(margins, members, partner)
  raw = auc(found["loss"], members)
  for name in ("calibrated_loss", "reference_ratio", "rmia_online"):
    assert auc(found[name], members) > raw + 0.1, name


@pytest.mark.parametrize("has_target", [False, True])
def test_without_a_leak_every_attack_guesses(has_target):
  """Over independent tables; each AUC within four standard errors of 1/2."""
  found = {name: [] for name in (*REFERENCED, "loss", "margin")}
  for seed in range(30):
    rng = np.random.default_rng(seed)
    members, partner = tables.design(4, 150, rng)
    if has_target:
      members, partner = tables.with_target(members, partner, rng)
    judged = [0] if has_target else list(range(len(members)))
    margins = tables.gaussian_margins(members, rng, shift=0.0)
    for name, scores in run(margins, members, partner).items():
      found[name].append(auc(scores[judged], members[judged]))
  for name, values in found.items():
    error = np.std(values) / np.sqrt(len(values))
    assert abs(np.mean(values) - 0.5) < 4 * error, name
    assert error < 0.01


def spoiled(partner, spoil):
  """The rule of `references.usable`, broken."""
  allowed = references_usable(partner)
  models = np.arange(len(partner))
  allowed[models, partner if spoil == "partner" else models] = True
  return allowed


references_usable = references.usable
spoils = pytest.mark.parametrize("spoil", ["partner", "itself"])


@spoils
def test_a_reference_that_knows_the_answer_is_seen_without_any_leak(
  monkeypatch, spoil
):
  """The fault planted: what is at 1/2 above is then far from it."""
  monkeypatch.setattr(references, "usable", lambda p: spoiled(p, spoil))
  found = []
  for seed in range(20):
    rng = np.random.default_rng(seed)
    members, partner = tables.design(4, 200, rng)
    margins = tables.gaussian_margins(members, rng, shift=0.0)
    found.append(auc(run(margins, members, partner)["lira_online"], members))
  error = np.std(found) / np.sqrt(len(found))
  assert abs(np.mean(found) - 0.5) > 6 * error
  # Fails if: the test above could not see that the rule is broken.


def test_partner_itself_and_targets_are_no_references():
  partner = np.array([-1, 2, 1, 4, 3])
  allowed = references.usable(partner)
  expected = np.zeros((5, 5), bool)
  expected[0, 1:] = True
  expected[1:3, 3:5] = True
  expected[3:5, 1:3] = True
  np.testing.assert_array_equal(allowed, expected)
  with pytest.raises(ValueError, match="each other's"):
    references.usable(np.array([1, 2, 0]))


def changed_by_secrets():
  """Which attacks on model 0 move with its membership or its partner."""
  rng = np.random.default_rng(3)
  members, partner = tables.design(5, 60, rng)
  margins = tables.gaussian_margins(members, rng, shift=1.0)
  before = run(margins, members, partner)
  flipped, moved = members.copy(), margins.copy()
  flipped[:2] ^= rng.random(60) < 0.5
  moved[1] += rng.normal(size=60)
  after = run(moved, flipped, partner)
  return {
    name
    for name in REFERENCED
    if not np.array_equal(after[name][0], before[name][0])
  }


def test_own_membership_and_the_partner_move_no_attack():
  assert changed_by_secrets() == set()


@spoils
def test_every_attack_moves_with_them_once_the_rule_is_broken(
  monkeypatch, spoil
):
  monkeypatch.setattr(references, "usable", lambda p: spoiled(p, spoil))
  assert changed_by_secrets() == set(REFERENCED)
  # Fails if: an attack does not ask `references.usable`, and could not be seen.


def slow_lira(margins, members, partner, m, i, *, online):
  inside, outside = [], []
  for r in range(len(margins)):
    if partner[r] < 0 or r == m or r == partner[m]:
      continue
    (inside if members[r, i] else outside).append(margins[r, i])
  x = margins[m, i]
  if not online:
    return (x - np.mean(outside)) / np.std(outside, ddof=1)
  return stats.norm.logpdf(
    x, np.mean(inside), np.std(inside, ddof=1)
  ) - stats.norm.logpdf(x, np.mean(outside), np.std(outside, ddof=1))


def slow_rmia(losses, members, partner, m, i, *, a=None, gamma=1.0):
  def ratio(x):
    refs = [
      r
      for r in range(len(losses))
      if partner[r] >= 0 and r not in (m, partner[m])
    ]
    p_out = np.mean([np.exp(losses[r, x]) for r in refs if not members[r, x]])
    if a is None:
      p_in = np.mean([np.exp(losses[r, x]) for r in refs if members[r, x]])
      p = (p_in + p_out) / 2
    else:
      p = ((1 + a) * p_out + 1 - a) / 2
    return np.exp(losses[m, x]) / p

  mine = ratio(i)
  others = [mine / ratio(z) >= gamma for z in range(losses.shape[1]) if z != i]
  return np.mean(others)


@pytest.mark.parametrize("has_target", [False, True])
def test_attacks_equal_their_slow_twins(has_target):
  rng = np.random.default_rng(4)
  members, partner = tables.design(4, 25, rng)
  if has_target:
    members, partner = tables.with_target(members, partner, rng)
  margins = tables.gaussian_margins(members, rng, shift=1.0, spread=2.0)
  losses = tables.losses_of(margins)
  online = lira.online(margins, members, partner, pooled=False)
  offline = lira.offline(margins, members, partner, pooled=False)
  beats = rmia.online(losses, members, partner)
  beats_offline = rmia.offline(losses, members, partner, gamma=1.5)
  calibrated = membership.calibrated_loss(losses, members, partner)
  for m in (0, 3, len(members) - 1):
    for i in (0, 7, 24):
      cell = (margins, members, partner, m, i)
      assert online[m, i] == pytest.approx(slow_lira(*cell, online=True))
      assert offline[m, i] == pytest.approx(slow_lira(*cell, online=False))
      cell = (losses, *cell[1:])
      assert beats[m, i] == pytest.approx(slow_rmia(*cell))
      assert beats_offline[m, i] == pytest.approx(
        slow_rmia(*cell, a=0.3, gamma=1.5)
      )
      outside = [
        losses[r, i]
        for r in range(len(losses))
        if partner[r] >= 0 and r not in (m, partner[m]) and not members[r, i]
      ]
      expected = losses[m, i] - np.mean(outside)
      assert calibrated[m, i] == pytest.approx(expected)


def test_pooling_takes_the_spread_within_records_and_not_between():
  rng = np.random.default_rng(5)
  members, partner = tables.design(20, 400, rng)
  margins = tables.gaussian_margins(members, rng, shift=0.0, spread=50.0)
  z = lira.offline(margins, members, partner)
  # Unit noise around a mean of 19: variance 1 + 1/19, not 2500.
  assert z.std() == pytest.approx(np.sqrt(1 + 1 / 19), rel=0.03)
  with pytest.raises(references.TooFewError, match="num_models"):
    lira.online(margins[:4], members[:4], partner[:4])


def test_what_cannot_be_run_is_said_and_not_guessed():
  rng = np.random.default_rng(6)
  members, partner = tables.design(1, 30, rng)
  margins = tables.gaussian_margins(members, rng, shift=1.0)
  scores = {"loss": tables.losses_of(margins), "gradient_norm": margins}
  attacks, left_out = membership.run_all(
    scores, membership=members, partner=partner
  )
  assert list(attacks) == ["loss", "gradient_norm"]
  assert "query" in attacks["loss"].knowledge
  assert "parameters" in attacks["gradient_norm"].knowledge
  assert "num_models" in left_out["calibrated_loss"]
  assert "margin" in left_out["lira_online"]


def test_scores_that_cannot_be_ranked_are_refused_by_name():
  members, partner = tables.design(2, 4, np.random.default_rng(0))
  scores = np.zeros(members.shape)
  scores[1, 2] = np.nan
  with pytest.raises(ValueError, match="finite scores of loss"):
    membership.run_all({"loss": scores}, membership=members, partner=partner)
  with pytest.raises(ValueError, match=r"scores \[M, n\]"):
    membership.run_all(
      {"loss": scores[:, :3]}, membership=members, partner=partner
    )
  with pytest.raises(ValueError, match="losses of at least 0"):
    membership.reference_ratio(np.ones(members.shape), members, partner)


def test_a_population_of_others_is_what_a_record_is_compared_with():
  rng = np.random.default_rng(7)
  members, partner = tables.design(3, 40, rng)
  losses = tables.losses_of(tables.gaussian_margins(members, rng, shift=1.0))
  population = np.arange(40) < 10
  found = rmia.online(losses, members, partner, population=population)
  assert set(np.unique(found[:, 10:] * 10 % 1).round(9)) <= {0.0, 1.0}
  assert set(np.unique(found[:, :10] * 9 % 1).round(9)) <= {0.0, 1.0}
  np.testing.assert_array_equal(
    found[:, :10],
    rmia.online(losses[:, :10], members[:, :10], partner),
  )


def test_blind_control_sees_unlike_splits_and_no_membership():
  rng = np.random.default_rng(8)
  members, partner = tables.design(4, 400, rng)
  losses = tables.losses_of(tables.gaussian_margins(members, rng, shift=2.0))
  by_coins = membership.blind(losses, partner)
  assert auc(by_coins, members) == pytest.approx(0.5, abs=0.05)
  members, partner = tables.with_target(members, partner, rng)
  easy = losses.mean(axis=0)
  members[0] = easy > np.median(easy)  # Members are the easier records.
  losses = np.concatenate([losses[:1], losses])
  found = auc(membership.blind(losses, partner)[:1], members[:1])
  assert found > 0.95
