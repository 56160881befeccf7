"""Random strokes and garments, and features that they whiten."""

import jax.numpy as jnp
import numpy as np
import pytest

from ppnet.data import (
  garments,
  scattering,
  sources,
  stages,
  strokes,
  whitening,
)
from ppnet.models import layers

_RNG = np.random.default_rng(5)
_FEATURES = scattering.Scattering(num_scales=1, num_angles=2)


def whitened(**changes):
  arguments = {"features": _FEATURES, "num_groups": 3, "num_pictures": 300}
  return whitening.Whitened(**arguments | changes)


def elements(pixels):
  return [
    {"id": str(n), "image": one[..., None]} for n, one in enumerate(pixels)
  ]


def test_strokes_fill_their_box_around_the_middle():
  drawn = strokes.pictures(40, height=28, width=28, seed=1)
  assert drawn.shape == (40, 28, 28)
  assert drawn.dtype == np.float32
  assert drawn.min() == 0
  assert drawn.max() == 1
  for picture in drawn:
    rows, columns = np.nonzero(picture > 0)
    longest = max(np.ptp(rows), np.ptp(columns)) + 1
    assert 17 <= longest <= 21
    for axis in range(2):
      mass = picture.sum(axis=axis)
      middle = (mass * np.arange(28)).sum() / mass.sum()
      assert abs(middle - 13.5) < 0.75
    assert 0.02 < picture.mean() < 0.4
  # Fails if: strokes are not scaled to the box, or centred by their box.


@pytest.mark.parametrize("process", [strokes, garments])
def test_pictures_follow_the_seed_and_no_number(process):
  drawn = process.pictures(5, height=28, width=20, seed=1)
  np.testing.assert_array_equal(
    drawn[:3], process.pictures(3, height=28, width=20, seed=1)
  )
  other = process.pictures(3, height=28, width=20, seed=2)
  assert not np.array_equal(drawn[:3], other)
  with pytest.raises(ValueError, match="8 x 8"):
    process.pictures(1, height=7, width=28, seed=0)
  with pytest.raises(ValueError, match="num"):
    process.pictures(0, height=28, width=28, seed=0)


def test_garments_are_bright_in_the_middle_and_fill_the_longer_side():
  drawn = garments.pictures(300, height=28, width=28, seed=1)
  assert drawn.shape == (300, 28, 28)
  assert drawn.dtype == np.float32
  assert drawn.min() == 0
  assert 0.9 < drawn.max() <= 1
  longest = [
    max(np.ptp(axis) for axis in np.nonzero(picture > 0)) + 1
    for picture in drawn
  ]
  assert np.mean(np.array(longest) >= 24) > 0.9  # Not short trousers.
  assert all(0.001 < picture.mean() < 0.8 for picture in drawn)
  # What people wear is as wide on the left as on the right; shoes are not.
  mirrored = np.abs((drawn > 0.02) ^ (drawn[:, :, ::-1] > 0.02)).mean((1, 2))
  assert 0.5 < np.mean(mirrored < 0.12) < 0.9
  # Fails if: lengths do not follow the picture's, or one kind is all there is.


@pytest.mark.parametrize("shape", [(8, 8), (64, 40)])
def test_garments_scale_with_the_picture(shape):
  height, width = shape
  drawn = garments.pictures(60, height=height, width=width, seed=1)
  seen = (drawn > 0).any(axis=0)
  rows, columns = np.nonzero(seen)
  side = min(shape)
  for places, size in ((rows, height), (columns, width)):
    assert side * 0.9 <= np.ptp(places) + 1 <= side * 1.1 + 1
    assert abs(places.min() + places.max() - (size - 1)) <= 0.1 * side
  # Fails if: lengths are pixels, or the middle is not the picture's.


def test_a_prior_is_what_its_name_says():
  drawn = {"strokes": strokes, "garments": garments}
  for prior in whitening.Prior:
    transform = whitened(prior=prior, num_pictures=40)
    assert transform.label.endswith(f"random {prior.value}")
    picture = elements(_RNG.random((1, 8, 8)).astype(np.float32))[0]
    maps = [
      whitening.unit_groups(one["image"], num_groups=3)
      for one in stages.map_many(
        _FEATURES,
        elements(drawn[prior.value].pictures(40, height=8, width=8, seed=0)),
      )
    ]
    mean, inverse = whitening.fit(np.stack(maps), damping=transform.damping)
    features = _FEATURES.map(picture)["image"]
    expected = (
      whitening.unit_groups(features, num_groups=3) - mean
    ) @ inverse.T
    np.testing.assert_allclose(
      transform.map(picture)["image"].reshape(-1),
      expected,
      rtol=1e-3,
      atol=1e-3,
    )
  # Fails if: one process draws for both.


