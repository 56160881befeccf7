"""Raw texts: reviews, questions about passages, and one long text.

>>> raw = TextFile(config_lib.DataConfig(path="book.txt"))  # doctest: +SKIP
>>> len(raw.record("train", 0).text)  # doctest: +SKIP
256
"""

import csv
import dataclasses
import functools
import io
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from ppnet import config as config_lib
from ppnet.core import checks
from ppnet.data import archives, raw, sources


class ClothingReviews(raw.RawDataset):
  """Women's E-Commerce Clothing Reviews: a title, a text, a verdict.

  The text of a record is title and review, with a line break between where
  there are both. A row without a review is no record; it is counted in
  `left_out`. The split is drawn row by row. There is no user: the table does
  not say who wrote what.
  """

  name = "clothing reviews"
  has_text = True
  origin = (
    "Women's E-Commerce Clothing Reviews (Brooks 2018,"
    " https://www.kaggle.com/nicapotato/womens-ecommerce-clothing-reviews)."
  )
  licence = "CC0, as the publisher's page says."
  _CLASSES = {
    config_lib.ReviewLabel.RECOMMENDED: (
      "Recommended IND",
      {"0": "not recommended", "1": "recommended"},
    ),
    config_lib.ReviewLabel.RATING: (
      "Rating",
      {str(n): f"{n} of 5" for n in range(1, 6)},
    ),
  }

  def __init__(self, config: config_lib.DataConfig):
    """Reads the table.

    Raises:
      ValueError: it cannot be read, has no such columns, or no reviews.
    """
    self._config = config
    self._path = raw.existing(config.path, config)
    if not self._path.is_file():
      raw.expected(config, found="a folder")
    self._column, names = self._CLASSES[config.review_label]
    self._labels = {value: label for label, value in enumerate(names)}
    self.class_names = tuple(names.values())
    self._needed = ("Title", "Review Text", self._column)
    rows = self._rows
    if not rows:
      raw.expected(config, reviews=0)
    self._split = raw.split_of(
      [_row_name(number) for number, _ in rows], config, what="reviews"
    )

  def __getstate__(self):
    # The rows are read again where they are needed.
    return {k: v for k, v in self.__dict__.items() if k != "_rows"}

  @functools.cached_property
  def _rows(self) -> list[tuple[int, dict[str, str] | str]]:
    """(number of the row, its needed cells or what is wrong with it)."""
    content = archives.read_plain_or_gzip(self._path)
    kept: list[tuple[int, dict[str, str] | str]] = []
    without_text = 0
    rows = _csv_rows(content, self._path)
    header = [name.removeprefix("\ufeff") for name in rows[0]] if rows else []
    missing = [name for name in self._needed if name not in header]
    if missing:
      checks.fail(
        f"the columns {list(self._needed)} in {self._path}",
        missing=missing,
        columns=header,
      )
    places = {name: header.index(name) for name in self._needed}
    for number, row in enumerate(rows[1:], 1):
      if len(row) != len(header):
        kept.append((number, f"has {len(row)} cells of {len(header)}."))
      elif not row[places["Review Text"]].strip():
        without_text += 1
      else:
        kept.append((number, {name: row[at] for name, at in places.items()}))
    self.left_out = {"rows without a review": without_text}
    return kept

  def num_records(self, split: str) -> int:
    """See `RawDataset`."""
    return len(self._split[raw.checked_split(split)])

  def record(self, split: str, index: int) -> sources.Record:
    """See `RawDataset`."""
    number, cells = self._rows[self._split[split][index]]
    name = _row_name(number)
    if isinstance(cells, str):
      raise sources.BadRecordError(name, cells)
    label = self._labels.get(cells[self._column].strip())
    if label is None:
      raise sources.BadRecordError(
        name,
        f"{self._column!r} is {cells[self._column]!r}, none of"
        f" {list(self._labels)}.",
      )
    parts = [cells["Title"].strip(), cells["Review Text"].strip()]
    return sources.Record(
      id=name, text="\n".join(part for part in parts if part), label=label
    )

  def inputs(self) -> Mapping[str, Any]:
    """The table."""
    return {self._path.name: self._path}


