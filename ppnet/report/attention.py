"""The figure of one record's attention, without noise and with it.

Drawn from `attention.json` alone. Rows of pictures: without noise, with noise,
and their difference; columns: heads. In each, a row is a query and a column is
a token that it attends to.
"""

import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import axes, figure, layout_engine

from ppnet.core import records
from ppnet.report import saving

_MAX_LABELS = 24  # More would overlap.
_MARKED = 0.1  # Share of the largest change from which on a fall is marked.
_NOTE = (
  "Row: a token; column: a token it attends to. The first token attends only to"
  " itself, so no noise reaches it: attention noise carries no privacy"
  " guarantee."
)


def spans(tokens: Sequence[str]) -> list[tuple[str, int, int]]:
  """Runs of one spelling: (spelling, first place, place behind the last).

  >>> spans(["<s>", "image", "image", "?"])
  [('<s>', 0, 1), ('image', 1, 3), ('?', 3, 4)]
  """
  found: list[tuple[str, int, int]] = []
  for place, token in enumerate(tokens):
    if found and found[-1][0] == token:
      found[-1] = (token, found[-1][1], place + 1)
    else:
      found.append((token, place, place + 1))
  return found


def draw(record: Mapping[str, Any]) -> figure.Figure:
  """Draws the figure from the record.

  Args:
    record: the content of `attention.json`.

  Returns:
    A figure that belongs to no window; the caller saves it.
  """
  clean, noisy = np.asarray(record["clean"]), np.asarray(record["noisy"])
  num_heads = len(clean)
  layout = layout_engine.ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06)
  width = 2.6 + 2.5 * num_heads
  fig = figure.Figure(figsize=(width, 9.4), layout=layout)
  fig.suptitle(
    f"Attention of test record {record['record']}, layer {record['layer']}\n"
    f"noise on {record['mode'].lower()}, standard deviation"
    f" {record['stddev']:g}",
    fontsize=12,
  )
  grid = np.asarray(fig.subplots(3, num_heads, squeeze=False))
  most = float(np.abs(noisy - clean).max()) or 1.0
  kinds = (
    ("without noise", clean, {"cmap": "Blues", "vmin": 0, "vmax": 1}),
    ("with noise", noisy, {"cmap": "Blues", "vmin": 0, "vmax": 1}),
    (
      "difference",
      noisy - clean,
      {"cmap": "RdBu_r", "vmin": -most, "vmax": most},
    ),
  )
  for place, (title, values, colours) in enumerate(kinds):
    row, is_last = grid[place], place == len(kinds) - 1
    for column, ax in enumerate(row):
      ax.imshow(values[column], interpolation="nearest", **colours)
      if is_last:
        _mark_falls(ax, values[column], most=most)
      _label(ax, record["tokens"], is_first=column == 0, is_last=is_last)
      if place == 0:
        ax.set_title(f"head {record['heads'][column]}", fontsize=11)
    row[0].set_ylabel(title, fontsize=11)
    bar = fig.colorbar(row[0].images[0], ax=list(row), shrink=0.85, pad=0.01)
    bar.set_label("change of the weight (– fell)" if is_last else "weight")
  # About 15 letters an inch.
  fig.supxlabel(textwrap.fill(_NOTE, int(15 * width)), fontsize=9)
  return fig


def _mark_falls(ax: axes.Axes, change: np.ndarray, *, most: float) -> None:
  """A dash where a weight fell: in grey the two colours are the same."""
  rows, columns = np.nonzero(change < -_MARKED * most)
  ax.scatter(
    columns,
    rows,
    s=max(1.5, 100 / len(change)) ** 2,
    marker="_",
    linewidths=1.0,
    # What fell most is dark.
    c=np.where(change[rows, columns] < -0.6 * most, "white", "black"),
  )


def _label(
  ax: axes.Axes, tokens: Sequence[str], *, is_first: bool, is_last: bool
) -> None:
  """Names the tokens on the outer sides; lines stand between their runs."""
  runs = spans(tokens)
  for _, start, _ in runs[1:]:
    ax.axhline(start - 0.5, color="#999999", linewidth=0.4)
    ax.axvline(start - 0.5, color="#999999", linewidth=0.4)
  shown = runs[:: -(-len(runs) // _MAX_LABELS)]
  places = [(start + end - 1) / 2 for _, start, end in shown]
  names = [name.strip() or "space" for name, _, _ in shown]
  ax.set_xticks(places, labels=names if is_last else [], rotation=90)
  ax.set_yticks(places, labels=names if is_first else [])
  ax.tick_params(labelsize=8, length=2)


def attention_figure(workdir: pathlib.Path) -> pathlib.Path:
  """Draws `figures/attention.png` and `.pdf` from `attention.json`.

  Returns:
    The path of the PNG file.
  """
  workdir = pathlib.Path(workdir)
  fig = draw(records.read_json(workdir / "attention.json"))
  return saving.save(fig, workdir / "figures" / "attention")
