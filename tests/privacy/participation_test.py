"""Tests of the accounting of each sampler: against enumeration and others."""

import itertools
import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting import pld
from jax_privacy.experimental import accounting as peer
from scipy import integrate, special, stats

from ppnet import config
from ppnet.privacy import accounting, bins, participation

_ADD = config.NeighboringRelation.ADD_OR_REMOVE_ONE
_REPLACE = config.NeighboringRelation.REPLACE_ONE
_PLD, _RDP = config.Accountant.PLD, config.Accountant.RDP
_ALL = {
  "poisson": participation.Poisson(sampling_prob=0.1),
  "everybody": participation.Poisson(sampling_prob=1.0),
  "truncated": participation.TruncatedPoisson(
    num_examples=900, sampling_prob=0.1, max_batch_size=110
  ),
  "bins": participation.BallsInBins(num_bins=10),
  "epochs": participation.OncePerEpoch(steps_per_epoch=10),
  "cyclic": participation.CyclicPoisson(sampling_prob=0.4, num_groups=4),
}
_NOT_COVERED = {
  ("poisson", _RDP, _REPLACE),
  ("cyclic", _RDP, _REPLACE),
  ("truncated", _RDP, _ADD),
  ("truncated", _RDP, _REPLACE),
  ("bins", _PLD, _REPLACE),
  ("bins", _RDP, _ADD),
  ("bins", _RDP, _REPLACE),
}


def _epsilon(which, *, noise_multiplier=1.5, num_steps=20, delta=1e-5, **more):
  return accounting.epsilon(
    noise_multiplier=noise_multiplier,
    participation=which,
    num_steps=num_steps,
    delta=delta,
    **more,
  )


@pytest.mark.parametrize("relation", [_ADD, _REPLACE])
@pytest.mark.parametrize("accountant", [_PLD, _RDP])
@pytest.mark.parametrize("name", list(_ALL))
def test_every_combination_is_covered_or_refused(name, accountant, relation):
  more = {"accountant": accountant, "neighboring_relation": relation}
  if (name, accountant, relation) in _NOT_COVERED:
    with pytest.raises(ValueError, match="an accountant that covers.*Use"):
      _epsilon(_ALL[name], **more)
  else:
    assert 0 < _epsilon(_ALL[name], **more) < 60
  # Fails if: a sampler without an accountant is given another one's epsilon.


@pytest.mark.parametrize("name", list(_ALL))
def test_calibration_reaches_the_target_from_below(name):
  arguments = {"participation": _ALL[name], "num_steps": 25, "delta": 1e-5}
  noise_multiplier = accounting.calibrate_noise_multiplier(
    epsilon=2.0, **arguments
  )
  reached = accounting.epsilon(noise_multiplier=noise_multiplier, **arguments)
  assert 0.995 * 2.0 <= reached <= 2.0


def test_one_way_of_saying_the_sampling():
  for more in ({}, {"sampling_prob": 0.1, "participation": _ALL["bins"]}):
    with pytest.raises(ValueError, match="exactly one of sampling_prob"):
      accounting.epsilon(noise_multiplier=1.0, num_steps=3, delta=1e-5, **more)
  assert _epsilon(_ALL["poisson"]) == accounting.epsilon(
    noise_multiplier=1.5, sampling_prob=0.1, num_steps=20, delta=1e-5
  )


@pytest.mark.parametrize(
  ("name", "steps", "releases"),
  [
    ("poisson", 7, 7),
    ("truncated", 7, 7),
    ("bins", 11, 2),
    ("bins", 10, 1),
    ("epochs", 31, 4),
    ("cyclic", 9, 3),
    ("cyclic", 0, 0),
  ],
)
def test_a_release_that_is_cut_short_counts_whole(name, steps, releases):
  assert _ALL[name].num_releases(steps) == releases
  event = _ALL[name].dp_event(1.5, steps)
  assert event == dp_accounting.SelfComposedDpEvent(
    _ALL[name].release(1.5), releases
  )
  # Fails if: the number of cycles is rounded down.


def _accountant(event, relation=_ADD):
  composed = pld.PLDAccountant(dp_accounting.NeighboringRelation[relation.name])
  return composed.compose(event).get_epsilon(1e-5)


