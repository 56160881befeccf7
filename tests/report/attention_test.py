"""The attention figure shows what its record holds."""

import numpy as np
import pytest

from ppnet.core import records
from ppnet.report import attention

TOKENS = ["<s>", "image", "image", " ", "a", "?"]


def record(num_heads=2):
  """Causal weights; the noisy ones are the clean ones turned around."""
  rng = np.random.default_rng(0)
  clean = np.tril(rng.uniform(0.1, 1, (num_heads, 6, 6)))
  noisy = np.tril(rng.uniform(0.1, 1, (num_heads, 6, 6)))
  return {
    "record": 3,
    "layer": 1,
    "heads": list(range(num_heads)),
    "mode": "SCORES",
    "stddev": 0.5,
    "tokens": TOKENS,
    "clean": (clean / clean.sum(-1, keepdims=True)).tolist(),
    "noisy": (noisy / noisy.sum(-1, keepdims=True)).tolist(),
  }


@pytest.mark.parametrize("num_heads", [1, 2])
def test_rows_are_clean_noisy_and_their_difference(num_heads):
  given = record(num_heads)
  fig = attention.draw(given)
  pictures = [ax.images[0] for ax in fig.axes if ax.images]
  assert len(pictures) == 3 * num_heads
  shown = np.array([picture.get_array() for picture in pictures])
  shown = shown.reshape(3, num_heads, 6, 6)
  clean, noisy = np.array(given["clean"]), np.array(given["noisy"])
  np.testing.assert_allclose(shown[0], clean)
  np.testing.assert_allclose(shown[1], noisy)
  np.testing.assert_allclose(shown[2], noisy - clean)
  # One scale: the eye compares the first two rows.
  assert {picture.get_clim() for picture in pictures[: 2 * num_heads]} == {
    (0, 1)
  }
  low, high = pictures[-1].get_clim()
  assert low == -high


def test_tokens_are_named_once_per_run_on_the_outer_sides():
  fig = attention.draw(record())
  first, last = fig.axes[0], fig.axes[5]
  names = [label.get_text() for label in first.get_yticklabels()]
  assert names == ["<s>", "image", "space", "a", "?"]
  assert [label.get_text() for label in last.get_xticklabels()] == names
  np.testing.assert_allclose(first.get_yticks(), [0, 1.5, 3, 4, 5])
  assert not any(label.get_text() for label in first.get_xticklabels())
  assert first.get_title() == "head 0"
  assert "no privacy" in " ".join(fig.get_supxlabel().split())


def test_the_figure_is_a_function_of_the_record(tmp_path):
  records.write_json(tmp_path / "attention.json", record())
  path = attention.attention_figure(tmp_path)
  assert path == tmp_path / "figures" / "attention.png"
  content = path.read_bytes()
  attention.attention_figure(tmp_path)
  assert path.read_bytes() == content
  assert (tmp_path / "figures" / "attention.pdf").exists()


def test_a_fall_is_marked_for_those_who_see_no_colour():
  given = record(num_heads=1)
  clean = np.array(given["clean"])
  change = np.zeros_like(clean)
  change[0, 2, 1], change[0, 3, 0], change[0, 4, 2] = -0.2, -0.4, 0.4
  change[0, 5, 5] = -0.01  # Too little to be seen.
  fig = attention.draw(given | {"noisy": (clean + change).tolist()})
  (marks,) = fig.axes[2].collections
  assert marks.get_offsets().tolist() == [[1, 2], [0, 3]]  # Column, row.
  assert not fig.axes[0].collections
  assert not fig.axes[1].collections
