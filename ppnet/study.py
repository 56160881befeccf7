"""Tables of experiments: one folder and one process per cell, restartable.

A cell is a task and a row, and a job of its own: an AUDIT, whose models are
trained side by side, scored on the test split and attacked; or a TRAIN, for
figures of how training went. What is done is not done again; whoever deletes a
cell's folder gets it anew.
"""

import dataclasses
import os
import pathlib
import runpy
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any

from ppnet import config as config_lib
from ppnet import sweep, table_config
from ppnet.core import checks, records, workdirs
from ppnet.report import (
  attention,
  figures,
  page,
  results,
  robustness,
  saving,
  tables,
  tradeoff,
  training_rows,
)

_CHOSEN = {
  config_lib.Tuning.NONE: (
    "Hyper-parameters were not chosen by looking at runs on these records: no"
    " budget was spent on them."
  ),
  config_lib.Tuning.PUBLIC: (
    "Hyper-parameters were chosen on public data alone: no budget was spent on"
    " them."
  ),
  config_lib.Tuning.PRIVATE: (
    "Hyper-parameters were chosen by looking at runs on private records: no"
    " claimed ε of this table covers that choice. What it costs stands in the"
    " summary of the sweep (Papernot and Steinke 2022)."
  ),
}
_FINAL = ("accuracy", "f1", "auc_roc", "epsilon", "leakage")
_LINES_OF_A_FAILURE = 20
_MODELS_AT_ONCE = config_lib.AuditConfig().models_at_once
# What may differ between a cell as it was made and as a table asks for it: who
# asks, where data lie, and the machine. Fields, and groups of fields.
_MAY_DIFFER = (
  "tuning",
  "name",
  "job",
  "topology",
  "compile_search",
  "data.path",
  "data.prepared_dir",
  "data.prepare_workers",
  "audit.models_at_once",
  "perf.",
  "mesh.",
  "table.",
  "bench.",
  "generate.",
  "account.",
)


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
  flags = [f"--config={config.table.cell_config}:{_argument(config, cell)}"]
  for field, value in _overrides(config, workdir, cell).items():
    shown = value.name if isinstance(value, config_lib.Job) else value
    flags.append(f"--config.{field}={shown}")
  return sweep.main_command([*flags, f"--workdir={cell.folder}"])


def cell_config(
  config: config_lib.ExperimentConfig, workdir: pathlib.Path, cell: Cell
) -> config_lib.ExperimentConfig:
  """The configuration that `command` gives a cell."""
  make = runpy.run_path(config.table.cell_config)["get_config"]
  made = make(_argument(config, cell))
  for field, value in _overrides(config, workdir, cell).items():
    owner, *parents = made, *field.split(".")[:-1]
    for parent in parents:
      owner = getattr(owner, parent)
    setattr(owner, field.split(".")[-1], value)
  return made


def _argument(config: config_lib.ExperimentConfig, cell: Cell) -> str:
  """What a cell's config file is given."""
  return ",".join((cell.task, cell.name, config.table.size, config.data.path))


def _overrides(
  config: config_lib.ExperimentConfig, workdir: pathlib.Path, cell: Cell
) -> dict[str, Any]:
  """Field of a cell's configuration -> what the table sets it to."""
  is_results = config.table.subject is config_lib.TableSubject.RESULTS
  prepared = cells_dir(config, workdir) / "prepared" / cell.task
  at_once = config.audit.models_at_once
  return {
    "job": config_lib.Job.AUDIT if is_results else config_lib.Job.TRAIN,
    "seed": config.seed,
    "audit.num_models": config.audit.num_models,
    "data.prepared_dir": str(prepared),
  } | (
    # How many a device bears is the cell's to say, unless somebody has said.
    {"audit.models_at_once": at_once} if at_once != _MODELS_AT_ONCE else {}
  )


# Of a cell's configuration and folder; see `audit.attention`, which is given
# from above: this file does not start a device.
Maps = Callable[[config_lib.ExperimentConfig, pathlib.Path], dict[str, Any]]


