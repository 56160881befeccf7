"""The table and the figure of a pipeline benchmark, from its `bench.json`."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import figure, layout_engine

from ppnet.core import checks, records
from ppnet.report import figures, saving, tables

_VERDICTS = {None: tables.HOLE, True: "met", False: "missed"}
_PEER = "#999999"


def _cases(record: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
  """Case -> its rows, in the order of the record."""
  cases: dict[str, list[Mapping[str, Any]]] = {}
  for row in record["rows"]:
    cases.setdefault(row["case"], []).append(row)
  if not cases:
    checks.fail("a record with rows", rows=record["rows"])
  return cases


def _rate(value: float | None) -> str:
  """Records per second, to three digits."""
  return tables.HOLE if value is None else f"{float(f'{value:.3g}'):,.0f}"


def table(record: Mapping[str, Any]) -> str:
  """Every case as a Markdown table with its goal."""
  parts = []
  for case, rows in _cases(record).items():
    facts = record["cases"][case]
    share = facts["others_cpu_share"]
    # Workers are processes of their own, so they count among the others.
    busy = (
      ""
      if share is None
      else f" Other processes, the workers among them, had {share:.0%} of the"
      " processor."
    )
    parts.append(
      f"{facts['title']}. Goal {facts['goal_examples_per_sec']:,.0f} records/s;"
      f" {record['rounds']} interleaved rounds of"
      f" {facts['examples_per_round']:,} records.{busy}\n\n"
      + tables.markdown_table(
        ["row", "records/s", "time ratio", "quartiles", "goal", "note"],
        [
          [
            row["name"],
            _rate(row["examples_per_sec"]),
            _ratio(row["time_ratio"]),
            _quartiles(row["time_ratio_quartiles"]),
            _VERDICTS[row["meets_goal"]],
            row["note"],
          ]
          for row in rows
        ],
        num_left=1,
      )
    )
  return "\n\n".join(parts)


def _ratio(value: float | None) -> str:
  return tables.HOLE if value is None else f"{value:.2f}"


def _quartiles(values: Sequence[float] | None) -> str:
  return tables.HOLE if values is None else f"{values[0]:.2f}–{values[1]:.2f}"


def draw(record: Mapping[str, Any]) -> figure.Figure:
  """One panel per case: records per second of each row, and the goal."""
  cases = _cases(record)
  heights = [len(rows) for rows in cases.values()]
  fig = figure.Figure(
    figsize=(8, 0.34 * sum(heights) + 0.95 * len(cases)),
    layout=layout_engine.ConstrainedLayoutEngine(),
  )
  panels = fig.subplots(
    len(cases), 1, squeeze=False, height_ratios=[n + 1.5 for n in heights]
  )[:, 0]
  for ax, (case, rows) in zip(panels, cases.items(), strict=True):
    facts = record["cases"][case]
    goal = facts["goal_examples_per_sec"]
    rates = [row["examples_per_sec"] or 0.0 for row in rows]
    colors = [
      _PEER if row["is_baseline"] or row["is_peer"] else figures.BLUE
      for row in rows
    ]
    ax.barh(range(len(rows)), rates, color=colors, height=0.7)
    ax.axvline(goal, color=figures.ORANGE, linestyle="--", linewidth=1.2)
    top = max([*rates, goal])
    for place, row in enumerate(rows):
      ax.text(
        rates[place] + 0.01 * top,
        place,
        row["note"] or _rate(row["examples_per_sec"]),
        va="center",
        fontsize=8,
      )
    ax.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=8)
    ax.invert_yaxis()
    ax.set_xlim(0, 1.15 * top)
    ax.set_title(
      f"{facts['title']} (goal {goal:,.0f}, dashed)", fontsize=9, loc="left"
    )
    ax.tick_params(axis="x", labelsize=8)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    ax.spines[["top", "right"]].set_visible(False)
  panels[-1].set_xlabel("records per second", fontsize=9)
  return fig


def write(workdir: pathlib.Path) -> pathlib.Path:
  """Writes `bench.md` and `figures/pipeline.png` (and .pdf) of a benchmark.

  Returns:
    The path of the PNG file.

  Raises:
    ValueError: a damaged record, or one without rows.
  """
  workdir = pathlib.Path(workdir)
  record = records.read_json(workdir / "bench.json")
  records.write_bytes(workdir / "bench.md", (table(record) + "\n").encode())
  return saving.save(draw(record), workdir / "figures" / "pipeline")
