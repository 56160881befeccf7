"""Tests of the samplers against the distribution that is accounted for."""

import dataclasses
import tracemalloc

import dp_accounting
import numpy as np
import pytest
from scipy import stats

from ppnet.privacy import participation, sampling

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


# The other samplers: what each promises, and that it does not keep another's.


def _samplers(root=_ROOT, num_examples=120):
  common = {"num_examples": num_examples, "root": root}
  return {
    "poisson": sampling.PoissonSampler(sampling_prob=0.1, **common),
    "truncated": sampling.TruncatedPoissonSampler(
      sampling_prob=0.1, max_batch_size=13, **common
    ),
    "bins": sampling.BallsInBinsSampler(num_bins=10, **common),
    "shuffle": sampling.ShuffleSampler(batch_size=11, **common),
    "cyclic": sampling.CyclicPoissonSampler(
      group_sampling_prob=0.4, num_groups=4, **common
    ),
  }


_NAMES = list(_samplers())


@pytest.mark.parametrize("name", _NAMES)
def test_every_draw_is_pure_sorted_and_distinct(name):
  sampler = _samplers()[name]
  assert isinstance(sampler, sampling.Sampler)
  assert str(_ROOT) not in repr(sampler)
  draws = [sampler.draw(step) for step in range(40)]
  for step in (39, 0, 17, 16, 39):  # In any order, as after a restart.
    np.testing.assert_array_equal(draws[step], _samplers()[name].draw(step))
  for draw in draws:
    assert draw.dtype == np.int64
    assert np.all(np.diff(draw) > 0)
    assert draw.size == 0 or (draw[0] >= 0 and draw[-1] < 120)
  other = _samplers(root=_ROOT ^ (1 << 127))[name]
  assert any(
    not np.array_equal(draw, other.draw(step))
    for step, draw in enumerate(draws)
  )
  with pytest.raises(ValueError, match="step"):
    sampler.draw(-1)
  with pytest.raises(ValueError, match="root"):
    _samplers(root=-1)
  # Fails if: a draw depends on the draws before it.


@pytest.mark.parametrize("name", _NAMES)
def test_share_of_examples_is_sampling_prob(name):
  sampler = _samplers()[name]
  rows = _inclusion(sampler, 4000)
  expected = sampler.sampling_prob
  if name == "truncated":
    sizes = stats.binom(120, 0.1)
    kept = np.minimum(np.arange(121), 13) @ sizes.pmf(np.arange(121))
    expected = kept / 120
  np.testing.assert_allclose(rows.mean(), expected, rtol=0.02)
  counts = rows.sum(axis=0)
  spread = np.sqrt(4000 * expected)
  assert np.abs(counts - 4000 * expected).max() < 4.5 * spread
  # Fails if: some example is drawn more often than the others.


def test_truncated_sizes_are_cut_and_are_not_poisson():
  sampler = _samplers()["truncated"]
  sizes = np.array([len(sampler.draw(step)) for step in range(2000)])
  assert sizes.max() == 13
  binomial = stats.binom(120, 0.1)
  expected = binomial.sf(12)  # 13 or more are drawn.
  assert abs(np.mean(sizes == 13) - expected) < 4 * np.sqrt(expected / 2000)
  below = np.mean(sizes < 12)
  assert abs(below - binomial.cdf(11)) < 4 * np.sqrt(0.25 / 2000)
  assert _size_p_value(sizes, 120, 0.1) < 1e-6
  assert isinstance(sampler.participation, participation.TruncatedPoisson)
  # Fails if: a truncated draw calls itself a Poisson draw.


def test_truncation_that_cannot_happen_is_poisson():
  sampler = sampling.TruncatedPoissonSampler(
    num_examples=50, sampling_prob=0.2, max_batch_size=50, root=_ROOT
  )
  poisson = _sampler(num_examples=50, sampling_prob=0.2)
  np.testing.assert_array_equal(sampler.draw(3), poisson.draw(3))
  assert sampler.participation == poisson.participation


def test_bins_hold_everybody_once_a_cycle_and_are_drawn_anew():
  sampler = _samplers()["bins"]
  rows = _inclusion(sampler, 3000).reshape(300, 10, 120)
  np.testing.assert_array_equal(rows.sum(axis=1), 1)
  chosen = rows.argmax(axis=1)  # [cycle, example]
  uniform = stats.chisquare(np.bincount(chosen.ravel(), minlength=10))
  assert uniform.pvalue > 0.01
  # Independent of the cycle before, and of the next example: each pair of bins
  # meets with probability 1/10.
  for pairs in (chosen[1:] == chosen[:-1], chosen[:, 1:] == chosen[:, :-1]):
    assert abs(pairs.mean() - 0.1) < 5 * np.sqrt(0.09 / pairs.size)
  sizes = rows.sum(axis=2).ravel()
  assert len(np.unique(sizes)) > 10  # Not a shuffle: sizes vary.
  # Fails if: the bins of one cycle are used for the next.


