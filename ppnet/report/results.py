"""Tables of what models reached and leaked, from the records of audits alone.

A cell of such a table is the `audit.json` of one task and one row: several
models that were trained side by side, differing in seed and records. Numbers
are means over them with Student's 95 % interval. Rows are compared with a
baseline row by paired tests, Holm-corrected over all tests of the table. A
record that is not there is a hole, and is named; nothing is filled in.
"""

import csv
import dataclasses
import io
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from ppnet.core import records
from ppnet.report import comparison, latex, tables

# Name in a record -> what a person calls it. Of each model.
MEASURED = {
  "accuracy": "accuracy",
  "f1": "macro F1",
  "auc_roc": "AUC-ROC",
  "leakage": "leakage",
  "attack_auc": "attack AUC",
  "tpr_at_0.1_fpr": "TPR at 0.1 % FPR",
}
# Of the mechanism: the same for all models of a cell.
CLAIMED = {"epsilon": "claimed ε", "epsilon_lower_bound": "audited ε ≥"}
_SIGNIFICANT = 0.05
_MARK = "†"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
  """What one audit recorded.

  Attributes:
    task: what was learnt.
    row: by which model.
    values: name of `MEASURED` -> one number per model; without those that are
      not defined, as AUC-ROC where a class has no test record.
    claims: name of `CLAIMED` -> number, infinite where nothing is promised,
      NaN where nothing was found.
    is_contradicted: whether a bound is above what its claim allows; bounds
      that assume a shape of the trade-off curve have a claim of their own.
    record: all of `audit.json`.
  """

  task: str
  row: str
  values: Mapping[str, Sequence[float]]
  claims: Mapping[str, float]
  record: Mapping[str, Any]
  is_contradicted: bool = False


