"""The attention benchmark runs everywhere, and its rows agree."""

import io

import pytest

from ppnet import config as config_lib
from ppnet.bench import attention
from ppnet.core import records
from ppnet.report import ratios


def test_every_row_runs_and_matches_the_reference(tmp_path):
  config = config_lib.ExperimentConfig(
    bench=config_lib.BenchConfig(
      subject=config_lib.BenchSubject.ATTENTION, cases="tiny", rounds=1
    )
  )
  record = attention.run(config, tmp_path, log=io.StringIO())
  assert records.read_json(tmp_path / "bench.json") == record
  rows = record["rows"]
  assert [row["name"] for row in rows] == [
    "XLA, no noise",
    "reference, no noise",
    "reference, SCORES",
    "reference, WEIGHTS",
    "tpu, no noise",
    "tpu, SCORES",
    "tpu, WEIGHTS",
  ]
  assert rows[0]["time_ratio"] == 1.0
  for row in rows[4:]:
    # bfloat16 has 8 bits; WEIGHTS divides by what is left of the weights.
    assert max(row["errors"].values()) < 0.03
  assert "tpu, SCORES" in ratios.bench_table(record)
  # Fails if: a kernel draws other noise than the reference.


def test_unknown_cases_are_named():
  with pytest.raises(ValueError, match="huge"):
    attention.parse_cases("tiny,huge")
