"""The PyTorch Llama and ours are one model; run with -m peers."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppnet import config as config_lib
from ppnet.bench import engines, torch_llama
from ppnet.models import llama
from ppnet.privacy import clipping
from tests.core import hlo_test

DECODER = config_lib.LlamaConfig(
  vocab_size=23,
  embed_dim=12,
  num_layers=3,
  num_heads=2,
  num_kv_heads=2,
  head_dim=10,
  mlp_dim=20,
  max_seq_len=9,
)


@pytest.fixture(scope="module")
def subject():
  shape = engines.Shape(decoder=DECODER, batch_size=6, num_tokens=9)
  case = engines.Case(name="test", shape=shape)
  made = engines._llama_subject(case, shape, 3)
  # Initial scales are 1: a norm that forgets its scale would pass.
  keys = iter(jax.random.split(jax.random.key(1), 100))
  params = jax.tree.map(
    lambda leaf: leaf + 0.3 * jax.random.normal(next(keys), leaf.shape),
    made.params,
  )
  return made, params


def leaves_of(tree):
  flat, structure = jax.tree.flatten(tree)
  return structure, [np.asarray(leaf) for leaf in flat]


def distance(tree, other):
  structure, a = leaves_of(tree)
  other_structure, b = leaves_of(other)
  assert structure == other_structure
  return max(
    np.abs(x - y).max() / np.abs(y).max() for x, y in zip(a, b, strict=True)
  )


@pytest.mark.peers
@pytest.mark.parametrize("microbatch_size", [None, 4])
def test_losses_and_gradients_are_ours(subject, microbatch_size):
  made, params = subject
  grad_fn = clipping.unprotected_grad(
    made.loss_fn, clipping=config_lib.Clipping.NONE, l2_clip_norm=1.0
  )
  expected = grad_fn(params, made.batch)
  model = torch_llama.build(DECODER, params)
  grads, losses = torch_llama.plain_step(
    model, torch_llama.microbatches_of(made.batch, microbatch_size)
  )()
  np.testing.assert_allclose(losses.numpy(), expected.losses, rtol=1e-5)
  sums = torch_llama.to_ours(DECODER, {n: g.numpy() for n, g in grads.items()})
  assert distance(sums, expected.grad_sum) < 1e-4
  # Fails if: a position, mask, norm, gate or transposition is another one.


@pytest.mark.peers
@pytest.mark.parametrize("microbatch_size", [None, 4])
@pytest.mark.parametrize(
  "make_step", [torch_llama.hooks_step, torch_llama.ghost_step]
)
def test_opacus_clips_the_same_sum(subject, make_step, microbatch_size):
  made, params = subject
  own = clipping.clipped_grad(made.loss_fn, l2_clip_norm=0.5)
  expected = own(params, made.batch)
  assert (expected.grad_norms > 0.5).any()
  step = make_step(
    torch_llama.build(DECODER, params),
    torch_llama.microbatches_of(made.batch, microbatch_size),
    l2_clip_norm=0.5,
  )
  step()
  grads, losses = step()  # Nothing is left over from the first one.
  np.testing.assert_allclose(losses.numpy(), expected.losses, rtol=1e-5)
  sums = torch_llama.to_ours(DECODER, {n: g.numpy() for n, g in grads.items()})
  assert distance(sums, expected.grad_sum) < 1e-4


@pytest.mark.peers
def test_memory_and_flops_of_a_step(subject):
  made, params = subject
  microbatches = torch_llama.microbatches_of(made.batch, None)
  program = torch_llama.program(
    torch_llama.plain_step(torch_llama.build(DECODER, params), microbatches)
  )
  by_hand = hlo_test.llama_flops(DECODER, 6, 9)
  # Attention's backward computes the scores once more.
  by_hand += 2 * DECODER.num_layers * 6 * 9 * 9 * 20
  assert program.flops == (by_hand, by_hand)
  # At the least the logits' gradient; at the most all activations of a layer,
  # of which there are fewer than 16 sizes of the mlp.
  logits_bytes = 4 * 6 * 9 * DECODER.vocab_size
  assert logits_bytes <= program.memory_bytes
  assert program.memory_bytes < 4 * 6 * 9 * (16 * 20) * DECODER.num_layers
  hooks = torch_llama.program(
    torch_llama.hooks_step(
      torch_llama.build(DECODER, params), microbatches, l2_clip_norm=1.0
    )
  )
  num_parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
  assert hooks.memory_bytes > 4 * 6 * num_parameters  # Of each example.


@pytest.mark.peers
def test_memory_is_the_most_at_one_time_less_the_result():
  import torch

  def step():
    for _ in range(3):
      held = torch.ones(1000, 1000)
      del held  # Three times the same four million bytes.
    return {"sum": torch.ones(500, 1000)}, None

  memory_bytes = torch_llama.program(step).memory_bytes
  # The result is made when nothing else is left.
  assert 4_000_000 - 2_000_000 <= memory_bytes < 2_010_000


def test_to_ours_undoes_the_copy():
  model = llama.Llama(DECODER)
  tokens = jnp.zeros((1, 9), jnp.int32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda leaf: rng.normal(size=leaf.shape).astype(np.float32),
    nn.meta.unbox(shapes),
  )
  flat = torch_llama._from_ours(DECODER, params)
  assert flat["layers.2.down_proj.weight"].shape == (12, 20)
  assert flat["lm_head.weight"].shape == (23, 12)
  np.testing.assert_array_equal(
    flat["layers.1.q_proj.weight"],
    params["layers"]["attention"]["q_proj"]["kernel"][1].T,
  )
  back = torch_llama.to_ours(DECODER, flat)
  jax.tree.map(np.testing.assert_array_equal, back, params)


@pytest.mark.parametrize(
  ("changes", "reason"),
  [
    ({"num_kv_heads": 1}, "grouped keys"),
    ({"tie_embeddings": True}, "tied embeddings"),
    ({"remat": True}, "remat"),
    ({"compute_dtype": config_lib.ComputeDtype.BFLOAT16}, "float32"),
  ],
)
def test_a_model_without_an_equal_is_refused(changes, reason):
  other = dataclasses.replace(DECODER, **changes)
  assert reason in torch_llama.why_not(other)
  with pytest.raises(ValueError, match=reason):
    torch_llama.build(other, {})


def test_a_llama_has_an_equal():
  assert torch_llama.why_not(DECODER) == ""
  assert "no equal" in torch_llama.why_not(None)
