"""What the arguments of `configs/records/` stand for."""

import dataclasses
import pathlib
import runpy

import pytest

from ppnet import config as config_lib
from ppnet.data import whitening

_RECORDS = pathlib.Path(__file__).parents[1] / "configs" / "records"


_NAMES = (
  "clothing_reviews",
  "fashion_mnist",
  "mnist",
  "shakespeare",
  "spoken_digits",
)


@pytest.mark.parametrize("name", _NAMES)
@pytest.mark.parametrize("epsilon", [1, 3, 8])
def test_a_record_spends_its_epsilon_and_sees_the_test_split_once(
  name, epsilon
):
  get_config = runpy.run_path(str(_RECORDS / f"{name}.py"))["get_config"]
  config = get_config(str(epsilon))
  config_lib.validate(config)
  privacy, train = config.privacy, config.train
  assert privacy.enabled
  assert privacy.noise
  assert (privacy.epsilon, privacy.delta) == (epsilon, 1e-5)
  assert privacy.noise_multiplier is None
  assert privacy.sampler is config_lib.Sampler.POISSON
  assert privacy.accountant is config_lib.Accountant.PLD
  assert privacy.unit is config_lib.PrivacyUnit.EXAMPLE
  add_or_remove = config_lib.NeighboringRelation.ADD_OR_REMOVE_ONE
  assert privacy.neighboring_relation is add_or_remove
  # Held-out training records had a part in every choice.
  assert config.tuning is config_lib.Tuning.PRIVATE
  assert privacy.noise_seed is None
  assert privacy.sampler_seed is None
  assert train.eval_every_steps == train.num_steps
  # Fails if: noise is fixed or can be drawn again, or training is stopped or
  # watched by the test split.


def test_a_speaker_is_a_unit_and_all_of_them_are_in_the_one_step():
  path = str(_RECORDS / "spoken_digits.py")
  config = runpy.run_path(path)["get_config"]("3,speaker")
  config_lib.validate(config)
  assert config.privacy.unit is config_lib.PrivacyUnit.USER
  assert config.privacy.max_records_per_user == 450  # Of each: 45 of a digit.
  assert config.train.expected_batch_size == 6
  assert config.train.num_steps == config.train.eval_every_steps == 1
  assert not config.model.linear.centre  # That would be a step of its own.
  # Fails if: a recording is protected in place of a speaker.


@pytest.mark.parametrize(
  ("argument", "epsilon", "batch_size"),
  [("3", 3.0, 512), ("8,64", 8.0, 64), ("none", None, 512)],
)
def test_shakespeare_s_argument_is_epsilon_and_batch(
  argument, epsilon, batch_size
):
  get_config = runpy.run_path(str(_RECORDS / "shakespeare.py"))["get_config"]
  config = get_config(argument)
  config_lib.validate(config)
  assert config.privacy.enabled == (epsilon is not None)
  assert epsilon in (None, config.privacy.epsilon)
  assert config.train.expected_batch_size == batch_size
  # The claim's unit is one whole window, and so is a row.
  assert config.model.decoder.max_seq_len == config.data.window_bytes
  # Fails if: "none" trains privately, or a batch size changes nothing.


def test_fashion_mnist_with_mnist_s_settings_differs_from_mnist_in_its_prior():
  own, shared, mnist = (
    runpy.run_path(str(_RECORDS / f"{name}.py"))["get_config"](argument)
    for name, argument in (
      ("fashion_mnist", "3"),
      ("fashion_mnist", "3,mnist"),
      ("mnist", "3"),
    )
  )
  for part in ("model", "privacy", "optimizer", "train"):
    assert getattr(shared, part) == getattr(mnist, part)
  garments, strokes = (
    each.data.image_transforms[-1] for each in (shared, mnist)
  )
  prior = whitening.Prior.STROKES
  assert dataclasses.replace(garments, prior=prior) == strokes
  assert garments.prior is whitening.Prior.GARMENTS
  assert shared.tuning is config_lib.Tuning.PUBLIC
  assert shared.model != own.model
  # Fails if: what was chosen on Fashion-MNIST has a part in that row.


def test_fashion_mnist_refuses_other_settings_by_name():
  path = str(_RECORDS / "fashion_mnist.py")
  with pytest.raises(ValueError, match="argument='3,cifar'"):
    runpy.run_path(path)["get_config"]("3,cifar")
