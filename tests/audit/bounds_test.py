"""Bounds on mechanisms whose epsilon is known: never above it, and not far."""

import functools
import math

import dp_accounting
import numpy as np
import pytest
from scipy import stats

from ppnet.audit import bounds
from ppnet.privacy import accounting

DELTA = 1e-5
ALL = (
  bounds.one_run,
  bounds.f_dp_one_run,
  bounds.clopper_pearson,
  bounds.gaussian,
)
FAST = (bounds.one_run, bounds.clopper_pearson, bounds.gaussian)


def gaussian_mechanism(epsilon, size, seed):
  """Independent coins, each seen through the noise that costs `epsilon`."""
  rng = np.random.default_rng(seed)
  is_in = rng.random(size) < 0.5
  stddev = dp_accounting.get_sigma_gaussian(epsilon, DELTA)
  return is_in + stddev * rng.normal(size=size), is_in


def randomized_response(epsilon, size, seed):
  """The (epsilon, 0)-DP mechanism that gives most away."""
  rng = np.random.default_rng(seed)
  is_in = rng.random(size) < 0.5
  truthful = rng.random(size) < 1 / (1 + math.exp(-epsilon))
  return np.where(truthful, is_in, ~is_in).astype(float), is_in


def bound(fn, scores, is_in, confidence=0.95, **options):
  return fn(scores, is_in, delta=DELTA, confidence=confidence, **options)


@pytest.mark.parametrize(
  ("epsilon", "size"), [(2.0, 20_000), (4.0, 10_000), (8.0, 5000)]
)
def test_best_bound_is_within_a_fifth_of_a_known_epsilon(epsilon, size):
  for seed in range(5):
    found = [
      bound(fn, *gaussian_mechanism(epsilon, size, seed)).epsilon for fn in FAST
    ]
    assert 0.8 * epsilon <= max(found), (seed, found)
    # 95 % each; all of five seeds by luck of these seeds, which are fixed.
    assert max(found) <= epsilon, (seed, found)
  # Fails if: the bound is loose, or claims more than was spent.


@pytest.mark.parametrize(
  ("fn", "mechanism"),
  [
    *((fn, gaussian_mechanism) for fn in FAST),
    # Not a Gaussian curve: `gaussian` promises nothing there.
    *((fn, randomized_response) for fn in FAST if fn is not bounds.gaussian),
  ],
)
@pytest.mark.parametrize("epsilon", [0.01, 2.0])
def test_bounds_exceed_the_truth_no_oftener_than_they_say(
  fn, mechanism, epsilon
):
  confidence, num_seeds = 0.8, 120
  above = sum(
    bound(fn, *mechanism(epsilon, 300, seed), confidence).epsilon > epsilon
    for seed in range(num_seeds)
  )
  assert above <= stats.binom.ppf(0.999, num_seeds, 1 - confidence)
  # Fails if: a threshold is chosen on the trials that it is judged on.


def test_size_test_sees_a_bound_that_took_the_best_of_all_numbers_of_guesses():
  """The fault planted: every number of guesses at full significance."""
  above = 0
  for seed in range(120):
    scores, is_in = randomized_response(0.01, 300, seed)
    scores = scores + np.random.default_rng(seed).normal(size=300)
    order = np.argsort(-scores)
    above += any(
      bounds._guessed_epsilon(
        300, count, int(is_in[order[:count]].sum()), 0.2, DELTA, False
      )
      > 0.01
      for count in range(6, 150)
    )
  assert above > stats.binom.ppf(0.999, 120, 0.2)


@pytest.mark.parametrize(("size", "guesses"), [(200, 50), (600, 20)])
@pytest.mark.parametrize("epsilon", [1.0, 4.0])
def test_f_dp_rejects_its_own_curve_no_oftener_than_it_says(
  size, guesses, epsilon
):
  significance = 0.1

  @functools.cache
  def rejects(correct):
    found = bounds._guessed_epsilon(
      size, guesses, correct, significance, DELTA, True
    )
    return found > epsilon

  critical = next((c for c in range(guesses + 1) if rejects(c)), None)
  rng = np.random.default_rng(0)
  runs = 4000
  is_in = rng.random((runs, size)) < 0.5
  stddev = dp_accounting.get_sigma_gaussian(epsilon, DELTA)
  scores = is_in + stddev * rng.normal(size=is_in.shape) - 0.5
  guessed = np.argsort(-np.abs(scores), axis=1)[:, :guesses]
  right = np.take_along_axis((scores > 0) == is_in, guessed, axis=1).sum(1)
  assert critical is None or (right >= critical).mean() <= significance
  # And it is no empty promise: ten times the shift is seen every time.
  assert critical is None or critical <= guesses


def slow_one_run(size, guesses, correct, significance, delta):
  """Steinke et al. 2023, Theorem 5.2, term by term."""

  def p_value(epsilon):
    q = 1 / (1 + math.exp(-epsilon))
    mass = [
      math.comb(guesses, i) * q**i * (1 - q) ** (guesses - i)
      for i in range(guesses + 1)
    ]
    beta = sum(mass[correct:])
    alpha = max(
      (sum(mass[correct - i : correct]) / i for i in range(1, correct + 1)),
      default=0,
    )
    return beta + 2 * size * delta * alpha

  low, high = 0.0, 30.0
  if p_value(0.0) > significance:
    return 0.0
  for _ in range(60):
    middle = (low + high) / 2
    low, high = (
      (middle, high) if p_value(middle) <= significance else (low, middle)
    )
  return low


