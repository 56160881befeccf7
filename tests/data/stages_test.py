"""Tests of ppnet.data.stages."""

import dataclasses

import grain
import numpy as np
import pytest

from ppnet.data import augment_audio, augment_image, examples, image, stages
from tests.data import conftest

_CONTENT = conftest.png(
  np.random.default_rng(0).integers(0, 256, (6, 6, 3), np.uint8)
)
_CHAIN = [
  image.Decode(image_size=6, image_channels=3, as_uint8=True),
  augment_image.RandomCrop(size=5),
  augment_image.Rotate(max_degrees=30),
  image.MinMax(),
]


def _trace(**options) -> list[stages.Stage]:
  element = {"id": "a", "image": _CONTENT}
  return stages.trace(_CHAIN, element, "image", **{"seed": 3, **options})


def test_every_stage_is_kept_and_evaluation_has_no_random_ones():
  trace = _trace()
  assert [stage.transform for stage in trace] == _CHAIN
  assert [stage.value.shape for stage in trace] == [(6, 6, 3)] + [(5, 5, 3)] * 3
  evaluated = _trace(augment=False)
  assert [stage.transform for stage in evaluated] == [_CHAIN[0], _CHAIN[3]]
  np.testing.assert_array_equal(
    evaluated[-1].value, trace[0].value / np.float32(255)
  )


def test_views_depend_on_seed_record_and_view_and_nothing_else():
  last = lambda **options: _trace(**options)[-1].value
  np.testing.assert_array_equal(last(record=5, view=2), last(record=5, view=2))
  for options in ({"seed": 4}, {"record": 1}, {"view": 1}):
    assert not np.array_equal(last(**options), last())


def test_pipeline_decodes_once_and_normalises_whole_batches():
  crop = image.CenterCrop(size=5)  # For evaluation, where nothing is random.
  chain = examples.Chain(
    [*_CHAIN[:2], crop, *_CHAIN[2:], image.ZScore(mean=0.5, std=0.5)],
    shape=(5, 5, 3),
  )
  assert chain.fixed == (_CHAIN[0],)
  assert chain.random == (_CHAIN[1], crop, _CHAIN[2])
  assert [type(t).__name__ for t in chain.stacked] == ["MinMax", "ZScore"]
  evaluated = chain.without_augmentation()
  assert evaluated.fixed == (_CHAIN[0], crop)
  assert not evaluated.random


def test_each_transform_draws_for_itself():
  noise = augment_audio.AddNoise(min_snr_db=0.0, max_snr_db=0.0)
  clip = np.sin(np.arange(4000, dtype=np.float32))
  first, second = (
    stage.value
    for stage in stages.trace(
      [noise, noise], {"id": "a", "audio": clip}, "audio", seed=1
    )
  )
  added = np.corrcoef(first - clip, second - first)[0, 1]
  assert abs(added) < 0.1
  # Fails if: two transforms share a stream.


def test_transform_without_a_kind_and_missing_modality_are_named():
  @dataclasses.dataclass(frozen=True)
  class Odd(grain.transforms.Map):
    def map(self, element):
      return element

  with pytest.raises(ValueError, match="transform='Odd'"):
    stages.trace([Odd()], {"id": "a", "image": b""}, "image", seed=0)
  with pytest.raises(ValueError, match="an element with 'audio'"):
    stages.trace(_CHAIN, {"id": "a", "image": b""}, "audio", seed=0)
