"""Where time went, over starts and kills, on a clock that the test winds."""

import os
import subprocess
import sys
import time
import types

import pytest

from ppnet.core import records
from ppnet.train import goodput


class Clock:
  """Seconds since 1970, set by the test."""

  def __init__(self, monkeypatch):
    self.now = 1_000_000.0
    monkeypatch.setattr(
      goodput,
      "time",
      types.SimpleNamespace(
        time=lambda: self.now, perf_counter=lambda: self.now
      ),
    )


@pytest.fixture
def clock(monkeypatch):
  return Clock(monkeypatch)


def opened(workdir, clock):
  return goodput.Goodput(workdir, {"device_kind": "cpu"}, began=clock.now)


def test_every_second_has_one_name(tmp_path, clock):
  spent = opened(tmp_path, clock)
  clock.now += 10
  spent.add("start", 4)
  spent.add("compile", 1)
  spent.add_step(1, 2)
  spent.add_step(2, 1.5)
  found = spent.secs()
  assert found == dict.fromkeys(goodput.NAMES, 0) | {
    "start": 4, "compile": 1, "step": 3.5, "idle": 1.5,
  }  # fmt: skip
  assert sum(found.values()) == spent.wall_secs == 10
  assert spent.goodput == 0.35


def test_a_kill_costs_what_was_not_saved_and_what_is_repeated(tmp_path, clock):
  first = opened(tmp_path, clock)
  clock.now += 10
  for step in (1, 2, 3):
    first.add_step(step, 2)
  first.save(now=True)
  clock.now += 5
  first.add_step(4, 4)  # Killed before anybody wrote it down.
  clock.now += 100
  second = opened(tmp_path, clock)
  clock.now += 10
  for step in (3, 4):  # From a checkpoint at step 2.
    second.add_step(step, 3)
  found = second.secs()
  assert found["step"] == 3 * 2 + 3
  assert found["repeated"] == 3
  assert found["stopped"] == 105
  assert found["idle"] == 4 + 4
  assert sum(found.values()) == second.wall_secs == 125
  assert second.goodput == 9 / 125
  second.save(now=True)
  record = records.read_json(tmp_path / "machine.json")
  assert record["num_starts"] == 2
  assert record["num_steps"] == 4
  assert record["first_start_unix_secs"] == 1_000_000
  assert record["device_kind"] == "cpu"
  assert record["nonprivate/running_secs"] == 20
  assert record["nonprivate/secs"] == found
  # Fails if: a restart forgets what was before it, or counts a step twice.


def test_it_is_saved_now_and_then_and_when_told(tmp_path, clock):
  spent = opened(tmp_path, clock)
  path = tmp_path / "machine.json"

  def num_steps():
    return records.read_json(path)["num_steps"]

  spent.save(now=True)
  spent.add_step(1, 1)
  clock.now += 9
  spent.save(now=False)
  assert num_steps() == 0
  clock.now += 2
  spent.save(now=False)
  assert num_steps() == 1
  spent.add_step(2, 1)
  spent.save(now=True)
  assert num_steps() == 2


def test_a_damaged_record_is_named_and_stops_nobody(tmp_path, clock, caplog):
  (tmp_path / "machine.json").write_text('{"num_starts": 3')
  with caplog.at_level("WARNING"):
    spent = opened(tmp_path, clock)
  assert "machine.json" in caplog.text
  spent.save(now=True)
  assert records.read_json(tmp_path / "machine.json")["num_starts"] == 1


def test_without_a_folder_there_is_no_record(tmp_path, clock):
  spent = opened(None, clock)
  spent.save(now=True)
  assert list(tmp_path.iterdir()) == []


def test_a_process_knows_when_it_began():
  code = (
    "import time\n"
    "from ppnet.train import goodput\n"
    "first = goodput.process_start()\n"
    "time.sleep(1)\n"
    "print(first, goodput.process_start())"
  )
  earliest = time.time()
  with subprocess.Popen(
    [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
  ) as process:
    latest = time.time()
    printed, _ = process.communicate()
  tick = 2 / os.sysconf("SC_CLK_TCK")  # The kernel tells both times in these.
  for began in map(float, printed.split()):
    assert earliest - tick <= began <= latest + tick
  # Fails if: the time is when the module was imported, or when it was asked.
