"""Tests of ppnet.data.raw_pairs: captioned photographs, paired digits."""

import collections
import json
import pickle

import numpy as np
import pytest

from ppnet import config as config_lib
from ppnet.data import catalogue, sources
from tests.data import raw_tools

_COCO = config_lib.Source.COCO_CAPTIONS
_DIGITS = config_lib.Source.SPOKEN_WRITTEN_DIGITS


def open_raw(source, path, **fields):
  return catalogue.open_raw(raw_tools.config(source, path, **fields))


def write_lines(path, count=40, write=raw_tools.zip_of, **changed):
  rows = [
    {"file_name": f"{i:03d}.jpg", "captions": [f"first  {i}", f"second {i}"]}
    for i in range(count)
  ]
  files = {f"images/{i:03d}.jpg": raw_tools.png(i) for i in range(count)}
  return write(
    path, files | {"captions.jsonl": raw_tools.json_lines(rows)} | changed
  )


@pytest.mark.parametrize("write", [raw_tools.zip_of, raw_tools.folder_of])
def test_photograph_is_one_record_with_its_first_caption(tmp_path, write):
  path = write_lines(tmp_path / "set.zip", write=write)
  if path.is_dir():
    path = path.rename(tmp_path / "set")
  raw = pickle.loads(pickle.dumps(open_raw(_COCO, path)))
  ids = raw_tools.ids(raw)
  assert sorted(sum(ids.values(), [])) == [f"{i:03d}.jpg#0" for i in range(40)]
  for record in raw_tools.all_records(raw):
    number = int(record.user.removesuffix(".jpg"))
    assert record.answer == f"first {number}"
    assert record.media["image"] == (raw_tools.png(number),)
    assert record.text == ""


def test_photograph_with_several_captions_is_a_user(tmp_path):
  path = write_lines(tmp_path / "set.zip")
  raw = open_raw(_COCO, path, captions_per_image=2)
  users = {
    s: collections.Counter(r.user for r in raw_tools.all_records(raw, s))
    for s in sources.SPLITS
  }
  assert not users["train"].keys() & users["test"].keys()
  assert set((users["train"] | users["test"]).values()) == {2}
  config = config_lib.ExperimentConfig()
  config.data = raw_tools.config(_COCO, path, captions_per_image=2)
  config.model.decoder.vocab_size = 400
  with pytest.raises(ValueError, match="would not protect the photograph"):
    config_lib.validate(config)
  config.privacy.unit = config_lib.PrivacyUnit.USER
  config_lib.validate(config)


@pytest.mark.parametrize("packed", [False, True])
def test_coco_s_own_form_keeps_its_own_split(tmp_path, packed):
  for year, first in (("train2017", 0), ("val2017", 50)):
    images = {
      f"{n:012d}.jpg": raw_tools.png(n) for n in range(first, first + 3)
    }
    if packed:
      raw_tools.zip_of(
        tmp_path / f"{year}.zip",
        {f"{year}/{name}": content for name, content in images.items()},
      )
    else:
      raw_tools.folder_of(tmp_path / year, images)
    content = {
      "images": [{"id": int(n[:-4]), "file_name": n} for n in images],
      "annotations": [
        {"id": 1000 - k, "image_id": int(n[:-4]), "caption": f"{k} of {n}"}
        for k, n in enumerate([*images, *images])
      ],
    }
    raw_tools.folder_of(
      tmp_path / "annotations",
      {f"captions_{year}.json": json.dumps(content).encode()},
    )
  raw = open_raw(_COCO, tmp_path)
  assert {s: len(n) for s, n in raw_tools.ids(raw).items()} == {
    "train": 3,
    "test": 3,
  }
  # The caption with the smallest number, not the first in the file.
  assert raw.record("test", 1).answer == "4 of 000000000051.jpg"
  assert raw.record("test", 1).media["image"] == (raw_tools.png(51),)
  assert set(raw.inputs()) >= {"captions_train2017.json"}
  (tmp_path / "annotations" / "captions_val2017.json").unlink()
  with pytest.raises(ValueError, match="missing=.*captions_val2017.json"):
    open_raw(_COCO, tmp_path)


@pytest.mark.parametrize(
  ("lines", "message"),
  [
    (b"{}\n", "line='1 of captions.jsonl'"),
    (b'\n{"file_name": "1.jpg", "captions": []}\n{', "line='3 of"),
    (b'{"file_name": "7.jpg", "captions": ["a"]}\n', r"missing=\['7.jpg'\]"),
    (b'{"file_name": ["1.jpg"], "captions": ["a"]}\n', "the file name"),
    (b'{"file_name": "001.jpg", "captions": "all"}\n', "no list"),
    (
      b'{"file_name": "001.jpg", "captions": ["a"]}\n' * 2,
      "each photograph once",
    ),
  ],
)
def test_spoilt_captions_are_named(tmp_path, lines, message):
  path = write_lines(tmp_path / "set.zip", **{"captions.jsonl": lines})
  with pytest.raises(ValueError, match=message):
    open_raw(_COCO, path)


