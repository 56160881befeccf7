"""Raw pictures and recordings: digits, class folders, IDX and FSDD.

>>> raw = Idx(config_lib.DataConfig(path="/data/mnist"))  # doctest: +SKIP
>>> raw.num_records("train"), raw.record("train", 0).label  # doctest: +SKIP
(60000, 5)
"""

import functools
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ppnet import config as config_lib
from ppnet.core import checks
from ppnet.data import archives, audio, image, raw, sources


class Digits(raw.RawDataset):
  """scikit-learn's digits, each with a synthetic telephone key tone."""

  name = "digits"
  class_names = tuple("0123456789")
  media = {"image": (1, 1), "audio": (1, 1)}
  origin = (
    "Pictures: the test part of Optical Recognition of Handwritten Digits"
    " (Alpaydin and Kaynak 1998, UCI Machine Learning Repository,"
    " https://doi.org/10.24432/C50P49) as bundled with scikit-learn. Sounds:"
    " synthetic telephone key tones of the same digit (ITU-T Q.23)."
  )
  licence = "Pictures: CC BY 4.0. Sounds: made here, no rights claimed."

  def __init__(self, config: config_lib.DataConfig):
    """Checks the settings of the split."""
    checks.in_open_unit_interval(test_fraction=config.test_fraction)
    checks.non_negative(
      "It seeds NumPy's generators.", split_seed=config.split_seed
    )
    self._config = config

  @functools.cached_property
  def _content(self) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """(levels [n, 64], labels [n], positions of each split)."""
    # Takes a second to import, and reading prepared data does not need it.
    import sklearn.datasets
    import sklearn.model_selection

    levels, labels = sklearn.datasets.load_digits(return_X_y=True)
    train, test = sklearn.model_selection.train_test_split(
      np.arange(len(labels)),
      test_size=self._config.test_fraction,
      random_state=self._config.split_seed,
      stratify=labels,
    )
    positions = {"train": np.sort(train), "test": np.sort(test)}
    return np.asarray(levels), np.asarray(labels), positions

  def num_records(self, split: str) -> int:
    """See `RawDataset`."""
    return len(self._content[2][raw.checked_split(split)])

  def record(self, split: str, index: int) -> sources.Record:
    """See `RawDataset`."""
    levels, labels, positions = self._content
    position = int(positions[split][index])
    label = int(labels[position])
    pixels = digit_to_pixels(levels[position].reshape(8, 8))
    return sources.Record(
      id=f"digits-{position:04d}",
      media={
        "image": (image.encode_png(pixels),),
        "audio": (self._key_tone(label, position),),
      },
      label=label,
    )

  def _key_tone(self, label: int, index: int) -> bytes:
    """The WAV of a record's key tone, its own whatever the split."""
    settings = self._config.audio
    waveform = audio.dtmf_tone(
      label,
      np.random.default_rng([self._config.split_seed, index]),
      sample_rate_hz=settings.sample_rate_hz,
      max_secs=settings.max_secs,
    )
    return audio.encode_wav(waveform, sample_rate_hz=settings.sample_rate_hz)

  def inputs(self) -> Mapping[str, Any]:
    """Nothing but scikit-learn's own file."""
    return {}


def digit_to_pixels(levels: np.ndarray) -> np.ndarray:
  """Returns levels 0..16 as uint8 0..255, with 16 -> 255.

  A level is 15.9375 grey values, so rounding moves it by at most 1/510 of the
  range, and round(pixel * 16 / 255) gives it back.
  """
  return np.round(np.asarray(levels) * (255 / 16)).astype(np.uint8)


