"""What a TABLE job does, and how choices were made: dataclass, names, checks.

`ppnet.config` gives all of it its public names.
"""

import dataclasses
import enum

from ppnet.core import checks


class Tuning(enum.Enum):
  """On what data one of several runs, or its hyper-parameters, is chosen."""

  NONE = "none"  # Nothing is chosen by looking at runs.
  PUBLIC = "public"  # On public data alone: it costs nothing.
  PRIVATE = "private"  # On private data: see `privacy.selection`.


class TableSubject(enum.Enum):
  """What a table is of."""

  PIPELINES = "pipelines"  # What is done to the records of this experiment.
  RESULTS = "results"  # What models reached, and what they leaked.
  TRAINING = "training"  # How they got there: figures by epoch.
  COLLECTION = "collection"  # Several of the latter two, and one page of all.


@dataclasses.dataclass(slots=True, kw_only=True)
class TableConfig:
  """A table of experiments: tasks times rows, each cell a run of its own.

  Attributes:
    subject: PIPELINES; RESULTS, whose cells are AUDIT jobs; TRAINING, whose
      cells are TRAIN jobs; or COLLECTION. The other fields are about the latter
      three.
    parts: of a COLLECTION alone: config files of tables with commas between
      them, each given `size`. They share cells, seed and number of models.
    title: above the table.
    cell_config: the file in `configs/` that makes one cell's experiment of
      "TASK,ROW,SIZE"; every cell can be run by itself.
    tasks: names with commas between them, known to `cell_config`.
    rows: likewise; several machines may share a table, each with some of them.
      LABEL=ROW prints LABEL for the row that `cell_config` knows as ROW.
    baseline: the row that the others are tested against; empty tests nothing.
    size: "cpu" or "full", known to `cell_config`.
    knob: what rows differ in, for a figure of utility and leakage over it:
      "epsilon", or a field of the cells' configuration such as
      "attention_noise.stddev"; empty draws none.
    cells_dir: where the cells' folders, their prepared data and what was
      compiled for them are; empty means the table's workdir. Tables that share
      one train a cell once for all of them.
    cells_at_once: cells that run side by side, each a process of its own. On a
      CPU they share its cores; on one accelerator more than one does not fit.
  """

  subject: TableSubject = TableSubject.PIPELINES
  parts: str = ""
  title: str = ""
  cell_config: str = ""
  tasks: str = ""
  rows: str = ""
  baseline: str = ""
  size: str = "cpu"
  knob: str = ""
  cells_dir: str = ""
  cells_at_once: int = 1


def names(text: str) -> tuple[str, ...]:
  """The names in a field, without the spaces around them.

  >>> names("fsdd, reviews")
  ('fsdd', 'reviews')
  """
  return tuple(part.strip() for part in text.split(",") if part.strip())


def labels(rows: str) -> dict[str, str]:
  """What a table prints for each row -> its name in `cell_config`.

  >>> labels("plain, private=dp_8")
  {'plain': 'plain', 'private': 'dp_8'}
  """
  pairs = (name.partition("=") for name in names(rows))
  return {
    label.strip(): (row if equals else label).strip()
    for label, equals, row in pairs
  }


def validate(config: TableConfig) -> None:
  """Raises ValueError, naming the field, its value and what to do."""
  checks.positive(**{"table.cells_at_once": config.cells_at_once})
  if config.subject is TableSubject.PIPELINES:
    return
  is_collection = config.subject is TableSubject.COLLECTION
  needed = ("cell_config", "tasks", "rows", "size")
  for field in ("parts", "size") if is_collection else needed:
    if not names(getattr(config, field)):
      checks.fail(
        f"table.{field} not to be empty",
        f"configs/paper/{'all' if is_collection else 'table2'}.py sets it.",
        **{f"table.{field}": getattr(config, field)},
      )
  found = labels(config.rows)
  if not all((*found, *found.values())):
    checks.fail(
      "each of table.rows to be ROW or LABEL=ROW", **{"table.rows": config.rows}
    )
  for field, unique in (
    ("tasks", set(names(config.tasks))),
    ("rows", found),
    ("rows", set(found.values())),
  ):
    given = names(getattr(config, field))
    if len(unique) != len(given):
      checks.fail(
        f"each name in table.{field} once", **{f"table.{field}": given}
      )
