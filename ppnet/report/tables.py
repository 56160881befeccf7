"""Plain-text tables and CSV files of runs, from their `summary.json` records.

A table never shows a number without what it depends on: epsilon comes with
delta and the neighbouring relation, is rounded up, and is infinite for a run
without a guarantee; a run whose noise was seeded carries a mark. A value that a
record does not have is a hole, never a zero.

>>> print(sweep_table(
...   [{"seed": 0, "epsilon": 1.991}, {"seed": 1, "epsilon": "inf"}],
...   ["seed", "epsilon", "accuracy"],
... ))
seed     ε  accuracy
----  ----  --------
   0  2.00         –
   1     ∞         –
"""

import csv
import io
import math
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from ppnet.core import checks, records

HOLE = "–"
SEEDED_MARK = "*"
SEEDED_NOTE = (
  f"{SEEDED_MARK} The DP noise or the sampler was seeded: the guarantee does"
  " not hold towards anyone who knows the seed."
)
_WIDTH = 78

# Field of summary.json → what a person calls it.
_LABELS = {
  "accuracy": "accuracy",
  "f1": "macro F1",
  "auc_roc": "AUC-ROC",
  "bits_per_byte": "bits per byte",
  "perplexity": "perplexity (per token)",
  "epsilon": "ε",
  "delta": "δ",
  "noise_multiplier": "noise multiplier",
  "num_steps": "steps",
  "nonprivate/clipped_fraction": "clipped fraction †",
  "leakage": "leakage (membership advantage) †",
}
# A run has those of its task: of classes, or of words.
_CLASS_SCORES = ("accuracy", "f1", "auc_roc")
_WORD_SCORES = ("bits_per_byte", "perplexity")
NONPRIVATE_NOTE = (
  "† Computed exactly from private data; not covered by the guarantee."
)


def to_float(value: object) -> float:
  """Reads a number from a record; NaN where there is none.

  Records hold "inf" and "nan" as strings, because JSON has neither.

  Args:
    value: a number, one of those strings, or None.

  Returns:
    The number, or NaN for None and for anything that is not a number.
  """
  if isinstance(value, bool) or not isinstance(value, int | float | str):
    return math.nan
  try:
    return float(value)
  except ValueError:
    return math.nan


def format_epsilon(epsilon: float) -> str:
  """Formats epsilon with two digits or more, rounded up.

  A claim may be rounded to a weaker one, never to a stronger one.

  >>> format_epsilon(7.991), format_epsilon(0.00312), format_epsilon(math.inf)
  ('8.00', '0.0032', '∞')

  Args:
    epsilon: at least 0, perhaps infinite; NaN means unknown.

  Returns:
    The text, "∞" for infinity and a dash for NaN.
  """
  if math.isnan(epsilon):
    return HOLE
  if math.isinf(epsilon):
    return "∞"
  digits = 2
  if 0 < epsilon < 0.1:
    digits = 1 - math.floor(math.log10(epsilon))
  scale = 10**digits
  # The slack keeps an exact 8.0, stored as 8.000000000000002, at 8.00.
  return f"{math.ceil(epsilon * scale - 1e-9) / scale:.{digits}f}"


def format_delta(delta: float) -> str:
  """Formats delta: "1e-5", not "1e-05"."""
  if math.isnan(delta):
    return HOLE
  mantissa, _, exponent = f"{delta:.3g}".partition("e")
  return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def format_relation(relation: object) -> str:
  """ADD_OR_REMOVE_ONE → "add or remove one"; "" if there is none."""
  return str(relation or "").replace("_", " ").lower()


def label(name: str) -> str:
  """What a person calls a field of `summary.json`."""
  return _LABELS.get(name, name)


def format_value(name: str, value: object) -> str:
  """Formats the field `name` of a record for people.

  Args:
    name: a key of summary.json, or of a sweep's row.
    value: what the record holds under it; None is a hole.

  Returns:
    The text, without units.
  """
  if value is None:
    return HOLE
  if isinstance(value, bool):
    return "yes" if value else "no"
  number = to_float(value)
  field = name.split("/")[-1].split(".")[-1]
  if field == "epsilon":
    return format_epsilon(number)
  if isinstance(value, str) and math.isnan(number):
    return HOLE if value == "nan" else value
  if math.isnan(number):
    return HOLE if isinstance(value, float) else str(value)
  if math.isinf(number):
    return "∞" if number > 0 else "-∞"
  if field == "delta":
    return format_delta(number)
  if field in ("accuracy", "f1", "auc_roc", "leakage", "bits_per_byte"):
    return f"{number:.4f}"
  if field == "clipped_fraction":
    return f"{number:.1%}"
  if isinstance(value, int):
    return f"{value:,}" if field.startswith("num_") else str(value)
  return f"{number:.4g}"


