"""Tests of the accounting against other computations of the same numbers."""

import math
import subprocess
import sys

import dp_accounting
import numpy as np
import pytest
from dp_accounting import pld, rdp
from scipy import integrate, special, stats

from ppnet import config
from ppnet.privacy import accounting, participation
from tests.privacy import convolution

_REPLACE = config.NeighboringRelation.REPLACE_ONE
_TUTORIALS = [  # (batch size, noise multiplier, epochs, epsilon as published)
  (256, 1.3, 15, 1.19),
  (256, 1.1, 60, 3.01),
  (256, 0.7, 45, 7.10),
  (240, 1.3, 15, 1.16),
  (240, 1.1, 60, 2.91),
  (240, 0.7, 45, 6.86),
]


@pytest.mark.parametrize("module", ["accounting", "sampling", "ledger"])
def test_module_imports_no_jax(module):
  code = (
    f"import sys, ppnet.privacy.{module};"
    "bad = [m for m in sys.modules if m.split('.')[0] in ('jax', 'jaxlib')];"
    "sys.exit(str(bad) if bad else 0)"
  )
  subprocess.run([sys.executable, "-c", code], check=True)
  # Fails if: one of these modules, or dp_accounting, imports jax.


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
@pytest.mark.parametrize("sampling_prob", [0.02, 1.0])
def test_epsilon_matches_dp_accounting(accountant, sampling_prob):
  direct = {"pld": pld.PLDAccountant, "rdp": rdp.RdpAccountant}[accountant]()
  event = dp_accounting.PoissonSampledDpEvent(
    sampling_prob, dp_accounting.GaussianDpEvent(1.7)
  )
  direct.compose(event, 90)
  got = accounting.epsilon(
    noise_multiplier=1.7,
    sampling_prob=sampling_prob,
    num_steps=90,
    delta=1e-6,
    accountant=accountant,
  )
  np.testing.assert_allclose(got, direct.get_epsilon(1e-6), rtol=1e-5)
  # Fails if: sampling or the number of steps is not passed on.


@pytest.mark.parametrize(
  ("noise_multiplier", "sampling_prob", "num_steps", "delta"),
  [(2.5, 0.14, 150, 1e-5), (0.8, 0.02, 400, 1e-6), (3.0, 1.0, 20, 1e-5)],
)
def test_sampled_steps_match_a_convolution(
  noise_multiplier, sampling_prob, num_steps, delta
):
  steps = dict(
    noise_multiplier=noise_multiplier,
    sampling_prob=sampling_prob,
    num_steps=num_steps,
    delta=delta,
  )
  np.testing.assert_allclose(
    accounting.epsilon(**steps), convolution.epsilon(**steps), rtol=1e-5
  )
  # Fails if: one direction is left out, or a step's sampling.


def _classic_rdp_epsilon(*, noise_multiplier, sampling_prob, steps, delta):
  """Mironov 2019, Section 3.3 (integer orders), and 2017, Proposition 3."""
  q = sampling_prob
  best = math.inf
  for order in range(2, 65):
    k = np.arange(order + 1)
    terms = (
      special.gammaln(order + 1)
      - special.gammaln(k + 1)
      - special.gammaln(order - k + 1)
      + k * math.log(q)
      + (order - k) * math.log1p(-q)
      + (k * k - k) / (2 * noise_multiplier**2)
    )
    renyi = steps * special.logsumexp(terms) / (order - 1)
    best = min(best, renyi + math.log(1 / delta) / (order - 1))
  return best


