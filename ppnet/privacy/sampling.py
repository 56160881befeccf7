"""Which examples a step sees: the sampling that the accountant is told about.

A draw is a pure function of (root, step), so every host of a run computes the
same indices, and a resumed run continues where it stopped. The root is as
secret as the noise: whoever knows it knows who was in each batch, and the
amplification by sampling is gone. NumPy only; no JAX in this module.

>>> sampler = PoissonSampler(num_examples=1000, sampling_prob=0.01, root=7)
>>> bool((sampler.draw(3) == sampler.draw(3)).all())
True
"""

import dataclasses
import secrets

import numpy as np

from ppnet.core import checks

_ROOT_BITS = 128


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
    if not 0 <= self.root < 2**_ROOT_BITS:
      # The value stays out of the message: it is a secret.
      checks.fail(
        f"0 <= root < 2**{_ROOT_BITS}", root_bits=self.root.bit_length()
      )

  def draw(self, step: int) -> np.ndarray:
    """Returns the sorted indices of `step`, i64[batch]."""
    checks.non_negative(step=step)
    seeds = np.random.SeedSequence(self.root, spawn_key=(step,))
    rng = np.random.Generator(np.random.Philox(seeds))
    batch_size = rng.binomial(self.num_examples, self.sampling_prob)
    # Without `shuffle` NumPy uses Floyd's algorithm for batches below 1/20 of
    # the data, and a partial shuffle of all indices above.
    indices = rng.choice(
      self.num_examples, size=batch_size, replace=False, shuffle=False
    )
    return np.sort(indices.astype(np.int64, copy=False))


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
    """1.0, so that the accountant can ask either sampler."""
    return 1.0

  def draw(self, step: int) -> np.ndarray:
    """Returns all indices, i64[num_examples]."""
    checks.non_negative(step=step)
    return np.arange(self.num_examples, dtype=np.int64)
