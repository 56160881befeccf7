"""Raw records of several modalities: captioned photographs, paired digits.

>>> config = config_lib.DataConfig(path="/data")  # doctest: +SKIP
>>> SpokenWrittenDigits(config).record("train", 0).text  # doctest: +SKIP
'Which is larger, the written or the spoken digit?'
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from ppnet import config as config_lib
from ppnet.core import checks
from ppnet.data import archives, raw, raw_media, sources


class CocoCaptions(raw.RawDataset):
  """Photographs, each with a sentence that says what it shows.

  A record is one photograph and one caption, the first of the photograph's, so
  the privacy unit is the photograph. With `captions_per_image` above 1 it makes
  several records, which share a user: the photograph; then privacy.unit=USER
  is what protects it. No photograph is in both splits.

  Two forms are read. COCO's own: `annotations/captions_{train,val}2017.json`
  (or .gz) beside the photographs in `train2017` and `val2017`, folders or zips;
  train is train and val is test. And a folder or zip with `captions.jsonl`
  (rows of `file_name` and `captions`) and `images/`, split photograph by
  photograph.

  Source: Chen et al. 2015, https://arxiv.org/abs/1504.00325.
  """

  name = "captioned photographs"
  media = {"image": (1, 1)}
  has_text = True
  origin = "COCO captions (https://cocodataset.org)."
  licence = (
    "Captions: CC BY 4.0. Photographs: each its own; see the annotations."
  )
  _OFFICIAL = {"train": "train2017", "test": "val2017"}

  def __init__(self, config: config_lib.DataConfig):
    """Reads the captions.

    Raises:
      ValueError: the files are not there or not of this form, or a split is
        empty.
    """
    self._config = config
    self._path = raw.existing(config.path, config)
    self._inputs: dict[str, Any] = {}
    self._files: dict[str, archives.Files] = {}
    # Split -> (file's name in the archive, its captions).
    self._captions: dict[str, list[tuple[str, list[str]]]] = {}
    if (self._path / "annotations").is_dir():
      for split, year in self._OFFICIAL.items():
        self._read_official(split, year)
    else:
      self._read_lines()
    self._rows = {
      split: [
        (position, caption)
        for position, (_, captions) in enumerate(of_split)
        for caption in range(min(len(captions), config.captions_per_image))
      ]
      for split, of_split in self._captions.items()
    }

  def _read_official(self, split: str, year: str) -> None:
    """Reads one annotation file, and looks for its photographs."""
    stem = self._path / "annotations" / f"captions_{year}.json"
    paths = [p for p in (stem, stem.with_suffix(".json.gz")) if p.is_file()]
    places = [
      p for p in (self._path / year, self._path / f"{year}.zip") if p.exists()
    ]
    if not paths or not places:
      raw.expected(
        self._config, missing=str(self._path / year if paths else stem)
      )
    files = archives.open_files(places[0])
    try:
      content = json.loads(archives.read_plain_or_gzip(paths[0]))
      names = {row["id"]: row["file_name"] for row in content["images"]}
      captions: dict[str, list[str]] = {}
      for row in sorted(content["annotations"], key=lambda row: row["id"]):
        name = _checked_name(names[row["image_id"]])
        captions.setdefault(name, []).append(row["caption"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      raw.expected(
        self._config,
        file=str(paths[0]),
        error=f"{type(error).__name__}: {error}",
      )
    self._files[split] = files
    inner = self._places(files, sorted(captions))
    self._captions[split] = [
      (place, captions[name])
      for name, place in zip(sorted(captions), inner, strict=True)
    ]
    self._inputs[paths[0].name] = paths[0]
    self._inputs[places[0].name] = (
      raw.listing_digest(files, files.names())
      if places[0].is_dir()
      else places[0]
    )

  def _read_lines(self) -> None:
    """Reads captions.jsonl and splits its photographs."""
    files = archives.open_files(self._path)
    if "captions.jsonl" not in files.names():
      raw.expected(self._config, found=list(files.names()[:3]))
    captions: dict[str, list[str]] = {}
    lines = files.read("captions.jsonl").split(b"\n")
    for number, line in enumerate(lines, 1):
      if not line.strip():
        continue
      try:
        row = json.loads(line)
        name, of_image = _checked_name(row["file_name"]), row["captions"]
        if not isinstance(of_image, list):
          raise TypeError(f"captions are {of_image!r}, no list")
      except (ValueError, KeyError, TypeError) as error:
        raw.expected(
          self._config,
          line=f"{number} of captions.jsonl",
          error=f"{type(error).__name__}: {error}",
        )
      if name in captions:
        checks.fail("each photograph once in captions.jsonl", file_name=name)
      captions[name] = of_image
    names = [name for name in sorted(captions) if captions[name]]
    if len(names) < len(captions):
      self.left_out = {
        "photographs without a caption": len(captions) - len(names)
      }
    inner = self._places(files, names)
    split = raw.split_of(names, self._config, what="photographs")
    for part, positions in split.items():
      self._files[part] = files
      self._captions[part] = [
        (inner[position], captions[names[position]]) for position in positions
      ]
    if self._path.is_file():
      self._inputs[self._path.name] = self._path
    else:
      self._inputs["photographs"] = raw.listing_digest(files, files.names())

  def _places(self, files: archives.Files, names: list[str]) -> list[str]:
    """Where in the archive each photograph is, in whatever folder."""
    by_name: dict[str, str] = {}
    for place in files.names():
      by_name.setdefault(place.rsplit("/", 1)[-1], place)
    missing = [name for name in names if name not in by_name]
    if missing:
      checks.fail(
        f"every photograph that has a caption in {files.path}",
        "Was the download complete?",
        missing=missing[:3],
        count=len(missing),
      )
    return [by_name[name] for name in names]

  def num_records(self, split: str) -> int:
    """See `RawDataset`."""
    return len(self._rows[raw.checked_split(split)])

  def record(self, split: str, index: int) -> sources.Record:
    """See `RawDataset`."""
    position, number = self._rows[split][index]
    place, captions = self._captions[split][position]
    photograph = place.rsplit("/", 1)[-1]
    name = f"{photograph}#{number}"
    try:
      content = self._files[split].read(place)
    except archives.UnreadableError as error:
      raise sources.BadRecordError(name, str(error)) from error
    caption = captions[number]
    if not isinstance(caption, str):
      raise sources.BadRecordError(name, f"its caption is {caption!r}.")
    return sources.Record(
      id=name,
      media={"image": (content,)},
      answer=" ".join(caption.split()),
      user=photograph,
    )

  def inputs(self) -> Mapping[str, Any]:
    """The captions and the photographs."""
    return self._inputs


def _checked_name(name: Any) -> str:
  """A file's name; raises `TypeError` for what is none."""
  if not isinstance(name, str):
    raise TypeError(f"the file name {name!r}")
  return name


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Pair:
  """What a record of paired digits is made of."""

  image: int
  recording: int
  question: str
  answer: str


