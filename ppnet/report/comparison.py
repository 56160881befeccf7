"""Means, intervals and paired tests over repeated runs.

Runs of two rows are paired: number i of one and number i of the other differ in
what the row is about, and in nothing else (seed, records). So a test looks at
the differences alone.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

import numpy as np
from scipy import stats

from ppnet.core import checks

Test = TypeVar("Test", bound=Hashable)


def interval(
  values: Sequence[float], *, confidence: float = 0.95
) -> tuple[float, float]:
  """The mean of repeated runs, and half the width of Student's interval.

  >>> mean, half = interval([0.5, 0.6, 0.7])
  >>> round(mean, 6), round(half, 6)
  (0.6, 0.248414)

  Args:
    values: one number per run.
    confidence: that the interval covers the mean of all possible runs, where
      runs are independent and their numbers about normal.

  Returns:
    Mean and half-width; NaN for the latter where there is one run.

  Raises:
    ValueError: no value, or one that is not finite.
  """
  if not (len(values) and np.isfinite(values).all()):
    checks.fail("one finite value or more", values=list(values))
  if len(values) == 1:
    return float(values[0]), math.nan
  spread = float(np.std(values, ddof=1)) / math.sqrt(len(values))
  quantile = float(stats.t.ppf((1 + confidence) / 2, len(values) - 1))
  return float(np.mean(values)), quantile * spread


def paired_p_value(values: Sequence[float], others: Sequence[float]) -> float:
  """Two-sided p-value of the paired t-test: are the means the same?

  | differences | p-value |
  | --- | --- |
  | vary | Student's t, n - 1 degrees of freedom |
  | all zero | 1 |
  | all the same and not zero | 0 |
  | of one run | NaN |

  Raises:
    ValueError: not as many values as others.
  """
  if len(values) != len(others):
    checks.fail(
      "paired runs", "Repeat both.", values=len(values), others=len(others)
    )
  differences = np.subtract(values, others)
  if len(differences) < 2:
    return math.nan
  if np.ptp(differences) == 0:
    return 1.0 if differences[0] == 0 else 0.0
  return float(stats.ttest_rel(values, others).pvalue)


def holm(p_values: Mapping[Test, float]) -> dict[Test, float]:
  """Adjusts p-values of several tests (Holm 1979, Scand. J. Statist. 6).

  Whoever rejects what is at most alpha rejects a true hypothesis, any of them,
  with probability alpha at most, however the tests depend on each other.

  >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
  {'a': 0.03, 'b': 0.06, 'c': 0.06}

  Args:
    p_values: of each test; NaN where there was none, which stays.

  Returns:
    The adjusted ones under the same names, at most 1.
  """
  tested = sorted(
    (name for name in p_values if not math.isnan(p_values[name])),
    key=p_values.__getitem__,
  )
  adjusted, largest = dict(p_values), 0.0
  for rank, name in enumerate(tested):
    largest = max(largest, (len(tested) - rank) * p_values[name])
    adjusted[name] = min(1.0, largest)
  return adjusted
