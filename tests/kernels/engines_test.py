"""The kernels inside a model, under every clipping engine."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppnet import config
from ppnet.core import param_ops
from ppnet.kernels import noisy_attention
from ppnet.models import llama
from ppnet.privacy import clipping

TPU = config.AttentionImplementation.TPU
GPU = config.AttentionImplementation.GPU
REFERENCE = config.AttentionImplementation.REFERENCE
FAST = {"xla_backend_optimization_level": 0}


def clipped_sum(attention, engine):
  """Clipped sum and norms of a small decoder with noise in its second layer."""
  model = llama.Llama(
    config.LlamaConfig(
      vocab_size=13,
      embed_dim=12,
      num_layers=2,
      num_heads=2,
      num_kv_heads=1,
      head_dim=6,
      mlp_dim=10,
      max_seq_len=8,
      remat=True,
      attention=attention,
      noise_layers=(1,),
    )
  )
  tokens = jax.random.randint(jax.random.key(1), (3, 5), 0, 13)
  params = nn.meta.unbox(model.init(jax.random.key(0), tokens)["params"])
  batch = {"tokens": tokens, "key": jax.random.split(jax.random.key(2), 3)}

  def loss_fn(params, batch, ops=param_ops.PLAIN):
    noise = noisy_attention.AttentionNoise(
      key=batch["key"], stddev=jnp.float32(0.7)
    )
    logits = model.clone(ops=ops).apply(
      {"params": params}, batch["tokens"], noise=noise
    )
    return -jax.nn.log_softmax(logits)[..., 3].mean(axis=1)

  fn = clipping.clipped_grad(loss_fn, l2_clip_norm=0.5, engine=engine)
  out = jax.jit(fn, compiler_options=FAST)(params, batch)
  leaves = [np.ravel(leaf) for leaf in jax.tree.leaves(out.grad_sum)]
  return np.concatenate(leaves), np.asarray(out.grad_norms)


expected = functools.cache(lambda: clipped_sum(REFERENCE, config.Engine.VMAP))


@pytest.mark.parametrize(
  ("attention", "engine"),
  [
    (TPU, config.Engine.GHOST),
    (GPU, config.Engine.VMAP),
    pytest.param(TPU, config.Engine.VMAP, marks=pytest.mark.slow),
    pytest.param(TPU, config.Engine.BOOKKEEPING, marks=pytest.mark.slow),
    pytest.param(GPU, config.Engine.GHOST, marks=pytest.mark.slow),
    pytest.param(GPU, config.Engine.BOOKKEEPING, marks=pytest.mark.slow),
  ],
)
def test_engines_with_kernels_match_the_reference(attention, engine):
  total, norms = clipped_sum(attention, engine)
  reference_total, reference_norms = expected()
  np.testing.assert_allclose(total, reference_total, atol=1e-6)
  np.testing.assert_allclose(norms, reference_norms, rtol=1e-5)