def _row_name(number: int) -> str:
  """The id of a row, counted from 1 after the header."""
  return f"row-{number:06d}"


def _csv_rows(content: bytes, path: pathlib.Path) -> list[list[str]]:
  """The rows of a CSV; bytes that are no UTF-8 become lone surrogates.

  Those are refused later, with the name of their row.
  """
  # A cell may be longer than the module's limit of 128 KiB, which is global.
  before = csv.field_size_limit(archives.MAX_BYTES - 1)
  try:
    text = io.StringIO(content.decode(errors="surrogateescape"), newline="")
    # A list: the limit must hold until the last row.
    return list(csv.reader(text, strict=True))
  except csv.Error as error:
    return checks.fail(
      "a CSV with balanced quotes", f"{error}.", path=str(path)
    )
  finally:
    csv.field_size_limit(before)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Question:
  """One question of SQuAD: where it stands."""

  article: int
  paragraph: int
  place: int


class Squad(raw.RawDataset):
  """SQuAD: a question about a passage, answered in its words.

  The text of a record is the question, then the passage, since what is too
  long is cut at its end. The answer is the first of those that are given; a
  question without one (SQuAD 2.0) is left out. The article is the record's
  user, and no article, so no passage, is in both splits.

  Source: Rajpurkar et al. 2016, https://arxiv.org/abs/1606.05250.
  """

  name = "squad"
  has_text = True
  origin = "SQuAD (https://rajpurkar.github.io/SQuAD-explorer)."
  licence = "CC BY-SA 4.0."
  _OFFICIAL = (
    ("train", re.compile(r"train-.*\.json(\.gz)?")),
    ("test", re.compile(r"dev-.*\.json(\.gz)?")),
  )

  def __init__(self, config: config_lib.DataConfig):
    """Reads the questions.

    Raises:
      ValueError: a file is missing, is no SQuAD file, an article is in the
        train file and in the dev file, or a split is empty.
    """
    self._config = config
    path = raw.existing(config.path, config)
    self._paths = self._find(path)
    questions = self._questions
    titles = [self._articles[q.article]["title"] for q in questions]
    if len(self._paths) == 1:
      self._split = raw.split_of(titles, config, what="articles")
      return
    self._split = {s: [] for s in sources.SPLITS}
    of_article: dict[str, str] = {}
    for position, (question, title) in enumerate(
      zip(questions, titles, strict=True)
    ):
      split = "train" if question.article < self._num_train else "test"
      if of_article.setdefault(title, split) != split:
        checks.fail("each article in one file alone", article=title)
      self._split[split].append(position)

  def __getstate__(self):
    dropped = ("_articles", "_questions")
    return {k: v for k, v in self.__dict__.items() if k not in dropped}

  def _find(self, path: pathlib.Path) -> list[pathlib.Path]:
    """One file that is split, or the train file and the dev file."""
    if path.is_file():
      return [path]
    found = sorted(path.iterdir())
    of_split = {
      split: [p for p in found if pattern.fullmatch(p.name)]
      for split, pattern in self._OFFICIAL
    }
    if all(len(paths) == 1 for paths in of_split.values()):
      return [*of_split["train"], *of_split["test"]]
    whole = [p for p in found if re.fullmatch(r".*\.json(\.gz)?", p.name)]
    if len(whole) == 1:
      return whole
    return raw.expected(self._config, found=[p.name for p in found[:8]])

  @functools.cached_property
  def _articles(self) -> list[Any]:
    """All articles, those of the train file first."""
    articles: list[Any] = []
    for path in self._paths:
      self._num_train = len(articles)
      content = archives.read_plain_or_gzip(path)
      try:
        found = json.loads(content)["data"]
        for article in found:
          if not isinstance(article["title"], str):
            raise TypeError(f"the title {article['title']!r}")
          _ = article["paragraphs"]  # Or KeyError.
      except (ValueError, KeyError, TypeError, RecursionError) as error:
        raw.expected(
          self._config,
          file=str(path),
          error=f"{type(error).__name__}: {error}",
        )
      articles += found
    return articles

  @functools.cached_property
  def _questions(self) -> list[_Question]:
    """Every question that has an answer, in the order of the file."""
    questions = []
    without_answer = 0
    try:
      for article, content in enumerate(self._articles):
        for paragraph, passage in enumerate(content["paragraphs"]):
          for place, question in enumerate(passage["qas"]):
            if question["answers"]:
              questions.append(
                _Question(article=article, paragraph=paragraph, place=place)
              )
            else:
              without_answer += 1
    except (KeyError, TypeError) as error:
      raw.expected(self._config, error=f"{type(error).__name__}: {error}")
    if without_answer:
      self.left_out = {"questions without an answer": without_answer}
    return questions

  def num_records(self, split: str) -> int:
    """See `RawDataset`."""
    return len(self._split[raw.checked_split(split)])

  def record(self, split: str, index: int) -> sources.Record:
    """See `RawDataset`."""
    at = self._questions[self._split[split][index]]
    article = self._articles[at.article]
    passage = article["paragraphs"][at.paragraph]
    question = passage["qas"][at.place]
    name = question.get("id") or f"{article['title']}-{at}"
    try:
      return sources.Record(
        id=name,
        text=f"{question['question'].strip()}\n{passage['context'].strip()}",
        answer=question["answers"][0]["text"].strip(),
        user=article["title"],
      )
    except (KeyError, TypeError, AttributeError) as error:
      raise sources.BadRecordError(
        name, f"a field is missing or no text ({error!r})."
      ) from error

  def inputs(self) -> Mapping[str, Any]:
    """The files."""
    return {path.name: path for path in self._paths}


