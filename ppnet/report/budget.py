"""The figure of an ACCOUNT job: epsilon over steps, noise over epsilon."""

import pathlib
from collections.abc import Mapping
from typing import Any

from matplotlib import axes, figure, layout_engine, ticker

from ppnet.report import figures, saving, tables

_MARKERS = {"PLD": "o", "RDP": "s"}
_LINES = {"ADD_OR_REMOVE_ONE": "-", "REPLACE_ONE": "--"}


def draw(budget: Mapping[str, Any]) -> figure.Figure:
  """Draws the figure from the record.

  Accountants differ by marker and colour, relations by line, so that it can be
  read in grey. What no accountant covers is not drawn.

  Args:
    budget: the content of `account.json`.

  Returns:
    A figure that belongs to no window; the caller saves it.
  """
  layout = layout_engine.ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
  fig = figure.Figure(figsize=(11, 4.6), layout=layout)
  relation = tables.format_relation(budget["neighboring_relation"])
  fig.suptitle(
    f"{budget['name']}: ε ="
    f" {tables.format_epsilon(tables.to_float(budget['epsilon']))}"
    f" ({relation}) at δ ="
    f" {tables.format_delta(tables.to_float(budget['delta']))},"
    f" {budget['num_steps']:,} steps, {budget['sampler']} sampling",
    fontsize=12,
    fontweight="bold",
  )
  left, right = fig.subplots(1, 2)
  _draw_epsilon(left, budget)
  _draw_noise(right, budget)
  for ax in (left, right):
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(True, color="#DDDDDD", linewidth=0.6)
    ax.set_axisbelow(True)
  return fig


def _draw_epsilon(ax: axes.Axes, budget: Mapping[str, Any]) -> None:
  """Epsilon of this noise over the steps."""
  ax.set_title("ε of this noise over the run", fontsize=11)
  pairs = dict.fromkeys(
    (row["accountant"], row["neighboring_relation"]) for row in budget["curves"]
  )
  for accountant, relation in pairs:
    points = [
      (row["num_steps"], row["epsilon"])
      for row in budget["curves"]
      if (row["accountant"], row["neighboring_relation"])
      == (accountant, relation)
      and row["epsilon"] is not None
    ]
    if not points:
      continue
    steps, epsilons = zip(*points, strict=True)
    ax.plot(
      steps,
      epsilons,
      color=figures.BLUE if accountant == "PLD" else figures.ORANGE,
      linestyle=_LINES[relation],
      marker=_MARKERS[accountant],
      markersize=4.5,
      linewidth=1.5,
      label=f"{accountant}, {tables.format_relation(relation)}",
    )
  target = budget["epsilon_budget"]
  if target is not None:
    ax.axhline(
      target,
      color=figures.BLACK,
      linestyle=":",
      linewidth=1.4,
      label=f"asked for: {target:g}",
    )
  ax.set_xlabel("training step")
  ax.set_ylabel("ε")
  ax.set_xlim(left=0)
  ax.set_ylim(bottom=0)
  ax.xaxis.set_major_locator(
    ticker.MaxNLocator(8, integer=True, steps=[1, 2, 2.5, 5, 10])
  )
  ax.legend(loc="upper left", fontsize=9, frameon=False)


def _draw_noise(ax: axes.Axes, budget: Mapping[str, Any]) -> None:
  """The noise multiplier that each epsilon needs, and this run's."""
  ax.set_title(
    f"noise for another ε after {budget['num_steps']:,} steps", fontsize=11
  )
  points = [
    (row["epsilon"], row["noise_multiplier"])
    for row in budget["needed"]
    if row["noise_multiplier"] is not None
  ]
  if points:
    epsilons, noise = zip(*points, strict=True)
    ax.plot(
      epsilons,
      noise,
      color=figures.BLUE,
      marker="o",
      markersize=4.5,
      linewidth=1.5,
      label=f"{budget['accountant']},"
      f" {tables.format_relation(budget['neighboring_relation'])}",
    )
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xticks(epsilons, labels=[f"{value:g}" for value in epsilons])
    ax.xaxis.set_minor_locator(ticker.NullLocator())
    ax.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(ticker.FuncFormatter(lambda y, _: f"{y:g}"))
    ax.yaxis.set_minor_formatter(ticker.NullFormatter())
  ax.plot(
    [tables.to_float(budget["epsilon"])],
    [budget["noise_multiplier"]],
    color=figures.BLACK,
    marker="*",
    markersize=14,
    linestyle="none",
    label="this run",
  )
  ax.set_xlabel("ε")
  ax.set_ylabel("noise multiplier")
  ax.legend(loc="upper right", fontsize=9, frameon=False)


def budget_figure(
  workdir: pathlib.Path, budget: Mapping[str, Any]
) -> pathlib.Path:
  """Draws `figures/budget.png` and `.pdf`.

  Args:
    workdir: a run's folder.
    budget: the content of `account.json`, of a mechanism with a guarantee.

  Returns:
    The path of the PNG file.
  """
  fig = draw(budget)
  return saving.save(fig, pathlib.Path(workdir) / "figures" / "budget")
