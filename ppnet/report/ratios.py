"""Tables and the figure of a benchmark, drawn from its `bench.json` alone.

Every number is a ratio to the baseline of its framework in the same case; what
could not be measured is a hole with its reason, never left out.
"""

import dataclasses
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import axes, figure, layout_engine, lines, ticker

from ppnet.core import checks, records
from ppnet.report import saving, tables

_HEADERS = (
  "row",
  "time",
  "quartiles",
  "CPU time",
  "memory",
  "FLOPs",
  "goal",
  "seconds",
)
_NUM_LEFT = 1  # Columns of words; the others are numbers.
_WIDTH = 78
_ABOUT = (
  "Ratios to the first row of the same framework: medians over {rounds}"
  " interleaved rounds; quartiles of the ratios within a round; processor time"
  " of all threads; temporary memory; matrix products, without fallbacks that"
  " roundings may ask for. Goal: at most {time:.2f} in time and {memory:.2f} in"
  " memory, both at once."
)

# Okabe and Ito 2008 (https://jfly.uni-koeln.de/color/), as in `report.figures`.
_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#666666"
_GREEN = "#009E73"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Subject:
  """How a benchmark's figure speaks of what it measured, and its name."""

  what: str
  baseline: str
  file: str


_SUBJECTS = {
  "ENGINES": _Subject(
    what="a clipped sum", baseline="the plain gradient", file="engines"
  ),
  # `attention.png` is a run's own attention (`report.attention`).
  "ATTENTION": _Subject(
    what="noise in attention",
    baseline="attention without noise",
    file="attention_cost",
  ),
}


def verdict(row: Mapping[str, Any]) -> str:
  """Which parts of the goal a row meets, in words.

  >>> verdict({"meets_time": True, "meets_memory": False})
  'time only'
  """
  time, memory = row.get("meets_time"), row.get("meets_memory")
  if time is None or memory is None:
    return tables.HOLE
  if time:
    return "both" if memory else "time only"
  return "memory only" if memory else "neither"


def _number(value: float | None, digits: int = 2) -> str:
  """A number, or a hole."""
  return tables.HOLE if value is None else f"{value:.{digits}f}"


def _cells(row: Mapping[str, Any]) -> list[str]:
  """One row of a case's table."""
  quartiles = row["time_ratio_quartiles"]
  return [
    row["name"],
    _number(row["time_ratio"]),
    tables.HOLE
    if quartiles is None
    else f"{quartiles[0]:.2f}–{quartiles[1]:.2f}",
    _number(row["cpu_time_ratio"]),
    _number(row["memory_ratio"]),
    _number(row["flops_ratio"]),
    verdict(row),
    _number(row["secs"], 3),
  ]


def _by_case(
  record: Mapping[str, Any],
) -> list[tuple[str, list[Mapping[str, Any]]]]:
  """(case, its rows), in the order of the record.

  Raises:
    ValueError: if there is no row.
  """
  cases = {row["case"]: None for row in record["rows"]}
  if not cases:
    checks.fail("a record with rows", rows=record["rows"])
  return [
    (case, [row for row in record["rows"] if row["case"] == case])
    for case in cases
  ]


def title(record: Mapping[str, Any], case: str) -> str:
  """What a case is, in one line."""
  facts = record["cases"][case]
  if "title" in facts:
    return facts["title"]
  decoder = facts.get("decoder") or {}
  parts = [
    f"{case}: {facts['num_parameters']:,} parameters",
    f"d {decoder['embed_dim']}" if decoder else "",
    f"{decoder['num_layers']} layers" if decoder else "",
    f"T {facts['num_tokens']}",
    f"B {facts['batch_size']}",
    f"in microbatches of {facts['microbatch_size']}"
    if facts["microbatch_size"]
    else "whole batch",
  ]
  return ", ".join(part for part in parts if part)


def conclusion(
  rows: Sequence[Mapping[str, Any]], *, busy_share: float | None
) -> str:
  """What one case says: the goal, and our engines against the peers.

  Args:
    rows: of one case.
    busy_share: how much of the processor others had, if that was enough to
      make times provisional; else None.

  Returns:
    One sentence.
  """
  ran = [
    r for r in rows if r["time_ratio"] is not None and not r["is_baseline"]
  ]
  ours = [row for row in ran if not row["is_peer"]]
  others = [row for row in ran if row["is_peer"]]
  if not ours:
    return "No engine was measured."
  say = lambda row: (
    f"{row['name']} {row['time_ratio']:.2f} / {row['memory_ratio']:.2f}"
  )
  time, memory = (lambda r: r["time_ratio"]), (lambda r: r["memory_ratio"])
  reached = [say(row) for row in ours if row["meets_both"]]
  parts = [
    f"goal met by {', '.join(reached)}"
    if reached
    else f"goal not met; fastest {say(min(ours, key=time))}, leanest"
    f" {say(min(ours, key=memory))}"
  ]
  if others:
    parts.append(
      f"peers: fastest {say(min(others, key=time))}, leanest"
      f" {say(min(others, key=memory))}"
    )
    best = [
      row["name"]
      for row in ours
      if time(row) < time(min(others, key=time))
      and memory(row) < memory(min(others, key=memory))
    ]
    parts.append(
      f"faster and leaner than every peer: {', '.join(best) or 'none'}"
    )
  if busy_share is not None:
    parts[0] = (
      f"provisional, as others had {busy_share:.0%} of the processor:"
      f" {parts[0]}"
    )
  return "; ".join(parts) + "."


