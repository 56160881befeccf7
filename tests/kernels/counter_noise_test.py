"""The noise of the attention kernel is normal, independent and positional."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
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
  def normal(queries, key_tokens):
    return counter_noise.normal(
      jax.random.split(jax.random.key(1), 2),
      num_heads=3,
      query_index=jnp.arange(*queries),
      key_index=jnp.arange(*key_tokens),
    )

  np.testing.assert_array_equal(
    normal((4, 7), (5, 12)), normal((0, 9), (0, 13))[:, :, 4:7, 5:12]
  )
  # Fails if: the draw is a function of the array's shape.


def test_every_program_draws_the_same_bits():
  keys = jax.random.split(jax.random.key(3), 8)

  def scaled(keys, stddev):
    row, column = counter_noise.position_words(
      keys,
      num_heads=4,
      query_index=jnp.arange(37),
      key_index=jnp.arange(41),
    )
    noise = counter_noise.raw(row[..., None], column[:, :, None])
    return noise * (stddev * counter_noise.UNIT)

  stddev = jnp.float32(0.37)
  one = lambda key: scaled(key[None], stddev)[0]
  expected = np.asarray(scaled(keys, stddev))
  programs = {
    "jit": jax.jit(scaled)(keys, stddev),
    "constant": jax.jit(lambda keys: scaled(keys, stddev))(keys),
    "vmap": jax.jit(jax.vmap(one))(keys),
    "scan": jax.jit(
      lambda keys: jax.lax.scan(lambda _, key: (None, one(key)), None, keys)[1]
    )(keys),
    "remat": jax.jit(jax.checkpoint(scaled))(keys, stddev),
  }
  for shape in ((1, 8), (4, 2)):
    mesh = Mesh(np.array(jax.devices()).reshape(shape), ("data", "tensor"))
    programs[shape] = jax.jit(
      scaled,
      in_shardings=(NamedSharding(mesh, P("data")), None),
      out_shardings=NamedSharding(mesh, P("data", None)),
    )(keys, stddev)
  for name, noise in programs.items():
    np.testing.assert_array_equal(noise, expected, err_msg=str(name))
  # Fails if: the square's last bit is kept, so that a compiler may fuse it with
  # the sum into one rounding.


def test_golden_values():
  """Change these only with a note: every run with noise changes with them."""
  sample = draw(5, batch=1, num_heads=2, num_queries=2, num_keys=3)
  expected = [
    -1.9599143266677856,
    0.14918659627437592,
    -1.9631437063217163,
    1.2113232612609863,
    -0.08836871385574341,
    1.4267091751098633,
    0.8046877384185791,
    -0.6066526770591736,
    -1.1900216341018677,
    1.5253020524978638,
    1.381184697151184,
    -0.00137019669637084,
  ]
  np.testing.assert_array_equal(sample.ravel(), np.float32(expected))


def row_correlations(sample):
  """Correlations of all pairs of rows, standard normal where rows are."""
  rows = sample - sample.mean(axis=1, keepdims=True)
  rows /= np.linalg.norm(rows, axis=1, keepdims=True)
  pairs = np.triu_indices(len(rows), 1)
  return (rows @ rows.T)[pairs] * np.sqrt(sample.shape[1])


@pytest.mark.parametrize("transform", ["value", "square"])
def test_all_pairs_of_rows_and_of_columns_are_uncorrelated(transform):
  """A sum of two words is hashed: rows could be shifts of each other."""
  sample = draw(2, batch=1, num_heads=1, num_queries=700, num_keys=701)[0, 0]
  sample = np.float64(sample)
  if transform == "square":
    sample = sample**2
  for side in (sample, sample.T):
    correlations = row_correlations(side)
    assert np.abs(correlations).max() < 6.5  # Of 245,000 pairs.
    assert abs(correlations.std() - 1) < 0.01
  # Fails if: the hash has one multiplication only.


def test_corners_of_rectangles_are_independent():
  """(t, s), (t', s), (t, s'), (t', s') share all their words in pairs."""
  sample = draw(3, batch=4, num_heads=1, num_queries=501, num_keys=500)[:, 0]
  sample = np.float64(sample)
  product = sample[:, 1:] * sample[:, :-1]
  product = product[..., 1:] * product[..., :-1]
  assert abs(product.mean()) < 5 / np.sqrt(product.size)


@pytest.mark.slow
def test_hundred_million_draws_are_normal():
  """Moments and Kolmogorov-Smirnov of 1e8 draws over 100 keys, one pass each.

  The counted law is 5.7e-5 from the normal; 1e8 draws see 1.9e-4.
  """
  counts = np.zeros(2**16, np.int64)
  edges = stats.norm.ppf(np.arange(1, 2**16) / 2**16)
  moments = np.zeros(5)
  size = 0
  for seed in range(100):
    sample = draw(seed, batch=2, num_heads=2, num_queries=500, num_keys=500)
    sample = sample.ravel()
    counts += np.bincount(np.searchsorted(edges, sample), minlength=2**16)
    wide = np.float64(sample)
    moments += [np.sum(wide**power) for power in range(5)]
    size += sample.size
  assert size == 10**8
  mean, square, cube, fourth = moments[1:] / size
  assert abs(mean) < 5 / np.sqrt(size)
  assert abs(square - 1) < 5 * np.sqrt(2 / size)
  assert abs(cube) < 5 * np.sqrt(15 / size)
  assert abs(fourth - 3) < 5 * np.sqrt(96 / size)
  distance = np.abs(np.cumsum(counts) / size - np.arange(1, 2**16 + 1) / 2**16)
  assert stats.kstwobign.sf(distance.max() * np.sqrt(size)) > 1e-3


def test_rejects_keys_that_are_not_threefry():
  with pytest.raises(TypeError, match="threefry2x32"):
    counter_noise.head_keys(
      jax.random.split(jax.random.key(0, impl="rbg"), 2), 2
    )
  with pytest.raises(TypeError, match="typed PRNG keys"):
    counter_noise.check_threefry(jnp.zeros((2, 2), jnp.uint32))
