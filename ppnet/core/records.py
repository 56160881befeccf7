"""Files that must survive a kill: one rule for every record of a run.

A file written here is either the old one or the new one, never half of one:
the text goes to a temporary file in the same folder, is fsynced, replaces the
old file in one rename, and the folder entry is fsynced. No JAX in this module.
"""

import contextlib
import dataclasses
import enum
import json
import math
import os
import pathlib
import secrets
from collections.abc import Iterator, Mapping
from typing import Any


def to_plain(value: Any) -> Any:
  """Dataclasses, enums, tuples and paths as what JSON can hold.

  Infinite numbers become the strings "inf" and "-inf", NaN becomes "nan": JSON
  has none of them, and a record without a guarantee must say epsilon = "inf".
  """
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    # One of several kinds that a field may hold says which it is.
    tag = {"type": type(value).__name__} if hasattr(value, "kind") else {}
    return tag | {
      field.name: to_plain(getattr(value, field.name))
      for field in dataclasses.fields(value)
    }
  if isinstance(value, enum.Enum):
    return value.name
  if isinstance(value, Mapping):
    return {str(name): to_plain(item) for name, item in value.items()}
  if isinstance(value, list | tuple):
    return [to_plain(item) for item in value]
  if isinstance(value, pathlib.Path):
    return str(value)
  if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
    return to_plain(value.item())  # NumPy scalars.
  if isinstance(value, float) and not math.isfinite(value):
    return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
  return value


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Replaces `path` atomically and durably by what is written in the block.

  Yields:
    Where to write it, a name beside `path` that is not taken. Where the block
    raises, nothing of it stays.
  """
  path = pathlib.Path(path)
  temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
  try:
    yield temporary
    _sync(temporary)
    os.replace(temporary, path)
  except BaseException:
    with contextlib.suppress(FileNotFoundError):
      os.unlink(temporary)
    raise
  _sync(path.parent)  # The rename itself must survive a power cut.


def _sync(path: pathlib.Path) -> None:
  """Waits until a file, or a folder's names, are on disk."""
  handle = os.open(path, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)


def write_bytes(path: pathlib.Path, content: bytes) -> None:
  """Replaces `path` atomically and durably."""
  # Not mkstemp: it hides the file from everybody else, and records are read by
  # colleagues. The umask decides.
  with replacing(path) as temporary:
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    with os.fdopen(handle, "wb") as file:
      file.write(content)


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes `value` as indented JSON, atomically and durably."""
  text = json.dumps(to_plain(value), indent=2, allow_nan=False) + "\n"
  write_bytes(path, text.encode())


def read_json(path: pathlib.Path) -> Any:
  """Reads a JSON record. Raises `ValueError` naming a damaged file."""
  try:
    return json.loads(pathlib.Path(path).read_text())
  except json.JSONDecodeError as error:
    raise ValueError(
      f"Expected {path} to hold JSON, but it is damaged ({error}). Restore it"
      " from a copy, or start again in an empty --workdir."
    ) from error


def read_json_lines(path: pathlib.Path) -> Iterator[dict[str, Any]]:
  """Yields the rows of a JSON-lines file; a line cut by a kill ends it."""
  path = pathlib.Path(path)
  if not path.exists():
    return
  with path.open() as file:
    for line in file:
      if not line.endswith("\n"):
        return  # The last line was being written when the process died.
      yield json.loads(line)


def latest_rows(path: pathlib.Path, *, split: str) -> list[dict[str, Any]]:
  """The rows of one split by step; of a repeated step only the last one.

  A resumed run takes some steps again and writes their rows again.
  """
  rows = {
    row["step"]: row
    for row in read_json_lines(path)
    if row.get("split") == split
  }
  return [rows[step] for step in sorted(rows)]


class JsonLinesLog:
  """Appends rows to a JSON-lines file.

  A line that a kill cut short is removed on opening, so that the next row does
  not run into it.
  """

  def __init__(self, path: pathlib.Path):
    """Opens for appending; creates the file if it is missing."""
    path = pathlib.Path(path)
    if path.exists():
      content = path.read_bytes()
      whole = content.rfind(b"\n") + 1
      if whole < len(content):
        os.truncate(path, whole)
    self._file = path.open("a")

  def append(self, row: Mapping[str, Any]) -> None:
    """Writes one row; `flush` makes it durable."""
    self._file.write(json.dumps(to_plain(row), allow_nan=False) + "\n")

  def flush(self) -> None:
    """Forces all rows to disk."""
    self._file.flush()
    os.fsync(self._file.fileno())

  def close(self) -> None:
    """Flushes and closes."""
    self.flush()
    self._file.close()
