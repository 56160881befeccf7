"""What AUTO chooses, that it says why, and that the sum is the same."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppnet import config
from ppnet.core import param_ops
from ppnet.models import llama
from ppnet.privacy import clipping

AUTO, VMAP = config.Engine.AUTO, config.Engine.VMAP


def case(**changes):
  cfg = dataclasses.replace(
    config.LlamaConfig(
      vocab_size=23,
      embed_dim=24,
      num_layers=2,
      num_heads=2,
      num_kv_heads=2,
      head_dim=12,
      mlp_dim=40,
      max_seq_len=16,
    ),
    **changes,
  )
  model = llama.Llama(cfg)
  tokens = jax.random.randint(jax.random.key(0), (3, 16), 0, 23)

  def loss_fn(params, batch, ops=param_ops.PLAIN):
    logits = model.clone(ops=ops).apply({"params": params}, batch)
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1), axis=1)

  params = nn.meta.unbox(model.init(jax.random.key(1), tokens)["params"])
  return loss_fn, params, tokens


def choice_and_results(loss_fn, params, batch):
  fns = {
    engine: clipping.clipped_grad(loss_fn, l2_clip_norm=1.0, engine=engine)
    for engine in (AUTO, VMAP)
  }
  choice = fns[AUTO].engine_choice(params, batch)
  return choice, [jax.jit(fn)(params, batch).grad_sum for fn in fns.values()]


def assert_same(one, other, *, tolerance=1e-5):
  one, other = (
    np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
    for tree in (one, other)
  )
  assert np.linalg.norm(one - other) <= tolerance * np.linalg.norm(other)


BF16 = config.ComputeDtype.BFLOAT16


@pytest.mark.parametrize(
  ("changes", "engine", "why", "tolerance"),
  [
    ({}, config.Engine.BOOKKEEPING, "take their places", 1e-5),
    ({"remat": True}, config.Engine.GHOST, "computed again", 1e-5),
    # 16 tokens of 3 rows against 3 copies of wider weights, and the reverse.
    pytest.param(
      {"remat": True, "compute_dtype": BF16, "mlp_dim": 200},
      config.Engine.BOOKKEEPING,
      "lower precision",
      2e-2,
      marks=pytest.mark.slow,
    ),
    pytest.param(
      {"compute_dtype": BF16},
      config.Engine.BOOKKEEPING,
      "places",
      2e-2,
      marks=pytest.mark.slow,
    ),
  ],
)
def test_the_choice_follows_the_model(changes, engine, why, tolerance):
  choice, sums = choice_and_results(*case(**changes))
  assert choice.engine is engine
  assert why in choice.why
  assert_same(*sums, tolerance=tolerance)
  # Fails if: rematerialisation inside the layers' scan is not seen, or AUTO
  # computes with another engine than it names.


def test_long_examples_of_small_rematerialised_weights_go_to_vmap():
  def loss_fn(params, batch, ops=param_ops.PLAIN):
    @jax.checkpoint
    def layer(x):
      for _ in range(3):
        x = jnp.tanh(ops.dense("w", params["w"], x.astype(jnp.bfloat16)))
      return x

    return jnp.sum(layer(batch).astype(jnp.float32), axis=(1, 2))

  params = {"w": jnp.eye(4, dtype=jnp.bfloat16)}
  batch = jax.random.normal(jax.random.key(0), (3, 50, 4))
  choice, sums = choice_and_results(loss_fn, params, batch)
  # Small gradients are kept as such, the same by both: there is no less.
  assert choice.engine is VMAP
  assert "lower precision" in choice.why
  assert_same(*sums, tolerance=2e-2)


def test_what_has_no_rule_goes_to_vmap_and_the_reason_names_it():
  def loss_fn(params, batch, ops=param_ops.PLAIN):
    return ops.dense("w", params["w"] ** 2, batch)[:, 0]

  choice, sums = choice_and_results(
    loss_fn, {"w": jnp.ones((3, 2))}, jnp.ones((5, 3))
  )
  assert choice.engine is VMAP
  assert "core.param_ops" in choice.why
  assert_same(*sums)

  choice, sums = choice_and_results(
    lambda params, batch: batch @ params, jnp.ones(3), jnp.ones((5, 3))
  )
  assert choice.engine is VMAP
  assert "ops" in choice.why
  assert_same(*sums)


def test_a_named_engine_is_not_second_guessed():
  loss_fn, params, batch = case(remat=True)
  fn = clipping.clipped_grad(loss_fn, l2_clip_norm=1.0, engine=VMAP)
  choice = fn.engine_choice(params, batch)
  assert choice.engine is VMAP
  assert "configuration" in choice.why
