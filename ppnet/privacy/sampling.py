"""Which examples a step sees: the sampling that the accountant is told about.

A draw is a pure function of (root, step), so every host of a run computes the
same indices, and a resumed run continues where it stopped. The root is as
secret as the noise: whoever knows it knows who was in each batch, and the
amplification by sampling is gone. Every sampler says by its `participation`
what it promises, and the accountant is told nothing else. NumPy only; no JAX in
this module.

| sampler | batch size | cost of a draw, N examples |
| --- | --- | --- |
| Poisson, truncated, cyclic | varies | that of the batch |
| balls in bins | varies | N log N once a cycle, 16 bytes per example |
| shuffle | fixed | N once an epoch, 8 bytes per example |
| full batch | N | N |

>>> sampler = PoissonSampler(num_examples=1000, sampling_prob=0.01, root=7)
>>> bool((sampler.draw(3) == sampler.draw(3)).all())
True
"""

import dataclasses
import functools
import secrets
from typing import Protocol, runtime_checkable

import numpy as np

from ppnet.core import checks
from ppnet.privacy import participation as participation_lib

_ROOT_BITS = 128


@runtime_checkable
class Sampler(Protocol):
  """What the mechanism asks of a sampler. All of them are frozen values."""

  @property
  def num_examples(self) -> int:
    """Size N of the data set, >= 1."""
    ...

  @property
  def sampling_prob(self) -> float:
    """Share of all examples that a step sees on average."""
    ...

  @property
  def participation(self) -> participation_lib.Participation:
    """What an accountant may assume of each example."""
    ...

  def draw(self, step: int) -> np.ndarray:
    """Returns the sorted distinct indices of `step`, i64[batch]."""
    ...


def root_from_entropy() -> int:
  """Returns 128 bits of the operating system's entropy."""
  return secrets.randbits(_ROOT_BITS)


