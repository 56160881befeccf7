"""Tests of ppnet.data.pipeline: steps and evaluation."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from ppnet.data import examples as examples_lib
from ppnet.data import pipeline
from tests.data import tiny_examples

_steps = tiny_examples.steps


def _poisson(step: int) -> np.ndarray:
  """Positions drawn among 23 by the step alone; sometimes none."""
  rng = np.random.default_rng([7, step])
  return np.flatnonzero(rng.random(23) < rng.choice([0.0, 0.2, 0.7]))


@hypothesis.settings(derandomize=True, deadline=None, max_examples=60)
@hypothesis.given(
  drawn=st.lists(st.sets(st.integers(0, 12)), min_size=1, max_size=4),
  size=st.integers(1, 6),
  num_threads=st.integers(0, 2),
)
def test_every_drawn_example_is_in_its_step_once(drawn, size, num_threads):
  steps = _steps(
    tiny_examples.examples(13),
    lambda step: np.array(sorted(drawn[step]), np.int64),
    num_steps=len(drawn),
    microbatch_size=size,
    num_threads=num_threads,
  )
  for t, (positions, step) in enumerate(zip(drawn, steps, strict=True)):
    batches = step["microbatches"]
    assert step["step"] == t
    assert step["num_examples"] == len(positions)
    assert len(batches) == -(-len(positions) // size)
    seen = []
    for batch in batches:
      assert batch["image"].shape == (size, 2, 3)
      assert batch["image"].dtype == np.float32
      real = ~batch["is_padding_example"]
      seen += batch["index"][real].tolist()
      assert (batch["index"][~real] == -1).all()
      assert not batch["image"][~real].any()
      np.testing.assert_array_equal(
        batch["image"][real][:, 0, 0], batch["index"][real] + 1
      )
    assert seen == sorted(positions)
  # Fails if: a batch is truncated, or a drawn example is lost or doubled.


@pytest.mark.parametrize("at", [0, 1, 4, 9])
@pytest.mark.parametrize("num_threads", [0, 2])
def test_resumed_steps_equal_uninterrupted_ones(at, num_threads):
  options = {"num_steps": 9, "num_threads": num_threads}
  whole = list(_steps(tiny_examples.examples(23), _poisson, **options))
  assert {step["num_examples"] == 0 for step in whole} == {True, False}
  rest = list(
    _steps(tiny_examples.examples(23), _poisson, start_step=at, **options)
  )
  assert [step["step"] for step in rest] == list(range(at, 9))
  for ours, theirs in zip(rest, whole[at:], strict=True):
    tiny_examples.assert_equal(ours, theirs)


def test_threads_and_prefetch_change_nothing():
  reference = list(_steps(tiny_examples.examples(23), _poisson, num_threads=0))
  for num_threads, prefetch_steps in [(1, 1), (2, 4), (3, 0)]:
    steps = _steps(
      tiny_examples.examples(23),
      _poisson,
      num_threads=num_threads,
      prefetch_steps=prefetch_steps,
    )
    for ours, theirs in zip(steps, reference, strict=True):
      tiny_examples.assert_equal(ours, theirs)


@pytest.mark.parametrize(
  "positions",
  [[3, 3], [4, 2], [0, 23], [-1, 0], [0.5, 1.0], [[1, 2]], 3, [True, False]],
)
def test_draw_that_is_no_set_of_positions_is_refused(positions):
  steps = _steps(
    tiny_examples.examples(23), lambda step: np.array(positions), num_threads=0
  )
  with pytest.raises(ValueError, match=r"increasing integers in \[0, 23\)"):
    next(iter(steps))
  # Fails if: a position wraps around, or a record counts twice.


@pytest.mark.parametrize("field", ["num_steps", "microbatch_size"])
def test_size_that_is_not_positive_is_named(field):
  with pytest.raises(ValueError, match=f"{field}=0"):
    _steps(tiny_examples.examples(3), _poisson, **{field: 0})
  with pytest.raises(ValueError, match="num_examples=0"):
    _steps(tiny_examples.examples(0), _poisson)


# Evaluation.


@pytest.mark.parametrize(("count", "size"), [(7, 3), (6, 3), (2, 5), (0, 4)])
def test_evaluation_sees_every_record_once_in_order(count, size):
  batches = list(
    pipeline.eval_batches(tiny_examples.examples(count), batch_size=size)
  )
  assert len(batches) == -(-count // size)
  assert all(batch["image"].shape == (size, 2, 3) for batch in batches)
  seen = [
    index
    for batch in batches
    for index in batch["index"][~batch["is_padding_example"]].tolist()
  ]
  assert seen == list(range(count))


def test_evaluation_batch_size_must_be_positive():
  with pytest.raises(ValueError, match="batch_size=0"):
    next(pipeline.eval_batches(tiny_examples.examples(3), batch_size=0))


def _users(records, max_records, choose=None):
  return pipeline.Users(
    records=[np.array(own) for own in records],
    max_records=max_records,
    choose=choose or (lambda step, user, n: np.arange(min(n, max_records))),
  )


def test_users_take_their_own_records_and_padding():
  users = _users([[0, 3, 5], [1], [2, 4]], 2)
  draw = lambda step: [np.array([0, 1]), np.array([], int), np.arange(3)][step]
  steps = list(
    _steps(
      tiny_examples.examples(6),
      draw,
      num_steps=3,
      users=users,
      microbatch_size=2,
    )
  )
  (first,), empty, last = (step["microbatches"] for step in steps)
  assert first["index"].tolist() == [0, 3, 1, -1]
  assert first["is_padding_example"].tolist() == [False] * 3 + [True]
  assert empty == []
  assert [b["index"].tolist() for b in last] == [[0, 3, 1, -1], [2, 4, -1, -1]]
  assert [step["num_examples"] for step in steps] == [2, 0, 3]
  # Fails if: a user's rows are cut in two, or another one's fill them up.


def test_a_position_that_is_no_user_is_refused():
  users = _users([[0, 3, 5], [1], [2, 4]], 2)
  with pytest.raises(ValueError, match=r"increasing integers in \[0, 3\)"):
    list(
      _steps(tiny_examples.examples(6), lambda step: np.array([3]), users=users)
    )


def test_too_many_records_of_a_user_are_refused():
  users = _users([[0, 3, 5]], 2, choose=lambda step, user, n: np.arange(n))
  with pytest.raises(ValueError, match="at most 2 records of a user"):
    list(
      _steps(tiny_examples.examples(6), lambda step: np.array([0]), users=users)
    )


def test_views_repeat_a_record_and_are_numbered():
  steps = list(
    _steps(
      tiny_examples.examples(5),
      lambda step: np.array([1, 4]),
      num_views=3,
      num_steps=1,
    )
  )
  (batch,) = steps[0]["microbatches"]
  assert batch["index"].tolist() == [1] * 3 + [4] * 3 + [-1] * 6
  assert batch["view"].tolist() == [0, 1, 2, 0, 1, 2] + [0] * 6
  assert batch["view"].dtype == np.int32


# Texts of several lengths.


def test_units_of_one_length_share_microbatches():
  dataset = tiny_examples.examples(13, lengths=(4, 8, 64), has_text=True)
  (step,) = _steps(
    dataset, lambda step: np.arange(13), num_steps=1, microbatch_size=3
  )
  # Record i has <s>, a picture's token and i letters.
  shapes = [b["tokens"].shape for b in step["microbatches"]]
  assert shapes == [(3, 4)] + [(3, 8)] * 2 + [(3, 64)] * 2
  rows = [b["index"].tolist() for b in step["microbatches"]]
  assert rows == [[0, 1, 2], [3, 4, 5], [6, -1, -1], [7, 8, 9], [10, 11, 12]]
  assert step["num_examples"] == 13


def test_a_user_s_rows_stay_together_whatever_their_lengths():
  dataset = tiny_examples.examples(6, lengths=(3, 64), has_text=True)
  users = _users([[0, 1], [2, 5]], 2)
  (step,) = _steps(dataset, lambda step: np.arange(2), num_steps=1, users=users)
  rows = [
    (b["tokens"].shape[1], b["index"][:2].tolist())
    for b in step["microbatches"]
  ]
  assert rows == [(3, [0, 1]), (64, [2, 5])]


def test_evaluation_pads_each_batch_as_little_as_it_can():
  dataset = tiny_examples.examples(6, lengths=(4, 64), has_text=True)
  batches = list(pipeline.eval_batches(dataset, batch_size=3))
  assert [b["tokens"].shape for b in batches] == [(3, 4), (3, 64)]


# Random transformations.


def _draws(step, row):
  return step["microbatches"][0]["image"][row, 0, 0]


def test_views_differ_and_depend_on_step_record_and_view_alone():
  transforms = (
    tiny_examples.Spread(),
    tiny_examples.Jitter(),
    tiny_examples.Halve(),
  )
  options = {"num_views": 2, "num_steps": 3, "microbatch_size": 2}
  steps = list(
    _steps(
      tiny_examples.examples(9, transforms=transforms),
      lambda step: np.array([3, 5]),
      **options,
    )
  )
  values = [[float(_draws(step, row)) for row in range(4)] for step in steps]
  drawn = np.array(values) * 2 + 2 - np.array([4, 4, 6, 6])  # Undo the rest.
  assert ((drawn >= 0) & (drawn < 1)).all()
  assert len(np.unique(drawn.round(5))) == 12  # Steps, records and views.
  # The same record in another company, another batch and another process.
  other = list(
    _steps(
      tiny_examples.examples(9, transforms=transforms),
      lambda step: np.array([1, 5, 8]),
      num_views=2,
      num_steps=3,
      microbatch_size=7,
      num_threads=0,
    )
  )
  for ours, theirs in zip(steps, other, strict=True):
    assert [_draws(ours, row) for row in (2, 3)] == [
      _draws(theirs, row) for row in (2, 3)
    ]
  # Fails if: a view depends on its batch, or repeats itself.


def test_each_random_transformation_draws_its_own_numbers():
  def values(num_jitters):
    jitters = [tiny_examples.Jitter() for _ in range(num_jitters)]
    dataset = tiny_examples.examples(
      9, transforms=(tiny_examples.Spread(), *jitters)
    )
    (step,) = _steps(dataset, lambda step: np.array([3]), num_steps=1)
    return float(_draws(step, 0)) - 4  # Record 3 shows 4.

  first = values(1)
  second = values(2) - first
  assert 0 < first < 1
  assert 0 < second < 1
  assert abs(first - second) > 1e-3
  names = {
    examples_lib._stream(name, number, place)
    for name in ("image", "audio")
    for number in range(3)
    for place in range(3)
  }
  assert len(names) == 18
  # Fails if: items or transformations of a record share their numbers.


def test_the_seed_names_the_views():
  def value(seed):
    dataset = tiny_examples.examples(
      9, transforms=(tiny_examples.Spread(), tiny_examples.Jitter()), seed=seed
    )
    (step,) = _steps(dataset, lambda step: np.array([3]), num_steps=1)
    return float(_draws(step, 0))

  assert value(7) == value(7) != value(8)


@pytest.mark.parametrize(
  "num_workers", [pytest.param(1, marks=pytest.mark.slow), 2]
)
def test_worker_processes_change_nothing(num_workers):
  dataset = tiny_examples.examples(
    23, transforms=(tiny_examples.Spread(), tiny_examples.Jitter())
  )
  options = {"num_views": 2, "num_threads": 1, "start_step": 1}
  alone = list(_steps(dataset, _poisson, **options))
  apart = list(_steps(dataset, _poisson, num_workers=num_workers, **options))
  assert len(apart) == 4
  for ours, theirs in zip(apart, alone, strict=True):
    tiny_examples.assert_equal(ours, theirs)
  # Fails if: a view, or a draw, depends on the process that makes it.


def test_padding_stays_zero_behind_elementwise_transformations():
  dataset = tiny_examples.examples(
    9, transforms=(tiny_examples.Spread(), tiny_examples.Halve())
  )
  (step,) = _steps(dataset, lambda step: np.array([3]), num_steps=1)
  (batch,) = step["microbatches"]
  assert batch["image"][0, 0, 0] == 4 / 2 - 1
  assert not batch["image"][1:].any()


def test_evaluation_leaves_random_transformations_out():
  chain = examples_lib.Chain(
    (tiny_examples.Spread(), tiny_examples.Jitter(), tiny_examples.Halve()),
    shape=(2, 3),
  ).without_augmentation()
  assert (chain.fixed, chain.random, chain.stacked) == (
    (tiny_examples.Spread(),),
    (),
    (tiny_examples.Halve(),),
  )


def test_wrong_shape_is_named():
  dataset = tiny_examples.examples(3, transforms=())
  with pytest.raises(ValueError, match=r"image arrays \[2, 3\].*got"):
    dataset[0]


# Hosts and workers.


@pytest.mark.parametrize("count", [2, 4])
def test_hosts_read_their_rows_and_all_rows_together(count):
  whole = list(_steps(tiny_examples.examples(23), _poisson, num_steps=12))
  # Some batches have padding, and of an odd number of rows.
  assert {step["num_examples"] % 4 for step in whole} == {0, 2, 3}
  parts = [
    list(
      _steps(
        tiny_examples.examples(23),
        _poisson,
        num_steps=12,
        host=pipeline.Host(own=(i,), of=count),
      )
    )
    for i in range(count)
  ]
  for step, *shares in zip(whole, *parts, strict=True):
    assert all(
      len(s["microbatches"]) == len(step["microbatches"]) for s in shares
    )
    for number, batch in enumerate(step["microbatches"]):
      joined = {
        name: np.concatenate([s["microbatches"][number][name] for s in shares])
        for name in batch
      }
      tiny_examples.assert_equal(joined, batch)
  tests = [
    list(
      pipeline.eval_batches(
        tiny_examples.examples(23),
        batch_size=4,
        host=pipeline.Host(own=(i,), of=count),
      )
    )
    for i in range(count)
  ]
  assert {len(batches) for batches in tests} == {6}
  seen = np.concatenate([b["index"] for batches in tests for b in batches])
  assert sorted(seen[seen >= 0]) == list(range(23))
  with pytest.raises(ValueError, match="evenly among the hosts"):
    _steps(
      tiny_examples.examples(23),
      _poisson,
      microbatch_size=count + 1,
      host=pipeline.Host(of=count),
    )


def test_a_host_decodes_nothing_of_another_one():
  class Watched(tiny_examples.Tiny):
    read: list[int] = []

    def __getitem__(self, index):
      self.read.append(index.__index__())
      return super().__getitem__(index)

  dataset = tiny_examples.examples(8)
  dataset._source = source = Watched(8)
  list(
    _steps(
      dataset,
      lambda step: np.arange(8),
      num_steps=1,
      host=pipeline.Host(own=(1,), of=2),
    )
  )
  assert sorted(source.read) == [2, 3, 6, 7]