def _conclusion_of(
  record: Mapping[str, Any], case: str, rows: Sequence[Mapping[str, Any]]
) -> str:
  """The conclusion of one case of a record."""
  facts = record["cases"][case]
  share = None if facts["is_quiet"] else facts["others_cpu_share"]
  return conclusion(rows, busy_share=share)


def _about(record: Mapping[str, Any], case: str) -> str:
  """How to read the numbers of a case."""
  goal = record["cases"][case]["goal"]
  return _ABOUT.format(
    rounds=record["rounds"],
    time=goal["time_ratio"],
    memory=goal["memory_ratio"],
  )


def _machine(record: Mapping[str, Any]) -> str:
  """What the benchmark ran on, in one line."""
  machine = record["machine"]
  shares = [
    f"{facts['others_cpu_share']:.0%}"
    for facts in record["cases"].values()
    if facts.get("others_cpu_share") is not None
  ]
  busy = f"; others' share of it by case: {', '.join(shares)}" if shares else ""
  versions = ", ".join(
    f"{name} {version}"
    for name, version in machine["versions"].items()
    if version and name in ("jax", "optax", "jax-privacy", "torch", "opacus")
  )
  return (
    f"{machine['processor']}, {machine['cores']} cores,"
    f" {machine['backend']}{busy}. {versions}."
  )


def _notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
  """The rows' notes, each after its row's name."""
  return [f"{row['name']}: {row['note']}" for row in rows if row["note"]]


