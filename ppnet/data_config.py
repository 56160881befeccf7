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
  """Where records come from; `ppnet.data.catalogue` has a class for each."""

  DIGITS = "digits"  # scikit-learn's bundled digits, each with a DTMF key tone.
  IMAGE_FOLDER = "image_folder"  # <path>/{train,test}/<class name>/<file>.
  AUDIO_FOLDER = "audio_folder"  # The same, of recordings: Speech Commands.
  IDX = "idx"  # The four files of MNIST and of those that took its form.
  FSDD = "fsdd"  # Free Spoken Digit Dataset.
  CLOTHING_REVIEWS = "clothing_reviews"  # Women's E-Commerce Clothing Reviews.
  SQUAD = "squad"  # Passages, questions and answers.
  COCO_CAPTIONS = "coco_captions"  # Photographs and what they show.
  SPOKEN_WRITTEN_DIGITS = "spoken_written_digits"  # IDX with FSDD.
  TEXT_FILE = "text_file"  # Windows of one long text.
  TABLE = "table"  # JSON lines or Parquet, the columns named in the config.
  TFDS = "tfds"  # A set that `tfds build` made; read without TensorFlow.
  ARRAY_RECORD = "array_record"  # Files of `ppnet.data.sources.encode_record`.


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


class ReviewLabel(enum.Enum):
  """What the class of a review is."""

  RECOMMENDED = "recommended"  # Whether its author recommends the article.
  RATING = "rating"  # From one to five.


class Statistics(enum.Enum):
  """Where the constants come from that pictures are normalised by."""

  CONSTANT = "constant"  # `pixel_mean` and `pixel_std`, of no record at all.
  PUBLIC_SPLIT = "public_split"  # Training records that are set aside for it.


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
    first_mfcc: of these, from 0; 1 leaves a frame's level out.
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
  first_mfcc: int = 0
  min_hz: float = 300.0
  max_hz: float = 4000.0
  feature: AudioFeature = AudioFeature.LOG_MEL


@dataclasses.dataclass(slots=True, kw_only=True)
class ColumnsConfig:
  """Which column of a table, or feature of a TFDS set, is what of a record.

  An empty name means that there is none. For TFDS, where all are empty, those
  of these names are taken that the set has.

  Attributes:
    id: a name, unique in the whole set; without it rows are numbered.
    text: what is read.
    answer: what is to be written.
    label: the class: its name, or its position in `data.class_names`.
    image: an encoded picture, or its file's path from `data.path`.
    audio: likewise a recording.
    user: whose the record is.
  """

  id: str = ""
  text: str = ""
  answer: str = ""
  label: str = ""
  image: str = ""
  audio: str = ""
  user: str = ""


