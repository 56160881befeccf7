"""Cotangents in the place of residuals: the same numbers, less memory."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppnet import config
from ppnet.core import param_ops
from ppnet.models import llama
from ppnet.privacy import clipping, reusing_scan
from ppnet.privacy import taps as taps_lib


def plain_scan(body, consts, carry, xs, taps, **options):
  def one(carry, slices):
    carry, y, aux = body(consts, carry, *slices)
    return carry, (y, jax.lax.stop_gradient(aux))

  carry, (ys, aux) = jax.lax.scan(one, carry, (xs, taps), **options)
  return carry, ys, aux


def body(consts, carry, x, tap):
  """Integers, a key, unused taps, an output and something kept."""
  step, hidden = carry
  mixed = jnp.tanh(hidden @ x["weight"] + tap["same"]) * consts["scale"]
  split = mixed.reshape(*mixed.shape[:-1], 2, -1) * jnp.sin(tap["reshaped"])
  noise = jax.random.normal(x["key"], mixed.shape)
  out = jnp.cos(split.reshape(mixed.shape)) + noise * consts["scale"]
  out = out + consts["number"] * step + jnp.sum(tap["small"])
  return (step + 1, out), {"y": out**2, "step": step}, {"kept": mixed}


def case(length):
  normal = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
  return (
    {"scale": normal(0, 1, 6), "number": jnp.int32(3)},
    (jnp.int32(1), normal(1, 5, 6)),
    {
      "weight": normal(2, length, 6, 6),
      "key": jax.random.split(jax.random.key(3), length),
    },
    {
      "same": normal(4, length, 5, 6),
      "reshaped": normal(5, length, 5, 2, 3),
      "small": normal(6, length, 7),
    },
  )


@pytest.mark.parametrize(
  ("length", "reverse", "unroll"), [(1, False, 1), (5, True, 1), (5, False, 2)]
)
def test_gradients_are_those_of_an_ordinary_scan(length, reverse, unroll):
  consts, (step, hidden), xs, taps = case(length)
  options = {"length": length, "reverse": reverse, "unroll": unroll}

  def loss(scan, scale, hidden, weight, taps):
    carry, ys, aux = scan(
      body,
      consts | {"scale": scale},
      (step, hidden),
      xs | {"weight": weight},
      taps,
      **options,
    )
    # Nothing flows through what is kept, and part of ys is not used.
    total = jnp.sum(carry[1] ** 3) + jnp.sum(ys["y"][..., :3] ** 2)
    return total + jnp.sum(aux["kept"]), (carry, ys["step"], aux)

  with jax.debug_key_reuse(False):  # The key serves both scans, on purpose.
    results = [
      jax.jit(
        jax.value_and_grad(loss, argnums=(1, 2, 3, 4), has_aux=True),
        static_argnums=0,
      )(scan, consts["scale"], hidden, xs["weight"], taps)
      for scan in (plain_scan, reusing_scan.scan)
    ]
  for expected, got in zip(*map(jax.tree.leaves, results), strict=True):
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
  # Fails if: a slice is overwritten before it was read, a cotangent is written
  # to another iteration's slice, an integer or a key takes a gradient.


def test_the_reverse_loop_fills_no_stack_before_it_writes_it():
  consts, carry, xs, taps = case(5)
  fixed = {"length": 5, "reverse": False, "unroll": 1}

  def loss(weight, taps):
    weights = xs | {"weight": weight}
    (_, last), _, _ = reusing_scan.scan(
      body, consts, carry, weights, taps, **fixed
    )
    return jnp.sum(last)

  traced = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(xs["weight"], taps)
  *_, reverse = [e for e in traced.eqns if e.primitive.name == "scan"]
  first_carry, first_x = taps_lib._scan_parts(reverse)
  assert len(reverse.outvars) == first_x - first_carry
  made = [e for e in traced.eqns if e.primitive.name == "empty"]
  # The weight's, and that of a tap that fits in no residual's place.
  assert {xs["weight"].shape, taps["small"].shape} <= {
    e.outvars[0].aval.shape for e in made
  }
  # Fails if: cotangents are outputs of the loop, which XLA fills with zeros.


def test_bookkeeping_takes_hardly_more_memory_than_no_clipping():
  cfg = config.LlamaConfig(
    vocab_size=64,
    embed_dim=64,
    num_layers=6,
    num_heads=2,
    num_kv_heads=2,
    head_dim=32,
    mlp_dim=168,
    max_seq_len=64,
  )
  model = llama.Llama(cfg)
  tokens = jax.ShapeDtypeStruct((16, 64), jnp.int32)
  params = jax.eval_shape(
    lambda t: nn.meta.unbox(model.init(jax.random.key(0), t)["params"]), tokens
  )

  def loss_fn(params, batch, ops=param_ops.PLAIN):
    logits = model.clone(ops=ops).apply({"params": params}, batch)
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1), axis=1)

  def memory(grad_fn):
    compiled = jax.jit(grad_fn).lower(params, tokens).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  unclipped = clipping.unprotected_grad(
    loss_fn, clipping=config.Clipping.NONE, l2_clip_norm=1.0
  )
  kept = clipping.clipped_grad(
    loss_fn, l2_clip_norm=1.0, engine=config.Engine.BOOKKEEPING
  )
  assert memory(kept) <= 1.10 * memory(unclipped)
  # Fails if: XLA copies the stacks (the conditional in `_read` is left out), or
  # cotangents are kept beside the residuals.
