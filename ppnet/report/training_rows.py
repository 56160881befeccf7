"""Several runs' training beside each other, drawn from their workdirs' records.

The paper's Figure 3, the terms of the loss by epoch, and Figure 4, indicators
of training by epoch: one row of panels per task, one line per model. What is
measured on training records is exact and not covered by any guarantee; those
panels carry a mark.
"""

import math
import pathlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib import axes, figure

from ppnet.report import figures, saving

_NOTE = (
  "† Exact diagnostics computed from private training data: no guarantee covers"
  " these curves."
)
# Title of a panel, what it shows, and whether of the test split.
_LOSSES = (
  ("task loss (nats) †", "nonprivate/loss/task", False),
  ("clip term: mean excess norm †", "nonprivate/clip_excess", False),
  ("DP term ⟨z, θ⟩ (nats) †", "nonprivate/loss/dp_perturbation", False),
  (
    "attention term: KL (nats) †",
    "nonprivate/loss/attention_consistency",
    False,
  ),
)
_INDICATORS = (
  ("accuracy (test)", "accuracy", True),
  ("macro F1 (test)", "f1", True),
  ("gradient norm: median, 10–90 % †", "nonprivate/grad_norm/p50", False),
  ("clipped fraction †", "nonprivate/clipped_fraction", False),
  ("ε spent", "epsilon", False),
)
_LOW, _HIGH = "nonprivate/grad_norm/p10", "nonprivate/grad_norm/p90"

Runs = Mapping[tuple[str, str], figures.TrainingData]


def losses_figure(runs: Runs) -> figure.Figure:
  """Terms of the loss by epoch.

  Args:
    runs: (task, row) -> a run's records, of one or more.
  """
  return _draw(runs, _LOSSES)


def indicators_figure(runs: Runs) -> figure.Figure:
  """Scores, gradient norms, clipping and epsilon by epoch.

  Args:
    runs: (task, row) -> a run's records, of one or more.
  """
  return _draw(runs, _INDICATORS)


def write(runs: Runs, workdir: pathlib.Path) -> list[pathlib.Path]:
  """Writes `figures/losses.png` and `figures/indicators.png`, and PDFs."""
  drawings: dict[str, Callable[[Runs], figure.Figure]] = {
    "losses": losses_figure,
    "indicators": indicators_figure,
  }
  return [
    saving.save(draw(runs), workdir / "figures" / name)
    for name, draw in drawings.items()
  ]


def _draw(runs: Runs, panels: Sequence[tuple[str, str, bool]]) -> figure.Figure:
  """A row of panels for each task."""
  tasks = list(dict.fromkeys(task for task, _ in runs))
  rows = list(dict.fromkeys(row for _, row in runs))
  fig = figure.Figure(
    figsize=(3.4 * len(panels), 3.0 * len(tasks) + 0.6), layout="constrained"
  )
  grid = fig.subplots(len(tasks), len(panels), squeeze=False)
  for own, task in zip(grid, tasks, strict=True):
    for ax, (title, name, of_test) in zip(own, panels, strict=True):
      ax.set_title(f"{task.replace('_', ' ')}\n{title}", fontsize=10)
      ax.set_xlabel("epoch")
      ax.grid(linewidth=0.4, alpha=0.5)
      drawn = [
        _line(ax, runs[task, row], name, row, rows.index(row), of_test=of_test)
        for row in rows
        if (task, row) in runs
      ]
      if not any(drawn):
        ax.text(
          0.5, 0.5, "none", ha="center", va="center", transform=ax.transAxes
        )
      if of_test:
        ax.set_ylim(0, 1.02)
  handles = {
    label: handle
    for ax in fig.axes
    for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
  }
  if handles:
    fig.legend(
      handles.values(),
      handles.keys(),
      loc="outside upper center",
      ncols=len(handles),
      frameon=False,
    )
  fig.supxlabel(_NOTE, fontsize=9)
  return fig


def _line(
  ax: axes.Axes,
  run: figures.TrainingData,
  name: str,
  row: str,
  number: int,
  *,
  of_test: bool,
) -> bool:
  """One run's curve; whether there was anything to draw."""
  found = _by_epoch(run, name, of_test=of_test)
  if found is None:
    return False
  epochs, values = found
  color, line, marker = figures.STYLES[number % len(figures.STYLES)]
  ax.plot(
    epochs,
    values,
    color=color,
    linestyle=line,
    marker=marker,
    markersize=3.5,
    markevery=max(1, len(values) // 12),
    label=row.replace("_", " "),
  )
  if name == "nonprivate/grad_norm/p50":
    band = [_by_epoch(run, side, of_test=False) for side in (_LOW, _HIGH)]
    if band[0] is not None and band[1] is not None:
      ax.fill_between(
        epochs, band[0][1], band[1][1], color=color, alpha=0.15, linewidth=0
      )
  return True


def _by_epoch(
  run: figures.TrainingData, name: str, *, of_test: bool
) -> tuple[np.ndarray, np.ndarray] | None:
  """Epochs and values; None where nothing was recorded, or only zero."""
  # What is spent is no mean of an epoch.
  source = run.test if of_test else run.epoch_means
  if name == "epsilon":
    source = run.train
  series = source.get(name)
  if series is None:
    return None
  known = np.isfinite(series.values)
  # A mechanism that is off is recorded as exactly zero.
  if not known.any() or not series.values[known].any():
    return None
  epochs_per_step = run.get("epoch").final / max(run.last_step, 1)
  if math.isnan(epochs_per_step):
    return None
  return series.steps[known] * epochs_per_step, series.values[known]
