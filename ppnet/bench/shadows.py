"""What a shadow model costs beside others, and in a run of its own.

The baseline is what anybody can do: give the TRAIN command once per model. It
is measured as such, a process with its start-up, its compilations, evaluations,
checkpoints and records. Beside it stands a process that trains all models of
`config.audit` side by side (`audit.shadows`), its start-up and compilation
counted, over the number of models. Both take turns.

Only the first steps of the models side by side are measured. The others are
taken to last as long as those between the first call of the compiled program
and the last: a step costs the same at the beginning of a run and at its end.
What the baseline does once more than a shadow model (evaluations during the
run, a checkpoint) is a part of a run, and is not taken out; a second pair of
rows compares the steps alone, without start-up and compilation of either.

Both see batches of the same expected size. The shadow models are drawn from the
same records, each trained on half of them.
"""

import json
import os
import pathlib
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tqdm

from ppnet import config as config_lib
from ppnet.bench import measure
from ppnet.core import records
from ppnet.data import prepare
from ppnet.train import loop

GOAL = 0.25
_RECORD = "bench.json"
_CALLS = 3  # The first one compiles.
_STEPS_OF_A_CALL = 1
_ALONE, _BESIDE = "a run of its own", "side by side, each"

_RUN_ALONE = """
import pathlib, pickle, sys
from ppnet import main
workdir = pathlib.Path(sys.argv[1])
main.run_job(pickle.loads((workdir.parent / "alone").read_bytes()), workdir)
"""
_RUN_BESIDE = """
import pathlib, pickle, sys
from ppnet.audit import timing
workdir = pathlib.Path(sys.argv[1])
job = pickle.loads((workdir.parent / "beside").read_bytes())
timing.train(job, workdir, steps_at_once=int(sys.argv[2]))
"""


def run(
  config: config_lib.ExperimentConfig,
  workdir: pathlib.Path,
  *,
  log: Any = sys.stderr,
) -> dict[str, Any]:
  """Measures one case, the configuration's own; writes `bench.json`.

  Args:
    config: the experiment; `audit.num_models` are side by side.
    workdir: its folder.
    log: where progress goes.

  Returns:
    The record that `bench.json` holds. For each row: seconds, processor seconds
    and peak memory of a process (medians over the rounds), their ratios to the
    run of its own, and whether the ratio of seconds is at most a quarter.

  Raises:
    subprocess.CalledProcessError: a process failed; its output is shown.
  """
  config.data.prepared_dir = str(loop.prepared_dir(config, workdir))
  found: dict[str, list[dict[str, float]]] = {_BESIDE: [], _ALONE: []}
  load = measure.Load()
  names = list(found)
  with (
    tempfile.TemporaryDirectory(prefix="ppnet-bench-") as folder,
    tqdm.tqdm(total=len(names) * config.bench.rounds, file=log) as bar,
  ):
    own = pathlib.Path(folder)
    for name, job in (("alone", _alone(config)), ("beside", _beside(config))):
      (own / name).write_bytes(pickle.dumps(job))
    # Not counted for either: the data are prepared once.
    prepare.prepare(config.data, pathlib.Path(config.data.prepared_dir))
    for round_number in range(config.bench.rounds):
      for name in measure.order(names, round_number):
        bar.set_postfix_str(name)
        measured = _measure(name, config, own / f"{name[:4]}-{round_number}")
        found[name].append(measured)
        bar.update()
  busy = load.record()
  # Processes of its own are others to `Load`; what is left says nothing here.
  busy.pop("others_cpu_share")
  record = records.to_plain(
    {
      "subject": config.bench.subject,
      "machine": measure.machine(),
      "rounds": config.bench.rounds,
      "is_complete": True,
      "goal": GOAL,
      "cases": {
        "quickstart": {
          "num_models": config.audit.num_models,
          "num_steps": config.train.num_steps,
          "measured_steps": _CALLS * _STEPS_OF_A_CALL,
          "expected_batch_size": config.train.expected_batch_size,
          **busy,
        }
      },
      "rows": _rows(config, found),
    }
  )
  records.write_json(workdir / _RECORD, record)
  return record


def table(record: Mapping[str, Any]) -> str:
  """The rows for a terminal."""
  lines = [
    f"{'row':42} {'seconds':>8} {'ratio':>6} {'CPU s':>7} {'ratio':>6}"
    f" {'MiB':>6}"
  ]
  number = lambda value, form: "-" if value is None else format(value, form)
  for row in record["rows"]:
    lines.append(
      f"{row['name']:42} {number(row['secs'], '.1f'):>8}"
      f" {number(row['time_ratio'], '.3f'):>6}"
      f" {number(row['cpu_secs'], '.1f'):>7}"
      f" {number(row['cpu_time_ratio'], '.3f'):>6}"
      f" {number(row['memory_mib'], '.0f'):>6}"
    )
  notes = [
    f"{row['name']}: {row['note']}" for row in record["rows"] if row["note"]
  ]
  return "\n".join([*lines, *notes])


def _alone(config: config_lib.ExperimentConfig) -> config_lib.ExperimentConfig:
  """The TRAIN job."""
  job = pickle.loads(pickle.dumps(config))
  job.job = config_lib.Job.TRAIN
  return job


