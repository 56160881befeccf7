"""How far a grid of runs has come, and what choosing among them costs.

Everything is read from the runs' folders, so whichever machine writes the
summary last writes all of it. Nothing here starts or waits for a run.
"""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ppnet import config as config_lib
from ppnet.core import records
from ppnet.privacy import selection
from ppnet.report import repeats, tables

FAILED = "failed.json"  # In a run's folder, until it is started again.
_COLUMNS = (
  *repeats.SCORES,
  "epsilon",
  "delta",
  "noise_multiplier",
  "num_steps",
)
# How an accountant's curve needs a run to have been drawn and noised.
_COVERED = {
  "sampler": "POISSON",
  "noise_mechanism": "INDEPENDENT",
  "neighboring_relation": "ADD_OR_REMOVE_ONE",
  "clip_quantile": None,
}
_WORDS = {
  config_lib.Tuning.NONE: (
    "By the configuration's word (tuning=NONE) nothing is chosen from these"
    " runs. Should one be, by scores on private data:"
  ),
  config_lib.Tuning.PUBLIC: (
    "By the configuration's word (tuning=PUBLIC) choices are made on public"
    " data alone: that costs no budget."
  ),
  config_lib.Tuning.PRIVATE: (
    "A run, or its settings, are chosen by scores on private data"
    " (tuning=PRIVATE). That is a release of its own, which a single run's ε"
    " does not cover. Should it be one of these runs:"
  ),
}
_MEANS = "Means over seeds, with half of Student's 95 % interval:"
_METHOD = (
  "Papernot and Steinke 2022 (https://arxiv.org/abs/2110.03620), Theorems 6 and"
  " 2"
)


def state(folder: pathlib.Path) -> str:
  """What a run's folder says of it.

  | there | state |
  | --- | --- |
  | `summary.json` | finished |
  | `failed.json` | failed; not started again since |
  | `config.json` | begun: running somewhere, or killed |
  | nothing | waiting |
  """
  for name, found in (
    ("summary.json", "finished"),
    (FAILED, "failed"),
    ("config.json", "begun"),
  ):
    if (folder / name).exists():
      return found
  return "waiting"


def rows(
  runs: Mapping[tuple[str, ...], pathlib.Path],
) -> list[dict[str, Any]]:
  """State and numbers of every run.

  Args:
    runs: overrides as "field=value" -> folder.

  Returns:
    The swept fields as they were asked for, "state", "charged_steps", and
    the numbers of `summary.json` where there is one.
  """
  found = []
  for overrides, folder in runs.items():
    row: dict[str, Any] = {"state": state(folder)}
    if (folder / "privacy.json").exists():
      ledger = records.read_json(folder / "privacy.json")
      row["charged_steps"] = ledger["charged_steps"]
    if row["state"] == "finished":
      row |= records.read_json(folder / "summary.json")
    # What was reached comes under its own name beside what was asked for.
    found.append(row | dict(one.split("=", 1) for one in overrides))
  return found


def cost(
  folders: Sequence[pathlib.Path], *, num_runs: int, tuning: config_lib.Tuning
) -> dict[str, Any]:
  """What it costs to choose one of a sweep's runs.

  See `privacy.selection` for the bounds and what they ask for. A grid has a
  fixed number of runs: whoever looks at all of them is told all of them, and
  the runs compose. The bounds of a random number of runs, with the grid's size
  as its mean, are what a random search among the same candidates would cost.

  | runs | result |
  | --- | --- |
  | without a ledger (none trained yet, or audits) | None, and why |
  | drawn or noised in a way that Renyi DP does not cover here | None, and why |
  | one of them without a guarantee | infinite |

  Args:
    folders: of the runs.
    num_runs: of the whole grid.
    tuning: what the configuration says of choices.

  Returns:
    "tuning", "num_runs", "delta", "epsilon_all" (of the steps charged so far),
    "epsilon_best_poisson", "epsilon_best_geometric" (of the runs' planned
    steps), "why_not", and "sentence" for people.
  """
  ledgers = [
    records.read_json(folder / "privacy.json")
    for folder in folders
    if (folder / "privacy.json").exists()
  ]
  why_not = _why_not(ledgers)
  found: dict[str, Any] = {
    "tuning": tuning,
    "num_runs": num_runs,
    "delta": None,
    "epsilon_all": None,
    "epsilon_best_poisson": None,
    "epsilon_best_geometric": None,
    "why_not": why_not,
  }
  if why_not is None:
    found["delta"] = delta = max(ledger["delta"] for ledger in ledgers)
    worst = selection.worst([_curve(ledger) for ledger in ledgers])
    mean = max(num_runs, 2)
    found |= {
      name: selection.epsilon(curve, delta=delta)
      for name, curve in (
        (
          "epsilon_all",
          selection.composed(
            [_curve(led, steps="charged_steps") for led in ledgers]
          ),
        ),
        (
          "epsilon_best_poisson",
          selection.best_of_poisson(worst, mean_runs=mean),
        ),
        (
          "epsilon_best_geometric",
          selection.best_of_geometric(worst, mean_runs=mean),
        ),
      )
    }
  return found | {"sentence": _sentence(found, len(ledgers))}


