"""From a table to an audit's numbers, on tables whose truth is known."""

import dataclasses
import math

import dp_accounting
import numpy as np
import pytest
from scipy import stats

from ppnet.audit import assess, score_table
from ppnet.core import records
from tests.audit import tables

DELTA = 1e-5


def table(num_pairs, num_records, *, shift, seed=0, has_target=False, **groups):
  rng = np.random.default_rng(seed)
  members, partner = tables.design(num_pairs, num_records, rng)
  if has_target:
    members, partner = tables.with_target(members, partner, rng)
  margins = tables.gaussian_margins(members, rng, shift=shift, spread=2.0)
  return score_table.ScoreTable(
    scores={"margin": margins, "loss": tables.losses_of(margins)},
    membership=members,
    record_ids=tuple(map(str, range(num_records))),
    groups=groups,
    partner=partner,
  )


def claim(epsilon, *, delta=DELTA):
  """Of a Gaussian mechanism."""
  profile = ()
  if math.isfinite(epsilon):
    stddev = dp_accounting.get_sigma_gaussian(epsilon, delta)
    profile = tuple(
      (dp_accounting.get_epsilon_gaussian(stddev, other), other)
      for other in np.geomspace(0.3, 1e-6, 12)
    )
  return assess.Claim(
    epsilon=epsilon,
    delta=delta,
    neighboring_relation="ADD_OR_REMOVE_ONE",
    guarantee="A sentence.",
    profile=profile,
  )


@pytest.mark.parametrize("has_target", [False, True])
def test_a_leak_is_found_named_and_measured(has_target):
  found = assess.attacks(
    table(6, 300, shift=2.0, has_target=has_target),
    confidence=0.95,
    num_draws=60,
  )
  assert found["judged"] == ("finished run" if has_target else "shadow models")
  assert found["num_judged_models"] == (1 if has_target else 12)
  assert found["num_members"] + found["num_nonmembers"] == (
    300 if has_target else 3600
  )
  best = found["strongest"]
  assert best["auc"]["attack"].startswith(("lira", "reference", "rmia"))
  assert best["auc"]["value"] > stats.norm.cdf(2 / 2**0.5) - 0.06
  low, high = found["held_out"]["interval"]
  assert 0.3 < low < found["held_out"]["value"] < high < 1
  assert found["chance"]["p_value"] < 0.02
  assert found["chance"]["mean"] < 0.2
  aucs = [row["auc"].value for row in found["attacks"]]
  assert aucs == sorted(aucs, reverse=True)
  assert {"loss", "lira_online", "rmia_offline"} <= found["roc"].keys()
  records.to_plain(found)  # Everything in it can be written.


def test_no_leak_is_not_called_one():
  p_values, held_out = [], []
  for seed in range(6):
    found = assess.attacks(
      table(3, 60, shift=0.0, seed=seed), confidence=0.95, num_draws=40
    )
    p_values.append(found["chance"]["p_value"])
    held_out.append(found["held_out"]["interval"][0] > 0)
  assert np.median(p_values) > 0.05
  assert sum(held_out) <= 2


def test_groups_that_leak_come_first_and_small_ones_are_no_news():
  names = np.array(["few", "many", "many"] * 100)
  one = table(4, 300, shift=0.0, **{"class": names, "user": np.full(300, "")})
  margins = one.scores["margin"] + 3 * one.membership * (names == "few")
  one = dataclasses.replace(
    one,
    scores={"margin": margins, "loss": tables.losses_of(margins)},
    groups=one.groups | {"alone": np.where(np.arange(300) == 0, "x", "")},
  )
  found = assess.attacks(one, confidence=0.95, num_draws=60)["groups"]
  assert [row["group"] for row in found["class"]["rows"]] == ["few", "many"]
  few, many = found["class"]["rows"]
  assert few["auc"].value > 0.85
  assert few["num_records"] == 100
  low, high = many["auc"].interval
  assert low < 0.52
  assert 0.5 < found["class"]["highest_auc_by_chance"] < 0.56
  assert "user" not in found  # Nobody is in a group without a name.