def test_events_match_those_of_jax_privacy():
  ours = _epsilon(_ALL["truncated"], num_steps=20)
  event = peer.truncated_dpsgd_event(
    1.5, 20, sampling_prob=0.1, num_examples=900, truncated_batch_size=110
  )
  np.testing.assert_allclose(ours, _accountant(event), rtol=1e-4)
  ours = _epsilon(_ALL["cyclic"], num_steps=22)
  event = peer.amplified_bandmf_event(1.5, 22, num_bands=4, sampling_prob=0.4)
  np.testing.assert_allclose(ours, _accountant(event), rtol=1e-4)
  # Theirs is the noise over the clip norm, and ours over twice that.
  ours = _epsilon(_ALL["truncated"], neighboring_relation=_REPLACE)
  event = peer.truncated_dpsgd_event(
    3.0, 20, sampling_prob=0.1, num_examples=900, truncated_batch_size=110
  )
  np.testing.assert_allclose(ours, _accountant(event, _REPLACE), rtol=1e-4)


@pytest.mark.parametrize("relation", [_ADD, _REPLACE])
def test_shuffling_is_one_gaussian_release_an_epoch(relation):
  ours = _epsilon(_ALL["epochs"], num_steps=31, neighboring_relation=relation)
  gaussian = dp_accounting.GaussianDpEvent(1.5 / math.sqrt(4))
  np.testing.assert_allclose(ours, _accountant(gaussian), rtol=1e-4)
  poisson = _epsilon(_ALL["poisson"], num_steps=31)
  assert ours > 2 * poisson
  # Fails if: shuffling is accounted for as Poisson sampling.


def _truncated_outcomes(num_examples, sampling_prob, max_batch_size):
  """Value of the sum → probability: example 0 adds +1, every other one -1."""
  outcomes = {}
  for coins in itertools.product([False, True], repeat=num_examples):
    drawn = [i for i, coin in enumerate(coins) if coin]
    chance = sampling_prob ** len(drawn)
    chance *= (1 - sampling_prob) ** (num_examples - len(drawn))
    kept = list(itertools.combinations(drawn, min(len(drawn), max_batch_size)))
    for batch in kept:
      value = sum(1 if i == 0 else -1 for i in batch)
      outcomes[value] = outcomes.get(value, 0) + chance / len(kept)
  return outcomes


def _density(outcomes, x, stddev):
  return sum(p * stats.norm.pdf(x, v, stddev) for v, p in outcomes.items())


def _exact_epsilon(one, other, stddev, delta):
  """Smallest epsilon of both directions, by quadrature and bisection."""
  x = np.linspace(-16, 16, 6001)
  p, q = _density(one, x, stddev), _density(other, x, stddev)
  low, high = 0.0, 20.0
  for _ in range(30):
    middle = (low + high) / 2
    reached = max(
      integrate.trapezoid(np.maximum(a - np.exp(middle) * b, 0), x)
      for a, b in ((p, q), (q, p))
    )
    low, high = (middle, high) if reached > delta else (low, middle)
  return high


@pytest.mark.parametrize(
  ("num_examples", "sampling_prob", "max_batch_size", "would_be_false"),
  [
    (2, 0.9, 1, True),
    (4, 0.5, 2, False),
    (5, 0.3, 1, True),
    (3, 0.5, 3, False),
  ],
)
def test_truncated_draw_is_not_claimed_untruncated(
  num_examples, sampling_prob, max_batch_size, would_be_false
):
  whole = _truncated_outcomes(num_examples, sampling_prob, max_batch_size)
  only_others = {}  # The neighbour: N - 1 coins, the same cut.
  for size in range(num_examples):
    kept = min(size, max_batch_size)
    only_others[-kept] = only_others.get(-kept, 0) + stats.binom.pmf(
      size, num_examples - 1, sampling_prob
    )
  exact = _exact_epsilon(whole, only_others, 1.0, 1e-3)
  which = participation.TruncatedPoisson(
    num_examples=num_examples,
    sampling_prob=sampling_prob,
    max_batch_size=max_batch_size,
  )
  claimed = _epsilon(which, noise_multiplier=1.0, num_steps=1, delta=1e-3)
  untruncated = _epsilon(
    participation.Poisson(sampling_prob=sampling_prob),
    noise_multiplier=1.0,
    num_steps=1,
    delta=1e-3,
  )
  assert claimed >= 0.9999 * exact
  assert claimed >= untruncated * 0.9999
  if would_be_false:  # The claim of an untruncated draw.
    assert exact > 1.02 * untruncated
  if max_batch_size == num_examples:
    np.testing.assert_allclose(claimed, untruncated, rtol=1e-3)
  # Fails if: the cut is left out of the accounting.


