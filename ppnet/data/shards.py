"""Shards: the ArrayRecord files of PREPARE, each made and checked by itself.

A shard is a function of the raw records of its range and of the config. So it
does not matter which process makes it, how many do, or whether the run was
killed in between: a shard that is whole is kept, and the bytes are the same.

Beside each shard stands a summary until the card is written: its hash, the ids
in it, and what else the card needs of all records. It is written before the
shard gets its name, so a shard without a fitting summary is made again.
"""

import contextlib
import dataclasses
import hashlib
import multiprocessing
import os
import pathlib
import secrets
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent import futures
from concurrent.futures import process as process_futures
from typing import Any

from array_record.python import array_record_module

from ppnet import config as config_lib
from ppnet.core import checks, records
from ppnet.data import image, sources
from ppnet.data import raw as raw_lib

TEMPORARY_PREFIX = ".unfinished-"
SUMMARY_PREFIX = ".summary-"
# A text is cut to what the model reads, but all of it is encoded before.
MAX_TEXT_BYTES = 1 << 24
_PARENT_POLL_SECS = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
  """Which raw records make a shard.

  Attributes:
    split: "train" or "test".
    start: first position in the split.
    stop: one after the last.
    path: the shard's file; None only checks the records.
  """

  split: str
  start: int
  stop: int
  path: pathlib.Path | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
  """What is to be known of a shard.

  Attributes:
    ids: of its records, and of those that were set aside as public.
    num_records: in its file.
    num_public: set aside.
    users: the distinct users of its records; None where one has none.
    media: modality to the fewest and the most items of a record.
    has_text: whether a record has a text or an answer.
    skipped: id -> cause of the bad records that were left out.
    pixels: of the public pictures: number, sum and sum of squares.
    sha256: of the file; "" where no record was left to write.
  """

  ids: list[str]
  num_records: int
  num_public: int
  users: list[str] | None
  media: Mapping[str, tuple[int, int]]
  has_text: bool
  skipped: Mapping[str, str]
  pixels: tuple[float, float, float]
  sha256: str


