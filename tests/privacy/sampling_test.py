"""Tests of the samplers against the distribution that is accounted for."""

import tracemalloc

import numpy as np
import pytest
from scipy import stats

from ppnet.privacy import sampling

_ROOT = 0x0123456789ABCDEF0123456789ABCDEF


def _sampler(num_examples=37, sampling_prob=0.3, root=_ROOT):
  return sampling.PoissonSampler(
    num_examples=num_examples, sampling_prob=sampling_prob, root=root
  )


def _inclusion(sampler, num_steps):
  """Membership matrix, bool[num_steps, num_examples]."""
  rows = np.zeros((num_steps, sampler.num_examples), bool)
  for step in range(num_steps):
    rows[step, sampler.draw(step)] = True
  return rows


def _size_p_value(sizes, num_examples, sampling_prob):
  """Chi-square of batch sizes against Binomial(N, q), tails pooled."""
  binomial = stats.binom(num_examples, sampling_prob)
  low, high = binomial.ppf(0.01), binomial.ppf(0.99)
  values = np.arange(low, high + 1)
  expected = binomial.pmf(values)
  expected[0], expected[-1] = binomial.cdf(low), binomial.sf(high - 1)
  observed = [np.sum(np.clip(sizes, low, high) == value) for value in values]
  return stats.chisquare(observed, expected * len(sizes)).pvalue


def test_batch_sizes_match_binomial_and_no_other():
  sampler = _sampler(num_examples=500, sampling_prob=0.06)
  sizes = np.array([len(sampler.draw(step)) for step in range(2000)])
  assert _size_p_value(sizes, 500, 0.06) > 0.01
  assert _size_p_value(sizes, 500, 0.06 * 2 / 3) < 1e-6
  assert _size_p_value(sizes, 500, 0.06 * 3 / 2) < 1e-6
  # The same mean with less variance: a fixed or truncated batch size.
  assert _size_p_value(np.full(2000, 30), 500, 0.06) < 1e-6
  # Fails if: the batch size is fixed, or q is off by a third.


def test_each_index_is_included_with_sampling_prob():
  num_steps, q = 4000, 0.3
  counts = _inclusion(_sampler(), num_steps).sum(axis=0)
  z = (counts - num_steps * q) / np.sqrt(num_steps * q * (1 - q))
  assert np.abs(z).max() < 4
  assert stats.chi2.sf(np.sum(z**2), len(z)) > 0.01
  # Fails if: the last index is never drawn.


def test_examples_and_steps_are_independent():
  rows = _inclusion(_sampler(), 4000).astype(float)
  between_examples = np.corrcoef(rows.T)[np.triu_indices(37, k=1)]
  assert np.abs(between_examples).max() < 5 / np.sqrt(4000)
  sizes = rows.sum(axis=1)
  assert abs(np.corrcoef(sizes[:-1], sizes[1:])[0, 1]) < 4 / np.sqrt(4000)
  overlap = np.mean(rows[:-1] * rows[1:])
  assert abs(overlap - 0.3**2) < 0.003
  # Fails if: consecutive steps share their draw, or batches are contiguous.


def test_draw_is_a_pure_function_of_root_and_step():
  sampler = _sampler(num_examples=1000)
  np.testing.assert_array_equal(sampler.draw(5), sampler.draw(5))
  np.testing.assert_array_equal(
    sampler.draw(5), _sampler(num_examples=1000).draw(5)
  )
  assert not np.array_equal(sampler.draw(5), sampler.draw(6))
  for bit in (0, 64, 127):  # Every part of the root counts.
    other = _sampler(num_examples=1000, root=_ROOT ^ (1 << bit))
    assert not np.array_equal(sampler.draw(5), other.draw(5))
  # Fails if: the sampler keeps a generator, or drops bits of the root.


def test_indices_are_sorted_distinct_and_in_range():
  indices = _sampler(num_examples=200_000, sampling_prob=0.01).draw(0)
  assert indices.dtype == np.int64
  assert np.all(np.diff(indices) > 0)
  assert indices[0] >= 0
  assert indices[-1] < 200_000


def test_probability_one_gives_all_examples():
  np.testing.assert_array_equal(
    _sampler(sampling_prob=1.0).draw(3), np.arange(37)
  )


def test_an_empty_draw_is_possible():
  sampler = _sampler(num_examples=3, sampling_prob=0.1)
  draws = [sampler.draw(step) for step in range(20)]
  assert min(len(draw) for draw in draws) == 0
  assert all(draw.dtype == np.int64 for draw in draws)
  # Fails if: an empty batch is replaced by one example.


def test_memory_is_that_of_the_batch():
  sampler = _sampler(num_examples=10**9, sampling_prob=1e-6)
  sampler.draw(0)
  tracemalloc.start()
  try:
    indices = sampler.draw(1)
    _, peak_bytes = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  assert 800 < len(indices) < 1200
  assert peak_bytes < 1_000_000
  # Fails if: a coin is tossed for each of the billion examples.


def test_full_batch_sampler_draws_everything():
  sampler = sampling.FullBatchSampler(num_examples=11)
  np.testing.assert_array_equal(sampler.draw(0), np.arange(11))
  assert sampler.draw(4).dtype == np.int64
  assert sampler.sampling_prob == 1.0


def test_roots_from_entropy_differ_and_have_128_bits():
  roots = {sampling.root_from_entropy() for _ in range(50)}
  assert len(roots) == 50
  assert 2**120 < max(roots) < 2**128
  # Fails if: the root is a constant or a 32-bit seed.


def test_roots_from_seed_are_repeatable_and_domains_differ():
  assert sampling.root_from_seed(3, domain=1) == sampling.root_from_seed(
    3, domain=1
  )
  roots = {
    sampling.root_from_seed(seed, domain=domain)
    for seed in range(5)
    for domain in range(5)
  }
  assert len(roots) == 25
  assert max(roots) > 2**96
  # Fails if: the sampler and the noise share a root under one seed.


def test_repr_hides_the_root():
  assert str(_ROOT) not in repr(_sampler())
  with pytest.raises(ValueError, match="root") as raised:
    _sampler(root=_ROOT << 64)
  assert str(_ROOT << 64) not in str(raised.value)
  # Fails if: the secret is printed in a log or an error.


@pytest.mark.parametrize(
  "bad",
  [
    {"num_examples": 0},
    {"sampling_prob": 0.0},
    {"sampling_prob": 1.1},
    {"root": -1},
  ],
)
def test_bad_field_is_named(bad):
  with pytest.raises(ValueError, match=next(iter(bad))):
    _sampler(**bad)


def test_bad_step_and_seed_are_named():
  with pytest.raises(ValueError, match="step"):
    _sampler().draw(-1)
  with pytest.raises(ValueError, match="seed"):
    sampling.root_from_seed(-1, domain=0)
