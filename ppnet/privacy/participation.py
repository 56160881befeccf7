"""How often, and how randomly, an example takes part in a run.

This is all that an accountant needs to know of a sampler, and all that it is
told: each sampler of `privacy.sampling` has one of these, and
`privacy.accounting` takes nothing else. So a draw cannot be accounted for as
another one's. A run is a number of releases, independent of each other given
what was released before, and each is one event in the terms of `dp_accounting`.
No JAX in this module.

>>> CyclicPoisson(sampling_prob=0.5, num_groups=4).num_releases(10)
3
"""

import abc
import dataclasses

import dp_accounting

from ppnet.core import checks


@dataclasses.dataclass(frozen=True, kw_only=True)
class BallsInBinsDpEvent(dp_accounting.DpEvent):
  """One cycle of Gaussian releases; each example joins one of them at random.

  `dp_accounting` has no event for it. Its noise multiplier is theirs: noise
  standard deviation over the norm bound.
  """

  num_bins: int
  noise_multiplier: float


class Participation(abc.ABC):
  """What a sampler promises of each example. Frozen and hashable.

  Attributes:
    keeps_place: whether add-or-remove-one means that the example's place stays
      and contributes nothing (zero-out, Kairouz et al. 2021,
      https://arxiv.org/abs/2103.00039, Definition 1.1): nobody else's draw may
      depend on who is there. False where examples are drawn without regard to
      each other, so that adding and removing is meant to the letter.
  """

  keeps_place: bool

  @property
  @abc.abstractmethod
  def steps_per_release(self) -> int:
    """Steps that one release covers; who stops within one pays for all."""

  def num_releases(self, num_steps: int) -> int:
    """Releases in the first `num_steps` steps, the last perhaps cut short."""
    return -(-num_steps // self.steps_per_release)

  @abc.abstractmethod
  def release(self, noise_multiplier: float) -> dp_accounting.DpEvent:
    """One release; the noise multiplier is the noise over the norm bound."""

  def dp_event(
    self, noise_multiplier: float, num_steps: int
  ) -> dp_accounting.DpEvent:
    """The whole run of `num_steps` steps."""
    return dp_accounting.SelfComposedDpEvent(
      self.release(noise_multiplier), self.num_releases(num_steps)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Poisson(Participation):
  """Each example joins each step independently.

  Attributes:
    sampling_prob: the probability, in (0, 1].
  """

  sampling_prob: float
  keeps_place = False

  def __post_init__(self) -> None:
    """Checks the field."""
    checks.probability(sampling_prob=self.sampling_prob)

  @property
  def steps_per_release(self) -> int:
    """One: every step is drawn anew."""
    return 1

  def release(self, noise_multiplier: float) -> dp_accounting.DpEvent:
    """A sampled Gaussian release; without sampling, a Gaussian one."""
    gaussian = dp_accounting.GaussianDpEvent(noise_multiplier)
    if self.sampling_prob == 1:
      return gaussian
    return dp_accounting.PoissonSampledDpEvent(self.sampling_prob, gaussian)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TruncatedPoisson(Participation):
  """Poisson sampling, of which at most so many are kept, at random.

  Ganesh 2025, https://arxiv.org/abs/2508.15089. Where a batch was cut, one
  example more pushes another one out, so the sum moves by twice the norm bound.
  Under add-or-remove-one the larger of two neighbours has `num_examples`; the
  probability and the largest batch are public constants that stay.

  Attributes:
    num_examples: size of the data set.
    sampling_prob: before the cut, in (0, 1].
    max_batch_size: examples that are kept at most.
  """

  num_examples: int
  sampling_prob: float
  max_batch_size: int
  keeps_place = False

  def __post_init__(self) -> None:
    """Checks the fields."""
    checks.positive(
      num_examples=self.num_examples, max_batch_size=self.max_batch_size
    )
    checks.probability(sampling_prob=self.sampling_prob)

  @property
  def steps_per_release(self) -> int:
    """One: every step is drawn anew."""
    return 1

  def release(self, noise_multiplier: float) -> dp_accounting.DpEvent:
    """The event that `dp_accounting` has for it."""
    return dp_accounting.TruncatedSubsampledGaussianDpEvent(
      dataset_size=self.num_examples,
      sampling_probability=self.sampling_prob,
      truncated_batch_size=self.max_batch_size,
      noise_multiplier=noise_multiplier,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BallsInBins(Participation):
  """In each cycle of steps, each example joins one; drawn anew every cycle.

  Chua et al. 2025, https://arxiv.org/abs/2412.16802. Bins that are kept over
  the cycles (Choquette-Choo et al. 2024, https://arxiv.org/abs/2410.06266) are
  another mechanism, whose cycles do not compose as independent ones.

  Attributes:
    num_bins: steps of a cycle, >= 1.
  """

  num_bins: int
  keeps_place = False

  def __post_init__(self) -> None:
    """Checks the field."""
    checks.positive(num_bins=self.num_bins)

  @property
  def steps_per_release(self) -> int:
    """A whole cycle: its steps share one draw."""
    return self.num_bins

  def release(self, noise_multiplier: float) -> dp_accounting.DpEvent:
    """One cycle; a single bin holds everybody."""
    if self.num_bins == 1:
      return dp_accounting.GaussianDpEvent(noise_multiplier)
    return BallsInBinsDpEvent(
      num_bins=self.num_bins, noise_multiplier=noise_multiplier
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OncePerEpoch(Participation):
  """Each example joins one step of an epoch at most; nothing is said of which.

  What holds for shuffling, and for any other order. The steps that an example
  is not in tell nothing of it, so an epoch is one Gaussian release and no
  amplification is claimed: none that is both sound and useful is known for
  shuffled batches (Chua et al. 2024, https://arxiv.org/abs/2403.17673).

  Attributes:
    steps_per_epoch: steps before an example may come again, >= 1.
  """

  steps_per_epoch: int
  keeps_place = True

  def __post_init__(self) -> None:
    """Checks the field."""
    checks.positive(steps_per_epoch=self.steps_per_epoch)

  @property
  def steps_per_release(self) -> int:
    """An epoch."""
    return self.steps_per_epoch

  def release(self, noise_multiplier: float) -> dp_accounting.DpEvent:
    """One Gaussian release without sampling."""
    return dp_accounting.GaussianDpEvent(noise_multiplier)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CyclicPoisson(Participation):
  """Groups of examples in turn; a Poisson sample of the group whose turn it is.

  With noise from a factorisation of as many bands as there are groups, its
  columns of norm 1, a turn of all groups is one sampled Gaussian release
  (Choquette-Choo et al. 2023, https://arxiv.org/abs/2306.08153, Section 4).

  Attributes:
    sampling_prob: within a group, in (0, 1].
    num_groups: steps between two turns of a group, >= 1.
  """

  sampling_prob: float
  num_groups: int
  keeps_place = True

  def __post_init__(self) -> None:
    """Checks the fields."""
    checks.probability(sampling_prob=self.sampling_prob)
    checks.positive(num_groups=self.num_groups)

  @property
  def steps_per_release(self) -> int:
    """A turn of all groups."""
    return self.num_groups

  def release(self, noise_multiplier: float) -> dp_accounting.DpEvent:
    """That of Poisson sampling."""
    return Poisson(sampling_prob=self.sampling_prob).release(noise_multiplier)
