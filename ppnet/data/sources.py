"""Random-access sources: where encoded records come from.

A source knows its length and gives the record at a position, still encoded,
so that reading is separate from decoding. Two are here: ArrayRecord files
written by PREPARE, and a folder of pictures read in place.

>>> source = ImageFolderSource("/data/pets", split="train")  # doctest: +SKIP
>>> source[0].id, source.class_names  # doctest: +SKIP
('train/cat/001.jpg', ('cat', 'dog'))
"""

import dataclasses
import os
import pathlib
import re
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


class ImageFolderSource:
  """Pictures in `<path>/{train,test}/<class name>/<file>`, read in place.

  Classes are the folder names in sorted order, and records are sorted by class
  and file name, so positions are the same on every machine. Files and folders
  whose name starts with a dot are ignored, and so is whatever is not a regular
  file inside a class folder. There is no audio.
  """

  def __init__(
    self,
    path: str | os.PathLike[str],
    *,
    split: str,
    user_pattern: str = "",
  ):
    """Lists the files of one split; the other split is checked as well.

    Args:
      path: the folder that holds `train/` and `test/`.
      split: "train" or "test".
      user_pattern: regular expression with one group, the user, that matches
        all of "<class>/<file>"; empty where users are not known.

    Raises:
      ValueError: the folder, a split, or every class is missing, a class has
        no file, or the two splits do not have the same classes.
    """
    if split not in SPLITS:
      checks.fail(f"split to be one of {SPLITS}", split=split)
    self._path = pathlib.Path(path)
    self._split = split
    self._user_pattern = user_pattern
    if not self._path.is_dir():
      checks.fail(
        "an existing folder",
        "Set config.data.path to the folder that holds train/ and test/.",
        path=str(self._path),
      )
    files = {name: _class_files(self._path, name) for name in SPLITS}
    only_train = sorted(files["train"].keys() - files["test"].keys())
    only_test = sorted(files["test"].keys() - files["train"].keys())
    if only_train or only_test:
      checks.fail(
        f"the same classes in train/ and test/ of {self._path}",
        "Give every class a folder with files in both.",
        only_in_train=only_train,
        only_in_test=only_test,
      )
    self.class_names: tuple[str, ...] = tuple(files[split])
    self._files = [
      (label, name, file_name)
      for label, (name, file_names) in enumerate(files[split].items())
      for file_name in file_names
    ]

  def __len__(self) -> int:
    return len(self._files)

  def __getitem__(self, index: SupportsIndex) -> Record:
    label, class_name, file_name = self._files[index.__index__()]
    record_id = f"{self._split}/{class_name}/{file_name}"
    try:
      content = (self._path / record_id).read_bytes()
    except OSError as error:
      raise BadRecordError(
        record_id, f"the file cannot be read ({error})."
      ) from error
    return Record(
      id=record_id,
      media={"image": (content,)},
      label=label,
      user=self.user(index),
    )

  def user(self, index: SupportsIndex) -> str | None:
    """Whose the picture is, from its name; see `Source`.

    Raises:
      ValueError: `user_pattern` does not match the file's name.
    """
    if not self._user_pattern:
      return None
    _, class_name, file_name = self._files[index.__index__()]
    name = f"{class_name}/{file_name}"
    found = re.fullmatch(self._user_pattern, name)
    if found is None or not found.group(1):
      checks.fail(
        "config.data.user_pattern to find the user of every picture",
        "A picture that belongs to nobody would be protected as nobody's.",
        picture=f"{self._split}/{name}",
        user_pattern=self._user_pattern,
      )
    return found.group(1)

  @property
  def description(self) -> str:
    """The folder of the split."""
    return f"image folder {self._path / self._split}"


def _class_files(path: pathlib.Path, split: str) -> dict[str, list[str]]:
  """Returns class name -> file names of one split, both sorted."""
  folder = path / split
  if not folder.is_dir():
    checks.fail(
      "a folder for each split",
      f"Put {split} pictures in {folder}/<class name>/.",
      missing=str(folder),
    )
  files = {}
  for name in _visible_names(folder):
    class_folder = folder / name
    if not class_folder.is_dir():
      continue
    files[name] = [
      file_name
      for file_name in _visible_names(class_folder)
      if (class_folder / file_name).is_file()
    ]
    if not files[name]:
      checks.fail(
        "at least one file in every class folder",
        "Put pictures directly into it, or remove it.",
        empty=str(class_folder),
      )
  if not files:
    checks.fail(
      f"at least one class folder in {folder}",
      f"Put pictures in {folder}/<class name>/.",
      classes=[],
    )
  return files


def _visible_names(folder: pathlib.Path) -> list[str]:
  """Returns the names in a folder without hidden ones, sorted by code point."""
  return sorted(name for name in os.listdir(folder) if not name.startswith("."))