class TextFile(raw.RawDataset):
  """One long text, cut into disjoint windows: the privacy unit.

  Window i begins at byte i * `window_bytes`, or up to 3 bytes before where that
  would cut a character, and ends where the next one begins. So it does not
  depend on what is in the windows before it. The test split is the last part of
  the text, and the last window may be shorter.

  What the guarantee says is of windows. Whoever wrote several of them is
  protected for each, not for all of them together.
  """

  has_text = True

  def __init__(self, config: config_lib.DataConfig):
    """Looks at the length of the file.

    Raises:
      ValueError: there is no file, or it has fewer than two windows.
    """
    self._path = raw.existing(config.path, config)
    if not self._path.is_file():
      raw.expected(config, found="a folder")
    self.name = self._path.name
    self.origin = f"The text {self._path.resolve()}."
    self._window = config.window_bytes
    self._size = self._path.stat().st_size
    count = -(-self._size // self._window)
    if count < 2:
      checks.fail(
        "a text of at least two windows",
        "Lower data.window_bytes, or take a longer text.",
        num_bytes=self._size,
        window_bytes=self._window,
      )
    num_test = min(max(1, round(count * config.test_fraction)), count - 1)
    self._counts = {"train": count - num_test, "test": num_test}

  def num_records(self, split: str) -> int:
    """See `RawDataset`."""
    return self._counts[raw.checked_split(split)]

  def record(self, split: str, index: int) -> sources.Record:
    """See `RawDataset`."""
    if split == "test":
      index += self._counts["train"]
    name = f"byte-{index * self._window:010d}"
    try:
      with self._path.open("rb") as file:
        start = self._boundary(file, index)
        end = self._boundary(file, index + 1)
        file.seek(start)
        content = file.read(end - start)
    except OSError as error:
      raise sources.BadRecordError(
        name, f"the file cannot be read ({error})."
      ) from error
    try:
      return sources.Record(id=name, text=content.decode())
    except UnicodeDecodeError as error:
      raise sources.BadRecordError(
        name, f"bytes {start} to {end} are not UTF-8 ({error.reason})."
      ) from error

  def _boundary(self, file: io.BufferedReader, index: int) -> int:
    """Where window `index` begins."""
    nominal = min(index * self._window, self._size)
    reach = min(3, nominal)
    if nominal == self._size or not reach:
      return nominal
    file.seek(nominal - reach)
    near = file.read(reach + 1)
    # 0b10xxxxxx continues a character. Four of them are no UTF-8 in any case.
    for back in range(reach + 1):
      if near[reach - back] & 0xC0 != 0x80:
        return nominal - back
    return nominal

  def inputs(self) -> Mapping[str, Any]:
    """The file."""
    return {self._path.name: self._path}