@pytest.mark.parametrize(
  ("size", "guesses", "correct"),
  [(100, 50, 50), (100, 50, 45), (1000, 250, 200), (64, 16, 9)],
)
def test_one_run_equals_its_theorem(size, guesses, correct):
  for delta in (1e-9, 1e-4):
    found = bounds._guessed_epsilon(size, guesses, correct, 0.05, delta, False)
    expected = slow_one_run(size, guesses, correct, 0.05, delta)
    assert found == pytest.approx(expected, abs=1e-4)


def test_guesses_are_the_extremes_on_both_sides():
  """All right on one side, coins on the other: each test sees its own."""
  size = 512
  rng = np.random.default_rng(0)
  scores = np.arange(float(size))
  coins = rng.random(size) < 0.5
  top, both = coins.copy(), coins.copy()
  top[-128:] = both[-64:] = True
  both[:64] = False
  significance = 0.05 / 8  # Four numbers of guesses, above or on both sides.
  expected = slow_one_run(size, 128, 128, significance, DELTA)
  for is_in in (top, both):
    found = bound(bounds.one_run, scores, is_in).epsilon
    assert found >= expected - 1e-4
  assert bound(bounds.one_run, -scores, top).epsilon < 0.5
  # Fails if: ranks are reversed, or the lowest are guessed to be in.


def test_noise_without_any_coin_in_it_gives_nothing():
  """Where the estimator of jax_privacy finds an epsilon of 2 and more."""
  found = {fn.__name__: [] for fn in ALL}
  for seed in range(10):
    rng = np.random.default_rng(seed)
    is_in = rng.random(100) < 0.5
    scores = rng.normal(size=100)
    for fn in ALL:
      found[fn.__name__].append(bound(fn, scores, is_in).epsilon)
  for name, values in found.items():
    assert np.mean(np.array(values) > 0) <= 0.3, name
    assert np.median(values) == 0, name
    assert max(values) < 0.5, name


@pytest.mark.parametrize("fn", ALL)
def test_planted_faults_are_found_out(fn):
  """Noise at a third of its scale, and no noise at all."""
  scores, is_in = gaussian_mechanism(1.0, 2000, 0)
  claimed = 1.0
  third = is_in + (scores - is_in) / 3
  assert bound(fn, third, is_in).epsilon > claimed
  assert bound(fn, is_in.astype(float), is_in).epsilon > 4
  assert bound(fn, scores, is_in).epsilon <= claimed


@pytest.mark.parametrize("fn", ALL)
def test_little_is_proved_by_little(fn):
  """Edge cases: few trials, one kind alone, equal scores."""
  assert bound(fn, np.arange(4.0), np.arange(4) > 1).epsilon < 1
  assert bound(fn, np.zeros(1), np.ones(1, bool)).epsilon == 0
  assert bound(fn, np.zeros(0), np.zeros(0, bool)).epsilon == 0
  rng = np.random.default_rng(0)
  assert bound(fn, np.zeros(400), rng.random(400) < 0.5).epsilon < 0.2
  everybody = bound(fn, rng.normal(size=40), np.zeros(40, bool))
  assert everybody.num_trials <= 40
  if everybody.needs_independence:
    assert everybody.epsilon == 0  # No rate of those who were in.


@pytest.mark.parametrize("fn", ALL)
def test_every_bound_says_what_it_is_about(fn):
  found = bound(fn, *gaussian_mechanism(4.0, 500, 0))
  assert found.method == fn.__name__
  assert found.neighboring_relation == "ADD_OR_REMOVE_ONE"
  assert found.is_gaussian == ("Gaussian" in found.holds_for)
  assert (found.delta, found.confidence) == (DELTA, 0.95)
  # Where the threshold is given, or none is: less confidence, a higher bound.
  options = {"threshold": 0.5} if found.needs_independence else {}
  low, high = (
    bound(fn, *gaussian_mechanism(4.0, 500, 0), confidence, **options).epsilon
    for confidence in (0.99, 0.6)
  )
  assert low < high


@pytest.mark.parametrize("rate", [0.004, 0.05, 0.3])
def test_a_gaussian_curve_is_refuted_no_oftener_than_it_should(rate):
  """Exactly, over all numbers of errors that 40 in and 30 out can show."""
  mu, significance, num_in, num_out = 1.0, 0.1, 40, 30
  misses = stats.norm.cdf(stats.norm.isf(rate) - mu)
  refuted = independent = 0.0
  for alarms in range(num_out):
    of_alarms = stats.binom.pmf(alarms, num_out, rate)
    for missed in range(num_in):
      counts = bounds._Counts(missed, num_in, alarms, num_out)
      both = of_alarms * stats.binom.pmf(missed, num_in, misses)
      if both < 1e-6:
        continue
      chance = bounds._chance_of_fewer_errors(counts, significance)
      refuted += both * (chance(mu) <= significance)
      # An upper end for each rate, as both were once bounded.
      ends = [
        stats.beta.isf(significance / 2, count + 1, size - count)
        for count, size in ((missed, num_in), (alarms, num_out))
      ]
      gap = stats.norm.isf(ends[1]) - stats.norm.ppf(ends[0])
      independent += both * (gap > mu)
      assert chance(0.5) <= chance(mu) <= chance(2.0)
  assert refuted <= significance
  assert refuted > independent or rate < 0.01
  # Fails if: rates are searched too coarsely, the risk of their interval is not
  # counted, or ties are left out.


