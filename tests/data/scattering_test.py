"""Tests of ppnet.data.scattering, against Kymatio's numbers and its meaning."""

import numpy as np
import pytest

from ppnet.data import scattering, sources
from tests.goldens import make_features

_GOLDENS = np.load(make_features.PATH)
_RNG = np.random.default_rng(3)


def _orders(num_scales: int, num_angles: int) -> np.ndarray:
  """The order of each map."""
  first = num_scales * num_angles
  second = num_angles**2 * num_scales * (num_scales - 1) // 2
  return np.repeat([0, 1, 2], [1, first, second])


def _assert_like_kymatio(ours, theirs, *, num_scales, num_angles):
  # Kymatio divides every filter by 2 * 3.1415 ..., so a map of order m, which
  # took m + 1 filters, is larger by a factor that is known exactly.
  orders = _orders(num_scales, num_angles)
  factor = (np.pi / 3.1415) ** (orders + 1)
  np.testing.assert_allclose(
    ours * factor[:, None, None], theirs, rtol=1e-5, atol=2e-6
  )


@pytest.mark.parametrize("name", make_features.SCATTERING)
def test_features_match_kymatio(name):
  *_, num_scales, num_angles = make_features.SCATTERING[name]
  result = scattering.features(
    make_features.pictures(name), num_scales=num_scales, num_angles=num_angles
  )
  assert result.dtype == np.float32
  _assert_like_kymatio(
    result,
    _GOLDENS[f"{name}/scattering"],
    num_scales=num_scales,
    num_angles=num_angles,
  )


def test_two_scales_and_eight_angles_give_81_maps_of_7_by_7():
  assert scattering.features(np.zeros((3, 28, 28))).shape == (3, 81, 7, 7)
  assert scattering.features(np.zeros((0, 28, 28))).shape == (0, 81, 7, 7)


def test_constant_picture_has_order_0_alone():
  result = scattering.features(np.full((2, 28, 36), 0.7, np.float32))
  np.testing.assert_allclose(result[:, 0], 0.7, rtol=1e-5)
  np.testing.assert_allclose(result[:, 1:], 0, atol=1e-6)


def test_wave_answers_at_its_own_scale_and_angle():
  y, x = np.mgrid[:64, :64]
  for scale in range(2):
    for i in range(8):
      angle = (3 - i) * np.pi / 8
      phase = 0.75 * np.pi / 2**scale * (y * np.cos(angle) + x * np.sin(angle))
      result = scattering.features(np.cos(phase)[None].astype(np.float32))
      first = result[0, 1:17].mean(axis=(1, 2))
      assert int(first.argmax()) == 8 * scale + i


def test_small_shift_changes_features_less_than_pixels():
  image = _RNG.random((1, 40, 40)).astype(np.float32)
  moved = np.roll(image, 1, axis=2)
  part = (slice(None), slice(None), slice(2, -2), slice(2, -2))
  before, after = (scattering.features(x)[part] for x in (image, moved))
  change = np.linalg.norm(before - after) / np.linalg.norm(before)
  assert change < 0.15
  assert np.linalg.norm(image - moved) / np.linalg.norm(image) > 0.5


def test_pictures_do_not_see_each_other():
  images = _RNG.random((19, 28, 28)).astype(np.float32)
  together = scattering.features(images)
  for i in (0, 7, 8, 18):  # Chunks hold 8.
    alone = scattering.features(images[i : i + 1])
    np.testing.assert_allclose(together[i], alone[0], rtol=1e-5, atol=1e-6)
  images[3, 5, 5] = np.nan
  damaged = scattering.features(images)
  others = np.arange(19) != 3
  np.testing.assert_allclose(
    damaged[others], together[others], rtol=1e-5, atol=1e-6
  )
  # Fails if: a statistic of the batch enters the features.


def test_map_puts_channels_last():
  pixels = _RNG.random((28, 32, 3)).astype(np.float32)
  element = {"id": "a", "image": pixels, "label": 3}
  result = scattering.Scattering().map(element)
  assert result["image"].shape == (7, 8, 243)
  assert result["image"].flags.c_contiguous
  assert result["label"] == 3
  for channel in range(3):
    expected = scattering.features(pixels[None, :, :, channel])[0]
    np.testing.assert_allclose(
      result["image"][:, :, 81 * channel : 81 * (channel + 1)],
      expected.transpose(1, 2, 0),
      rtol=1e-5,
      atol=1e-6,
    )


def test_impossible_input_is_named():
  with pytest.raises(ValueError, match="Scale integer pixels first"):
    scattering.features(np.zeros((1, 28, 28), np.uint8))
  with pytest.raises(ValueError, match="Lower num_scales"):
    scattering.features(np.zeros((1, 3, 28)), num_scales=2)
  with pytest.raises(ValueError, match="num_angles > 0"):
    scattering.Scattering(num_angles=0)
  for pixels, cause in [
    (np.zeros((3, 9, 1), np.float32), "fewer than 4 x 4"),
    (np.full((9, 9, 1), np.nan, np.float32), "not finite"),
  ]:
    with pytest.raises(sources.BadRecordError, match=f"'r2'.*{cause}"):
      scattering.Scattering().map({"id": "r2", "image": pixels})


@pytest.mark.parametrize("size", [4, 5, 7, 8])
def test_smallest_pictures_give_finite_features(size):
  result = scattering.features(_RNG.random((2, size, size + 1)))
  assert np.isfinite(result).all()
  assert result.shape[1] == 81


@pytest.mark.peers
def test_random_sizes_match_kymatio():
  rng = np.random.default_rng(4)
  for _ in range(12):
    num_scales, num_angles = int(rng.integers(1, 4)), int(rng.integers(1, 9))
    height, width = rng.integers(20, 70, 2)
    images = rng.random((2, height, width)).astype(np.float32)
    theirs = make_features.kymatio_features(
      images, num_scales=num_scales, num_angles=num_angles
    )
    ours = scattering.features(
      images, num_scales=num_scales, num_angles=num_angles
    )
    _assert_like_kymatio(
      ours, theirs, num_scales=num_scales, num_angles=num_angles
    )
