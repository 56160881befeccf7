"""What a shadow model costs: how a part of the steps stands for all of them."""

import io

import pytest

from ppnet import config as config_lib
from ppnet.bench import shadows
from tests import tiny


def test_the_steps_that_were_not_measured_last_as_long_as_the_others():
  found = shadows._extrapolated(
    # Of three calls of a step each; the first one compiles.
    [(50.0, 90.0), (54.0, 97.0), (58.0, 104.0)],
    {"secs": 60.0, "cpu_secs": 110.0, "memory_mib": 1.0},
    num_models=8,
    num_steps=10,
  )
  assert found == {
    "secs": (60 + 7 * 4) / 8,
    "cpu_secs": (110 + 7 * 7) / 8,
    "steps_secs": 10 * 4 / 8,
    "steps_cpu_secs": 10 * 7 / 8,
  }
  # Fails if: what was measured is counted again, or the first call, which
  # compiled, is taken for a step.


def test_rows_compare_processes_and_steps_alone():
  config = config_lib.ExperimentConfig(
    audit=config_lib.AuditConfig(num_models=4, models_at_once=4)
  )
  own = {"secs": 40.0, "cpu_secs": 60.0, "steps_secs": 20.0}
  beside = {
    "secs": 8.0,
    "cpu_secs": 18.0,
    "steps_secs": 6.0,
    "steps_cpu_secs": 11.0,
  }
  memory = {"memory_mib": 500.0}
  rows = shadows._rows(
    config,
    {
      shadows._ALONE: [own | memory, own | memory],
      shadows._BESIDE: [beside | memory, beside | memory],
    },
  )
  assert [row["time_ratio"] for row in rows] == [
    1.0,
    pytest.approx(0.2),
    1.0,
    pytest.approx(0.3),
  ]
  assert rows[1]["cpu_time_ratio"] == pytest.approx(0.3)
  assert [row["meets_time"] for row in rows] == [None, True, None, False]
  assert "3 of" in rows[1]["note"]
  text = shadows.table({"rows": rows})
  assert "0.200" in text
  assert "0.300" in text
  assert text.count("4 models in one process") == 2


@pytest.mark.slow
def test_a_round_measures_both_for_real(tmp_path):
  config = tiny.experiment(num_steps=4)
  config.job = config_lib.Job.BENCHMARK
  config.audit = config_lib.AuditConfig(num_models=2, models_at_once=2)
  config.bench = config_lib.BenchConfig(
    subject=config_lib.BenchSubject.SHADOWS, cases="own", rounds=1
  )
  (tmp_path / "bench").mkdir()
  record = shadows.run(config, tmp_path / "bench", log=io.StringIO())
  assert record["is_complete"]
  assert len(record["rows"]) == 4
  for row in record["rows"]:
    assert row["secs"] > 0
  whole, _, steps, _ = record["rows"]
  assert steps["secs"] < whole["secs"]  # Without start-up and compilation.
  # Fails if: a name in a run's metrics is not what the benchmark reads.
