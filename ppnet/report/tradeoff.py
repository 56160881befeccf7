"""Utility and leakage against one knob, drawn from a table's records alone.

One panel for each task: accuracy on the left axis, leakage on the right one,
both with Student's 95 % intervals over the models of a cell. A row whose knob
is infinite (no guarantee) or zero stands apart, behind a gap.
"""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import axes, figure, ticker

from ppnet.core import workdirs
from ppnet.report import comparison, figures, results, saving, tables

_MEASURES = (
  ("accuracy", "accuracy", figures.BLUE, "-", "o"),
  ("leakage", "leakage", figures.ORANGE, "--", "s"),
)
# What a knob is called, where its name says too little.
_WORDS = {
  "epsilon": "ε (δ as in the table)",
  "attention_noise.stddev": "standard deviation σ of the attention noise",
}


def knob_of(cell: results.Cell, config: Mapping[str, Any], field: str) -> float:
  """The value of a knob: of the claim, or else of the configuration.

  Args:
    cell: what an audit recorded.
    config: the cell's `config.json`.
    field: "epsilon", or a field as "attention_noise.stddev".

  Returns:
    Its value, NaN where neither has it.
  """
  if field in cell.claims:
    return cell.claims[field]
  flat = workdirs.flatten(config.get("config", {}))
  return tables.to_float(flat.get(field))


def draw(
  found: results.Results,
  knobs: Mapping[tuple[str, str], float],
  *,
  field: str,
) -> figure.Figure:
  """Draws the figure.

  Args:
    found: the table.
    knobs: (task, row) -> value of the knob.
    field: its name.
  """
  tasks = [task for task in found.tasks if any(t == task for t, _ in knobs)]
  fig = figure.Figure(
    figsize=(5.2 * max(1, len(tasks)), 4.0), layout="constrained"
  )
  for number, task in enumerate(tasks, start=1):
    ax = fig.add_subplot(1, len(tasks), number)
    points = sorted(
      (value, row)
      for (name, row), value in knobs.items()
      if name == task and not math.isnan(value)
    )
    _panel(ax, found, task, points, field=field, is_first=number == 1)
  return fig


def write(
  found: results.Results,
  knobs: Mapping[tuple[str, str], float],
  *,
  field: str,
  workdir: pathlib.Path,
) -> pathlib.Path:
  """Writes `figures/tradeoff.png` and `.pdf`; returns the former's path."""
  fig = draw(found, knobs, field=field)
  return saving.save(fig, workdir / "figures" / "tradeoff")


def _panel(
  ax: axes.Axes,
  found: results.Results,
  task: str,
  points: Sequence[tuple[float, str]],
  *,
  field: str,
  is_first: bool,
) -> None:
  """One task: both measures over the knob."""
  ax.set_title(task.replace("_", " "))
  ax.set_xlabel(_WORDS.get(field, field))
  places, labels = _places([value for value, _ in points])
  right = ax.twinx()
  for (name, label, color, style, marker), side in zip(
    _MEASURES, (ax, right), strict=True
  ):
    drawn = [
      (place, value, *comparison.interval(found.cells[task, row].values[name]))
      for place, (value, row) in zip(places, points, strict=True)
      if name in found.cells[task, row].values
    ]
    # A line would say that there is something between a number and infinity.
    runs = (
      [point for point in drawn if math.isfinite(point[1])],
      [point for point in drawn if math.isinf(point[1])],
    )
    for run in runs:
      if not run:
        continue
      at, _, means, halves = zip(*run, strict=True)
      side.errorbar(
        at,
        means,
        yerr=[0.0 if math.isnan(half) else half for half in halves],
        color=color,
        linestyle=style,
        marker=marker,
        markersize=5,
        capsize=3,
        label=label if run is runs[0] or not runs[0] else None,
      )
    side.set_ylim(0, 1.02)
    side.set_ylabel(label, color=color)
    side.tick_params(axis="y", colors=color)
  ax.xaxis.set_major_locator(ticker.FixedLocator(places))
  ax.xaxis.set_major_formatter(ticker.FixedFormatter(labels))
  ax.grid(axis="y", linewidth=0.4, alpha=0.5)
  if is_first:
    handles = [
      handle
      for side in (ax, right)
      for handle in side.get_legend_handles_labels()[0]
    ]
    ax.legend(handles=handles, loc="center right", frameon=False)


def _places(values: Sequence[float]) -> tuple[list[float], list[str]]:
  """Where values stand, evenly spaced in order, and what is written there.

  >>> _places([1.0, 8.0, math.inf])
  ([0.0, 1.0, 2.5], ['1', '8', '∞'])
  """
  places = [
    float(number) + (0.5 if math.isinf(value) else 0.0)
    for number, value in enumerate(values)
  ]
  return places, [
    "∞" if math.isinf(value) else f"{value:.3g}" for value in values
  ]
