"""What the configs of records stand for, spend, and look at."""

import dataclasses
import io
import pathlib
import runpy

import jax
import numpy as np
import pytest

from ppnet import config as config_lib
from ppnet.data import whitening
from ppnet.privacy import accounting, selection
from ppnet.report import tables
from ppnet.train import loop
from tests.data import raw_tools
from tests.privacy import convolution

_ROOT = pathlib.Path(__file__).parents[1]
_RECORDS = _ROOT / "configs" / "records"

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


def _accounted(first_cell):
  """Batch, steps and lists of three in RECORDS.md's table of accountants."""
  _, _, text = (_ROOT / "RECORDS.md").read_text().partition("## ε by both")
  rows = [line.strip("| ").split(" | ") for line in text.splitlines()]
  (row,) = [row[1:] for row in rows if row[0] == first_cell]
  batch, num_steps, *lists = (cell.replace(",", "") for cell in row)
  batch_size, num_units = batch.split(" of ")
  return (
    int(batch_size),
    int(num_units),
    int(num_steps),
    list(zip(*(cell.split() for cell in lists), strict=True)),
  )


@pytest.mark.parametrize(
  ("first_cell", "files", "arguments"),
  [
    ("Fashion-MNIST, MNIST", ["fashion_mnist", "mnist"], ["1", "3", "8"]),
    ("spoken digits", ["spoken_digits"], ["1", "3", "8"]),
    (
      "spoken digits by speaker",
      ["spoken_digits"],
      ["1,speaker", "3,speaker", "8,speaker"],
    ),
    ("clothing reviews", ["clothing_reviews"], ["1", "3", "8"]),
    ("Shakespeare, ε = 3 and 8", ["shakespeare"], ["3", "8"]),
  ],
)
def test_what_records_spend_is_what_another_computation_says(
  first_cell, files, arguments
):
  batch_size, num_units, num_steps, columns = _accounted(first_cell)
  steps = dict(sampling_prob=batch_size / num_units, num_steps=num_steps)
  for argument, shown in zip(arguments, columns, strict=True):
    for name in files:
      path = str(_RECORDS / f"{name}.py")
      config = runpy.run_path(path)["get_config"](argument)
      assert config.train.expected_batch_size == batch_size
      assert config.train.num_steps == num_steps
      target = config.privacy.epsilon
      assert target == float(argument.partition(",")[0])
    noise_multiplier = accounting.calibrate_noise_multiplier(
      epsilon=target, delta=1e-5, **steps
    )
    spent = convolution.epsilon(
      noise_multiplier=noise_multiplier, delta=1e-5, **steps
    )
    assert 0.998 * target < spent < 1.00001 * target
    curve = selection.curve(noise_multiplier=noise_multiplier, **steps)
    best_of_ten = selection.best_of_truncated_negative_binomial(
      curve, mean_runs=10, shape=0.1
    )
    np.testing.assert_allclose(noise_multiplier, float(shown[0]), rtol=1e-3)
    assert shown[1:] == (
      tables.format_epsilon(selection.epsilon(curve, delta=1e-5)),
      tables.format_epsilon(selection.epsilon(best_of_ten, delta=1e-5)),
    )
  # Fails if: a config's batch, steps or epsilon are not the table's, or what
  # its noise spends is more than it says.


def _trained(workdir, data):
  """Parameters and test accuracy of a small run of MNIST's record."""
  config = runpy.run_path(str(_RECORDS / "mnist.py"))["get_config"]("8")
  decode, whitened = config.data.image_transforms
  small = dataclasses.replace(
    whitened,
    features=dataclasses.replace(whitened.features, num_angles=2),
    num_groups=3,
    num_pictures=100,
  )
  config.data = dataclasses.replace(
    config.data, path=str(data), image_transforms=(decode, small)
  )
  config.privacy.noise_seed = config.privacy.sampler_seed = 0
  config.train.num_steps = config.train.eval_every_steps = 5
  config.train.expected_batch_size = 20
  config.perf.microbatch_size = 20
  experiment = loop.open_experiment(config, workdir, devices=jax.devices()[:1])
  summary, state = loop.train(experiment, log=io.StringIO())
  return jax.device_get(state.params), summary["accuracy"]


def test_the_test_split_has_no_part_in_training(tmp_path):
  data = tmp_path / "data"
  raw_tools.write_idx(data, train=60, test=40, shape=(28, 28))
  first, accuracy = _trained(tmp_path / "first", data)
  rng = np.random.default_rng(5)
  others = rng.integers(0, 256, (40, 28, 28), np.uint8)
  (data / "t10k-images-idx3-ubyte").write_bytes(raw_tools.idx(others))
  second, other_accuracy = _trained(tmp_path / "second", data)
  assert accuracy != other_accuracy  # The run did see other pictures.
  jax.tree.map(np.testing.assert_array_equal, first, second)
  # Fails if: a mean, a scale or a choice is made on test records too.
