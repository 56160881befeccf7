"""The figure of gradient inversion, drawn from `audit/inversion.json` alone.

From left to right: the picture that was trained on, and what was drawn of it
from one clipped gradient at each level of noise, with the epsilon of that one
step beside how near the drawing is.
"""

import pathlib
import textwrap
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib import figure, layout_engine

from ppnet.core import records
from ppnet.report import saving

_NOTE = (
  "One record, one step, no sampling: the attacker knows the parameters and all"
  " of the record but this picture. PSNR: higher is nearer. The mean of other"
  " pictures, which needs no gradient, has {guess:.1f} dB: a drawing below that"
  " is worse than this guess."
)


def draw(record: Mapping[str, Any]) -> figure.Figure:
  """The figure of one record; see `audit.inversion.Inversion`."""
  pictures = [
    np.asarray(record["original"], float),
    *np.asarray(record["reconstructions"], float),
  ]
  titles = ["the record", *map(_title, *(record[name] for name in _COLUMNS))]
  width = max(1.7 * len(pictures), 6.0)
  fig = figure.Figure(
    figsize=(width, 3.0),
    layout=layout_engine.ConstrainedLayoutEngine(w_pad=0.05),
  )
  low, high = (float(value) for value in record["value_range"])
  grid = fig.subplots(1, len(pictures), squeeze=False)[0]
  for ax, picture, title in zip(grid, pictures, titles, strict=True):
    shown = np.clip((picture - low) / (high - low), 0, 1)
    ax.imshow(
      shown[..., 0] if shown.shape[-1] == 1 else shown[..., :3],
      cmap="gray",
      vmin=0,
      vmax=1,
      interpolation="nearest",
    )
    ax.set_title(title, fontsize=9)
    ax.set_xticks([])
    ax.set_yticks([])
  note = _NOTE.format(guess=float(record["guess_psnr"]))
  fig.supxlabel(textwrap.fill(note, int(14 * width)), fontsize=9)
  return fig


_COLUMNS = ("noise_multipliers", "epsilons", "psnr")


def _title(noise_multiplier: float, epsilon: Any, psnr: Any) -> str:
  """What stands over a drawing."""
  return f"σ = {noise_multiplier:g}\nε = {_short(epsilon)}\n{_short(psnr)} dB"


def _short(value: Any) -> str:
  """Three digits; records hold infinity as a word."""
  number = float(value)
  if np.isinf(number):
    return "∞"
  return f"{number:.3g}" if number < 1e4 else f"{number:.0e}"


def inversion_figure(workdir: pathlib.Path) -> pathlib.Path:
  """Draws `figures/inversion.png` and `.pdf` from `audit/inversion.json`.

  Returns:
    The path of the PNG file.
  """
  workdir = pathlib.Path(workdir)
  fig = draw(records.read_json(workdir / "audit" / "inversion.json"))
  return saving.save(fig, workdir / "figures" / "inversion")
