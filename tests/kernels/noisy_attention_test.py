"""The noisy attention op against a loop, and what must not matter to it."""

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ppnet import config as config_lib
from ppnet.kernels import counter_noise, noisy_attention

B, T, N, K, H = 2, 5, 4, 2, 6
MODES = list(config_lib.NoiseMode)


def inputs(seed=0, *, batch=B, num_queries=T, num_keys=T):
  keys = jax.random.split(jax.random.key(seed), 3)
  return (
    jax.random.normal(keys[0], (batch, num_queries, N, H)),
    jax.random.normal(keys[1], (batch, num_keys, K, H)),
    jax.random.normal(keys[2], (batch, num_keys, K, H)),
  )


def noise(stddev=0.5, *, seed=7, batch=B, mode=MODES[0], **kwargs):
  return noisy_attention.AttentionNoise(
    key=jax.random.split(jax.random.key(seed), batch),
    stddev=stddev,
    mode=mode,
    **kwargs,
  )


def loop_attention(q, k, v, *, mode, scaled, causal, segment_ids):
  """One query of one head at a time, in float64."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  out = np.zeros(q.shape)
  for b in range(q.shape[0]):
    for n in range(N):
      kv = n // (N // K)
      for t in range(q.shape[1]):
        allowed = [
          s
          for s in range(k.shape[1])
          if (not causal or s <= t + k.shape[1] - q.shape[1])
          and (segment_ids is None or segment_ids[b, s] == segment_ids[b, t])
        ]
        if not allowed:
          continue
        score = np.array([q[b, t, n] @ k[b, s, kv] for s in allowed]) / H**0.5
        z = np.array([scaled[b, n, t, s] for s in allowed])
        if mode is config_lib.NoiseMode.SCORES:
          score = score + z
        weight = np.exp(score - score.max())
        weight /= weight.sum()
        if mode is config_lib.NoiseMode.WEIGHTS:
          noisy = np.maximum(weight + z, 0)
          weight = noisy / noisy.sum() if noisy.sum() > 0 else weight
        out[b, t, n] = weight @ v[b, allowed, kv]
  return out


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("num_keys", [T, T + 3])
def test_noisy_attention_matches_loop(mode, causal, num_keys):
  q, k, v = inputs(num_keys=num_keys)
  spread = jnp.linspace(0.1, 0.9, N)
  scale = jnp.linspace(0.5, 2.0, B * num_keys).reshape(B, num_keys)
  segment_ids = None
  if num_keys == T:
    segment_ids = np.array([[0, 0, 1, 1, 1], [0, 1, 1, 1, 2]])
  given = noise(spread, mode=mode, key_token_scale=scale)
  got = noisy_attention.noisy_attention(
    q,
    k,
    v,
    noise=given,
    causal=causal,
    segment_ids=None if segment_ids is None else jnp.asarray(segment_ids),
  )
  normal = counter_noise.normal(
    given.key,
    num_heads=N,
    query_index=jnp.arange(T) + num_keys - T,
    key_index=jnp.arange(num_keys),
  )
  scaled = normal * spread[None, :, None, None] * scale[:, None, None, :]
  expected = loop_attention(
    q, k, v, mode=mode, scaled=scaled, causal=causal, segment_ids=segment_ids
  )
  np.testing.assert_allclose(got, expected, atol=2e-6)


def test_no_noise_equals_plain_attention_and_zero_stddev():
  q, k, v = inputs()
  plain = noisy_attention.noisy_attention(q, k, v, noise=None)
  zero = noisy_attention.noisy_attention(q, k, v, noise=noise(0.0))
  np.testing.assert_array_equal(plain, zero)
  expected = jax.nn.dot_product_attention(q, k, v, is_causal=True)
  np.testing.assert_allclose(plain, expected, atol=2e-6)


@pytest.mark.parametrize("mode", MODES)
def test_first_token_s_output_is_its_value_whatever_the_noise(mode):
  """Why attention noise promises nothing (design: first-token argument)."""
  q, k, v = inputs()
  out = noisy_attention.noisy_attention(q, k, v, noise=noise(100.0, mode=mode))
  np.testing.assert_allclose(
    out[:, 0], np.repeat(v[:, 0], N // K, axis=1), atol=1e-6
  )


def test_examples_layers_and_keys_draw_different_noise():
  q, k, v = inputs(batch=1)
  q, k, v = (jnp.repeat(x, 3, axis=0) for x in (q, k, v))
  out = noisy_attention.noisy_attention(q, k, v, noise=noise(batch=3))
  assert not np.allclose(out[0], out[1])
  assert not np.allclose(out[1], out[2])
  # Fails if: one key is shared by the examples of a batch.


def test_one_key_for_the_batch_equals_keys_folded_with_positions():
  q, k, v = inputs()
  one = noisy_attention.AttentionNoise(key=jax.random.key(3), stddev=0.4)
  each = noisy_attention.AttentionNoise(
    key=jnp.stack([jax.random.fold_in(jax.random.key(3), i) for i in range(B)]),
    stddev=0.4,
  )
  np.testing.assert_array_equal(
    noisy_attention.noisy_attention(q, k, v, noise=one),
    noisy_attention.noisy_attention(q, k, v, noise=each),
  )


def test_noise_does_not_depend_on_vmap_jit_or_mesh():
  q, k, v = inputs(batch=8)
  given = noise(batch=8)
  expected = noisy_attention.noisy_attention(q, k, v, noise=given)

  def one(q, k, v, key):
    single = noisy_attention.AttentionNoise(key=key[None], stddev=0.5)
    return noisy_attention.noisy_attention(
      q[None], k[None], v[None], noise=single
    )[0]

  vmapped = jax.vmap(one)(q, k, v, given.key)
  np.testing.assert_allclose(vmapped, expected, atol=1e-6)

  def normal(keys):
    return counter_noise.normal(
      keys,
      num_heads=N,
      query_index=jnp.arange(T),
      key_index=jnp.arange(T),
    )

  alone = jax.jit(normal)(given.key)
  for shape in ((8, 1), (4, 2)):
    mesh = Mesh(np.array(jax.devices()).reshape(shape), ("data", "tensor"))
    sharded = jax.jit(
      normal,
      in_shardings=NamedSharding(mesh, P("data")),
      out_shardings=NamedSharding(mesh, P("data", "tensor")),
    )
    np.testing.assert_array_equal(sharded(given.key), alone)


def test_later_queries_draw_what_they_would_have_drawn_in_one_piece():
  q, k, v = inputs()
  whole = noisy_attention.noisy_attention(q, k, v, noise=noise())
  tail = noisy_attention.noisy_attention(q[:, 3:], k, v, noise=noise())
  np.testing.assert_allclose(tail, whole[:, 3:], atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_match_finite_differences(mode):
  q, k, v = inputs(batch=1)
  given = noise(0.05, batch=1, mode=mode)

  def loss(*inputs):
    q, k, v, stddev = map(jnp.asarray, inputs)  # check_grads passes NumPy.
    out = noisy_attention.noisy_attention(
      q,
      k,
      v,
      noise=noisy_attention.AttentionNoise(
        key=given.key, stddev=stddev, mode=mode
      ),
    )
    return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum()

  jax.test_util.check_grads(
    loss,
    (q, k, v, jnp.float32(0.05)),
    order=1,
    modes=["rev"],
    atol=1e-2,
    rtol=1e-2,
  )


@pytest.mark.parametrize("mode", MODES)
def test_weights_times_values_are_the_output(mode):
  q, k, v = inputs(num_keys=T + 3)
  given = noise(mode=mode)
  weights = noisy_attention.attention_weights(q, k, noise=given)
  assert weights.shape == (B, N, T, T + 3)
  every_value = jnp.repeat(v, N // K, axis=2)
  np.testing.assert_allclose(
    jnp.einsum("bnts,bsnh->btnh", weights, every_value),
    noisy_attention.noisy_attention(q, k, v, noise=given),
    atol=2e-6,
  )
  with pytest.raises(ValueError, match="generator"):
    noisy_attention.attention_weights(
      q, k, noise=noise(generator=config_lib.NoiseGenerator.HARDWARE)
    )


def test_bfloat16_inputs_accumulate_in_float32():
  q, k, v = inputs()
  exact = noisy_attention.noisy_attention(q, k, v, noise=noise())
  rounded = noisy_attention.noisy_attention(
    *(x.astype(jnp.bfloat16) for x in (q, k, v)), noise=noise()
  )
  assert rounded.dtype == jnp.bfloat16
  # 8 bits of mantissa on inputs and output.
  np.testing.assert_allclose(rounded.astype(jnp.float32), exact, atol=0.05)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"implementation": "cuda"}, "implementation"),
    ({"segment_ids": jnp.zeros((B, T), int), "num_keys": T + 1}, "segment_ids"),
    ({"noise": noise(jnp.ones(3))}, "stddev"),
    (
      {"noise": noise(generator=config_lib.NoiseGenerator.HARDWARE)},
      "implementation",
    ),
    ({"noise": noise(batch=B + 1)}, "noise.key"),
    ({"noise": noise(key_token_scale=jnp.ones((B, T + 2)))}, "key_token_scale"),
  ],
)
def test_shapes_that_do_not_fit_are_named(change, message):
  change = dict(change)
  q, k, v = inputs(num_keys=change.pop("num_keys", T))
  with pytest.raises(ValueError, match=message):
    noisy_attention.noisy_attention(q, k, v, **({"noise": None} | change))
