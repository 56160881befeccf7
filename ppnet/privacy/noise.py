"""The Gaussian noise of DP-SGD, as an optax transformation.

It stands between the clipped sum and everything else:

  optax.chain(gaussian_privatizer(noise_stddev=...), optax.scale(...), ...)

The key is an argument of each update, never a part of the state, so it is in no
checkpoint. Noise is drawn in float32 whatever the dtype of the parameters: a
bfloat16 normal has 128 distinct values.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from ppnet.core import checks

_KEY_IMPL = "threefry2x32"


def gaussian_privatizer(
  *, noise_stddev: float
) -> optax.GradientTransformationExtraArgs:
  """Adds independent N(0, `noise_stddev`^2) noise to every entry of a sum.

  The noise of step 6 of Algorithm 1 in Abadi et al. 2016
  (https://arxiv.org/abs/1607.00133), before the division by the batch size.

  *Formal guarantee.* If the sum that goes in has l2 sensitivity S, the result
  is one release of the Gaussian mechanism with noise multiplier
  `noise_stddev / S`, given a fresh `noise_key` for each update. The noise is a
  function of the key and of the tree's shapes alone: not of the values, the
  parameters, the mesh or the sharding. The draws are float32 (about 2^23
  magnitudes, none above 5.5 standard deviations), as everywhere in the field:
  the continuous Gaussian of the analysis is an idealisation.

  | edge case | result |
  | --- | --- |
  | `noise_stddev` 0 | the sum in float32, exactly |
  | a bfloat16 or float16 sum | noise and result in float32 |
  | an empty batch, so a sum of zeros | noise alone |
  | a key that is legacy, batched, or not threefry | `ValueError` |

  Args:
    noise_stddev: standard deviation in the units of the sum (noise multiplier
      times sensitivity), finite and >= 0.

  Returns:
    A transformation `update(grad_sum, state, params=None, *, noise_key)`.
    `noise_key` is one typed threefry key, used up by the call; the state is
    `optax.EmptyState`. The updates are float32 in the structure of `grad_sum`.

  Raises:
    ValueError: `noise_stddev` is negative or not finite.
  """
  checks.non_negative(noise_stddev=noise_stddev)

  def init_fn(params: optax.Params) -> optax.EmptyState:
    del params  # Nothing to remember.
    return optax.EmptyState()

  def update_fn(
    grad_sum: optax.Updates,
    state: optax.EmptyState,
    params: optax.Params | None = None,
    *,
    noise_key: jax.Array,
    **extra_args: Any,
  ) -> tuple[optax.Updates, optax.EmptyState]:
    del params, extra_args  # Noise depends on the key alone.
    _check_key(noise_key)
    total = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), grad_sum)
    if noise_stddev > 0:
      drawn = standard_normal(noise_key, total)
      total = jax.tree.map(
        lambda leaf, z: leaf + noise_stddev * z, total, drawn
      )
    return total, state

  # Optax passes the first argument by position; its name says what may enter.
  # pyrefly: ignore [bad-argument-type]
  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def standard_normal(noise_key: jax.Array, tree: Any) -> Any:
  """Independent N(0, 1) draws in float32, in the structure of `tree`.

  A function of the key and of the shapes alone; each leaf has a key of its own.

  Args:
    noise_key: one typed threefry key, used up by the call.
    tree: arrays; only their shapes are read.

  Raises:
    ValueError: the key is legacy, batched, or not threefry.
  """
  _check_key(noise_key)
  leaves, structure = jax.tree.flatten(tree)
  keys = jax.random.split(noise_key, len(leaves))
  return jax.tree.unflatten(
    structure,
    [
      jax.random.normal(keys[i], leaf.shape, jnp.float32)
      for i, leaf in enumerate(leaves)
    ],
  )


def _check_key(noise_key: jax.Array) -> None:
  """Raises unless it is one typed threefry key. Never prints the key."""
  remedy = "Derive one with ppnet.core.prng."
  dtype = getattr(noise_key, "dtype", None)
  if dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
    checks.fail(
      "noise_key to be a typed JAX key",
      remedy,
      noise_key_type=type(noise_key).__name__,
      noise_key_dtype=str(dtype),
    )
  implementation = str(jax.random.key_impl(noise_key))
  if implementation != _KEY_IMPL:
    checks.fail(
      f"noise_key to be of implementation {_KEY_IMPL!r}",
      "Others depend on the mesh or are weaker. " + remedy,
      noise_key_impl=implementation,
    )
  if noise_key.shape:
    checks.fail(
      "noise_key to be one key", remedy, noise_key_shape=noise_key.shape
    )
