"""What the records are, and how they become arrays: `config.DataConfig`.

`config` gives these their names; it alone is imported elsewhere. This module
imports neither JAX nor NumPy.
"""

import dataclasses
import enum
import re
from typing import Any

from ppnet.core import checks

# In the order in which they stand before the prompt. A name is the key of the
# record's media, the field of `ModelConfig` that shapes its stem, and the
# spelling of its placeholder token, "<name>".
MODALITIES = ("image", "audio")


class Source(enum.Enum):
  """Where records come from."""

  DIGITS = "digits"  # scikit-learn's bundled digits, each with a DTMF key tone.
  IMAGE_FOLDER = "image_folder"  # <path>/{train,test}/<class name>/<file>.


class Task(enum.Enum):
  """What a record asks of the decoder, and which of its tokens count."""

  CLASSIFY = "classify"  # The one token of the record's class.
  ANSWER = "answer"  # The record's own answer, word for word, and its end.
  CAUSAL = "causal"  # Every token of the record's text.


class TokenizerKind(enum.Enum):
  """What turns text into tokens."""

  PUBLIC = "public"  # SentencePiece, trained on public sentences.
  BYTES = "bytes"  # One token per UTF-8 byte; nothing is learnt.
  FILE = "file"  # A published SentencePiece model, `data.tokenizer_path`.
  PRIVATE = "private"  # SentencePiece, trained on the records. NOT covered.


class BadRecord(enum.Enum):
  """What happens to a record that cannot be decoded."""

  RAISE = "raise"
  SKIP = "skip"  # Contributes exactly zero; counted and reported.


class AudioFeature(enum.Enum):
  """What the audio stem sees."""

  LOG_MEL = "log_mel"
  MFCC = "mfcc"


@dataclasses.dataclass(slots=True, kw_only=True)
class AudioConfig:
  """How a recording becomes frames.

  Attributes:
    sample_rate_hz: recordings are resampled to this rate.
    max_secs: longer recordings are cut, shorter ones padded with silence.
    window_secs: length of the (periodic Hann) STFT window.
    hop_secs: distance between frames.
    num_mels: mel bands between `min_hz` and `max_hz`.
    num_mfcc: cepstral coefficients kept when `feature` is MFCC.
    min_hz: lower edge of the first band.
    max_hz: upper edge of the last band.
    feature: LOG_MEL or MFCC.
  """

  sample_rate_hz: int = 8000
  max_secs: float = 0.4
  window_secs: float = 0.032
  hop_secs: float = 0.016
  num_mels: int = 40
  num_mfcc: int = 20
  min_hz: float = 300.0
  max_hz: float = 4000.0
  feature: AudioFeature = AudioFeature.LOG_MEL


@dataclasses.dataclass(slots=True, kw_only=True)
class DataConfig:
  """What the records are and how they become arrays.

  Attributes:
    source: where records come from.
    path: folder or file of the raw data, for a source that needs one.
    task: CLASSIFY, ANSWER or CAUSAL.
    user_pattern: regular expression with one group, the user, that matches all
      of `<class>/<file>` of every training picture. Empty: no users.
    prepared_dir: where PREPARE writes (and TRAIN reads) ArrayRecord files, the
      tokenizer and `dataset.json`. Empty: `<workdir>/prepared`.
    test_fraction: share held out for testing, of a source that comes as one.
    split_seed: fixes that split, and whatever else PREPARE draws.
    prompt: public text put after the media and before the record's own text.
    tokenizer: PUBLIC, BYTES, FILE or PRIVATE.
    tokenizer_path: the SentencePiece model of FILE.
    vocab_size: SentencePiece vocabulary, special tokens and answers included;
      at least the number of tokens for the other tokenizers.
    lengths: numbers of tokens that rows are padded to, each row to the
      smallest that holds it. None given: what records need where all need the
      same, else `model.decoder.max_seq_len`. A longer text is cut at its end.
    image_size: height and width in pixels after resizing.
    image_channels: 1 (grey) or 3 (RGB).
    pixel_mean: public constant, subtracted after min-max scaling to [0, 1].
    pixel_std: public constant, divided by after `pixel_mean`.
    image_transforms: what a picture goes through, a list of transformations
      from `ppnet.data`; none given: decode, resize and z-score by the fields
      above. Augmentations among them are for training alone.
    text_transforms: likewise for a text of a record's own, before it becomes
      tokens; none given: what is far too long is cut, then Unicode NFKC.
    audio: how recordings become frames; ignored where a source has none.
    audio_transforms: likewise for a recording.
    augmentation_seed: fixes what random transformations draw.
    on_bad_record: RAISE names the record; SKIP counts it and goes on.
    cache: keep decoded records in memory (small data sets).
  """

  source: Source = Source.DIGITS
  path: str = ""
  task: Task = Task.CLASSIFY
  user_pattern: str = ""
  prepared_dir: str = ""
  test_fraction: float = 0.2
  split_seed: int = 0
  prompt: str = "Which digit is written and dialled?"
  tokenizer: TokenizerKind = TokenizerKind.PUBLIC
  tokenizer_path: str = ""
  vocab_size: int = 96
  lengths: tuple[int, ...] = ()
  image_size: int = 8
  image_channels: int = 1
  pixel_mean: float = 0.5
  pixel_std: float = 0.5
  image_transforms: tuple[Any, ...] = ()
  text_transforms: tuple[Any, ...] = ()
  audio: AudioConfig = dataclasses.field(default_factory=AudioConfig)
  audio_transforms: tuple[Any, ...] = ()
  augmentation_seed: int = 0
  on_bad_record: BadRecord = BadRecord.RAISE
  cache: bool = True


