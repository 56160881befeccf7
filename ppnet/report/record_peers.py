"""The table of other libraries on a record's features."""

import pathlib
from collections.abc import Mapping
from typing import Any

from ppnet.core import records
from ppnet.report import comparison, tables

_HOLE = "–"
_OPTIMIZERS = {"SGD": "SGD", "ADAM": "Adam", "RMSPROP": "RMSprop"}


def table(record: Mapping[str, Any]) -> str:
  """Rows of a BENCHMARK of RECORD_PEERS, in Markdown, and what to know of them.

  Scores are means over the seeds, with half of Student's 95 % interval. AUC
  stands there for two classes alone.

  Args:
    record: what `bench.json` holds.
  """
  scores = {"accuracy": "accuracy %", "f1": "macro F1 %"}
  if record["num_classes"] == 2:
    scores["auc_roc"] = "AUC %"
  header = [
    "library",
    "recipe",
    "settings",
    "steps",
    "σ",
    "ε, its own",
    "ε, PLD",
    *scores.values(),
  ]
  rows = []
  for row in record["rows"]:
    cells = [row["framework"], row["name"], _settings(row["recipe"])]
    if row["scores"]:
      cells += [
        str(row["num_steps"]),
        f"{row['noise_multiplier']:.3f}",
        tables.format_epsilon(row["epsilon"]),
        tables.format_epsilon(row["epsilon_pld"]),
      ]
      cells += [_mean(row, name) for name in scores]
    else:
      cells += [_HOLE] * (4 + len(scores))
    if row["is_best"]:
      cells = [f"**{cell}**" for cell in cells]
    rows.append(cells)
  users = record.get("num_users")
  of_users = f" of {users:,} users, who are the units," if users else ""
  facts = (
    f"{record['name']}: {record['num_train']:,} training{of_users} and"
    f" {record['num_test']:,} test records, {record['num_features']:,}"
    f" features; ε = {record['epsilon']:g}, δ = {record['delta']:g},"
    f" {record['rounds']} seeds. Bold: a library's best recipe, chosen by"
    " these scores."
  )
  notes = dict.fromkeys(
    f"{row['framework']}: {row['note']}"
    for row in record["rows"]
    if row["note"]
  )
  return "\n\n".join(
    [tables.markdown_table(header, rows, num_left=3), facts, *notes]
  )


def write(workdir: pathlib.Path) -> str:
  """Writes `bench.md` beside `bench.json`; returns what it holds."""
  text = table(records.read_json(workdir / "bench.json"))
  records.write_bytes(workdir / "bench.md", (text + "\n").encode())
  return text


def _mean(row: Mapping[str, Any], name: str) -> str:
  """A score over the seeds, in percent."""
  mean, half = comparison.interval(
    [tables.to_float(score[name]) for score in row["scores"]]
  )
  if len(row["scores"]) == 1:
    return f"{100 * mean:.1f}"
  return f"{100 * mean:.1f} ± {100 * half:.1f}"


def _settings(recipe: Mapping[str, Any]) -> str:
  """What the recipe sets, in a line."""
  momentum = f", momentum {recipe['momentum']:g}" if recipe["momentum"] else ""
  parts = [
    f"{_OPTIMIZERS[recipe['optimizer']]} {recipe['learning_rate']:g}{momentum}",
    f"batch {recipe['batch_size']}",
    f"{recipe['num_epochs']:.3g} epochs",
    f"C {recipe['l2_clip_norm']:g}",
  ]
  if recipe["is_cosine"]:
    parts.insert(1, "cosine")
  if recipe["is_rescaled"] and recipe["l2_clip_norm"] != 1:
    parts.append("gradients over C")
  if recipe["feature_norm"]:
    parts.append(f"features of norm {recipe['feature_norm']:g}")
  return "; ".join(parts)