@pytest.mark.parametrize("fn", [bounds.clopper_pearson, bounds.gaussian])
def test_a_threshold_known_beforehand_lets_all_trials_judge(fn):
  scores, is_in = gaussian_mechanism(8.0, 2000, 1)
  given = bound(fn, scores, is_in, threshold=0.5)
  assert given.num_trials == 2000
  assert bound(fn, scores, is_in).num_trials == 1600
  assert given.epsilon <= 8


def test_scores_of_the_choosing_trials_are_not_judged():
  """They could be anything: the threshold moves, no count does."""
  scores, is_in = gaussian_mechanism(4.0, 1000, 2)
  choosing = np.random.default_rng(0).permutation(1000)[:200]
  honest = bound(bounds.gaussian, scores, is_in).epsilon
  scores[choosing] = np.where(is_in[choosing], 1e3, -1e3)
  assert bound(bounds.gaussian, scores, is_in).epsilon <= honest * 1.05


@pytest.mark.parametrize(
  ("scores", "is_in", "options", "says"),
  [
    ([np.nan, 1.0], [True, False], {}, "finite"),
    ([1.0], [True, False], {}, "one score and one coin"),
    ([1.0, 2.0], [True, False], {"delta": 0.0}, "delta=0.0"),
    ([1.0, 2.0], [True, False], {"confidence": 1.0}, "confidence=1.0"),
  ],
)
@pytest.mark.parametrize("fn", ALL)
def test_what_makes_no_bound_is_refused(fn, scores, is_in, options, says):
  with pytest.raises(ValueError, match=says):
    fn(
      np.array(scores),
      np.array(is_in),
      **({"delta": DELTA, "confidence": 0.95} | options),
    )


def test_gaussian_claim_of_a_gaussian_mechanism_is_its_own_epsilon():
  stddev = dp_accounting.get_sigma_gaussian(4.0, DELTA)
  deltas = [*np.geomspace(0.3, 1e-7, 40), DELTA]
  profile = [
    (dp_accounting.get_epsilon_gaussian(stddev, delta), delta)
    for delta in deltas
  ]
  claim = bounds.gaussian_claim(profile, delta=DELTA, smallest_rate=1e-4)
  assert 4.0 <= claim <= 4.1
  few = bounds.gaussian_claim(profile[::8] + profile[-1:], delta=DELTA,
                              smallest_rate=1e-4)  # fmt: skip
  assert few >= claim
  # One pair says little about a curve: the Gaussian bound may be far above.
  alone = bounds.gaussian_claim(profile[-1:], delta=DELTA, smallest_rate=1e-4)
  assert alone > 6
  nothing = [(math.inf, delta) for delta in deltas]
  unclaimed = bounds.gaussian_claim(nothing, delta=DELTA, smallest_rate=1e-4)
  assert unclaimed == math.inf
  with pytest.raises(ValueError, match="pair at delta"):
    bounds.gaussian_claim(profile[:3], delta=DELTA, smallest_rate=1e-4)


def test_gaussian_claim_of_sampled_noise_covers_what_an_observer_sees():
  """Sampled noise: the likelihood ratio, seen through the Gaussian bound.

  Comparing with the claimed epsilon itself would call an honest run a liar as
  soon as the curve is not Gaussian.
  """
  noise, prob, steps = 1.0, 0.1, 20
  deltas = [*np.geomspace(0.3, 1e-6, 6), DELTA]
  profile = [
    (
      accounting.epsilon(
        noise_multiplier=noise, sampling_prob=prob, num_steps=steps, delta=delta
      ),
      delta,
    )
    for delta in deltas
  ]
  rng = np.random.default_rng(0)
  size = 20_000
  is_in = rng.random(size) < 0.5
  drawn = (rng.random((steps, size)) < prob) & is_in
  seen = drawn + noise * rng.normal(size=drawn.shape)
  ratios = np.log1p(prob * np.expm1((2 * seen - 1) / (2 * noise**2)))
  found = bound(bounds.gaussian, ratios.sum(axis=0), is_in)
  claim = bounds.gaussian_claim(profile, delta=DELTA, smallest_rate=0.05 / size)
  assert profile[-1][0] <= claim < math.inf
  assert 0 < found.epsilon <= claim
  assert bounds.exceeded([found], claims={True: claim}) == []
  assert bounds.exceeded([found], claims={True: 0.1}) == [found]
  assert bounds.strongest([found, found]) == found
