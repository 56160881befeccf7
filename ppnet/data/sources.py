"""Random-access sources: where encoded records come from.

A source knows its length and gives the record at a position, still encoded,
so that reading is separate from decoding. Here are the ArrayRecord files that
PREPARE writes; what is read in place comes as a `raw.SplitSource`.

>>> source = ArrayRecordSource(["train.array_record"])  # doctest: +SKIP
>>> source[0].id, source[0].label  # doctest: +SKIP
('3_theo_7', 3)

Write files of your own like this, and name their folder with source
ARRAY_RECORD:

>>> content = encode_record(Record(id="a", text="Hello", user="ann"))
>>> decode_record(content, fallback_id="?").user
'ann'
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Protocol, SupportsIndex

import grain
import msgpack

from ppnet.core import checks

SPLITS = ("train", "test")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Record:
  """One record as it is stored: what is media is still encoded.

  Attributes:
    id: names the record in messages; unique within the data set.
    media: modality, of `config.MODALITIES`, to its encoded items in order:
      pictures (PNG, JPEG, ...), recordings (WAV, FLAC, ...). One that the
      record lacks is left out.
    text: what is read after the public prompt; may be empty.
    answer: what is to be written, where it is no class.
    label: position in the data set's class names; None where there are none.
    user: whose record it is, where the source knows; None where it does not.
  """

  id: str
  media: Mapping[str, tuple[bytes, ...]] = dataclasses.field(
    default_factory=dict
  )
  text: str = ""
  answer: str = ""
  label: int | None = None
  user: str | None = None


class BadRecordError(ValueError):
  """A record cannot be read or decoded. The message names it and the cause."""

  def __init__(self, record_id: str, cause: str):
    super().__init__(record_id, cause)  # Both are `args`, so pickling works.
    self.record_id = record_id
    self.cause = cause

  def __str__(self) -> str:
    return (
      f"Record {self.record_id!r} cannot be used: {self.cause} Repair or"
      " remove it, or set config.data.on_bad_record=SKIP."
    )


class Source(Protocol):
  """What the pipeline needs of a source."""

  def __len__(self) -> int:
    """Number of records."""
    ...

  def __getitem__(self, index: SupportsIndex, /) -> Record:
    """The record at `index`, with 0 <= index < len(self)."""
    ...

  def user(self, index: SupportsIndex, /) -> str | None:
    """Whose the record at `index` is, without decoding it; None: not known."""
    ...

  @property
  def description(self) -> str:
    """What this is, for people: format and place."""
    ...


def encode_record(record: Record) -> bytes:
  """Returns the record as msgpack, the form that PREPARE writes."""
  # Not `dataclasses.asdict`: it would copy what is large.
  content = msgpack.packb([getattr(record, name) for name in _FIELDS])
  assert content is not None  # Only a streaming packer returns nothing.
  return content


_FIELDS = tuple(field.name for field in dataclasses.fields(Record))


def decode_record(content: bytes, *, fallback_id: str) -> Record:
  """Reads a record written by `encode_record`.

  Args:
    content: one msgpack list, the fields of `Record` in order.
    fallback_id: names the record in the error if the bytes do not.

  Raises:
    BadRecordError: the bytes are not such a list.
  """
  try:
    name, media, text, answer, label, user = msgpack.unpackb(content)
    return Record(
      id=name,
      media={modality: tuple(items) for modality, items in media.items()},
      text=text,
      answer=answer,
      label=label,
      user=user,
    )
  except (
    ValueError,
    TypeError,
    AttributeError,
    msgpack.UnpackException,
  ) as error:
    raise BadRecordError(
      fallback_id, f"its msgpack list is damaged ({error!r})."
    ) from error


class ArrayRecordSource:
  """Records in ArrayRecord files, in the order of the files given."""

  def __init__(self, paths: Sequence[str | os.PathLike[str]]):
    """Opens the files' indices; records are read on demand.

    Args:
      paths: the files, each holding msgpack records.

    Raises:
      ValueError: there is no file, or one is missing.
    """
    self._paths = [pathlib.Path(path) for path in paths]
    remedy = "Run the PREPARE job again in an empty prepared_dir."
    if not self._paths:
      checks.fail("at least one ArrayRecord file", remedy, paths=[])
    for path in self._paths:
      if not path.is_file():
        checks.fail("an ArrayRecord file", remedy, missing=str(path))
    self._reader = grain.sources.ArrayRecordDataSource(
      [str(path) for path in self._paths]
    )

  def __len__(self) -> int:
    return len(self._reader)

  def __getitem__(self, index: SupportsIndex) -> Record:
    position = index.__index__()
    name = f"position {position} from {self._paths[0].name}"
    try:
      content = self._reader[position]
    except RuntimeError as error:  # How ArrayRecord reports a wrong checksum.
      raise BadRecordError(
        name, f"{self.description} cannot be read ({error})."
      ) from error
    return decode_record(content, fallback_id=name)

  def user(self, index: SupportsIndex) -> str | None:
    """Whose the record is; see `Source`."""
    return self[index].user

  @property
  def description(self) -> str:
    """The files' names and folder."""
    names = ", ".join(path.name for path in self._paths)
    return f"ArrayRecord files {names} in {self._paths[0].parent}"
