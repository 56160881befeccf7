"""Raw tables: JSON lines, Parquet, TFDS sets, and one's own ArrayRecord files.

>>> config = config_lib.DataConfig(  # doctest: +SKIP
...   source=config_lib.Source.TABLE, path="letters.jsonl",
...   columns=config_lib.ColumnsConfig(text="body", user="sender"))
>>> Table(config).record("train", 0).user  # doctest: +SKIP
'ann@example.org'
"""

import bisect
import contextlib
import dataclasses
import functools
import gzip
import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ppnet import config as config_lib
from ppnet.core import checks
from ppnet.data import archives, raw, sources


class _Rows(Protocol):
  """One file of a table. Can be pickled."""

  path: pathlib.Path

  def __len__(self) -> int: ...

  def row(self, number: int) -> Mapping[str, Any]:
    """One row; raises `archives.UnreadableError`."""
    ...


class _JsonLines:
  """The rows of a .jsonl or .jsonl.gz."""

  def __init__(self, path: pathlib.Path):
    self.path = path

  def __reduce__(self):
    return (_JsonLines, (self.path,))

  @functools.cached_property
  def _content(self) -> bytes:
    """Of a compressed file; a plain one is read row by row."""
    return archives.read_plain_or_gzip(self.path)

  @functools.cached_property
  def _lines(self) -> list[tuple[int, int]]:
    """(first byte, number of bytes) of each line that is not blank."""
    found, start = [], 0
    with self._open() as file:
      for line in file:
        if line.strip():
          found.append((start, len(line)))
        start += len(line)
    return found

  def _open(self) -> Any:
    if self.path.suffix != ".gz":
      return self.path.open("rb")
    return gzip.open(self.path)

  def __len__(self) -> int:
    try:
      return len(self._lines)
    except (OSError, EOFError) as error:
      return checks.fail(
        "a table that can be read to its end",
        f"{type(error).__name__}: {error}.",
        path=str(self.path),
      )

  def row(self, number: int) -> Mapping[str, Any]:
    """See `_Rows`."""
    start, size = self._lines[number]
    if self.path.suffix == ".gz":
      line = self._content[start : start + size]
    else:
      with self.path.open("rb") as file:
        file.seek(start)
        line = file.read(size)
    try:
      row = json.loads(line)
    except (ValueError, RecursionError) as error:  # Invalid UTF-8 included.
      raise archives.UnreadableError(
        f"the line is no JSON ({type(error).__name__}: {error})."
      ) from error
    if not isinstance(row, dict):
      raise archives.UnreadableError("the line is no JSON object.")
    return row


class _Parquet:
  """The rows of a .parquet; a row group is in memory at a time."""

  def __init__(self, path: pathlib.Path):
    self.path = path
    self._group: tuple[int, Any] = (-1, None)

  def __reduce__(self):
    return (_Parquet, (self.path,))

  @functools.cached_property
  def _file(self) -> Any:
    pyarrow = _import_pyarrow(self.path)
    try:
      return pyarrow.parquet.ParquetFile(self.path)
    except (pyarrow.ArrowException, OSError) as error:
      return checks.fail(
        "a Parquet file",
        f"{type(error).__name__}: {error}.",
        path=str(self.path),
      )

  @functools.cached_property
  def _ends(self) -> list[int]:
    """Rows up to the end of each row group."""
    metadata = self._file.metadata
    return list(
      itertools.accumulate(
        metadata.row_group(group).num_rows
        for group in range(metadata.num_row_groups)
      )
    )

  def __len__(self) -> int:
    return self._file.metadata.num_rows

  def row(self, number: int) -> Mapping[str, Any]:
    """See `_Rows`."""
    pyarrow = _import_pyarrow(self.path)
    group = bisect.bisect_right(self._ends, number)
    first = self._ends[group - 1] if group else 0
    kept, table = self._group
    try:
      if kept != group:
        table = self._file.read_row_group(group)
        self._group = (group, table)  # At once: threads may share it.
      return {
        name: table.column(name)[number - first].as_py()
        for name in table.column_names
      }
    except (pyarrow.ArrowException, OSError, ValueError) as error:
      raise archives.UnreadableError(
        f"it cannot be read ({type(error).__name__}: {error})."
      ) from error