def root_from_seed(seed: int, *, domain: int) -> int:
  """Returns 128 bits derived from a seed.

  Args:
    seed: an integer >= 0. Anyone who can guess it can repeat every draw.
    domain: separates uses of one seed: two domains give unrelated roots.

  Raises:
    ValueError: `seed` is negative.
  """
  checks.non_negative(seed=seed)
  words = np.random.SeedSequence(seed, spawn_key=(domain,)).generate_state(
    _ROOT_BITS // 32, np.uint32
  )
  return int.from_bytes(words.astype("<u4").tobytes(), "little")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoissonSampler:
  """Each example joins each step independently with `sampling_prob`.

  The batch size is drawn first, Binomial(N, q), and then that many distinct
  indices: the same distribution as N independent coins, without touching all N
  records (memory is proportional to the batch).

  *Formal guarantee.* The draws of different steps are independent and each is a
  Poisson sample (Zhu and Wang 2019, http://proceedings.mlr.press/v97/zhu19c,
  Definition 3), up to the quality of NumPy's Philox generator: the sampling
  that `accounting.epsilon` assumes. Nothing is truncated, so the batch size
  varies and may be 0. The batch size is private.

  | edge case | result |
  | --- | --- |
  | `sampling_prob` 1 | every index, every step |
  | an empty draw | an empty array; the step is pure noise |

  Attributes:
    num_examples: size N of the data set, >= 1.
    sampling_prob: q, in (0, 1].
    root: secret of at most 128 bits; not shown by `repr`.
  """

  num_examples: int
  sampling_prob: float
  root: int = dataclasses.field(repr=False)

  def __post_init__(self) -> None:
    """Checks the fields."""
    checks.positive(num_examples=self.num_examples)
    checks.probability(sampling_prob=self.sampling_prob)
    _check_root(self.root)

  @property
  def participation(self) -> participation_lib.Participation:
    """Independent coins."""
    return participation_lib.Poisson(sampling_prob=self.sampling_prob)

  def draw(self, step: int) -> np.ndarray:
    """Returns the sorted indices of `step`, i64[batch]."""
    rng = _generator(self.root, step)
    batch_size = rng.binomial(self.num_examples, self.sampling_prob)
    return _subset(rng, self.num_examples, batch_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TruncatedPoissonSampler:
  """A Poisson draw, of which at most `max_batch_size` are kept, at random.

  For where a batch must have a largest size. Cutting costs privacy: one example
  more may push another one out.

  *Formal guarantee.* The draws of different steps are independent, and each is
  a uniformly random subset, of size min(K, `max_batch_size`), of a Poisson
  sample of size K: `participation.TruncatedPoisson` (Ganesh 2025,
  https://arxiv.org/abs/2508.15089), and not Poisson sampling. The size min(K,
  ..) is drawn first, then that many indices: the same distribution.

  | edge case | result |
  | --- | --- |
  | `max_batch_size` >= N | Poisson sampling, accounted as such |
  | an empty draw | an empty array; the step is pure noise |

  Attributes:
    num_examples: size N of the data set, >= 1.
    sampling_prob: q before the cut, in (0, 1].
    max_batch_size: examples kept at most, >= 1.
    root: secret of at most 128 bits; not shown by `repr`.
  """

  num_examples: int
  sampling_prob: float
  max_batch_size: int
  root: int = dataclasses.field(repr=False)

  def __post_init__(self) -> None:
    """Checks the fields."""
    checks.positive(
      num_examples=self.num_examples, max_batch_size=self.max_batch_size
    )
    checks.probability(sampling_prob=self.sampling_prob)
    _check_root(self.root)

  @property
  def participation(self) -> participation_lib.Participation:
    """Independent coins and a cut; only coins where nothing can be cut."""
    if self.max_batch_size >= self.num_examples:
      return participation_lib.Poisson(sampling_prob=self.sampling_prob)
    return participation_lib.TruncatedPoisson(
      num_examples=self.num_examples,
      sampling_prob=self.sampling_prob,
      max_batch_size=self.max_batch_size,
    )

  def draw(self, step: int) -> np.ndarray:
    """Returns the sorted indices of `step`, i64[batch]."""
    rng = _generator(self.root, step)
    batch_size = rng.binomial(self.num_examples, self.sampling_prob)
    return _subset(rng, self.num_examples, min(batch_size, self.max_batch_size))


@dataclasses.dataclass(frozen=True, kw_only=True)
class BallsInBinsSampler:
  """In every cycle of `num_bins` steps each example joins exactly one step.

  Everybody is seen once a cycle, as with shuffling, and the step is amplified
  nearly as by Poisson sampling (Chua et al. 2025,
  https://arxiv.org/abs/2412.16802).

  *Formal guarantee.* In each cycle every example falls into one of the steps,
  uniformly, independently of all other examples and of all other cycles:
  `participation.BallsInBins`. Batch sizes vary and are private. A run that is
  cut short in a cycle pays for the whole cycle.

  | edge case | result |
  | --- | --- |
  | `num_bins` 1 | every example, every step |
  | an empty bin | an empty array; the step is pure noise |

  Attributes:
    num_examples: size N of the data set, >= 1.
    num_bins: steps of a cycle, >= 1.
    root: secret of at most 128 bits; not shown by `repr`.
  """

  num_examples: int
  num_bins: int
  root: int = dataclasses.field(repr=False)

  def __post_init__(self) -> None:
    """Checks the fields."""
    checks.positive(num_examples=self.num_examples, num_bins=self.num_bins)
    _check_root(self.root)

  @property
  def sampling_prob(self) -> float:
    """1 / `num_bins`."""
    return 1 / self.num_bins

  @property
  def participation(self) -> participation_lib.Participation:
    """One step of each cycle, at random."""
    return participation_lib.BallsInBins(num_bins=self.num_bins)

  def draw(self, step: int) -> np.ndarray:
    """Returns the sorted indices of `step`, i64[batch]."""
    checks.non_negative(step=step)
    cycle, place = divmod(step, self.num_bins)
    order, ends = _bins(self.root, cycle, self.num_examples, self.num_bins)
    return order[ends[place] : ends[place + 1]].copy()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShuffleSampler:
  """Batches of one fixed size, cut from a new permutation every epoch.

  What most code without privacy does, and no amplification is claimed for it:
  where the accountant of Poisson sampling is used for it, the epsilon that is
  printed is not true (Chua et al. 2024, https://arxiv.org/abs/2403.17673).

  *Formal guarantee.* No example is in two steps of one epoch, which is
  floor(N / B) steps long: `participation.OncePerEpoch`. What is left of a
  permutation after the last whole batch is not seen in that epoch.
  Add-or-remove-one means that the example's place in the permutation stays and
  contributes nothing: if the others moved up, or a batch were refilled, a sum
  would move by twice the clip norm.

  Attributes:
    num_examples: size N of the data set, >= 1.
    batch_size: B, in [1, N].
    root: at most 128 bits; not shown by `repr`.
  """

  num_examples: int
  batch_size: int
  root: int = dataclasses.field(repr=False)

  def __post_init__(self) -> None:
    """Checks the fields."""
    checks.positive(num_examples=self.num_examples, batch_size=self.batch_size)
    checks.at_most(self.num_examples, batch_size=self.batch_size)
    _check_root(self.root)

  @property
  def steps_per_epoch(self) -> int:
    """Whole batches in a permutation."""
    return self.num_examples // self.batch_size

  @property
  def sampling_prob(self) -> float:
    """B / N: a share, not a probability that anything is claimed from."""
    return self.batch_size / self.num_examples

  @property
  def participation(self) -> participation_lib.Participation:
    """Once an epoch at most."""
    return participation_lib.OncePerEpoch(steps_per_epoch=self.steps_per_epoch)

  def draw(self, step: int) -> np.ndarray:
    """Returns the sorted indices of `step`, i64[batch_size]."""
    checks.non_negative(step=step)
    epoch, place = divmod(step, self.steps_per_epoch)
    order = _permutation(self.root, epoch, self.num_examples)
    return np.sort(
      order[place * self.batch_size : (place + 1) * self.batch_size]
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CyclicPoissonSampler:
  """Groups take turns, and a step is a Poisson sample of one group.

  The sampler of banded noise (Choquette-Choo et al. 2023,
  https://arxiv.org/abs/2306.08153, Section 4): nobody is in two steps whose
  noise is correlated. Example i is in group i mod `num_groups`.

  *Formal guarantee.* In step t each example of group t mod `num_groups` joins
  independently with `sampling_prob`, and no other example:
  `participation.CyclicPoisson`. Groups follow the order of the data set, which
  is fixed before the run; add-or-remove-one means that the others keep their
  numbers.

  | edge case | result |
  | --- | --- |
  | `num_groups` 1 | Poisson sampling |
  | `num_groups` > N | some groups are empty: steps of pure noise |

  Attributes:
    num_examples: size N of the data set, >= 1.
    group_sampling_prob: probability within the group, in (0, 1].
    num_groups: groups, and steps of a turn, >= 1.
    root: secret of at most 128 bits; not shown by `repr`.
  """

  num_examples: int
  group_sampling_prob: float
  num_groups: int
  root: int = dataclasses.field(repr=False)

  def __post_init__(self) -> None:
    """Checks the fields."""
    checks.positive(num_examples=self.num_examples, num_groups=self.num_groups)
    checks.probability(group_sampling_prob=self.group_sampling_prob)
    _check_root(self.root)

  @property
  def sampling_prob(self) -> float:
    """Share of all examples that a step sees on average."""
    return self.group_sampling_prob / self.num_groups

  @property
  def participation(self) -> participation_lib.Participation:
    """Independent coins in every turn."""
    return participation_lib.CyclicPoisson(
      sampling_prob=self.group_sampling_prob, num_groups=self.num_groups
    )

  def draw(self, step: int) -> np.ndarray:
    """Returns the sorted indices of `step`, i64[batch]."""
    rng = _generator(self.root, step)
    group = step % self.num_groups
    size = len(range(group, self.num_examples, self.num_groups))
    batch_size = rng.binomial(size, self.group_sampling_prob)
    return group + self.num_groups * _subset(rng, size, batch_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullBatchSampler:
  """Every example joins every step. There is nothing random, nor secret.

  *Formal guarantee.* None by itself: no amplification (`sampling_prob` is 1).

  Attributes:
    num_examples: size of the data set, >= 1.
  """

  num_examples: int

  def __post_init__(self) -> None:
    """Checks the field."""
    checks.positive(num_examples=self.num_examples)

  @property
  def sampling_prob(self) -> float:
    """1.0: everybody, always."""
    return 1.0

  @property
  def participation(self) -> participation_lib.Participation:
    """Every step: Poisson sampling with probability 1."""
    return participation_lib.Poisson(sampling_prob=1.0)

  def draw(self, step: int) -> np.ndarray:
    """Returns all indices, i64[num_examples]."""
    checks.non_negative(step=step)
    return np.arange(self.num_examples, dtype=np.int64)


def _check_root(root: int) -> None:
  """Raises unless it has at most 128 bits."""
  if not 0 <= root < 2**_ROOT_BITS:
    # The value stays out of the message: it is a secret.
    checks.fail(f"0 <= root < 2**{_ROOT_BITS}", root_bits=root.bit_length())


def _generator(root: int, number: int) -> np.random.Generator:
  """The generator of one step, cycle or epoch: of root and number alone."""
  checks.non_negative(step=number)
  seeds = np.random.SeedSequence(root, spawn_key=(number,))
  return np.random.Generator(np.random.Philox(seeds))


def _subset(
  rng: np.random.Generator, num_examples: int, size: int
) -> np.ndarray:
  """A uniformly random subset of range(num_examples), sorted, i64[size]."""
  # Without `shuffle` NumPy uses Floyd's algorithm for batches below 1/20 of
  # the data, and a partial shuffle of all indices above.
  indices = rng.choice(num_examples, size=size, replace=False, shuffle=False)
  return np.sort(indices.astype(np.int64, copy=False))


# Two, for the draws that are prefetched across the end of a cycle.
@functools.lru_cache(maxsize=2)
def _bins(
  root: int, cycle: int, num_examples: int, num_bins: int
) -> tuple[np.ndarray, np.ndarray]:
  """One cycle's examples by bin, i64[N], and the ends of bins, i64[bins+1]."""
  chosen = _generator(root, cycle).integers(num_bins, size=num_examples)
  order = np.argsort(chosen, kind="stable")  # Sorted within each bin.
  sizes = np.bincount(chosen, minlength=num_bins)
  return order, np.concatenate([[0], np.cumsum(sizes)])


@functools.lru_cache(maxsize=2)
def _permutation(root: int, epoch: int, num_examples: int) -> np.ndarray:
  """One epoch's order, i64[N]."""
  return _generator(root, epoch).permutation(num_examples)