def _bins_delta(epsilon, stddev):
  """Both directions for two bins, by quadrature in two dimensions."""
  x = np.linspace(-8 * stddev, 8 * stddev + 1, 1501)
  q = stats.norm.pdf(x, 0, stddev)
  p = stats.norm.pdf(x, 1, stddev)
  without = q[:, None] * q[None, :]
  within = (p[:, None] * q[None, :] + q[:, None] * p[None, :]) / 2
  area = (x[1] - x[0]) ** 2
  return max(
    np.maximum(a - np.exp(epsilon) * b, 0).sum() * area
    for a, b in ((within, without), (without, within))
  )


@pytest.mark.parametrize("stddev", [0.8, 2.0])
def test_one_cycle_of_two_bins_matches_quadrature(stddev):
  got = _epsilon(
    participation.BallsInBins(num_bins=2),
    noise_multiplier=stddev,
    num_steps=2,
    delta=1e-4,
  )
  # The hockey-stick at our epsilon is at most delta, and nearly that.
  assert 0.97e-4 < _bins_delta(got, stddev) <= 1.0005e-4
  # Fails if: the mean of the ratios is taken of one bin fewer.


@pytest.mark.parametrize(
  ("num_bins", "num_cycles", "stddev"), [(7, 1, 1.0), (12, 3, 0.9)]
)
def test_cycles_of_bins_match_simulation(num_bins, num_cycles, stddev):
  got = _epsilon(
    participation.BallsInBins(num_bins=num_bins),
    noise_multiplier=stddev,
    num_steps=num_bins * num_cycles,
    delta=0.01,
  )
  rng = np.random.default_rng(5)
  losses = np.zeros(400_000)
  for _ in range(num_cycles):
    z = rng.normal(scale=stddev, size=(losses.size, num_bins))
    z[:, 0] += 1  # The bins are exchangeable.
    losses += special.logsumexp((z - 0.5) / stddev**2, axis=1)
    losses -= math.log(num_bins)
  delta = np.mean(np.maximum(-np.expm1(got - losses), 0))
  assert delta == pytest.approx(0.01, rel=0.05)
  # Fails if: the cycles are composed as one, or a cycle is left out.


def test_one_bin_is_the_gaussian_mechanism():
  one = participation.BallsInBins(num_bins=1)
  assert _epsilon(one) == _epsilon(_ALL["everybody"])


@pytest.mark.parametrize(
  ("num_bins", "stddev"), [(3, 0.5), (3, 4.0), (500, 1.0)]
)
def test_bins_never_cost_more_than_no_amplification(num_bins, stddev):
  which = participation.BallsInBins(num_bins=num_bins)
  more = {"noise_multiplier": stddev, "num_steps": 2 * num_bins}
  everybody = {"noise_multiplier": stddev, "num_steps": 2}
  assert _epsilon(which, **more) <= _epsilon(_ALL["everybody"], **everybody)
  if stddev >= 1:
    assert _epsilon(which, **more) < 0.7 * _epsilon(
      _ALL["everybody"], **everybody
    )


def test_loss_of_a_cycle_gives_up_no_more_than_it_says():
  loss = bins.cycle_loss(
    noise_multiplier=1.0, num_bins=50, interval=1e-4, tail_mass=1e-9
  )
  assert loss.get_delta_for_epsilon(50.0) < 1e-8
  finer = bins.cycle_loss(
    noise_multiplier=1.0, num_bins=50, interval=5e-5, tail_mass=1e-11
  )
  one, other = (x.get_epsilon_for_delta(1e-6) for x in (loss, finer))
  np.testing.assert_allclose(one, other, rtol=2e-3)
