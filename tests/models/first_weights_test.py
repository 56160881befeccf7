"""First weights: which are zero, what heads look at; both can learn."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppnet import config as config_lib
from ppnet import model_config
from ppnet.models import llama
from tests import tiny
from tests.models.llama_test import SMALL, TOKENS, build, jit

ALL_ZERO = dataclasses.replace(SMALL, zero_init=model_config.ZEROABLE)
LOOKING = config_lib.LlamaConfig(
  vocab_size=13,
  embed_dim=64,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=16,
  mlp_dim=10,
  max_seq_len=40,
  rope_theta=2.0,
  zero_init=("o_proj", "down_proj"),
  look_back=80.0,
)


def grads(model, params):
  def loss(params):
    logits = model.apply({"params": params}, TOKENS)
    log_probs = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.take_along_axis(log_probs, TOKENS[:, 1:, None], axis=2).mean()

  return jit(jax.grad(loss))(params)


def named(params):
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }


def test_zeros_stand_where_they_are_named_and_the_rest_stays():
  config = dataclasses.replace(SMALL, zero_init=("lm_head", "down_proj"))
  plain, found = named(build()[1]), named(build(config)[1])
  assert plain.keys() == found.keys()
  zero = {"lm_head/kernel", "layers/mlp/down_proj/kernel"}
  for name, leaf in found.items():
    expected = np.zeros_like(leaf) if name in zero else plain[name]
    np.testing.assert_array_equal(leaf, expected, err_msg=name)
  # Fails if: a zeroed matrix moves what is drawn for the others.


def test_a_head_of_zeros_says_that_all_tokens_are_equally_likely():
  model, params = build(ALL_ZERO)
  logits = jit(model.apply)({"params": params}, TOKENS)
  np.testing.assert_array_equal(logits, np.zeros((*TOKENS.shape, 13)))


def test_everything_has_a_gradient_after_two_steps():
  model, params = build(ALL_ZERO)
  first = grads(model, params)
  moved = {name for name, leaf in named(first).items() if np.any(leaf)}
  assert moved == {"lm_head/kernel"}
  for _ in range(2):
    params = jax.tree.map(
      lambda p, g: p - 0.1 * g, params, grads(model, params)
    )
  for name, leaf in named(grads(model, params)).items():
    assert np.any(leaf), name
  # Fails if: two factors of one product begin at zero, such as o_proj and
  # v_proj.


def attention_maps(config, params):
  """Weights [L, B, N, T, S] over random tokens."""
  tokens = jax.random.randint(jax.random.key(1), (2, 40), 0, 13)
  model = llama.Llama(config)

  def apply(params):
    return model.apply({"params": params}, tokens, mutable=[llama.MAPS])

  (maps,) = jax.tree.leaves(jit(apply)(params)[1][llama.MAPS])
  return maps


def test_scores_follow_their_formula():
  params = build(LOOKING)[1]
  # Embeddings of one norm, whose first feature is the same after the norm.
  table = params["token_embed"]["table"]
  rest = table[:, 1:] / np.linalg.norm(table[:, 1:], axis=1, keepdims=True)
  table = jnp.concatenate([table[:, :1], rest * 63**0.5], axis=1)
  maps = attention_maps(LOOKING, params | {"token_embed": {"table": table}})
  frequency = 2.0 ** (-np.arange(8) / 8)
  distance = np.arange(40)[:, None] - np.arange(40)  # [T, S]
  is_later = distance < 0
  first_squared = 16 * 64 / (16 + 63)
  for head in range(4):
    turned = (distance - head - 1)[..., None] * frequency
    scores = 80 * first_squared / (64 / 5) * np.cos(turned).mean(axis=-1)
    weights = np.exp(np.where(is_later, -np.inf, scores))
    weights /= weights.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(
      maps[:, :, head], np.broadcast_to(weights, (2, 2, 40, 40)), atol=1e-4
    )
  # Fails if: queries are turned the other way, or keys with them; if heads
  # share their distance, or grouped keys theirs.


def test_each_head_begins_at_its_own_token_back():
  maps = attention_maps(LOOKING, build(LOOKING)[1])
  for head in range(4):
    back = head + 1
    own = np.diagonal(maps[:, :, head], offset=-back, axis1=2, axis2=3)
    assert own.shape == (2, 2, 40 - back)
    assert own.min() > 0.9  # Whatever the tokens.


def test_the_score_at_its_place_is_what_was_asked_for():
  model, params = build(LOOKING)
  del model
  attention = params["layers"]["attention"]
  query = attention["q_proj"]["kernel"][0].reshape(64, 4, 16)
  key = attention["k_proj"]["kernel"][0].reshape(64, 2, 16)
  assert not np.any(query[1:])
  assert not np.any(key[1:])
  # |q| |k| / sqrt(H) of vectors that point the same way, for a first feature
  # of sqrt(D / 5).
  height = (
    np.linalg.norm(query[0], axis=-1)[:, None]
    * np.linalg.norm(key[0], axis=-1)
    * (64 / 5)
    / 4
  )
  np.testing.assert_allclose(height, 80.0, rtol=1e-5)
  np.testing.assert_array_equal(params["token_embed"]["table"][:, 0], 4.0)


@pytest.mark.parametrize(
  ("field", "value", "beside", "message"),
  [
    ("zero_init", ("q_proj",), {}, "zero_init among .*q_proj"),
    (
      "zero_init",
      ("lm_head",),
      {"tie_embeddings": True},
      "no lm_head where tie_embeddings",
    ),
    ("look_back", -1.0, {}, "look_back >= 0"),
    (
      "look_back",
      1.0,
      {"lora": config_lib.LoraConfig()},
      "no model.decoder.lora beside",
    ),
  ],
)
def test_what_cannot_be_is_refused(field, value, beside, message):
  config = tiny.experiment()
  config.model.decoder = dataclasses.replace(
    config.model.decoder, **{field: value}, **beside
  )
  with pytest.raises(ValueError, match=message):
    config_lib.validate(config)


def test_loaded_weights_leave_nothing_to_begin_with():
  config = tiny.experiment()
  config.model.decoder_weights = "weights"
  config.model.decoder.zero_init = ("lm_head",)
  with pytest.raises(ValueError, match=r"no model.decoder_weights beside"):
    config_lib.validate(config)