@pytest.mark.parametrize(
  ("batch_size", "noise_multiplier", "epochs", "published"), _TUTORIALS
)
def test_epsilon_is_below_published_rows(
  batch_size, noise_multiplier, epochs, published
):
  # The tutorials of TF-Privacy (batch 256) and Opacus (240) printed RDP with
  # the conversion of 2017. It is computed here, to show that these are the
  # same mechanisms; both accountants of today are tighter, PLD the tightest.
  sampling_prob = batch_size / 60000
  steps = epochs * (60000 // batch_size)
  classic = _classic_rdp_epsilon(
    noise_multiplier=noise_multiplier,
    sampling_prob=sampling_prob,
    steps=steps,
    delta=1e-5,
  )
  by_accountant = {
    accountant: accounting.epsilon(
      noise_multiplier=noise_multiplier,
      sampling_prob=sampling_prob,
      num_steps=steps,
      delta=1e-5,
      accountant=accountant,
    )
    for accountant in ("pld", "rdp")
  }
  direct = rdp.RdpAccountant().compose(
    dp_accounting.PoissonSampledDpEvent(
      sampling_prob, dp_accounting.GaussianDpEvent(noise_multiplier)
    ),
    steps,
  )
  np.testing.assert_allclose(
    by_accountant["rdp"], direct.get_epsilon(1e-5), rtol=1e-9
  )
  assert classic == pytest.approx(published, rel=0.01)
  assert by_accountant["pld"] < by_accountant["rdp"] < classic
  assert by_accountant["pld"] > 0.65 * published
  # Fails if: epsilon is that of half the steps, or of twice the noise.


def _smallest_epsilon(delta_of, delta):
  """Bisection for the epsilon at which `delta_of` meets `delta`."""
  low, high = 0.0, 60.0
  for _ in range(50):
    middle = (low + high) / 2
    low, high = (middle, high) if delta_of(middle) > delta else (low, middle)
  return high


@pytest.mark.parametrize("sampling_prob", [0.2, 1.0])
def test_replace_one_matches_quadrature(sampling_prob):
  # Noise 1.3 times the sensitivity 2 (C = 1), one step; the sum without the
  # differing example is 0, with it +1 in one data set and -1 in the other.
  stddev, q = 2.6, sampling_prob

  def delta_of(epsilon):
    def excess(x):
      zero = (1 - q) * stats.norm.pdf(x, 0, stddev)
      up = zero + q * stats.norm.pdf(x, 1, stddev)
      down = zero + q * stats.norm.pdf(x, -1, stddev)
      return np.maximum(up - np.exp(epsilon) * down, 0)

    x = np.linspace(-30, 30, 60001)
    return integrate.trapezoid(excess(x), x)

  got = accounting.epsilon(
    noise_multiplier=1.3,
    sampling_prob=q,
    num_steps=1,
    delta=1e-4,
    neighboring_relation=_REPLACE,
  )
  np.testing.assert_allclose(got, _smallest_epsilon(delta_of, 1e-4), rtol=1e-3)
  # Fails if: the noise is taken relative to C instead of the sensitivity 2C.


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_full_batch_epsilon_is_the_same_for_both_relations(accountant):
  one, other = (
    accounting.epsilon(
      noise_multiplier=4.0,
      sampling_prob=1.0,
      num_steps=7,
      delta=1e-5,
      accountant=accountant,
      neighboring_relation=relation,
    )
    for relation in config.NeighboringRelation
  )
  assert one == other
  # Fails if: the PLD accountant doubles the sensitivity a second time.


def test_rdp_refuses_replace_one_with_sampling():
  with pytest.raises(ValueError, match="REPLACE_ONE.*Use the PLD accountant"):
    accounting.epsilon(
      noise_multiplier=1.0,
      sampling_prob=0.5,
      num_steps=3,
      delta=1e-5,
      accountant="rdp",
      neighboring_relation=_REPLACE,
    )
  # Fails if: the sampled RDP of add-or-remove-one is returned instead.


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_epsilon_edge_cases(accountant):
  arguments = {"sampling_prob": 0.1, "delta": 1e-5, "accountant": accountant}
  assert (
    accounting.epsilon(noise_multiplier=0.0, num_steps=5, **arguments)
    == math.inf
  )
  assert (
    accounting.epsilon(noise_multiplier=1.0, num_steps=0, **arguments) == 0.0
  )
  huge = accounting.epsilon(noise_multiplier=0.02, num_steps=999, **arguments)
  assert 1000 < huge < math.inf
  # Fails if: little noise needs more memory than there is.


@pytest.mark.parametrize(
  ("accountant", "sampling_prob", "num_steps", "target", "relation"),
  [
    ("pld", 0.01, 1, 1.0, "add_or_remove_one"),
    ("pld", 0.004, 3000, 0.5, "add_or_remove_one"),
    ("pld", 0.18, 100, 8.0, "add_or_remove_one"),
    ("pld", 0.18, 100, 3.0, "replace_one"),
    ("pld", 1.0, 40, 2.0, "replace_one"),
    ("pld", 0.1, 200, 90.0, "add_or_remove_one"),
    ("rdp", 0.004, 3000, 0.5, "add_or_remove_one"),
    ("rdp", 0.18, 100, 8.0, "add_or_remove_one"),
    ("rdp", 1.0, 40, 30.0, "add_or_remove_one"),
  ],
)
def test_calibrated_epsilon_is_just_below_target(
  accountant, sampling_prob, num_steps, target, relation
):
  arguments = {
    "sampling_prob": sampling_prob,
    "num_steps": num_steps,
    "delta": 1e-5,
    "accountant": accountant,
    "neighboring_relation": relation,
  }
  noise_multiplier = accounting.calibrate_noise_multiplier(
    epsilon=target, **arguments
  )
  reached = accounting.epsilon(noise_multiplier=noise_multiplier, **arguments)
  assert 0.995 * target <= reached <= target
  # Fails if: the search returns the end of its bracket with too little noise.


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
@pytest.mark.parametrize("target", [1e-7, 1e7])
def test_unreachable_target_is_named(accountant, target):
  with pytest.raises(
    ValueError,
    match=rf"epsilon={target}.*largest_noise_multiplier_tried=.*it_reached=",
  ):
    accounting.calibrate_noise_multiplier(
      epsilon=target,
      delta=1e-5,
      sampling_prob=0.1,
      num_steps=100,
      accountant=accountant,
    )


@pytest.mark.parametrize(
  "bad",
  [
    {"noise_multiplier": -1.0},
    {"noise_multiplier": math.nan},
    {"sampling_prob": 0.0},
    {"sampling_prob": 1.5},
    {"num_steps": -1},
    {"num_steps": True},
    {"delta": 0.0},
    {"delta": 1.0},
    {"accountant": "plt"},
    {"neighboring_relation": "replace"},
  ],
)
def test_bad_argument_is_named(bad):
  good = {
    "noise_multiplier": 1.0,
    "sampling_prob": 0.1,
    "num_steps": 3,
    "delta": 1e-5,
  }
  ((name, _),) = bad.items()
  with pytest.raises(ValueError, match=name):
    accounting.epsilon(**{**good, **bad})
  if name != "noise_multiplier":
    del good["noise_multiplier"]
    with pytest.raises(ValueError, match=name):
      accounting.calibrate_noise_multiplier(epsilon=1.0, **{**good, **bad})


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan])
def test_bad_target_is_named(bad):
  with pytest.raises(ValueError, match="Expected epsilon > 0"):
    accounting.calibrate_noise_multiplier(
      epsilon=bad, delta=1e-5, sampling_prob=0.1, num_steps=3
    )


