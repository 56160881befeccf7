"""Token sequences as rows of one shape, and what a row is a unit of.

A row is what is clipped, so a row is what is protected. Under `RowUnit.RECORD`
it holds one record, all of whose sequences are segments that do not see each
other: adding or removing a record adds or removes one row. Under `RowUnit.ROW`
several records share a row. That fills rows better and protects **less**: the
guarantee is then about a packed row, one record more may move every later one
to another row, and whatever is claimed must say `Packed.unit`.

>>> first = Sequence(prompt=(5, 6), answer=(7, 2))
>>> packed = pack([Record(sequences=(first,))], length=5, pad_id=0,
...               loss=Loss.ANSWER, unit=RowUnit.RECORD)
>>> packed.rows[0]["tokens"], packed.rows[0]["targets"]
(array([5, 6, 7, 0, 0], dtype=int32), array([6, 7, 2, 0, 0], dtype=int32))
>>> packed.rows[0]["loss_mask"]
array([0., 1., 1., 0., 0.], dtype=float32)
"""

import dataclasses
import enum
from collections.abc import Iterable, Iterator
from typing import SupportsIndex

import numpy as np

from ppnet import config as config_lib
from ppnet.core import checks
from ppnet.data import batching, sources
from ppnet.data import examples as examples_lib
from ppnet.data import layout as layout_lib


class Loss(enum.Enum):
  """Which targets count."""

  CAUSAL = "causal"  # Every token after the first of its sequence.
  ANSWER = "answer"  # The tokens of the answer.


