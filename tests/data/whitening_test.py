"""Random strokes, and features that they whiten."""

import jax.numpy as jnp
import numpy as np
import pytest

from ppnet.data import scattering, sources, stages, strokes, whitening
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


def test_strokes_follow_the_seed_and_no_number():
  drawn = strokes.pictures(5, height=28, width=20, seed=1)
  np.testing.assert_array_equal(
    drawn[:3], strokes.pictures(3, height=28, width=20, seed=1)
  )
  other = strokes.pictures(3, height=28, width=20, seed=2)
  assert not np.array_equal(drawn[:3], other)
  with pytest.raises(ValueError, match="8 x 8"):
    strokes.pictures(1, height=7, width=28, seed=0)
  with pytest.raises(ValueError, match="num"):
    strokes.pictures(0, height=28, width=28, seed=0)


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
  with pytest.raises(ValueError, match="damping"):
    whitening.fit(features, damping=0.0)
  # Fails if: the mean stays in the covariance, or nothing is added to it.


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