def jobs(
  raw: raw_lib.RawDataset,
  *,
  records_per_shard: int,
  out_dir: pathlib.Path | None,
) -> list[Job]:
  """Cuts both splits into shards, the train split's first.

  Args:
    raw: the data set.
    records_per_shard: raw records of each.
    out_dir: where they are written; None writes nothing.
  """
  found = []
  for split in sources.SPLITS:
    total = raw.num_records(split)
    count = -(-total // records_per_shard)
    for number in range(count):
      name = f"{split}-{number:05d}-of-{count:05d}.array_record"
      found.append(
        Job(
          split=split,
          start=number * records_per_shard,
          stop=min((number + 1) * records_per_shard, total),
          path=out_dir / name if out_dir is not None else None,
        )
      )
  return found


def make_all(
  raw: raw_lib.RawDataset,
  config: config_lib.DataConfig,
  todo: Sequence[Job],
  *,
  on_records: Callable[[int], object],
) -> list[Summary]:
  """Makes the shards that are not there yet.

  Args:
    raw: the data set.
    config: its config; `prepare_workers` says in how many processes.
    todo: from `jobs`.
    on_records: called with the number of raw records that were done.

  Returns:
    A summary of each, in the order of `todo`.

  Raises:
    ValueError: an id comes twice.
    sources.BadRecordError: a bad record, under RAISE.
    RuntimeError: a process of it was killed.
  """
  summaries: dict[int, Summary] = {}
  missing: list[int] = []
  for place, job in enumerate(todo):
    kept = _kept(job)
    if kept is None:
      missing.append(place)
    else:
      summaries[place] = kept
      on_records(job.stop - job.start)
  ids = _Ids()
  for place in sorted(summaries):
    ids.add(summaries[place].ids)
  work = [todo[place] for place in missing]
  if config.prepare_workers and len(work) > 1:
    made = _in_processes(raw, config, work, on_records=on_records)
  else:
    made = _here(raw, config, work, on_records=on_records)
  with contextlib.closing(made):
    for at, summary in made:
      summaries[missing[at]] = summary
      ids.add(summary.ids)
  return [summaries[place] for place in range(len(todo))]


class _Ids:
  """The ids of a whole data set, each once."""

  def __init__(self):
    self._seen: set[str] = set()

  def add(self, ids: Sequence[str]) -> None:
    """Adds a shard's; raises `ValueError` for one that was there before."""
    for name in ids:
      if name in self._seen:
        checks.fail(
          "every record of a data set to have an id of its own",
          # Under SKIP as well: somebody twice is protected half as well.
          "A record that is there twice counts twice. Remove one, or number the"
          " records.",
          id=name,
        )
      self._seen.add(name)


def _kept(job: Job) -> Summary | None:
  """The summary of a shard that a killed run left whole; None without one."""
  if job.path is None:
    return None
  path = job.path.with_name(f"{SUMMARY_PREFIX}{job.path.name}.json")
  if not path.is_file():
    return None
  fields = records.read_json(path)
  fields["media"] = {name: tuple(n) for name, n in fields["media"].items()}
  fields["pixels"] = tuple(fields["pixels"])
  summary = Summary(**fields)
  if summary.sha256 and (
    not job.path.is_file() or sha256(job.path) != summary.sha256
  ):
    return None
  return summary


def _make(
  raw: raw_lib.RawDataset,
  config: config_lib.DataConfig,
  job: Job,
  *,
  on_record: Callable[[int], object],
) -> Summary:
  """Makes one shard."""
  content = _Content(config)
  ids = _Ids()

  def kept() -> Iterator[sources.Record]:
    for index in range(job.start, job.stop):
      try:
        record = raw.record(job.split, index)
        _check(record, raw)
        is_public = job.split == "train" and raw_lib.is_public(record, config)
        if is_public:
          content.measure(record)
      except sources.BadRecordError as error:
        content.skip(error)
        on_record(1)
        continue
      ids.add([record.id])
      content.ids.append(record.id)
      if is_public:
        content.num_public += 1
      else:
        content.note(record)
        yield record
      on_record(1)

  if job.path is None:
    for _ in kept():
      pass
    return content.summary(digest="")
  temporary = job.path.with_name(
    f"{TEMPORARY_PREFIX}{job.path.name}.{secrets.token_hex(4)}"
  )
  _write_array_record(temporary, kept())
  digest = sha256(temporary) if content.num_records else ""
  summary = content.summary(digest=digest)
  records.write_json(
    job.path.with_name(f"{SUMMARY_PREFIX}{job.path.name}.json"), summary
  )
  if digest:
    temporary.replace(job.path)
  else:
    temporary.unlink()  # Readers of ArrayRecord take an empty file for damage.
  return summary


class _Content:
  """What a shard's summary is collected in."""

  def __init__(self, config: config_lib.DataConfig):
    self._skips = config.on_bad_record is config_lib.BadRecord.SKIP
    self._decode = image.Decode(
      image_size=config.image_size, image_channels=config.image_channels
    )
    self.ids: list[str] = []
    self.num_records = self.num_public = 0
    self._users: set[str] | None = set()
    self._media: dict[str, tuple[int, int]] = {}
    self._has_text = False
    self._skipped: dict[str, str] = {}
    self._pixels = (0.0, 0.0, 0.0)

  def skip(self, error: sources.BadRecordError) -> None:
    """Counts a bad record, or raises."""
    if not self._skips:
      raise error
    self._skipped[error.record_id] = error.cause

  def measure(self, record: sources.Record) -> None:
    """Adds the pictures of a public record, decoded."""
    added = []
    for item in record.media.get("image", ()):
      element = {"id": record.id, "image": item}
      pixels = self._decode.map(element)["image"].astype("float64")
      added.append((pixels.size, pixels.sum(), (pixels**2).sum()))
    for number, total, squares in added:
      self._pixels = (
        self._pixels[0] + float(number),
        self._pixels[1] + float(total),
        self._pixels[2] + float(squares),
      )

  def note(self, record: sources.Record) -> None:
    """Counts a record that is written."""
    for name in config_lib.MODALITIES:
      count = len(record.media.get(name, ()))
      fewest, most = self._media.get(name, (count, count))
      self._media[name] = (min(fewest, count), max(most, count))
    self._has_text |= bool(record.text or record.answer)
    if record.user is None:
      self._users = None
    elif self._users is not None:
      self._users.add(record.user)
    self.num_records += 1

  def summary(self, *, digest: str) -> Summary:
    """All of it."""
    return Summary(
      ids=self.ids,
      num_records=self.num_records,
      num_public=self.num_public,
      users=None if self._users is None else sorted(self._users),
      media=self._media,
      has_text=self._has_text,
      skipped=self._skipped,
      pixels=self._pixels,
      sha256=digest,
    )


def _check(record: sources.Record, raw: raw_lib.RawDataset) -> None:
  """Raises `sources.BadRecordError` for what no example can be made of."""
  if not isinstance(record.id, str) or not record.id:
    raise sources.BadRecordError(str(record.id), "its id is no name.")
  for field in ("id", "text", "answer", "user"):
    value = getattr(record, field)
    if value is None:
      continue
    cause = ""
    try:
      if len(value.encode()) > MAX_TEXT_BYTES:
        cause = f"is longer than {MAX_TEXT_BYTES} bytes."
    except UnicodeEncodeError:
      cause = "is not valid UTF-8."
    if cause:
      # A name that is no text could not be printed.
      name = record.id.encode(errors="backslashreplace").decode()
      raise sources.BadRecordError(name, f"its {field} {cause}")
  for name, items in record.media.items():
    if name not in config_lib.MODALITIES:
      raise sources.BadRecordError(record.id, f"has media {name!r}.")
    if not all(isinstance(item, bytes) and item for item in items):
      raise sources.BadRecordError(record.id, f"one {name} is empty.")
  for name, (fewest, most) in (raw.media or {}).items():
    count = len(record.media.get(name, ()))
    if not fewest <= count <= most:
      raise sources.BadRecordError(
        record.id, f"has {count} {name}; {fewest} to {most} were declared."
      )
  label, count = record.label, len(raw.class_names)
  if label is not None and not 0 <= label < count:
    raise sources.BadRecordError(
      record.id, f"its label {label} is none of {count} classes."
    )


def _write_array_record(
  path: pathlib.Path, items: Iterator[sources.Record]
) -> None:
  """Writes records durably."""
  # One record per group: the pipeline reads single records at random.
  writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
  try:
    for item in items:
      writer.write(sources.encode_record(item))
  finally:
    writer.close()
  with path.open("rb") as file:
    os.fsync(file.fileno())


def sha256(path: pathlib.Path) -> str:
  """The hash of a file's content."""
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


# What a worker process was started with.
_worker: dict[str, Any] = {}


def _start_worker(
  raw: raw_lib.RawDataset, config: config_lib.DataConfig, parent: int
) -> None:
  """Runs once in each worker."""
  _worker.update(raw=raw, config=config)

  def watch() -> None:
    # A worker whose parent was killed would wait for work for ever.
    while os.getppid() == parent:
      time.sleep(_PARENT_POLL_SECS)
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()


def _work(job: Job) -> Summary:
  """Makes one shard in a worker."""
  return _make(
    _worker["raw"], _worker["config"], job, on_record=lambda count: None
  )


def _here(
  raw: raw_lib.RawDataset,
  config: config_lib.DataConfig,
  work: Sequence[Job],
  *,
  on_records: Callable[[int], object],
) -> Generator[tuple[int, Summary], None, None]:
  """Yields (place in `work`, summary) of each, one after the other."""
  for at, job in enumerate(work):
    yield at, _make(raw, config, job, on_record=on_records)


def _in_processes(
  raw: raw_lib.RawDataset,
  config: config_lib.DataConfig,
  work: Sequence[Job],
  *,
  on_records: Callable[[int], object],
) -> Generator[tuple[int, Summary], None, None]:
  """Yields (place in `work`, summary) of each as it is done."""
  # Not forked: a fork of a process that runs JAX may hang.
  pool = process_futures.ProcessPoolExecutor(
    min(config.prepare_workers, len(work)),
    mp_context=multiprocessing.get_context("spawn"),
    initializer=_start_worker,
    initargs=(raw, config, os.getpid()),
  )
  try:
    places = {pool.submit(_work, job): at for at, job in enumerate(work)}
    for future in futures.as_completed(places):
      at = places[future]
      yield at, future.result()
      on_records(work[at].stop - work[at].start)
  except process_futures.BrokenProcessPool as error:
    raise RuntimeError(
      "A process of PREPARE was killed, perhaps for want of memory. The same"
      " command goes on with the shards that are whole; set"
      " config.data.prepare_workers lower."
    ) from error
  finally:
    pool.shutdown(cancel_futures=True)