class ClassFolder(raw.RawDataset):
  """Files in `{train,test}/<class name>/<file>`, of a folder or a zip.

  Classes are the folder names in sorted order, and records are sorted by class
  and file name, so positions are the same on every machine. Names that start
  with a dot are ignored, and so are folders inside a class folder and every
  other split (`validation/`). A folder is read in place; a zip is copied, and
  may have one folder around everything.

  Where there is no `train/` but a `testing_list.txt`, as Speech Commands has
  it, classes are the folders beside it (but those whose name starts with "_"),
  test are the files that it lists, and those of `validation_list.txt` are left
  out.
  """

  is_checked = False

  def __init__(self, config: config_lib.DataConfig, *, modality: str):
    """Lists the files.

    Raises:
      ValueError: the folder, a split, or every class is missing, a class has
        no file, or the two splits do not have the same classes.
    """
    self._config, self._modality = config, modality
    self._path = raw.existing(config.path, config)
    self._files = archives.open_files(self._path)
    self.in_place = self._path.is_dir()
    resolved = self._path.resolve()
    self.name = resolved.name if self.in_place else resolved.stem
    self.media = {modality: (1, 1)}
    how = "read in place" if self.in_place else "a zip"
    self.origin = f"{self._path.resolve()}, {how}."
    names = self._files.names()
    top = {name.split("/")[0] for name in names}
    self._inside = ""
    is_wrapped = len(top) == 1 and not top & {*sources.SPLITS, *names}
    if is_wrapped and not self.in_place:
      # A zip of a folder often has that folder's name before every other.
      self._inside = f"{top.pop()}/"
      names = tuple(name.removeprefix(self._inside) for name in names)
      top = {name.split("/")[0] for name in names}
    if "testing_list.txt" in top and "train" not in top:
      by_split = self._listed(names)
    else:
      by_split = self._in_split_folders(names)
    files = {split: by_split[split] for split in sources.SPLITS}
    self._check_classes(files)
    self.class_names = tuple(files["train"])
    self._names = {
      split: [
        (label, name)
        for label, of_class in enumerate(files[split].values())
        for name in of_class
      ]
      for split in sources.SPLITS
    }

  def _in_split_folders(
    self, names: Sequence[str]
  ) -> dict[str, dict[str, list[str]]]:
    """Split -> class -> names."""
    files: dict[str, dict[str, list[str]]] = {s: {} for s in sources.SPLITS}
    left_out = 0
    for name in names:
      parts = name.split("/")
      if len(parts) == 3 and parts[0] in files:
        files[parts[0]].setdefault(parts[1], []).append(name)
      elif len(parts) == 3:
        left_out += 1
    if left_out:
      self.left_out = {"files of other splits than train and test": left_out}
    for split in sources.SPLITS:
      folder = self._path / split
      # What has no file is listed nowhere else.
      classes = (
        [
          inner
          for inner in sorted(folder.iterdir())
          if inner.is_dir() and not inner.name.startswith(".")
        ]
        if folder.is_dir()
        else []
      )
      if not classes and not files[split]:
        if self.in_place and not folder.is_dir():
          checks.fail(
            "a folder for each split",
            f"Put {split} files in {folder}/<class name>/.",
            missing=str(folder),
          )
        checks.fail(
          f"at least one class folder in {folder}",
          f"Put files in {folder}/<class name>/.",
          classes=[],
        )
      for inner in classes:
        if inner.name not in files[split]:
          checks.fail(
            "at least one file in every class folder",
            "Put files directly into it, or remove it.",
            empty=str(inner),
          )
    return files

  def _listed(self, names: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """Split -> class -> names, of a set that lists its test files."""
    lists = {
      name: set(self._files.read(self._inside + name).decode().split())
      for name in ("testing_list.txt", "validation_list.txt")
      if name in names
    }
    validation = lists.get("validation_list.txt", set())
    test = lists["testing_list.txt"]
    files: dict[str, dict[str, list[str]]] = {s: {} for s in sources.SPLITS}
    for name in names:
      parts = name.split("/")
      if len(parts) != 2 or name.startswith("_") or name in validation:
        continue
      split = "test" if name in test else "train"
      files[split].setdefault(parts[0], []).append(name)
    missing = sorted((test | validation) - set(names))
    if missing:
      raw.expected(
        self._config, listed_and_missing=missing[:3], count=len(missing)
      )
    if validation:
      self.left_out = {"files of validation_list.txt": len(validation)}
    return files

  def _check_classes(
    self, files: Mapping[str, Mapping[str, Sequence[str]]]
  ) -> None:
    """Raises where the splits do not have the same classes."""
    only_train = sorted(files["train"].keys() - files["test"].keys())
    only_test = sorted(files["test"].keys() - files["train"].keys())
    if only_train or only_test or not files["train"]:
      checks.fail(
        f"the same classes in train/ and test/ of {self._path}",
        "Give every class a folder with files in both.",
        only_in_train=only_train,
        only_in_test=only_test,
      )

  def num_records(self, split: str) -> int:
    """See `RawDataset`."""
    return len(self._names[raw.checked_split(split)])

  def record(self, split: str, index: int) -> sources.Record:
    """See `RawDataset`."""
    label, name = self._names[split][index]
    try:
      content = self._files.read(self._inside + name)
    except archives.UnreadableError as error:
      raise sources.BadRecordError(name, str(error)) from error
    return sources.Record(
      id=name,
      media={self._modality: (content,)},
      label=label,
      user=self.user(split, index),
    )

  def user(self, split: str, index: int) -> str | None:
    """Whose the file is, from its name.

    Nobody's privacy depends on the test files, so their names are free.

    Raises:
      ValueError: `user_pattern` does not match a training file's name.
    """
    pattern = self._config.user_pattern
    if not pattern or split != "train":
      return None
    name = self._names[split][index][1]
    found = re.fullmatch(pattern, "/".join(name.split("/")[-2:]))
    if found is None or not found.group(1):
      checks.fail(
        "config.data.user_pattern to find the user of every picture and"
        " recording",
        "One that belongs to nobody would be protected as nobody's.",
        file=name,
        user_pattern=pattern,
      )
    return found.group(1)

  def inputs(self) -> Mapping[str, Any]:
    """The zip; of a folder its listing."""
    if not self.in_place:
      return {self._path.name: self._path}
    return {
      split: raw.listing_digest(self._files, [name for _, name in named])
      for split, named in self._names.items()
    }


def image_folder(config: config_lib.DataConfig) -> ClassFolder:
  """Pictures in class folders."""
  return ClassFolder(config, modality="image")


def audio_folder(config: config_lib.DataConfig) -> ClassFolder:
  """Recordings in class folders."""
  return ClassFolder(config, modality="audio")


class Idx(raw.RawDataset):
  """Four IDX files, as MNIST and Fashion-MNIST come; plain or .gz.

  Pictures are kept as binary PGM. An IDX file does not say what its classes are
  called: `data.class_names` does, or they are "0", "1", and so on.

  Source: LeCun, Cortes and Burges 1998, http://yann.lecun.com/exdb/mnist,
  section "File formats for the MNIST database".
  """

  media = {"image": (1, 1)}
  _PREFIXES = {"train": "train", "test": "t10k"}

  def __init__(
    self, config: config_lib.DataConfig, *, folder: pathlib.Path | None = None
  ):
    """Reads the labels, and so much of the pictures as says their number.

    Args:
      config: the path and the class names.
      folder: instead of `config.path`.

    Raises:
      ValueError: a file is missing, is no such IDX file, was cut short, or the
        numbers of pictures, labels and classes do not fit.
    """
    self._config = config
    path = raw.existing(folder or config.path, config)
    self._path = path
    self.name = path.resolve().name
    self.origin = f"IDX files in {path.resolve()}."
    self._labels = {
      split: self._array(split, "labels-idx1", ndim=1)
      for split in sources.SPLITS
    }
    most = max(int(labels.max()) for labels in self._labels.values())
    names = config.class_names or tuple(map(str, range(most + 1)))
    if most >= len(names):
      checks.fail(
        f"data.class_names for all labels, 0 to {most}",
        class_names=names,
      )
    self.class_names = tuple(names)

  def __getstate__(self):
    # Each process reads the pictures itself, when it first needs them.
    return {k: v for k, v in self.__dict__.items() if k != "_pictures"}

  def _file(self, split: str, kind: str) -> pathlib.Path:
    """One of the four files."""
    stem = f"{self._PREFIXES[split]}-{kind}-ubyte"
    # Some archives have a dot before "idx".
    for name in (stem, stem.replace("-idx", ".idx")):
      for path in (self._path / name, self._path / f"{name}.gz"):
        if path.is_file():
          return path
    return raw.expected(self._config, missing=str(self._path / stem))

  def _array(self, split: str, kind: str, *, ndim: int) -> np.ndarray:
    """The uint8 array of a file, [n, ...]."""
    path = self._file(split, kind)
    content = archives.read_plain_or_gzip(path)
    magic = bytes([0, 0, 8, ndim])
    if content[:4] != magic:
      checks.fail(
        f"an IDX file of bytes with {ndim} dimension(s), magic {magic.hex()}",
        magic=content[:4].hex(),
        path=str(path),
      )
    header = 4 * (1 + ndim)
    shape = tuple(
      int.from_bytes(content[start : start + 4])
      for start in range(4, header, 4)
    )
    size = 1
    for length in shape:
      size *= length
    if len(content) != header + size or not size:
      checks.fail(
        f"{header + size} bytes in an IDX file of shape {shape}, and something"
        " in it",
        "It was cut short, or something follows it.",
        num_bytes=len(content),
        path=str(path),
      )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)

  @functools.cached_property
  def _pictures(self) -> dict[str, np.ndarray]:
    """Split -> uint8 [n, height, width]."""
    pictures = {}
    for split, labels in self._labels.items():
      pictures[split] = self._array(split, "images-idx3", ndim=3)
      if len(pictures[split]) != len(labels):
        checks.fail(
          f"as many pictures as labels in the {split} split of {self._path}",
          pictures=len(pictures[split]),
          labels=len(labels),
        )
    return pictures

  def labels(self, split: str) -> np.ndarray:
    """The labels of a split, uint8 [n]."""
    return self._labels[split]

  def num_records(self, split: str) -> int:
    """See `RawDataset`."""
    return len(self._labels[raw.checked_split(split)])

  def record(self, split: str, index: int) -> sources.Record:
    """See `RawDataset`."""
    return sources.Record(
      id=f"{split}-{index:05d}",
      media={"image": (raw.pgm(self._pictures[split][index]),)},
      label=int(self._labels[split][index]),
    )

  def inputs(self) -> Mapping[str, Any]:
    """The four files."""
    paths = [
      self._file(split, kind)
      for split in sources.SPLITS
      for kind in ("images-idx3", "labels-idx1")
    ]
    return {path.name: path for path in paths}


