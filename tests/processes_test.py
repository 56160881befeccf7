"""Real processes that run one job together: gloo, forced CPU devices."""

import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import tempfile
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
  "--config.attention_noise.consistency_weight=0",  # One application.
)
NUM_DEVICES = 8
# Compiling is what these tests cost.
FAST = "--xla_backend_optimization_level=0"


def free_port():
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    return probe.getsockname()[1]


def start(workdir, *flags, count):
  """Starts `count` processes that share eight devices."""
  port = free_port()
  processes = []
  for i in range(count):
    together = (
      "--distributed",
      f"--coordinator=localhost:{port}",
      f"--num_processes={count}",
      f"--process_id={i}",
    )
    # A file: a pipe that nobody reads would stop a process that says much.
    log = tempfile.TemporaryFile("w+")  # noqa: SIM115
    process = subprocess.Popen(
      [sys.executable, "-m", "ppnet.main", *FLAGS, *flags]
      + [f"--workdir={workdir}", *(together if count > 1 else ())],
      cwd=ROOT,
      env=os.environ
      | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(NUM_DEVICES // count),
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {FAST}",
      },
      stdout=log,
      stderr=subprocess.STDOUT,
    )
    processes.append((process, log))
  return processes


def finish(processes, *, within_secs=1800):
  """(exit codes, outputs); all of them must end, and none is left behind."""
  deadline = time.monotonic() + within_secs
  try:
    for process, _ in processes:
      process.wait(timeout=max(1.0, deadline - time.monotonic()))
  finally:
    for process, _ in processes:
      process.kill()
  outputs = []
  for _, log in processes:
    with log:
      log.seek(0)
      outputs.append(log.read())
  return [process.returncode for process, _ in processes], outputs


def charged_steps(workdir):
  ledger = workdir / "privacy.json"
  return records.read_json(ledger)["charged_steps"] if ledger.exists() else 0


def kill_when(condition, processes, *, victim, delay_secs=0.0):
  """SIGKILL to one of them; (its peer's exit code, output, seconds it took)."""
  deadline = time.monotonic() + 1800
  while not condition():
    assert time.monotonic() < deadline
    if any(process.poll() is not None for process, _ in processes):
      raise AssertionError("\n".join(finish(processes)[1]))
    time.sleep(0.005)
  time.sleep(delay_secs)
  processes[victim][0].send_signal(signal.SIGKILL)
  killed = time.monotonic()
  codes, outputs = finish(processes)
  secs = time.monotonic() - killed
  assert codes[victim] == -signal.SIGKILL
  return codes[1 - victim], outputs[1 - victim], secs


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


STEPS = ("--config.train.num_steps=24", "--config.train.eval_every_steps=24")


@pytest.fixture(scope="module")
def long_alone(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("alone") / "long"
  codes, outputs = finish(start(workdir, *STEPS, count=1))
  assert codes == [0], outputs[0]
  return workdir


def assert_ended_clearly(code, output, secs):
  """Ours where a sum failed; JAX's own where it noticed the silence first."""
  assert secs < 60
  assert code in (75, -signal.SIGABRT), output
  assert any(
    words in output
    for words in ("goes on from the last checkpoint", "another task died")
  ), output


def assert_ledger_counts(workdir):
  """At least every step that left a trace."""
  traces = [row["step"] for row in train_rows(workdir)]
  traces += [
    int(folder.name)
    for folder in (workdir / "checkpoints").glob("*")
    if folder.name.isdigit()
  ]
  assert charged_steps(workdir) >= max(traces, default=0)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_job_and_others_go_on_from_it(
  long_alone, tmp_path, victim
):
  """Killed with two processes, resumed by four on another mesh."""
  processes = start(tmp_path, *STEPS, count=2)
  assert_ended_clearly(
    *kill_when(lambda: charged_steps(tmp_path) > 4, processes, victim=victim)
  )
  assert_ledger_counts(tmp_path)
  codes, outputs = finish(
    start(tmp_path, *STEPS, "--config.mesh.data=4", count=4)
  )
  assert codes == [0] * 4, "\n".join(outputs)
  np.testing.assert_allclose(
    parameters(tmp_path, 24), parameters(long_alone, 24), rtol=0, atol=1e-4
  )
  ledger = records.read_json(tmp_path / "privacy.json")
  assert ledger["charged_steps"] == 24
  # It did go on, and not from the beginning.
  assert [entry["resumed_at_step"] > 0 for entry in ledger["history"]] == [
    False,
    True,
  ]


@pytest.mark.slow
def test_kills_at_any_moment_lose_nothing(long_alone, tmp_path):
  """One while a checkpoint is being written, one at random."""
  rng = random.Random(int.from_bytes(os.urandom(4), "big"))
  often = (*STEPS, "--config.train.checkpoint_every_steps=1")
  folder = tmp_path / "checkpoints"

  def is_saving():
    return charged_steps(tmp_path) > 3 and any(folder.glob("*tmp*"))

  for condition, delay_secs in (
    (is_saving, 0.0),
    (lambda: charged_steps(tmp_path) > 8, rng.uniform(0, 2)),
  ):
    processes = start(tmp_path, *often, count=2)
    assert_ended_clearly(
      *kill_when(
        condition, processes, victim=rng.randrange(2), delay_secs=delay_secs
      )
    )
    assert_ledger_counts(tmp_path)
  # One process with eight devices, on a mesh of its own.
  codes, outputs = finish(
    start(tmp_path, *often, "--config.mesh.data=8", count=1)
  )
  assert codes == [0], outputs[0]
  np.testing.assert_allclose(
    parameters(tmp_path, 24), parameters(long_alone, 24), rtol=0, atol=1e-4
  )
  assert charged_steps(tmp_path) == 24
  # Fails if: half a checkpoint is taken for a whole one, or a step is charged
  # after it ran.


SLOW_END = """
import sys, time
from ppnet.core import hosts
port, number = sys.argv[1:]
hosts.start(
  coordinator=f"localhost:{port}", num_processes=2, process_id=int(number)
)
assert hosts.from_first(lambda: 7) == 7
if hosts.is_first():
  time.sleep(45)
"""


@pytest.mark.slow
def test_a_first_process_that_ends_late_is_waited_for():
  """It alone draws the figure and writes the summary."""
  port = free_port()
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", SLOW_END, str(port), str(number)],
      cwd=ROOT,
      env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    for number in range(2)
  ]
  assert [process.wait(timeout=300) for process in processes] == [0, 0]
  # Fails if: those that are done end the job after a heartbeat's time.


@pytest.mark.slow
def test_jobs_of_one_process_say_so(tmp_path):
  codes, outputs = finish(start(tmp_path, "--config.job=BENCHMARK", count=2))
  assert 0 not in codes
  assert any("without --distributed" in output for output in outputs)