def _import_pyarrow(path: pathlib.Path) -> Any:
  """The library that reads Parquet, or how to get it."""
  try:
    import pyarrow
    import pyarrow.parquet
  except ImportError:
    checks.fail(
      "pyarrow to be installed, to read Parquet",
      "pip install 'ppnet[prepare]', or write the table as .jsonl.",
      path=str(path),
    )
  return pyarrow


_READERS = {".jsonl": _JsonLines, ".jsonl.gz": _JsonLines, ".parquet": _Parquet}


class _Columns:
  """From a row of any table to a record, by the columns of the config."""

  def __init__(
    self,
    columns: config_lib.ColumnsConfig,
    *,
    class_names: Sequence[str],
    files: archives.Files | None,
  ):
    """Keeps what a row needs.

    Args:
      columns: the columns' names.
      class_names: of labels.
      files: where media that are given as paths lie.
    """
    self._columns = columns
    self._class_names = tuple(class_names)
    self._files = files

  @property
  def media(self) -> dict[str, tuple[int, int]]:
    """One item of each modality that has a column."""
    return {
      name: (1, 1)
      for name in config_lib.MODALITIES
      if getattr(self._columns, name)
    }

  @property
  def has_text(self) -> bool:
    """Whether there is a column of text or of answers."""
    return bool(self._columns.text or self._columns.answer)

  def name(self, row: Mapping[str, Any], *, fallback: str) -> str:
    """The id of a row."""
    if not self._columns.id:
      return fallback
    return _text(row.get(self._columns.id), fallback) or fallback

  def record(self, row: Mapping[str, Any], *, name: str) -> sources.Record:
    """The record of a row; raises `sources.BadRecordError`."""
    columns = self._columns
    used = {
      field.name: getattr(columns, field.name)
      for field in dataclasses.fields(columns)
      if getattr(columns, field.name)
    }
    missing = sorted(set(used.values()) - row.keys())
    if missing:
      raise sources.BadRecordError(
        name, f"has no column {missing}; it has {sorted(row)}."
      )
    for field, column in used.items():
      if row[column] is None:
        raise sources.BadRecordError(name, f"its {field} ({column!r}) is null.")
    return sources.Record(
      id=name,
      media={
        modality: (self._item(row[getattr(columns, modality)], name),)
        for modality in self.media
      },
      text=_text(row[columns.text], name) if columns.text else "",
      answer=_text(row[columns.answer], name) if columns.answer else "",
      label=self._label(row[columns.label], name) if columns.label else None,
      user=_text(row[columns.user], name) if columns.user else None,
    )

  def _label(self, value: Any, name: str) -> int:
    """The position of a class, given by itself or by its name."""
    if isinstance(value, int):  # Truth values too: False is 0.
      if 0 <= value < len(self._class_names):
        return int(value)
    elif isinstance(value, str) and value in self._class_names:
      return self._class_names.index(value)
    raise sources.BadRecordError(
      name, f"its label {value!r} is none of {self._class_names}."
    )

  def _item(self, value: Any, name: str) -> bytes:
    """The encoded bytes of a picture or recording."""
    if isinstance(value, Mapping):  # As Hugging Face's `datasets` writes it.
      value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
      return value
    if not isinstance(value, str) or self._files is None:
      raise sources.BadRecordError(
        name, f"bytes or a path were expected, not {type(value).__name__}."
      )
    if value not in self._names:
      # Also what would lead out of the folder.
      raise sources.BadRecordError(
        name, f"{value!r} is no file in {self._files.path}."
      )
    try:
      return self._files.read(value)
    except archives.UnreadableError as error:
      raise sources.BadRecordError(name, str(error)) from error

  @functools.cached_property
  def _names(self) -> frozenset[str]:
    assert self._files is not None
    return frozenset(self._files.names())


def _text(value: Any, name: str) -> str:
  """Text of a cell."""
  if isinstance(value, bytes):
    try:
      return value.decode()
    except UnicodeDecodeError as error:
      raise sources.BadRecordError(
        name, f"its text is not UTF-8 ({error.reason})."
      ) from error
  if isinstance(value, bool) or not isinstance(value, str | int):
    raise sources.BadRecordError(
      name, f"text was expected, not {type(value).__name__}."
    )
  return str(value)


