"""Rows of tokens: what sees what, what counts, and what a row is a unit of."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from ppnet.data import packing
from ppnet.data.packing import Loss, Record, RowUnit, Sequence

LONG = Sequence(prompt=(5, 6, 7), answer=(8, 2))
SHORT = Sequence(answer=(9, 3, 2))


def pack(*records, length=8, loss=Loss.CAUSAL, unit=RowUnit.RECORD):
  return packing.pack(
    [Record(sequences=sequences) for sequences in records],
    length=length,
    pad_id=0,
    loss=loss,
    unit=unit,
  )


def test_a_record_of_two_sequences_is_one_row_of_two_segments():
  (row,) = pack((LONG, SHORT)).rows
  expected = {
    "tokens": [5, 6, 7, 8, 9, 3, 0, 0],
    "targets": [6, 7, 8, 2, 3, 2, 0, 0],
    "positions": [0, 1, 2, 3, 0, 1, 0, 0],
    "segment_ids": [1, 1, 1, 1, 2, 2, 0, 0],
    "loss_mask": [1, 1, 1, 1, 1, 1, 0, 0],
  }
  for name, value in expected.items():
    np.testing.assert_array_equal(row[name], value, err_msg=name)
  # Fails if: the last token of one sequence has the next one's first as target.


def test_only_the_answer_counts_where_that_is_asked_for():
  (row,) = pack((LONG, SHORT), loss=Loss.ANSWER).rows
  np.testing.assert_array_equal(row["loss_mask"], [0, 0, 1, 1, 1, 1, 0, 0])


def test_records_share_no_row_unless_the_row_is_the_unit():
  alone = pack((LONG,), (SHORT,), (SHORT,))
  assert len(alone.rows) == alone.num_records == 3
  assert alone.unit == "one record"
  assert all(row["segment_ids"].max() == 1 for row in alone.rows)
  shared = pack((LONG,), (SHORT,), (SHORT,), unit=RowUnit.ROW)
  assert len(shared.rows) == 1
  assert shared.num_records == 3
  np.testing.assert_array_equal(
    shared.rows[0]["segment_ids"], [1, 1, 1, 1, 2, 2, 3, 3]
  )
  assert "one packed row" in shared.unit
  # Fails if: two records are clipped together and a record claims otherwise.


_sequences = st.builds(
  lambda prompt, answer: Sequence(prompt=tuple(prompt), answer=tuple(answer)),
  st.lists(st.integers(1, 9), max_size=3),
  st.lists(st.integers(1, 9), min_size=1, max_size=3),
)
_records = st.lists(
  st.lists(_sequences, min_size=1, max_size=2).map(tuple), max_size=6
)


@hypothesis.given(_records, st.sampled_from(Loss), st.sampled_from(RowUnit))
def test_every_target_is_kept_once_and_in_order(records, loss, unit):
  packed = pack(*records, length=11, loss=loss, unit=unit)
  got = [
    int(token)
    for row in packed.rows
    for token in row["targets"][row["loss_mask"] > 0]
  ]
  expected = []
  for sequences in records:
    for sequence in sequences:
      tokens = sequence.prompt + sequence.answer
      counted = tokens if loss is Loss.CAUSAL else sequence.answer
      # The first token of a sequence has nothing before it.
      expected += counted[len(counted) == len(tokens) :]
  assert got == expected


@hypothesis.given(_records, st.integers(0, 5))
def test_one_record_less_is_one_row_less_under_the_record_unit(records, which):
  hypothesis.assume(which < len(records))
  rows = pack(*records, length=11).rows
  fewer = pack(*records[:which], *records[which + 1 :], length=11).rows
  kept = rows[:which] + rows[which + 1 :]
  for one, other in zip(fewer, kept, strict=True):
    for name in one:
      np.testing.assert_array_equal(one[name], other[name])
  # Fails if: a record's place depends on the others.


def test_what_does_not_fit_is_an_error_that_names_the_record():
  with pytest.raises(ValueError, match=r"at most 3 .*record=1, positions=4"):
    pack((SHORT,), (LONG,), length=3)
  with pytest.raises(ValueError, match=r"at least one token.*record=0"):
    pack((Sequence(),))
