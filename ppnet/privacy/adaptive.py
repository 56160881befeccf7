"""A clip norm that follows a quantile of the gradients' norms, paid for.

Andrew et al. 2021, "Differentially Private Learning with Adaptive Clipping",
https://arxiv.org/abs/1905.03871. Each step releases, beside the noisy clipped
sum, a noisy count of the units whose gradient was within the clip norm C_t, and
moves C_t geometrically towards the norm that a share `quantile` is within
(Algorithm 1):

  C_{t+1} = C_t exp(-learning_rate (noisy share - quantile)).

*Formal guarantee.* Write one unit's contribution to both releases as one vector
v = (clip(g / C_t, 1) / s, (b - 1/2) / s_b), where s and s_b are the standard
deviations of the two noises, b is 1 if norm(g) <= C_t and 0 if not, and a unit
that does not count adds the zero vector. Then norm(v)^2 is at most
1 / s^2 + 1 / (2 s_b)^2, whatever the unit and whatever the public C_t: in units
of the noise, the two releases are *one* Gaussian mechanism on a sum whose terms
have norm at most that. It is the one with noise multiplier z that the
accountant knows, for any sampling and either neighbouring relation, if the
terms have norm at most 1 / z under ADD_OR_REMOVE_ONE and 1 / (2 z) under
REPLACE_ONE, where the sum moves by up to two terms (the paper's Theorem 1 is
the first of the two). With s = z_sum * sensitivity, both give

  z_sum = (z^-2 - (sensitivity of the count / s_b)^2)^(-1/2),

the sensitivity being 1/2, or 1 under REPLACE_ONE: `grad_noise_multiplier`. C_t
is a function of earlier releases and of constants: public, and free.

The sum is in units of C_t (`scale` of `clipping.clipped_grad`), so its noise is
a constant and nothing is compiled again when C_t moves.

| edge case | result |
| --- | --- |
| nobody sampled | noise alone moves C_t; a share outside [0, 1] is used as is |
| padding, a non-finite unit | no part in the count |
| s_b at most z times the sensitivity | `ValueError`: no budget for the sum |
| C_t outside [1e-10, 1e15] | the nearer end |
| z = 0 (no noise at all) | z_sum 0 and no noise on the count |
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from ppnet import config
from ppnet.core import checks

_MIN_CLIP_NORM, _MAX_CLIP_NORM = 1e-10, 1e15


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptiveClip:
  """How the clip norm moves.

  Attributes:
    initial_clip_norm: C_0, in [1e-10, 1e15].
    quantile: share of units whose gradient is to be within the clip norm.
    learning_rate: of the logarithm of the clip norm, > 0.
    expected_batch_size: public divisor of the count.
    count_stddev: standard deviation of the noise on the count; 0 without noise.

  Raises:
    ValueError: a field out of range.
  """

  initial_clip_norm: float
  quantile: float
  learning_rate: float
  expected_batch_size: int
  count_stddev: float

  def __post_init__(self) -> None:
    """Checks the fields."""
    checks.positive(
      initial_clip_norm=self.initial_clip_norm,
      learning_rate=self.learning_rate,
      expected_batch_size=self.expected_batch_size,
    )
    checks.non_negative(count_stddev=self.count_stddev)
    checks.in_open_unit_interval(quantile=self.quantile)

  def next_clip_norm(
    self, clip_norm: jax.Array, noisy_count: jax.Array
  ) -> jax.Array:
    """C_{t+1} from C_t and the noisy count, f32[]; both are public.

    Args:
      clip_norm: C_t, f32[].
      noisy_count: `centred_count` with noise, f32[].
    """
    share = noisy_count / self.expected_batch_size + 0.5
    factor = jnp.exp(-self.learning_rate * (share - self.quantile))
    return jnp.clip(clip_norm * factor, _MIN_CLIP_NORM, _MAX_CLIP_NORM)


def centred_count(
  grad_norms: jax.Array, counts: jax.Array, *, clip_norm: jax.Array
) -> jax.Array:
  """Sum of b - 1/2 over units, f32[]. Private.

  Centred, since then no unit moves it by more than 1/2.

  Args:
    grad_norms: norms before clipping, f32[U].
    counts: units that are neither padding nor non-finite, bool[U].
    clip_norm: C_t, f32[].
  """
  within = jnp.where(grad_norms <= clip_norm, 0.5, -0.5)
  return jnp.sum(jnp.where(counts, within, 0.0))


def count_sensitivity(relation: config.NeighboringRelation) -> float:
  """How far `centred_count` can move between neighbours."""
  match relation:
    case config.NeighboringRelation.ADD_OR_REMOVE_ONE:
      return 0.5
    case config.NeighboringRelation.REPLACE_ONE:
      return 1.0
  checks.fail(
    "neighboring_relation to be a config.NeighboringRelation",
    neighboring_relation=relation,
  )


def grad_noise_multiplier(
  noise_multiplier: float,
  *,
  count_stddev: float,
  neighboring_relation: config.NeighboringRelation,
) -> float:
  """z_sum: what is left for the sum once the count is paid for.

  Args:
    noise_multiplier: z, of both releases together; what is accounted for.
    count_stddev: s_b.
    neighboring_relation: of the guarantee.

  Returns:
    z_sum > z; 0 if z is 0.

  Raises:
    ValueError: the count alone would cost as much as both may, or more.
  """
  if noise_multiplier == 0:
    return 0.0
  checks.positive(noise_multiplier=noise_multiplier, count_stddev=count_stddev)
  spent = count_sensitivity(neighboring_relation) / count_stddev
  left = noise_multiplier**-2 - spent**2
  least = noise_multiplier * count_sensitivity(neighboring_relation)
  if left <= 0:
    checks.fail(
      f"privacy.clip_count_stddev > {least:.4g}",
      "Below, the noisy count costs more than the whole step may. A twentieth"
      " of the expected batch size is usual, and then the batch is too small"
      " for a clip norm that adapts.",
      clip_count_stddev=count_stddev,
      noise_multiplier=noise_multiplier,
    )
  return 1 / math.sqrt(left)
