"""What is left out of a record before its attention is looked at.

The maps themselves: tests/models/llama_test.py; the job: tests/main_test.py.
"""

import numpy as np
import pytest

from ppnet.train import attention_maps


@pytest.mark.parametrize(
  ("last_placeholder", "expected"), [(None, 64), (10, 64), (70, 71), (99, 100)]
)
def test_late_tokens_are_left_out_but_no_part_of_a_picture(
  last_placeholder, expected
):
  tokens = np.ones((1, 100), np.int32)
  if last_placeholder is not None:
    tokens[0, last_placeholder] = 7
  batch = {"tokens": tokens, "index": np.zeros(1), "image": np.ones((1, 99))}
  short = attention_maps._first_tokens(batch, placeholders=[7, 8])
  assert short["tokens"].shape == (1, expected)
  assert short["image"].shape == (1, 99)
  # Fails if: a picture is given more embeddings than it has places.
