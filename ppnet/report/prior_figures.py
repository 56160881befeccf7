"""What the random processes draw whose statistics whiten features.

>>> write("docs/random_pictures", num_rows=5)  # doctest: +SKIP
"""

import pathlib

import numpy as np
from matplotlib import figure

from ppnet.core import checks
from ppnet.data import garments, strokes
from ppnet.report import saving

_SIDE = 28
_PROCESSES = {"random strokes": strokes, "random garments": garments}


def mosaic(pictures: np.ndarray, *, num_columns: int) -> np.ndarray:
  """Pictures side by side: [N, H, W] -> [N / columns H, columns W].

  Raises:
    ValueError: the last row would not be whole.
  """
  num, height, width = pictures.shape
  if num % num_columns:
    checks.fail("whole rows", num_pictures=num, num_columns=num_columns)
  rows = pictures.reshape(-1, num_columns, height, width)
  return rows.transpose(0, 2, 1, 3).reshape(-1, num_columns * width)


def write(
  path_stem: str | pathlib.Path,
  *,
  num_rows: int = 8,
  num_columns: int = 10,
  seed: int = 0,
) -> pathlib.Path:
  """Draws the first pictures of each process; writes `.png` and `.pdf`.

  They are among those that `data.whitening.Whitened` of this seed measures, and
  no record is in them.

  Returns:
    The path of the PNG file.

  Raises:
    ValueError: no rows or no columns.
  """
  checks.positive(num_rows=num_rows, num_columns=num_columns)
  fig = figure.Figure(
    figsize=(len(_PROCESSES) * 0.4 * num_columns, 0.4 * num_rows + 0.3),
    layout="constrained",
  )
  panels = fig.subplots(1, len(_PROCESSES), squeeze=False)[0]
  for ax, (title, process) in zip(panels, _PROCESSES.items(), strict=True):
    drawn = process.pictures(
      num_rows * num_columns, height=_SIDE, width=_SIDE, seed=seed
    )
    ax.imshow(
      mosaic(drawn, num_columns=num_columns), cmap="gray", vmin=0, vmax=1
    )
    ax.set_title(title, loc="left")
    ax.axis("off")
  return saving.save(fig, pathlib.Path(path_stem))
