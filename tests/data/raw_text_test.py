"""Tests of ppnet.data.raw_text: reviews, SQuAD and text files."""

import csv
import gzip
import io
import json
import pickle

import pytest

from ppnet import config as config_lib
from ppnet.data import catalogue, sources
from tests.data import raw_tools

_REVIEWS = config_lib.Source.CLOTHING_REVIEWS
_SQUAD = config_lib.Source.SQUAD
_TEXT = config_lib.Source.TEXT_FILE
_COLUMNS = ["", "Title", "Review Text", "Rating", "Recommended IND"]


def open_raw(source, path, **fields):
  return catalogue.open_raw(raw_tools.config(source, path, **fields))


def write_reviews(path, rows, *, columns=_COLUMNS):
  buffer = io.StringIO(newline="")
  writer = csv.writer(buffer)
  writer.writerow(columns)
  writer.writerows(rows)
  path.write_bytes(buffer.getvalue().encode(errors="surrogateescape"))
  return path


def everything(raw):
  """Records of both splits by id; a bad one is its error."""
  found = {}
  for split in sources.SPLITS:
    for i in range(raw.num_records(split)):
      try:
        record = raw.record(split, i)
        found[record.id] = record
      except sources.BadRecordError as error:
        found[error.record_id] = error
  return found


def test_reviews_keep_quotes_and_line_breaks_and_count_what_has_no_text(
  tmp_path,
):
  odd = 'She said "no",\r\nthen\n\n"yes", é ☃'
  rows = [[i, "", f"text {i}", 1 + i % 5, i % 2] for i in range(30)]
  rows[3] = [3, "A title, with a comma", odd, 4, 1]
  rows[5] = [5, "Title alone", "  ", 4, 1]
  path = write_reviews(tmp_path / "r.csv", rows)
  raw = open_raw(_REVIEWS, path)
  assert raw.left_out == {"rows without a review": 1}
  assert raw.class_names == ("not recommended", "recommended")
  found = everything(raw)
  assert sorted(found) == [f"row-{i:06d}" for i in range(1, 31) if i != 6]
  assert found["row-000004"].text == f"A title, with a comma\n{odd}"
  assert found["row-000004"].label == 1
  assert found["row-000001"].text == "text 0"
  packed = tmp_path / "r.csv.gz"
  packed.write_bytes(gzip.compress(path.read_bytes()))
  raw = open_raw(_REVIEWS, packed, review_label=config_lib.ReviewLabel.RATING)
  assert raw.class_names == tuple(f"{n} of 5" for n in range(1, 6))
  assert everything(raw)["row-000004"].label == 3
  raw = pickle.loads(pickle.dumps(raw))
  assert everything(raw)["row-000004"].text.endswith("☃")


def test_bad_rows_of_reviews_are_named_and_the_others_stay(tmp_path):
  rows = [[i, "", f"text {i}", 3, 1] for i in range(40)]
  rows[2] = [2, "", "text", 3, "maybe"]
  rows[4] = [4, "", "text", 3]
  rows[6] = [6, "", "bytes \udcff that are no UTF-8", 3, 1]
  rows[8] = [8, "", "x" * 10_000_000, 3, 1]
  found = everything(open_raw(_REVIEWS, write_reviews(tmp_path / "r", rows)))
  assert len(found) == 40
  bad = {n: e for n, e in found.items() if isinstance(e, Exception)}
  assert "'maybe', none of ['0', '1']" in bad.pop("row-000003").cause
  assert "has 4 cells of 5" in bad.pop("row-000005").cause
  assert not bad  # PREPARE refuses the bytes; see shards_test.py.
  assert len(found["row-000009"].text) == 10_000_000
  assert csv.field_size_limit() == 131072  # The module's own, as it was.


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"", r"missing=\['Title', 'Review Text', 'Recommended IND'\]"),
    (b"Title,Review Text\na,b\n", r"missing=\['Recommended IND'\]"),
    (b'Title,Review Text,Recommended IND\n"a,b,1\n', "balanced quotes"),
    (b"Title,Review Text,Recommended IND\na, ,1\n", "reviews=0"),
  ],
)
def test_table_without_reviews_is_refused(tmp_path, content, message):
  (tmp_path / "r.csv").write_bytes(content)
  with pytest.raises(ValueError, match=message):
    open_raw(_REVIEWS, tmp_path / "r.csv")


