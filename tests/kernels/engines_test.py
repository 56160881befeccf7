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
from ppnet.sharding import layout
from ppnet.sharding import mesh as mesh_lib
from ppnet.sharding import rules as rules_lib

TPU = config.AttentionImplementation.TPU
GPU = config.AttentionImplementation.GPU
REFERENCE = config.AttentionImplementation.REFERENCE
MESH = (2, 2, 2)
FAST = {"xla_backend_optimization_level": 0}


def clipped_sum(attention, engine, axes=None):
  """Clipped sum and norms of a small decoder with noise in its second layer.

  On a mesh if there are axes, laid out and traced as the trainer does it. Each
  device has one example then: left to itself, jaxlib 0.10.2 swaps those of two
  devices between attention and the rest, under book-keeping.
  """
  model = llama.Llama(
    config.LlamaConfig(
      vocab_size=14,
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
  tokens = jax.random.randint(jax.random.key(1), (4, 5), 0, 13)
  boxed = model.init(jax.random.key(0), tokens)["params"]
  params = nn.meta.unbox(boxed)
  batch = {"tokens": tokens, "key": jax.random.split(jax.random.key(2), 4)}

  def loss_fn(params, batch, ops=param_ops.PLAIN):
    noise = noisy_attention.AttentionNoise(
      key=batch["key"], stddev=jnp.float32(0.7)
    )
    logits = model.clone(ops=ops).apply(
      {"params": params}, batch["tokens"], noise=noise
    )
    return -jax.nn.log_softmax(logits)[..., 3].mean(axis=1)

  fn = clipping.clipped_grad(loss_fn, l2_clip_norm=0.5, engine=engine)
  if axes is not None:
    mesh = mesh_lib.build(
      config.MeshConfig(
        **dict(zip(("data", "fsdp", "tensor"), axes, strict=True))
      )
    )
    rules = rules_lib.Rules()
    param_shardings = rules.param_shardings(mesh, boxed)
    params = jax.device_put(params, param_shardings)
    batch = jax.device_put(batch, rules.batch_sharding(mesh))
    fn = layout.within(mesh, rules, fn, param_shardings=param_shardings)
  out = jax.jit(fn, compiler_options=FAST)(params, batch)
  leaves = [np.ravel(leaf) for leaf in jax.tree.leaves(out.grad_sum)]
  return np.concatenate(leaves), np.asarray(out.grad_norms)


expected = functools.cache(lambda: clipped_sum(REFERENCE, config.Engine.VMAP))


@pytest.mark.parametrize(
  ("attention", "engine", "axes"),
  [
    (GPU, config.Engine.VMAP, MESH),
    (GPU, config.Engine.BOOKKEEPING, MESH),
    *(
      pytest.param(attention, engine, axes, marks=pytest.mark.slow)
      for attention in (TPU, GPU)
      for engine in (
        config.Engine.VMAP,
        config.Engine.GHOST,
        config.Engine.BOOKKEEPING,
      )
      for axes in (None, MESH)
    ),
  ],
)
def test_engines_with_kernels_match_the_reference(attention, engine, axes):
  total, norms = clipped_sum(attention, engine, axes)
  reference_total, reference_norms = expected()
  np.testing.assert_allclose(total, reference_total, atol=1e-6)
  np.testing.assert_allclose(norms, reference_norms, rtol=1e-5)
  # Fails if: activations are traced without the rules' constraints.
