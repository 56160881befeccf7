"""PREPARE: raw data to ArrayRecord files, a tokenizer and a data set card.

A prepared folder holds

    train-00000-of-00001.array_record   msgpack records (not for IMAGE_FOLDER,
    test-00000-of-00001.array_record    which is read in place)
    tokenizer.model                     SentencePiece, from public text only
    dataset.json                        the card; written last

Every file gets its name in one rename once it is complete, and the card comes
last. So a folder with a card is whole, a folder without one is rebuilt, and a
run that was killed is simply started again. A lock on the folder lets only one
process build at a time.

>>> card = prepare(config_lib.DataConfig(), "/tmp/digits")  # doctest: +SKIP
>>> card.num_train, card.num_test  # doctest: +SKIP
(1437, 360)
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import tqdm
from array_record.python import array_record_module

from ppnet import config as config_lib
from ppnet.core import checks, records, workdirs
from ppnet.data import audio, image, sources, text, tokenizers

CARD_NAME = "dataset.json"
TOKENIZER_NAME = tokenizers.FILE_NAME

# These do not change what is prepared.
_FIELDS_THAT_MAY_DIFFER = (
  "on_bad_record",
  "cache",
  "prepared_dir",
  "user_pattern",
  "lengths",
  "image_transforms",
  "audio_transforms",
  "text_transforms",
  "augmentation_seed",
)
_TEMPORARY_PREFIX = ".unfinished-"
_CARD_VERSION = 2

_DIGITS_ORIGIN = (
  "Pictures: the test part of Optical Recognition of Handwritten Digits"
  " (Alpaydin and Kaynak 1998, UCI Machine Learning Repository,"
  " https://doi.org/10.24432/C50P49) as bundled with scikit-learn. Sounds:"
  " synthetic telephone key tones of the same digit (ITU-T Q.23)."
)
_DIGITS_LICENCE = "Pictures: CC BY 4.0. Sounds: made here, no rights claimed."
_FOLDER_LICENCE = "Not known to ppnet: that of the folder's owner."
_NORMALISATION = (
  "Pictures: min-max by the public range of the pixel type, then the public"
  " constants pixel_mean and pixel_std. Sounds: mean and deviation of each clip"
  " by itself. No statistic of the data set is used."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
  """What a prepared folder holds, and where it came from.

  Attributes:
    name: "digits", or the name of the image folder.
    class_names: the label is a position in it.
    num_train: records of the train split.
    num_test: records of the test split.
    media: modality, of `config.MODALITIES`, to the fewest and the most items
      that a record holds; a modality that no record has is left out.
    has_text: whether records have a text or an answer of their own.
    origin: where the data come from.
    licence: under what terms.
    prompt: the public text of every example.
    tokenizer: what the tokenizer learnt from.
    normalisation: how the statistics for normalising were obtained.
    sha256: file name -> hash, for the files in the folder.
    data: the `DataConfig` it was made from, as plain JSON values.
    version: of this format.
  """

  name: str
  class_names: tuple[str, ...]
  num_train: int
  num_test: int
  media: Mapping[str, tuple[int, int]]
  has_text: bool
  origin: str
  licence: str
  prompt: str
  tokenizer: str
  normalisation: str
  sha256: Mapping[str, str]
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

  Fields that do not change what is prepared (`on_bad_record`, `cache`,
  `prepared_dir`, `user_pattern`, the transformations, ...) may differ.
  """
  differing = workdirs.differences(card.data, _config_to_json(config))
  if differing:
    raise ValueError(
      f"Expected {prepared_dir} to be prepared from this config.data, but these"
      f" fields differ: {'; '.join(differing)}. Set them back, or prepare into"
      " another config.data.prepared_dir."
    )


def prepare(
  config: config_lib.DataConfig,
  out_dir: str | os.PathLike[str],
  *,
  progress: bool = True,
) -> Card:
  """Prepares a data set, unless that was done already.

  The result is a function of the config alone: two runs write the same bytes.

  Args:
    config: which data, and how.
    out_dir: the prepared folder; made if it is missing.
    progress: show a bar on stderr once the work has taken a second.

  Returns:
    The card, also written to `<out_dir>/dataset.json`.

  Raises:
    ValueError: a setting is invalid, the image folder is not as it should be,
      or `out_dir` holds data prepared from another config.
  """
  out_dir = pathlib.Path(out_dir)
  out_dir.mkdir(parents=True, exist_ok=True)
  with _locked(out_dir):
    if (out_dir / CARD_NAME).exists():
      card = read_card(out_dir)
      check_same_config(card, config, prepared_dir=out_dir)
      return card
    _remove_unfinished(out_dir)
    if config.source is config_lib.Source.DIGITS:
      card = _prepare_digits(config, out_dir, progress=progress)
    else:
      card = _prepare_image_folder(config, out_dir)
    records.write_json(out_dir / CARD_NAME, card.to_json())
    return card