def read_cell(folder: pathlib.Path, *, task: str, row: str) -> Cell | None:
  """The record of a finished cell; None where there is none."""
  path = folder / "audit.json"
  if not path.exists():
    return None
  record = records.read_json(path)
  models = [
    {**utility, **leaked}
    for utility, leaked in zip(
      record["utility"], record["membership"]["by_model"], strict=True
    )
  ]
  bounds = [tables.to_float(row["epsilon"]) for row in record["bounds"]]
  return Cell(
    task=task,
    row=row,
    values={
      name: [tables.to_float(model.get(name)) for model in models]
      for name in MEASURED
      if all(
        math.isfinite(tables.to_float(model.get(name))) for model in models
      )
    },
    claims={
      "epsilon": tables.to_float(record["claim"]["epsilon"]),
      "epsilon_lower_bound": max(bounds, default=math.nan),
    },
    is_contradicted=any(row["exceeds"] for row in record["bounds"]),
    record=record,
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
  """A table, complete or with holes.

  Attributes:
    title: above it.
    tasks: in order.
    rows: in order.
    baseline: the row that others are tested against; "" tests nothing.
    cells: (task, row) -> what was recorded; without the holes.
    p_values: (task, row, name) -> Holm-adjusted p-value of the paired test
      against the baseline.
    remarks: further notes.
  """

  title: str
  tasks: Sequence[str]
  rows: Sequence[str]
  baseline: str
  cells: Mapping[tuple[str, str], Cell]
  p_values: Mapping[tuple[str, str, str], float]
  remarks: Sequence[str] = ()

  @property
  def holes(self) -> list[tuple[str, str]]:
    """(task, row) of what has no record."""
    return [
      (task, row)
      for task in self.tasks
      for row in self.rows
      if (task, row) not in self.cells
    ]


def collect(
  found: Sequence[Cell],
  *,
  title: str,
  tasks: Sequence[str],
  rows: Sequence[str],
  baseline: str,
  remarks: Sequence[str] = (),
) -> Results:
  """Compares the cells that are there.

  Raises:
    ValueError: the models of two rows of a task are not as many.
  """
  cells = {(cell.task, cell.row): cell for cell in found}
  p_values = {}
  for (task, row), cell in cells.items():
    other = cells.get((task, baseline))
    if other is None or row == baseline:
      continue
    for name in cell.values.keys() & other.values.keys():
      p_values[task, row, name] = comparison.paired_p_value(
        cell.values[name], other.values[name]
      )
  return Results(
    title=title,
    tasks=tasks,
    rows=rows,
    baseline=baseline,
    cells=cells,
    p_values=comparison.holm(p_values),
    remarks=remarks,
  )


def header() -> list[str]:
  """Names of the columns."""
  return ["task", "model", *MEASURED.values(), *CLAIMED.values()]


def lines(results: Results) -> list[list[str]]:
  """The table's cells as text, one list per task and row."""
  return [
    [task, row, *_texts(results, task, row)]
    for task in results.tasks
    for row in results.rows
  ]


def _texts(results: Results, task: str, row: str) -> list[str]:
  """What stands behind the names of task and row."""
  cell = results.cells.get((task, row))
  if cell is None:
    return [tables.HOLE] * (len(MEASURED) + len(CLAIMED))
  texts = []
  for name in MEASURED:
    values = cell.values.get(name)
    if values is None:
      texts.append(tables.HOLE)
      continue
    mean, half = comparison.interval(values)
    text = f"{mean:.3f}" + ("" if math.isnan(half) else f" ± {half:.3f}")
    p_value = results.p_values.get((task, row, name), math.nan)
    texts.append(text + (f" {_MARK}" if p_value <= _SIGNIFICANT else ""))
  texts.append(tables.format_epsilon(cell.claims["epsilon"]))
  bound = cell.claims["epsilon_lower_bound"]
  # Rounded down: a bound may be rounded to a weaker one.
  texts.append(
    tables.HOLE if math.isnan(bound) else f"{math.floor(bound * 100) / 100:.2f}"
  )
  return texts


def notes(results: Results) -> list[str]:
  """What a reader must know, one sentence or two each."""
  found = [
    "Mean ± 95 % interval (Student) over the models of a cell, which differ in"
    " seed and in which half of the records each was trained on. Leakage is"
    " the membership advantage of the strongest attack, on the training"
    " records of all models: neither it nor anything beside claimed ε is"
    " covered by a guarantee. ∞ is no guarantee.",
  ]
  if results.p_values:
    found.append(
      f"{_MARK} differs from {results.baseline} (paired t-test, p ≤"
      f" {_SIGNIFICANT} after Holm's correction over {len(results.p_values)}"
      " tests)."
    )
  undefined = {
    f"{title} on {task}"
    for (task, _), cell in results.cells.items()
    for name, title in MEASURED.items()
    if name in cell.record["utility"][0] and name not in cell.values
  }
  if undefined:
    found.append(
      f"{tables.HOLE} not defined on the test split: "
      + "; ".join(sorted(undefined))
      + "."
    )
  found += results.remarks
  exceeded = [
    f"{task}, {row}"
    for (task, row), cell in results.cells.items()
    if cell.is_contradicted
  ]
  if exceeded:
    found.append(
      "THE AUDIT CONTRADICTS THE CLAIM: "
      + "; ".join(exceeded)
      + ". Do not rely on this ε."
    )
  if results.holes:
    found.append(
      f"{tables.HOLE} no record: "
      + "; ".join(f"{task}, {row}" for task, row in results.holes)
      + "."
    )
  return found


def markdown(results: Results) -> str:
  """Title, table and notes."""
  parts = [
    f"# {results.title}",
    tables.markdown_table(header(), lines(results), num_left=2),
    *notes(results),
  ]
  return "\n\n".join(parts)


def write(results: Results, workdir: pathlib.Path) -> str:
  """Writes `table.json`, `table.md`, `table.tex` and `table.csv`.

  Returns:
    The table in Markdown.
  """
  text = markdown(results)
  records.write_json(workdir / "table.json", _plain(results))
  records.write_bytes(workdir / "table.md", f"{text}\n".encode())
  records.write_bytes(workdir / "table.tex", _latex(results).encode())
  records.write_bytes(workdir / "table.csv", _csv(results).encode())
  return text


def _plain(results: Results) -> dict[str, Any]:
  """The table unrounded."""
  return {
    "title": results.title,
    "baseline": results.baseline,
    "holes": results.holes,
    "rows": [
      {
        "task": cell.task,
        "model": cell.row,
        "num_models": max(map(len, cell.values.values()), default=0),
        **{name: list(values) for name, values in cell.values.items()},
        **cell.claims,
        "p_values": {
          name: results.p_values[cell.task, cell.row, name]
          for name in cell.values
          if (cell.task, cell.row, name) in results.p_values
        },
      }
      for cell in results.cells.values()
    ],
  }


def _csv(results: Results) -> str:
  """One line per model, unrounded."""
  out = io.StringIO(newline="")
  writer = csv.writer(out, lineterminator="\n")
  writer.writerow(["task", "model", "number", *MEASURED, *CLAIMED])
  for cell in results.cells.values():
    count = max(map(len, cell.values.values()), default=0)
    for number in range(count):
      measured = [
        cell.values[name][number] if name in cell.values else ""
        for name in MEASURED
      ]
      writer.writerow(
        [cell.task, cell.row, number, *measured, *cell.claims.values()]
      )
  return out.getvalue()


def _latex(results: Results) -> str:
  """A rule between tasks, whose names stand once."""
  rows: list[list[str]] = []
  for number, line in enumerate(lines(results)):
    if number and number % len(results.rows) == 0:
      rows.append([])
    first = number % len(results.rows) == 0
    rows.append([line[0] if first else "", *line[1:]])
  return latex.table(header(), rows, num_left=2, notes=notes(results))
