"""The privacy loss of one cycle of balls-in-bins sampling, without chance.

In a cycle of b steps every example joins one step, drawn uniformly. Chua et al.
2025 (https://arxiv.org/abs/2412.16802, Section 3) show that the pair

  P = (1/b) sum_j N(e_j, s^2 I),    Q = N(0, s^2 I),    j = 1..b,

dominates the cycle under add-or-remove-one, s the noise multiplier, also when
each step depends on the earlier ones, and estimate its divergences by Monte
Carlo. Here they are bounded from above by a sum instead, with certainty. The
likelihood ratio is a mean,

  dP/dQ (z) = (1/b) sum_j X_j,    X_j = exp(z_j / s^2 - 1 / (2 s^2)),

of b independent log-normals of mean 1 under Q. Both hockey-stick divergences,
of P from Q and of Q from P, are expectations under Q of convex functions of
that mean. So it may be replaced by anything that is larger in the convex order
(Shaked and Shanthikumar 2007, Section 3.A: the order is closed under
convolution): each X_j is moved to the ends of its cell on a grid, such that its
mean is kept, and the b copies are convolved by one FFT. What leaves the grid
counts as a privacy loss of infinity. Feldman and Shenfeld 2025
(https://arxiv.org/abs/2502.08202) study the same sampler as random allocation.
No JAX in this module.
"""

import math

import numpy as np
from dp_accounting import pld
from scipy import fft, special

_MAX_GRID_POINTS = 2**20
_POINTS_PER_DEVIATION = 250  # Of one X: above, epsilon moves by less than 1e-4.


def cycle_loss(
  *,
  noise_multiplier: float,
  num_bins: int,
  interval: float,
  tail_mass: float,
) -> pld.privacy_loss_distribution.PrivacyLossDistribution:
  """Upper bound on the privacy loss of one cycle, ready to be composed.

  *Formal guarantee.* The distribution dominates the pair above, in both
  directions, up to floating-point rounding. Rounding inside the FFT is counted
  as a loss of infinity where it can be seen (negative masses, twice over).

  | edge case | result |
  | --- | --- |
  | `num_bins` 1 | the Gaussian mechanism, slightly above it |
  | little noise in many bins | coarser: the grid is bounded |

  Args:
    noise_multiplier: noise standard deviation over sensitivity, > 0.
    num_bins: steps of a cycle, >= 1.
    interval: discretisation of the privacy loss, in nats.
    tail_mass: probability given up at each end of the grid; a part of delta.
  """
  scale = 1 / noise_multiplier
  deviations = -special.ndtri(tail_mass / num_bins)
  # Below `low` lies at most `tail_mass` of all bins together. Above `high` the
  # mean is almost never found, under P as under Q.
  low = math.exp(-scale * deviations - scale**2 / 2)
  variance = math.expm1(min(scale**2, 50.0))
  largest = math.exp(min(scale * deviations + scale**2 / 2, 100.0))
  high = num_bins * (1 + 8 * math.sqrt(variance / num_bins)) + largest
  width = max(
    high / _MAX_GRID_POINTS, math.sqrt(variance) / _POINTS_PER_DEVIATION
  )
  num_points = max(math.ceil((high - num_bins * low) / width), 2)
  return _loss_distribution(
    *_mean_ratio(scale, num_bins, low, width, num_points),
    interval=interval,
    tail_mass=tail_mass,
  )


def _mean_ratio(
  scale: float, num_bins: int, low: float, width: float, num_points: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Values of the mean of b ratios, and their masses under P and Q.

  Returns:
    values f64[K], increasing; P's and Q's masses f64[K], which may hold
    rounding of either sign.
  """
  edges = low + width * np.arange(num_points + 1)
  log_edges = np.log(edges)
  # E[1{X <= x}] and E[X 1{X <= x}] in closed form.
  mass = np.diff(special.ndtr((log_edges + scale**2 / 2) / scale))
  first_moment = np.diff(special.ndtr((log_edges - scale**2 / 2) / scale))
  right = np.clip((first_moment - mass * edges[:-1]) / width, 0, mass)
  one = mass - right  # To the left end of the cell, the rest to the right end.
  one[1:] += right[:-1]  # The last cell's right end is off the grid: infinity.
  size = fft.next_fast_len(2 * num_points, real=True)
  transform = fft.rfft(one, size)
  others = transform ** (num_bins - 1)
  # Under P one bin has the mass of Q times its own value. Computed so, P's
  # masses of rare large values have small errors; Q's are those over the value.
  tilted = fft.rfft(one * edges[:-1], size)
  of_p = fft.irfft(tilted * others, size)[:num_points]
  of_q = fft.irfft(transform * others, size)[:num_points]
  values = low + width * np.arange(num_points) / num_bins
  above = values >= 1
  return (
    values,
    np.where(above, of_p, of_q * values),
    np.where(above, of_p / values, of_q),
  )


def _loss_distribution(
  values: np.ndarray,
  of_p: np.ndarray,
  of_q: np.ndarray,
  *,
  interval: float,
  tail_mass: float,
) -> pld.privacy_loss_distribution.PrivacyLossDistribution:
  """From masses at likelihood ratios to masses on a grid of privacy losses.

  "Connect the dots" (Doroshenko et al. 2022, Section 3): each mass is split
  between its two neighbours on the grid such that its masses under P and under
  Q are kept, which is again a step up in the convex order.
  """
  # The FFT's rounding is as often negative as positive; only the former shows.
  rounding_p = -2 * float(np.minimum(of_p, 0).sum())
  rounding_q = -2 * float(np.minimum(of_q, 0).sum())
  of_q = np.maximum(of_q, 0)
  cells = np.floor(np.log(values) / interval).astype(np.int64)
  first = int(cells[0])
  offset = cells - first
  lower, upper = np.exp(cells * interval), np.exp((cells + 1) * interval)
  share = np.clip((values - lower) / (upper - lower), 0, 1)
  size = int(offset[-1]) + 2
  under_q = np.bincount(offset, of_q * (1 - share), size)
  under_q += np.bincount(offset + 1, of_q * share, size)
  under_p = under_q * np.exp((first + np.arange(size)) * interval)
  remove = _pmf(first, under_p, interval, rounding_p + tail_mass)
  add = _pmf(1 - first - size, under_q[::-1], interval, rounding_q + tail_mass)
  return pld.privacy_loss_distribution.PrivacyLossDistribution(remove, add)


def _pmf(
  lowest: int, masses: np.ndarray, interval: float, slack: float
) -> pld.pld_pmf.PLDPmf:
  """What is missing from the masses, and the slack, are losses of infinity."""
  infinity = min(max(0.0, 1.0 - float(masses.sum())) + slack, 1.0)
  return pld.pld_pmf.DensePLDPmf(interval, lowest, masses, infinity, True)
