"""The robust membership attack: a record against a population.

Zarifzadeh et al. 2024 (https://arxiv.org/abs/2312.03262). How much the target
raises a record's probability over that of reference models is compared with
how much it raises those of other records: the score is the share of them that
it beats by a factor. NumPy only.
"""

import numpy as np
from scipy import special

from ppnet.audit import references


def online(
  loss_scores: np.ndarray,
  membership: np.ndarray,
  partner: np.ndarray,
  *,
  gamma: float = 1.0,
  population: np.ndarray | None = None,
) -> np.ndarray:
  """With references on both sides: Pr(x) is the mean of both sides' means.

  Args:
    loss_scores: minus the loss, f64[M, n]; its exponential is Pr(x | model).
    membership: bool[M, n].
    partner: i64[M].
    gamma: by what factor another record has to be beaten. 1 orders a model's
      records by their ratio, however small the ratios are.
    population: bool[n]: records that are compared with; None takes all, as an
      attacker does who cannot know which of them are members.

  Returns:
    f64[M, n] in [0, 1].

  Raises:
    references.TooFewError: a record without a reference on one side.
  """
  usable = references.usable(partner)
  log_in = _log_mean(loss_scores, membership, usable)
  log_out = _log_mean(loss_scores, ~membership, usable)
  log_reference = np.logaddexp(log_in, log_out) - np.log(2)
  return _share_beaten(loss_scores - log_reference, gamma, population)


def offline(
  loss_scores: np.ndarray,
  membership: np.ndarray,
  partner: np.ndarray,
  *,
  correction: float = 0.3,
  gamma: float = 1.0,
  population: np.ndarray | None = None,
) -> np.ndarray:
  """With references that did not see the record alone.

  What they would have said having seen it is taken for a line from 1 to what
  they say: Pr(x) = ((1 + a) Pr_out(x) + 1 - a) / 2, as approximated there.

  Args:
    loss_scores: minus the loss, f64[M, n].
    membership: bool[M, n].
    partner: i64[M].
    correction: a, in [0, 1]; 0.3 is theirs for CIFAR-10.
    gamma: as for `online`.
    population: as for `online`.

  Returns:
    f64[M, n] in [0, 1].

  Raises:
    references.TooFewError: a record that every reference saw.
  """
  usable = references.usable(partner)
  log_out = _log_mean(loss_scores, ~membership, usable)
  with np.errstate(divide="ignore"):  # a = 1 leaves Pr_out alone.
    log_reference = np.logaddexp(
      np.log1p(correction) + log_out, np.log1p(-correction)
    ) - np.log(2)
  return _share_beaten(loss_scores - log_reference, gamma, population)


def _log_mean(
  log_probs: np.ndarray, chosen: np.ndarray, usable: np.ndarray
) -> np.ndarray:
  """Log of the mean probability over the chosen references, f64[M, n]."""
  # The count first: it raises where there is none.
  _, counts = references.means(log_probs, chosen, usable)
  masked = np.where(chosen, log_probs, -np.inf)
  found = np.empty_like(log_probs)
  for model, row in enumerate(usable):
    found[model] = special.logsumexp(masked[row], axis=0)
  return found - np.log(counts)


def _share_beaten(
  log_ratios: np.ndarray, gamma: float, population: np.ndarray | None
) -> np.ndarray:
  """Share of the population's other records with ratio / theirs >= gamma."""
  num_models, num_records = log_ratios.shape
  if population is None:
    population = np.ones(num_records, bool)
  shares = np.empty_like(log_ratios)
  for model in range(num_models):
    others = np.sort(log_ratios[model, population])
    limits = log_ratios[model] - np.log(gamma)
    beaten = np.searchsorted(others, limits, side="right")
    # Itself is no other record.
    beaten = beaten - (population & (gamma <= 1))
    shares[model] = beaten / np.maximum(len(others) - population, 1)
  return shares
