"""Which models may be used to attack which: never a partner, never itself.

NumPy only. Everything that looks at other models of an audit goes through
`usable`, so that the rule stands in one place.
"""

import numpy as np

from ppnet.core import checks


class TooFewError(ValueError):
  """Not enough reference models for an attack."""


def usable(partner: np.ndarray) -> np.ndarray:
  """Who may serve as a reference for whom.

  *Guarantee.* Row m is False at m, at `partner[m]`, and at every model without
  a partner: such a one is a target, and its membership is somebody's secret.

  Args:
    partner: i64[M]: index of the model that was trained on exactly the other
      records, -1 for a target.

  Returns:
    bool[M, M]: `usable[m, r]` says whether r may be used to attack m.

  Raises:
    ValueError: partners that are not each other's.
  """
  partner = np.asarray(partner)
  models = np.arange(len(partner))
  has_partner = partner >= 0
  known = partner[has_partner]
  if (known >= len(partner)).any() or not np.array_equal(
    partner[known], models[has_partner]
  ):
    checks.fail("partners that are each other's", partner=partner.tolist())
  allowed = np.broadcast_to(has_partner, (len(models), len(models))).copy()
  allowed[models, models] = False
  allowed[models[has_partner], known] = False
  return allowed


def means(
  values: np.ndarray,
  chosen: np.ndarray,
  usable_models: np.ndarray,
  *,
  at_least: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
  """Mean over the references that are chosen, for each model and record.

  Args:
    values: f64[M, n].
    chosen: bool[M, n]: which of them count, for instance `~membership`.
    usable_models: bool[M, M], from `usable`.
    at_least: how many there have to be for every model and record.

  Returns:
    The means and their numbers, f64[M, n] each.

  Raises:
    TooFewError: fewer than `at_least`.
  """
  weights = usable_models.astype(np.float64)
  counts = weights @ chosen
  if counts.min() < at_least:
    model, record = np.unravel_index(counts.argmin(), counts.shape)
    raise TooFewError(
      f"model {model} has {counts.min():.0f} references of the kind it needs"
      f" for record {record}, and {at_least} are needed; raise"
      " audit.num_models"
    )
  return (weights @ np.where(chosen, values, 0.0)) / counts, counts


def variances(
  values: np.ndarray, chosen: np.ndarray, usable_models: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Sums of squared deviations from those means, and their numbers.

  Args:
    values: f64[M, n].
    chosen: bool[M, n].
    usable_models: bool[M, M].

  Returns:
    Sum of squared deviations and number of values, f64[M, n] each.
  """
  # Near each record's own level, so that little cancels below.
  centred = values - values.mean(axis=0, keepdims=True)
  mean, counts = means(centred, chosen, usable_models)
  squares = usable_models.astype(np.float64) @ np.where(chosen, centred**2, 0.0)
  return np.maximum(squares - counts * mean**2, 0.0), counts
