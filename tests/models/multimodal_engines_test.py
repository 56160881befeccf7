"""Every clipping engine gives the same sum on a multimodal model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppnet import config as config_lib
from ppnet.core import param_ops, trees
from ppnet.models import lora, multimodal
from ppnet.privacy import clipping
from ppnet.train import losses, step
from tests import tiny
from tests.models import spans_test

# Adapters alone in the decoder; or nothing at all in it.
_IS_TRAINED = {
  "all": lambda name: True,
  "adapters": lambda name: (
    lora.is_adapter(name) or not name.startswith("decoder/")
  ),
  "stems": lambda name: not name.startswith("decoder/"),
}


def batch_of(*, has_media):
  tokens = jnp.concatenate([spans_test.TOKENS, spans_test.TOKENS[::-1]])
  microbatch = {
    "tokens": tokens,
    "targets": jnp.roll(tokens, -1, axis=1),
    "loss_mask": jnp.ones(tokens.shape),
    "index": jnp.arange(4) + 5,
    "is_padding_example": jnp.zeros(4, bool),
  }
  if has_media:
    rng = np.random.default_rng(3)
    microbatch |= {
      name: jnp.asarray(rng.normal(size=(4, *values.shape[1:])), jnp.float32)
      for name, values in spans_test.media().items()
    }
  return step.grad_batch(microbatch, jax.random.key(8), jnp.int32(2))


def assert_engines_agree(loss_fn, params, frozen, batch, *, clip):
  """GHOST's and BOOKKEEPING's norms and sums are VMAP's."""

  def run(engine):
    def call(params, frozen, batch):
      fn = clipping.clipped_grad(
        lora.with_frozen(loss_fn, frozen),
        l2_clip_norm=clip,
        engine=engine,
        has_aux=True,
      )
      return fn(params, batch)

    return spans_test.jit(call)(params, frozen, batch)

  reference = run(config_lib.Engine.VMAP)
  assert reference.grad_norms.max() > clip  # Something is clipped.
  assert not np.any(reference.is_nonfinite)
  for engine in (config_lib.Engine.GHOST, config_lib.Engine.BOOKKEEPING):
    result = run(engine)
    np.testing.assert_allclose(
      result.grad_norms, reference.grad_norms, rtol=1e-4, err_msg=engine.name
    )
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-4),
      result.grad_sum,
      reference.grad_sum,
    )


@pytest.mark.parametrize(
  "patches",
  [
    pytest.param(None, id="cnn"),
    pytest.param(spans_test.PATCHES, id="patches", marks=pytest.mark.slow),
  ],
)
def test_engines_agree_on_many_pictures_with_dropout(patches):
  model = spans_test.model_of(patches=patches, dropout=0.4)
  batch = batch_of(has_media=True)

  def loss_fn(params, batch, ops=param_ops.PLAIN):  # The decoder left out.
    out = model.clone(ops=ops).apply(
      {"params": params},
      batch["tokens"],
      losses.media(batch),
      dropout_keys=batch["dropout_key"],
      method="embed",
    )
    weights = jnp.arange(out[0].size).reshape(1, *out.shape[1:]) % 7 - 3.0
    return (out * weights).sum(axis=(1, 2)), {}

  params, _ = lora.partition(
    spans_test.init(model), lora.matches(["stems.*", ".*token_embed/table"])
  )
  assert_engines_agree(loss_fn, params, {}, batch, clip=20.0)
  # Fails if: a rule takes the pictures of a record for examples, or an engine
  # drops other modalities than the next one.


@pytest.mark.slow
@pytest.mark.parametrize(
  ("patches", "trained", "has_media"),
  [
    (spans_test.PATCHES, "all", True),
    (None, "all", True),
    (spans_test.PATCHES, "all", False),
    (spans_test.PATCHES, "adapters", True),
    (None, "stems", True),
  ],
)
def test_engines_agree_on_the_network(patches, trained, has_media):
  model = spans_test.model_of(patches=patches, dropout=0.4)
  if trained == "adapters":
    decoder = dataclasses.replace(
      model.config.decoder, lora=config_lib.LoraConfig(rank=2)
    )
    model = multimodal.PPNet(
      dataclasses.replace(model.config, decoder=decoder), model.placeholder_ids
    )
  params, frozen = lora.partition(
    spans_test.init(model), _IS_TRAINED[trained], frozen_dtype=jnp.bfloat16
  )
  loss_fn = losses.make_loss_fn(model, tiny.experiment().attention_noise)
  assert_engines_agree(
    loss_fn, params, frozen, batch_of(has_media=has_media), clip=0.5
  )


@pytest.mark.slow
def test_the_reference_is_each_example_alone():
  model = spans_test.model_of(dropout=0.4)
  params, batch = spans_test.init(model), batch_of(has_media=True)
  loss_fn = losses.make_loss_fn(model, tiny.experiment().attention_noise)
  clip = 0.5
  fn = clipping.clipped_grad(loss_fn, l2_clip_norm=clip, has_aux=True)
  result = spans_test.jit(fn)(params, batch)
  grad_fn = spans_test.jit(
    jax.grad(lambda params, one: loss_fn(params, one)[0][0])
  )
  expected = jax.tree.map(jnp.zeros_like, params)
  for row in range(4):
    one = jax.tree.map(lambda x, r=row: x[r : r + 1], batch)
    grad = grad_fn(params, one)
    norm = float(jnp.sqrt(trees.vdot(grad, grad)))
    np.testing.assert_allclose(result.grad_norms[row], norm, rtol=1e-4)
    scale = min(1.0, clip / norm)
    expected = jax.tree.map(lambda s, g, c=scale: s + c * g, expected, grad)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-4),
    result.grad_sum,
    expected,
  )
