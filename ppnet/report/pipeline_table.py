"""The table of data pipelines: what each does to its records, and to numbers.

Words are read from the transforms in use (`label`, `kind`), shapes and numbers
from records that went through them. The numbers are exact functions of those
records: the guarantee does not cover them, and their names say so.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ppnet.core import checks
from ppnet.data import stages as stages_lib
from ppnet.report import tables

_NOTE = (
  "Numbers are exact statistics of {} record(s) for each modality, before and"
  " after, without augmentation; the privacy guarantee does not cover them."
  " Texts are counted in characters before and in tokens after."
)
_STATISTICS = ("mean", "std", "min", "max")


def rows(
  pipelines: Mapping[str, Sequence[stages_lib.Transform]],
  samples: Mapping[str, Sequence[Mapping[str, Any]]],
) -> list[dict[str, Any]]:
  """Describes pipelines, one row for each modality.

  Args:
    pipelines: modality -> transforms in order; the first decodes.
    samples: modality -> encoded records, each with "id" and the modality.

  Returns:
    For each modality a dict of

    - modality
    - decode, normalisation, feature_extraction, augmentation: the labels of the
      transforms of that kind in order, joined by "; ", "" if there are none
    - num_records: how many went through
    - unit: what the numbers are, before -> after
    - shape_before, shape_after: such as "28 × 28 × 1", with a range where
      records differ
    - nonprivate/before, nonprivate/after: mean, std, min and max of all numbers
      of all records after the first transform and after the last one; of
      lengths, if they are texts.

  Raises:
    ValueError: a modality has no transform or no record.
    sources.BadRecordError: a record cannot be used.
  """
  described = []
  for modality, transforms in pipelines.items():
    elements = samples.get(modality, ())
    if not transforms or not elements:
      checks.fail(
        f"a transform and a record of {modality!r}",
        transforms=len(transforms),
        records=len(elements),
      )
    traces = [
      stages_lib.trace(transforms, element, modality, seed=0, augment=False)
      for element in elements
    ]
    before = [trace[0].value for trace in traces]
    after = [trace[-1].value for trace in traces]
    described.append(
      {
        "modality": modality,
        **{
          kind.replace(" ", "_"): "; ".join(_labels(transforms, kind))
          for kind in stages_lib.KINDS
        },
        "num_records": len(elements),
        "unit": f"{_unit(before[0])} → {_unit(after[0])}",
        "shape_before": _shape(before),
        "shape_after": _shape(after),
        "nonprivate/before": _statistics(before),
        "nonprivate/after": _statistics(after),
      }
    )
  return described


def _labels(transforms: Sequence[stages_lib.Transform], kind: str) -> list[str]:
  """What the transforms of one kind say of themselves, in order."""
  labels = []
  for transform in transforms:
    if transform.kind == kind:
      labels.append(transform.label)
    elif kind == "normalisation":  # Decoding to floats is one as well.
      labels.append(getattr(transform, "normalisation_label", ""))
  return [label for label in labels if label]


def _is_text(value: np.ndarray | str) -> bool:
  """Whether a value is written, or ids, whose size tells nothing."""
  return isinstance(value, str) or value.dtype.kind == "i"


def _unit(value: np.ndarray | str) -> str:
  """What the numbers of a value are."""
  if isinstance(value, str):
    return "characters"
  return "tokens" if _is_text(value) else value.dtype.name


def _shape(values: Sequence[np.ndarray | str]) -> str:
  """Sizes of the axes, with a range where they differ.

  >>> _shape([np.zeros((2, 3)), np.zeros((2, 5))])
  '2 × 3–5'
  """
  shapes = [
    (len(value),) if isinstance(value, str) else value.shape for value in values
  ]
  if len({len(shape) for shape in shapes}) > 1:
    return "varies"
  sizes = []
  for axis in zip(*shapes, strict=True):
    low, high = min(axis), max(axis)
    sizes.append(str(low) if low == high else f"{low}–{high}")
  return " × ".join(sizes) or "scalar"


def _statistics(values: Sequence[Any]) -> dict[str, float]:
  """Mean, deviation and extremes of all numbers, in float64."""
  if _is_text(values[0]):
    numbers = np.array([len(value) for value in values], np.float64)
  else:
    numbers = np.concatenate(
      [np.abs(v).ravel() if np.iscomplexobj(v) else v.ravel() for v in values]
    ).astype(np.float64)
  if not numbers.size:
    return dict.fromkeys(_STATISTICS, math.nan)
  found = (numbers.mean(), numbers.std(), numbers.min(), numbers.max())
  return dict(zip(_STATISTICS, map(float, found), strict=True))


def markdown(described: Sequence[Mapping[str, Any]]) -> str:
  """Lays `rows` out as two Markdown tables: what is done, and what it does.

  Args:
    described: the rows; {} of them is an error of `rows` already.

  Returns:
    The tables and a note, without a newline at the end.
  """
  words = [
    [
      row["modality"],
      *(
        row[kind] or tables.HOLE
        for kind in ("normalisation", "feature_extraction", "augmentation")
      ),
    ]
    for row in described
  ]
  numbers = [
    [
      row["modality"],
      row["unit"],
      f"{row['shape_before']} → {row['shape_after']}",
      *(
        f"{row['nonprivate/before'][name]:.4g} →"
        f" {row['nonprivate/after'][name]:.4g}"
        for name in _STATISTICS
      ),
    ]
    for row in described
  ]
  counts = sorted({row["num_records"] for row in described})
  return "\n\n".join(
    [
      tables.markdown_table(
        ["modality", "normalisation", "feature extraction", "augmentation"],
        words,
        num_left=4,
      ),
      tables.markdown_table(
        ["modality", "numbers", "shape", *_STATISTICS], numbers, num_left=3
      ),
      _NOTE.format(" or ".join(map(str, counts))),
    ]
  )
