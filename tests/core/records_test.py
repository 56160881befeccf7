"""Records are whole or absent, and say infinity in words."""

import dataclasses
import enum
import os
import pathlib

import numpy as np
import pytest

from ppnet.core import records


class Colour(enum.Enum):
  RED = "red"


@dataclasses.dataclass
class Row:
  a: float
  b: tuple[int, ...]
  c: Colour


def test_to_plain_turns_everything_into_json():
  row = Row(a=float("inf"), b=(1, 2), c=Colour.RED)
  plain = records.to_plain({"row": row, "path": pathlib.Path("x"), 3: None})
  assert plain == {
    "row": {"a": "inf", "b": [1, 2], "c": "RED"},
    "path": "x",
    "3": None,
  }
  assert records.to_plain([np.float32("nan"), -np.inf, np.int64(4)]) == [
    "nan",
    "-inf",
    4,
  ]


def test_write_json_round_trip_and_no_litter(tmp_path):
  records.write_json(tmp_path / "x.json", {"epsilon": float("inf")})
  assert records.read_json(tmp_path / "x.json") == {"epsilon": "inf"}
  assert os.listdir(tmp_path) == ["x.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / "x.json"
  records.write_json(path, {"value": 1})

  def fail(*_):
    raise OSError("disk full")

  for function in ("fsync", "replace"):
    with monkeypatch.context() as patch:
      patch.setattr(os, function, fail)
      with pytest.raises(OSError, match="disk full"):
        records.write_json(path, {"value": 2})
    assert records.read_json(path) == {"value": 1}
    assert os.listdir(tmp_path) == ["x.json"]
  # Fails if: the file is written in place.


def test_read_json_names_a_damaged_file(tmp_path):
  (tmp_path / "x.json").write_text('{"a": ')
  with pytest.raises(ValueError, match=r"x\.json.*damaged"):
    records.read_json(tmp_path / "x.json")


def test_log_survives_a_line_cut_by_a_kill(tmp_path):
  path = tmp_path / "m.jsonl"
  log = records.JsonLinesLog(path)
  log.append({"split": "train", "step": 1})
  log.append({"split": "train", "step": 2, "loss": 5.0})
  log.close()
  with path.open("a") as file:
    file.write('{"split": "train", "st')
  assert [row["step"] for row in records.read_json_lines(path)] == [1, 2]
  log = records.JsonLinesLog(path)
  log.append({"split": "train", "step": 2, "loss": 4.0})
  log.append({"split": "test", "step": 2})
  log.close()
  rows = records.latest_rows(path, split="train")
  assert [row["step"] for row in rows] == [1, 2]
  assert rows[1]["loss"] == 4.0
  # Fails if: the next row is appended to the cut line, and both are lost.


def test_missing_log_has_no_rows(tmp_path):
  assert list(records.read_json_lines(tmp_path / "none.jsonl")) == []
