"""What it costs to choose the best of several private runs.

Whoever trains several times and keeps the model with the best score releases
more than one run does: which of them it was depends on the data. Papernot and
Steinke 2022 (https://arxiv.org/abs/2110.03620) bound this where the *number* of
runs K is random, each run takes its hyper-parameters at random from the
candidates, and nothing but the best run is released. Of Q, one run, and A, the
best of K runs, in Renyi DP of order l:

  Theorem 2, K truncated negative binomial with shape h and parameter g:
    eps_A(l) = eps_Q(l) + (1 + h) (1 - 1 / m) eps_Q(m)
               + (1 + h) log(1 / g) / m + log(E K) / (l - 1),  any order m >= 1
    E K = h (1 - g) / (g (1 - g^h)); h = 1 is the geometric distribution
  Theorem 6, K Poisson:
    eps_A(l) = eps_Q(l) + E K * d + log(E K) / (l - 1),
    Q being (log(1 + 1 / (l - 1)), d)-DP

*Formal guarantee.* As above, with Q the worst candidate at every order. A fixed
number of runs, as a grid has, is not random and covered by neither theorem:
there the runs compose, which is `composed`. The score by which runs are
compared must be a function of what the run releases and of public records;
scores on private records that are not the training set's are covered by none
of this.

| case | result |
| --- | --- |
| a mean of one run | no less than one run costs; theorem 2 is not tight there |
| K = 0, under theorem 6 alone | nothing is released; probability exp(-E K) |
| a candidate without a guarantee | infinite |

All curves are over `ORDERS`, under add-or-remove-one. No JAX in this module.

>>> one = curve(noise_multiplier=4.0, sampling_prob=0.1, num_steps=100)
>>> best = best_of_geometric(one, mean_runs=10)
>>> round(epsilon(one, delta=1e-5), 2), round(epsilon(best, delta=1e-5), 2)
(1.08, 2.27)
"""

import functools
import math
from collections.abc import Sequence

import dp_accounting
import numpy as np
from dp_accounting import rdp
from dp_accounting.rdp import rdp_privacy_accountant
from scipy import optimize

from ppnet.core import checks
from ppnet.privacy import accounting, participation

ORDERS = np.array(rdp_privacy_accountant.DEFAULT_RDP_ORDERS, np.float64)


def curve(
  *, noise_multiplier: float | int, sampling_prob: float | int, num_steps: int
) -> np.ndarray:
  """Renyi DP of one run under Poisson sampling, at each of `ORDERS`.

  Mironov et al. 2019 (https://arxiv.org/abs/1908.10530, Section 3.3).

  Args:
    noise_multiplier: noise standard deviation over sensitivity; 0 has no
      guarantee.
    sampling_prob: in (0, 1].
    num_steps: of the run; none is a run that released nothing.

  Raises:
    ValueError: an argument is out of range.
  """
  checks.non_negative(noise_multiplier=noise_multiplier, num_steps=num_steps)
  drawn = participation.Poisson(sampling_prob=sampling_prob)
  if num_steps == 0:
    return np.zeros_like(ORDERS)
  if noise_multiplier == 0:
    return np.full_like(ORDERS, math.inf)
  return num_steps * _one_step(drawn, float(noise_multiplier))


@functools.lru_cache(maxsize=1024)
def _one_step(
  drawn: participation.Poisson, noise_multiplier: float
) -> np.ndarray:
  """The curve of one step, remembered: steps of one kind add up."""
  accountant = rdp.RdpAccountant(
    ORDERS.tolist(), dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
  )
  with accounting.quiet_orders():
    accountant.compose(drawn.release(noise_multiplier))
  return np.array(accountant.rdp)


def worst(curves: Sequence[np.ndarray]) -> np.ndarray:
  """What holds for each of several runs."""
  return np.max(curves, axis=0)


def composed(curves: Sequence[np.ndarray]) -> np.ndarray:
  """All of several runs, released together (Mironov 2017, Proposition 1)."""
  return np.sum(curves, axis=0)


def epsilon(values: np.ndarray, *, delta: float | int) -> float:
  """Epsilon of a curve (Canonne et al. 2020, Proposition 12).

  Raises:
    ValueError: delta is not in (0, 1).
  """
  checks.positive(delta=delta)
  if not np.isfinite(values).any():
    return math.inf
  return float(rdp.compute_epsilon(ORDERS.tolist(), values.tolist(), delta)[0])


def best_of_geometric(
  values: np.ndarray, *, mean_runs: float | int
) -> np.ndarray:
  """Theorem 2 with shape 1: each run is the last one with equal probability."""
  return best_of_truncated_negative_binomial(
    values, mean_runs=mean_runs, shape=1.0
  )


def best_of_truncated_negative_binomial(
  values: np.ndarray, *, mean_runs: float | int, shape: float | int
) -> np.ndarray:
  """Theorem 2 of Papernot and Steinke; see the module.

  Args:
    values: curve of one run, of the worst candidate.
    mean_runs: E K, above 1.
    shape: h, above 0.

  Returns:
    The curve of the best run's release.

  Raises:
    ValueError: an argument is out of range.
  """
  checks.positive(shape=shape)
  if not (math.isfinite(mean_runs) and mean_runs > 1):
    checks.fail("mean_runs > 1", mean_runs=mean_runs)
  log_parameter = optimize.brentq(
    lambda log_g: (
      math.log(shape)
      + math.log(-math.expm1(log_g))
      - log_g
      - math.log(-math.expm1(shape * log_g))
      - math.log(mean_runs)
    ),
    -math.log(mean_runs) * (1 + 1 / shape) - 50.0,
    -1e-12,
  )
  of_order = (1 - 1 / ORDERS) * values - log_parameter / ORDERS
  every = values + (1 + shape) * np.min(of_order)
  every += math.log(mean_runs) / (ORDERS - 1)
  # Renyi divergence grows with its order: a bound holds at all lower ones.
  return np.minimum.accumulate(every[::-1])[::-1]


def best_of_poisson(
  values: np.ndarray, *, mean_runs: float | int
) -> np.ndarray:
  """Theorem 6 of Papernot and Steinke; see the module.

  Args:
    values: curve of one run, of the worst candidate.
    mean_runs: E K, at least 1.

  Returns:
    The curve of the best run's release.

  Raises:
    ValueError: an argument is out of range.
  """
  if not (math.isfinite(mean_runs) and mean_runs >= 1):
    checks.fail("mean_runs >= 1", mean_runs=mean_runs)
  if not np.isfinite(values).any():
    return values
  deltas = [
    rdp_privacy_accountant.compute_delta(
      ORDERS.tolist(), values.tolist(), math.log1p(1 / (order - 1))
    )[0]
    for order in ORDERS
  ]
  every = values + mean_runs * np.array(deltas)
  every += math.log(mean_runs) / (ORDERS - 1)
  return np.minimum.accumulate(every[::-1])[::-1]
