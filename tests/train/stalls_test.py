"""What the watchdog says: of waits that really take long, and by a clock."""

import io
import time
import types

import pytest

from ppnet.train import stalls


def a_slow_thing(secs):
  time.sleep(secs)


def test_a_real_wait_is_named_again_and_then_over():
  log, recorded = io.StringIO(), []
  with (
    stalls.Watchdog(
      limit_secs=0.1, log=log, record=lambda *args: recorded.append(args)
    ) as watchdog,
    watchdog.waiting_for("the data of step 7"),
  ):
    a_slow_thing(0.5)
  text = log.getvalue()
  # A busy machine may wake it late, and never early.
  assert 2 <= len(recorded) <= 5
  for number, (what, secs) in enumerate(recorded, start=1):
    assert what == "the data of step 7"
    assert secs >= number * 0.1
  assert text.count(": the data of step 7. Nothing is ended") == len(recorded)
  assert text.count("perf.stall_secs=0.1") == len(recorded)
  # Where it hangs, in the thread that waits.
  assert text.count("in a_slow_thing") == len(recorded)
  assert text.count("Thread MainThread") == len(recorded)
  assert text.count("The wait is over after") == 1
  # Fails if: a stall is said once, or without what or where.


class ByHand:
  """A watchdog whose clock, and whose looking, the test does."""

  def __init__(self, monkeypatch, record=None):
    self.now = 0.0
    self.log, self.recorded = io.StringIO(), []
    monkeypatch.setattr(
      stalls, "time", types.SimpleNamespace(monotonic=lambda: self.now)
    )
    self.watchdog = stalls.Watchdog(
      limit_secs=1000.0,
      log=self.log,
      record=record or (lambda what, secs: self.recorded.append((what, secs))),
    )

  def after(self, secs):
    self.now += secs
    return self.watchdog.look()


@pytest.fixture
def by_hand(monkeypatch):
  hand = ByHand(monkeypatch)
  yield hand
  hand.watchdog.close()


def test_it_reports_at_each_multiple_of_the_limit(by_hand):
  with by_hand.watchdog.waiting_for("the data"):
    assert by_hand.after(999) == 1
    assert by_hand.recorded == []
    assert by_hand.after(1) == 1000
    assert by_hand.after(1) == 999
    assert by_hand.after(2500) == 499  # Woken late: once for what it missed.
    assert by_hand.after(499) == 1000
  assert by_hand.recorded == [
    ("the data", 1000), ("the data", 3501), ("the data", 4000),
  ]  # fmt: skip
  assert "The wait is over after 4000 s: the data." in by_hand.log.getvalue()


def test_short_waits_do_not_add_up(by_hand):
  for _ in range(5):
    with by_hand.watchdog.waiting_for("the data"):
      assert by_hand.after(900) == 100
  assert by_hand.after(5000) == 1000  # Work, not a wait.
  assert by_hand.recorded == []
  assert by_hand.log.getvalue() == ""


def test_of_nested_waits_the_inner_one_counts(by_hand):
  with by_hand.watchdog.waiting_for("the outer"):
    by_hand.after(900)
    with by_hand.watchdog.waiting_for("the inner"):
      by_hand.after(1500)
    by_hand.after(900)
  assert by_hand.recorded == [("the inner", 1500)]


def test_each_part_of_a_wait_has_the_whole_limit(by_hand):
  with by_hand.watchdog.waiting_for("an evaluation"):
    for number in range(5):
      by_hand.after(900)
      by_hand.watchdog.now(f"an evaluation, batch {number}")
    by_hand.after(1500)
  assert by_hand.recorded == [("an evaluation, batch 4", 1500)]
  assert "The wait is over after 1500 s" in by_hand.log.getvalue()


def test_a_record_that_fails_is_said_and_ends_nothing(monkeypatch):
  def record(what, secs):
    raise OSError("no space left")

  hand = ByHand(monkeypatch, record)
  with hand.watchdog.waiting_for("a checkpoint"):
    hand.after(1000)
    hand.after(1000)
  hand.watchdog.close()
  text = hand.log.getvalue()
  assert text.count("could not be recorded: no space left") == 2


def test_a_closed_log_ends_nothing(by_hand):
  by_hand.log.close()
  with by_hand.watchdog.waiting_for("a checkpoint"):
    by_hand.after(1000)
    by_hand.after(1000)
  assert [secs for _, secs in by_hand.recorded] == [1000, 2000]
