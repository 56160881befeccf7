"""Whole tiny runs: what they say of their machine, and of what hangs."""

import dataclasses
import io
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppnet.core import records
from ppnet.data import prepare
from ppnet.train import (
  checkpoint,
  goodput,
  loop,
  metrics,
  throughput,
  watching,
)
from tests import tiny

LIMIT_SECS = 0.3


class Clock:
  """Seconds since 1970, set by the test."""

  def __init__(self, monkeypatch):
    self.now = 1_000_000.0
    clock = types.SimpleNamespace(
      time=lambda: self.now, perf_counter=lambda: self.now
    )
    for module in (watching, goodput):
      monkeypatch.setattr(module, "time", clock)


def batch_of(num_rows):
  """Rows of 8 positions, and padding."""
  return {
    "tokens": np.zeros((4, 8), np.int32),
    "is_padding_example": np.arange(4) >= num_rows,
  }


def test_a_step_s_time_is_its_own(tmp_path, monkeypatch):
  clock = Clock(monkeypatch)
  program = types.SimpleNamespace(
    mesh=jax.make_mesh((1,), ("data",), devices=jax.devices()[:1]),
    mechanism=types.SimpleNamespace(expected_batch_size=5.0, rows_per_unit=2),
    abstract_state=types.SimpleNamespace(params={}),
    abstract_frozen={},
  )

  def steps():
    for number, secs in enumerate((0.0, 1.0, 0.25)):
      clock.now += secs
      # The draws differ, and with them what a step would seem to have done.
      yield {"step": number, "microbatches": [batch_of(number + 1)]}

  seen = []
  with watching.Watch(
    tiny.experiment(), tmp_path, program, began=clock.now, log=io.StringIO()
  ) as watch:
    clock.now += 3
    watch.begin(0, lengths=(8,), writer=metrics.NoWriter())
    for data in watch.each(steps()):
      with watch.sending(data) as sent:
        clock.now += 0.1 if data["step"] else 5  # The first one compiles.
      clock.now += 2  # The devices.
      sent.ended.set_result(clock.now)
      clock.now += 0.5  # Until it is fetched.
      seen.append(
        {
          name.removeprefix(watching.PREFIX): value
          for name, value in watch.ended(sent).items()
        }
      )
      if data["step"] == 0:
        with watch.away("evaluation", "an evaluation"):
          clock.now += 7
  first, second, third = seen
  assert first["step_secs"] is first["tokens_per_sec"] is None
  assert second["step_secs"] == pytest.approx(0.5 + 1 + 0.1 + 2)
  assert third["step_secs"] == pytest.approx(0.5 + 0.25 + 0.1 + 2)
  assert [one["data_wait_secs"] for one in seen] == [0, 1, 0.25]
  for one in (second, third):
    # The expected batch's, and neither this draw's nor all draws' so far.
    assert one["examples_per_sec"] * one["step_secs"] == pytest.approx(5)
    tokens = one["tokens_per_sec"] * one["step_secs"]
    assert tokens == pytest.approx(5 * 2 * 8)
  assert third["goodput"] == pytest.approx((2 + 2.1 + 2.1) / 23.95)
  secs = records.read_json(tmp_path / "machine.json")["nonprivate/secs"]
  assert secs["start"] == 3
  assert secs["compile"] == 5
  assert secs["evaluation"] == 7
  assert secs["step"] == pytest.approx(6.2)
  # Waiting for data, and between the end of a step and the next one's.
  assert secs["idle"] == pytest.approx(1 + 0.25 + 3 * 0.5)
  # Fails if: an evaluation is part of a step, or a wait for data of the work.


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  folder = tmp_path_factory.mktemp("prepared")
  prepare.prepare(tiny.experiment().data, folder)
  return str(folder)


def open_run(workdir, prepared, **changes):
  config = tiny.experiment(**changes)
  config.data.prepared_dir = prepared
  workdir.mkdir(exist_ok=True)
  return loop.open_experiment(config, workdir, devices=jax.devices()[:1])


def flat(state):
  leaves = jax.tree.leaves(jax.device_get(state))
  return np.concatenate([np.ravel(leaf) for leaf in leaves])


def metrics_rows(workdir, split="train"):
  return [
    row
    for row in records.read_json_lines(workdir / "metrics.jsonl")
    if row["split"] == split
  ]


@pytest.fixture(scope="module")
def plain(tmp_path_factory, prepared):
  """A run with a trace of the steps 3 and 4."""
  workdir = tmp_path_factory.mktemp("plain")
  experiment = open_run(workdir, prepared)
  log = io.StringIO()
  summary, state = loop.train(experiment, log=log, profile_steps=(3, 4))
  return workdir, summary, state, log.getvalue()


