"""Grids are complete, and shards share them out."""

import pathlib
import subprocess
import types

import pytest

from ppnet import config as config_lib
from ppnet import sweep
from ppnet.core import records


def test_grid_is_every_combination_in_order():
  assert sweep.parse_grid("privacy.epsilon=1,8; seed=0,1") == [
    ("privacy.epsilon=1", "seed=0"),
    ("privacy.epsilon=1", "seed=1"),
    ("privacy.epsilon=8", "seed=0"),
    ("privacy.epsilon=8", "seed=1"),
  ]


@pytest.mark.parametrize(
  "text", ["", "seed", "seed=", "seed=1,,2", "=1;seed=2"]
)
def test_a_malformed_grid_is_refused(text):
  with pytest.raises(ValueError, match="--sweep to be"):
    sweep.parse_grid(text)


def test_a_field_twice_is_refused():
  with pytest.raises(ValueError, match="once"):
    sweep.parse_grid("seed=1;seed=2")


@pytest.mark.parametrize("text", ["2/2", "1", "-1/2", "a/b", "0/0"])
def test_a_malformed_shard_is_refused(text):
  with pytest.raises(ValueError, match="sweep_shard"):
    sweep.parse_shard(text)


RUNS = [("seed=0",), ("seed=1",), ("seed=2",)]


@pytest.fixture
def started(monkeypatch):
  """Runs that end, number 1 badly once; what the summary said meanwhile."""
  found = []

  def fake(command, check):
    del check
    flags = dict(f.lstrip("-").split("=", 1) for f in command if "=" in f)
    folder = pathlib.Path(flags["workdir"])
    seed = int(flags["config.seed"])
    summary = records.read_json(folder.parent / "sweep.json")
    found.append((seed, [run["state"] for run in summary["runs"]]))
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    if seed == 1 and len(found) < 4:
      return subprocess.CompletedProcess(command, 3)
    (folder / "summary.json").write_text('{"accuracy": 0.5}')
    return subprocess.CompletedProcess(command, 0)

  monkeypatch.setattr(sweep, "subprocess", types.SimpleNamespace(run=fake))
  return found


def go(tmp_path, shard):
  return sweep.run(
    RUNS,
    flags=[],
    workdir=tmp_path / "w",
    shard=shard,
    tuning=config_lib.Tuning.PUBLIC,
  )


def test_shards_share_the_grid_out_and_one_summary(started, tmp_path):
  _, failed = go(tmp_path, (0, 2))
  assert [seed for seed, _ in started] == [0, 2]
  assert failed == []
  text, failed = go(tmp_path, (1, 2))
  assert [seed for seed, _ in started] == [0, 2, 1]
  assert failed == ["seed=1"]
  assert "2 finished, 1 failed, 0 begun, 0 waiting, of 3 runs" in text
  assert (tmp_path / "w" / "sweep.csv").read_text().count("\n") == 3
  # Given again, only what failed is started, and is no failure any more.
  text, failed = go(tmp_path, (0, 1))
  assert [seed for seed, _ in started] == [0, 2, 1, 1]
  assert started[3][1] == ["finished", "begun", "finished"]
  assert failed == []
  assert "3 finished" in text


def test_the_summary_is_written_while_runs_run(started, tmp_path):
  go(tmp_path, (0, 1))
  assert started == [
    (0, ["waiting"] * 3),
    (1, ["finished", "waiting", "waiting"]),
    (2, ["finished", "failed", "waiting"]),
  ]
  # Fails if: the summary waits for the end, or for this shard's runs alone.