def test_black_box_trials_use_no_coin_that_is_guessed():
  one = table(8, 200, shift=1.0)
  trials, across = assess.black_box_trials(one, claim(4.0))
  assert trials.scores.size == 4 * 200
  # Coins of the audited models and of their partners move no guess.
  audited = [8, 10, 12, 14]
  flipped = one.membership.copy()
  for model in audited:
    flipped[[model, model + 1]] ^= True
  other = dataclasses.replace(one, membership=flipped)
  again, _ = assess.black_box_trials(other, claim(4.0))
  np.testing.assert_array_equal(again.scores, trials.scores)
  np.testing.assert_array_equal(again.is_in, ~trials.is_in)
  np.testing.assert_array_equal(trials.is_in, one.membership[audited].ravel())
  assert across.methods == ("clopper_pearson",)
  assert across.scores.size == 4  # Of eight pairs, half chose the record.


@pytest.mark.parametrize(
  ("num_pairs", "score"),
  [(1, "loss"), (3, "calibrated_loss"), (4, "lira_online")],
)
def test_few_models_are_attacked_with_what_there_is(num_pairs, score):
  (trials,) = assess.black_box_trials(
    table(num_pairs, 50, shift=1.0), claim(1.0)
  )
  assert score in trials.observer
  assert trials.scores.size == 50


def test_planted_canaries_alone_are_the_trials():
  kinds = np.where(np.arange(200) < 40, "image+text", "")
  (trials,) = assess.black_box_trials(
    table(4, 200, shift=1.0, canary=kinds), claim(1.0)
  )
  assert trials.scores.size == 40


def test_black_box_bounds_hold_for_models_that_leak_a_known_amount():
  """Margins shifted by mu are a mu-GDP release of each membership bit."""
  epsilon = 4.0
  mu = 1 / dp_accounting.get_sigma_gaussian(epsilon, DELTA)
  exceeding = 0
  for seed in range(5):
    one = table(4, 300, shift=mu, seed=seed)
    rows = assess.bound(
      assess.black_box_trials(one, claim(epsilon)), confidence=0.95
    )
    assert all(row["confidence"] == pytest.approx(0.975) for row in rows)
    exceeding += any(row["exceeds"] for row in rows)
  assert exceeding <= 2
  rows = assess.bound(assess.black_box_trials(one, claim(0.1)), confidence=0.95)
  assert all(row["exceeds"] for row in rows)
  assert all(row["allowed_epsilon"] >= 0.1 for row in rows)


def test_what_is_not_claimed_cannot_be_contradicted():
  one = table(4, 400, shift=6.0)
  rows = assess.bound(
    assess.black_box_trials(one, claim(math.inf)), confidence=0.95
  )
  assert max(row["epsilon"] for row in rows) > 2
  assert not any(row["exceeds"] for row in rows)
  assert records.to_plain(rows)[0]["claimed_epsilon"] == "inf"


def test_headline_takes_each_number_from_its_strongest_attack():
  one = table(4, 200, shift=2.0)
  found = assess.attacks(one, confidence=0.95, num_draws=60)
  bounds = assess.bound(
    assess.black_box_trials(one, claim(8.0)), confidence=0.95
  )
  record = records.to_plain({"membership": found, "bounds": bounds})
  head = assess.headline(record)
  assert head["leakage"] == max(r["advantage"].value for r in found["attacks"])
  assert head["attack_auc"] == max(r["auc"].value for r in found["attacks"])
  assert head["tpr_at_0.1_fpr"] >= found["attacks"][0]["tpr_at_0.001"].value
  assert head["epsilon_lower_bound"] == max(b["epsilon"] for b in bounds)
  assert head["leakage_held_out"] < head["leakage"]
  utility = [
    {"accuracy": accuracy, "auc_roc": float("nan")} for accuracy in (0.5, 0.75)
  ]
  record = records.to_plain(record | {"utility": utility})
  head = assess.headline(record)
  assert head["accuracy"] == 0.625
  assert np.isnan(head["auc_roc"])
  assert head["num_models"] == 2
  # Fails if: a class without test records, whose AUC is "nan", ends the audit.