@dataclasses.dataclass(slots=True, kw_only=True)
class DataConfig:
  """What the records are and how they become arrays.

  Attributes:
    source: where records come from.
    path: folder or file of the raw data, for a source that needs one.
    task: CLASSIFY, ANSWER or CAUSAL.
    class_names: of the labels, in order, where the source does not know them:
      IDX, TABLE, ARRAY_RECORD. IDX without: "0", "1", and so on.
    columns: of TABLE and TFDS.
    review_label: the class in CLOTHING_REVIEWS.
    captions_per_image: records that a photograph of COCO_CAPTIONS makes; more
      than one need privacy.unit=USER, since then it is the "user".
    window_bytes: length of a record of TEXT_FILE.
    held_out_users: speakers whose recordings are the whole test split of FSDD,
      and in it alone; none given: its official split.
    user_pattern: regular expression with one group, the user, that matches all
      of `<class>/<file>` of every training file of a folder. Empty: no users.
    prepared_dir: where PREPARE writes (and TRAIN reads) ArrayRecord files, the
      tokenizer and `dataset.json`. Empty: `<workdir>/prepared`.
    test_fraction: share held out for testing, of a source that comes as one.
    split_seed: fixes that split, and whatever else PREPARE draws.
    records_per_shard: raw records that a file of PREPARE is made from.
    prepare_workers: processes that make the files of PREPARE; 0: this one.
      They change nothing in what is written, and take seconds to start.
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
    statistics: CONSTANT takes the next two; PUBLIC_SPLIT measures them.
    public_fraction: share of the training records that PUBLIC_SPLIT sets aside
      as public. They are measured, never trained on, and not protected.
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
    store_fixed: keep what the transformations before the first random one make
      of a record, in files of `prepared_dir`, for all runs; see `data.stored`.
  """

  source: Source = Source.DIGITS
  path: str = ""
  task: Task = Task.CLASSIFY
  class_names: tuple[str, ...] = ()
  columns: ColumnsConfig = dataclasses.field(default_factory=ColumnsConfig)
  review_label: ReviewLabel = ReviewLabel.RECOMMENDED
  captions_per_image: int = 1
  window_bytes: int = 256
  held_out_users: tuple[str, ...] = ()
  user_pattern: str = ""
  prepared_dir: str = ""
  test_fraction: float = 0.2
  split_seed: int = 0
  records_per_shard: int = 2048
  prepare_workers: int = 0
  prompt: str = "Which digit is written and dialled?"
  tokenizer: TokenizerKind = TokenizerKind.PUBLIC
  tokenizer_path: str = ""
  vocab_size: int = 96
  lengths: tuple[int, ...] = ()
  image_size: int = 8
  image_channels: int = 1
  statistics: Statistics = Statistics.CONSTANT
  public_fraction: float = 0.0
  pixel_mean: float = 0.5
  pixel_std: float = 0.5
  image_transforms: tuple[Any, ...] = ()
  text_transforms: tuple[Any, ...] = ()
  audio: AudioConfig = dataclasses.field(default_factory=AudioConfig)
  audio_transforms: tuple[Any, ...] = ()
  augmentation_seed: int = 0
  on_bad_record: BadRecord = BadRecord.RAISE
  cache: bool = True
  store_fixed: bool = False


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
  checks.positive(
    **{
      "data.records_per_shard": data.records_per_shard,
      "data.window_bytes": data.window_bytes,
      "data.captions_per_image": data.captions_per_image,
    }
  )
  speaks = (Source.FSDD, Source.SPOKEN_WRITTEN_DIGITS)
  if data.held_out_users and data.source not in speaks:
    checks.fail(
      "data.held_out_users with source FSDD or SPOKEN_WRITTEN_DIGITS alone",
      **{
        "data.source": data.source.name,
        "data.held_out_users": data.held_out_users,
      },
    )
  checks.non_negative(**{"data.prepare_workers": data.prepare_workers})
  if data.source is not Source.DIGITS and not data.path:
    checks.fail(
      "data.path to name the raw data, for every source but DIGITS",
      f"Set --config.data.path; for {data.source.name} it is"
      f" {PATHS[data.source]}.",
      **{"data.source": data.source.name, "data.path": data.path},
    )
  if data.store_fixed and data.on_bad_record is not BadRecord.RAISE:
    checks.fail(
      "data.on_bad_record=RAISE with data.store_fixed",
      "A record that cannot be decoded has no place in the file.",
      **{"data.on_bad_record": data.on_bad_record.name},
    )
  _validate_statistics(data)
  _validate_text(data, max_seq_len=max_seq_len)
  _validate_transforms(data)
  _validate_audio(data.audio)


