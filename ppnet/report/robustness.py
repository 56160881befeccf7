"""How models bear noise and missing modalities: curves from audits' records.

One row of panels for each task; in each panel one line for each model of the
table, the mean over its runs with Student's 95 % interval.
"""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import axes, figure

from ppnet.report import comparison, figures, results, saving

_PANELS = (
  ("input_noise", "noise on the input"),
  ("attention_noise", "attention noise at test time"),
  ("left_out", "without a modality"),
)
_LEGEND_COLUMNS = 3  # As wide as two panels.
_UNITS = {
  "stddev": "standard deviation (inputs have 1)",
  "token_rate": "share of tokens replaced",
}


def draw(found: results.Results) -> figure.Figure | None:
  """Draws what the records hold; None where no cell measured it."""
  tasks = [
    task
    for task in found.tasks
    if any(_measured(found, task, row) for row in found.rows)
  ]
  if not tasks:
    return None
  panels = [
    (name, title)
    for name, title in _PANELS
    if any(
      name in (_measured(found, task, row) or {})
      for task in tasks
      for row in found.rows
    )
  ]
  fig = figure.Figure(
    figsize=(4.2 * max(2, len(panels)), 3.2 * len(tasks) + 1.0),
    layout="constrained",
  )
  grid = fig.subplots(len(tasks), len(panels), squeeze=False, sharey=True)
  for own, task in zip(grid, tasks, strict=True):
    for ax, (name, title) in zip(own, panels, strict=True):
      curves = {
        row: measured[name]
        for row in found.rows
        if (measured := _measured(found, task, row)) and name in measured
      }
      if not curves:
        ax.set_axis_off()
        continue
      ax.set_title(f"{task.replace('_', ' ')}: {title}", fontsize=11)
      _panel(ax, found.rows, curves, name)
    own[0].set_ylabel("accuracy")
  handles = {
    label: handle
    for ax in fig.axes
    for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
  }
  fig.legend(
    handles.values(),
    handles.keys(),
    loc="outside upper center",
    ncols=min(len(handles), _LEGEND_COLUMNS),
    frameon=False,
  )
  return fig


def write(found: results.Results, workdir: pathlib.Path) -> pathlib.Path | None:
  """Writes `figures/robustness.png` and `.pdf`, if there is something."""
  fig = draw(found)
  if fig is None:
    return None
  return saving.save(fig, workdir / "figures" / "robustness")


def _measured(
  found: results.Results, task: str, row: str
) -> Mapping[str, Any] | None:
  """What an audit measured; None where it did not."""
  cell = found.cells.get((task, row))
  return None if cell is None else cell.record.get("robustness")


def _panel(
  ax: axes.Axes,
  rows: Sequence[str],
  curves: Mapping[str, Mapping[str, Any]],
  name: str,
) -> None:
  """One disturbance, all models."""
  ax.set_ylim(0, 1.02)
  ax.grid(axis="y", linewidth=0.4, alpha=0.5)
  for number, row in enumerate(curves):
    color, line, marker = figures.STYLES[
      list(rows).index(row) % len(figures.STYLES)
    ]
    levels = curves[row]["levels"]
    means, halves = zip(
      *(comparison.interval(values) for values in curves[row]["accuracy"]),
      strict=True,
    )
    is_named = isinstance(levels[0], str)
    # Beside each other, so that intervals do not hide each other.
    offset = 0.08 * (number - (len(curves) - 1) / 2)
    places = [i + offset for i in range(len(levels))] if is_named else levels
    ax.errorbar(
      places,
      means,
      yerr=[0.0 if math.isnan(half) else half for half in halves],
      color=color,
      linestyle="none" if is_named else line,
      marker=marker,
      markersize=5,
      capsize=3,
      label=row.replace("_", " "),
    )
    if is_named:
      ax.set_xticks(range(len(levels)), labels=levels)
      ax.set_xlim(-0.5, len(levels) - 0.5)
  first = next(iter(curves.values()))
  if name == "input_noise":
    ax.set_xlabel(_UNITS[first["kind"]])
  elif name == "attention_noise":
    ax.set_xlabel("standard deviation σ")
