"""Stored features: the numbers that would be computed, and none of others."""

import pathlib

import numpy as np
import pytest

from ppnet import config as config_lib
from ppnet.data import (
  augment_image,
  image,
  pipeline,
  prepare,
  scattering,
  sources,
  stored,
)
from tests import tiny

_DECODE = image.Decode(image_size=8, image_channels=1)


def experiment(*transforms, store):
  config = tiny.experiment()
  config.model.linear = config_lib.LinearConfig()
  config.model.audio = None
  config.data.store_fixed = store
  config.data.image_transforms = (_DECODE, *transforms)
  return config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  out = tmp_path_factory.mktemp("prepared")
  prepare.prepare(tiny.experiment().data, out)
  return out


def images(config, folder, *, augmented=False):
  dataset = pipeline.examples(config, folder, split="test", augmented=augmented)
  return np.stack([dataset[i]["image"] for i in (0, 7, 3)])


def files(folder):
  return sorted(folder.glob("fixed-*"))


def test_what_is_stored_is_what_would_be_computed(folder):
  features = scattering.Scattering(num_scales=1, num_angles=2)
  expected = images(experiment(features, store=False), folder)
  assert expected.shape == (3, 4, 4, 3)
  assert not files(folder)
  for _ in range(2):  # Made, then found.
    found = images(experiment(features, store=True), folder)
    np.testing.assert_array_equal(found, expected)
  (file,) = files(folder)
  written = file.stat().st_mtime_ns
  other = scattering.Scattering(num_scales=1, num_angles=3)
  found = images(experiment(other, store=True), folder)
  np.testing.assert_array_equal(
    found, images(experiment(other, store=False), folder)
  )
  assert len(files(folder)) == 2
  assert file.stat().st_mtime_ns == written
  # Fails if: a setting of a transformation is not in the name.


def test_what_is_random_is_drawn_after_what_is_stored(folder):
  config = experiment(augment_image.Flip(horizontal_prob=0.5), store=True)
  expected = experiment(augment_image.Flip(horizontal_prob=0.5), store=False)
  np.testing.assert_array_equal(
    images(config, folder, augmented=True),
    images(expected, folder, augmented=True),
  )


def name(**changes):
  arguments = {
    "split": "train",
    "modality": "image",
    "transforms": (_DECODE,),
    "hashes": ["a"],
  } | changes
  return stored.path(pathlib.Path("x"), **arguments)


@pytest.mark.parametrize(
  "change",
  [
    {"split": "test"},
    {"modality": "audio"},
    {"hashes": ["b"]},
    {"transforms": (image.Decode(image_size=9, image_channels=1),)},
    {"transforms": (_DECODE, image.ZScore(mean=0.0, std=1.0))},
    {"transforms": ()},
  ],
)
def test_whatever_the_numbers_depend_on_is_in_the_name(change):
  assert name() == name()
  assert name(**change) != name()


def test_a_record_that_fails_leaves_no_file(tmp_path):
  def make(positions):
    if 2 in positions:
      raise sources.BadRecordError("r2", "broken.")
    return np.zeros((len(positions), 3), np.float32)

  file = tmp_path / "fixed.npy"
  with pytest.raises(sources.BadRecordError, match="r2"):
    stored.open_or_make(file, make, count=4)
  assert not list(tmp_path.iterdir())


def test_a_file_of_another_shape_is_refused_and_none_can_be_written(tmp_path):
  file = tmp_path / "fixed.npy"
  make = lambda positions: [np.full(3, n, np.float32) for n in positions]
  array = stored.open_or_make(file, make, count=4)
  np.testing.assert_array_equal(array[:, 0], [0, 1, 2, 3])
  with pytest.raises(ValueError, match="read-only"):
    array[0] = 1.0
  with pytest.raises(ValueError, match="Delete it"):
    stored.open_or_make(file, make, count=5)
  with pytest.raises(ValueError, match="Delete it"):
    stored.open_or_make(file, make, count=4, shape=(2,))


def test_skipped_records_have_no_place_in_a_file():
  config = experiment(store=True)
  config.data.on_bad_record = config_lib.BadRecord.SKIP
  with pytest.raises(ValueError, match="on_bad_record"):
    config_lib.validate(config)