# What is asked, and in which words.
_QUESTIONS = {
  "which": "Which digit is written and spoken?",
  "sum": "What is the sum of the written and the spoken digit?",
  "same": "Are the written and the spoken digit the same?",
  "larger": "Which is larger, the written or the spoken digit?",
}


class SpokenWrittenDigits(raw.RawDataset):
  """A written digit, a spoken digit, and a question about both.

  | question | the digits | answer |
  | --- | --- | --- |
  | which digit | the same | "0" to "9" |
  | the sum | any two | "0" to "18" |
  | the same or not | half of the time | "yes", "no" |
  | which is larger | different | "written", "spoken" |

  Every recording and every picture is in one record at most, so a record is all
  that the set holds of them, and there are at most as many records as there are
  of either. The four questions are equally frequent for every spoken digit (up
  to one), and so are yes and no; of "larger" the spoken digits 1 to 8 are
  smaller as often as larger, 0 always and 9 never. Neither modality alone tells
  the sum, nor whether the digits are the same.

  Pictures are those of an IDX folder `mnist/`, recordings those of FSDD in
  `fsdd/`, each in its own official split, or with speakers held out
  (`data.held_out_users`). The speaker is the record's user. Everything is drawn
  from `split_seed`.
  """

  name = "spoken-written digits"
  class_names = (*map(str, range(19)), "yes", "no", "written", "spoken")
  media = {"image": (1, 1), "audio": (1, 1)}
  has_text = True
  origin = (
    "Pictures: MNIST (LeCun, Cortes and Burges). Recordings: "
    + raw_media.Fsdd.origin
  )
  licence = f"Recordings: {raw_media.Fsdd.licence} Pictures: see their source."
  public_texts = tuple(_QUESTIONS.values())

  def __init__(self, config: config_lib.DataConfig):
    """Opens both sets.

    Raises:
      ValueError: one of them is not there, or is not of ten classes.
    """
    checks.non_negative(
      "It seeds NumPy's generators.", split_seed=config.split_seed
    )
    self._config = config
    path = raw.existing(config.path, config)
    self._images = raw_media.Idx(
      dataclasses.replace(config, class_names=()),
      folder=raw.existing(path / "mnist", config),
    )
    self._recordings = raw_media.Fsdd(
      config, folder=raw.existing(path / "fsdd", config)
    )
    if len(self._images.class_names) > 10:
      raw.expected(config, classes_of_pictures=len(self._images.class_names))
    without = sum(
      self._recordings.num_records(split) - len(self._pairs[split])
      for split in sources.SPLITS
    )
    if without:
      self.left_out = {"recordings for which no picture was left": without}

  @functools.cached_property
  def _pairs(self) -> dict[str, list[_Pair]]:
    """Split -> what its records are made of."""
    return {
      split: _draw_pairs(
        images=self._images.labels(split),
        recordings=self._recordings.labels(split),
        # NumPy's generators are told apart by the whole list.
        rng=np.random.default_rng(
          [self._config.split_seed, sources.SPLITS.index(split)]
        ),
      )
      for split in sources.SPLITS
    }

  def num_records(self, split: str) -> int:
    """See `RawDataset`."""
    return len(self._pairs[raw.checked_split(split)])

  def record(self, split: str, index: int) -> sources.Record:
    """See `RawDataset`."""
    pair = self._pairs[split][index]
    picture = self._images.record(split, pair.image)
    spoken = self._recordings.record(split, pair.recording)
    return sources.Record(
      id=f"{picture.id}+{spoken.id}",
      media=dict(picture.media) | dict(spoken.media),
      text=_QUESTIONS[pair.question],
      label=self.class_names.index(pair.answer),
      user=spoken.user,
    )

  def inputs(self) -> Mapping[str, Any]:
    """The files of both."""
    return {
      f"{folder}/{name}": path
      for folder, part in (("mnist", self._images), ("fsdd", self._recordings))
      for name, path in part.inputs().items()
    }


