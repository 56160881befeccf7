"""Tests of ppnet.data.raw_media: folders of classes, IDX and FSDD."""

import dataclasses
import io
import pickle

import numpy as np
import pytest
from PIL import Image

from ppnet import config as config_lib
from ppnet.data import catalogue, raw, sources
from tests.data import conftest, raw_tools

_FOLDER = config_lib.Source.IMAGE_FOLDER
_IDX = config_lib.Source.IDX
_FSDD = config_lib.Source.FSDD


def open_raw(source, path, **fields):
  return catalogue.open_raw(raw_tools.config(source, path, **fields))


def test_folder_is_sorted_and_ignores_hidden_names(tmp_path):
  conftest.write_folder(
    tmp_path,
    {
      "train": {"dog": 1, "cat": 2, "Ape": 1},
      "test": {n: 1 for n in ["cat", "dog", "Ape"]},
      "validation": {"cat": 2},
    },
  )
  (tmp_path / "train" / ".git").mkdir()
  (tmp_path / "train" / "notes.txt").write_text("not a class")
  (tmp_path / "train" / "cat" / ".DS_Store").write_text("hidden")
  raw_tools.folder_of(tmp_path / "train" / "cat", {"more/x.png": b"?"})
  found = open_raw(_FOLDER, tmp_path)
  assert found.class_names == ("Ape", "cat", "dog")
  assert found.in_place
  assert list(found.left_out.values()) == [2]
  records = raw_tools.all_records(found)
  assert [(record.id, record.label) for record in records] == [
    ("train/Ape/0.png", 0),
    ("train/cat/0.png", 1),
    ("train/cat/1.png", 1),
    ("train/dog/0.png", 2),
  ]
  for record in records:
    assert record.media["image"] == ((tmp_path / record.id).read_bytes(),)


@pytest.mark.parametrize("around", ["", "pets/"])
def test_zip_of_a_folder_gives_the_same_records(tmp_path, around):
  both = {"cat": 2, "dog": 1}
  conftest.write_folder(tmp_path / "pets", {"train": both, "test": both})
  names = sorted(p for p in (tmp_path / "pets").rglob("*") if p.is_file())
  path = raw_tools.zip_of(
    tmp_path / "pets.zip",
    {
      around + str(p.relative_to(tmp_path / "pets")): p.read_bytes()
      for p in names
    },
  )
  inside, outside = (
    open_raw(_FOLDER, path),
    open_raw(_FOLDER, tmp_path / "pets"),
  )
  assert not inside.in_place
  for split in sources.SPLITS:
    assert raw_tools.all_records(inside, split) == raw_tools.all_records(
      outside, split
    )
  assert pickle.loads(pickle.dumps(inside)).record("test", 1).label == 0


def _break_folder(path, fault):
  """Breaks a good folder in one way; returns what the error must say."""
  if fault == "missing":
    return path / "nowhere", r"config\.data\.path to be a folder.*nowhere"
  if fault == "no test":
    (path / "test").rename(path / "validation")
    return path, "missing='.*/test'.*|Put test files"
  if fault == "no train":
    (path / "train").rename(path / "validation")
    return path, "missing='.*/train'"
  if fault == "no class":
    for folder in (path / "train").iterdir():
      folder.rename(folder.with_name("." + folder.name))
    return path, "at least one class folder in .*/train"
  if fault == "empty class":
    for file in (path / "test" / "cat").iterdir():
      file.rename(file.with_name("." + file.name))
    return path, "at least one file in every class.*empty='.*/test/cat'"
  (path / "test" / "cat").rename(path / "test" / "fox")
  return path, r"same classes.*only_in_train=\['cat'\].*only_in_test=\['fox'\]"


@pytest.mark.parametrize(
  "fault",
  ["missing", "no test", "no train", "no class", "empty class", "differ"],
)
def test_folder_fault_is_named_with_its_remedy(tmp_path, fault):
  both = {"cat": 1, "dog": 2}
  conftest.write_folder(tmp_path, {"train": both, "test": both})
  path, message = _break_folder(tmp_path, fault)
  with pytest.raises(ValueError, match=message):
    open_raw(_FOLDER, path)


