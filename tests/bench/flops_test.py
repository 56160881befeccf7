"""FLOPs read from compiled programs are those that one counts by hand."""

import jax
import jax.numpy as jnp
import pytest

from ppnet import config as config_lib
from ppnet.bench import flops
from ppnet.models import llama
from ppnet.privacy import clipping

LLAMA = config_lib.LlamaConfig(
  vocab_size=29,
  embed_dim=12,
  num_layers=5,
  num_heads=3,
  num_kv_heads=3,
  head_dim=6,
  mlp_dim=20,
  max_seq_len=7,
)
BATCH_SIZE, NUM_TOKENS = 6, 7


def llama_flops(cfg, batch_size, num_tokens):
  """Three times the forward products: an input's and a weight's gradient."""
  width = cfg.num_heads * cfg.head_dim
  weights = cfg.num_layers * (
    4 * cfg.embed_dim * width + 3 * cfg.embed_dim * cfg.mlp_dim
  )
  weights += cfg.embed_dim * cfg.vocab_size
  scores = cfg.num_layers * 2 * num_tokens * num_tokens * width
  return 3 * 2 * batch_size * (num_tokens * weights + scores)


def compiled_text(fn, *args):
  options = {"xla_backend_optimization_level": 0}
  return jax.jit(fn, compiler_options=options).lower(*args).compile().as_text()


@pytest.mark.parametrize("microbatch_size", [None, 2])
def test_a_llama_s_gradient_takes_what_one_counts_by_hand(microbatch_size):
  model = llama.Llama(LLAMA)
  tokens = jnp.zeros((BATCH_SIZE, NUM_TOKENS), jnp.int32)
  params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
  params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), params)

  def loss_fn(params, batch):
    logits = model.apply({"params": params}, batch)
    return jax.nn.logsumexp(logits, axis=-1).sum(axis=-1)

  grad_fn = clipping.unprotected_grad(
    loss_fn,
    clipping=config_lib.Clipping.NONE,
    l2_clip_norm=1.0,
    microbatch_size=microbatch_size,
  )
  text = compiled_text(lambda p, b: grad_fn(p, b).grad_sum, params, tokens)
  expected = llama_flops(LLAMA, BATCH_SIZE, NUM_TOKENS)
  assert flops.matmul_flops(text) == (expected, expected)
  # Fails if: a loop, or a loop within a loop, counts once.


def test_xla_s_own_count_takes_a_loop_for_one_turn():
  """Why this is not `cost_analysis`; remove the parser when this fails."""
  weights = jnp.ones((10, 8, 8))

  def fn(weights, x):
    return jax.lax.scan(lambda x, w: (x @ w, None), x, weights)[0]

  compiled = jax.jit(fn).lower(weights, jnp.ones((4, 8))).compile()
  one = 2 * 4 * 8 * 8
  assert flops.matmul_flops(compiled.as_text()) == (10 * one, 10 * one)
  assert compiled.cost_analysis()["flops"] < 2 * one


def test_a_conditional_has_a_cheapest_and_a_dearest_branch():
  def fn(flag, x, w):
    return jax.lax.cond(flag, lambda: x @ w @ w.T, lambda: 2 * x) @ w

  text = compiled_text(fn, True, jnp.ones((4, 8)), jnp.ones((8, 6)))
  one = 2 * 4 * 8 * 6
  assert flops.matmul_flops(text) == (one, 3 * one)


def test_a_loop_of_unknown_length_is_refused():
  def fn(x, w):
    return jax.lax.while_loop(lambda x: x.sum() < 9.0, lambda x: x @ w, x)

  text = compiled_text(fn, jnp.ones((4, 8)), jnp.ones((8, 8)))
  with pytest.raises(ValueError, match="known length"):
    flops.matmul_flops(text)


MODULE = """
ENTRY %main (a: bf16[2,3], b: bf16[3,5]) -> bf16[2,5] {{
  %a = bf16[2,3]{{1,0}} parameter(0)
  %b = bf16[3,5]{{1,0}} parameter(1)
  {}
}}
"""


def test_cublas_calls_count_by_their_dimensions():
  line = (
    "ROOT %gemm = (bf16[2,5]{1,0}, s8[4096]{0}) custom-call(%a, %b),"
    ' custom_call_target="__cublas$gemm", backend_config={'
    '"gemm_backend_config":{"dot_dimension_numbers":{'
    '"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}'
  )
  assert flops.matmul_flops(MODULE.format(line)) == (60, 60)


@pytest.mark.parametrize(
  "line",
  [
    'ROOT %r = bf16[2,5]{1,0} custom-call(%a), custom_call_target="x$matmul"',
    "ROOT %r = bf16[2,5]{1,0} convolution(%a, %b), dim_labels=bf_io->bf",
    "ROOT %r = bf16[2,5]{1,0} dot(%a, %b)",
  ],
)
def test_what_cannot_be_counted_is_refused(line):
  with pytest.raises(ValueError, match="Expected"):
    flops.matmul_flops(MODULE.format(line))


def test_other_calls_count_nothing():
  line = 'ROOT %r = bf16[2,5]{1,0} custom-call(%a), custom_call_target="TopK"'
  assert flops.matmul_flops(MODULE.format(line)) == (0, 0)


def test_text_without_a_program_is_refused():
  with pytest.raises(ValueError, match="ENTRY"):
    flops.matmul_flops("")
