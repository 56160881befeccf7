"""Interleaving, ratios and verdicts, with programs whose time is known."""

import math
import time

import jax.numpy as jnp
import numpy as np
import pytest

from ppnet.bench import measure

GOAL = measure.Goal(time_ratio=1.05, memory_ratio=1.10)


class Clock:
  """Stands in for `time`: programs take as long as they say."""

  def __init__(self, monkeypatch):
    self.now = 0.0
    self.worked = 0.0
    monkeypatch.setattr(measure.time, "perf_counter", lambda: self.now)
    monkeypatch.setattr(measure.time, "process_time", lambda: self.worked)

  def program(self, secs, *, memory_bytes=100, flops=(10, 10), work=1.0):
    remaining = [*secs]

    def run():
      self.now += remaining.pop(0)
      self.worked += work

    return measure.Program(run=run, memory_bytes=memory_bytes, flops=flops)


def contender(name, program, *, framework="jax", **fields):
  return measure.Contender(
    name=name, framework=framework, program=program, **fields
  )


def test_every_contender_runs_once_a_round_and_each_has_each_place():
  names = ["a", "b", "c", "d"]
  orders = [measure.order(names, n) for n in range(4)]
  for one in orders:
    assert sorted(one) == names
  for place in range(4):
    assert {one[place] for one in orders} == set(names)
  followers = {(one[i], one[i + 1]) for one in orders for i in range(3)}
  assert len(followers) == 8  # Both neighbours, not always the same one.


def test_ratios_are_of_medians_to_the_framework_s_first(monkeypatch):
  clock = Clock(monkeypatch)
  rows = measure.rows(
    [
      contender("plain", clock.program([2.0, 2.0, 8.0])),
      contender(
        "engine",
        clock.program(
          [3.0, 9.0, 3.0], memory_bytes=150, flops=(12, 15), work=1.75
        ),
        facts={"sum_error": 0.5},
      ),
      contender("other", clock.program([5.0] * 3), framework="torch"),
      contender("hooks", clock.program([10.0] * 3), framework="torch"),
    ],
    case="one",
    rounds=3,
    goal=GOAL,
  )
  plain, engine, other, hooks = rows
  assert [row["name"] for row in rows] == ["plain", "engine", "other", "hooks"]
  assert plain["time_ratio"] == plain["memory_ratio"] == 1.0
  assert other["time_ratio"] == plain["flops_ratio"] == 1.0
  assert engine["time_ratio"] == 1.5  # 3 over 2, whatever the outliers.
  assert engine["cpu_time_ratio"] == 1.75  # Waiting is not in it.
  assert engine["memory_ratio"] == 1.5
  assert (engine["flops_ratio"], engine["flops_ratio_most"]) == (1.2, 1.5)
  within_rounds = np.quantile([3 / 2, 9 / 2, 3 / 8], [0.25, 0.75])
  np.testing.assert_allclose(engine["time_ratio_quartiles"], within_rounds)
  assert engine["sum_error"] == 0.5
  assert hooks["time_ratio"] == 2.0
  assert [row["is_baseline"] for row in rows] == [True, False, True, False]
  # Fails if: means, the fastest, or another framework's baseline are taken.


@pytest.mark.parametrize(
  ("secs", "memory_bytes", "met"),
  [
    (1.05, 110, (True, True, True)),
    (1.05, 111, (True, False, False)),
    (1.06, 110, (False, True, False)),
    (1.06, 111, (False, False, False)),
  ],
)
def test_a_goal_is_met_by_both_at_once(monkeypatch, secs, memory_bytes, met):
  clock = Clock(monkeypatch)
  rows = measure.rows(
    [
      contender("plain", clock.program([1.0])),
      contender("engine", clock.program([secs], memory_bytes=memory_bytes)),
    ],
    case="one",
    rounds=1,
    goal=GOAL,
  )
  keys = ("meets_time", "meets_memory", "meets_both")
  assert tuple(rows[1][key] for key in keys) == met
  assert tuple(rows[0][key] for key in keys) == (None, None, None)


def test_what_cannot_be_measured_is_a_hole_with_its_reason(monkeypatch):
  clock = Clock(monkeypatch)
  rows = measure.rows(
    [
      contender("plain", clock.program([1.0])),
      contender("absent", None, note="not installed: x"),
      contender("base", None, framework="torch", note="not installed: y"),
      contender("on it", clock.program([1.0], flops=None), framework="torch"),
    ],
    case="one",
    rounds=1,
    goal=GOAL,
  )
  assert rows[1]["note"] == "not installed: x"
  for row in rows[1:]:
    for key in ("time_ratio", "memory_ratio", "flops_ratio", "meets_both"):
      assert row[key] is None
  assert rows[3]["secs"] == 1.0
  assert all(row.keys() == rows[0].keys() for row in rows)


def test_two_rows_of_one_name_are_refused():
  twice = [contender("a", None), contender("a", None)]
  with pytest.raises(ValueError, match="distinct names"):
    measure.rows(twice, case="one", rounds=1)
  with pytest.raises(ValueError, match="rounds > 0"):
    measure.rows(twice[:1], case="one", rounds=0)


def test_a_compiled_program_tells_its_memory_and_flops():
  x = jnp.ones((64, 32))
  program = measure.compile_program(lambda x: (x @ x.T) @ x, x)
  assert program.run().shape == (64, 32)
  assert program.flops == (4 * 64 * 64 * 32,) * 2
  assert program.memory_bytes >= 4 * 64 * 64  # The square in the middle.


def test_load_counts_others_and_not_us(monkeypatch):
  """A machine of 4 cores; 30 busy seconds in 10, of which 20 were ours."""
  busy, own, wall = iter([100.0, 130.0]), iter([5.0, 25.0]), iter([0.0, 10.0])
  monkeypatch.setattr(measure, "_busy_secs", lambda: next(busy))
  monkeypatch.setattr(measure.time, "process_time", lambda: next(own))
  monkeypatch.setattr(measure.time, "perf_counter", lambda: next(wall))
  monkeypatch.setattr(measure.os, "cpu_count", lambda: 4)
  record = measure.Load().record()
  assert record["others_cpu_share"] == 0.25
  assert len(record["load_average_before"]) == 3


def test_load_of_this_machine_is_a_share():
  load = measure.Load()
  time.sleep(0.05)
  share = load.record()["others_cpu_share"]
  assert share is None or (share >= 0 and math.isfinite(share))


def test_machine_says_what_was_measured_on():
  machine = measure.machine(packages=["pytest", "no-such-package"])
  assert machine["backend"] in ("cpu", "gpu", "tpu")
  assert machine["cores"] >= 1
  assert machine["versions"]["jax"]
  assert machine["versions"]["pytest"] == pytest.__version__
  assert machine["versions"]["no-such-package"] is None
