"""Which steps a trace has. That it is one is seen in `watching_test`."""

import io

import jax
import pytest

from ppnet.train import profiling


@pytest.mark.parametrize(
  ("text", "steps"), [("10:13", (10, 13)), ("1:1", (1, 1)), ("20:20", (20, 20))]
)
def test_both_ends_are_traced(text, steps):
  assert profiling.parse(text, num_steps=20) == steps


@pytest.mark.parametrize("text", ["0:3", "13:10", "10", "a:b", "3:-1", "", ":"])
def test_another_form_is_refused_with_the_one_to_use(text):
  with pytest.raises(ValueError, match=r"10:13 traces") as caught:
    profiling.parse(text, num_steps=20)
  assert f"got profile_steps={text!r}" in str(caught.value)


def test_steps_that_the_run_does_not_have_are_refused():
  with pytest.raises(ValueError, match="within the run's 20 steps.*'18:21'"):
    profiling.parse("18:21", num_steps=20)


@pytest.fixture
def calls(monkeypatch):
  calls = []
  monkeypatch.setattr(
    jax.profiler, "start_trace", lambda folder: calls.append("start")
  )
  monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
  return calls


def traced(calls, steps, *, begin, end, tmp_path):
  """The steps between a trace's start and its end."""
  log = io.StringIO()
  trace = profiling.Trace(tmp_path, steps, log=log)
  trace.begin(begin)
  found = []
  for step in range(begin + 1, end + 1):
    if calls and calls[-1] == "start":
      found.append(step)
    if trace.changes_after(step):
      trace.reached(step)
  trace.close()
  trace.close()
  return found, log.getvalue()


@pytest.mark.parametrize(
  ("steps", "begin", "end", "expected"),
  [
    ((3, 5), 0, 9, [3, 4, 5]),
    ((1, 2), 0, 9, [1, 2]),
    ((4, 4), 0, 9, [4]),
    ((8, 9), 0, 9, [8, 9]),
    ((3, 5), 2, 9, [3, 4, 5]),  # A restart before it,
    ((3, 5), 3, 9, [4, 5]),  # within it,
    ((3, 5), 0, 4, [3, 4]),  # and an end within it.
    (None, 0, 9, []),
  ],
)
def test_the_steps_of_a_trace(calls, tmp_path, steps, begin, end, expected):
  found, _ = traced(calls, steps, begin=begin, end=end, tmp_path=tmp_path)
  assert found == expected
  assert calls == (["start", "stop"] if expected else [])
  # Fails if: a step too few or too many is traced, or a trace is left open.


def test_a_restart_behind_the_steps_says_so_and_goes_on(calls, tmp_path):
  found, text = traced(calls, (3, 5), begin=5, end=9, tmp_path=tmp_path)
  assert found == calls == []
  assert "No trace of the steps 3 to 5: 5 steps were done before" in text