class Table(raw.RawDataset):
  """JSON lines or Parquet files, with the columns that the config names.

  Files whose name, or the name of a folder above it, begins with "test" are
  the test split; "valid" and "dev" are left out; the others are the train
  split. Without a test file everything is split row by row, or user by user
  where there is a column of users. Class names come from `data.class_names`, or
  from what Hugging Face's `datasets` wrote into a Parquet file.
  """

  def __init__(self, config: config_lib.DataConfig):
    """Finds the files and counts their rows.

    Raises:
      ValueError: there is no file, no column is named, a Parquet file lacks
        one, a label has no class names, or a split is empty.
    """
    self._config = config
    path = raw.existing(config.path, config)
    self.name = path.resolve().name
    self.origin = f"The table {path.resolve()}."
    found = self._find(path)
    if not found:
      raw.expected(config, tables=[])
    self._tables = [rows for _, rows in found]
    self._folder = path if path.is_dir() else path.parent
    self.class_names = config.class_names or self._written_class_names()
    self._columns = _Columns(
      config.columns,
      class_names=self.class_names,
      files=archives.Folder(self._folder),
    )
    self._check_columns()
    self.media = self._columns.media
    self.has_text = self._columns.has_text
    # The rows of all files are numbered through.
    self._ends = list(itertools.accumulate(len(rows) for rows in self._tables))
    self._split = self._positions([split for split, _ in found])

  def _find(self, path: pathlib.Path) -> list[tuple[str, _Rows]]:
    """(split, rows) of each file; `left_out` counts those of no split."""
    if path.is_file():
      names = [path.name]
      path = path.parent
    else:
      names = list(archives.Folder(path).names())
    found: list[tuple[str, _Rows]] = []
    left_out = 0
    for name in names:
      suffix = next((s for s in _READERS if name.endswith(s)), None)
      if suffix is None:
        continue
      parts = name.split("/")
      if any(part.startswith(("valid", "dev")) for part in parts):
        left_out += 1
        continue
      tests = any(part.startswith("test") for part in parts)
      found.append(
        ("test" if tests else "train", _READERS[suffix](path / name))
      )
    if left_out:
      self.left_out = {"files of other splits than train and test": left_out}
    return found

  def _positions(self, splits: Sequence[str]) -> dict[str, list[int]]:
    """Row numbers of each split."""
    ends = [0, *self._ends]
    if "test" in splits:
      positions: dict[str, list[int]] = {s: [] for s in sources.SPLITS}
      for place, split in enumerate(splits):
        positions[split] += range(ends[place], ends[place + 1])
      for split, own in positions.items():
        if not own:
          raw.expected(self._config, no_row_in=split)
      return positions
    names = [self._group(number) for number in range(self._ends[-1])]
    what = "users" if self._config.columns.user else "rows"
    return raw.split_of(names, self._config, what=what)

  def _group(self, number: int) -> str:
    """What must not be in both splits: a row, or the rows of a user."""
    column = self._config.columns.user
    if column:
      with contextlib.suppress(
        archives.UnreadableError,  # Reading the record will say so.
        sources.BadRecordError,
      ):
        return _text(self._row(number).get(column), "")
    return self._name(number)

  def _at(self, number: int) -> tuple[int, int]:
    """(which file, which of its rows)."""
    place = bisect.bisect_right(self._ends, number)
    return place, number - (self._ends[place - 1] if place else 0)

  def _row(self, number: int) -> Mapping[str, Any]:
    place, row = self._at(number)
    return self._tables[place].row(row)

  def _name(self, number: int) -> str:
    """A row by its file and its place there, from 1."""
    place, row = self._at(number)
    path = self._tables[place].path.relative_to(self._folder)
    return f"{path.as_posix()}:{row + 1}"

  def _written_class_names(self) -> tuple[str, ...]:
    """What a Parquet file says of its labels, in the words of `datasets`."""
    for rows in self._tables:
      if isinstance(rows, _Parquet) and self._config.columns.label:
        written = (rows._file.schema_arrow.metadata or {}).get(b"huggingface")
        try:
          features = json.loads(written or "{}")["info"]["features"]
          return tuple(features[self._config.columns.label]["names"])
        except (KeyError, TypeError, ValueError):
          continue  # It says nothing of them.
    return ()

  def _check_columns(self) -> None:
    """Raises where no column is named, or a whole file lacks one."""
    columns = dataclasses.asdict(self._config.columns)
    named = {field: name for field, name in columns.items() if name}
    if not named.keys() - {"id", "user"}:
      checks.fail(
        "data.columns to say what is what in the table",
        "Such as --config.data.columns.text=body"
        " --config.data.columns.label=topic.",
        columns=columns,
      )
    if "label" in named and not self.class_names:
      checks.fail(
        "data.class_names, the names of the labels in their order",
        'Such as --config.data.class_names=\'("no","yes")\'.',
        **{"data.class_names": ()},
      )
    for rows in self._tables:
      if isinstance(rows, _Parquet):
        there = rows._file.schema_arrow.names
        missing = sorted(set(named.values()) - set(there))
        if missing:
          checks.fail(f"the columns {missing} in {rows.path}", columns=there)

  def num_records(self, split: str) -> int:
    """See `RawDataset`."""
    return len(self._split[raw.checked_split(split)])

  def record(self, split: str, index: int) -> sources.Record:
    """See `RawDataset`."""
    number = self._split[split][index]
    name = self._name(number)
    try:
      row = self._row(number)
    except archives.UnreadableError as error:
      raise sources.BadRecordError(name, str(error)) from error
    return self._columns.record(
      row, name=self._columns.name(row, fallback=name)
    )

  def inputs(self) -> Mapping[str, Any]:
    """The files. Media that they only point to are not hashed."""
    return {
      f"{place:05d}-{rows.path.name}": rows.path
      for place, rows in enumerate(self._tables)
    }


