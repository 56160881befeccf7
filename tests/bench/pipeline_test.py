"""The pipelines' benchmark: rows, goals, table and figure."""

import importlib.util
import json

import pytest

from ppnet import config as config_lib
from ppnet import main
from ppnet.bench import pipeline
from ppnet.core import records
from ppnet.report import throughput
from tests.data import raw_tools


@pytest.fixture
def small(monkeypatch):
  """Rounds of a few records."""
  monkeypatch.setattr(pipeline, "_BATCH", 8)
  monkeypatch.setattr(pipeline, "_STEPS", 2)


def _config(path, **bench):
  return config_lib.ExperimentConfig(
    job=config_lib.Job.BENCHMARK,
    data=config_lib.DataConfig(path=str(path)),
    bench=config_lib.BenchConfig(
      subject=config_lib.BenchSubject.PIPELINE, rounds=1, **bench
    ),
  )


def test_every_row_reads_and_the_goal_is_judged(
  small, tmp_path, monkeypatch, capsys
):
  raw_tools.write_idx(
    tmp_path / "fashion-mnist", train=40, test=10, shape=(28, 28)
  )
  contenders = {
    name: make
    for name, make in pipeline._contenders().items()
    if "workers" not in name or "0 workers" in name
  }
  monkeypatch.setattr(pipeline, "_contenders", lambda: contenders)
  main.run_job(
    _config(tmp_path, cases="fashion_mnist,fashion_mnist/augmented"),
    tmp_path / "run",
  )
  record = records.read_json(tmp_path / "run" / "bench.json")
  assert record["is_complete"]
  assert len(record["rows"]) == 2 * len(contenders)
  has_torch = importlib.util.find_spec("torch") is not None
  for row in record["rows"]:
    if "torch" in row["name"] and not has_torch:
      assert row["time_ratio"] is row["examples_per_sec"] is None
      assert "not installed" in row["note"]
      continue
    assert row["examples_per_sec"] > 0
    assert row["is_baseline"] == (row["meets_goal"] is None)
    if row["is_baseline"]:
      assert row["time_ratio"] == 1
  assert "Fashion-MNIST: decode, rotate" in capsys.readouterr().out
  figure = tmp_path / "run" / "figures" / "pipeline.png"
  assert figure.stat().st_size > 10_000


@pytest.mark.slow
def test_workers_read_as_well(small, tmp_path):
  raw_tools.write_idx(
    tmp_path / "fashion-mnist", train=40, test=10, shape=(28, 28)
  )
  record = pipeline.run(
    _config(tmp_path, cases="fashion_mnist"), tmp_path / "run"
  )
  rates = {row["name"]: row["examples_per_sec"] for row in record["rows"]}
  assert rates["ppnet, 2 workers"] > 0


def test_unknown_case_and_missing_data_are_named(tmp_path):
  with pytest.raises(ValueError, match="fashion_mnist/augmented"):
    pipeline.parse_cases("mnist")
  with pytest.raises(ValueError, match="a folder fsdd below"):
    pipeline.run(_config(tmp_path, cases="fsdd"), tmp_path)


def test_table_names_holes_and_misses():
  row = {
    "name": "a",
    "case": "c",
    "is_peer": False,
    "is_baseline": True,
    "time_ratio": 1.0,
    "time_ratio_quartiles": [1.0, 1.0],
    "examples_per_sec": 1234.5,
    "meets_goal": None,
    "note": "",
  }
  slow = row | {
    "name": "b",
    "is_baseline": False,
    "time_ratio": 2.0,
    "meets_goal": False,
  }
  hole = dict.fromkeys(row) | {
    "name": "d",
    "case": "c",
    "is_peer": True,
    "is_baseline": False,
    "note": "PyTorch is not installed",
  }
  record = {
    "rounds": 3,
    "rows": [row, slow, hole],
    "cases": {
      "c": {
        "title": "A case",
        "goal_examples_per_sec": 5000,
        "examples_per_round": 100,
        "others_cpu_share": 0.5,
      }
    },
  }
  text = throughput.table(json.loads(json.dumps(record)))
  assert "1,230" in text  # Three digits.
  assert "missed" in text
  assert "PyTorch is not installed" in text
  assert "50% of the processor" in text
  throughput.draw(record)