def test_vanished_file_is_a_bad_record(tmp_path):
  conftest.write_folder(tmp_path, {"train": {"cat": 1}, "test": {"cat": 1}})
  found = open_raw(_FOLDER, tmp_path)
  (tmp_path / "test" / "cat" / "0.png").unlink()
  with pytest.raises(sources.BadRecordError, match="test/cat/0.png"):
    found.record("test", 0)


def test_unknown_split_is_refused(tmp_path):
  conftest.write_folder(tmp_path, {"train": {"cat": 1}, "test": {"cat": 1}})
  with pytest.raises(ValueError, match="split='validation'"):
    open_raw(_FOLDER, tmp_path).num_records("validation")


def test_speech_commands_are_split_by_their_lists(tmp_path):
  names = [
    f"{word}/{who}_nohash_{n}.wav"
    for word in ("no", "yes")
    for who in "abc"
    for n in range(2)
  ]
  raw_tools.folder_of(
    tmp_path,
    {name: raw_tools.wav(3) for name in names}
    | {
      "testing_list.txt": b"no/b_nohash_0.wav\nyes/b_nohash_1.wav\n",
      "validation_list.txt": b"no/c_nohash_0.wav\n",
      "_background_noise_/pink.wav": b"?",
      "README.md": b"?",
    },
  )
  config = raw_tools.config(
    config_lib.Source.AUDIO_FOLDER,
    tmp_path,
    user_pattern="[^/]*/([^_]*)_nohash_.*",
  )
  found = catalogue.open_raw(config)
  assert found.class_names == ("no", "yes")
  assert found.media == {"audio": (1, 1)}
  ids = raw_tools.ids(found)
  assert ids["test"] == ["no/b_nohash_0.wav", "yes/b_nohash_1.wav"]
  assert len(ids["train"]) == 9
  assert found.record("train", 0).user == "a"
  (tmp_path / "no" / "b_nohash_0.wav").unlink()
  with pytest.raises(ValueError, match=r"listed_and_missing=\['no/b_nohash"):
    catalogue.open_raw(config)


@pytest.mark.parametrize("compress", [False, True])
def test_idx_pictures_are_exact_and_nearly_free_to_decode(tmp_path, compress):
  written = raw_tools.write_idx(tmp_path, train=23, test=11, compress=compress)
  found = open_raw(_IDX, tmp_path)
  assert found.class_names == tuple("0123456789")
  found = pickle.loads(pickle.dumps(found))
  for split, (pictures, labels) in written.items():
    assert found.num_records(split) == len(labels)
    for position, record in enumerate(raw_tools.all_records(found, split)):
      (content,) = record.media["image"]
      assert content.startswith(b"P5 5 4 255\n")
      with Image.open(io.BytesIO(content)) as picture:
        np.testing.assert_array_equal(np.asarray(picture), pictures[position])
      assert record.label == labels[position]
  assert len(set(sum(raw_tools.ids(found).values(), []))) == 34


def test_idx_classes_are_called_as_the_config_says(tmp_path):
  raw_tools.write_idx(tmp_path, train=23, test=11)
  names = tuple("abcdefghij")
  assert open_raw(_IDX, tmp_path, class_names=names).class_names == names
  with pytest.raises(ValueError, match="data.class_names for all labels, 0 to"):
    open_raw(_IDX, tmp_path, class_names=("a", "b"))


