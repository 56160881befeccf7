"""Which records of a sampled user a step takes, when the unit is a user.

NumPy only; no JAX in this module.
"""

import dataclasses

import numpy as np

from ppnet.core import checks

# Apart from `sampling.PoissonSampler.draw`, whose spawn keys have one number.
_DOMAIN = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordChooser:
  """Takes at most `max_records` of a user's records, anew in each step.

  A function of (root, step, user), so that all hosts agree and a resumed run
  goes on where it stopped.

  *Formal guarantee.* None is needed: a user's summed gradient is clipped
  whatever records it is the sum of, so which are taken moves the sum of a step
  by no more than the sensitivity, even if an adversary chose. Only that no more
  than one unit's rows come from one user matters, and the sampler's indices,
  each drawn once, see to that.

  | edge case | result |
  | --- | --- |
  | no more records than `max_records` | all of them |
  | a user without records | none: the user's gradient is zero |

  Attributes:
    max_records: of one user and step, >= 1.
    root: at most 128 bits, as secret as the sampler's; not shown by `repr`.
  """

  max_records: int
  root: int = dataclasses.field(repr=False)

  def __post_init__(self) -> None:
    """Checks the field."""
    checks.positive(max_records=self.max_records)

  def choose(self, step: int, user: int, num_records: int) -> np.ndarray:
    """Places of the chosen records among the user's, sorted i64[<= max].

    Args:
      step: number of the step.
      user: number of the user.
      num_records: how many the user has.
    """
    checks.non_negative(step=step, user=user, num_records=num_records)
    if num_records <= self.max_records:
      return np.arange(num_records, dtype=np.int64)
    seeds = np.random.SeedSequence(self.root, spawn_key=(step, user, _DOMAIN))
    rng = np.random.Generator(np.random.Philox(seeds))
    chosen = rng.choice(num_records, size=self.max_records, replace=False)
    return np.sort(chosen.astype(np.int64, copy=False))