class RowUnit(enum.Enum):
  """What one row is."""

  RECORD = "record"
  ROW = "row"  # Several records; protects a row, not a record.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sequence:
  """Tokens that see each other.

  Attributes:
    prompt: given; its tokens are targets under CAUSAL alone.
    answer: to be learnt, its end token included.
  """

  prompt: tuple[int, ...] = ()
  answer: tuple[int, ...] = ()

  @property
  def num_slots(self) -> int:
    """Positions that it takes: the last token is a target alone."""
    return len(self.prompt) + len(self.answer) - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
  """What one privacy unit contributed: one sequence or several."""

  sequences: tuple[Sequence, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packed:
  """Rows, and what they are units of.

  Attributes:
    rows: examples for `batching.stack`; tokens, targets, positions, segment_ids
      int32 [T] and loss_mask float32 [T]. Segments are numbered from 1; 0 is
      padding.
    unit: what a guarantee over these rows protects, in words for a record.
    num_records: records in all rows.
  """

  rows: tuple[batching.Batch, ...]
  unit: str
  num_records: int


def pack(
  records: Iterable[Record],
  *,
  length: int,
  pad_id: int,
  loss: Loss,
  unit: RowUnit,
) -> Packed:
  """Lays records out in rows; nothing is cut and nothing is left out.

  | case | row |
  | --- | --- |
  | a record shorter than a row | padded; padding is segment 0 |
  | a record longer than a row | `ValueError` |
  | a sequence of one token | no slots, since nothing precedes it |
  | a record without a target that counts | a row of loss 0 and gradient 0 |

  Args:
    records: in order.
    length: T, positions of a row.
    pad_id: token and target of padding.
    loss: which targets count.
    unit: RECORD gives every record a row of its own; ROW fills rows with whole
      records in order.

  Raises:
    ValueError: a record that does not fit a row, or an empty sequence.
  """
  checks.positive(length=length)
  records = list(records)
  for number, record in enumerate(records):
    _check(record, number, length=length)
  if unit is RowUnit.RECORD:
    groups = [[record] for record in records]
    words = "one record"
  else:
    groups = list(_filled(records, length=length))
    words = (
      "one packed row of whole records: neighbouring data sets differ in a row,"
      " which may be more than a record"
    )
  rows = tuple(
    _row(
      [sequence for record in group for sequence in record.sequences],
      length=length,
      pad_id=pad_id,
      loss=loss,
    )
    for group in groups
  )
  return Packed(rows=rows, unit=words, num_records=len(records))


def _check(record: Record, number: int, *, length: int) -> None:
  """Raises for a record that cannot be laid out."""
  for sequence in record.sequences:
    if sequence.num_slots < 0:
      checks.fail(
        "sequences of at least one token", record=number, sequence=sequence
      )
  slots = _num_slots(record)
  if slots > length:
    checks.fail(
      f"records of at most {length} positions",
      "Raise the row's length, or cut the record into several, each a unit of"
      " its own: that protects a piece, not the record.",
      record=number,
      positions=slots,
    )


def _num_slots(record: Record) -> int:
  """Positions that a record takes."""
  return sum(sequence.num_slots for sequence in record.sequences)


def _filled(records: list[Record], *, length: int) -> Iterator[list[Record]]:
  """Whole records in order, as many to a row as fit."""
  row: list[Record] = []
  slots = 0
  for record in records:
    if row and slots + _num_slots(record) > length:
      yield row
      row, slots = [], 0
    row.append(record)
    slots += _num_slots(record)
  if row:
    yield row


def _row(
  sequences: list[Sequence], *, length: int, pad_id: int, loss: Loss
) -> batching.Batch:
  """One row; each sequence a segment with positions of its own."""
  row: batching.Batch = {
    "tokens": np.full(length, pad_id, np.int32),
    "targets": np.full(length, pad_id, np.int32),
    "loss_mask": np.zeros(length, np.float32),
    "positions": np.zeros(length, np.int32),
    "segment_ids": np.zeros(length, np.int32),
    batching.PADDING_KEY: np.zeros((), np.bool_),
  }
  start = 0
  for number, sequence in enumerate(sequences, start=1):
    tokens = sequence.prompt + sequence.answer
    count = sequence.num_slots
    here = slice(start, start + count)
    row["tokens"][here] = tokens[:-1]
    row["targets"][here] = tokens[1:]
    row["positions"][here] = np.arange(count)
    row["segment_ids"][here] = number
    # Slot s has token s + 1 of the sequence as its target.
    first = 0 if loss is Loss.CAUSAL else max(len(sequence.prompt) - 1, 0)
    row["loss_mask"][start + first : start + count] = 1
    start += count
  return row


class PackedExamples:
  """Examples whose rows are packed: what `privacy.unit=PACKED_ROW` trains on.

  Which records share a row is settled once, in their order, when this is made.
  Can be pickled.

  Attributes:
    layout: of the records.
    bad_records: what could not be read, if that is skipped; such a record is
      in no row.
  """

  def __init__(
    self, examples: examples_lib.Examples, *, unit: config_lib.PrivacyUnit
  ):
    """Reads every text once, and decodes nothing.

    Args:
      examples: the records.
      unit: what the guarantee will be about. Records of two people in one row
        are clipped together, so nobody's share of it is bounded: only of a row
        can anything be claimed.

    Raises:
      ValueError: the unit is no row, or records have media, or a class for an
        answer.
      sources.BadRecordError: a bad record, where they are not skipped.
    """
    if unit is not config_lib.PrivacyUnit.PACKED_ROW:
      checks.fail(
        "privacy.unit=PACKED_ROW for rows of several records",
        "Give each record a row of its own (`examples.Examples`).",
        unit=unit.name,
      )
    self.layout = examples.layout
    if self.layout.counts or (self.layout.task is config_lib.Task.CLASSIFY):
      checks.fail(
        "records of text alone, and task ANSWER or CAUSAL, for packed rows",
        "Set --config.privacy.unit=example.",
        media=list(self.layout.counts),
        task=self.layout.task.name,
      )
    self._examples = examples
    self._rows: list[list[int]] = []
    slots = self.layout.longest  # As if the row before were full.
    for position in range(len(examples)):
      tokens = examples.tokens(position)
      if tokens is None:
        continue
      if slots + len(tokens.tokens) > self.layout.longest:
        self._rows.append([])
        slots = 0
      self._rows[-1].append(position)
      slots += len(tokens.tokens)

  @property
  def bad_records(self) -> examples_lib.BadRecords:
    """See the class."""
    return self._examples.bad_records

  def __len__(self) -> int:
    return len(self._rows)

  def records(self, index: SupportsIndex) -> list[int]:
    """The positions of the records in a row."""
    return list(self._rows[index.__index__()])

  def __getitem__(self, index: SupportsIndex) -> batching.Batch:
    """The arrays of one row; see `batch`."""
    batch = self.batch([examples_lib.Row(index.__index__())], size=1)
    return {name: array[0] for name, array in batch.items()}

  def padded_length(self, position: int) -> int:
    """All rows have the longest length."""
    del position
    return self.layout.longest

  def batch(
    self,
    rows: Iterable[examples_lib.Row | None],
    *,
    size: int,
    length: int | None = None,
  ) -> batching.Batch:
    """Stacks rows.

    Returns:
      The token arrays of `examples.Examples.batch`, with positions and
      segment_ids, int32 [size, T]; `index` counts rows.
    """
    assert length in (None, self.layout.longest)
    stacked = [self._row(row.position) for row in rows if row is not None]
    template = stacked[0] if stacked else self._row(0)
    return batching.stack(stacked, size=size, template=template)

  def _row(self, number: int) -> batching.Batch:
    """The arrays of one row."""
    sequences, num_bytes = [], 0
    for position in self._rows[number]:
      tokens = self._examples.tokens(position)
      if tokens is None:  # It was readable when the rows were made.
        raise sources.BadRecordError(
          f"position {position}", "it cannot be read any more."
        )
      sequences.append(_sequence(tokens))
      num_bytes += tokens.num_bytes
    row = _row(
      sequences,
      length=self.layout.longest,
      pad_id=self.layout.pad_id,
      loss=Loss.ANSWER,  # What is given and what counts is in the sequence.
    )
    return row | {
      batching.INDEX_KEY: np.array(number, np.int32),
      "num_bytes": np.array(num_bytes, np.int32),
    }


def _sequence(tokens: layout_lib.Tokens) -> Sequence:
  """A record's tokens, those that count last."""
  whole = [*tokens.tokens.tolist(), int(tokens.targets[-1])]
  given = len(whole) - int(tokens.loss_mask.sum())
  return Sequence(prompt=tuple(whole[:given]), answer=tuple(whole[given:]))
