"""Tables of experiments: one folder and one process per cell, restartable.

A cell is a task and a row, and a job of its own: an AUDIT, whose models are
trained side by side, scored on the test split and attacked; or a TRAIN, for
figures of how training went. What is done is not done again; whoever deletes a
cell's folder gets it anew.
"""

import dataclasses
import os
import pathlib
import subprocess

from ppnet import config as config_lib
from ppnet import sweep, table_config
from ppnet.core import records
from ppnet.report import (
  figures,
  page,
  results,
  robustness,
  tables,
  tradeoff,
  training_rows,
)

_FINAL = ("accuracy", "f1", "auc_roc", "epsilon", "leakage")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
  """One experiment of a table.

  Attributes:
    task: what is learnt.
    row: by which model, under which mechanisms; as the table prints it.
    name: the same as the cells' config file knows it.
    folder: its workdir.
  """

  task: str
  row: str
  name: str
  folder: pathlib.Path


def is_done(config: config_lib.ExperimentConfig, cell: Cell) -> bool:
  """Whether a cell's record is there; each job writes its own last."""
  is_results = config.table.subject is config_lib.TableSubject.RESULTS
  return (
    cell.folder / ("audit.json" if is_results else "summary.json")
  ).exists()


def cells(
  config: config_lib.ExperimentConfig, workdir: pathlib.Path
) -> list[Cell]:
  """The cells of a table, task by task."""
  # A folder that holds a run is audited as that run, not by models of its own:
  # tables of either kind may share a `cells_dir`, but no folder.
  is_results = config.table.subject is config_lib.TableSubject.RESULTS
  root = cells_dir(config, workdir) / ("cells" if is_results else "runs")
  return [
    Cell(task=task, row=row, name=name, folder=root / task / name)
    for task in table_config.names(config.table.tasks)
    for row, name in table_config.labels(config.table.rows).items()
  ]


def cells_dir(
  config: config_lib.ExperimentConfig, workdir: pathlib.Path
) -> pathlib.Path:
  """Where cells, prepared data and compiled programs are."""
  return pathlib.Path(config.table.cells_dir or workdir)


def command(
  config: config_lib.ExperimentConfig, workdir: pathlib.Path, cell: Cell
) -> list[str]:
  """The command of one cell, which a person may give as well.

  A cell takes the table's seed, folder of data, and number of models; all rows
  of a task share one folder of prepared data.
  """
  table, audit = config.table, config.audit
  is_results = table.subject is config_lib.TableSubject.RESULTS
  flags = [
    f"--config={table.cell_config}:"
    + ",".join((cell.task, cell.name, table.size, config.data.path)),
    f"--config.job={'AUDIT' if is_results else 'TRAIN'}",
    f"--config.seed={config.seed}",
    f"--config.audit.num_models={audit.num_models}",
    f"--config.audit.models_at_once={audit.models_at_once}",
    f"--config.data.prepared_dir="
    f"{cells_dir(config, workdir) / 'prepared' / cell.task}",
    f"--workdir={cell.folder}",
  ]
  return sweep.main_command(flags)


def table(config: config_lib.ExperimentConfig, workdir: pathlib.Path) -> str:
  """Runs the cells that are missing, then writes table and figures.

  | subject | written |
  | --- | --- |
  | RESULTS | `table.json`, `.md`, `.tex`, `.csv`, `.html`; `figures/tradeoff` |
  | | where there is a knob, `figures/robustness` where it was measured |
  | TRAINING | `figures/losses`, `figures/indicators` |

  The cells' own records are in `table.cells_dir`, or else in the workdir:

  | folder | holds |
  | --- | --- |
  | `cells/TASK/ROW` | an audit; of a RESULTS table |
  | `runs/TASK/ROW` | a training run; of a TRAINING table |
  | `prepared/TASK` | records as all rows of a task read them |
  | `compiled` | programs, so that a process need not compile another's |

  Args:
    config: with a RESULTS or a TRAINING table.
    workdir: of the table.

  Returns:
    The table in Markdown, or for TRAINING the runs' final numbers.

  Raises:
    RuntimeError: a cell has no record; the rest is written all the same.
  """
  _run_missing(config, workdir)
  if config.table.subject is config_lib.TableSubject.RESULTS:
    text = _write_results(config, workdir)
  else:
    text = _write_training(config, workdir)
  holes = [cell for cell in cells(config, workdir) if not is_done(config, cell)]
  if holes:
    print(text)
    raise RuntimeError(
      f"{len(holes)} of {len(cells(config, workdir))} cells have no record: "
      + "; ".join(f"{cell.task}, {cell.row}" for cell in holes)
      + ". What went wrong stands above. Give the same command again to run"
      " them alone."
    )
  return text


def _write_results(
  config: config_lib.ExperimentConfig, workdir: pathlib.Path
) -> str:
  """Table and figures of audits."""
  found = collect(config, workdir)
  text = results.write(found, workdir)
  if config.table.knob:
    _draw_tradeoff(found, config, workdir)
  robustness.write(found, workdir)
  _write_page(found, config, workdir)
  return text


def _write_training(
  config: config_lib.ExperimentConfig, workdir: pathlib.Path
) -> str:
  """Figures of how training went, and what it came to."""
  done = [cell for cell in cells(config, workdir) if is_done(config, cell)]
  if not done:
    return ""
  training_rows.write(
    {(cell.task, cell.row): figures.read(cell.folder) for cell in done},
    workdir,
  )
  rows = [
    {"task": cell.task, "model": cell.row}
    | records.read_json(cell.folder / "summary.json")
    for cell in done
  ]
  return tables.sweep_table(rows, ["task", "model", *_FINAL])


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
    rows=list(table_config.labels(options.rows)),
    baseline=options.baseline,
  )


def _run_missing(
  config: config_lib.ExperimentConfig, workdir: pathlib.Path
) -> None:
  """Runs the cells that are not done, in turn.

  Each is a process of its own, so one that fails takes no other with it.
  """
  todo = [cell for cell in cells(config, workdir) if not is_done(config, cell)]
  for number, cell in enumerate(todo, start=1):
    print(f"[{number}/{len(todo)}] {cell.task}, {cell.row}", flush=True)
    subprocess.run(
      command(config, workdir, cell),
      check=False,
      env=environment(cells_dir(config, workdir)),
    )


def environment(folder: pathlib.Path) -> dict[str, str]:
  """The cells' environment: they share what they compiled.

  Most rows of a task run the same programs, and a short cell spends half of its
  time on compiling. Whatever somebody set stays.
  """
  return {
    "JAX_COMPILATION_CACHE_DIR": str(folder.resolve() / "compiled"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
  } | os.environ


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
  done = [cell for cell in cells(config, workdir) if is_done(config, cell)]
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