def _draw_pairs(
  *, images: np.ndarray, recordings: np.ndarray, rng: np.random.Generator
) -> list[_Pair]:
  """Pairs pictures and recordings; see `SpokenWrittenDigits`.

  Args:
    images: the digits of the pictures, [m].
    recordings: the digits of the recordings, [n].
    rng: decides everything else.
  """
  unused = {
    digit: rng.permutation(np.flatnonzero(images == digit)).tolist()
    for digit in range(10)
  }
  turns = {question: 0 for question in _QUESTIONS}
  pairs = []
  for digit in range(10):
    own = rng.permutation(np.flatnonzero(recordings == digit)).tolist()
    for recording in own:
      # The turns go on from digit to digit, so that they even out.
      question = list(_QUESTIONS)[sum(turns.values()) % len(_QUESTIONS)]
      written = _written(question, digit, turn=turns[question], rng=rng)
      turns[question] += 1
      if not unused[written]:
        continue  # Counted by the caller; MNIST never runs out.
      pairs.append(
        _Pair(
          image=unused[written].pop(),
          recording=recording,
          question=question,
          answer=_answer(question, written=written, spoken=digit),
        )
      )
  return [pairs[place] for place in rng.permutation(len(pairs))]


def _written(
  question: str, spoken: int, *, turn: int, rng: np.random.Generator
) -> int:
  """The written digit that goes with a spoken one."""
  if question == "which" or (question == "same" and turn % 2 == 0):
    return spoken
  if question == "sum":
    return int(rng.integers(10))
  others = [digit for digit in range(10) if digit != spoken]
  if question == "larger":
    side = [d for d in others if (d > spoken) == (turn % 2 == 0)]
    others = side or others
  return int(rng.choice(others))


def _answer(question: str, *, written: int, spoken: int) -> str:
  """What is true."""
  match question:
    case "which":
      return str(spoken)
    case "sum":
      return str(written + spoken)
    case "same":
      return "yes" if written == spoken else "no"
  return "written" if written > spoken else "spoken"
