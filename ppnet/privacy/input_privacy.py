"""Privacy of one input at a private cut: the Gaussian mechanism, calibrated.

A private cut clips the hidden state of one example, all its tokens together, to
norm C and adds Gaussian noise; everything behind the cut sees only the noisy
state (Lecuyer et al. 2019, PixelDP, https://arxiv.org/abs/1802.03471; Du et al.
2023, DP-Forward, https://arxiv.org/abs/2309.06746). Any two inputs give states
that are at most 2 C apart, so the sensitivity is 2 C, whatever was learned.

*Formal guarantee.* One output of the model is (epsilon, delta)-differentially
private with respect to replacing its whole input by any other of as many
tokens. Lengths, padding and positions count as public; k outputs for one input
compose; the noise must be drawn from a secret key. It says nothing of the
training set: that is `privacy.mechanism`'s guarantee, and the two do not add.

| case | behaviour |
| --- | --- |
| epsilon 0 | sigma is found: the two states are hard to tell apart at all |
| delta 0 or 1 | rejected: Gaussian noise is never pure, and 1 is no promise |
| state of norm 0 | noised like any other |
| state with NaN or inf | counts as 0 (`models.private_cut`) |

This file imports no JAX.
"""

import math
import secrets
from typing import Any

from scipy import special

from ppnet import config as config_lib
from ppnet.core import checks


def gaussian_delta(*, epsilon: float, noise_multiplier: float) -> float:
  """The least delta of the Gaussian mechanism (Balle and Wang 2018, Theorem 8).

  https://arxiv.org/abs/1805.06530, with s = noise_multiplier:

      Phi(1 / 2 s - epsilon s) - exp(epsilon) Phi(-1 / 2 s - epsilon s)

  Args:
    epsilon: not negative.
    noise_multiplier: noise standard deviation over sensitivity.

  Raises:
    ValueError: an argument is out of range.
  """
  checks.non_negative(epsilon=epsilon)
  checks.positive(noise_multiplier=noise_multiplier)
  half, shift = 0.5 / noise_multiplier, epsilon * noise_multiplier
  # The second term in logarithms: exp(epsilon) may be large, Phi tiny.
  second = special.log_ndtr(-half - shift) + epsilon
  return float(max(0.0, special.ndtr(half - shift) - math.exp(second)))


def calibrate_noise_multiplier(*, epsilon: float, delta: float) -> float:
  """The least noise, over sensitivity, that reaches (epsilon, delta).

  Args:
    epsilon: target, not negative.
    delta: target, between 0 and 1.

  Returns:
    The noise standard deviation over the sensitivity, rounded up by less than
    one part in 10^9.

  Raises:
    ValueError: an argument is out of range.
  """
  checks.non_negative(epsilon=epsilon)
  checks.in_open_unit_interval(delta=delta)

  def holds(noise_multiplier: float) -> bool:
    reached = gaussian_delta(epsilon=epsilon, noise_multiplier=noise_multiplier)
    return reached <= delta

  low, high = 0.0, 1.0
  while not holds(high):
    low, high = high, 2 * high
  while high - low > 1e-9 * high:
    middle = 0.5 * (low + high)
    if holds(middle):
      high = middle
    else:
      low = middle
  return high  # What is claimed must hold, so the end that does.


def claim(cut: config_lib.PrivateCutConfig) -> dict[str, Any]:
  """What a record says of a private cut: plain values."""
  noise_multiplier = calibrate_noise_multiplier(
    epsilon=cut.epsilon, delta=cut.delta
  )
  return {
    "layer": cut.layer,
    "l2_clip_norm": cut.l2_clip_norm,
    "epsilon": cut.epsilon,
    "delta": cut.delta,
    "noise_multiplier": noise_multiplier,
    "noise_stddev": noise_multiplier * 2 * cut.l2_clip_norm,
    "seeded": cut.noise_seed is not None,
    "guarantee": (
      f"Each output is ({cut.epsilon:g}, {cut.delta:g})-differentially private"
      " with respect to replacing its whole input by another of the same"
      " length (Gaussian mechanism); outputs for one input compose. Not about"
      " the training set."
    ),
  }


def noise_root_entropy(cut: config_lib.PrivateCutConfig) -> int:
  """Returns 128 bits for the root key of the cut's noise.

  *Formal guarantee.* Secret, fresh bits of the operating system's entropy,
  unless `noise_seed` is set; then they are known to whoever knows it.
  """
  if cut.noise_seed is None:
    return secrets.randbits(128)
  return cut.noise_seed