def _prepare_digits(
  config: config_lib.DataConfig, out_dir: pathlib.Path, *, progress: bool
) -> Card:
  """Writes scikit-learn's digits, each with a key tone."""
  # Takes a second to import, and reading prepared data does not need it.
  import sklearn.datasets
  import sklearn.model_selection

  checks.in_open_unit_interval(test_fraction=config.test_fraction)
  checks.non_negative(
    "It seeds NumPy's generators.", split_seed=config.split_seed
  )
  levels, labels = sklearn.datasets.load_digits(return_X_y=True)
  train, test = sklearn.model_selection.train_test_split(
    np.arange(len(labels)),
    test_size=config.test_fraction,
    random_state=config.split_seed,
    stratify=labels,
  )

  def record(index: int) -> sources.Record:
    label = int(labels[index])
    return sources.Record(
      id=f"digits-{index:04d}",
      media={
        "image": (
          image.encode_png(digit_to_pixels(levels[index].reshape(8, 8))),
        ),
        "audio": (_key_tone(label, index, config=config),),
      },
      label=label,
    )

  class_names = tuple(str(name) for name in np.unique(labels))
  tokenizer = _write_tokenizer(config, out_dir, class_names=class_names)
  split_indices = {"train": np.sort(train), "test": np.sort(test)}
  names = {
    split: f"{split}-00000-of-00001.array_record" for split in split_indices
  }
  with tqdm.tqdm(
    total=len(labels),
    desc="PREPARE digits",
    unit="record",
    delay=1,
    disable=not progress,
  ) as bar:
    for split, indices in split_indices.items():
      _write_array_record(
        out_dir / names[split],
        (record(int(index)) for index in indices),
        on_record=bar.update,
      )
  return Card(
    name="digits",
    class_names=class_names,
    num_train=len(train),
    num_test=len(test),
    media={"image": (1, 1), "audio": (1, 1)},
    has_text=False,
    origin=_DIGITS_ORIGIN,
    licence=_DIGITS_LICENCE,
    prompt=config.prompt,
    tokenizer=_TOKENIZER_ORIGINS[config.tokenizer],
    normalisation=_NORMALISATION,
    sha256={
      **{name: _sha256(out_dir / name) for name in names.values()},
      **tokenizer,
    },
    data=_config_to_json(config),
  )


def _prepare_image_folder(
  config: config_lib.DataConfig, out_dir: pathlib.Path
) -> Card:
  """Checks an image folder and writes what it does not hold."""
  train = sources.ImageFolderSource(config.path, split="train")
  test = sources.ImageFolderSource(config.path, split="test")
  folder = pathlib.Path(config.path).resolve()
  return Card(
    name=folder.name,
    class_names=train.class_names,
    num_train=len(train),
    num_test=len(test),
    media={"image": (1, 1)},
    has_text=False,
    origin=f"The folder {folder}, read in place.",
    licence=_FOLDER_LICENCE,
    prompt=config.prompt,
    tokenizer=_TOKENIZER_ORIGINS[config.tokenizer],
    normalisation=_NORMALISATION,
    sha256=_write_tokenizer(config, out_dir, class_names=train.class_names),
    data=_config_to_json(config),
  )


def digit_to_pixels(levels: np.ndarray) -> np.ndarray:
  """Returns levels 0..16 as uint8 0..255, with 16 -> 255.

  A level is 15.9375 grey values, so rounding moves it by at most 1/510 of the
  range, and round(pixel * 16 / 255) gives it back.
  """
  return np.round(np.asarray(levels) * (255 / 16)).astype(np.uint8)


def _key_tone(
  label: int, index: int, *, config: config_lib.DataConfig
) -> bytes:
  """Returns the WAV of a record's key tone, its own whatever the split."""
  waveform = audio.dtmf_tone(
    label,
    np.random.default_rng([config.split_seed, index]),
    sample_rate_hz=config.audio.sample_rate_hz,
    max_secs=config.audio.max_secs,
  )
  return audio.encode_wav(waveform, sample_rate_hz=config.audio.sample_rate_hz)


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


def _write_tokenizer(
  config: config_lib.DataConfig,
  out_dir: pathlib.Path,
  *,
  class_names: tuple[str, ...],
  private_sentences: Callable[[], Iterable[str]] | None = None,
) -> dict[str, str]:
  """Makes and writes the tokenizer; returns its file's name and hash.

  Args:
    config: which kind.
    out_dir: the prepared folder.
    class_names: each has a piece of its own.
    private_sentences: gives the training records' texts, for PRIVATE.
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
    tokenizers.PublishedTokenizer(content, class_names=class_names)  # Or raise.
    records.write_bytes(path, content)
  else:
    sentences: Iterable[str] = text.public_sentences(config.prompt)
    if kind is config_lib.TokenizerKind.PRIVATE:
      if private_sentences is None:
        checks.fail(
          "a source with texts for data.tokenizer=PRIVATE",
          "Take PUBLIC or BYTES.",
          **{"data.source": config.source.name},
        )
      sentences = private_sentences()
    content = text.train_tokenizer(
      sentences,
      vocab_size=config.vocab_size,
      class_names=class_names,
      model_path=path,
    )
  return {TOKENIZER_NAME: hashlib.sha256(content).hexdigest()}


def _write_array_record(
  path: pathlib.Path,
  items: Iterator[sources.Record],
  *,
  on_record: Callable[[int], object],
) -> None:
  """Writes records to a temporary file, then gives it its name."""
  temporary = path.with_name(_TEMPORARY_PREFIX + path.name)
  # One record per group: the pipeline reads single records at random.
  writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1")
  try:
    for item in items:
      writer.write(sources.encode_record(item))
      on_record(1)
  finally:
    writer.close()
  with temporary.open("rb") as file:
    os.fsync(file.fileno())
  temporary.replace(path)


def _remove_unfinished(out_dir: pathlib.Path) -> None:
  """Removes what a killed run left; nobody else can be writing it."""
  # The last two are how `records.write_bytes` names its temporary files.
  for prefix in (_TEMPORARY_PREFIX, f".{TOKENIZER_NAME}.", f".{CARD_NAME}."):
    for path in out_dir.glob(f"{prefix}*"):
      path.unlink()


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
  plain = records.to_plain(config)
  return {
    name: value
    for name, value in plain.items()
    if name not in _FIELDS_THAT_MAY_DIFFER
  }


def _sha256(path: pathlib.Path) -> str:
  """Returns the hash of a file's content."""
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