def test_caption_that_is_no_text_is_a_bad_record(tmp_path):
  rows = [{"file_name": f"{i:03d}.jpg", "captions": [i]} for i in range(40)]
  lines = raw_tools.json_lines(rows)
  path = write_lines(tmp_path / "set.zip", **{"captions.jsonl": lines})
  with pytest.raises(sources.BadRecordError, match="its caption is"):
    open_raw(_COCO, path).record("train", 0)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
  """A folder of small digits."""
  path = tmp_path_factory.mktemp("digits")
  raw_tools.write_idx(path / "mnist", train=900, test=300)
  raw_tools.folder_of(path / "fsdd", raw_tools.recordings(numbers=range(21)))
  return path


def check_pairs(raw):
  """What must hold of every pair; returns (split, question, answer, spoken)."""
  used, found = [], []
  for split in sources.SPLITS:
    for record in raw_tools.all_records(raw, split):
      picture, spoken = record.id.split("+")
      assert picture.startswith(f"{split}-")
      used += [picture, spoken]
      written = int(raw._images.labels(split)[int(picture.split("-")[1])])
      said = int(spoken.split("_")[0])
      answer = raw.class_names[record.label]
      expected = {
        "Which digit is written and spoken?": str(said),
        "What is the sum of the written and the spoken digit?": str(
          written + said
        ),
        "Are the written and the spoken digit the same?": (
          "yes" if written == said else "no"
        ),
        "Which is larger, the written or the spoken digit?": (
          "written" if written > said else "spoken"
        ),
      }
      assert answer == expected[record.text], record.id
      if "Which" in record.text:
        assert (written == said) == ("larger" not in record.text)
      assert record.user == spoken.split("_")[1]
      found.append((split, record.text, answer, said))
  # Disjoint: no picture and no recording is in two records.
  assert len(used) == len(set(used))
  return found


def test_pairs_are_true_disjoint_and_balanced(digits):
  raw = open_raw(_DIGITS, digits)
  found = check_pairs(raw)
  train = [row for row in found if row[0] == "train"]
  assert (len(train), len(found) - len(train)) == (320, 100)
  questions = collections.Counter(question for _, question, _, _ in train)
  assert set(questions.values()) == {80}
  # Of each question for each spoken digit: 32 / 4.
  assert set(
    collections.Counter((row[1], row[3]) for row in train).values()
  ) == {8}
  answers = collections.Counter(row[2] for row in train)
  assert answers["yes"] == answers["no"] == 40
  assert abs(answers["written"] - answers["spoken"]) <= 16
  assert not raw.left_out


def test_pairs_depend_on_the_seed_alone(digits):
  first = raw_tools.ids(open_raw(_DIGITS, digits))
  assert raw_tools.ids(open_raw(_DIGITS, digits)) == first
  copy = pickle.loads(pickle.dumps(open_raw(_DIGITS, digits)))
  assert raw_tools.ids(copy) == first
  assert raw_tools.ids(open_raw(_DIGITS, digits, split_seed=1)) != first


def test_pairs_hold_speakers_out(digits):
  raw = open_raw(_DIGITS, digits, held_out_users=("bob",))
  check_pairs(raw)
  users = {
    s: {r.user for r in raw_tools.all_records(raw, s)} for s in sources.SPLITS
  }
  assert users == {"train": {"ann"}, "test": {"bob"}}


def test_pairs_end_where_pictures_do(digits, tmp_path):
  raw_tools.write_idx(tmp_path / "mnist", train=100, test=300)
  (tmp_path / "fsdd").symlink_to(digits / "fsdd")
  raw = open_raw(_DIGITS, tmp_path)
  check_pairs(raw)
  assert raw.num_records("train") <= 100
  assert list(raw.left_out.values()) == [320 - raw.num_records("train")]


def test_pairs_need_both_folders(digits, tmp_path):
  with pytest.raises(ValueError, match="holds mnist/.*missing='.*/mnist'"):
    open_raw(_DIGITS, tmp_path)
  (tmp_path / "mnist").symlink_to(digits / "mnist")
  with pytest.raises(ValueError, match="missing='.*/fsdd'"):
    open_raw(_DIGITS, tmp_path)


def test_picture_of_a_pair_is_that_of_its_id(digits):
  raw = open_raw(_DIGITS, digits)
  record = raw.record("test", 5)
  number = int(record.id.split("+")[0].split("-")[1])
  pixels = np.frombuffer(record.media["image"][0][-20:], np.uint8)
  np.testing.assert_array_equal(
    pixels, raw._images._pictures["test"][number].ravel()
  )
