"""How well scores tell members from non-members, and how sure that is.

NumPy only. Scores are pooled over models and records, as for LiRA's curves. A
curve has one vertex for each distinct score: equal scores are told apart by no
threshold.

*Intervals.* Two scores of one model share that model, and two scores of one
record share how easy the record is. So pairs of models are drawn again with
replacement, and records too, each independently of the other (the pigeonhole
bootstrap, Owen 2007, https://arxiv.org/abs/0712.1111); a cell counts as often
as both were drawn. Partners stay together: one's members are the other's
non-members. This errs on the wide side. A single model cannot be drawn again:
the interval is then one over records, for that model. What the references said
is kept fixed.

*Chance.* Every advantage here is the best over thresholds on the very scores it
is judged on, so it is above zero even for a model that leaks nothing. What it
would be then is found by flipping the coins again that decided who was a
member: `chance`. `held_out` chooses attack and threshold on other models.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ppnet.core import checks

TARGET_FPRS = (0.001, 0.01)


class Interval(NamedTuple):
  """A confidence interval."""

  low: float
  high: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
  """A number and how sure it is."""

  value: float
  interval: Interval


@dataclasses.dataclass(frozen=True)
class Curve:
  """A ROC curve.

  Attributes:
    fpr: f64[V], from 0 to 1, not falling.
    tpr: f64[V], from 0 to 1, not falling.
  """

  fpr: np.ndarray
  tpr: np.ndarray

  @property
  def auc(self) -> float:
    """Area; an equal score of a member and a non-member counts a half."""
    return float(np.trapezoid(self.tpr, self.fpr))

  @property
  def advantage(self) -> float:
    """Max over thresholds of TPR - FPR (Yeom et al. 2018, definition 4)."""
    return float((self.tpr - self.fpr).max())

  @property
  def balanced_accuracy(self) -> float:
    """Of the best threshold: (TPR + TNR) / 2."""
    return (1 + self.advantage) / 2

  def tpr_at(self, fpr: float) -> float:
    """Highest TPR of a threshold whose FPR is at most `fpr`.

    Nothing is interpolated: between two vertices there is no threshold. With
    fewer than 1 / fpr non-members it is the TPR without a false positive.
    """
    # A count over a count may lie a rounding above what it stands for.
    allowed = self.fpr <= fpr * (1 + 1e-9)
    return float(self.tpr[allowed].max())


class Ranked:
  """Scores sorted once, so that curves under many weights are cheap."""

  def __init__(self, scores: np.ndarray, is_member: np.ndarray):
    """Sorts.

    Args:
      scores: f64[...], finite.
      is_member: bool[...], of the same shape.

    Raises:
      ValueError: no members, or no non-members, or scores that are not finite.
    """
    scores, is_member = np.ravel(scores), np.ravel(is_member).astype(bool)
    if not np.isfinite(scores).all():
      checks.fail("finite scores", not_finite=int((~np.isfinite(scores)).sum()))
    if is_member.all() or not is_member.any():
      checks.fail(
        "members and non-members",
        num_members=int(is_member.sum()),
        num_nonmembers=int((~is_member).sum()),
      )
    self._order = np.argsort(-scores, kind="stable")
    ordered = scores[self._order]
    self._ends = np.append(np.flatnonzero(np.diff(ordered)), len(ordered) - 1)
    self.thresholds = ordered[self._ends]
    self._is_member = is_member

  def curve(
    self, weights: np.ndarray | None = None, is_member: np.ndarray | None = None
  ) -> Curve:
    """The ROC curve, perhaps of reweighted or relabelled scores.

    Args:
      weights: of each score, f64[...], not below 0; None counts each once.
      is_member: other labels, bool[...].
    """
    labels = self._is_member if is_member is None else np.ravel(is_member)
    weight = 1.0 if weights is None else np.ravel(weights)
    positives = np.cumsum((labels * weight)[self._order])[self._ends]
    negatives = np.cumsum((~labels * weight)[self._order])[self._ends]
    if not (positives[-1] > 0 and negatives[-1] > 0):
      # A draw of the bootstrap without one of the two says nothing.
      return Curve(np.array([0.0, 1.0]), np.array([0.0, 1.0]))
    return Curve(
      np.concatenate([[0.0], negatives / negatives[-1]]),
      np.concatenate([[0.0], positives / positives[-1]]),
    )

  def best_threshold(self, weights: np.ndarray) -> tuple[float, float]:
    """Advantage and threshold where it is reached; inf guesses nobody."""
    curve = self.curve(weights)
    best = int((curve.tpr - curve.fpr).argmax())
    threshold = np.inf if best == 0 else self.thresholds[best - 1]
    return float(curve.tpr[best] - curve.fpr[best]), float(threshold)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resampler:
  """Draws models and records again, with replacement.

  Attributes:
    partner: i64[R]: of the judged models, -1 for one without.
    num_records: columns.
    num_draws: how often.
    seed: of the draws; they are no secret.
  """

  partner: np.ndarray
  num_records: int
  num_draws: int = 400
  seed: int = 0

  def weights(self) -> list[tuple[np.ndarray, np.ndarray]]:
    """How often each model and each record was drawn: ([R], [n]) each."""
    rng = np.random.default_rng(self.seed)
    group = _groups(self.partner)
    num_groups = group.max() + 1
    draws = []
    for _ in range(self.num_draws):
      of_groups = rng.multinomial(
        num_groups, np.full(num_groups, 1 / num_groups)
      )
      of_records = rng.multinomial(
        self.num_records, np.full(self.num_records, 1 / self.num_records)
      )
      draws.append((of_groups[group].astype(float), of_records.astype(float)))
    return draws


def percentile(draws: Sequence[float], confidence: float) -> Interval:
  """The middle of what was drawn."""
  outside = (1 - confidence) / 2
  low, high = np.quantile(draws, [outside, 1 - outside])
  return Interval(float(low), float(high))


def reflected(
  value: float, draws: Sequence[float], confidence: float
) -> Interval:
  """The basic bootstrap interval, cut to [0, 1].

  A maximum over thresholds is lifted once by the sample and once more by each
  draw from it. What the draws lie above the value, the value lies above the
  truth, so the draws are reflected at it.
  """
  low, high = percentile(draws, confidence)
  return Interval(
    float(np.clip(2 * value - high, 0, 1)),
    float(np.clip(2 * value - low, 0, 1)),
  )


def measure(
  scores: np.ndarray,
  is_member: np.ndarray,
  *,
  partner: np.ndarray,
  confidence: float,
  num_draws: int = 400,
) -> dict[str, Estimate]:
  """AUC, advantage, balanced accuracy and TPRs, each with its interval.

  Args:
    scores: f64[R, n], of the judged models.
    is_member: bool[R, n].
    partner: i64[R], indices into these R models, -1 for none.
    confidence: of each interval by itself.
    num_draws: of the bootstrap.

  Returns:
    By name: "auc", "advantage", "balanced_accuracy", "tpr_at_0.001", ... The
    intervals of the advantage and what follows from it are reflected.
  """
  ranked = Ranked(scores, is_member)
  curve = ranked.curve()
  resampler = Resampler(
    partner=partner, num_records=scores.shape[1], num_draws=num_draws
  )
  curves = [
    ranked.curve(np.outer(models, records))
    for models, records in resampler.weights()
  ]
  found = {
    "auc": Estimate(
      value=curve.auc,
      interval=percentile([c.auc for c in curves], confidence),
    ),
    "advantage": Estimate(
      value=curve.advantage,
      interval=reflected(
        curve.advantage, [c.advantage for c in curves], confidence
      ),
    ),
  }
  low, high = found["advantage"].interval
  found["balanced_accuracy"] = Estimate(
    value=curve.balanced_accuracy,
    interval=Interval((1 + low) / 2, (1 + high) / 2),
  )
  for fpr in TARGET_FPRS:
    found[f"tpr_at_{fpr:g}"] = Estimate(
      value=curve.tpr_at(fpr),
      interval=percentile([c.tpr_at(fpr) for c in curves], confidence),
    )
  return found


class HeldOut(NamedTuple):
  """What an attack reaches whose threshold was chosen elsewhere.

  Attributes:
    advantage: TPR - FPR, which may fall below zero: no bias lifts it.
    attacks: the attack that was chosen for each judged model.
  """

  advantage: Estimate
  attacks: list[str]


def held_out(
  scores: Mapping[str, np.ndarray],
  membership: np.ndarray,
  *,
  partner: np.ndarray,
  judged: Sequence[int] | np.ndarray,
  confidence: float,
  num_draws: int = 400,
) -> HeldOut | None:
  """Advantage with attack and threshold chosen on other models.

  For each judged model, the attack and the threshold that do best on the models
  that are neither it nor its partner. It is what somebody reaches who tried the
  attacks on models of their own first, and it has no upward bias.

  Args:
    scores: attack → f64[M, n].
    membership: bool[M, n].
    partner: i64[M].
    judged: rows to judge.
    confidence: of the interval.
    num_draws: of the bootstrap.

  Returns:
    None where there is no other model to choose on.
  """
  names = list(scores)
  ranked = {name: Ranked(scores[name], membership) for name in names}
  ones = np.ones(membership.shape[1])
  guesses, chosen = [], []
  for model in judged:
    others = partner >= 0  # A target's membership is not known to anybody.
    others[model] = False
    if partner[model] >= 0:
      others[partner[model]] = False
    if not others.any():
      return None
    weights = np.outer(others, ones)
    options = [(*ranked[name].best_threshold(weights), name) for name in names]
    _, threshold, name = max(options, key=lambda option: option[0])
    guesses.append(scores[name][model] >= threshold)
    chosen.append(name)
  guess = np.stack(guesses)
  labels = membership[list(judged)]
  value = _tpr_minus_fpr(guess, labels, np.ones(guess.shape))
  resampler = Resampler(
    partner=relabelled(partner, judged),
    num_records=guess.shape[1],
    num_draws=num_draws,
  )
  draws = [
    _tpr_minus_fpr(guess, labels, np.outer(models, records))
    for models, records in resampler.weights()
  ]
  return HeldOut(
    Estimate(value=value, interval=percentile(draws, confidence)), chosen
  )


def chance(
  statistics: Callable[[np.ndarray], np.ndarray],
  is_member: np.ndarray,
  *,
  partner: np.ndarray,
  num_draws: int = 100,
  seed: int = 0,
) -> np.ndarray:
  """What statistics would be if scores had nothing to do with membership.

  The coins of the design are flipped again: in each pair of models a record
  stays or changes sides. A model without a partner has its labels shuffled.

  Args:
    statistics: labels bool[R, n] → f64[S].
    is_member: bool[R, n].
    partner: i64[R], indices into these R models, -1 for none.
    num_draws: flips of all coins.
    seed: of the flips; they are no secret.

  Returns:
    f64[num_draws, S].
  """
  rng = np.random.default_rng(seed)
  group = _groups(partner)
  draws = []
  for _ in range(num_draws):
    labels = np.array(is_member)
    flips = rng.random((group.max() + 1, labels.shape[1])) < 0.5
    labels ^= flips[group]
    for model in np.flatnonzero(partner < 0):
      labels[model] = rng.permutation(is_member[model])
    draws.append(statistics(labels))
  return np.stack(draws)


def best_advantage(
  scores: Mapping[str, np.ndarray], is_member: np.ndarray
) -> Callable[[np.ndarray], np.ndarray]:
  """For `chance`: labels → the largest advantage of any attack, f64[1]."""
  ranked = [Ranked(values, is_member) for values in scores.values()]

  def statistics(labels: np.ndarray) -> np.ndarray:
    return np.array([max(r.curve(is_member=labels).advantage for r in ranked)])

  return statistics


def relabelled(
  partner: np.ndarray, judged: Sequence[int] | np.ndarray
) -> np.ndarray:
  """Partners as indices into the judged models; -1 where it is not judged."""
  places = {model: place for place, model in enumerate(judged)}
  return np.array([places.get(int(partner[model]), -1) for model in judged])


def _groups(partner: np.ndarray) -> np.ndarray:
  """A number for each pair and each single model, i64[R]."""
  own = np.arange(len(partner))
  first = np.where(partner >= 0, np.minimum(own, partner), own)
  return np.unique(first, return_inverse=True)[1]


def _tpr_minus_fpr(
  guess: np.ndarray, labels: np.ndarray, weights: np.ndarray
) -> float:
  """Of yes-or-no guesses; 0 where a draw has one kind alone."""
  positives, negatives = (labels * weights).sum(), (~labels * weights).sum()
  if not (positives and negatives):
    return 0.0
  return float(
    (guess * labels * weights).sum() / positives
    - (guess * ~labels * weights).sum() / negatives
  )