class Fsdd(raw.RawDataset):
  """Free Spoken Digit Dataset: `<digit>_<speaker>_<number>.wav`.

  The speaker is the record's user. The official test split is the recordings
  numbered 0 to 4. With `data.held_out_users` it is all recordings of those
  speakers instead, and the train split all of the others.
  """

  name = "fsdd"
  class_names = tuple("0123456789")
  media = {"audio": (1, 1)}
  origin = (
    "Free Spoken Digit Dataset (Jackson et al.,"
    " https://github.com/Jakobovski/free-spoken-digit-dataset)."
  )
  licence = "CC BY-SA 4.0."
  _NAME = re.compile(r"(?:.*/)?([0-9])_([^/_]+)_([0-9]+)\.wav")
  _NUM_TEST = 5

  def __init__(
    self, config: config_lib.DataConfig, *, folder: pathlib.Path | None = None
  ):
    """Lists the recordings.

    Args:
      config: the path and the speakers that are held out.
      folder: instead of `config.path`.

    Raises:
      ValueError: there is no such recording, two are of one name, a speaker
        that is held out is not there, or a split is empty.
    """
    path = raw.existing(folder or config.path, config)
    zips = sorted(path.glob("*.zip")) if path.is_dir() else []
    self._files = archives.open_files(path)
    self._found = self._recordings()
    if not self._found and len(zips) == 1:
      self._files = archives.open_files(zips[0])
      self._found = self._recordings()
    if not self._found:
      raw.expected(config, found=list(self._files.names()[:3]))
    speakers = sorted({user for _, user, _, _ in self._found})
    held_out = config.held_out_users
    unknown = sorted(set(held_out) - set(speakers))
    if unknown:
      checks.fail(
        f"data.held_out_users among {speakers}", held_out_users=held_out
      )
    self._positions: dict[str, list[int]] = {s: [] for s in sources.SPLITS}
    for position, (_, user, number, _) in enumerate(self._found):
      tests = user in held_out if held_out else number < self._NUM_TEST
      self._positions["test" if tests else "train"].append(position)
    for split, positions in self._positions.items():
      if not positions:
        raw.expected(config, no_recording_in=split, speakers=speakers)

  def _recordings(self) -> list[tuple[int, str, int, str]]:
    """(digit, speaker, number, name), sorted."""
    found = []
    for name in self._files.names():
      match = self._NAME.fullmatch(name)
      if match:
        digit, speaker, number = match.groups()
        found.append((int(digit), speaker, int(number), name))
    return sorted(found)

  def labels(self, split: str) -> np.ndarray:
    """The digits of a split, int64 [n]."""
    return np.array([self._found[p][0] for p in self._positions[split]])

  def num_records(self, split: str) -> int:
    """See `RawDataset`."""
    return len(self._positions[raw.checked_split(split)])

  def record(self, split: str, index: int) -> sources.Record:
    """See `RawDataset`."""
    digit, speaker, number, name = self._found[self._positions[split][index]]
    record_id = f"{digit}_{speaker}_{number}"
    try:
      content = self._files.read(name)
    except archives.UnreadableError as error:
      raise sources.BadRecordError(record_id, str(error)) from error
    return sources.Record(
      id=record_id, media={"audio": (content,)}, label=digit, user=speaker
    )

  def inputs(self) -> Mapping[str, Any]:
    """The zip; of a folder its listing."""
    if self._files.path.is_file():
      return {self._files.path.name: self._files.path}
    names = [name for *_, name in self._found]
    return {"recordings": raw.listing_digest(self._files, names)}