def validate_users(data: DataConfig, *, has_users: bool) -> None:
  """Checks that records have users where the privacy unit asks for them."""
  pattern = data.user_pattern
  in_folders = data.source in (Source.IMAGE_FOLDER, Source.AUDIO_FOLDER)
  if pattern and not in_folders:
    checks.fail(
      "data.user_pattern with source IMAGE_FOLDER or AUDIO_FOLDER alone",
      **{"data.source": data.source.name},
    )
  if has_users and not pattern and _has_no_users(data):
    checks.fail(
      "records that belong to somebody, for privacy.unit=USER",
      "In folders, for files named <user>_<number>.jpg, set"
      " --config.data.user_pattern='[^/]*/([^_]*)_.*'; in a table or a TFDS set"
      " --config.data.columns.user; other sources without users have none.",
      **{"data.source": data.source.name, "data.user_pattern": pattern},
    )
  if data.captions_per_image > 1 and not has_users:
    checks.fail(
      "privacy.unit=USER where a photograph has several records",
      "Protecting one caption would not protect the photograph. Set"
      " --config.privacy.unit=user, or --config.data.captions_per_image=1.",
      **{"data.captions_per_image": data.captions_per_image},
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


def _has_no_users(data: DataConfig) -> bool:
  """Whether records are certainly nobody's, unless a pattern says whose."""
  if data.source in (Source.TABLE, Source.TFDS):
    return not data.columns.user
  return data.source in _WITHOUT_USERS


# What `data.path` names, for each source that needs it.
PATHS = {
  Source.IMAGE_FOLDER: (
    "a folder, or a zip of one, that holds train/<class>/<file> and"
    " test/<class>/<file>"
  ),
  Source.AUDIO_FOLDER: (
    "a folder, or a zip of one, that holds train/<class>/<file> and"
    " test/<class>/<file>, or <class>/<file> and testing_list.txt"
  ),
  Source.IDX: (
    "a folder that holds train-images-idx3-ubyte, train-labels-idx1-ubyte,"
    " t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte, each plain or .gz"
  ),
  Source.FSDD: (
    "a folder, or a zip, of <digit>_<speaker>_<number>.wav, or a folder that"
    " holds such a zip"
  ),
  Source.CLOTHING_REVIEWS: "the table of reviews, .csv or .csv.gz",
  Source.SQUAD: (
    "a SQuAD .json or .json.gz, or a folder that holds train-v*.json and"
    " dev-v*.json, each plain or .gz"
  ),
  Source.COCO_CAPTIONS: (
    "a folder, or a zip, that holds captions.jsonl and images/; or a folder"
    " that holds annotations/captions_train2017.json, the same of val2017, and"
    " train2017 and val2017, each a folder or a .zip"
  ),
  Source.SPOKEN_WRITTEN_DIGITS: (
    "a folder that holds mnist/, as for IDX, and fsdd/, as for FSDD"
  ),
  Source.TEXT_FILE: "a file of UTF-8 text",
  Source.TABLE: (
    "a .jsonl, .jsonl.gz or .parquet file, or a folder of them whose names"
    " begin with train and test"
  ),
  Source.TFDS: (
    "the folder of a built set and its version, such as"
    " ~/tensorflow_datasets/mnist/3.0.1"
  ),
  Source.ARRAY_RECORD: (
    "a folder that holds train*.array_record and test*.array_record"
  ),
}

# Whose records are nobody's, unless their names say so.
_WITHOUT_USERS = (
  Source.DIGITS,
  Source.IMAGE_FOLDER,
  Source.AUDIO_FOLDER,
  Source.IDX,
  Source.CLOTHING_REVIEWS,
  Source.TEXT_FILE,
)


def _validate_statistics(data: DataConfig) -> None:
  measures = data.statistics is Statistics.PUBLIC_SPLIT
  if measures != (data.public_fraction > 0) or not data.public_fraction < 1:
    checks.fail(
      "data.public_fraction between 0 and 1 with data.statistics=PUBLIC_SPLIT,"
      " and 0 without",
      **{
        "data.statistics": data.statistics.name,
        "data.public_fraction": data.public_fraction,
      },
    )
  if measures and data.image_transforms:
    checks.fail(
      "data.statistics=CONSTANT where data.image_transforms are given",
      "Those have their own constants, and nothing would read the measured"
      " ones.",
      **{"data.statistics": data.statistics.name},
    )


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
  checks.non_negative(**{"data.audio.first_mfcc": audio.first_mfcc})
  if audio.first_mfcc + audio.num_mfcc > audio.num_mels:
    checks.fail(
      "data.audio.first_mfcc + data.audio.num_mfcc <= data.audio.num_mels",
      first_mfcc=audio.first_mfcc,
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
