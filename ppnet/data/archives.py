"""Files by name, in a folder or inside a zip, which is never unpacked.

>>> files = open_files("/data/pets.zip")  # doctest: +SKIP
>>> files.names()[0], len(files.read("train/cat/001.jpg"))  # doctest: +SKIP
('train/cat/001.jpg', 24210)

A zip's names are not trusted: one that would leave the folder it is unpacked
into, or that comes twice, is refused before anything is read.
"""

import functools
import gzip
import os
import pathlib
import posixpath
import struct
import zipfile
import zlib
from typing import Protocol

from ppnet.core import checks

# One file, decompressed. A few kilobytes of a zip can claim to be terabytes.
MAX_BYTES = 1 << 31


class UnreadableError(ValueError):
  """A file is missing, damaged or too large; the message says how."""


class Files(Protocol):
  """Some files with names. Can be pickled; each process opens its own."""

  path: pathlib.Path

  def names(self) -> tuple[str, ...]:
    """Every file's name, parts joined by "/", sorted by code point."""
    ...

  def read(self, name: str) -> bytes:
    """The content of a file; raises `UnreadableError`."""
    ...

  def size(self, name: str) -> int:
    """Its number of bytes."""
    ...


class Folder:
  """The files below a folder, without hidden ones."""

  def __init__(self, path: str | os.PathLike[str]):
    """Lists nothing yet."""
    self.path = pathlib.Path(path)

  @functools.cached_property
  def _names(self) -> tuple[str, ...]:
    found = []
    for parent, folders, files in os.walk(self.path, followlinks=True):
      folders[:] = [
        name
        for name in folders
        if not name.startswith(".") and not _leads_up(parent, name)
      ]
      inner = pathlib.Path(parent).relative_to(self.path)
      found += [
        (inner / name).as_posix()
        for name in files
        if not name.startswith(".") and (pathlib.Path(parent) / name).is_file()
      ]
    return tuple(sorted(found))

  def names(self) -> tuple[str, ...]:
    """See `Files`."""
    return self._names

  def read(self, name: str) -> bytes:
    """See `Files`."""
    try:
      return (self.path / name).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name.
      raise UnreadableError(f"the file cannot be read ({error}).") from error

  def size(self, name: str) -> int:
    """See `Files`."""
    return (self.path / name).stat().st_size


def _leads_up(parent: str, name: str) -> bool:
  """Whether a folder is a link to one that it is in itself."""
  path = os.path.join(parent, name)
  if not os.path.islink(path):
    return False
  target = os.path.realpath(path)
  return os.path.commonpath([target, os.path.realpath(parent)]) == target


class Zip:
  """The files in a zip, without hidden ones. Reading is thread-safe."""

  def __init__(self, path: str | os.PathLike[str]):
    """Reads the directory of the zip.

    Raises:
      ValueError: it is no zip, was cut short, or a name in it is absolute,
        leads out of the folder, comes twice, or is encrypted.
    """
    self.path = pathlib.Path(path)
    _ = self._entries  # Checked now, and not in a worker.

  def __reduce__(self):
    return (Zip, (self.path,))

  @functools.cached_property
  def _zip(self) -> zipfile.ZipFile:
    try:
      return zipfile.ZipFile(self.path)
    except (
      zipfile.BadZipFile,
      OSError,
      EOFError,
      NotImplementedError,  # A version that it does not know.
      ValueError,
      struct.error,
    ) as error:
      return checks.fail(
        "a whole zip",
        f"{type(error).__name__}: {error}. Was it downloaded to its end?",
        path=str(self.path),
      )

  @functools.cached_property
  def _entries(self) -> dict[str, zipfile.ZipInfo]:
    entries: dict[str, zipfile.ZipInfo] = {}
    for entry in self._zip.infolist():
      # `ZipInfo` cuts a name at a NUL and turns os.sep; look at the original.
      name = entry.orig_filename
      parts = name.split("/")
      fault = ""
      if name.startswith("/") or "\\" in name or ":" in parts[0]:
        fault = "is absolute, or would be elsewhere"
      elif ".." in parts or "\0" in name:
        fault = "leads out of its folder"
      elif posixpath.normpath(name) in entries:
        fault = "comes twice"
      elif entry.flag_bits & 1:
        fault = "is encrypted"
      if fault:
        checks.fail(
          f"a zip with plain relative names, but one {fault}",
          "Do not unpack it: make it again from files that you know.",
          name=name,
          path=str(self.path),
        )
      if not entry.is_dir():
        entries[posixpath.normpath(name)] = entry
    return entries

  @functools.cached_property
  def _names(self) -> tuple[str, ...]:
    return tuple(
      sorted(
        name
        for name in self._entries
        # macOS puts a shadow of every file there.
        if not any(p.startswith((".", "__MACOSX")) for p in name.split("/"))
      )
    )

  def names(self) -> tuple[str, ...]:
    """See `Files`."""
    return self._names

  def read(self, name: str) -> bytes:
    """See `Files`."""
    entry = self._entries.get(name)
    if entry is None:
      raise UnreadableError(f"{self.path} has no {name!r}.")
    if entry.file_size > MAX_BYTES:
      raise UnreadableError(
        f"it claims {entry.file_size} bytes; at most {MAX_BYTES} are read."
      )
    try:
      return self._zip.read(entry)
    except (
      zipfile.BadZipFile,  # A wrong checksum, among others.
      zlib.error,
      OSError,
      EOFError,
      NotImplementedError,  # An unknown compression.
      RuntimeError,
      ValueError,
    ) as error:
      raise UnreadableError(
        f"{self.path} is damaged there ({type(error).__name__}: {error})."
      ) from error

  def size(self, name: str) -> int:
    """See `Files`."""
    return self._entries[name].file_size


def open_files(path: str | os.PathLike[str]) -> Files:
  """A folder, or a zip.

  Raises:
    ValueError: it is neither, or no sound zip.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    return Folder(path)
  if path.suffix.lower() != ".zip" or not path.is_file():
    checks.fail(
      "a folder or a .zip",
      "Correct config.data.path.",
      path=str(path),
    )
  return Zip(path)


def read_plain_or_gzip(path: pathlib.Path) -> bytes:
  """The content of a file, decompressed where its name ends in .gz.

  Raises:
    ValueError: it cannot be read, or holds more than `MAX_BYTES`.
  """
  try:
    if path.suffix != ".gz":
      return path.read_bytes()
    with gzip.open(path) as file:
      content = file.read(MAX_BYTES + 1)
  except (OSError, EOFError, zlib.error) as error:
    checks.fail(
      "a file that can be read to its end",
      f"{type(error).__name__}: {error}. Was it downloaded to its end?",
      path=str(path),
    )
  if len(content) > MAX_BYTES:
    checks.fail(f"a file of at most {MAX_BYTES} bytes", path=str(path))
  return content
