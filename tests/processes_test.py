"""Real processes that run one job together: gloo, forced CPU devices."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from ppnet.core import records

ROOT = pathlib.Path(__file__).parents[1]
FLAGS = (
  "--config=tests/tiny.py",
  "--config.privacy.accountant=rdp",
  "--config.mesh.data=2",
  "--config.mesh.fsdp=-1",
)
NUM_DEVICES = 8


def start(workdir, *flags, count):
  """Starts `count` processes that share eight devices."""
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = probe.getsockname()[1]
  processes = []
  for i in range(count):
    together = (
      "--distributed",
      f"--coordinator=localhost:{port}",
      f"--num_processes={count}",
      f"--process_id={i}",
    )
    processes.append(
      subprocess.Popen(
        [sys.executable, "-m", "ppnet.main", *FLAGS, *flags]
        + [f"--workdir={workdir}", *(together if count > 1 else ())],
        cwd=ROOT,
        env=os.environ
        | {
          "JAX_PLATFORMS": "cpu",
          "JAX_NUM_CPU_DEVICES": str(NUM_DEVICES // count),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
      )
    )
  return processes


def finish(processes):
  """(exit codes, outputs); all of them must end."""
  outputs = [process.communicate(timeout=500)[0] for process in processes]
  return [process.returncode for process in processes], outputs


def parameters(workdir, step):
  """All parameters of a checkpoint in one vector."""
  folder = workdir / "checkpoints" / str(step) / "state"
  checkpointer = ocp.PyTreeCheckpointer()
  # Onto this process, whatever devices it was saved from.
  metadata = checkpointer.metadata(folder).item_metadata.tree
  state = checkpointer.restore(
    folder,
    restore_args=jax.tree.map(
      lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata
    ),
  )
  return np.concatenate([np.ravel(x) for x in jax.tree.leaves(state["params"])])


def train_rows(workdir):
  """The metrics of each step, without what a clock says."""
  rows = records.latest_rows(workdir / "metrics.jsonl", split="train")
  clock = "nonprivate/machine/"
  return [
    {name: value for name, value in row.items() if not name.startswith(clock)}
    for row in rows
  ]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("alone") / "run"
  codes, outputs = finish(start(workdir, count=1))
  assert codes == [0], outputs[0]
  return workdir


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_do_what_one_does(alone, tmp_path, count):
  codes, outputs = finish(start(tmp_path, count=count))
  assert codes == [0] * count, "\n".join(outputs)
  np.testing.assert_allclose(
    parameters(tmp_path, 6), parameters(alone, 6), rtol=0, atol=1e-5
  )
  for ours, theirs in zip(train_rows(tmp_path), train_rows(alone), strict=True):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
      if isinstance(value, float):  # Sums in another order.
        value = pytest.approx(value, rel=1e-3, abs=1e-4)
      assert ours[name] == value, name
  summaries = [records.read_json(d / "summary.json") for d in (tmp_path, alone)]
  for name in ("epsilon", "num_steps", "charged_steps", "num_train"):
    assert summaries[0][name] == summaries[1][name]
  assert summaries[0]["loss"] == pytest.approx(summaries[1]["loss"], rel=1e-4)
  # The first process alone speaks.
  assert "records:" in outputs[0]
  assert all("records:" not in output for output in outputs[1:])
  # Fails if: a process reads another one's rows, or draws a noise of its own.


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_job_and_others_go_on_from_it(
  alone, tmp_path, victim
):
  """Killed with two processes, resumed by four on another mesh."""
  steps = ("--config.train.num_steps=60",)
  processes = start(tmp_path, *steps, count=2)
  ledger = tmp_path / "privacy.json"
  deadline = time.monotonic() + 300
  while not (
    ledger.exists() and records.read_json(ledger)["charged_steps"] > 4
  ):
    assert time.monotonic() < deadline
    assert all(process.poll() is None for process in processes)
    time.sleep(0.05)
  processes[victim].send_signal(signal.SIGKILL)
  killed = time.monotonic()
  codes, outputs = finish(processes)
  assert time.monotonic() - killed < 90
  # Ours where a sum failed; JAX's own where it noticed the silence first.
  assert codes[1 - victim] in (75, -signal.SIGABRT)
  assert any(
    words in outputs[1 - victim]
    for words in ("goes on from the last checkpoint", "another task died")
  )
  charged = records.read_json(ledger)["charged_steps"]
  released = [row["step"] for row in train_rows(tmp_path)]
  assert charged >= max(released, default=0)
  whole = tmp_path / "whole"
  codes, outputs = finish(start(whole, *steps, count=1))
  assert codes == [0], outputs[0]
  codes, outputs = finish(
    start(
      tmp_path,
      *steps,
      "--config.mesh.data=4",
      count=4,
    )
  )
  assert codes == [0] * 4, "\n".join(outputs)
  np.testing.assert_allclose(
    parameters(tmp_path, 60), parameters(whole, 60), rtol=0, atol=1e-3
  )
  assert records.read_json(ledger)["charged_steps"] == 60


@pytest.mark.slow
def test_jobs_of_one_process_say_so(tmp_path):
  codes, outputs = finish(start(tmp_path, "--config.job=BENCHMARK", count=2))
  assert 0 not in codes
  assert any("without --distributed" in output for output in outputs)
