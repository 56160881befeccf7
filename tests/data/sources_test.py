"""Tests of ppnet.data.sources."""

import dataclasses
import pickle

import msgpack
import pytest
from array_record.python import array_record_module

from ppnet.data import sources
from tests.data import conftest


def _write_array_record(path, contents):
  writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
  for content in contents:
    writer.write(content)
  writer.close()


def _record(i: int) -> sources.Record:
  return sources.Record(
    id=f"r{i}",
    media={"image": (bytes([i]), b"second")},
    text="Which?",
    answer="This.",
    label=i,
    user="eve",
  )


def test_array_records_round_trip_over_two_files(tmp_path):
  paths = [tmp_path / "b", tmp_path / "a"]
  _write_array_record(
    paths[0], [sources.encode_record(_record(i)) for i in range(3)]
  )
  _write_array_record(paths[1], [sources.encode_record(_record(3))])
  source = sources.ArrayRecordSource(paths)
  assert [source[i] for i in range(len(source))] == [
    _record(i) for i in range(4)
  ]
  assert "b, a" in source.description


@pytest.mark.parametrize(
  "content",
  [b"", b"\xc1", b"text", msgpack.packb({"id": "r0"}), msgpack.packb([1])],
)
def test_damaged_record_names_its_position(tmp_path, content):
  _write_array_record(
    tmp_path / "a", [sources.encode_record(_record(0)), content]
  )
  source = sources.ArrayRecordSource([tmp_path / "a"])
  assert source[0] == _record(0)
  with pytest.raises(sources.BadRecordError, match="position 1.*damaged"):
    source[1]


def test_flipped_bits_in_a_file_are_a_bad_record(tmp_path):
  path = tmp_path / "a"
  _write_array_record(
    path,
    [
      sources.encode_record(
        dataclasses.replace(
          _record(i), media={"image": (bytes(range(256)) * 4,)}
        )
      )
      for i in range(2)
    ],
  )
  content = bytearray(path.read_bytes())
  at = content.index(bytes(range(100, 140)))
  content[at : at + 8] = b"\0" * 8
  path.write_bytes(content)
  source = sources.ArrayRecordSource([path])
  with pytest.raises(sources.BadRecordError, match="position 0"):
    source[0]
  assert source[1].id == "r1"


def test_missing_array_record_is_named(tmp_path):
  with pytest.raises(ValueError, match=r"gone.*Run the PREPARE job") as info:
    sources.ArrayRecordSource([tmp_path / "gone"])
  assert not isinstance(info.value, sources.BadRecordError)
  with pytest.raises(ValueError, match="at least one"):
    sources.ArrayRecordSource([])


def test_bad_record_error_survives_pickling():
  error = sources.BadRecordError("r7", "it is torn.")
  copy = pickle.loads(pickle.dumps(error))
  assert str(copy) == str(error)
  assert "'r7'" in str(copy)
  assert "it is torn." in str(copy)
  assert copy.record_id == "r7"


def test_folder_is_sorted_and_ignores_hidden_names(tmp_path):
  conftest.write_folder(
    tmp_path,
    {
      "train": {"dog": 1, "cat": 2, "Ape": 1},
      "test": {n: 1 for n in ["cat", "dog", "Ape"]},
    },
  )
  (tmp_path / "train" / ".git").mkdir()
  (tmp_path / "train" / "notes.txt").write_text("not a class")
  (tmp_path / "train" / "cat" / ".DS_Store").write_text("hidden")
  (tmp_path / "train" / "cat" / "more").mkdir()
  source = sources.ImageFolderSource(tmp_path, split="train")
  assert source.class_names == ("Ape", "cat", "dog")
  found = [source[i] for i in range(len(source))]
  assert [(record.id, record.label) for record in found] == [
    ("train/Ape/0.png", 0),
    ("train/cat/0.png", 1),
    ("train/cat/1.png", 1),
    ("train/dog/0.png", 2),
  ]
  for record in found:
    assert record.media["image"] == ((tmp_path / record.id).read_bytes(),)


def _break_folder(path, fault):
  """Breaks a good folder in one way; returns what the error must say."""
  if fault == "missing":
    return path / "nowhere", r"existing folder.*nowhere.*config\.data\.path"
  if fault == "no test":
    (path / "test").rename(path / "validation")
    return path, "missing='.*/test'.*Put test pictures"
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
@pytest.mark.parametrize("split", sources.SPLITS)
def test_folder_fault_is_named_with_its_remedy(tmp_path, fault, split):
  both = {"cat": 1, "dog": 2}
  conftest.write_folder(tmp_path, {"train": both, "test": both})
  path, message = _break_folder(tmp_path, fault)
  with pytest.raises(ValueError, match=message):
    sources.ImageFolderSource(path, split=split)


def test_vanished_file_is_a_bad_record(tmp_path):
  conftest.write_folder(tmp_path, {"train": {"cat": 1}, "test": {"cat": 1}})
  source = sources.ImageFolderSource(tmp_path, split="test")
  (tmp_path / "test" / "cat" / "0.png").unlink()
  with pytest.raises(sources.BadRecordError, match="test/cat/0.png"):
    source[0]


def test_unknown_split_is_refused(tmp_path):
  with pytest.raises(ValueError, match="split='validation'"):
    sources.ImageFolderSource(tmp_path, split="validation")
