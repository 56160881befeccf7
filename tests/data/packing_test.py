"""Rows of tokens: what sees what, what counts, and what a row is a unit of."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from ppnet import config as config_lib
from ppnet.data import examples as examples_lib
from ppnet.data import layout as layout_lib
from ppnet.data import packing, pipeline, sources, tokenizers
from ppnet.data.packing import Loss, Record, RowUnit, Sequence
from tests.data import conftest

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


# Rows of a data set.


class _Texts:
  """A source of texts of 1, 2, ... letters; one is no text."""

  def __init__(self, *lengths: int):
    self._lengths = lengths

  def __len__(self) -> int:
    return len(self._lengths)

  def __getitem__(self, index) -> sources.Record:
    length = self._lengths[index.__index__()]
    return sources.Record(id=f"r{index}", text=chr(97 + index) * length)

  def user(self, index) -> None:
    return None

  @property
  def description(self) -> str:
    return "texts"


def _examples(*lengths, task=config_lib.Task.CAUSAL, skip=False):
  config = conftest.digits_config()
  config.data = config_lib.DataConfig(
    task=task,
    tokenizer=config_lib.TokenizerKind.BYTES,
    vocab_size=300,
    prompt="",
    lengths=(8,),
  )
  return examples_lib.Examples(
    _Texts(*lengths),
    layout=layout_lib.Layout(
      config,
      counts={},
      has_text=True,
      tokenizer=tokenizers.ByteTokenizer(class_names=[]),
    ),
    chains={},
    skip=skip,
    cache=True,
    seed=0,
  )


def _packed(examples, unit=config_lib.PrivacyUnit.PACKED_ROW):
  return packing.PackedExamples(examples, unit=unit)


def test_whole_records_share_rows_in_their_order():
  packed = _packed(_examples(3, 5, 2, 9, 1, 1))
  # A text of n letters takes n positions: <s> takes one, the last letter none.
  assert [packed.records(row) for row in range(len(packed))] == [
    [0, 1], [2], [3], [4, 5],
  ]  # fmt: skip
  row = packed[0]
  assert row["segment_ids"].tolist() == [1, 1, 1, 2, 2, 2, 2, 2]
  assert row["positions"].tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
  assert row["loss_mask"].tolist() == [1] * 8
  assert row["num_bytes"] == 8
  decode = tokenizers.ByteTokenizer(class_names=[]).decode
  assert decode(row["targets"]) == "aaabbbbb"
  # A longer text is cut, as it is without packing.
  assert packed[2]["num_bytes"] == 8


def test_packed_rows_are_drawn_and_padded_as_units():
  packed = _packed(_examples(3, 5, 2, 8))
  (step,) = pipeline.train_steps(
    packed,
    draw=lambda step: np.array([0, 2]),
    num_steps=1,
    microbatch_size=4,
    num_threads=0,
    prefetch_steps=0,
  )
  (batch,) = step["microbatches"]
  assert batch["index"].tolist() == [0, 2, -1, -1]
  assert batch["is_padding_example"].tolist() == [False, False, True, True]
  assert not batch["loss_mask"][2:].any()
  assert batch["segment_ids"].shape == (4, 8)


def test_padding_of_rows_counts_for_nothing():
  packed = _packed(_examples(3, 5, 2, 8))
  batch = packed.batch([None, examples_lib.Row(1), None], size=4)
  assert batch["is_padding_example"].tolist() == [False] + [True] * 3
  assert batch["index"].tolist() == [1, -1, -1, -1]
  for name in ("loss_mask", "num_bytes"):
    assert not batch[name][1:].any()
  # Fails if: the template of the padding is taken for a row.


def test_records_of_two_people_share_no_row_that_is_no_unit():
  for unit in config_lib.PrivacyUnit:
    if unit is not config_lib.PrivacyUnit.PACKED_ROW:
      with pytest.raises(ValueError, match=f"rows of several.*{unit.name}"):
        _packed(_examples(3, 5), unit=unit)
  # Fails if: an example's guarantee is claimed of what is clipped together.


def test_a_bad_record_is_in_no_row_if_it_is_skipped():
  with pytest.raises(sources.BadRecordError, match="text is empty"):
    _packed(_examples(3, 0, 4))
  packed = _packed(_examples(3, 0, 4, skip=True))
  assert packed.records(0) == [0, 2]
  assert packed.bad_records.ids == ("r1",)


def test_classes_are_not_packed():
  with pytest.raises(ValueError, match="task='CLASSIFY'"):
    _packed(_examples(3, task=config_lib.Task.CLASSIFY))
