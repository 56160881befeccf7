"""Tests of ppnet.data.sources."""

import dataclasses
import pickle

import msgpack
import pytest
from array_record.python import array_record_module

from ppnet.data import sources


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
