"""The real data sets, where they are: counts, labels, disjoint splits."""

import collections
import hashlib
import re

import numpy as np
import pytest

from ppnet import config as config_lib
from ppnet.data import catalogue, sources
from tests.data import raw_pairs_test, raw_tools

pytestmark = raw_tools.needs_shared

_Source = config_lib.Source
_SHARED = raw_tools.SHARED
_REVIEWS = (
  _SHARED / "womens-clothing-reviews/Womens Clothing E-Commerce Reviews.csv.gz"
)


def open_raw(source, path, **fields):
  return catalogue.open_raw(raw_tools.config(source, path, **fields))


def counts(raw):
  return tuple(raw.num_records(split) for split in sources.SPLITS)


@pytest.mark.parametrize(
  ("name", "mean", "std"),
  [("fashion-mnist", 0.2860, 0.3530), ("mnist", 0.1307, 0.3081)],
)
def test_idx_sets_have_their_published_counts_and_statistics(name, mean, std):
  raw = open_raw(_Source.IDX, _SHARED / name)
  assert counts(raw) == (60_000, 10_000)
  assert raw.class_names == tuple("0123456789")
  counted = np.bincount(raw._pictures["train"].ravel(), minlength=256)
  share, level = counted / counted.sum(), np.arange(256) / 255
  measured = share @ level
  np.testing.assert_allclose(measured, mean, atol=1e-4)
  np.testing.assert_allclose(
    np.sqrt(share @ (level - measured) ** 2), std, atol=1e-4
  )
  if name == "fashion-mnist":
    assert set(np.bincount(raw.labels("train"))) == {6000}
    assert set(np.bincount(raw.labels("test"))) == {1000}
  else:
    # The first ten of MNIST, as every introduction shows them.
    assert raw.labels("train")[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert raw.labels("test")[:5].tolist() == [7, 2, 1, 0, 4]


def test_clothing_photographs_are_read_from_their_zip():
  raw = open_raw(
    _Source.IMAGE_FOLDER,
    _SHARED / "clothing-small-96px/clothing-small-96px.zip",
  )
  assert counts(raw) == (3068, 372)
  assert list(raw.left_out.values()) == [341]
  assert sum(counts(raw)) + 341 == 3781
  assert raw.class_names == (
    *("dress", "hat", "longsleeve", "outwear", "pants"),
    *("shirt", "shoes", "shorts", "skirt", "t-shirt"),
  )
  for split in sources.SPLITS:
    for record in raw_tools.all_records(raw, split):
      assert record.id.split("/")[:2] == [split, raw.class_names[record.label]]
      assert record.media["image"][0].startswith(b"\xff\xd8")


def test_fsdd_has_its_official_split():
  raw = open_raw(_Source.FSDD, _SHARED / "fsdd")
  assert counts(raw) == (2700, 300)
  for split, number in (("train", 45), ("test", 5)):
    found = collections.Counter(
      (record.label, record.user)
      for record in raw_tools.all_records(raw, split)
    )
    assert len(found) == 10 * 6
    assert set(found.values()) == {number}
  held = open_raw(_Source.FSDD, _SHARED / "fsdd", held_out_users=("theo",))
  assert counts(held) == (2500, 500)


def test_clothing_reviews_are_those_with_a_text():
  raw = open_raw(_Source.CLOTHING_REVIEWS, _REVIEWS)
  assert sum(counts(raw)) == 22_641
  assert raw.left_out == {"rows without a review": 23_486 - 22_641}
  records = [
    r for split in sources.SPLITS for r in raw_tools.all_records(raw, split)
  ]
  share = np.mean([record.label for record in records])
  assert 0.81 < share < 0.83  # Most reviewers recommend.
  assert len({record.id for record in records}) == 22_641
  assert abs(raw.num_records("test") / 22_641 - 0.2) < 0.01
  first = next(record for record in records if record.id == "row-000001")
  assert first.text == "Absolutely wonderful - silky and sexy and comfortable"


def test_squad_has_no_passage_in_both_splits():
  raw = open_raw(_Source.SQUAD, _SHARED / "squad")
  assert sum(counts(raw)) == 10_570
  passages = {
    split: {r.text.split("\n", 1)[1] for r in raw_tools.all_records(raw, split)}
    for split in sources.SPLITS
  }
  assert not passages["train"] & passages["test"]
  assert len(passages["train"] | passages["test"]) == 2067
  articles = {
    split: {r.user for r in raw_tools.all_records(raw, split)}
    for split in sources.SPLITS
  }
  assert len(articles["train"] | articles["test"]) == 48
  for record in raw_tools.all_records(raw, "test"):
    assert record.answer in record.text


def test_coco_photographs_have_five_captions_of_which_one_is_used():
  path = _SHARED / "coco-captions/coco-cc-images.zip"
  raw = open_raw(_Source.COCO_CAPTIONS, path)
  assert sum(counts(raw)) == 76
  assert (
    sum(counts(open_raw(_Source.COCO_CAPTIONS, path, captions_per_image=5)))
    == 380
  )
  pictures = {
    split: {
      hashlib.sha256(record.media["image"][0]).digest()
      for record in raw_tools.all_records(raw, split)
    }
    for split in sources.SPLITS
  }
  assert len(pictures["train"] | pictures["test"]) == 76
  assert not pictures["train"] & pictures["test"]


def test_spoken_written_digits_use_every_part_once():
  raw = open_raw(_Source.SPOKEN_WRITTEN_DIGITS, _SHARED)
  assert counts(raw) == (2700, 300)
  found = raw_pairs_test.check_pairs(raw)
  train = [row for row in found if row[0] == "train"]
  questions = collections.Counter(row[1] for row in train)
  assert set(questions.values()) == {675}
  answers = collections.Counter(row[2] for row in train)
  assert abs(answers["yes"] - answers["no"]) <= 1
  assert abs(answers["written"] - answers["spoken"]) <= 20
  recordings = raw_tools.ids(open_raw(_Source.FSDD, _SHARED / "fsdd"))
  for split in sources.SPLITS:
    used = {name.split("+")[1] for name in raw_tools.ids(raw)[split]}
    assert used == set(recordings[split])


def test_shakespeare_is_whole_in_windows_of_256_bytes():
  path = _SHARED / "tiny-shakespeare/input.txt"
  raw = open_raw(_Source.TEXT_FILE, path)
  records = [
    r for split in sources.SPLITS for r in raw_tools.all_records(raw, split)
  ]
  assert len(records) == -(-1_115_394 // 256)
  assert {len(record.text) for record in records[:-1]} == {256}
  assert "".join(r.text for r in records).encode() == path.read_bytes()
  assert raw.num_records("test") == round(len(records) * 0.2)


def test_botchan_is_a_text_with_other_characters():
  path = _SHARED / "tokenizers/sentencepiece/botchan.txt"
  raw = open_raw(_Source.TEXT_FILE, path, window_bytes=100)
  records = [
    r for split in sources.SPLITS for r in raw_tools.all_records(raw, split)
  ]
  text = "".join(record.text for record in records)
  assert text.encode() == path.read_bytes()
  assert re.search("[^\x00-\x7f]", text)
