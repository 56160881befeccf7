"""The Gaussian mechanism's calibration for a private cut."""

import math

import numpy as np
import pytest
from scipy import integrate, stats

from ppnet import config
from ppnet.privacy import input_privacy


@pytest.mark.parametrize(
  ("epsilon", "expected"), [(1.0, 3.73), (2.0, 1.99), (4.0, 1.08), (8.0, 0.60)]
)
def test_calibration_matches_known_values(epsilon, expected):
  got = input_privacy.calibrate_noise_multiplier(epsilon=epsilon, delta=1e-5)
  assert round(got, 2) == expected


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 2.0, 9.0])
@pytest.mark.parametrize("sigma", [0.4, 1.0, 6.0])
def test_delta_matches_the_integral(epsilon, sigma):
  """Hockey-stick divergence of N(1, sigma) from N(0, sigma)."""

  def excess(x):
    p = stats.norm.pdf(x, 1, sigma)
    return max(0.0, p - math.exp(epsilon) * stats.norm.pdf(x, 0, sigma))

  start = 0.5 + epsilon * sigma**2  # Where the two are equal.
  expected, _ = integrate.quad(excess, start, start + 40 * sigma, limit=200)
  got = input_privacy.gaussian_delta(epsilon=epsilon, noise_multiplier=sigma)
  np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("epsilon", [0.0, 0.01, 1.0, 50.0])
@pytest.mark.parametrize("delta", [1e-12, 1e-5, 0.3])
def test_calibration_is_the_least_that_holds(epsilon, delta):
  got = input_privacy.calibrate_noise_multiplier(epsilon=epsilon, delta=delta)
  at = lambda sigma: input_privacy.gaussian_delta(
    epsilon=epsilon, noise_multiplier=sigma
  )
  assert at(got) <= delta < at(got * (1 - 1e-5))


def test_claim_has_twice_the_norm_as_sensitivity():
  claim = input_privacy.claim(
    config.PrivateCutConfig(layer=2, l2_clip_norm=3.0, epsilon=2.0)
  )
  assert claim["noise_stddev"] == claim["noise_multiplier"] * 2 * 3.0
  assert not claim["seeded"]
  assert "Not about the training set" in claim["guarantee"]
  # Fails if: the sensitivity is taken for the norm.


def test_roots_are_fresh_unless_seeded():
  fresh = config.PrivateCutConfig()
  roots = {input_privacy.noise_root_entropy(fresh) for _ in range(5)}
  assert len(roots) == 5
  assert (
    input_privacy.noise_root_entropy(config.PrivateCutConfig(noise_seed=3)) == 3
  )


@pytest.mark.parametrize(
  "change", [{"epsilon": -1.0}, {"delta": 0.0}, {"delta": 1.0}]
)
def test_targets_out_of_range_are_named(change):
  with pytest.raises(ValueError, match=next(iter(change))):
    input_privacy.calibrate_noise_multiplier(
      **({"epsilon": 1.0, "delta": 1e-5} | change)
    )