@pytest.mark.parametrize("num_steps", [1, 7, 300, 14041])
def test_curve_never_under_reports(num_steps):
  arguments = {
    "noise_multiplier": 1.2,
    "sampling_prob": 0.03,
    "delta": 1e-5,
    "accountant": "rdp",  # Quick; the curve does not look at it.
  }
  sampling_prob = arguments.pop("sampling_prob")
  curve = accounting.EpsilonCurve(
    num_steps=num_steps,
    participation=participation.Poisson(sampling_prob=sampling_prob),
    **arguments,
  )
  arguments["sampling_prob"] = sampling_prob
  exact = lambda steps: accounting.epsilon(num_steps=steps, **arguments)
  counts = sorted({0, 1, num_steps // 3, num_steps - 1, num_steps})
  bounds = [curve(steps) for steps in counts]
  for steps, bound in zip(counts, bounds, strict=True):
    assert exact(steps) <= bound <= exact(num_steps)
  assert bounds == sorted(bounds)
  assert curve(0) == 0.0
  assert curve(num_steps) == exact(num_steps)
  assert curve(num_steps + 1) == exact(num_steps + 1)
  points = {
    accounting._round_up(steps, num_steps) for steps in range(num_steps + 1)
  }
  assert len(points) <= 65
  # Fails if: a step count is rounded down to the grid.


def test_curve_computes_each_point_once_and_late(monkeypatch):
  calls = []
  monkeypatch.setattr(
    accounting, "_epsilon", lambda *args: calls.append(args[2]) or 1.0
  )
  curve = accounting.EpsilonCurve(
    noise_multiplier=1.0,
    participation=participation.Poisson(sampling_prob=0.1),
    num_steps=6400,
    delta=1e-5,
  )
  assert not calls
  curve(1)
  assert set(calls) == {2, 6400}


def test_curve_checks_before_the_run():
  with pytest.raises(ValueError, match="delta"):
    accounting.EpsilonCurve(
      noise_multiplier=1.0,
      participation=participation.Poisson(sampling_prob=0.1),
      num_steps=10,
      delta=2.0,
    )
