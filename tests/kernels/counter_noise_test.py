"""The noise of the attention kernel is normal, independent and positional."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ppnet.kernels import counter_noise


def draw(seed=0, *, batch=2, num_heads=3, num_queries=64, num_keys=80):
  keys = jax.random.split(jax.random.key(seed), batch)
  return np.asarray(
    counter_noise.normal(
      keys,
      num_heads=num_heads,
      query_index=jnp.arange(num_queries),
      key_index=jnp.arange(num_keys),
    )
  )


def test_threefry_matches_published_vectors():
  """Known answers of Random123's kat_vectors for threefry2x32-20."""
  cases = [
    ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
    ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 2, (0x1CB996FC, 0xBB002BE7)),
    (
      (0x13198A2E, 0x03707344),
      (0x243F6A88, 0x85A308D3),
      (0xC4923A9C, 0x483DF7A0),
    ),
  ]
  for key, counter, expected in cases:
    words = counter_noise.threefry2x32(
      tuple(jnp.uint32(w) for w in key), tuple(jnp.uint32(w) for w in counter)
    )
    assert tuple(int(w) for w in words) == expected


def test_draws_are_standard_normal_and_other_scales_are_rejected():
  sample = draw(num_queries=300, num_keys=301).ravel()
  assert abs(sample.mean()) < 5 / np.sqrt(sample.size)
  assert abs(sample.std() - 1) < 5 / np.sqrt(2 * sample.size)
  assert stats.kstest(sample, "norm").pvalue > 1e-3
  for wrong in (2 / 3, 3 / 2):
    assert stats.kstest(sample, stats.norm(scale=wrong).cdf).pvalue < 1e-6


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_neighbours_along_every_axis_are_uncorrelated(axis):
  sample = draw(batch=4, num_heads=5, num_queries=66, num_keys=70)
  left = np.delete(sample, -1, axis=axis).ravel()
  right = np.delete(sample, 0, axis=axis).ravel()
  assert abs(np.corrcoef(left, right)[0, 1]) < 5 / np.sqrt(left.size)
  # Squares too: a shared radius would show here and not above.
  assert abs(np.corrcoef(left**2, right**2)[0, 1]) < 5 / np.sqrt(left.size)


def test_no_value_occurs_twice_over_examples_and_heads():
  sample = draw(batch=3, num_heads=4, num_queries=20, num_keys=22)
  rows = sample.reshape(12, -1)
  correlation = np.corrcoef(rows) - np.eye(12)
  assert np.abs(correlation).max() < 0.3


def test_a_position_s_value_does_not_depend_on_the_block():
  def positions(fn, queries, key_tokens):
    return fn(
      jax.random.split(jax.random.key(1), 2),
      num_heads=3,
      query_index=jnp.arange(*queries),
      key_index=jnp.arange(*key_tokens),
    )

  whole = positions(counter_noise.bits, (0, 9), (0, 13))
  block = positions(counter_noise.bits, (4, 7), (5, 12))
  for part, all_of_it in zip(block, whole, strict=True):
    np.testing.assert_array_equal(part, all_of_it[:, :, 4:7, 5:12])
  # Some versions of XLA differ in the last place of a cosine.
  np.testing.assert_allclose(
    positions(counter_noise.normal, (4, 7), (5, 12)),
    positions(counter_noise.normal, (0, 9), (0, 13))[:, :, 4:7, 5:12],
    rtol=3e-7,
  )
  # Fails if: the draw is a function of the array's shape.


def test_rejects_keys_that_are_not_threefry():
  with pytest.raises(TypeError, match="threefry2x32"):
    counter_noise.head_keys(
      jax.random.split(jax.random.key(0, impl="rbg"), 2), 2
    )
  with pytest.raises(TypeError, match="typed PRNG keys"):
    counter_noise.check_threefry(jnp.zeros((2, 2), jnp.uint32))