def test_shuffle_keeps_sizes_and_epochs():
  sampler = _samplers()["shuffle"]
  assert sampler.steps_per_epoch == 10  # 110 of 120 are seen in an epoch.
  rows = _inclusion(sampler, 500)
  np.testing.assert_array_equal(rows.sum(axis=1), 11)
  per_epoch = rows.reshape(50, 10, 120).sum(axis=1)
  assert per_epoch.max() == 1
  assert set(per_epoch.sum(axis=1)) == {110}
  assert len({epoch.tobytes() for epoch in rows.reshape(50, 10, 120)}) == 50
  seen = per_epoch.sum(axis=0)
  assert seen.max() <= sampler.participation.num_releases(500) == 50
  # Fails if: an example is in two steps of an epoch.


def test_shuffle_does_not_call_itself_poisson():
  sampler = _samplers()["shuffle"]
  sizes = np.array([len(sampler.draw(step)) for step in range(500)])
  assert _size_p_value(sizes, 120, 11 / 120) < 1e-6
  event = sampler.participation.dp_event(1.0, 25)
  assert event == dp_accounting.SelfComposedDpEvent(
    dp_accounting.GaussianDpEvent(1.0), 3
  )
  # Fails if: amplification is claimed for shuffling.


def test_cyclic_draws_are_poisson_within_the_group_whose_turn_it_is():
  sampler = _samplers()["cyclic"]
  draws = [sampler.draw(step) for step in range(4000)]
  for step, draw in enumerate(draws):
    assert np.all(draw % 4 == step % 4)
  for group in range(4):
    sizes = np.array([len(draw) for draw in draws[group::4]])
    assert _size_p_value(sizes, 30, 0.4) > 0.001
  overlap = np.mean(
    [len(np.intersect1d(a, b)) for a, b in zip(draws, draws[4:], strict=False)]
  )
  assert abs(overlap - 30 * 0.4**2) < 0.15
  # Fails if: an example is drawn in another group's turn.


def test_groups_of_unequal_size_miss_nobody():
  sampler = sampling.CyclicPoissonSampler(
    num_examples=11, group_sampling_prob=1.0, num_groups=4, root=_ROOT
  )
  turn = np.concatenate([sampler.draw(step) for step in range(4)])
  np.testing.assert_array_equal(np.sort(turn), np.arange(11))
  assert [len(sampler.draw(step)) for step in range(4)] == [3, 3, 3, 2]


@pytest.mark.parametrize(
  "sampler",
  [
    sampling.TruncatedPoissonSampler(
      num_examples=10**9, sampling_prob=1e-6, max_batch_size=900, root=_ROOT
    ),
    sampling.CyclicPoissonSampler(
      num_examples=10**9, group_sampling_prob=1e-5, num_groups=10, root=_ROOT
    ),
  ],
)
def test_sampled_batches_need_memory_for_the_batch_alone(sampler):
  sampler.draw(0)
  tracemalloc.start()
  try:
    indices = sampler.draw(1)
    _, peak_bytes = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  assert 800 < len(indices) < 1200
  assert peak_bytes < 1_000_000


@pytest.mark.parametrize(
  ("kind", "bad"),
  [
    (sampling.TruncatedPoissonSampler, {"max_batch_size": 0}),
    (sampling.TruncatedPoissonSampler, {"sampling_prob": 0.0}),
    (sampling.BallsInBinsSampler, {"num_bins": 0}),
    (sampling.ShuffleSampler, {"batch_size": 0}),
    (sampling.ShuffleSampler, {"batch_size": 31}),
    (sampling.CyclicPoissonSampler, {"group_sampling_prob": 1.5}),
    (sampling.CyclicPoissonSampler, {"num_groups": 0}),
  ],
)
def test_bad_field_of_other_samplers_is_named(kind, bad):
  good = {
    "max_batch_size": 3,
    "sampling_prob": 0.5,
    "num_bins": 3,
    "batch_size": 3,
    "group_sampling_prob": 0.5,
    "num_groups": 3,
  }
  fields = {
    field.name: good[field.name]
    for field in dataclasses.fields(kind)
    if field.name in good
  }
  with pytest.raises(ValueError, match=next(iter(bad))):
    kind(num_examples=30, root=_ROOT, **(fields | bad))
