"""Tests of ppnet.data.batching."""

import numpy as np
import pytest

from ppnet.data import batching


def _example(i: int) -> dict:
  return {
    "index": np.int32(i),
    "x": np.full((2, 3), i + 0.5, np.float32),
    "label": np.int32(i + 1),
    "is_padding_example": np.bool_(False),
  }


def test_padding_is_zero_but_for_flag_and_index():
  padding = batching.padding_like(_example(4))
  assert padding["is_padding_example"] == np.True_
  assert padding["index"] == -1
  assert padding["index"].dtype == np.int32
  assert padding["label"] == 0
  np.testing.assert_array_equal(padding["x"], np.zeros((2, 3), np.float32))


def test_stack_matches_numpy_stack():
  rows = [_example(i) for i in range(3)]
  batch = batching.stack(rows, size=5, template=rows[0])
  for name in rows[0]:
    np.testing.assert_array_equal(
      batch[name][:3], np.stack([row[name] for row in rows])
    )
    assert batch[name].dtype == np.asarray(rows[0][name]).dtype
  assert batch["is_padding_example"].tolist() == [False] * 3 + [True] * 2
  assert not batch["x"][3:].any()
  assert batch["index"].tolist() == [0, 1, 2, -1, -1]


def test_too_many_examples_are_refused_not_truncated():
  with pytest.raises(ValueError, match="at most size=1 examples, got 2"):
    batching.stack([_example(0), _example(1)], size=1, template=_example(0))


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"x": np.zeros((1, 3), np.float32)}, r"'x' to be float32\[2, 3\].*row 1"),
    ({"x": np.zeros((2, 3), np.float64)}, "float64"),
    ({"y": np.int32(0)}, "keys"),
  ],
)
def test_examples_of_another_structure_are_refused(change, message):
  rows = [_example(0), {**_example(1), **change}]
  with pytest.raises(ValueError, match=message):
    batching.stack(rows, size=2, template=rows[0])
