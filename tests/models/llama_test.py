"""The decoder is Llama: its sizes, its causality, its positions."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppnet import config as config_lib
from ppnet import presets
from ppnet.core import trees
from ppnet.kernels import noisy_attention
from ppnet.models import layers, llama

SMALL = config_lib.LlamaConfig(
  vocab_size=13,
  embed_dim=8,
  num_layers=3,
  num_heads=4,
  num_kv_heads=2,
  head_dim=6,
  mlp_dim=10,
  max_seq_len=7,
)
TOKENS = jnp.array([[1, 5, 5, 2, 9], [3, 4, 0, 12, 7]], jnp.int32)
# Compiling is what these tests cost.
jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


def build(config=SMALL, seed=0):
  model = llama.Llama(config)
  variables = jit(model.init)(jax.random.key(seed), TOKENS)
  return model, nn.meta.unbox(variables["params"])


def noise(stddev=0.5):
  return noisy_attention.AttentionNoise(
    key=jax.random.split(jax.random.key(9), len(TOKENS)), stddev=stddev
  )


# Of the shapes in the published config.json of each model, whose page at
# huggingface.co is named beside it; pages and papers give rounded numbers.
PUBLISHED = {
  presets.llama_7b: 6_738_415_616,  # huggyllama/llama-7b
  presets.llama2_7b: 6_738_415_616,  # meta-llama/Llama-2-7b-hf
  presets.llama2_13b: 13_015_864_320,  # meta-llama/Llama-2-13b-hf
  presets.llama3_8b: 8_030_261_248,  # meta-llama/Meta-Llama-3-8B
  presets.llama32_1b: 1_235_814_400,  # meta-llama/Llama-3.2-1B
  presets.tinyllama_1b: 1_100_048_384,  # TinyLlama/TinyLlama-1.1B
}


@pytest.mark.parametrize(
  "preset", PUBLISHED, ids=lambda preset: preset.__name__
)
def test_a_preset_has_the_published_number_of_parameters(preset):
  model = llama.Llama(preset())
  shapes = jax.eval_shape(
    lambda key: model.init(key, TOKENS), jax.eval_shape(jax.random.key, 0)
  )
  assert trees.num_parameters(shapes["params"]) == PUBLISHED[preset]
  for path, leaf in jax.tree_util.tree_leaves_with_path(
    shapes["params"], is_leaf=lambda leaf: hasattr(leaf, "names")
  ):
    assert isinstance(leaf, nn.LogicallyPartitioned), path
    assert len(leaf.names) == leaf.value.ndim, path
  # Fails if: a shape is off, or a parameter has no logical axes.


def test_grouped_heads_and_scaled_positions_have_their_published_shapes():
  model = llama.Llama(presets.llama32_1b())
  shapes = nn.meta.unbox(
    jax.eval_shape(
      lambda key: model.init(key, TOKENS), jax.eval_shape(jax.random.key, 0)
    )["params"]
  )
  attention = shapes["layers"]["attention"]
  assert attention["k_proj"]["kernel"].shape == (16, 2048, 8 * 64)
  assert attention["q_proj"]["kernel"].shape == (16, 2048, 32 * 64)
  assert "lm_head" not in shapes


def test_scaled_rotary_frequencies_are_kept_blended_or_divided():
  scaling = config_lib.RopeScalingConfig(factor=32.0)
  plain = layers.rotary_frequencies(64, theta=500000.0)
  scaled = layers.rotary_frequencies(64, theta=500000.0, scaling=scaling)
  wavelength = 2 * np.pi / plain.astype(np.float64)
  fast, slow = wavelength < 8192 / 4, wavelength > 8192
  assert fast.sum() > 5
  assert slow.sum() > 5
  assert (~fast & ~slow).sum() >= 2  # All three cases occur.
  np.testing.assert_array_equal(scaled[fast], plain[fast])
  np.testing.assert_allclose(scaled[slow], plain[slow] / 32, rtol=1e-6)
  for between in np.flatnonzero(~fast & ~slow):
    smooth = (8192 / wavelength[between] - 1) / (4 - 1)
    expected = plain[between] * (smooth + (1 - smooth) / 32)
    assert scaled[between] == pytest.approx(expected, rel=1e-6)


def test_extending_a_cache_gives_the_logits_of_the_whole():
  """A prompt in one piece, then one token at a time, at different positions."""
  model, params = build()
  whole = jit(model.apply)({"params": params}, TOKENS)
  lengths = np.array([3, 1])  # Of the two prompts, padded to 3.

  def run(method, *args, **kwargs):
    call = functools.partial(model.apply, method=method)
    return jit(call)({"params": params}, *args, **kwargs)

  embeddings = run("embed", TOKENS)
  hidden, fresh = run(
    "extend",
    embeddings[:, :3],
    positions=jnp.arange(3)[None],
    cache=llama.empty_cache(SMALL, batch_size=2),
  )
  cache = jax.tree.map(
    lambda x: jnp.pad(
      x, ((0, 0), (0, 0), (0, 4), (0, 0), (0, 0)), constant_values=1e3
    ),
    fresh,
  )
  logits = run("logits", hidden)
  for row, length in enumerate(lengths):
    np.testing.assert_allclose(
      logits[row, :length], whole[row, :length], atol=1e-5
    )
  extend = jit(
    lambda x, at, cache: model.apply(
      {"params": params}, x, positions=at, cache=cache, method="extend"
    )
  )
  insert = jit(jax.vmap(llama.KVCache.insert, in_axes=(0, 0, None)))
  for offset in range(2):
    at = jnp.asarray(lengths + offset)[:, None]
    hidden, fresh = extend(
      jnp.take_along_axis(embeddings, at[..., None], axis=1), at, cache
    )
    logits = run("logits", hidden)
    expected = jnp.take_along_axis(whole, at[..., None], axis=1)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    cache = insert(cache, fresh, at)
  # Fails if: a slot beyond a query is read, or a token lands in another slot.


def test_logits_match_a_decoder_written_out_in_numpy():
  """Touvron et al. 2023 by hand, one example and one layer at a time."""
  model, params = build()
  got = jit(model.apply)({"params": params}, TOKENS)
  weights = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  for tokens, logits in zip(TOKENS, np.asarray(got), strict=True):
    np.testing.assert_allclose(
      logits, _numpy_llama(weights, np.asarray(tokens), SMALL), atol=2e-5
    )


def _rms(x, scale, eps):
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def _rotate(x, theta):  # [T, heads, H]
  half = x.shape[-1] // 2
  out = np.zeros_like(x)
  for t in range(x.shape[0]):
    for i in range(half):
      angle = t * theta ** (-2 * i / x.shape[-1])
      a, b = x[t, :, i], x[t, :, i + half]
      out[t, :, i] = a * np.cos(angle) - b * np.sin(angle)
      out[t, :, i + half] = b * np.cos(angle) + a * np.sin(angle)
  return out


def _numpy_llama(weights, tokens, config):
  x = weights["token_embed"]["table"][tokens]
  num_tokens, heads = len(tokens), config.num_heads
  for i in range(config.num_layers):
    layer = jax.tree.map(lambda leaf, i=i: leaf[i], weights["layers"])
    attention = layer["attention"]
    h = _rms(x, layer["attention_norm"]["scale"], config.rms_norm_eps)

    def project(name, count, h=h, attention=attention):
      out = h @ attention[name]["kernel"]
      return out.reshape(num_tokens, count, config.head_dim)

    q = _rotate(project("q_proj", heads), config.rope_theta)
    k = _rotate(project("k_proj", config.num_kv_heads), config.rope_theta)
    v = project("v_proj", config.num_kv_heads)
    mixed = np.zeros((num_tokens, heads, config.head_dim))
    for n in range(heads):
      kv = n // (heads // config.num_kv_heads)
      for t in range(num_tokens):
        score = k[: t + 1, kv] @ q[t, n] / config.head_dim**0.5
        weight = np.exp(score - score.max())
        mixed[t, n] = weight / weight.sum() @ v[: t + 1, kv]
    x = x + mixed.reshape(num_tokens, -1) @ attention["o_proj"]["kernel"]
    h = _rms(x, layer["mlp_norm"]["scale"], config.rms_norm_eps)
    mlp = layer["mlp"]
    gate = h @ mlp["gate_proj"]["kernel"]
    hidden = gate / (1 + np.exp(-gate)) * (h @ mlp["up_proj"]["kernel"])
    x = x + hidden @ mlp["down_proj"]["kernel"]
  x = _rms(x, weights["final_norm"]["scale"], config.rms_norm_eps)
  return x @ weights["lm_head"]["kernel"]


def test_a_position_s_logits_depend_on_it_and_its_past_only():
  model, params = build()
  embeddings = jax.random.normal(jax.random.key(4), (1, 5, SMALL.embed_dim))

  def energies(embeddings):  # One number per position.
    out = model.apply({"params": params}, TOKENS[:1], embeddings=embeddings)
    return jnp.square(out[0]).sum(axis=-1)

  jacobian = jit(jax.jacrev(energies))(embeddings)  # [5, 1, 5, D]
  reach = np.abs(np.asarray(jacobian[:, 0])).max(axis=-1)  # [output, input]
  for position in range(5):
    assert (reach[position, : position + 1] > 0).all()
    np.testing.assert_array_equal(reach[position, position + 1 :], 0)
  # Fails if: the mask is not causal, or sees no past.


def test_one_example_s_logits_do_not_depend_on_another():
  model, params = build()
  apply = jit(lambda t, n: model.apply({"params": params}, t, noise=n))
  both = apply(TOKENS, noise())
  changed = jnp.stack([TOKENS[0], (TOKENS[1] + 1) % 13])
  np.testing.assert_array_equal(apply(changed, noise())[0], both[0])
  # Fails if: anything in the model couples examples (batch statistics).


def test_remat_changes_neither_logits_nor_gradients():
  model, params = build()
  remat = llama.Llama(dataclasses.replace(SMALL, remat=True))

  def loss(model):
    def run(params):
      out = model.apply({"params": params}, TOKENS, noise=noise())
      return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum()

    return jit(jax.value_and_grad(run))(params)

  assert remat.config.remat
  assert not model.config.remat
  for got, expected in zip(
    jax.tree.leaves(loss(remat)), jax.tree.leaves(loss(model)), strict=True
  ):
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_layers_draw_different_noise():
  """Every layer but the first must draw what its number says."""
  model, params = build()
  both = {}
  for name, patch in (("own", None), ("shared", lambda keys, layer: keys)):
    with pytest.MonkeyPatch.context() as context:
      if patch:
        context.setattr(llama, "fold_in", patch)
      both[name] = jit(functools.partial(model.apply, noise=noise()))(
        {"params": params}, TOKENS
      )
  # The first token never sees the noise, whichever it is.
  np.testing.assert_allclose(both["own"][:, 0], both["shared"][:, 0], atol=1e-5)
  assert np.abs(both["own"] - both["shared"])[:, 1:].max() > 1e-3


def test_noise_can_be_kept_to_some_layers():
  outs = {}
  for numbers in ((), (0, 1, 2), (0,), (2,)):
    model, params = build(dataclasses.replace(SMALL, noise_layers=numbers))
    outs[numbers] = jit(functools.partial(model.apply, noise=noise()))(
      {"params": params}, TOKENS
    )
  clean = jit(model.apply)({"params": params}, TOKENS)
  np.testing.assert_array_equal(outs[()], outs[(0, 1, 2)])
  for one, other in ((outs[(0,)], outs[(2,)]), (outs[(2,)], clean)):
    assert np.abs(one - other)[:, 1:].max() > 1e-3
  # Fails if: layers without noise are given some.


def test_a_layer_s_key_depends_on_its_number_and_the_example():
  keys = jax.random.split(jax.random.key(9), 3)
  words = {
    tuple(row)
    for layer in range(4)
    for row in np.asarray(
      jax.random.key_data(llama.fold_in(keys, jnp.int32(layer)))
    ).tolist()
  }
  assert len(words) == 12
  # Fails if: the layer's number is not folded into the key.


def test_tied_embeddings_have_no_head_and_use_the_table():
  config = dataclasses.replace(SMALL, tie_embeddings=True)
  model, params = build(config)
  assert "lm_head" not in params
  untied = llama.Llama(SMALL)
  head = {"lm_head": {"kernel": params["token_embed"]["table"].T}}
  np.testing.assert_allclose(
    jit(model.apply)({"params": params}, TOKENS),
    jit(untied.apply)({"params": params | head}, TOKENS),
    atol=1e-6,
  )


def test_bfloat16_compute_keeps_float32_parameters_and_logits():
  config = dataclasses.replace(
    SMALL, compute_dtype=config_lib.ComputeDtype.BFLOAT16
  )
  model, params = build(config)
  exact, _ = build()
  out = jit(model.apply)({"params": params}, TOKENS)
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {
    jnp.dtype("float32")
  }
  assert out.dtype == jnp.float32
  expected = jit(exact.apply)({"params": params}, TOKENS)
  assert not np.array_equal(out, expected)  # It did compute in bfloat16.
  # 8 bits of mantissa through three layers.
  np.testing.assert_allclose(out, expected, atol=0.15)


def test_too_many_tokens_are_an_error_that_names_the_limit():
  model, params = build()
  tokens = jnp.zeros((1, SMALL.max_seq_len + 1), jnp.int32)
  with pytest.raises(ValueError, match=r"num_tokens <= 7.*max_seq_len"):
    model.apply({"params": params}, tokens)


def test_rotary_embedding_is_relative():
  """Scores depend on the distance of two tokens, not on where they are."""
  q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))

  def score(at_q, at_k):
    turned = [
      layers.rotary_embedding(x, jnp.array([[at]]), theta=100.0)
      for x, at in ((q, at_q), (k, at_k))
    ]
    return float((turned[0] * turned[1]).sum())

  assert score(3, 1) == pytest.approx(score(12, 10), abs=1e-5)
  assert score(3, 1) != pytest.approx(score(3, 2), abs=1e-3)


def test_segments_do_not_see_each_other():
  model, params = build()
  segment_ids = jnp.array([[0, 0, 1, 1, 1]] * 2)
  positions = jnp.array([[0, 1, 0, 1, 2]] * 2)
  apply = jit(
    lambda tokens, **kwargs: model.apply({"params": params}, tokens, **kwargs)
  )
  packed = apply(TOKENS, segment_ids=segment_ids, positions=positions)
  alone = apply(TOKENS[:, 2:])
  np.testing.assert_allclose(packed[:, 2:], alone, atol=1e-5)


def test_attention_maps_are_made_where_they_are_asked_for():
  """The weights of every layer, with that layer's own noise."""
  config = dataclasses.replace(SMALL, remat=True, noise_layers=(1,))
  model, params = build(config)
  apply = lambda noise, **kwargs: model.apply(
    {"params": params}, TOKENS, noise=noise, **kwargs
  )
  logits, found = apply(noise(), mutable=[llama.MAPS])
  np.testing.assert_array_equal(logits, apply(noise()))
  (noisy,) = jax.tree.leaves(found)
  (clean,) = jax.tree.leaves(apply(None, mutable=[llama.MAPS])[1])
  assert noisy.shape == (3, 2, 4, 5, 5)  # [L, B, N, T, S]
  np.testing.assert_allclose(noisy.sum(axis=-1), 1, atol=1e-6)
  np.testing.assert_array_equal(noisy, np.tril(noisy))
  np.testing.assert_array_equal(noisy[0], clean[0])
  assert np.abs(noisy[1] - clean[1]).max() > 0.05
  np.testing.assert_array_equal(noisy[:, :, :, 0], clean[:, :, :, 0])
  # Fails if: the maps are of another draw than the output's.