def summary_table(summary: Mapping[str, object]) -> str:
  """Lays out one run's `summary.json` for a terminal.

  Args:
    summary: the record. What it lacks is shown as a hole, but for leakage and
      the clipped fraction: most runs are not audited, some do not clip.

  Returns:
    Aligned lines, without a newline at the end.
  """
  relation = format_relation(summary.get("neighboring_relation"))
  seeded = bool(summary.get("seeded"))
  has_guarantee = math.isfinite(to_float(summary.get("epsilon")))
  lines = []
  pairs = []
  has_words = any(name in summary for name in _WORD_SCORES)
  absent = _CLASS_SCORES if has_words else _WORD_SCORES
  for name, label in _LABELS.items():
    value = summary.get(name)
    if value is None and name in absent:
      continue
    if value is None and name in ("leakage", "nonprivate/clipped_fraction"):
      continue
    text = format_value(name, value)
    if name == "delta" and not has_guarantee:
      text = HOLE
    if name == "epsilon":
      text += SEEDED_MARK if seeded else ""
      if not has_guarantee:
        text += "  (no guarantee)"
      elif relation:
        text += f"  ({relation})"
    pairs.append((label, text))
  width = max(len(label) for label, _ in pairs)
  lines += [f"{label:<{width}}  {text}" for label, text in pairs]
  if any("†" in label for label, _ in pairs):
    lines.append(NONPRIVATE_NOTE)
  if seeded:
    lines += textwrap.wrap(SEEDED_NOTE, _WIDTH, subsequent_indent="  ")
  if summary.get("guarantee"):
    lines += textwrap.wrap(f"Guarantee: {summary['guarantee']}", _WIDTH)
  return "\n".join(lines)


def _cell(row: Mapping[str, object], column: str) -> str:
  """One cell of a sweep's table."""
  text = format_value(column, row.get(column))
  return text + (
    SEEDED_MARK if column == "epsilon" and row.get("seeded") else ""
  )


def sweep_table(
  rows: Sequence[Mapping[str, object]], columns: Sequence[str]
) -> str:
  """Lays out one line per run; numbers to the right, words to the left.

  Args:
    rows: what was varied and what came out, a mapping per run.
    columns: which keys to show, in this order. A run without one has a hole.

  Returns:
    Aligned lines under a header, without a newline at the end.

  Raises:
    ValueError: if there is no column.
  """
  if not columns:
    checks.fail("one column or more", columns=list(columns))
  headers = [label(name) for name in columns]
  cells = [[_cell(row, name) for name in columns] for row in rows]
  widths = [
    max(len(line[index]) for line in [headers, *cells])
    for index in range(len(columns))
  ]
  is_words = [
    any(
      isinstance(row.get(name), str) and math.isnan(to_float(row[name]))
      for row in rows
    )
    for name in columns
  ]

  def join(line: Sequence[str]) -> str:
    padded = [
      text.ljust(width) if words else text.rjust(width)
      for text, width, words in zip(line, widths, is_words, strict=True)
    ]
    return "  ".join(padded).rstrip()

  lines = [join(headers), join(["-" * width for width in widths])]
  lines += [join(line) for line in cells]
  if any("†" in header for header in headers):
    lines.append(NONPRIVATE_NOTE)
  if "epsilon" in columns and any(row.get("seeded") for row in rows):
    lines += textwrap.wrap(SEEDED_NOTE, _WIDTH, subsequent_indent="  ")
  return "\n".join(lines)


def budget_table(budget: Mapping[str, Any]) -> str:
  """Lays out `account.json` as Markdown that is aligned for a terminal as well.

  Args:
    budget: the record of an ACCOUNT job. A pair that no accountant covers is a
      dash, and the reason stands below its table.

  Returns:
    Headings and tables, without a newline at the end.
  """
  relation = format_relation(budget["neighboring_relation"])
  sections = [f"# Privacy budget of {budget['name']}", _budget_facts(budget)]
  if not budget["accountants"]:
    return "\n\n".join([*sections, str(budget["guarantee"])])
  by_accountant = {
    name: [row for row in budget["accountants"] if row["accountant"] == name]
    for name in dict.fromkeys(r["accountant"] for r in budget["accountants"])
  }
  relations = [
    format_relation(row["neighboring_relation"])
    for row in next(iter(by_accountant.values()))
  ]
  samplers = [
    row["sampler"]
    + (f" (at most {row['max_batch_size']:,})" if row["max_batch_size"] else "")
    for row in budget["samplers"]
  ]
  sections += [
    "## ε of this noise, by accountant and by what neighbours are",
    markdown_table(
      ["accountant", *relations],
      [
        [name, *(format_value("epsilon", row["epsilon"]) for row in rows)]
        for name, rows in by_accountant.items()
      ],
    ),
    *_reasons(budget["accountants"], "accountant", "neighboring_relation"),
    f"## ε over the run ({budget['accountant']}, {relation})",
    markdown_table(
      ["steps", "ε"],
      [
        [f"{row['num_steps']:,}", format_value("epsilon", row["epsilon"])]
        for row in budget["over_steps"]
      ],
    ),
    f"## Noise multiplier for another ε after {budget['num_steps']:,} steps",
    markdown_table(
      ["ε", "noise multiplier"],
      [
        [f"{row['epsilon']:g}", _rounded_up(row["noise_multiplier"])]
        for row in budget["needed"]
      ],
    ),
    *_reasons(budget["needed"], "epsilon"),
    "## ε of this noise with other samplers",
    markdown_table(
      ["sampler", "ε"],
      [
        [name, format_value("epsilon", row["epsilon"])]
        for name, row in zip(samplers, budget["samplers"], strict=True)
      ],
    ),
    *_reasons(budget["samplers"], "sampler"),
    "\n".join(textwrap.wrap(f"Guarantee: {budget['guarantee']}", _WIDTH)),
  ]
  return "\n\n".join(sections)