def write(
  runs: Mapping[tuple[str, ...], pathlib.Path],
  workdir: pathlib.Path,
  *,
  tuning: config_lib.Tuning,
) -> str:
  """Writes `sweep.json`, `sweep.md` and, of finished runs, `sweep.csv`.

  Where a field of numbers was swept, `figures/sweep` shows the scores over it.

  Returns:
    Counts, table, means over seeds, and the sentence on choosing.
  """
  found = rows(runs)
  fields = [override.split("=")[0] for override in next(iter(runs))]
  # A run has the scores of its task: of classes, or of words.
  columns = [
    *fields,
    *(
      name
      for name in _COLUMNS
      if name not in fields
      and (name not in repeats.SCORES or any(name in row for row in found))
    ),
  ]
  counts = {
    name: sum(row["state"] == name for row in found)
    for name in ("finished", "failed", "begun", "waiting")
  }
  choosing = cost(list(runs.values()), num_runs=len(runs), tuning=tuning)
  states = ", ".join(f"{count} {name}" for name, count in counts.items())
  counted = f"{states}, of {len(runs)} runs."
  means = repeats.means(found, fields)
  figure = repeats.write(means, fields, workdir)
  shown = [tables.sweep_table(found, ["state", "charged_steps", *columns])]
  if averaged := repeats.table(means, fields):
    shown.append(f"{_MEANS}\n\n{averaged}")
  records.write_json(
    workdir / "sweep.json",
    {"counts": counts, "runs": found, "means": means, "choosing": choosing},
  )
  markdown = "\n\n".join(
    [
      f"# {workdir.name}",
      counted,
      *(f"```\n{text}\n```" for text in shown),
      *([f"![scores](figures/{figure.name})"] if figure else []),
      choosing["sentence"],
    ]
  )
  records.write_bytes(workdir / "sweep.md", f"{markdown}\n".encode())
  finished = [row for row in found if row["state"] == "finished"]
  if finished:
    tables.write_csv(workdir / "sweep.csv", finished, columns=columns)
  return "\n\n".join([counted, *shown, choosing["sentence"]])


def _why_not(ledgers: Sequence[Mapping[str, Any]]) -> str | None:
  """Why the cost is not known; None where it is."""
  if not ledgers:
    return "no run has a ledger yet"
  for ledger in ledgers:
    for name, covered in _COVERED.items():
      if ledger["has_guarantee"] and ledger[name] != covered:
        return f"{name}={ledger[name]} is not covered by the curves used here"
  return None


def _curve(
  ledger: Mapping[str, Any], *, steps: str = "num_steps"
) -> np.ndarray:
  """Renyi DP of one run, as planned or as charged."""
  if not ledger["has_guarantee"]:
    return np.full_like(selection.ORDERS, math.inf)
  return selection.curve(
    noise_multiplier=ledger["noise_multiplier"],
    sampling_prob=ledger["sampling_prob"],
    num_steps=ledger[steps],
  )


def _sentence(found: Mapping[str, Any], num_ledgers: int) -> str:
  """What a person is told of the cost."""
  tuning = config_lib.Tuning(found["tuning"])
  words = [f"{_WORDS[tuning]}"]
  if tuning is config_lib.Tuning.PUBLIC:
    return words[0]
  if found["why_not"] is not None:
    return f"{words[0]} what it costs is not known here ({found['why_not']})."
  show = tables.format_epsilon
  words.append(
    f"looking at all of them composes, ε = {show(found['epsilon_all'])} at δ ="
    f" {found['delta']:g} for the {num_ledgers} that have begun, so far."
    " Publishing nothing but the best of a random number of runs, each with"
    " hyper-parameters drawn from this grid, would cost ε ="
    f" {show(found['epsilon_best_poisson'])} if that number were Poisson with"
    f" mean {max(found['num_runs'], 2)}, and"
    f" {show(found['epsilon_best_geometric'])} if it were geometric"
    f" ({_METHOD}); a grid that is run whole is no such draw. Scores on private"
    " test records are covered by neither."
  )
  return " ".join(words)