def table(
  config: config_lib.ExperimentConfig, workdir: pathlib.Path, *, maps: Maps
) -> str:
  """Runs the cells that are missing, then writes table and figures.

  | subject | written |
  | --- | --- |
  | RESULTS | `table.json`, `.md`, `.tex`, `.csv`, `.html`; `figures/tradeoff` |
  | | where there is a knob, `figures/robustness` where it was measured, |
  | | `figures/attention_TASK` of the first row with attention noise |
  | TRAINING | `figures/losses`, `figures/indicators`; `table.html` |

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
    maps: attention of a finished audit's first model.

  Returns:
    The table in Markdown, or for TRAINING the runs' final numbers.

  Raises:
    ValueError: a cell that is there was made under another configuration.
    RuntimeError: a cell has no record; the rest is written all the same.
  """
  written, holes = _table(config, workdir, maps)
  page.write(
    workdir / "table.html",
    page.page(
      [written.chapter],
      title=written.chapter.title,
      configs=written.configs,
      hole=tables.HOLE,
    ),
  )
  _check_holes(written.text, holes, len(cells(config, workdir)))
  return written.text


def collection(
  config: config_lib.ExperimentConfig, workdir: pathlib.Path, *, maps: Maps
) -> str:
  """Makes several tables that share their cells, and one page of all.

  Each table is in `workdir/NAME`, as `table` writes it, NAME that of its config
  file; the page is `table.html`. A part with holes takes no other with it.

  Args:
    config: with a COLLECTION.
    workdir: of the collection; the cells' too, unless `table.cells_dir` is set.
    maps: see `table`.

  Returns:
    The tables in Markdown.

  Raises:
    ValueError: see `table`.
    RuntimeError: see `table`; all is written all the same.
  """
  tables_of = {}
  for part in table_config.names(config.table.parts):
    own = runpy.run_path(part)["get_config"](config.table.size)
    own.seed = config.seed
    own.data.path = config.data.path
    own.audit.num_models = config.audit.num_models
    own.audit.models_at_once = config.audit.models_at_once
    own.table.cells_dir = str(cells_dir(config, workdir))
    own.table.cells_at_once = config.table.cells_at_once
    folder = workdir / pathlib.Path(part).stem
    _check_done(own, folder)  # Of all parts before the first is run.
    tables_of[folder] = own
  done: list[_Written] = []
  holes: list[Cell] = []
  num_cells = 0
  for folder, own in tables_of.items():
    folder.mkdir(parents=True, exist_ok=True)
    print(f"== {own.table.title}", flush=True)
    written, missing = _table(own, folder, maps)
    done.append(written)
    holes += missing
    num_cells += len(cells(own, folder))
  page.write(
    workdir / "table.html",
    page.page(
      [written.chapter for written in done],
      title=config.table.title or config.name,
      configs={
        name: made for written in done for name, made in written.configs.items()
      },
      hole=tables.HOLE,
    ),
  )
  text = "\n\n".join(written.text for written in done)
  _check_holes(text, holes, num_cells)
  return text


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Written:
  """One table: for the terminal, for a page, and what its cells ran."""

  text: str
  chapter: page.Chapter
  configs: dict[str, Any]


def _table(
  config: config_lib.ExperimentConfig, workdir: pathlib.Path, maps: Maps
) -> tuple[_Written, list[Cell]]:
  """Runs what is missing and writes all but the page; also what has failed."""
  _check_done(config, workdir)
  _run_missing(config, workdir)
  if config.table.subject is config_lib.TableSubject.RESULTS:
    text, chapter = _write_results(config, workdir, maps)
  else:
    text, chapter = _write_training(config, workdir)
  done = [cell for cell in cells(config, workdir) if is_done(config, cell)]
  written = _Written(
    text=text,
    chapter=chapter,
    configs={
      # Two tables may have a cell under two names.
      f"{cell.folder.parent.parent.name}/{cell.task}/{cell.name}": (
        records.read_json(cell.folder / "config.json")
      )
      for cell in done
    },
  )
  return written, [
    cell for cell in cells(config, workdir) if not is_done(config, cell)
  ]


def _check_holes(text: str, holes: Sequence[Cell], num_cells: int) -> None:
  """Raises where a cell has no record; what there is, is shown first."""
  if holes:
    print(text)
    raise RuntimeError(
      f"{len(holes)} of {num_cells} cells have no record: "
      + "; ".join(f"{cell.task}, {cell.row}" for cell in holes)
      + ". What went wrong stands above. Give the same command again to run"
      " them alone."
    )