def test_whitened_features_have_the_identity_for_covariance():
  turn, _ = np.linalg.qr(_RNG.normal(size=(6, 6)))
  mixing = turn * [1, 3, 9, 1, 0.5, 0.5]
  features = _RNG.normal(size=(500, 6)) @ mixing.T + 7
  mean, inverse = whitening.fit(features.astype(np.float32), damping=1e-6)
  white = (features - mean) @ inverse.T
  np.testing.assert_allclose(white.mean(axis=0), 0, atol=1e-3)
  np.testing.assert_allclose(np.cov(white.T, bias=True), np.eye(6), atol=1e-3)
  damping = 2.0
  mean, inverse = whitening.fit(features.astype(np.float32), damping=damping)
  white = (features - mean) @ inverse.T
  np.testing.assert_allclose(
    np.cov(white.T, bias=True) + damping * inverse @ inverse.T,
    np.eye(6),
    atol=1e-3,
  )
  variances = np.var(white, axis=0)
  assert (np.diff(variances) < 0).all()
  np.testing.assert_allclose(
    variances / (1 - variances) * damping,
    np.linalg.eigvalsh(np.cov(features.T, bias=True))[::-1],
    rtol=1e-2,
  )
  with pytest.raises(ValueError, match="damping"):
    whitening.fit(features, damping=0.0)
  # Fails if: the mean stays in the covariance, nothing is added to it, or the
  # largest direction does not come first.


def test_directions_of_other_strokes_become_alike():
  drawn = strokes.pictures(200, height=8, width=8, seed=9)
  before = np.stack(
    [
      whitening.unit_groups(one["image"], num_groups=3)
      for one in stages.map_many(_FEATURES, elements(drawn))
    ]
  )
  after = np.stack(
    [
      one["image"].reshape(-1)
      for one in whitened(damping=1e-3).map_many(elements(drawn))
    ]
  )
  np.testing.assert_allclose(np.linalg.norm(before, axis=1), 1, rtol=1e-5)

  def spread(x):
    variances = np.linalg.eigvalsh(np.cov(x.T))
    return variances[-1] / np.median(variances)

  assert spread(after) < spread(before) / 4
  # Fails if: the root is of the covariance and not of its inverse.


def test_pictures_do_not_see_each_other():
  pixels = _RNG.random((5, 8, 8)).astype(np.float32)
  transform = whitened()
  together = transform.map_many(elements(pixels))
  for place, element in enumerate(elements(pixels)):
    alone = transform.map(element)
    assert alone["id"] == str(place)
    assert alone["image"].shape == transform.shape_after((8, 8, 1))
    assert alone["image"].dtype == np.float32
    np.testing.assert_allclose(
      alone["image"], together[place]["image"], rtol=1e-4, atol=1e-4
    )
  # Fails if: what whitens is measured from the records.


def test_groups_are_those_of_the_linear_model():
  maps = _RNG.normal(size=(4, 4, 6)).astype(np.float32)
  expected = np.asarray(
    layers.group_norm(jnp.array(maps[None]), num_groups=2)
  ).reshape(-1)
  np.testing.assert_allclose(
    whitening.unit_groups(maps, num_groups=2),
    expected / np.linalg.norm(expected),
    rtol=1e-4,
    atol=1e-6,
  )
  zeros = whitening.unit_groups(np.zeros((4, 4, 6), np.float32), num_groups=0)
  np.testing.assert_array_equal(zeros, 0)


def test_bad_settings_and_bad_pictures_are_refused():
  with pytest.raises(ValueError, match="damping"):
    whitened(damping=0.0)
  with pytest.raises(ValueError, match="num_groups"):
    whitened(num_groups=-1)
  with pytest.raises(ValueError, match="num_groups to divide"):
    whitened(num_groups=2).shape_after((8, 8, 1))
  with pytest.raises(sources.BadRecordError, match="not finite"):
    whitened().map(elements(np.full((1, 8, 8), np.nan, np.float32))[0])
