"""Lower bounds on epsilon from guesses about who was in the training set.

Each bound says: if the mechanism were (epsilon, delta)-DP for a smaller
epsilon, guesses as good as these would have come with probability at most
1 - confidence. A low bound bounds nothing: it may be the attack that is weak.

*Trials.* A trial is one privacy unit that was put into one training run or left
out by a fair coin of its own, and a score that somebody gave it who saw the
result and no coin. That is adding or removing one unit, so every bound here is
about ADD_OR_REMOVE_ONE. A claim about REPLACE_ONE is the stronger one wherever
leaving a unit out is a special case of replacing it, as with every sampler of
`privacy.sampling`, so a bound above such a claim contradicts it too.

| bound | trials | holds for |
| --- | --- | --- |
| `one_run` | one run, or several | every (epsilon, delta)-DP mechanism |
| `f_dp_one_run` | one run, or several | a Gaussian trade-off curve |
| `clopper_pearson` | independent | every (epsilon, delta)-DP mechanism |
| `gaussian` | independent | a Gaussian trade-off curve |

*What is independent.* Only the coins are, in general: what one record did to a
model moves the scores of all. The one-run bounds need no more than that.
Scores of one record in separately trained models are independent trials; scores
of many records in one model are not, with one exception: projections of noisy
sums on orthogonal directions, as long as the noise is what is claimed. There
`clopper_pearson` and `gaussian` are tests of that claim, no more.

*Gaussian curves.* What those bounds contradict is "the trade-off curve is that
of a Gaussian mechanism which is (epsilon, delta)-DP". That is more than
(epsilon, delta)-DP. They are to be compared with `gaussian_claim`: the epsilon
of the smallest Gaussian curve below which the claimed one does not fall.

*From jax_privacy.auditing* come the one-run estimators and Clopper-Pearson,
each asked about one threshold. Its other strategies are not used. Bonferroni
there divides by the number of vertices of the scores' own convex hull, which
was chosen by looking at them: of 2,000 tables without any leak, 1,000 scores
each, 6.7 % had an `epsilon_one_run` above 0 at significance 5 %. Its
`epsilon_from_gdp` takes the absolute value of a bound that wide intervals make
negative, and so finds an epsilon of 2 and more in pure noise; `gaussian` here
does not. Here the numbers of guesses are fixed before anything is seen, and the
significance is shared among them. NumPy only, and no JAX at run time.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import dp_accounting
import numpy as np
from jax_privacy import auditing
from scipy import optimize, special, stats

from ppnet.core import checks

# Shares of the trials that are guessed. Few guesses see the tails, many are
# needed where there are few trials.
_SHARES = (1 / 64, 1 / 16, 1 / 4, 1 / 2)
_MIN_GUESSES = 6  # All of fewer right proves nothing at 95 %, shared by tests.
_CLOSER = 3  # Tests that the slower one-run bound looks at.
_NUM_THRESHOLDS = 200
_MAX_MU = 64.0
_MU_ERROR = 1e-3  # A bound is so much lower than its root.
_NUM_RATES = 100  # Cells of the FPR where a Gaussian curve is tested.
_ORDERING = 0.05  # Of the intervals that say which errors are fewer.
_TAIL = 1e-12  # Of a binomial distribution, what is not summed but counted.
_CHOOSING_SHARE = 0.2  # Of independent trials: they choose the threshold.

_ANY = "any (ε, δ)-differentially private mechanism"
_GAUSSIAN = "a mechanism whose trade-off curve is that of a Gaussian mechanism"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bound:
  """A lower bound on epsilon.

  Attributes:
    method: name of the bound.
    epsilon: at least this, in nats; 0 says nothing.
    delta: at this delta.
    confidence: probability that the bound holds, whatever the truth.
    neighboring_relation: what is added, removed or replaced.
    holds_for: which mechanisms.
    is_gaussian: whether it is to be compared with `gaussian_claim`.
    num_trials: coins that were guessed or could have been.
    needs_independence: whether trials must be independent, and not coins alone.
  """

  method: str
  epsilon: float
  delta: float
  confidence: float
  holds_for: str
  is_gaussian: bool
  num_trials: int
  needs_independence: bool
  neighboring_relation: str = "ADD_OR_REMOVE_ONE"


def one_run(
  scores: np.ndarray, is_in: np.ndarray, *, delta: float, confidence: float
) -> Bound:
  """From independent coins alone: Steinke et al. 2023, Theorem 5.2.

  https://arxiv.org/abs/2305.08846. The highest scores are guessed to be in, and
  in half of the tests the lowest to be out. The theorem wants the number of
  guesses fixed; ranks give exactly that number, and records with equal scores
  are taken in the order of the table, which no coin knows.

  *Formal guarantee.* For an (epsilon, delta)-DP mechanism and scores that are a
  function of its output (and of anything but the coins), the result exceeds
  epsilon with probability at most 1 - confidence.

  | edge case | result |
  | --- | --- |
  | too few trials to prove anything | 0.0 |
  | scores all equal | guesses by the order of the table: about 0.0 |

  Args:
    scores: f64[m], higher says "in".
    is_in: bool[m], independent fair coins.
    delta: in (0, 1).
    confidence: in [0.5, 1).

  Raises:
    ValueError: an argument out of range, or scores that are not finite.
  """
  return _one_run(
    scores, is_in, delta, confidence, method="one_run", is_gaussian=False
  )


def f_dp_one_run(
  scores: np.ndarray, is_in: np.ndarray, *, delta: float, confidence: float
) -> Bound:
  """From independent coins, against a whole trade-off curve.

  Mahloujifar et al. 2024 (https://arxiv.org/abs/2410.22235, "audit_rh"), with
  Gaussian curves. The guesses are those of `one_run`.

  *Formal guarantee.* As for `one_run`, for a mechanism whose trade-off curve is
  nowhere below that of the Gaussian mechanism which is (epsilon, delta)-DP.

  Args:
    scores: f64[m], higher says "in".
    is_in: bool[m], independent fair coins.
    delta: in (0, 1).
    confidence: in [0.5, 1).

  Raises:
    ValueError: an argument out of range, or scores that are not finite.
  """
  return _one_run(
    scores, is_in, delta, confidence, method="f_dp_one_run", is_gaussian=True
  )


def clopper_pearson(
  scores: np.ndarray,
  is_in: np.ndarray,
  *,
  delta: float,
  confidence: float,
  threshold: float | None = None,
) -> Bound:
  """From independent trials: exact binomial bounds on both error rates.

  epsilon >= log((TPR - delta) / FPR), or the same of those guessed to be out,
  as in Jagielski et al. 2020 (https://arxiv.org/abs/2006.07709).

  *Formal guarantee.* For an (epsilon, delta)-DP mechanism and independent
  trials, the result exceeds epsilon with probability at most 1 - confidence.

  | edge case | result |
  | --- | --- |
  | no trial in, or none out, among those judged | 0.0 |
  | all guesses right | finite: what so many trials can prove |

  Args:
    scores: f64[m], higher says "in".
    is_in: bool[m].
    delta: in (0, 1).
    confidence: in [0.5, 1).
    threshold: guess "in" from here on, chosen without these scores; None
      chooses it on a fifth of the trials and judges the others.

  Raises:
    ValueError: an argument out of range, or scores that are not finite.
  """
  return _independent(
    _clopper_pearson_epsilon,
    scores,
    is_in,
    delta,
    confidence,
    threshold,
    method="clopper_pearson",
    is_gaussian=False,
  )


def gaussian(
  scores: np.ndarray,
  is_in: np.ndarray,
  *,
  delta: float,
  confidence: float,
  threshold: float | None = None,
) -> Bound:
  """From independent trials: the Gaussian curve that both errors refute.

  A mu-GDP mechanism has Phi^-1(1 - FPR) - Phi^-1(FNR) <= mu (Nasr et al. 2023,
  https://arxiv.org/abs/2302.07956). Both rates are tested at once: the result
  is the largest mu under which so few errors of both kinds have at most the
  significance, whatever the FPR. That is sharper than an upper bound on each,
  which asks for two improbable things together. Mu to epsilon by Dong et al.
  2022 (https://arxiv.org/abs/1905.02383, Corollary 2.13).

  *Formal guarantee.* As for `clopper_pearson`, for a mechanism whose trade-off
  curve is nowhere below that of the Gaussian mechanism which is
  (epsilon, delta)-DP.

  Args:
    scores: f64[m], higher says "in".
    is_in: bool[m].
    delta: in (0, 1).
    confidence: in [0.5, 1).
    threshold: as for `clopper_pearson`.

  Raises:
    ValueError: an argument out of range, or scores that are not finite.
  """
  return _independent(
    _gaussian_epsilon,
    scores,
    is_in,
    delta,
    confidence,
    threshold,
    method="gaussian",
    is_gaussian=True,
  )


def gaussian_claim(
  profile: Sequence[tuple[float, float]], *, delta: float, smallest_rate: float
) -> float:
  """What a claim allows the bounds that hold for Gaussian curves.

  Subsampled Gaussian noise does not have a Gaussian curve. The claimed curve is
  everywhere above all lines that its (epsilon, delta) pairs stand for (Dong et
  al. 2022, Proposition 2.5), and the smallest Gaussian curve that is nowhere
  above it, as far as guesses can see, is what it promises in their terms.

  Args:
    profile: pairs (epsilon, delta) that the mechanism is claimed to satisfy,
      all of them. Few of them make the result larger, which errs on the safe
      side.
    delta: where the result is read off; its own pair must be in the profile.
    smallest_rate: the smallest error rate that matters; below it, curves are
      not compared. The (1 - confidence) / m of m trials is small enough.

  Returns:
    An epsilon at `delta`, never below the one claimed there; inf where nothing
    is claimed.

  Raises:
    ValueError: an argument out of range, or a profile without `delta`.
  """
  checks.in_open_unit_interval(delta=delta, smallest_rate=smallest_rate)
  claimed = [epsilon for epsilon, at in profile if at == delta]
  if not claimed:
    checks.fail("a profile with a pair at delta", delta=delta)
  rates = np.geomspace(min(smallest_rate, 0.25), 0.5, 400)
  lines = [
    np.maximum(
      1 - at - np.exp(min(epsilon, 700.0)) * rates,
      np.exp(-epsilon) * (1 - at - rates),
    )
    for epsilon, at in profile
  ]
  misses = np.max(lines, axis=0)
  if misses.min() <= 0:
    return math.inf
  mu = float(np.max(stats.norm.isf(rates) - stats.norm.ppf(misses)))
  return max(min(claimed), _epsilon_of_mu(mu, delta))


def strongest(bounds: Sequence[Bound]) -> Bound:
  """The one that says most."""
  return max(bounds, key=lambda bound: bound.epsilon)


def exceeded(
  bounds: Sequence[Bound], *, claims: Mapping[bool, float]
) -> list[Bound]:
  """Bounds above the claim that they are to be compared with.

  Args:
    bounds: any.
    claims: `is_gaussian` → epsilon.
  """
  return [
    bound for bound in bounds if bound.epsilon > claims[bound.is_gaussian]
  ]


def _check(
  scores: np.ndarray, is_in: np.ndarray, delta: float, confidence: float
) -> tuple[np.ndarray, np.ndarray]:
  """Checks what all bounds share."""
  checks.in_open_unit_interval(delta=delta)
  if not 0.5 <= confidence < 1:
    checks.fail("confidence in [0.5, 1)", confidence=confidence)
  scores, is_in = np.asarray(scores, np.float64), np.asarray(is_in, bool)
  if scores.ndim != 1 or scores.shape != is_in.shape:
    checks.fail(
      "one score and one coin for each trial",
      scores=scores.shape,
      is_in=is_in.shape,
    )
  if not np.isfinite(scores).all():
    checks.fail("finite scores", not_finite=int((~np.isfinite(scores)).sum()))
  return scores, is_in


def _one_run(
  scores: np.ndarray,
  is_in: np.ndarray,
  delta: float,
  confidence: float,
  *,
  method: str,
  is_gaussian: bool,
) -> Bound:
  """The best of a few numbers of guesses that were fixed beforehand."""
  scores, is_in = _check(scores, is_in, delta, confidence)
  order = np.argsort(scores, kind="stable")
  counts = sorted({round(share * scores.size) for share in _SHARES})
  tests = [
    (count, below)
    for count in counts
    if count >= _MIN_GUESSES
    for below in (0, count // 2)
  ]
  significance = (1 - confidence) / max(len(tests), 1)
  guessed = []
  for count, below in tests:
    above = order[scores.size - (count - below) :]
    num_correct = int(is_in[above].sum() + (~is_in[order[:below]]).sum())
    guessed.append((scores.size, count, num_correct, significance, delta))
  found = sorted((_guessed_epsilon(*guess, False), guess) for guess in guessed)
  if is_gaussian:
    # A second each: only of those that came off best. All share the
    # significance, whichever are looked at.
    found = [
      (_guessed_epsilon(*guess, True), guess) for _, guess in found[-_CLOSER:]
    ]
  epsilon = max((epsilon for epsilon, _ in found), default=0.0)
  return Bound(
    method=method,
    epsilon=epsilon,
    delta=delta,
    confidence=confidence,
    holds_for=_GAUSSIAN if is_gaussian else _ANY,
    is_gaussian=is_gaussian,
    num_trials=scores.size,
    needs_independence=False,
  )


@functools.lru_cache(maxsize=4096)
def _guessed_epsilon(
  num_trials: int,
  num_guesses: int,
  num_correct: int,
  significance: float,
  delta: float,
  is_gaussian: bool,
) -> float:
  """Of so many right guesses, by jax_privacy.

  It takes scores, so the right guesses become those of canaries that were in,
  the wrong ones those of canaries that were out, all at one threshold; what was
  not guessed lies below it. At most half of the trials are guessed, so neither
  kind is ever empty.
  """
  if 2 * num_correct <= num_guesses:
    return 0.0  # No better than coins.
  auditor = auditing.CanaryScoreAuditor(
    np.ones(num_correct),
    np.append(
      np.ones(num_guesses - num_correct), np.zeros(num_trials - num_guesses)
    ),
  )
  estimate = (
    auditor.epsilon_one_run_fdp if is_gaussian else auditor.epsilon_one_run
  )
  return float(
    estimate(significance, delta, threshold_strategy=auditing.Explicit(1.0))
  )


class _Counts(NamedTuple):
  """Errors of one threshold: misses of those in, alarms of those out."""

  misses: int
  num_in: int
  alarms: int
  num_out: int


def _independent(
  epsilon_fn: Callable[[_Counts, float, float], float],
  scores: np.ndarray,
  is_in: np.ndarray,
  delta: float,
  confidence: float,
  threshold: float | None,
  *,
  method: str,
  is_gaussian: bool,
) -> Bound:
  """One threshold, given or chosen on trials that are then left out."""
  scores, is_in = _check(scores, is_in, delta, confidence)
  significance = 1 - confidence
  if threshold is None:
    # By position alone; the seed keeps trials in a row (a class, say) apart.
    shuffled = np.random.default_rng(0).permutation(scores.size)
    num_choosing = round(_CHOOSING_SHARE * scores.size)
    choosing, judged = np.split(shuffled, [num_choosing])
    threshold = _choose(
      scores[choosing],
      is_in[choosing],
      num_judged=judged.size,
      significance=significance,
      is_gaussian=is_gaussian,
    )
    scores, is_in = scores[judged], is_in[judged]
  epsilon = 0.0
  if is_in.any() and not is_in.all():
    guessed = scores >= threshold
    counts = _Counts(
      misses=int((is_in & ~guessed).sum()),
      num_in=int(is_in.sum()),
      alarms=int((~is_in & guessed).sum()),
      num_out=int((~is_in).sum()),
    )
    epsilon = epsilon_fn(counts, delta, significance)
  return Bound(
    method=method,
    epsilon=epsilon,
    delta=delta,
    confidence=confidence,
    holds_for=_GAUSSIAN if is_gaussian else _ANY,
    is_gaussian=is_gaussian,
    num_trials=scores.size,
    needs_independence=True,
  )


def _choose(
  scores: np.ndarray,
  is_in: np.ndarray,
  *,
  num_judged: int,
  significance: float,
  is_gaussian: bool,
) -> float:
  """The threshold that would do best if both kinds of scores were normal.

  Counts of a few trials would be tempted into the tails by single scores. That
  they are not normal costs strength, never validity.
  """
  if min(is_in.sum(), (~is_in).sum()) < 2:
    return float(np.median(scores)) if scores.size else 0.0
  inside, outside = (
    stats.norm(kind.mean(), kind.std(ddof=1) + 1e-12)
    for kind in (scores[is_in], scores[~is_in])
  )
  options = np.linspace(
    min(inside.ppf(1e-3), outside.ppf(1e-3)),
    max(inside.isf(1e-3), outside.isf(1e-3)),
    _NUM_THRESHOLDS,
  )
  size = num_judged / 2
  misses, alarms = (
    stats.beta.isf(significance / 2, count + 1, np.maximum(size - count, 1e-9))
    for count in (
      np.round(inside.cdf(options) * size),
      np.round(outside.sf(options) * size),
    )
  )
  if is_gaussian:
    predicted = stats.norm.isf(alarms) - stats.norm.ppf(misses)
  else:
    tiny = np.finfo(np.float64).tiny
    predicted = np.maximum(
      np.log(np.maximum(1 - misses, tiny)) - np.log(alarms),
      np.log(np.maximum(1 - alarms, tiny)) - np.log(misses),
    )
  best = np.flatnonzero(predicted == predicted.max())
  return float(options[best[len(best) // 2]])


def _clopper_pearson_epsilon(
  counts: _Counts, delta: float, significance: float
) -> float:
  """By jax_privacy, at one threshold; both kinds of guesses."""
  inside, outside = np.ones(counts.num_in), np.zeros(counts.num_out)
  inside[: counts.misses] = 0
  outside[: counts.alarms] = 1
  return float(
    auditing.CanaryScoreAuditor(inside, outside).epsilon_clopper_pearson(
      significance,
      delta,
      one_sided=False,
      threshold_strategy=auditing.Explicit(1.0),
    )
  )


def _gaussian_epsilon(
  counts: _Counts, delta: float, significance: float
) -> float:
  """Of the largest mu that the errors refute; see `gaussian`."""
  if counts.alarms == counts.num_out or counts.misses == counts.num_in:
    return 0.0  # Everybody was guessed to be in, or nobody.
  chance = _chance_of_fewer_errors(counts, significance)

  def excess(mu: float) -> float:
    return math.log(chance(mu) / significance)

  if excess(0.0) >= 0:
    return 0.0
  largest: Any = optimize.brentq(excess, 0.0, _MAX_MU, xtol=_MU_ERROR / 4)
  return _epsilon_of_mu(float(largest) - _MU_ERROR, delta)


def _chance_of_fewer_errors(
  counts: _Counts, significance: float
) -> Callable[[float], float]:
  """Upper bound on the probability of errors as few as these under mu-GDP.

  Fewer: Phi^-1(1 - FPR) - Phi^-1(FNR) is as large as the one seen, both rates
  at the upper end of an interval for each. It falls in both errors, so its
  probability falls in both rates: of all mechanisms that are mu-GDP those on
  the curve FNR = G(FPR) come first, and between two values of the FPR it is at
  most that of the smaller one with the FNR of the larger. The FPR is looked for
  in a confidence interval alone, whose risk is added (Berger and Boos 1994).

  Returns:
    A function of mu, which rises with it.
  """
  num_in, num_out = counts.num_in, counts.num_out
  spent = significance / 100
  lowest = stats.beta.ppf(
    spent / 2, max(counts.alarms, 1e-9), num_out - counts.alarms + 1
  )
  first, last = stats.norm.isf(
    [max(lowest, _TAIL), _upper(counts.alarms, num_out, spent)]
  )
  rates = stats.norm.sf(np.linspace(first, last, _NUM_RATES + 1))
  smaller, larger = rates[:-1], rates[1:]
  if not counts.alarms:
    smaller = np.append(0.0, smaller[1:])
  alarms = np.arange(
    max(0, int(stats.binom.ppf(_TAIL, num_out, smaller[0]))),
    int(stats.binom.isf(_TAIL, num_out, larger[-1])) + 1,
  )
  allowed = _upper_quantile(np.arange(num_in + 1), num_in)
  # The most misses that are as few; ties belong to them.
  most = np.searchsorted(
    allowed,
    allowed[counts.misses]
    + _upper_quantile(counts.alarms, num_out)
    - _upper_quantile(alarms, num_out)
    + 1e-9,
    side="right",
  )
  alarms, most = alarms[most > 0], most[most > 0] - 1
  chances = stats.binom.pmf(alarms, num_out, smaller[:, None])

  def chance(mu: float) -> float:
    misses = stats.norm.cdf(stats.norm.isf(larger) - mu)
    as_few = special.bdtr(most.astype(np.float64), num_in, misses[:, None])
    return float((chances * as_few).sum(axis=1).max()) + spent + 2 * _TAIL

  return chance


def _upper_quantile(count: np.ndarray | int, size: int) -> np.ndarray:
  """Phi^-1 of the upper end of a rate's interval; rises with the count."""
  upper = stats.beta.isf(
    _ORDERING, np.add(count, 1), np.maximum(np.subtract(size, count), 1e-9)
  )
  return stats.norm.ppf(np.minimum(upper, 1 - 1e-12))


def _upper(count: int, size: int, significance: float) -> float:
  """Exact upper bound on a rate, at half of the significance."""
  if count == size:
    return 1.0
  return float(stats.beta.isf(significance / 2, count + 1, size - count))


def _epsilon_of_mu(mu: float, delta: float) -> float:
  """Epsilon at delta of the Gaussian mechanism with sensitivity / noise mu."""
  if not mu > 0:
    return 0.0
  return float(dp_accounting.get_epsilon_gaussian(1 / mu, delta))