def test_every_step_says_how_fast_it_was(plain):
  workdir, summary, _, _ = plain
  rows = metrics_rows(workdir)
  seen = {
    name.removeprefix(watching.PREFIX)
    for name in rows[0]
    if name.startswith(watching.PREFIX)
  }
  assert seen == {
    "step_secs",
    "data_wait_secs",
    "tokens_per_sec",
    "examples_per_sec",
    "goodput",
    "process_memory_bytes",
  }
  length = 19  # Positions of a row of digits.
  measured = 0
  for row in rows:
    of = lambda name, row=row: row[watching.PREFIX + name]
    assert of("data_wait_secs") >= 0
    assert of("process_memory_bytes") > 1e7
    assert 0 <= of("goodput") <= 1
    if of("step_secs") is None:  # It compiled, or nothing came before it.
      assert of("tokens_per_sec") is of("examples_per_sec") is None
      continue
    measured += 1
    # The expected batch's, whatever was drawn.
    assert of("examples_per_sec") * of("step_secs") == pytest.approx(24)
    assert of("tokens_per_sec") * of("step_secs") == pytest.approx(24 * length)
  assert measured >= 4
  assert len({row["nonprivate/batch_size"] for row in rows}) > 1
  # Fails if: a rate is of the realised batch, or waits are not in the record.


def test_what_a_clock_says_is_named_as_not_private(plain):
  workdir, summary, _, _ = plain
  words = ("sec", "goodput", "mfu", "memory", "bytes", "stall", "wait")
  rows = [summary, *records.read_json_lines(workdir / "metrics.jsonl")]
  for row in rows:
    for name in row:
      if name == "no_mfu_because":  # Of the kind of devices alone.
        continue
      if any(word in name for word in words):
        assert name.startswith("nonprivate/machine/"), name
  # Fails if: a number that depends on the draw is released under another name.


def test_the_summary_says_where_the_time_went(plain):
  workdir, summary, _, _ = plain
  of = {
    name.removeprefix(watching.PREFIX): value
    for name, value in summary.items()
    if name.startswith(watching.PREFIX)
  }
  secs = {
    name.removeprefix("secs/"): value
    for name, value in of.items()
    if name.startswith("secs/")
  }
  for name in ("step", "compile", "evaluation", "checkpoint", "profile"):
    assert secs[name] > 0, name
  assert secs["repeated"] == 0
  assert sum(secs.values()) == pytest.approx(of["wall_secs"], rel=0.01)
  assert of["goodput"] == pytest.approx(secs["step"] / of["wall_secs"], rel=0.1)
  assert of["num_stalls"] == 0
  assert "mfu" not in of
  assert "cpu" in summary["no_mfu_because"]
  record = records.read_json(workdir / "machine.json")
  assert record["no_mfu_because"] == summary["no_mfu_because"]
  assert record["num_steps"] == 6
  assert record["num_starts"] == 1


def test_the_progress_line_says_it_too(plain):
  _, _, _, log = plain
  for word in ("loss", "ε", "s/step", "tokens/s", "waited", "GB", "goodput"):
    assert word in log


def test_a_trace_has_its_steps_and_is_where_tensorboard_looks(plain):
  workdir, _, _, log = plain
  (path,) = (workdir / "tensorboard" / "plugins" / "profile").glob(
    "*/*.xplane.pb"
  )
  found = jax.profiler.ProfileData.from_file(str(path))
  steps = set()
  num_events = 0
  for plane in found.planes:
    for line in plane.lines:
      for event in line.events:
        num_events += 1
        if event.name == "train":
          steps |= {v for name, v in event.stats if name == "step_num"}
  assert num_events > 100
  assert {int(step) for step in steps} == {3, 4}
  assert f"tensorboard --logdir={workdir / 'tensorboard'}" in log


def sleep_until(log, what):
  """As long as it takes until the watchdog has spoken of it."""
  deadline = time.monotonic() + 60
  while what not in log.getvalue() and time.monotonic() < deadline:
    time.sleep(LIMIT_SECS / 10)


class Sleepy:
  """Examples whose first batch is late."""

  def __init__(self, examples, log):
    self._examples = examples
    self._log = log
    self._num_batches = 0

  def __getattr__(self, name):
    return getattr(self._examples, name)

  def __len__(self):
    return len(self._examples)

  def batch(self, *args, **kwargs):
    self._num_batches += 1
    if self._num_batches == 1:
      sleep_until(self._log, "the data of step 1")
    return self._examples.batch(*args, **kwargs)


@jax.jit
def busy(value, num_turns):
  """The same value, after so many turns of work."""

  def turn(_, noise):
    return jnp.sin(noise) + 1

  noise = jax.lax.fori_loop(0, num_turns, turn, jnp.ones(1000))
  return jnp.where(noise.sum() > -1e9, value, 0)  # Always.


def late_devices(program, *, step):
  """A program whose devices really work long on one step."""

  def secs(num_turns):
    began = time.perf_counter()
    jax.block_until_ready(busy(jnp.float32(0), jnp.int32(num_turns)))
    return time.perf_counter() - began

  secs(1)  # Compiles.
  # The fastest of some: others that use this machine do not count.
  per_turn = min(secs(1000) for _ in range(5)) / 1000
  long = jax.device_put(jnp.int32(4 * LIMIT_SECS / per_turn))
  turns = {True: long, False: jax.device_put(jnp.int32(0))}
  done = []

  def update(*args):
    state, noise_state, scalars = program.update(*args)
    done.append(None)
    late = busy(scalars["dp_perturbation"], turns[len(done) == step])
    return state, noise_state, scalars | {"dp_perturbation": late}

  return dataclasses.replace(program, update=update)