def _budget_facts(budget: Mapping[str, Any]) -> str:
  """What the budget is of."""
  facts = [
    ("training examples (N, public)", f"{budget['num_examples']:,}"),
    ("expected batch size", f"{budget['expected_batch_size']:,}"),
    ("sampler", str(budget["sampler"])),
    (
      "noise over steps",
      f"{budget['num_bands']} bands"
      if budget["noise_mechanism"] == "BANDED"
      else "independent",
    ),
    ("share of N in a batch", f"{budget['sampling_prob']:.6g}"),
    ("steps", f"{budget['num_steps']:,}"),
    ("epochs", f"{budget['epochs']:.4g}"),
    ("δ", format_delta(to_float(budget["delta"]))),
    ("noise multiplier", f"{budget['noise_multiplier']:.5g}"),
    ("noise standard deviation", f"{budget['noise_stddev']:.5g}"),
    ("clip norm C", f"{budget['l2_clip_norm']:g}"),
    ("ε asked for", format_value("epsilon", budget["epsilon_budget"])),
    ("ε", format_value("epsilon", budget["epsilon"])),
  ]
  return markdown_table(["quantity", "value"], [list(fact) for fact in facts])


def _rounded_up(noise_multiplier: float | None) -> str:
  """More noise than needed, never less."""
  if noise_multiplier is None:
    return HOLE
  return f"{math.ceil(noise_multiplier * 1e4 - 1e-9) / 1e4:.4f}"


def _reasons(rows: Sequence[Mapping[str, Any]], *names: str) -> list[str]:
  """Why there are dashes, one line for each; nothing without a dash."""
  lines = [
    "\n".join(
      textwrap.wrap(
        f"{HOLE} "
        + ", ".join(
          format_relation(row[name])
          if name == "neighboring_relation"
          else str(row[name])
          for name in names
        )
        + f": {row['why_not']}",
        _WIDTH,
        subsequent_indent="  ",
      )
    )
    for row in rows
    if row["why_not"]
  ]
  return ["\n".join(lines)] if lines else []


def markdown_table(
  header: Sequence[str], rows: Sequence[Sequence[str]], *, num_left: int = 1
) -> str:
  """A Markdown table with padded columns: words left, the others right.

  >>> print(markdown_table(["sampler", "ε"], [["POISSON", "3.00"]]))
  | sampler |    ε |
  | ------- | ---: |
  | POISSON | 3.00 |

  Args:
    header: a word for each column.
    rows: a cell for each column.
    num_left: how many of the first columns hold words.
  """
  lines = [list(header), *(list(row) for row in rows)]
  widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
  widths[num_left:] = [max(width, 4) for width in widths[num_left:]]

  def join(cells: Sequence[str]) -> str:
    padded = [
      cell.ljust(width) if column < num_left else cell.rjust(width)
      for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return f"| {' | '.join(padded)} |"

  rule = [
    "-" * width if column < num_left else "-" * (width - 1) + ":"
    for column, width in enumerate(widths)
  ]
  return "\n".join([join(lines[0]), join(rule), *map(join, lines[1:])])


def write_csv(
  path: pathlib.Path,
  rows: Sequence[Mapping[str, object]],
  *,
  columns: Sequence[str],
) -> None:
  """Writes the same table unrounded, for machines.

  Args:
    path: the file, replaced atomically.
    rows: one mapping per run.
    columns: which keys to write; a missing or null value is an empty field,
      infinity is "inf".
  """
  text = io.StringIO(newline="")
  writer = csv.writer(text, lineterminator="\n")
  writer.writerow(columns)
  for row in rows:
    plain = [records.to_plain(row.get(name)) for name in columns]
    writer.writerow(["" if value is None else value for value in plain])
  records.write_bytes(path, text.getvalue().encode())