def _write_results(
  config: config_lib.ExperimentConfig, workdir: pathlib.Path, maps: Maps
) -> tuple[str, page.Chapter]:
  """Table and figures of audits."""
  found = collect(config, workdir)
  text = results.write(found, workdir)
  pictures = []
  if config.table.knob:
    pictures += _draw_tradeoff(found, config, workdir)
  pictures += _listed(robustness.write(found, workdir), "robustness")
  attentions, problems = _draw_attention(config, workdir, maps)
  done = [cell for cell in cells(config, workdir) if is_done(config, cell)]
  rows, width = results.lines(found), len(found.rows)
  chapter = page.Chapter(
    title=found.title,
    header=results.header(),
    groups=[rows[i : i + width] for i in range(0, len(rows), width)],
    notes=[*results.notes(found), *problems],
    sections=[
      page.Section(pictures=pictures),
      page.Section(
        title="Attention without noise and with it", pictures=attentions
      ),
      page.Section(
        title="ROC curves of the attacks",
        is_grid=True,
        pictures=[
          page.Picture(path=path, caption=f"{cell.task}, {cell.row}")
          for cell in done
          if (path := cell.folder / "figures" / "roc.png").exists()
        ],
      ),
    ],
  )
  return text, chapter


def _listed(path: pathlib.Path | None, caption: str) -> list[page.Picture]:
  """A picture, or none."""
  return [] if path is None else [page.Picture(path=path, caption=caption)]


def _draw_attention(
  config: config_lib.ExperimentConfig, workdir: pathlib.Path, maps: Maps
) -> tuple[list[page.Picture], list[str]]:
  """Of each task, the maps of its first row that has attention noise.

  They are computed once and kept in the cell's folder; from a folder that came
  without its data or its models there are none, and a sentence says why.
  """
  pictures, problems = [], []
  shown: set[str] = set()
  for cell in cells(config, workdir):
    if cell.task in shown or not is_done(config, cell):
      continue
    own = cell_config(config, workdir, cell)
    if not own.attention_noise.stddev:
      continue
    shown.add(cell.task)
    path = cell.folder / "attention.json"
    name = f"{cell.task}, {cell.row}"
    if not path.exists():
      try:
        records.write_json(path, maps(own, cell.folder))
      except (ValueError, OSError) as error:
        problems.append(f"No attention maps of {name}: {error}")
        continue
    fig = attention.draw(records.read_json(path))
    stem = workdir / "figures" / f"attention_{cell.task}"
    pictures += _listed(saving.save(fig, stem), f"{name}: the first model")
  return pictures, problems


def _write_training(
  config: config_lib.ExperimentConfig, workdir: pathlib.Path
) -> tuple[str, page.Chapter]:
  """Figures of how training went, and what it came to."""
  done = [cell for cell in cells(config, workdir) if is_done(config, cell)]
  pictures = []
  text = ""
  if done:
    drawn = training_rows.write(
      {(cell.task, cell.row): figures.read(cell.folder) for cell in done},
      workdir,
    )
    pictures = [
      page.Picture(path=path, caption=f"{path.stem} by epoch") for path in drawn
    ]
    rows = [
      {"task": cell.task, "model": cell.row}
      | records.read_json(cell.folder / "summary.json")
      for cell in done
    ]
    text = tables.sweep_table(rows, ["task", "model", *_FINAL])
  return text, page.Chapter(
    title=config.table.title or config.name,
    header=[],
    groups=[],
    notes=_how_chosen(config, workdir),
    sections=[page.Section(pictures=pictures)],
  )


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
    remarks=_how_chosen(config, workdir),
  )


def _how_chosen(
  config: config_lib.ExperimentConfig, workdir: pathlib.Path
) -> list[str]:
  """On what data hyper-parameters were chosen, by the cells' configurations."""
  said = {
    cell_config(config, workdir, cell).tuning for cell in cells(config, workdir)
  }
  return [_CHOSEN[kind] for kind in config_lib.Tuning if kind in said]


