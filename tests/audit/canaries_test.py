"""Planted secrets are exposed, others are not; ties and cuts do not flatter."""

import dataclasses

import numpy as np
import pytest
from scipy import stats

from ppnet import config as config_lib
from ppnet.audit import canaries as canaries_lib
from ppnet.data import sources
from tests.audit import memorising

memorised = memorising.memorised_fixture


def records(count, **fields):
  return {
    place: sources.Record(id=f"r{place}", **fields) for place in range(count)
  }


def make(originals, task, **changes):
  options = {"num_classes": 10, "seed": 0} | changes
  return canaries_lib.make(originals, task=task, **options)


# What is planted.


def test_a_text_says_a_random_number_and_its_candidates_another():
  first, second = make(records(2, text="Fine."), config_lib.Task.CAUSAL)
  assert first.record.text.endswith(first.secret)
  assert first.record.text != second.record.text
  assert first.template != second.template  # Each has a name of its own.
  assert len(first.secret) == 6
  assert len(set(first.candidates)) == 512
  assert first.secret in first.candidates
  other = next(c for c in first.candidates if c != first.secret)
  changed = first.with_secret(other)
  assert changed.text == first.record.text.replace(first.secret, other)
  assert first.kind == "text"


def test_a_planted_picture_keeps_its_pixels_and_gets_a_secret_caption():
  media = {"image": (b"pixels",)}
  (canary,) = make(
    records(1, media=media, text="A dog."), config_lib.Task.CAUSAL
  )
  assert canary.record.media == media
  assert canary.secret in canary.record.text
  assert "dog" not in canary.record.text
  assert canary.kind == "image+text"


def test_a_planted_recording_gets_a_secret_word():
  (canary,) = make(
    records(1, media={"audio": (b"wave",)}, text="What?", answer="seven"),
    config_lib.Task.ANSWER,
  )
  assert canary.record.answer == canary.secret
  assert canary.record.text == "What?"
  assert canary.kind == "audio+text"


def test_a_class_is_never_the_true_one():
  made = make(records(200, label=3), config_lib.Task.CLASSIFY)
  assert {canary.record.label for canary in made} == set(range(10)) - {3}
  assert {len(canary.candidates) for canary in made} == {9}
  # Fails if: the true class is a candidate, which a model may know untrained.


def test_two_classes_leave_no_choice():
  with pytest.raises(ValueError, match="num_classes=2"):
    make(records(1, label=0), config_lib.Task.CLASSIFY, num_classes=2)


def test_names_and_secrets_are_those_of_the_seed():
  originals = records(3, text="x")
  task = config_lib.Task.CAUSAL
  assert make(originals, task) == make(originals, task)
  assert make(originals, task) != make(originals, task, seed=1)


# Exposure.


def test_exposure_is_that_of_the_rank_and_ties_count_against_it():
  losses = np.array([3.0, 1.0, 2.0, 2.0])
  assert canaries_lib.exposure(losses, 1) == (2.0, 1)
  assert canaries_lib.exposure(losses, 0) == (0.0, 4)
  assert canaries_lib.exposure(losses, 2) == (pytest.approx(np.log2(4 / 3)), 3)
  equal = np.zeros(8)
  assert canaries_lib.exposure(equal, 5) == (0.0, 8)
  # Fails if: a model that says nothing seems to know every secret.


def test_losses_that_are_not_finite_are_refused():
  with pytest.raises(ValueError, match="finite losses"):
    canaries_lib.exposure(np.array([1.0, np.nan]), 0)


def test_chance_is_the_mean_over_uniform_ranks():
  rng = np.random.default_rng(0)
  found = [
    canaries_lib.exposure(rng.normal(size=32), int(rng.integers(32)))[0]
    for _ in range(4000)
  ]
  assert np.mean(found) == pytest.approx(
    canaries_lib.chance_exposure(32), abs=0.08
  )


@pytest.mark.parametrize("shape", [-4.0, 0.0, 2.0])
def test_extrapolated_exposure_of_skew_normal_losses_is_their_own(shape):
  rng = np.random.default_rng(0)
  losses = stats.skewnorm.rvs(
    shape, loc=20, scale=3, size=20_000, random_state=rng
  )
  low = stats.skewnorm.ppf(2**-12, shape, loc=20, scale=3)
  losses = np.append(losses, low)
  assert canaries_lib.extrapolated_exposure(losses, 20_000) == pytest.approx(
    12, rel=0.12
  )


def test_extrapolation_from_too_few_or_equal_losses_says_so():
  assert np.isnan(canaries_lib.extrapolated_exposure(np.arange(9.0), 0))
  assert np.isnan(canaries_lib.extrapolated_exposure(np.zeros(99), 0))


# A model that was trained on them.


def test_planted_rows_take_their_places_and_no_others(memorised):
  pool, planted = memorised.pool, memorised.with_secrets
  places = [canary.position for canary in memorised.planted]
  assert (planted["tokens"] != pool["tokens"]).any(axis=1).sum() == len(places)
  others = np.setdiff1d(np.arange(memorising.NUM_POOL), places)
  for name, array in pool.items():
    np.testing.assert_array_equal(planted[name][others], array[others])
  np.testing.assert_array_equal(planted["index"], pool["index"])
  tokenizer = memorised.experiment.tokenizer
  for canary in memorised.planted:
    row = planted["targets"][canary.position]
    counted = planted["loss_mask"][canary.position] > 0
    assert tokenizer.decode(row[counted]) == canary.record.text


def test_what_was_planted_is_exposed_and_what_was_not_is_as_chance_has_it(
  memorised,
):
  found = canaries_lib.audit_exposure(
    memorised.experiment, memorised.params, memorised.planted
  )
  assert (found.num_candidates == 64).all()
  np.testing.assert_allclose(found.exposures, 6.0)
  assert found.extrapolated.min() > 6.0
  assert set(found.kinds) == {"text"}
  controls = canaries_lib.audit_exposure(
    memorised.experiment, memorised.params, memorised.controls
  )
  clean = canaries_lib.audit_exposure(
    memorised.experiment, memorised.clean, memorised.planted
  )
  for unseen in (controls, clean):
    assert unseen.exposures.mean() == pytest.approx(unseen.chance, abs=1.2)
    assert unseen.exposures.mean() < 3.0
  # Fails if: candidates are not drawn as the secret was, or a candidate is
  # scored with another one's tokens.


def test_two_canaries_in_one_place_or_outside_are_refused(memorised):
  dataset = memorised.experiment.datasets["train"]
  twice = [memorised.planted[0], memorised.planted[0]]
  with pytest.raises(ValueError, match="different places"):
    canaries_lib.plant(memorised.pool, twice, dataset=dataset)
  small = {name: array[:4] for name, array in memorised.pool.items()}
  with pytest.raises(ValueError, match="position=7"):
    canaries_lib.plant(small, memorised.planted, dataset=dataset)


def test_a_secret_that_would_be_cut_off_is_refused(memorised):
  canary = memorised.planted[0]
  long = dataclasses.replace(
    canary,
    record=dataclasses.replace(canary.record, text=f"{'x' * 60} 1234"),
  )
  with pytest.raises(ValueError, match="fit into a row"):
    canaries_lib.plant(
      memorised.pool, [long], dataset=memorised.experiment.datasets["train"]
    )