class Tfds(raw.RawDataset):
  """A data set that TensorFlow Datasets built, read without TensorFlow.

  `data.path` is the folder of its version. It must have been built with
  `--file_format=array_record`. Pictures stay encoded. Without any
  `data.columns`, the features named id, image, label, text and answer are
  taken. TFDS's Audio feature needs TensorFlow and is refused.
  """

  def __init__(self, config: config_lib.DataConfig):
    """Opens the set.

    Raises:
      ValueError: TFDS is not installed, there is no such set, it was built in
        another format, lacks a split or a feature, or has sounds.
    """
    self._config = config
    path = raw.existing(config.path, config)
    builder = self._builder(path)
    info = builder.info
    self.name = info.full_name
    self.origin = f"TensorFlow Datasets, {info.full_name}, {path.resolve()}."
    features = dict(info.features)
    columns = self._used_columns(features)
    label = features.get(columns.label)
    self.class_names = config.class_names or tuple(
      getattr(label, "names", None) or ()
    )
    self._columns = _Columns(columns, class_names=self.class_names, files=None)
    self.media = self._columns.media
    self.has_text = self._columns.has_text
    self._path = path
    missing = [s for s in sources.SPLITS if s not in info.splits]
    if missing:
      checks.fail(
        f"the splits {sources.SPLITS} in {path}",
        "Take a set that has them, or write its records with"
        " ppnet.data.sources.encode_record.",
        splits=list(info.splits),
      )
    self._counts = {s: info.splits[s].num_examples for s in sources.SPLITS}
    self._image = columns.image

  def __getstate__(self):
    return {k: v for k, v in self.__dict__.items() if k != "_sources"}

  def _builder(self, path: pathlib.Path) -> Any:
    tfds = self._tfds()
    try:
      builder = tfds.builder_from_directory(str(path))
    except Exception as error:  # TFDS raises almost anything here.
      raw.expected(self._config, error=f"{type(error).__name__}: {error}")
    file_format = builder.info.file_format
    if file_format is None or file_format.value != "array_record":
      checks.fail(
        f"{path} to be built with --file_format=array_record",
        "Random access without TensorFlow needs it: run `tfds build` again.",
        file_format=getattr(file_format, "value", None),
      )
    return builder

  def _tfds(self) -> Any:
    try:
      import tensorflow_datasets
    except ImportError:
      checks.fail(
        "tensorflow-datasets to be installed",
        "pip install 'ppnet[prepare]'.",
        **{"data.source": "TFDS"},
      )
    return tensorflow_datasets

  def _used_columns(
    self, features: Mapping[str, Any]
  ) -> config_lib.ColumnsConfig:
    """The config's columns, or those that the set has."""
    named = dataclasses.asdict(self._config.columns)
    if not any(named.values()):
      known = ("id", "image", "label", "text", "answer")
      named |= {name: name for name in known if name in features}
    used = {field: name for field, name in named.items() if name}
    missing = sorted(set(used.values()) - features.keys())
    if missing or not used:
      checks.fail(
        "data.columns among the features of the set",
        features=sorted(features),
        missing=missing,
      )
    tfds = self._tfds()
    for field, name in used.items():
      if field == "audio" or isinstance(features[name], tfds.features.Audio):
        checks.fail(
          "no sounds in a TFDS set",
          "Reading them needs TensorFlow. Put them into a folder of classes or"
          " a table, and PREPARE that.",
          feature=name,
        )
    return config_lib.ColumnsConfig(**named)

  @functools.cached_property
  def _sources(self) -> dict[str, Any]:
    """Split -> its data source."""
    tfds = self._tfds()
    decoders = (
      {self._image: tfds.decode.SkipDecoding()} if self._image else None
    )
    builder = self._builder(self._path)
    return {
      split: builder.as_data_source(split, decoders=decoders)
      for split in sources.SPLITS
    }

  def num_records(self, split: str) -> int:
    """See `RawDataset`."""
    return self._counts[raw.checked_split(split)]

  def record(self, split: str, index: int) -> sources.Record:
    """See `RawDataset`."""
    name = f"{split}-{index:07d}"
    try:
      row = self._sources[split][index]
    except Exception as error:  # Protobuf, ArrayRecord and TFDS all have some.
      raise sources.BadRecordError(
        name, f"TFDS cannot read it ({type(error).__name__}: {error})."
      ) from error
    return self._columns.record(
      {feature: _plain(value) for feature, value in row.items()},
      name=self._columns.name(
        {feature: _plain(value) for feature, value in row.items()},
        fallback=name,
      ),
    )

  def inputs(self) -> Mapping[str, Any]:
    """Every file of the set."""
    names = archives.Folder(self._path).names()
    return {name: self._path / name for name in names}


