"""The likelihood-ratio attack: one Gaussian per record, in and out.

Carlini et al. 2022, Algorithm 1 (https://arxiv.org/abs/2112.03570). The margin
of a record, log p_y - log sum over y' != y of p_y', is nearly Gaussian over
models; the attack asks how much likelier the target's margin is among models
that were trained on the record than among those that were not. NumPy only.
"""

import numpy as np

from ppnet.audit import references

# With fewer references on a side, one variance serves all records: Carlini et
# al. 2022 found it better below about 64 models, 32 on a side.
_POOL_BELOW = 32
_MIN_STDDEV = 1e-12  # Of a record on which all references agree exactly.


def online(
  margins: np.ndarray,
  membership: np.ndarray,
  partner: np.ndarray,
  *,
  pooled: bool | None = None,
) -> np.ndarray:
  """Log of N(margin; in) / N(margin; out): the ratio of Algorithm 1 there.

  Args:
    margins: f64[M, n].
    membership: bool[M, n].
    partner: i64[M].
    pooled: one variance per side for all records; None pools where a side has
      fewer than 32 references.

  Returns:
    f64[M, n], nats.

  Raises:
    references.TooFewError: fewer than two references on a side.
  """
  usable = references.usable(partner)
  log_likelihood = {}
  for side, chosen in (("in", membership), ("out", ~membership)):
    mean, stddev = _gaussians(margins, chosen, usable, pooled=pooled)
    log_likelihood[side] = -0.5 * ((margins - mean) / stddev) ** 2 - np.log(
      stddev
    )
  return log_likelihood["in"] - log_likelihood["out"]


def offline(
  margins: np.ndarray,
  membership: np.ndarray,
  partner: np.ndarray,
  *,
  pooled: bool | None = None,
) -> np.ndarray:
  """How far the margin lies above models that did not see the record.

  In standard deviations. The offline variant there takes the Gaussian's
  distribution function of it, which orders alike and rounds to 1 where it
  matters.

  Args:
    margins: f64[M, n].
    membership: bool[M, n].
    partner: i64[M].
    pooled: as for `online`.

  Returns:
    f64[M, n].

  Raises:
    references.TooFewError: fewer than two references without the record.
  """
  usable = references.usable(partner)
  mean, stddev = _gaussians(margins, ~membership, usable, pooled=pooled)
  return (margins - mean) / stddev


def _gaussians(
  margins: np.ndarray,
  chosen: np.ndarray,
  usable: np.ndarray,
  *,
  pooled: bool | None,
) -> tuple[np.ndarray, np.ndarray]:
  """Mean and standard deviation over the chosen references, f64[M, n] each."""
  mean, counts = references.means(margins, chosen, usable, at_least=2)
  squares, _ = references.variances(margins, chosen, usable)
  if pooled is None:
    pooled = bool(counts.min() < _POOL_BELOW)
  if pooled:
    # Within records: how records differ from each other is no noise.
    variance = squares.sum(axis=1, keepdims=True) / (counts - 1).sum(
      axis=1, keepdims=True
    )
  else:
    variance = squares / (counts - 1)
  return mean, np.maximum(np.sqrt(variance), _MIN_STDDEV)
