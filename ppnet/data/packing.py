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

import numpy as np

from ppnet.core import checks
from ppnet.data import batching


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
