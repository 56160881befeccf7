"""Tables of results: one folder and one process for each cell, restartable.

A cell is a task and a row, and an AUDIT job of its own: its models are trained
side by side, scored on the test split and attacked. What is done is not done
again; whoever deletes a cell's folder gets it anew.
"""

import dataclasses
import pathlib
import subprocess

from ppnet import config as config_lib
from ppnet import sweep, table_config
from ppnet.core import records
from ppnet.report import page, results, tables, tradeoff


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
  """One experiment of a table.

  Attributes:
    task: what is learnt.
    row: by which model, under which mechanisms.
    folder: its workdir.
  """

  task: str
  row: str
  folder: pathlib.Path

  @property
  def is_done(self) -> bool:
    """Whether its record is there."""
    return (
      results.read_cell(self.folder, task=self.task, row=self.row) is not None
    )


def cells(
  config: config_lib.ExperimentConfig, workdir: pathlib.Path
) -> list[Cell]:
  """The cells of a table, task by task."""
  return [
    Cell(task=task, row=row, folder=workdir / "cells" / task / row)
    for task in table_config.names(config.table.tasks)
    for row in table_config.names(config.table.rows)
  ]


def command(
  config: config_lib.ExperimentConfig, workdir: pathlib.Path, cell: Cell
) -> list[str]:
  """The command of one cell, which a person may give as well.

  A cell takes the table's seed, folder of data, and number of models; all rows
  of a task share one folder of prepared data.
  """
  table, audit = config.table, config.audit
  flags = [
    f"--config={table.cell_config}:"
    + ",".join((cell.task, cell.row, table.size, config.data.path)),
    f"--config.seed={config.seed}",
    f"--config.audit.num_models={audit.num_models}",
    f"--config.audit.models_at_once={audit.models_at_once}",
    f"--config.data.prepared_dir={workdir / 'prepared' / cell.task}",
    f"--workdir={cell.folder}",
  ]
  return sweep.main_command(flags)


def table(config: config_lib.ExperimentConfig, workdir: pathlib.Path) -> str:
  """Runs the cells that are missing, then writes the table from records.

  Writes `table.json`, `.md`, `.tex`, `.csv` and `.html`, and, where there is
  a knob, `figures/tradeoff.png` and `.pdf`.

  Args:
    config: with a RESULTS table.
    workdir: of the table; holds `cells/TASK/ROW/` and `prepared/TASK/`.

  Returns:
    The table in Markdown.

  Raises:
    RuntimeError: a cell failed; the table is written, with a hole.
  """
  failed = _run_missing(config, workdir)
  found = collect(config, workdir)
  text = results.write(found, workdir)
  if config.table.knob:
    _draw_tradeoff(found, config, workdir)
  _write_page(found, config, workdir)
  if failed or found.holes:
    print(text)
    raise RuntimeError(
      f"{len(found.holes)} of {len(cells(config, workdir))} cells have no"
      " record: "
      + "; ".join(f"{task}, {row}" for task, row in found.holes)
      + ". What went wrong stands above. Give the same command again to run"
      " them alone."
    )
  return text


def collect(
  config: config_lib.ExperimentConfig, workdir: pathlib.Path
) -> results.Results:
  """The table from the records that are there; trains nothing."""
  options = config.table
  found = [
    results.read_cell(cell.folder, task=cell.task, row=cell.row)
    for cell in cells(config, workdir)
  ]
  return results.collect(
    [cell for cell in found if cell is not None],
    title=options.title or config.name,
    tasks=table_config.names(options.tasks),
    rows=table_config.names(options.rows),
    baseline=options.baseline,
  )


def _run_missing(
  config: config_lib.ExperimentConfig, workdir: pathlib.Path
) -> list[Cell]:
  """Runs the cells that are not done, in turn; returns those that failed.

  Each is a process of its own, so one that fails takes no other with it.
  """
  todo = [cell for cell in cells(config, workdir) if not cell.is_done]
  failed = []
  for number, cell in enumerate(todo, start=1):
    print(f"[{number}/{len(todo)}] {cell.task}, {cell.row}", flush=True)
    done = subprocess.run(command(config, workdir, cell), check=False)
    if done.returncode:
      failed.append(cell)
  return failed


def _draw_tradeoff(
  found: results.Results,
  config: config_lib.ExperimentConfig,
  workdir: pathlib.Path,
) -> None:
  """Utility and leakage over what the rows differ in."""
  field = config.table.knob
  knobs = {
    (cell.task, cell.row): tradeoff.knob_of(
      found.cells[cell.task, cell.row],
      records.read_json(cell.folder / "config.json"),
      field,
    )
    for cell in cells(config, workdir)
    if (cell.task, cell.row) in found.cells
  }
  if knobs:
    tradeoff.write(found, knobs, field=field, workdir=workdir)


def _write_page(
  found: results.Results,
  config: config_lib.ExperimentConfig,
  workdir: pathlib.Path,
) -> None:
  """The table with the cells' pictures and configurations in one file."""
  done = [cell for cell in cells(config, workdir) if cell.is_done]
  rows = results.lines(found)
  width = len(found.rows)
  page.write(
    workdir / "table.html",
    page.page(
      title=found.title,
      header=results.header(),
      groups=[rows[i : i + width] for i in range(0, len(rows), width)],
      notes=results.notes(found),
      figures=sorted((workdir / "figures").glob("*.png")),
      configs={
        f"{cell.task}, {cell.row}": records.read_json(
          cell.folder / "config.json"
        )
        for cell in done
      },
      hole=tables.HOLE,
    ),
  )