def num_audio_frames(audio: AudioConfig) -> int:
  """STFT frames of one recording: whole windows only, no padding."""
  samples = round(audio.max_secs * audio.sample_rate_hz)
  window = round(audio.window_secs * audio.sample_rate_hz)
  hop = round(audio.hop_secs * audio.sample_rate_hz)
  return 1 + (samples - window) // hop


def is_augmented(data: DataConfig) -> bool:
  """Whether a transformation of a record is random."""
  return any(
    getattr(transform, "kind", None) == "augmentation"
    for transform in (*data.image_transforms, *data.audio_transforms)
  )


def validate(data: DataConfig, *, max_seq_len: int) -> None:
  """Checks the data's part of a configuration; see `config.validate`."""
  checks.in_open_unit_interval(**{"data.test_fraction": data.test_fraction})
  checks.positive(
    **{
      "data.vocab_size": data.vocab_size,
      "data.image_size": data.image_size,
      "data.pixel_std": data.pixel_std,
    }
  )
  if data.image_channels not in (1, 3):
    checks.fail(
      "data.image_channels to be 1 (grey) or 3 (RGB)",
      **{"data.image_channels": data.image_channels},
    )
  if data.source is not Source.DIGITS and not data.path:
    checks.fail(
      "data.path to name the raw data, for every source but DIGITS",
      "Set --config.data.path=DIR; for IMAGE_FOLDER the folder that holds"
      " train/<class>/ and test/<class>/.",
      **{"data.source": data.source.name, "data.path": data.path},
    )
  _validate_text(data, max_seq_len=max_seq_len)
  _validate_transforms(data)
  _validate_audio(data.audio)


def validate_users(data: DataConfig, *, has_users: bool) -> None:
  """Checks that records have users where the privacy unit asks for them."""
  pattern = data.user_pattern
  if has_users and data.source in _WITHOUT_USERS and not pattern:
    checks.fail(
      "data.user_pattern to say whose each record is, for privacy.unit=USER",
      "The digits have no users: use source IMAGE_FOLDER, and for files named"
      " <user>_<number>.jpg --config.data.user_pattern='[^/]*/([^_]*)_.*'.",
      **{"data.source": data.source.name, "data.user_pattern": pattern},
    )
  if pattern and data.source is not Source.IMAGE_FOLDER:
    checks.fail(
      "data.user_pattern with source IMAGE_FOLDER alone",
      **{"data.source": data.source.name},
    )
  try:
    groups = re.compile(pattern).groups
  except re.error as error:
    groups = str(error)
  if pattern and groups != 1:
    checks.fail(
      "data.user_pattern to be a regular expression with one group",
      **{"groups": groups, "data.user_pattern": pattern},
    )


# Whose records are nobody's, unless their names say so.
_WITHOUT_USERS = (Source.DIGITS, Source.IMAGE_FOLDER)


def _validate_text(data: DataConfig, *, max_seq_len: int) -> None:
  is_file = data.tokenizer is TokenizerKind.FILE
  if is_file != bool(data.tokenizer_path):
    checks.fail(
      "data.tokenizer_path with data.tokenizer=FILE, and only there",
      "It is the path of a published SentencePiece `tokenizer.model`.",
      **{
        "data.tokenizer": data.tokenizer.name,
        "data.tokenizer_path": data.tokenizer_path,
      },
    )
  lengths = data.lengths
  if list(lengths) != sorted(set(lengths)) or (
    lengths and not 0 < lengths[0] <= lengths[-1] <= max_seq_len
  ):
    checks.fail(
      "data.lengths to increase, from 1 to at most model.decoder.max_seq_len"
      f"={max_seq_len}",
      **{"data.lengths": lengths},
    )


def _validate_transforms(data: DataConfig) -> None:
  for name in ("image_transforms", "audio_transforms", "text_transforms"):
    for transform in getattr(data, name):
      if not hasattr(transform, "kind"):
        checks.fail(
          f"data.{name} to hold transformations of ppnet.data",
          "Compose them in the configuration's file, such as"
          " [image.Decode(...), image.ZScore(...)]; a flag cannot.",
          got=transform,
        )


def _validate_audio(audio: AudioConfig) -> None:
  checks.positive(
    **{
      "data.audio.sample_rate_hz": audio.sample_rate_hz,
      "data.audio.window_secs": audio.window_secs,
      "data.audio.hop_secs": audio.hop_secs,
      "data.audio.num_mels": audio.num_mels,
      "data.audio.num_mfcc": audio.num_mfcc,
    }
  )
  if audio.max_secs < audio.window_secs:
    checks.fail(
      "data.audio.max_secs >= data.audio.window_secs",
      "A recording must hold at least one window.",
      max_secs=audio.max_secs,
      window_secs=audio.window_secs,
    )
  if audio.num_mfcc > audio.num_mels:
    checks.fail(
      "data.audio.num_mfcc <= data.audio.num_mels",
      num_mfcc=audio.num_mfcc,
      num_mels=audio.num_mels,
    )
  if not 0 <= audio.min_hz < audio.max_hz <= audio.sample_rate_hz / 2:
    checks.fail(
      "0 <= data.audio.min_hz < data.audio.max_hz <= sample_rate_hz / 2",
      min_hz=audio.min_hz,
      max_hz=audio.max_hz,
      sample_rate_hz=audio.sample_rate_hz,
    )