def _plain(value: Any) -> Any:
  """A NumPy scalar as Python's own."""
  return value.item() if hasattr(value, "item") and value.ndim == 0 else value


class ArrayRecords(raw.RawDataset):
  """One's own files of `sources.encode_record`, read in place.

  `data.path` is a folder with `train*.array_record` and `test*.array_record`;
  class names come from `data.class_names`. PREPARE reads every record once, to
  check it and to learn how many pictures and recordings a record holds.
  """

  media = None  # Only reading everything tells.
  has_text = None
  in_place = True

  def __init__(self, config: config_lib.DataConfig):
    """Opens the files' indices.

    Raises:
      ValueError: a split has no file.
    """
    path = raw.existing(config.path, config)
    self._path = path
    self.name = path.resolve().name
    self.origin = f"ArrayRecord files in {path.resolve()}, read in place."
    self.class_names = config.class_names
    self._paths = {
      split: sorted(path.glob(f"{split}*.array_record*"))
      for split in sources.SPLITS
    }
    for split, paths in self._paths.items():
      if not paths:
        raw.expected(config, no_file_of=split)

  def __getstate__(self):
    return {k: v for k, v in self.__dict__.items() if k != "_sources"}

  @functools.cached_property
  def _sources(self) -> dict[str, sources.ArrayRecordSource]:
    return {
      split: sources.ArrayRecordSource(paths)
      for split, paths in self._paths.items()
    }

  def num_records(self, split: str) -> int:
    """See `RawDataset`."""
    return len(self._sources[raw.checked_split(split)])

  def record(self, split: str, index: int) -> sources.Record:
    """See `RawDataset`."""
    return self._sources[split][index]

  def inputs(self) -> Mapping[str, Any]:
    """The files."""
    return {path.name: path for paths in self._paths.values() for path in paths}