@pytest.mark.parametrize(
  ("name", "spoil", "message"),
  [
    (
      "train-labels-idx1-ubyte",
      lambda c: b"\0\0\x0d\1" + c[4:],
      "magic 000008",
    ),
    ("train-labels-idx1-ubyte", lambda c: c[:-1], r"31 bytes in an IDX.*=30"),
    ("train-labels-idx1-ubyte", lambda c: c[:6], "bytes in an IDX"),
    ("t10k-labels-idx1-ubyte", lambda c: b"", "magic=''"),
    ("t10k-labels-idx1-ubyte", lambda c: c[:4] + bytes(4), "something in it"),
    ("train-images-idx3-ubyte", lambda c: c[:-3], "cut short"),
    ("train-images-idx3-ubyte", lambda c: c + b"x", "something follows"),
    (
      "train-images-idx3-ubyte",
      lambda c: raw_tools.idx(np.zeros((3, 4, 5), np.uint8)),
      "as many pictures as labels",
    ),
    ("t10k-images-idx3-ubyte", None, "missing=.*t10k-images"),
  ],
)
def test_spoilt_idx_file_is_named(tmp_path, name, spoil, message):
  raw_tools.write_idx(tmp_path, train=23, test=11)
  path = tmp_path / name
  if spoil is None:
    path.unlink()
  else:
    path.write_bytes(spoil(path.read_bytes()))
  with pytest.raises(ValueError, match=message):
    open_raw(_IDX, tmp_path).record("train", 0)


@pytest.mark.parametrize("form", ["zip", "folder", "folder of a zip"])
def test_fsdd_has_its_official_split_and_its_speakers(tmp_path, form):
  files = raw_tools.recordings()
  if form == "folder":
    path = raw_tools.folder_of(tmp_path / "fsdd", files)
  else:
    path = raw_tools.zip_of(tmp_path / "fsdd.zip", files)
  found = open_raw(_FSDD, tmp_path if form == "folder of a zip" else path)
  ids = raw_tools.ids(found)
  assert len(ids["train"]) == 10 * 2 * 3
  assert len(ids["test"]) == 10 * 2 * 5
  assert {name.split("_")[2] for name in ids["test"]} == set("01234")
  for record in raw_tools.all_records(found):
    digit, speaker, number = record.id.split("_")
    assert (str(record.label), record.user) == (digit, speaker)
    assert record.media["audio"] == (files[f"recordings/{record.id}.wav"],)


def test_held_out_speakers_are_heard_in_the_test_split_alone(tmp_path):
  path = raw_tools.zip_of(tmp_path / "fsdd.zip", raw_tools.recordings())
  ids = raw_tools.ids(open_raw(_FSDD, path, held_out_users=("bob",)))
  assert {name.split("_")[1] for name in ids["train"]} == {"ann"}
  assert {name.split("_")[1] for name in ids["test"]} == {"bob"}
  assert (len(ids["train"]), len(ids["test"])) == (80, 80)
  with pytest.raises(ValueError, match=r"among \['ann', 'bob'\].*'eve'"):
    open_raw(_FSDD, path, held_out_users=("eve",))
  with pytest.raises(ValueError, match="no_recording_in='train'"):
    open_raw(_FSDD, path, held_out_users=("ann", "bob"))
  # Fails if: the official number decides for held-out speakers as well.


def test_folder_without_a_recording_is_named(tmp_path):
  raw_tools.folder_of(tmp_path, {"a.wav": b"?", "10_bob_1.wav": b"?"})
  with pytest.raises(ValueError, match=r"<digit>_<speaker>_<number>\.wav"):
    open_raw(_FSDD, tmp_path)


def test_split_by_hash_moves_nobody_else():
  config = config_lib.DataConfig(test_fraction=0.3)
  names = [f"n{i}" for i in range(2000)]
  whole = raw.split_of(names, config, what="names")
  fewer = raw.split_of(names[1:], config, what="names")
  assert [p - 1 for p in whole["test"] if p] == fewer["test"]
  assert abs(len(whole["test"]) / 2000 - 0.3) < 0.03
  other = dataclasses.replace(config, split_seed=1)
  assert raw.split_of(names, other, what="names") != whole
  with pytest.raises(ValueError, match=r"names in both splits.*empty='test'"):
    raw.split_of(
      ["a"] * 9, dataclasses.replace(config, test_fraction=1e-9), what="names"
    )
  # Fails if: the split is a permutation of all positions.
