"""Damaged raw files: an error that names something, or a record, never a crash.

Each source gets small good files, one of which is cut, overwritten or extended
at random. Then everything is read. What may come of it is `ValueError` (which
`BadRecordError` is), with a message.
"""

import dataclasses
import gzip
import json
import pathlib
import random

import pytest

from ppnet import config as config_lib
from ppnet.data import catalogue, sources
from tests.data import raw_table_test, raw_tools

_Source = config_lib.Source
_ROUNDS = 60


def _folder(path):
  files = {
    f"{split}/{name}/{i}.png": raw_tools.png(i)
    for split in sources.SPLITS
    for name in ("cat", "dog")
    for i in range(3)
  }
  return raw_tools.zip_of(path / "pets.zip", files)


def _idx(path):
  raw_tools.write_idx(path / "idx", train=20, test=20)
  return path / "idx"


def _idx_gz(path):
  raw_tools.write_idx(path / "idx", train=20, test=20, compress=True)
  return path / "idx"


def _fsdd(path):
  files = raw_tools.recordings(digits=[1, 2], numbers=range(3, 7))
  return raw_tools.zip_of(path / "fsdd.zip", files)


def _reviews(path):
  text = "Title,Review Text,Recommended IND\n" + "".join(
    f'"a ""{i}""","text\n{i} é",{i % 2}\n' for i in range(30)
  )
  (path / "r.csv.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
  (path / "r.csv").write_bytes(text.encode())
  return path / "r.csv"


def _reviews_gz(path):
  _reviews(path)
  (path / "r.csv").unlink()
  return path / "r.csv.gz"


def _squad(path):
  file = path / "squad.json"
  file.write_text(
    json.dumps(raw_tools.squad([f"t{i}" for i in range(12)], per_article=1))
  )
  return file


def _coco(path):
  rows = [
    {"file_name": f"{i}.jpg", "captions": [f"caption {i}"]} for i in range(12)
  ]
  return raw_tools.zip_of(
    path / "coco.zip",
    {f"images/{i}.jpg": raw_tools.png(i) for i in range(12)}
    | {"captions.jsonl": raw_tools.json_lines(rows)},
  )


def _text(path):
  (path / "a.txt").write_text("é☃ some text 𝄞\n" * 40)
  return path / "a.txt"


def _table(path):
  raw_tools.folder_of(path / "table", raw_table_test.media(6))
  for split, first in (("train", 0), ("test", 3)):
    (path / "table" / f"{split}.jsonl").write_bytes(
      raw_tools.json_lines(raw_table_test.rows(3, first=first))
    )
  return path / "table"


def _parquet(path):
  for split in sources.SPLITS:
    raw_table_test.write_parquet(
      path / "table" / f"{split}.parquet",
      {
        "body": [f"text {i}" for i in range(9)],
        "topic": [i % 2 for i in range(9)],
      },
      row_group_size=4,
    )
  return path / "table"


def _tfds(path):
  return raw_table_test.write_tfds(path / "tiny" / "1.0.0")


_CASES = {
  _folder: (_Source.IMAGE_FOLDER, {}),
  _idx: (_Source.IDX, {}),
  _idx_gz: (_Source.IDX, {}),
  _fsdd: (_Source.FSDD, {}),
  _reviews: (_Source.CLOTHING_REVIEWS, {}),
  _reviews_gz: (_Source.CLOTHING_REVIEWS, {}),
  _squad: (_Source.SQUAD, {}),
  _coco: (_Source.COCO_CAPTIONS, {}),
  _text: (_Source.TEXT_FILE, {"window_bytes": 16}),
  _table: (_Source.TABLE, {"columns": raw_table_test._COLUMNS}),
  _parquet: (_Source.TABLE, {"columns": {"text": "body", "label": "topic"}}),
  _tfds: (_Source.TFDS, {}),
}


def _damage(content: bytes, rng: random.Random) -> bytes:
  """The content cut, overwritten or extended at a random place."""
  at = rng.randrange(len(content) + 1)
  some = rng.randbytes(rng.choice([1, 1, 4, 40]))
  match rng.randrange(5):
    case 0:
      return content[:at]
    case 1:
      return content[:at] + content[at + len(some) :]
    case 2:
      return content[:at] + some + content[at:]
    case 3:
      return b""
  return content[:at] + some + content[at + len(some) :]


def _read_everything(config) -> tuple[int, int]:
  """(records, bad records); 0 and 1 where nothing opens."""
  good = bad = 0
  try:
    raw = catalogue.open_raw(config)
    for split in sources.SPLITS:
      for index in range(raw.num_records(split)):
        try:
          record = raw.record(split, index)
          assert isinstance(record, sources.Record)
          assert record.id
          good += 1
        except sources.BadRecordError as error:
          bad += bool(error.record_id and error.cause)
  except ValueError as error:
    return good, bad + bool(str(error))
  return good, bad


@pytest.mark.parametrize("case", _CASES, ids=lambda case: case.__name__)
def test_damage_is_an_error_or_a_record(tmp_path, case):
  source, fields = _CASES[case][0], dict(_CASES[case][1])
  path = case(tmp_path)
  config = raw_tools.config(
    source, path, class_names=("no", "yes") if source is _Source.TABLE else ()
  )
  columns = config_lib.ColumnsConfig(**fields.pop("columns", {}))
  config = dataclasses.replace(config, columns=columns, **fields)
  whole, bad = _read_everything(config)
  assert whole
  assert not bad
  files = [
    file
    for file in ([path] if path.is_file() else sorted(path.rglob("*")))
    if file.is_file() and file.suffix not in (".png", ".wav")
  ]
  noticed = 0
  rng = random.Random(case.__name__)
  for _ in range(_ROUNDS):
    file: pathlib.Path = rng.choice(files)
    content = file.read_bytes()
    file.write_bytes(_damage(content, rng))
    noticed += _read_everything(config)[1] > 0
    file.write_bytes(content)
  assert noticed > 5
  assert _read_everything(config) == (whole, 0)
