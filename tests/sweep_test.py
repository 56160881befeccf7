"""Grids are complete, and shards share them out."""

import pytest

from ppnet import sweep


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


def test_shards_share_the_grid_out(tmp_path, monkeypatch):
  started = []

  def fake(command, check):
    del check
    started.append([c for c in command if c.startswith("--config.")])
    return type("Result", (), {"returncode": 1})()

  monkeypatch.setattr(sweep.subprocess, "run", fake)
  runs = [("seed=0",), ("seed=1",), ("seed=2",)]
  for shard, expected in (((0, 2), [0, 2]), ((1, 2), [1])):
    started.clear()
    rows, failed = sweep.run(runs, flags=[], workdir=tmp_path, shard=shard)
    assert started == [[f"--config.seed={seed}"] for seed in expected]
    assert rows == []
    assert failed == [f"seed={seed}" for seed in expected]
