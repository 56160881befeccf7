"""Stacks examples into arrays of a fixed shape; the rest is padding.

An example is a flat dict of arrays and scalars, the same keys, shapes and
dtypes in every example, with a boolean `is_padding_example`. A row that holds
no record is zero everywhere, except that `is_padding_example` is True and
`index` is -1, a position that no record has. What such a row adds to a clipped
sum or to a metric is exactly zero because every reader masks it.

>>> example = {"x": np.float32(3), "is_padding_example": np.bool_(False)}
>>> stack([example], size=2, template=example)["is_padding_example"].tolist()
[False, True]
"""

from collections.abc import Mapping, Sequence

import numpy as np

Example = Mapping[str, np.ndarray | np.generic]
Batch = dict[str, np.ndarray]

PADDING_KEY = "is_padding_example"
INDEX_KEY = "index"
VIEW_KEY = "view"
NO_INDEX = -1


def padding_like(template: Example) -> Batch:
  """Returns the example that stands for "no record".

  Args:
    template: any example; only its keys, shapes and dtypes are used.

  Returns:
    A new example of the same structure: zeros, `is_padding_example` True, and
    `index` (where there is one) -1.
  """
  padding = {
    name: np.zeros(np.shape(value), np.asarray(value).dtype)
    for name, value in template.items()
  }
  padding[PADDING_KEY] = np.ones((), np.bool_)
  if INDEX_KEY in padding:
    padding[INDEX_KEY] = np.full((), NO_INDEX, padding[INDEX_KEY].dtype)
  return padding


def stack(
  examples: Sequence[Example], *, size: int, template: Example
) -> Batch:
  """Stacks examples along a new first axis and pads it to `size`.

  Args:
    examples: at most `size` examples of the template's structure.
    size: length of the new axis; 0 is allowed.
    template: any example; needed because there may be none to stack.

  Returns:
    Arrays [size, ...]: the examples in their order, then padding.

  Raises:
    ValueError: there are more examples than rows, or an example's keys, shapes
      or dtypes differ from the template's.
  """
  if len(examples) > size:
    raise ValueError(
      f"Expected at most size={size} examples, got {len(examples)}. Nothing is"
      " truncated: raise size."
    )
  padding = padding_like(template)
  batch = {}
  for name, blank in padding.items():
    batch[name] = np.empty((size, *blank.shape), blank.dtype)
    batch[name][len(examples) :] = blank
  for row, example in enumerate(examples):
    if example.keys() != padding.keys():
      raise ValueError(
        f"Expected every example to have the keys {sorted(padding)}, got"
        f" {sorted(example)} in row {row}."
      )
    for name, value in example.items():
      # Assignment would broadcast and cast without a word.
      blank = padding[name]
      if np.shape(value) != blank.shape or value.dtype != blank.dtype:
        raise ValueError(
          f"Expected {name!r} to be {blank.dtype}{list(blank.shape)} in every"
          f" example, got {value.dtype}{list(np.shape(value))} in row {row}."
        )
      batch[name][row] = value
  return batch
