"""Behind the private cut only the noisy state is seen."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppnet import config
from ppnet.models import llama, private_cut

CLIP = 0.7
QUIET = private_cut.PrivateCut(layer=1, l2_clip_norm=CLIP, noise_stddev=0.0)
B, T, D = 3, 4, 6


def keys(number=B):
  return jax.random.split(jax.random.key(3), number)


def clip(x):
  return private_cut.privatize(x, jnp.zeros(x.shape), cut=QUIET)


def states(scale):
  return scale * jax.random.normal(jax.random.key(1), (B, T, D))


@pytest.mark.parametrize("scale", [0.0, 1e-30, 0.01, 1.0, 1e18, 1e30])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_state_is_clipped_as_one_vector(scale, dtype):
  x = states(scale).astype(dtype)
  out = private_cut._clip(x[0], cut=QUIET)
  wide = np.float64(x[0])
  norm = np.linalg.norm(wide)
  expected = wide * min(1, CLIP / max(norm, 1e-300))
  np.testing.assert_allclose(out, expected, rtol=2e-4)
  assert np.linalg.norm(np.float64(out)) <= CLIP
  # Fails if: each token is clipped by itself.


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_state_that_is_not_finite_counts_as_zero(bad):
  x = states(1.0).at[1, 2, 3].set(bad)
  out = clip(x)
  assert not np.any(out[1])
  expected = clip(states(1.0))
  np.testing.assert_array_equal(out[0], expected[0])


def test_gradients_are_finite_where_nothing_is_clipped_and_at_zero():
  for scale in (0.0, 0.01, 10.0):
    grad = jax.grad(lambda x: (clip(x) ** 2).sum())(states(scale))
    assert np.all(np.isfinite(grad))


def test_noise_has_the_claimed_scale_and_each_example_its_own():
  cut = private_cut.PrivateCut(layer=0, l2_clip_norm=CLIP, noise_stddev=2.5)
  x = jnp.zeros((2, 200, 100), jnp.bfloat16)
  out = np.float64(
    private_cut.privatize(
      x, private_cut.draw(keys(2), (200, 100), cut=cut), cut=cut
    )
  )
  assert abs(out.std() / 2.5 - 1) < 5 / np.sqrt(2 * out.size)
  assert abs(np.corrcoef(out[0].ravel(), out[1].ravel())[0, 1]) < 0.04


def decoder(cut):
  model = llama.Llama(
    config.LlamaConfig(
      vocab_size=13,
      embed_dim=8,
      num_layers=3,
      num_heads=2,
      num_kv_heads=1,
      head_dim=4,
      mlp_dim=10,
      max_seq_len=7,
    ),
    cut=cut,
  )
  tokens = jnp.array([[1, 5, 5, 2], [3, 4, 0, 12], [7, 7, 1, 0]])
  params = nn.meta.unbox(model.init(jax.random.key(0), tokens)["params"])
  return model, params, tokens


@pytest.mark.parametrize("layer", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_outputs_are_a_function_of_the_noisy_state_alone(layer):
  """With the state's bound next to nothing, the input cannot be told."""
  noisy = private_cut.PrivateCut(
    layer=layer, l2_clip_norm=1e-12, noise_stddev=1.0
  )
  model, params, tokens = decoder(noisy)
  apply = jax.jit(
    lambda tokens: model.apply({"params": params}, tokens, cut_keys=keys())
  )
  np.testing.assert_allclose(apply(tokens), apply(12 - tokens), atol=1e-6)
  clean, _, _ = decoder(None)
  out = clean.apply({"params": params}, tokens)
  other = clean.apply({"params": params}, 12 - tokens)
  assert np.abs(out - other).max() > 0.1
  # Fails if: a later layer's residual stream, keys or values see the clean
  # state.


def test_a_cut_without_keys_is_an_error():
  model, params, tokens = decoder(QUIET)
  with pytest.raises(ValueError, match="cut_keys"):
    model.apply({"params": params}, tokens)


def test_a_sequence_made_in_pieces_is_refused():
  """Each piece would see its own state, and the cache the clean one."""
  model, params, _ = decoder(QUIET)
  with pytest.raises(ValueError, match="private cut"):
    model.apply(
      {"params": params},
      jnp.zeros((1, 2, 8)),
      positions=jnp.arange(2)[None],
      cache=llama.empty_cache(model.config, batch_size=1),
      method="extend",
    )
