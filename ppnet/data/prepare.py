"""PREPARE: raw data to ArrayRecord files, a tokenizer and a data set card.

A prepared folder holds

    train-00000-of-00002.array_record   msgpack records in shards (none of a
    test-00000-of-00001.array_record    data set that is read in place)
    tokenizer.model                     SentencePiece, where there is one
    dataset.json                        the card; written last

Every file gets its name in one rename once it is complete, and the card comes
last. So a folder with a card is whole. A run that was killed is simply started
again: shards that are whole are kept (`shards`), provided that config and raw
files are what they were. A lock on the folder lets only one process build at a
time.

>>> card = prepare(config_lib.DataConfig(), "/tmp/digits")  # doctest: +SKIP
>>> card.num_train, card.num_test  # doctest: +SKIP
(1437, 360)
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import math
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import tqdm

from ppnet import config as config_lib
from ppnet.core import checks, records, workdirs
from ppnet.data import catalogue, raw, shards, sources, text, tokenizers

CARD_NAME = "dataset.json"
TOKENIZER_NAME = tokenizers.FILE_NAME

# These do not change what is prepared.
_FIELDS_THAT_MAY_DIFFER = (
  "cache",
  "prepared_dir",
  "prepare_workers",
  "lengths",
  "image_transforms",
  "audio_transforms",
  "text_transforms",
  "augmentation_seed",
  "store_fixed",
)
# Nor do these, once a folder is whole.
_FIELDS_OF_UNFINISHED = ("on_bad_record", "records_per_shard")
# What turns stored pictures into arrays. Only DIGITS and measured statistics
# depend on it.
_FIELDS_OF_PICTURES = (
  "image_size",
  "image_channels",
  "pixel_mean",
  "pixel_std",
)
_CARD_VERSION = 3
_PLAN_NAME = ".plan.json"
# Bad records that the card names; it counts the rest.
_MOST_NAMED = 100
# SentencePiece leaves longer sentences out without a word; in bytes.
_SENTENCE_BYTES = 2048
_PROMPT_REPEATS = 20

_NORMALISATION = (
  "Pictures: min-max by the public range of the pixel type, then {constants}."
  " Sounds: mean and deviation of each clip by itself. No other statistic of"
  " the data set is used."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
  """What a prepared folder holds, and where it came from.

  Attributes:
    name: of the data set.
    class_names: the label is a position in it.
    num_train: records of the train split.
    num_test: records of the test split.
    num_public: training records that were set aside as public; in no split.
    num_users: whose the training records are; None where one is nobody's, or
      nobody looked.
    media: modality, of `config.MODALITIES`, to the fewest and the most items
      that a record holds; a modality that no record has is left out.
    has_text: whether records have a text or an answer of their own.
    in_place: whether training reads the raw files.
    origin: where the data come from.
    licence: under what terms.
    left_out: why -> how many raw rows are no record.
    num_skipped: split -> bad records that were left out, under SKIP.
    skipped: id -> cause of the first of them.
    prompt: the public text of every example.
    tokenizer: what the tokenizer learnt from.
    normalisation: how the statistics for normalising were obtained.
    statistics: what was measured for it: pixel_mean, pixel_std, num_pixels; {}
      where nothing was.
    uncovered: what the guarantee of a run on these data does not cover, in
      sentences; a run shows them beside its guarantee.
    sha256: file name -> hash, for the files in the folder.
    raw_sha256: the same for the raw files; of a folder its listing's.
    data: the `DataConfig` it was made from, as plain JSON values.
    version: of this format.
  """

  name: str
  class_names: tuple[str, ...]
  num_train: int
  num_test: int
  num_public: int
  num_users: int | None
  media: Mapping[str, tuple[int, int]]
  has_text: bool
  in_place: bool
  origin: str
  licence: str
  left_out: Mapping[str, int]
  num_skipped: Mapping[str, int]
  skipped: Mapping[str, str]
  prompt: str
  tokenizer: str
  normalisation: str
  statistics: Mapping[str, float]
  uncovered: tuple[str, ...]
  sha256: Mapping[str, str]
  raw_sha256: Mapping[str, str]
  data: Mapping[str, Any]
  version: int = _CARD_VERSION

  def num_records(self, split: str) -> int:
    """Returns the number of records of "train" or "test"."""
    return {"train": self.num_train, "test": self.num_test}[split]

  def to_json(self) -> dict[str, Any]:
    """Returns the card as JSON values."""
    return records.to_plain(self)

  @classmethod
  def from_json(cls, value: Mapping[str, Any]) -> "Card":
    """Builds a card from what `to_json` returned.

    Raises:
      ValueError: it was written by another version of this format.
    """
    names = {field.name for field in dataclasses.fields(cls)}
    if value.get("version") != _CARD_VERSION or value.keys() != names:
      checks.fail(
        f"a data set card of version {_CARD_VERSION} with the fields"
        f" {sorted(names)}",
        "Run the PREPARE job again in an empty prepared_dir.",
        version=value.get("version"),
        fields=sorted(value),
      )
    fields: dict[str, Any] = dict(value)
    # JSON has no tuples.
    fields["class_names"] = tuple(value["class_names"])
    fields["media"] = {name: tuple(n) for name, n in value["media"].items()}
    fields["uncovered"] = tuple(value["uncovered"])
    return cls(**fields)


def read_card(prepared_dir: str | os.PathLike[str]) -> Card:
  """Reads the card of a prepared folder.

  Raises:
    ValueError: there is none, or it is damaged.
  """
  path = pathlib.Path(prepared_dir) / CARD_NAME
  if not path.is_file():
    checks.fail(
      f"a prepared folder (one with {CARD_NAME})",
      "Run the PREPARE job first, or correct config.data.prepared_dir.",
      prepared_dir=str(prepared_dir),
    )
  return Card.from_json(records.read_json(path))


def check_same_config(
  card: Card,
  config: config_lib.DataConfig,
  *,
  prepared_dir: str | os.PathLike[str],
) -> None:
  """Raises `ValueError`, naming the fields, if the card is of another config.

  Fields that do not change what is prepared (`cache`, `prepared_dir`, the
  transformations, ...) may differ.
  """
  now = _config_to_json(config)
  free = list(_FIELDS_OF_UNFINISHED)
  if card.in_place:
    free.append("user_pattern")  # Names are read when training reads files.
  differing = workdirs.differences(card.data, now, ignore=free)
  if differing:
    raise ValueError(
      f"Expected {prepared_dir} to be prepared from this config.data, but these"
      f" fields differ: {'; '.join(differing)}. Set them back, or prepare into"
      " another config.data.prepared_dir."
    )


def with_statistics(
  config: config_lib.DataConfig, card: Card
) -> config_lib.DataConfig:
  """The config with the constants that were measured, if any were."""
  if not card.statistics:
    return config
  return dataclasses.replace(
    config,
    pixel_mean=card.statistics["pixel_mean"],
    pixel_std=card.statistics["pixel_std"],
  )


def open_split(
  config: config_lib.DataConfig,
  card: Card,
  prepared_dir: str | os.PathLike[str],
  *,
  split: str,
) -> sources.Source:
  """The records of a split, wherever they are.

  Raises:
    ValueError: a file is missing, or the classes are not what they were.
  """
  if not card.in_place:
    names = [name for name in card.sha256 if name.startswith(f"{split}-")]
    return sources.ArrayRecordSource(
      [pathlib.Path(prepared_dir) / name for name in sorted(names)]
    )
  source = raw.SplitSource(catalogue.open_raw(config), split=split)
  if source.class_names != card.class_names:
    checks.fail(
      f"{config.path} to have the classes it was prepared with,"
      f" {card.class_names}",
      "Prepare it again into another config.data.prepared_dir.",
      class_names=source.class_names,
    )
  return source


def prepare(
  config: config_lib.DataConfig,
  out_dir: str | os.PathLike[str],
  *,
  progress: bool = True,
) -> Card:
  """Prepares a data set, unless that was done already.

  The result is a function of the config and the raw files alone: two runs write
  the same bytes, whatever the number of processes and of interruptions.

  Args:
    config: which data, and how.
    out_dir: the prepared folder; made if it is missing.
    progress: show a bar on stderr once the work has taken a second.

  Returns:
    The card, also written to `<out_dir>/dataset.json`.

  Raises:
    ValueError: a setting is invalid, the raw data are not as their source
      expects them, an id comes twice, a split is left without a record, or
      `out_dir` holds data prepared from another config.
    sources.BadRecordError: a raw record cannot be used, under RAISE.
    RuntimeError: a worker process was killed.
  """
  out_dir = pathlib.Path(out_dir)
  out_dir.mkdir(parents=True, exist_ok=True)
  with _locked(out_dir):
    if (out_dir / CARD_NAME).exists():
      card = read_card(out_dir)
      check_same_config(card, config, prepared_dir=out_dir)
      _remove_working_files(out_dir)
      return card
    data = catalogue.open_raw(config)
    learns = config.tokenizer is config_lib.TokenizerKind.PRIVATE
    if learns and data.has_text is False:
      checks.fail(
        "a source with texts for data.tokenizer=PRIVATE",
        "Take PUBLIC or BYTES.",
        **{"data.source": config.source.name},
      )
    tokenizer = {}
    if not learns:  # Before the work: a vocabulary may be too small.
      tokenizer = _write_tokenizer(config, out_dir, data)
    raw_sha256 = _hashes_of_inputs(data)
    _continue_or_begin(out_dir, config, raw_sha256)
    card = _make(
      config,
      out_dir,
      data,
      tokenizer=tokenizer,
      raw_sha256=raw_sha256,
      progress=progress,
    )
    if learns:
      sentences = _private_sentences(config, card, out_dir)
      tokenizer = _write_tokenizer(config, out_dir, data, sentences=sentences)
      card = dataclasses.replace(card, sha256={**card.sha256, **tokenizer})
    records.write_json(out_dir / CARD_NAME, card.to_json())
    _remove_working_files(out_dir)
    return card


def _make(
  config: config_lib.DataConfig,
  out_dir: pathlib.Path,
  data: raw.RawDataset,
  *,
  tokenizer: Mapping[str, str],
  raw_sha256: Mapping[str, str],
  progress: bool,
) -> Card:
  """Makes all shards and says what is in them."""
  measures = config.statistics is config_lib.Statistics.PUBLIC_SPLIT
  # Who sets records aside needs a copy without them.
  in_place = data.in_place and not measures
  todo = []
  if data.is_checked or not in_place:
    todo = shards.jobs(
      data,
      records_per_shard=config.records_per_shard,
      out_dir=None if in_place else out_dir,
    )
  with tqdm.tqdm(
    total=sum(job.stop - job.start for job in todo),
    desc=f"PREPARE {data.name}",
    unit="record",
    delay=1,
    disable=not progress,
  ) as bar:
    made = shards.make_all(data, config, todo, on_records=bar.update)
  of_split = {
    split: [s for job, s in zip(todo, made, strict=True) if job.split == split]
    for split in sources.SPLITS
  }
  counts = {
    split: (
      data.num_records(split)
      if in_place
      else sum(summary.num_records for summary in of_split[split])
    )
    for split in sources.SPLITS
  }
  for split, count in counts.items():
    if not count:
      checks.fail(
        f"at least one record in the {split} split of {data.name}",
        "Every one was bad, or set aside as public.",
        num_records=count,
        skipped=sum(len(summary.skipped) for summary in of_split[split]),
      )
  return Card(
    name=data.name,
    class_names=data.class_names,
    num_train=counts["train"],
    num_test=counts["test"],
    num_public=sum(summary.num_public for summary in made),
    num_users=_num_users(of_split["train"]),
    media=_media(made) if data.media is None else dict(data.media),
    has_text=(
      any(summary.has_text for summary in made)
      if data.has_text is None
      else data.has_text
    ),
    in_place=in_place,
    origin=data.origin,
    licence=data.licence,
    left_out={why: count for why, count in data.left_out.items() if count},
    num_skipped={
      split: sum(len(summary.skipped) for summary in of_split[split])
      for split in sources.SPLITS
    },
    skipped=dict(
      itertools.islice(
        (item for summary in made for item in summary.skipped.items()),
        _MOST_NAMED,
      )
    ),
    prompt=config.prompt,
    tokenizer=_TOKENIZER_ORIGINS[config.tokenizer],
    normalisation=_NORMALISATION.format(
      constants=_CONSTANTS[config.statistics]
    ),
    statistics=_pixel_statistics(made) if measures else {},
    uncovered=_uncovered(config, made),
    sha256={
      job.path.name: summary.sha256
      for job, summary in zip(todo, made, strict=True)
      if job.path is not None and summary.sha256
    }
    | dict(tokenizer),
    raw_sha256=raw_sha256,
    data=_config_to_json(config),
  )


_CONSTANTS = {
  config_lib.Statistics.CONSTANT: (
    "the public constants pixel_mean and pixel_std"
  ),
  config_lib.Statistics.PUBLIC_SPLIT: (
    "mean and deviation of the pictures of training records that were set aside"
    " as public and are not trained on"
  ),
}


def _uncovered(
  config: config_lib.DataConfig, made: Sequence[shards.Summary]
) -> tuple[str, ...]:
  """What a guarantee about the training records does not cover."""
  found = []
  if config.tokenizer is config_lib.TokenizerKind.PRIVATE:
    found.append(
      "The tokenizer's vocabulary was learnt from the training records, and"
      " what it says of them is not covered."
    )
  if config.statistics is config_lib.Statistics.PUBLIC_SPLIT:
    count = sum(summary.num_public for summary in made)
    found.append(
      f"{count} records were set aside as public to measure pictures by; they"
      " are not protected."
    )
  return tuple(found)


def _num_users(made: Sequence[shards.Summary]) -> int | None:
  """Distinct users of the training records; None where one has none."""
  users: set[str] = set()
  for summary in made:
    if summary.users is None:
      return None
    users.update(summary.users)
  return len(users) or None


def _media(made: Sequence[shards.Summary]) -> dict[str, tuple[int, int]]:
  """Modality to the fewest and the most items of any record."""
  found: dict[str, tuple[int, int]] = {}
  for summary in made:
    for name, (fewest, most) in summary.media.items():
      before = found.get(name, (fewest, most))
      found[name] = (min(fewest, before[0]), max(most, before[1]))
  return {name: counts for name, counts in found.items() if counts[1]}


def _pixel_statistics(made: Sequence[shards.Summary]) -> dict[str, float]:
  """Mean and deviation over all pixels of the public pictures."""
  number, total, squares = (
    math.fsum(summary.pixels[part] for summary in made) for part in range(3)
  )
  if not number:
    checks.fail(
      "public records with pictures, for data.statistics=PUBLIC_SPLIT",
      "Raise data.public_fraction, or take CONSTANT for a source without"
      " pictures.",
      num_public=sum(summary.num_public for summary in made),
    )
  mean = total / number
  variance = squares / number - mean**2
  if variance < 1e-8:
    checks.fail(
      "public pictures that are not all of one grey",
      "Raise data.public_fraction, or take CONSTANT.",
      pixel_mean=mean,
      pixel_variance=variance,
    )
  return {
    "pixel_mean": mean,
    "pixel_std": math.sqrt(variance),
    "num_pixels": number,
  }


def _hashes_of_inputs(data: raw.RawDataset) -> dict[str, str]:
  """The hashes of the raw files."""
  return {
    name: shards.sha256(value) if isinstance(value, pathlib.Path) else value
    for name, value in sorted(data.inputs().items())
  }


def _continue_or_begin(
  out_dir: pathlib.Path,
  config: config_lib.DataConfig,
  raw_sha256: Mapping[str, str],
) -> None:
  """Keeps what a killed run made of the same data, and nothing else."""
  for path in out_dir.glob(f"{shards.TEMPORARY_PREFIX}*"):
    path.unlink()
  # Sources decide what a record is, so another version may decide otherwise.
  plan = records.to_plain(
    {
      "version": _CARD_VERSION,
      "data": _config_to_json(config),
      "raw_sha256": raw_sha256,
    }
  )
  path = out_dir / _PLAN_NAME
  if path.is_file() and records.read_json(path) == plan:
    return
  _remove_working_files(out_dir)
  for old in out_dir.glob("*.array_record"):
    old.unlink()
  records.write_json(path, plan)


_TOKENIZER_ORIGINS = {
  config_lib.TokenizerKind.PUBLIC: (
    "SentencePiece, trained on public sentences and the prompt."
  ),
  config_lib.TokenizerKind.BYTES: "One token per UTF-8 byte.",
  config_lib.TokenizerKind.FILE: "A published SentencePiece model.",
  config_lib.TokenizerKind.PRIVATE: (
    "SentencePiece, trained on the training records. The guarantee does not"
    " cover what its vocabulary says of them."
  ),
}


def _private_sentences(
  config: config_lib.DataConfig, card: Card, out_dir: pathlib.Path
) -> Iterator[str]:
  """The texts and answers of the training records, in short pieces."""
  source = open_split(config, card, out_dir, split="train")
  for position in range(len(source)):
    try:
      record = source[position]
    except sources.BadRecordError:
      if config.on_bad_record is config_lib.BadRecord.RAISE:
        raise
      continue
    for words in (record.text, record.answer):
      for line in words.splitlines():
        step = _SENTENCE_BYTES // 4  # A character has at most four bytes.
        for start in range(0, len(line), step):
          yield line[start : start + step]


def _write_tokenizer(
  config: config_lib.DataConfig,
  out_dir: pathlib.Path,
  data: raw.RawDataset,
  *,
  sentences: Iterable[str] | None = None,
) -> dict[str, str]:
  """Makes and writes the tokenizer; returns its file's name and hash.

  Args:
    config: which kind.
    out_dir: the prepared folder.
    data: its classes have a piece each; its own sentences are public.
    sentences: what PRIVATE learns from.
  """
  kind = config.tokenizer
  if kind is config_lib.TokenizerKind.BYTES:
    return {}  # There is nothing to write.
  path = out_dir / TOKENIZER_NAME
  if kind is config_lib.TokenizerKind.FILE:
    published = pathlib.Path(config.tokenizer_path)
    if not published.is_file():
      checks.fail(
        "config.data.tokenizer_path to be a file",
        "It is the `tokenizer.model` of a published Llama or Mistral.",
        tokenizer_path=config.tokenizer_path,
      )
    content = published.read_bytes()
    # Or raise.
    tokenizers.PublishedTokenizer(content, class_names=data.class_names)
    records.write_bytes(path, content)
  else:
    if kind is config_lib.TokenizerKind.PRIVATE:
      assert sentences is not None, "They are read before."
      sentences = itertools.chain(
        [config.prompt] * _PROMPT_REPEATS if config.prompt else [], sentences
      )
    else:
      sentences = [
        *text.public_sentences(config.prompt),
        *data.public_texts * _PROMPT_REPEATS,
      ]
    content = text.train_tokenizer(
      sentences,
      vocab_size=config.vocab_size,
      class_names=data.class_names,
      model_path=path,
    )
  return {TOKENIZER_NAME: hashlib.sha256(content).hexdigest()}


def _remove_working_files(out_dir: pathlib.Path) -> None:
  """Removes what only an unfinished run needs; nobody else is writing it."""
  # The last ones are how `records.write_bytes` names its temporary files.
  for prefix in (
    shards.TEMPORARY_PREFIX,
    shards.SUMMARY_PREFIX,
    _PLAN_NAME,
    f".{TOKENIZER_NAME}.",
    f".{CARD_NAME}.",
    f".{_PLAN_NAME}.",
    f".{shards.SUMMARY_PREFIX}",
  ):
    for path in out_dir.glob(f"{prefix}*"):
      path.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[None]:
  """Holds an exclusive lock on a folder; a killed holder lets go of it."""
  handle = os.open(folder, os.O_RDONLY)
  try:
    fcntl.flock(handle, fcntl.LOCK_EX)
    yield
  finally:
    os.close(handle)


def _config_to_json(config: config_lib.DataConfig) -> dict[str, Any]:
  """Returns the fields that decide what is prepared."""
  free = list(_FIELDS_THAT_MAY_DIFFER)
  if config.source is not config_lib.Source.DIGITS:
    free.append("audio")
    if config.statistics is config_lib.Statistics.CONSTANT:
      free += _FIELDS_OF_PICTURES
  plain = records.to_plain(config)
  return {name: value for name, value in plain.items() if name not in free}
