"""Gradients of units that are kept in bfloat16."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppnet import config
from ppnet.core import param_ops
from ppnet.privacy import clipping, ghost, taps

M, N = 5, 4


@pytest.mark.parametrize("is_stacked", [False, True])
def test_what_is_kept_in_bfloat16_has_the_norm_that_it_adds(is_stacked):
  """Rounded once: the norm is of what enters the sum, and not of more."""
  rng = np.random.default_rng(8)
  tokens = 60  # Many for the weight's size: its gradients are kept.
  x = jnp.asarray(rng.normal(size=(1, tokens, M)), jnp.bfloat16)

  def loss_fn(params, batch, ops=param_ops.PLAIN):
    def layer(total, weight):
      out = ops.dense("w", weight.astype(jnp.bfloat16), batch)
      return total + jnp.sum(jnp.tanh(out).astype(jnp.float32), axis=(1, 2)), 0

    if is_stacked:
      return jax.lax.scan(layer, jnp.zeros(len(batch)), params["w"])[0]
    return layer(jnp.zeros(len(batch)), params["w"])[0]

  shape = (3, M, N) if is_stacked else (M, N)
  params = {"w": jnp.asarray(rng.normal(size=shape), jnp.float32)}
  marked = functools.partial(loss_fn, ops=taps.MARKING)
  sites = taps.trace(marked, params, x).sites
  assert ghost.choose_way(sites, may_probe=False) is ghost.Way.KEEP
  assert ghost.kept_dtype(sites) == jnp.bfloat16
  fn = clipping.clipped_grad(
    loss_fn, l2_clip_norm=1e6, engine=config.Engine.BOOKKEEPING
  )
  result = jax.jit(fn)(params, x)
  added = np.asarray(result.grad_sum["w"])
  np.testing.assert_array_equal(added, added.astype(jnp.bfloat16))
  np.testing.assert_allclose(
    result.grad_norms[0], np.linalg.norm(added), rtol=1e-6
  )
  clip = float(result.grad_norms[0]) / 3
  fn = clipping.clipped_grad(
    loss_fn, l2_clip_norm=clip, engine=config.Engine.BOOKKEEPING
  )
  clipped = jax.jit(fn)(params, x).grad_sum["w"]
  assert np.linalg.norm(clipped) <= clip
  # Fails if: the norm is taken before the rounding, or the sum.