def _beside(config: config_lib.ExperimentConfig) -> config_lib.ExperimentConfig:
  """The first steps of all models at once."""
  job = pickle.loads(pickle.dumps(config))
  job.train.num_steps = min(_CALLS * _STEPS_OF_A_CALL, config.train.num_steps)
  job.audit.models_at_once = config.audit.num_models
  return job


def _measure(
  name: str, config: config_lib.ExperimentConfig, workdir: pathlib.Path
) -> dict[str, float]:
  """One process: what it took, and what its steps alone took."""
  workdir.mkdir()
  environment = dict(os.environ)
  if name == _BESIDE:
    # On a CPU the models are cut over its cores (`audit.side_by_side`).
    environment["XLA_FLAGS"] = (
      environment.get("XLA_FLAGS", "")
      + f" --xla_force_host_platform_device_count={_num_cores()}"
    )
  code = _RUN_ALONE if name == _ALONE else _RUN_BESIDE
  secs, cpu_secs, memory_mib = _process(code, workdir, environment)
  measured = {"secs": secs, "cpu_secs": cpu_secs, "memory_mib": memory_mib}
  if name == _ALONE:
    rows = records.latest_rows(workdir / "metrics.jsonl", split="train")
    steps = [row["nonprivate/machine/step_secs"] for row in rows]
    # The first one has none: it compiled.
    median = np.median([step for step in steps if step is not None])
    return measured | {"steps_secs": config.train.num_steps * float(median)}
  return measured | _extrapolated(
    json.loads((workdir / "times.json").read_text()),
    measured,
    num_models=config.audit.num_models,
    num_steps=config.train.num_steps,
  )


def _extrapolated(
  times: Sequence[Sequence[float]],
  measured: Mapping[str, float],
  *,
  num_models: int,
  num_steps: int,
) -> dict[str, float]:
  """What each of the models would take to its last step."""
  (began, cpu_began), (ended, cpu_ended) = times[0], times[-1]
  known = (len(times) - 1) * _STEPS_OF_A_CALL
  done = len(times) * _STEPS_OF_A_CALL
  step, cpu_step = (ended - began) / known, (cpu_ended - cpu_began) / known
  return {
    "secs": (measured["secs"] + (num_steps - done) * step) / num_models,
    "cpu_secs": (measured["cpu_secs"] + (num_steps - done) * cpu_step)
    / num_models,
    "steps_secs": num_steps * step / num_models,
    "steps_cpu_secs": num_steps * cpu_step / num_models,
  }


def _process(
  code: str, workdir: pathlib.Path, environment: Mapping[str, str]
) -> tuple[float, float, float]:
  """Runs a process; seconds, processor seconds, peak MiB."""
  log = workdir.with_suffix(".log")
  began = time.perf_counter()
  with log.open("wb") as out:
    child = subprocess.Popen(
      [sys.executable, "-c", code, str(workdir), str(_STEPS_OF_A_CALL)],
      stdout=out,
      stderr=subprocess.STDOUT,
      env=environment,
      cwd=pathlib.Path(__file__).parents[2],
    )
    _, status, usage = os.wait4(child.pid, 0)
  secs = time.perf_counter() - began
  child.returncode = os.waitstatus_to_exitcode(status)
  if child.returncode:
    raise subprocess.CalledProcessError(
      child.returncode, child.args, output=log.read_text()[-2000:]
    )
  return secs, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def _num_cores() -> int:
  """Cores that this process may use."""
  return len(os.sched_getaffinity(0))


def _rows(
  config: config_lib.ExperimentConfig,
  found: Mapping[str, Sequence[Mapping[str, float]]],
) -> list[dict[str, Any]]:
  """The table: whole processes, then steps alone."""
  count, steps = config.audit.num_models, config.train.num_steps
  note = (
    f"{count} models in one process; {_CALLS * _STEPS_OF_A_CALL} of {steps}"
    " steps measured, the others as long as the last of these"
  )
  rows = []
  for case, suffix in (("whole", ""), ("steps", "steps_")):
    for name in (_ALONE, _BESIDE):
      own, base = (
        {
          key: [row[f"{suffix}{key}"] for row in found[which]]
          for key in ("secs", "cpu_secs")
          if f"{suffix}{key}" in found[which][0]
        }
        for which in (name, _ALONE)
      )
      ratio = {
        key: float(np.median(own[key]) / np.median(base[key]))
        for key in own
        if key in base
      }
      each = [a / b for a, b in zip(own["secs"], base["secs"], strict=True)]
      is_whole = case == "whole"
      rows.append(
        {
          "name": name if is_whole else f"{name}, steps alone",
          "case": case,
          "framework": "jax",
          "is_peer": False,
          "is_baseline": name == _ALONE,
          "time_ratio": ratio["secs"],
          "time_ratio_quartiles": np.quantile(each, (0.25, 0.75)).tolist(),
          "cpu_time_ratio": ratio.get("cpu_secs"),
          "secs": float(np.median(own["secs"])),
          "cpu_secs": float(np.median(own["cpu_secs"]))
          if "cpu_secs" in own
          else None,
          "memory_mib": float(
            np.median([row["memory_mib"] for row in found[name]])
          )
          if is_whole
          else None,
          "memory_ratio": None,
          "meets_time": None if name == _ALONE else ratio["secs"] <= GOAL,
          "note": note if name == _BESIDE else "",
        }
      )
  return rows