def test_squad_splits_by_article_and_asks_before_the_passage(tmp_path):
  titles = [f"Article {i}" for i in range(30)]
  content = raw_tools.squad(titles)
  content["data"][0]["paragraphs"][0]["qas"][0]["answers"] = []
  path = tmp_path / "questions.json"
  path.write_text(json.dumps(content))
  raw = pickle.loads(pickle.dumps(open_raw(_SQUAD, path)))
  assert raw.left_out == {"questions without an answer": 1}
  records = {s: raw_tools.all_records(raw, s) for s in sources.SPLITS}
  assert sum(map(len, records.values())) == 30 * 6 - 1
  users = {s: {r.user for r in records[s]} for s in sources.SPLITS}
  assert users["train"] | users["test"] == set(titles)
  assert not users["train"] & users["test"]
  record = next(r for r in records["train"] if r.id.endswith("-2-1"))
  assert record.text == f"What is 1?\nAbout {record.user}, part 2."
  assert record.answer == "part 2"
  # Fails if: questions are split, and not articles.


def test_squad_takes_the_official_files_where_there_are_two(tmp_path):
  train, dev = tmp_path / "train-v1.1.json", tmp_path / "dev-v1.1.json.gz"
  train.write_text(json.dumps(raw_tools.squad(["a", "b"])))
  dev.write_bytes(gzip.compress(json.dumps(raw_tools.squad(["c"])).encode()))
  raw = open_raw(_SQUAD, tmp_path)
  users = {
    s: {r.user for r in raw_tools.all_records(raw, s)} for s in sources.SPLITS
  }
  assert users == {"train": {"a", "b"}, "test": {"c"}}
  dev.write_bytes(gzip.compress(json.dumps(raw_tools.squad(["b"])).encode()))
  with pytest.raises(ValueError, match="in one file alone, got article='b'"):
    open_raw(_SQUAD, tmp_path)


@pytest.mark.parametrize(
  "content",
  [b"", b"{", b"[]", b'{"data": 3}', b'{"data": [{}]}', b"\xff"]
  + [b'{"data": [{"title": [], "paragraphs": []}]}']
  + [b'{"data": [{"title": "a", "paragraphs": [{"qas": [3]}]}]}'],
)
def test_what_is_no_squad_file_is_refused(tmp_path, content):
  path = tmp_path / "dev-v1.1.json"
  path.write_bytes(content)
  with pytest.raises(ValueError, match=r"a SQuAD \.json.*dev-v1\.1\.json"):
    open_raw(_SQUAD, path)


@pytest.mark.parametrize("window", [1, 3, 4, 7, 64])
def test_windows_are_disjoint_and_together_the_text(tmp_path, window):
  text = "a é ☃ 𝄞 " * 40 + "end"
  path = tmp_path / "book.txt"
  path.write_bytes(text.encode())
  raw = open_raw(_TEXT, path, window_bytes=window, test_fraction=0.25)
  records = [r for s in sources.SPLITS for r in raw_tools.all_records(raw, s)]
  assert "".join(r.text for r in records) == text
  assert max(len(r.text.encode()) for r in records) <= window + 3
  assert raw.num_records("test") == round(len(records) * 0.25)
  assert len({r.id for r in records}) == len(records)
  # Fails if: a character is cut, or a window begins where the last one ended
  # and not at a multiple.


def test_window_that_is_no_utf_8_is_a_bad_record(tmp_path):
  path = tmp_path / "book.txt"
  path.write_bytes(b"a" * 20 + b"\xff" + b"b" * 19 + b"\x80" * 20 + b"c" * 20)
  raw = open_raw(_TEXT, path, window_bytes=10)
  found = everything(raw)
  bad = {n: e for n, e in found.items() if isinstance(e, Exception)}
  assert sorted(bad) == [f"byte-{n:010d}" for n in (20, 40, 50)]
  assert "bytes 20 to 30 are not UTF-8" in bad["byte-0000000020"].cause
  assert "".join(r.text for n, r in found.items() if n not in bad) == (
    "a" * 20 + "b" * 9 + "c" * 20  # The last b may begin a character.
  )


def test_text_of_one_window_is_refused(tmp_path):
  (tmp_path / "a.txt").write_bytes(b"ab")
  with pytest.raises(ValueError, match=r"two windows, got num_bytes=2"):
    open_raw(_TEXT, tmp_path / "a.txt")
