"""Epsilon of sampled Gaussian steps, from the definition and a convolution."""

import numpy as np
from scipy import optimize, stats

_LARGEST = 50.0  # Privacy loss; the tests' own ends well below.
_NUM_CELLS = 2**19


def epsilon(
  *, noise_multiplier: float, sampling_prob: float, num_steps: int, delta: float
) -> float:
  """Add or remove one under Poisson sampling, from no accountant's code.

  One step without the record has the density Q = N(0, s^2), one with it
  P = (1 - q) Q + q N(1, s^2). Their privacy loss is put into cells, its
  distribution convolved with itself once for each step (a product after
  Fourier's transform), and epsilon the value at which

      E[(1 - exp(epsilon - loss))^+] = delta,

  in the worse of the two directions. A loss stands at its cell's middle, so
  that the result is close, not a bound: to 1e-5 of itself, unless a single
  step's losses lie within a few dozen cells.
  """
  s, q = noise_multiplier, sampling_prob
  edges = np.linspace(-_LARGEST, _LARGEST, _NUM_CELLS + 1)

  def outcome(loss):
    """Where log(P / Q), which rises with the outcome, has that value."""
    is_reached = np.exp(loss) > 1 - q
    ratio = np.where(is_reached, np.exp(loss) - (1 - q), q) / q
    return np.where(is_reached, s * s * np.log(ratio) + 0.5, -np.inf)

  def removed():
    """The loss is log(P / Q), and the outcome P's."""
    x = outcome(edges)
    return (1 - q) * stats.norm.cdf(x / s) + q * stats.norm.cdf((x - 1) / s)

  def added():
    """The loss is log(Q / P), and the outcome Q's."""
    return stats.norm.sf(outcome(-edges) / s)

  width = edges[1] - edges[0]
  # A cell's middle is half a width above its edge, and so is each summand's.
  losses = edges[:-1] + num_steps * width / 2

  def one_direction(distribution):
    cells = np.fft.ifftshift(np.diff(distribution))
    together = np.fft.irfft(np.fft.rfft(cells) ** num_steps, _NUM_CELLS)
    masses = np.fft.fftshift(together)

    def too_much(value):
      above = losses > value
      return -masses[above] @ np.expm1(value - losses[above]) - delta

    return optimize.brentq(too_much, 0.0, 30.0, xtol=1e-6)

  return max(one_direction(removed()), one_direction(added()))
