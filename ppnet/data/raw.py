"""Raw data sets: what PREPARE reads, each behind one small class.

A raw data set gives the record at any position of a split, from files as their
publisher has them. `catalogue` has the classes that exist.

*Add a source.* Derive a class from `RawDataset` in a file of its own, whose
constructor takes the `DataConfig`; add a member to `data_config.Source`, the
meaning of `data.path` to `data_config.PATHS`, and one line to `catalogue`.
Everything else (shards, restarts, splits by hash, checks, the card) follows.

What a record may depend on: the raw files and the config, and never on which
records were read before, by which process. The split of a set that comes as one
is decided record by record (`is_test`), from a name and the seed alone, so that
one record more or less moves no other one to the other side.
"""

import abc
import hashlib
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, SupportsIndex

from ppnet import config as config_lib
from ppnet.core import checks
from ppnet.data import archives, sources


class RawDataset(abc.ABC):
  """A data set in its publisher's files. Can be pickled; cheap to open.

  Attributes:
    name: of the data set, for people.
    class_names: a label is a position in it; () where there are none.
    media: modality to the fewest and the most items of a record; None where
      only reading everything tells.
    has_text: whether records have a text or an answer; None likewise.
    origin: where the data come from.
    licence: under what terms.
    public_texts: sentences that the class itself writes into records, for a
      tokenizer that learns from public text.
    left_out: why -> how many raw rows are no record, for the card.
    in_place: whether training reads the raw files, and PREPARE copies nothing.
    is_checked: whether PREPARE reads every record of one read in place.
  """

  name: str
  class_names: tuple[str, ...] = ()
  media: Mapping[str, tuple[int, int]] | None = {}  # Replaced, never written.
  has_text: bool | None = False
  origin: str
  licence: str = "Not known to ppnet: that of the files' owner."
  public_texts: tuple[str, ...] = ()
  left_out: Mapping[str, int] = {}
  in_place: bool = False
  is_checked: bool = True

  @abc.abstractmethod
  def num_records(self, split: str) -> int:
    """Number of records of "train" or "test", unreadable ones included."""

  @abc.abstractmethod
  def record(self, split: str, index: int) -> sources.Record:
    """The record at a position of a split.

    Raises:
      sources.BadRecordError: this one record cannot be read.
    """

  @abc.abstractmethod
  def inputs(self) -> Mapping[str, Any]:
    """The raw files, for the card: a name to a path, or to a hash of its own.

    A path is hashed whole. A listing (see `listing_digest`) stands in where
    reading everything would take too long.
    """

  def user(self, split: str, index: int) -> str | None:
    """Whose the record is, without reading more than that takes."""
    return self.record(split, index).user


class SplitSource:
  """One split of a raw data set that is read in place: a `sources.Source`."""

  def __init__(self, raw: RawDataset, *, split: str):
    """Reads nothing yet."""
    self._raw, self._split = raw, split
    self.class_names = raw.class_names

  def __len__(self) -> int:
    return self._raw.num_records(self._split)

  def __getitem__(self, index: SupportsIndex) -> sources.Record:
    return self._raw.record(self._split, index.__index__())

  def user(self, index: SupportsIndex) -> str | None:
    """Whose the record is; see `sources.Source`."""
    return self._raw.user(self._split, index.__index__())

  @property
  def description(self) -> str:
    """The set and its split."""
    return f"{self._split} split of {self._raw.name} ({self._raw.origin})"


def is_test(name: str, config: config_lib.DataConfig) -> bool:
  """Whether what has this name belongs to the test split.

  A share of `test_fraction` does, on average, each name by itself.
  """
  return _uniform("test", name, config) < config.test_fraction


def is_public(record: sources.Record, config: config_lib.DataConfig) -> bool:
  """Whether a training record is set aside as public (`public_fraction`).

  All records of a user are, or none.
  """
  if not config.public_fraction:
    return False
  name = record.id if record.user is None else record.user
  return _uniform("public", name, config) < config.public_fraction


def _uniform(domain: str, name: str, config: config_lib.DataConfig) -> float:
  """A number in [0, 1) that depends on these and the seed alone."""
  text = f"{domain},{config.split_seed},{name}"
  digest = hashlib.blake2b(_to_bytes(text), digest_size=8).digest()
  return int.from_bytes(digest) / 2**64


def _to_bytes(text: str) -> bytes:
  """UTF-8; what is no valid text still has a hash."""
  return text.encode(errors="surrogatepass")


def split_of(
  names: Sequence[str], config: config_lib.DataConfig, *, what: str
) -> dict[str, list[int]]:
  """Positions of each split, decided name by name.

  Args:
    names: of whatever is to stay together, one per position.
    config: decides the share and the draw.
    what: for the error, such as "articles".

  Raises:
    ValueError: one of the splits would be empty.
  """
  positions: dict[str, list[int]] = {split: [] for split in sources.SPLITS}
  decided = {name: is_test(name, config) for name in dict.fromkeys(names)}
  for position, name in enumerate(names):
    positions["test" if decided[name] else "train"].append(position)
  for split in sources.SPLITS:
    if not positions[split]:
      checks.fail(
        f"{what} in both splits",
        "Change data.test_fraction or data.split_seed, or add data.",
        **{
          what.replace(" ", "_"): len(decided),
          "test_fraction": config.test_fraction,
          "empty": split,
        },
      )
  return positions


def checked_split(split: str) -> str:
  """Returns a split's name, or raises `ValueError`."""
  if split not in sources.SPLITS:
    checks.fail(f"split to be one of {sources.SPLITS}", split=split)
  return split


def existing(
  path: str | pathlib.Path, config: config_lib.DataConfig
) -> pathlib.Path:
  """Returns the path, or says what the source expects to find there."""
  path = pathlib.Path(path).expanduser()
  if not path.exists():
    expected(config, missing=str(path))
  return path


def expected(config: config_lib.DataConfig, **found: Any) -> NoReturn:
  """Raises `ValueError`: what `data.path` should be, and what was found."""
  checks.fail(
    f"config.data.path to be {config_lib.SOURCE_PATHS[config.source]}",
    "Correct --config.data.path.",
    path=config.path,
    **found,
  )


def listing_digest(files: archives.Files, names: Sequence[str]) -> str:
  """A hash of the names and sizes of files, for what is too much to read."""
  digest = hashlib.sha256()
  for name in names:
    digest.update(_to_bytes(f"{files.size(name)} {name}\n"))
  return f"names and sizes: {digest.hexdigest()}"


def pgm(pixels: Any) -> bytes:
  """uint8 [height, width] as a binary PGM, which is nearly free to decode."""
  height, width = pixels.shape
  return b"P5 %d %d 255\n" % (width, height) + pixels.tobytes()