def bench_table(record: Mapping[str, Any]) -> str:
  """Lays out a benchmark for a terminal.

  Args:
    record: `bench.json`.

  Returns:
    One block of aligned lines per case, without a newline at the end.

  Raises:
    ValueError: a record without rows.
  """
  blocks = []
  for case, rows in _by_case(record):
    cells = [list(_HEADERS), *(_cells(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    block = textwrap.wrap(title(record, case), _WIDTH)
    for line in cells:
      padded = [
        text.ljust(width) if column < _NUM_LEFT else text.rjust(width)
        for column, (text, width) in enumerate(zip(line, widths, strict=True))
      ]
      block.append("  ".join(padded).rstrip())
    for sentence in [
      *_notes(rows),
      _conclusion_of(record, case, rows),
      _about(record, case),
    ]:
      block += textwrap.wrap(sentence, _WIDTH, subsequent_indent="  ")
    blocks.append("\n".join(block))
  return "\n\n".join(
    [*blocks, "\n".join(textwrap.wrap(_machine(record), _WIDTH))]
  )


def bench_markdown(record: Mapping[str, Any]) -> str:
  """The same tables in Markdown, with a newline at the end.

  Raises:
    ValueError: a record without rows.
  """
  blocks = []
  for case, rows in _by_case(record):
    line = lambda cells: "| " + " | ".join(cells) + " |"
    table = [line(_HEADERS), line(["---"] * len(_HEADERS))]
    table += [line(_cells(row)) for row in rows]
    blocks.append(f"## {title(record, case)}\n\n" + "\n".join(table))
    notes = [f"- {note}" for note in _notes(rows)]
    if notes:
      blocks.append("\n".join(notes))
    blocks += [_conclusion_of(record, case, rows), _about(record, case)]
  return "\n\n".join([*blocks, _machine(record)]) + "\n"


def draw(record: Mapping[str, Any]) -> figure.Figure:
  """Draws time ratio against memory ratio, a panel per case.

  The region of the goal is shaded; bars are the quartiles of the time ratio.
  Both axes are logarithmic: twice and half are equally far from 1.

  Args:
    record: `bench.json`.

  Returns:
    A figure that belongs to no window; the caller saves it.

  Raises:
    ValueError: a record without rows.
  """
  cases = _by_case(record)
  columns = min(len(cases), 2)
  num_rows = -(-len(cases) // columns)
  fig = figure.Figure(
    figsize=(6.2 * columns, 5.0 * num_rows + 0.9),
    layout=layout_engine.ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12),
  )
  for index, (case, rows) in enumerate(cases):
    ax = fig.add_subplot(num_rows, columns, index + 1)
    _draw_case(ax, record, case, rows)
  subject = _SUBJECTS[record["subject"]]
  fig.suptitle(
    f"What {subject.what} costs, relative to {subject.baseline}", fontsize=14
  )
  key = [
    lines.Line2D([], [], color=color, marker=marker, linestyle="", label=label)
    for color, marker, label in (
      (_BLUE, "o", "ppnet"),
      (_ORANGE, "s", "another library"),
      (_GREY, "x", subject.baseline),
      (_GREEN, "s", "goal: both at once"),
    )
  ]
  key[-1].set_alpha(0.25)
  fig.legend(
    handles=key, loc="outside lower center", ncols=2 * columns, frameon=False
  )
  return fig


def _draw_case(
  ax: axes.Axes,
  record: Mapping[str, Any],
  case: str,
  rows: Sequence[Mapping[str, Any]],
) -> None:
  """One panel."""
  goal = record["cases"][case]["goal"]
  ax.set_title(textwrap.fill(title(record, case), 62), fontsize=10)
  measured = [row for row in rows if row["time_ratio"] is not None]
  times = [t for row in measured for t in row["time_ratio_quartiles"]]
  times += [1.0, goal["time_ratio"]]
  memories = [row["memory_ratio"] for row in measured] or [1.0]
  memories.append(goal["memory_ratio"])
  ax.set_xscale("log")
  ax.set_yscale("log")
  # Room for the names beside the points.
  ax.set_xlim(min(times) / 1.12, max(max(times) * 1.3, 1.6))
  ax.set_ylim(min(memories) / 1.12, max(max(memories) * 1.15, 1.4))
  ax.fill_between(
    [ax.get_xlim()[0], goal["time_ratio"]],
    ax.get_ylim()[0],
    goal["memory_ratio"],
    color=_GREEN,
    alpha=0.15,
    linewidth=0,
  )
  labels = []
  for row in measured:
    low, high = row["time_ratio_quartiles"]
    middle, memory = row["time_ratio"], row["memory_ratio"]
    if row["is_baseline"]:
      if row["framework"] == measured[0]["framework"]:
        ax.plot(1.0, 1.0, marker="x", color=_GREY, markersize=8)
      continue
    color, marker = (_ORANGE, "s") if row["is_peer"] else (_BLUE, "o")
    ax.hlines(memory, min(low, middle), max(high, middle), color=color, lw=1.2)
    ax.plot(middle, memory, marker=marker, color=color, markersize=6)
    labels.append((middle, memory, row["name"], color))
  _label(ax, labels)
  for axis in (ax.xaxis, ax.yaxis):
    axis.set_major_locator(ticker.LogLocator(subs=(1, 1.25, 1.5, 2, 3, 4, 6)))
    axis.set_major_formatter(ticker.FuncFormatter(lambda v, _: f"{v:g}"))
    axis.set_minor_locator(ticker.NullLocator())
  ax.grid(True, color="#DDDDDD", linewidth=0.6)
  ax.set_axisbelow(True)
  ax.set_xlabel("time ratio (median and quartiles)")
  ax.set_ylabel("temporary memory ratio")


def _label(
  ax: axes.Axes, labels: Sequence[tuple[float, float, str, str]]
) -> None:
  """Writes each name above its point, below names that are already there."""
  bottom, top = ax.transScale.transform([(1, y) for y in ax.get_ylim()])[:, 1]
  middle = np.sqrt(ax.get_xlim()[0] * ax.get_xlim()[1])
  height_points = 290  # Of a panel, about; a line of text takes 11.
  taken: list[float] = []
  for x, y, name, color in sorted(labels, key=lambda label: -label[1]):
    share = (ax.transScale.transform((1, y))[1] - bottom) / (top - bottom)
    place = share * height_points + 8
    while any(abs(place - other) < 11 for other in taken):
      place -= 1
    taken.append(place)
    ax.annotate(
      name,
      (x, y),
      # Inwards, so that no name leaves the panel.
      xytext=(4 if x < middle else -4, place - share * height_points),
      ha="left" if x < middle else "right",
      textcoords="offset points",
      va="center",
      fontsize=8,
      color=color,
    )


def write(workdir: pathlib.Path) -> pathlib.Path:
  """Writes `bench.md` and the figure (PNG, PDF) beside `bench.json`.

  Args:
    workdir: folder of a BENCHMARK job.

  Returns:
    The path of the PNG file, in `figures/`.

  Raises:
    ValueError: a damaged record, or one without rows.
  """
  workdir = pathlib.Path(workdir)
  record = records.read_json(workdir / "bench.json")
  records.write_bytes(
    workdir / "bench.md", bench_markdown(record).encode("utf-8")
  )
  name = _SUBJECTS[record["subject"]].file
  return saving.save(draw(record), workdir / "figures" / name)
