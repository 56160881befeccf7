"""The private cut: a hidden state that is clipped and noised on its way up.

The one place of a model where noise gives a guarantee, and it needs no trust in
what was learned: the state of one example, [T, D] as one vector, is clipped to
norm C and noised, and every later layer's residual stream, keys and values are
computed from the result alone. `privacy.input_privacy` says what that promises
and calibrates the noise to the sensitivity 2 C. (A sensitivity of 1 whatever
the norm, as in published code of DP-Forward, promises nothing.)
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

# Keeps the norm below C under rounding: float32's sum over T D products and
# the scaled state's own rounding stay below it by far.
_SLACK = 1e-4


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrivateCut:
  """Where the state is cut, and how much noise it gets.

  Attributes:
    layer: the decoder layer, counted from 0, whose input is cut.
    l2_clip_norm: C, bound on an example's state.
    noise_stddev: of the noise on each feature; noise multiplier times 2 C.
  """

  layer: int
  l2_clip_norm: float
  noise_stddev: float


def draw(
  keys: Key[Array, " B"], shape: tuple[int, int], *, cut: PrivateCut
) -> Float[Array, "B T D"]:
  """Noise for each example's state [T, D], float32.

  Args:
    keys: one secret key per example, each for one draw.
    shape: T and D.
    cut: its scale.
  """
  normal = jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))
  return cut.noise_stddev * normal(keys)


def privatize(
  x: Float[Array, "B T D"], noise: Float[Array, "B T D"], *, cut: PrivateCut
) -> Float[Array, "B T D"]:
  """Clips each example's state to C and adds its noise, in float32.

  A state that is not finite counts as 0. The result has the dtype of `x`.

  Args:
    x: states.
    noise: from `draw`, for this use alone.
    cut: the norm.
  """
  return (jax.vmap(functools.partial(_clip, cut=cut))(x) + noise).astype(
    x.dtype
  )


def _clip(x: Array, *, cut: PrivateCut) -> Array:
  """One example's state, its norm at most C, float32."""
  wide = x.astype(jnp.float32)
  # Scaled by its largest entry first: squares neither overflow nor vanish.
  largest = jnp.max(jnp.abs(wide))
  is_usable = jnp.isfinite(largest) & (largest > 0)
  unit = jnp.where(is_usable, wide / jnp.where(is_usable, largest, 1), 0)
  # At least 1, as its largest entry is, unless the state counts as 0.
  length = jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(unit)), 1))
  bound = cut.l2_clip_norm * (1 - _SLACK)
  return unit * jnp.minimum(jnp.where(is_usable, largest, 0), bound / length)