def _check_done(
  config: config_lib.ExperimentConfig, workdir: pathlib.Path
) -> None:
  """Raises where a finished cell is not the one that this table asks for.

  Of a cell that a former version ran, fields that came since count as their
  defaults (`workdirs.completed`), and fields that are gone say nothing.
  """
  may_differ = _MAY_DIFFER
  if config.table.subject is config_lib.TableSubject.TRAINING:
    may_differ += ("audit.",)  # Nothing is attacked.
  for cell in cells(config, workdir):
    if not is_done(config, cell):
      continue
    asked = cell_config(config, workdir, cell)
    found = records.read_json(cell.folder / "config.json")["config"]
    old = workdirs.flatten(workdirs.completed(found, asked))
    new = workdirs.flatten(records.to_plain(asked))
    ignored = old.keys() - new.keys()
    ignored |= {name for name in old if workdirs.is_among(name, may_differ)}
    if differing := workdirs.differences(old, new, ignore=ignored):
      checks.fail(
        f"{cell.folder} to hold the cell of this table",
        "Set these back, give another table.cells_dir, or delete that folder.",
        differing=differing,
      )


def _run_missing(
  config: config_lib.ExperimentConfig, workdir: pathlib.Path
) -> None:
  """Runs the cells that are not done, `table.cells_at_once` at a time.

  Each is a process of its own, so one that fails takes no other with it. One at
  a time, a cell speaks to the terminal; of several, each to a file beside its
  folder, whose end is shown where it fails.
  """
  todo = [cell for cell in cells(config, workdir) if not is_done(config, cell)]
  at_once = min(config.table.cells_at_once, len(todo))

  def run(number: int, cell: Cell) -> None:
    name = f"[{number}/{len(todo)}] {cell.task}, {cell.row}"
    asked = command(config, workdir, cell)
    env = environment(cells_dir(config, workdir), at_once=at_once)
    if at_once == 1:
      print(name, flush=True)
      subprocess.run(asked, check=False, env=env)
      return
    log = cell.folder.with_name(f"{cell.folder.name}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"{name}: begins; {log}", flush=True)
    started = time.monotonic()
    with log.open("wb") as out:
      done = subprocess.run(
        asked, check=False, env=env, stdout=out, stderr=subprocess.STDOUT
      )
    minutes = (time.monotonic() - started) / 60
    if not done.returncode:
      print(f"{name}: done in {minutes:.1f} min", flush=True)
      return
    said = log.read_text(errors="replace").replace("\r", "\n").splitlines()
    told = "\n".join(f"  {line}" for line in said[-_LINES_OF_A_FAILURE:])
    print(f"{name}: failed with {done.returncode}\n{told}", flush=True)

  with futures.ThreadPoolExecutor(max(1, at_once)) as pool:
    started = [
      pool.submit(run, number, cell) for number, cell in enumerate(todo, 1)
    ]
    try:
      for one in futures.as_completed(started):
        one.result()
    except BaseException:  # Of Ctrl-C as well: no further cell begins.
      pool.shutdown(wait=False, cancel_futures=True)
      raise


def environment(folder: pathlib.Path, *, at_once: int = 1) -> dict[str, str]:
  """The cells' environment: they share what they compiled, and the cores.

  Most rows of a task run the same programs, and a short cell spends half of its
  time on compiling. Whatever somebody set stays.

  Args:
    folder: of the table's cells.
    at_once: cells that run side by side. On a CPU an AUDIT makes each core a
      device; each of several cells gets its part of them.
  """
  shared = {
    "JAX_COMPILATION_CACHE_DIR": str(folder.resolve() / "compiled"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
  }
  if at_once > 1:
    devices = max(1, (os.cpu_count() or 1) // at_once)
    shared["JAX_NUM_CPU_DEVICES"] = str(devices)
  return shared | os.environ


def _draw_tradeoff(
  found: results.Results,
  config: config_lib.ExperimentConfig,
  workdir: pathlib.Path,
) -> list[page.Picture]:
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
  if not knobs:
    return []
  path = tradeoff.write(found, knobs, field=field, workdir=workdir)
  return _listed(path, f"utility and leakage over {field}")