def test_a_stall_is_reported_and_the_run_goes_on(
  plain, prepared, tmp_path, monkeypatch
):
  log = io.StringIO()
  experiment = open_run(tmp_path, prepared, stall_secs=LIMIT_SECS)
  experiment = dataclasses.replace(
    experiment,
    training=Sleepy(experiment.training, log),
    program=late_devices(experiment.program, step=4),
  )
  save, wait = checkpoint.Checkpoints.save, checkpoint.Checkpoints.wait

  def slow_save(self, *args, step, **kwargs):
    if step == 2:
      sleep_until(log, "the checkpoint of step 2")
    return save(self, *args, step=step, **kwargs)

  def slow_wait(self):
    sleep_until(log, "the checkpoints to be on disk")
    return wait(self)

  evaluate = experiment.program.evaluate
  late = []

  def slow_evaluate(*args):
    late.append(None)
    if len(late) == 2:
      sleep_until(log, "the evaluation after step 3, behind batch 1")
    return evaluate(*args)

  monkeypatch.setattr(checkpoint.Checkpoints, "save", slow_save)
  monkeypatch.setattr(checkpoint.Checkpoints, "wait", slow_wait)
  experiment = dataclasses.replace(
    experiment,
    program=dataclasses.replace(experiment.program, evaluate=slow_evaluate),
  )
  summary, state = loop.train(experiment, log=log)
  text = log.getvalue()
  stalls = metrics_rows(tmp_path, "stall")
  # A machine that others use may be late by itself: compiling, above all.
  whats = [row["waiting_for"] for row in stalls]
  for what in (
    "the data of step 1",
    "the devices at step 4",
    "the checkpoint of step 2",
    "the evaluation after step 3, behind batch 1",
    "the checkpoints to be on disk",
  ):
    assert any(row.startswith(what) for row in whats), (what, whats)
    assert f"s: {what}" in text
  for row in stalls:
    assert row["nonprivate/machine/waited_secs"] >= LIMIT_SECS
    assert 0 <= row["step"] <= 6
  for function in ("slow_save", "slow_wait", "slow_evaluate", "device_get"):
    assert f"in {function}" in text
  # The thread that makes the data is shown beside the one that waits for them.
  assert "in sleep_until" in text
  assert "in batch" in text
  assert text.count("The wait is over after") >= 5
  assert summary[watching.PREFIX + "num_stalls"] == len(stalls)
  np.testing.assert_array_equal(flat(state), flat(plain[2]))
  # Fails if: a wait is not watched, or a report changes the run.


def test_a_restart_goes_on_with_the_account_of_time(
  prepared, tmp_path, monkeypatch
):
  class Stop(Exception):
    pass

  send = loop._Run._dispatch

  def stopping(self, data):
    if data["step"] == 3:
      self._checkpoints.wait()
      raise Stop
    return send(self, data)

  with monkeypatch.context() as patch:
    patch.setattr(loop._Run, "_dispatch", stopping)
    began = time.time()
    with pytest.raises(Stop):
      loop.train(open_run(tmp_path, prepared), log=io.StringIO())
  first = records.read_json(tmp_path / "machine.json")
  assert first["num_steps"] == 3
  assert first["nonprivate/secs"]["repeated"] == 0
  time.sleep(0.3)
  restarted = time.time()
  # On a machine whose peak is known. The checkpoint is at step 2: step 3 is
  # taken again.
  monkeypatch.setitem(throughput._PEAK_FLOPS_PER_SEC, "cpu", 1e12)
  log = io.StringIO()
  summary, _ = loop.train(
    open_run(tmp_path, prepared), log=log, began=restarted
  )
  second = records.read_json(tmp_path / "machine.json")
  assert second["num_starts"] == 2
  assert second["num_steps"] == 6
  assert second["first_start_unix_secs"] == first["first_start_unix_secs"]
  secs = second["nonprivate/secs"]
  assert secs["repeated"] > 0
  assert secs["step"] > first["nonprivate/secs"]["step"]
  assert 0.25 < secs["stopped"] < restarted - began
  assert secs["start"] > first["nonprivate/secs"]["start"]
  wall = time.time() - first["first_start_unix_secs"]
  assert summary[watching.PREFIX + "goodput"] == pytest.approx(
    secs["step"] / wall, rel=0.2
  )
  name = watching.PREFIX + "mfu"
  values = [row.get(name) for row in metrics_rows(tmp_path)]
  assert values[:3] == [None] * 3
  assert 0 < values[-1] < 1
  assert 0 < summary[name] < 1
  assert summary["no_mfu_because"] is second["no_mfu_because"] is None
  assert "MFU" in log.getvalue()
  # Fails if: goodput begins anew with a process, or steps count twice.
