"""Runs of a sweep that differ in their seed alone: means, and curves of them.

>>> runs = [
...   {"state": "finished", "seed": str(seed), "accuracy": accuracy}
...   for seed, accuracy in enumerate([0.90, 0.91])
... ]
>>> print(table(means(runs, ["seed"]), ["seed"]))
runs  accuracy
----  ---------------
   2  0.9050 ± 0.0635
"""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import axes, figure, ticker

from ppnet.report import comparison, figures, saving, tables

SCORES = ("accuracy", "f1", "auc_roc", "bits_per_byte", "leakage")

_SEEDS = ("seed", "privacy.noise_seed", "privacy.sampler_seed")
_BARS = "Bars are 95 % intervals (Student) over seeds."
_LOGARITHMIC_FROM = 8.0  # Largest over smallest.
_MAX_TICKS = 8


def means(
  rows: Sequence[Mapping[str, Any]], fields: Sequence[str]
) -> list[dict[str, Any]]:
  """Mean scores over runs that are the same but for their seeds.

  Args:
    rows: see `sweeps.rows`; those that are not finished have no part.
    fields: that were swept.

  Returns:
    In the order of their first run: the other fields, "runs", and of `SCORES`,
    where every one of these runs has one that is finite, {"mean",
    "half_width"}, of Student's 95 % interval; a half-width is NaN of one run.
  """
  others = _without_seeds(fields)
  groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
  for row in rows:
    if row["state"] == "finished":
      groups.setdefault(tuple(row[name] for name in others), []).append(row)
  found = []
  for key, group in groups.items():
    scores: dict[str, Any] = {}
    for name in SCORES:
      values = [tables.to_float(row.get(name)) for row in group]
      if all(map(math.isfinite, values)):
        mean, half = comparison.interval(values)
        scores[name] = {"mean": mean, "half_width": half}
    found.append(
      dict(zip(others, key, strict=True)) | {"runs": len(group)} | scores
    )
  return found


def table(found: Sequence[Mapping[str, Any]], fields: Sequence[str]) -> str:
  """`means` for people; nothing where no run was repeated."""
  if all(group["runs"] == 1 for group in found):
    return ""
  scores = _scores(found)
  return tables.sweep_table(
    [
      dict(group) | {name: _words(name, group.get(name)) for name in scores}
      for group in found
    ],
    [*_without_seeds(fields), "runs", *scores],
  )


def write(
  found: Sequence[Mapping[str, Any]],
  fields: Sequence[str],
  workdir: pathlib.Path,
) -> pathlib.Path | None:
  """Writes `figures/sweep.png` and `.pdf` where there is a curve to show."""
  fig = draw(found, fields)
  if fig is None:
    return None
  return saving.save(fig, workdir / "figures" / "sweep")


def draw(
  found: Sequence[Mapping[str, Any]], fields: Sequence[str]
) -> figure.Figure | None:
  """Scores over the first swept field of numbers, a line for each of the rest.

  Args:
    found: from `means`.
    fields: that were swept, seeds or not, in the order they were asked for.

  Returns:
    None where no field has two numbers or no run has a score.
  """
  others = _without_seeds(fields)
  numbers = [
    name
    for name in others
    if len({tables.to_float(group[name]) for group in found}) > 1
    and all(math.isfinite(tables.to_float(group[name])) for group in found)
  ]
  scores = _scores(found)
  if not (numbers and scores):
    return None
  along = numbers[0]
  lines: dict[str, list[Mapping[str, Any]]] = {}
  for group in found:
    rest = (name for name in others if name != along)
    label = ", ".join(f"{_short(name)} {group[name]}" for name in rest)
    lines.setdefault(label, []).append(group)
  fig = figure.Figure(
    figsize=(4.2 * len(scores), 3.4 + 0.2 * len(lines)), layout="constrained"
  )
  for ax, score in zip(
    fig.subplots(1, len(scores), squeeze=False)[0], scores, strict=True
  ):
    _panel(ax, lines, along=along, score=score)
  notes = []
  if any(group["runs"] > 1 for group in found):
    notes.append(_BARS)
  if any("†" in ax.get_ylabel() for ax in fig.axes):
    notes.append(tables.NONPRIVATE_NOTE)
  fig.supxlabel("\n".join(notes), fontsize=9)
  if len(lines) > 1:
    handles, labels = fig.axes[0].get_legend_handles_labels()
    fig.legend(
      handles, labels, loc="outside upper center", frameon=False, ncols=2
    )
  return fig


def _without_seeds(fields: Sequence[str]) -> list[str]:
  """The swept fields that make another setting."""
  return [name for name in fields if name not in _SEEDS]


def _scores(found: Sequence[Mapping[str, Any]]) -> list[str]:
  """Those that some group has a mean of."""
  return [name for name in SCORES if any(name in group for group in found)]


def _panel(
  ax: axes.Axes,
  lines: Mapping[str, Sequence[Mapping[str, Any]]],
  *,
  along: str,
  score: str,
) -> None:
  """One score."""
  every: set[float] = set()
  for number, (label, groups) in enumerate(lines.items()):
    color, style, marker = figures.STYLES[number % len(figures.STYLES)]
    points = sorted(
      (
        tables.to_float(group[along]),
        group[score]["mean"],
        # Without repeats there is no interval to draw.
        0.0 if group["runs"] == 1 else group[score]["half_width"],
      )
      for group in groups
      if score in group
    )
    if not points:
      continue
    places, centres, halves = zip(*points, strict=True)
    every.update(places)
    ax.errorbar(
      places,
      centres,
      yerr=halves,
      color=color,
      linestyle=style,
      marker=marker,
      markersize=5,
      capsize=3,
      label=label,
    )
  if min(every) > 0 and max(every) >= _LOGARITHMIC_FROM * min(every):
    ax.set_xscale("log")
    ax.xaxis.set_minor_locator(ticker.NullLocator())
  if len(every) <= _MAX_TICKS:
    ticks = sorted(every)
    ax.set_xticks(ticks, labels=[f"{tick:g}" for tick in ticks])
  ax.grid(axis="y", linewidth=0.4, alpha=0.5)
  ax.set_xlabel(_short(along))
  ax.set_ylabel(tables.label(score))


def _short(field: str) -> str:
  """A field's own name, for people."""
  name = field.split(".")[-1]
  return "ε" if name == "epsilon" else name.replace("_", " ")


def _words(name: str, score: Mapping[str, float] | None) -> str | None:
  """A mean and half its interval."""
  if score is None:
    return None
  text = tables.format_value(name, score["mean"])
  if math.isnan(score["half_width"]):
    return text
  return f"{text} ± {tables.format_value(name, score['half_width'])}"
