"""Tests of ppnet.data.raw_table: JSON lines, Parquet, TFDS, ArrayRecord."""

import gzip
import json
import os
import pickle
import subprocess
import sys

import pytest
from array_record.python import array_record_module

from ppnet import config as config_lib
from ppnet.data import catalogue, sources
from tests.data import raw_tools

_TABLE = config_lib.Source.TABLE
_TFDS = config_lib.Source.TFDS
_COLUMNS = {
  "id": "key",
  "text": "body",
  "answer": "reply",
  "label": "topic",
  "image": "photo",
  "audio": "sound",
  "user": "sender",
}
_CLASSES = ("no", "yes")


def table_config(path, **fields):
  columns = config_lib.ColumnsConfig(**fields.pop("columns", _COLUMNS))
  return raw_tools.config(
    _TABLE, path, columns=columns, **{"class_names": _CLASSES} | fields
  )


def rows(count, *, first=0):
  return [
    {
      "key": f"k{i}",
      "body": f"body {i} ☃",
      "reply": f"reply {i}",
      "topic": ["no", "yes"][i % 2],
      "photo": f"media/{i}.png",
      "sound": f"media/{i}.wav",
      "sender": f"s{i // 2}",
      "other": {"nested": [i]},
    }
    for i in range(first, first + count)
  ]


def media(count):
  return {f"media/{i}.png": raw_tools.png(i) for i in range(count)} | {
    f"media/{i}.wav": raw_tools.wav(i) for i in range(count)
  }


@pytest.mark.parametrize("compress", [False, True])
def test_json_lines_are_read_by_their_columns(tmp_path, compress):
  raw_tools.folder_of(tmp_path, media(12))
  for name, found in (
    ("train-0", rows(5)),
    ("train-1", rows(3, first=5)),
    ("test", rows(4, first=8)),
    ("validation", rows(1)),
  ):
    content = b"\n" + raw_tools.json_lines(found)
    if compress:
      (tmp_path / f"{name}.jsonl.gz").write_bytes(gzip.compress(content))
    else:
      (tmp_path / f"{name}.jsonl").write_bytes(content)
  raw = pickle.loads(pickle.dumps(catalogue.open_raw(table_config(tmp_path))))
  assert raw_tools.ids(raw) == {
    "train": [f"k{i}" for i in range(8)],
    "test": [f"k{i}" for i in range(8, 12)],
  }
  assert raw.record("train", 6) == sources.Record(
    id="k6",
    media={"image": (raw_tools.png(6),), "audio": (raw_tools.wav(6),)},
    text="body 6 ☃",
    answer="reply 6",
    label=0,
    user="s3",
  )
  assert raw.media == {"image": (1, 1), "audio": (1, 1)}
  assert list(raw.left_out.values()) == [1]
  assert len(raw.inputs()) == 3


def test_table_without_a_test_file_is_split_by_user(tmp_path):
  path = tmp_path / "all.jsonl"
  path.write_bytes(raw_tools.json_lines(rows(200)))
  columns = {"text": "body", "user": "sender"}
  raw = catalogue.open_raw(table_config(path, columns=columns))
  users = {
    s: {r.user for r in raw_tools.all_records(raw, s)} for s in sources.SPLITS
  }
  assert not users["train"] & users["test"]
  assert len(users["train"] | users["test"]) == 100
  raw = catalogue.open_raw(table_config(path, columns={"text": "body"}))
  ids = sum(raw_tools.ids(raw).values(), [])
  assert sorted(ids) == sorted(f"all.jsonl:{i}" for i in range(1, 201))
  assert 10 < raw.num_records("test") < 80
  # Fails if: rows are split where users are known.


@pytest.mark.parametrize(
  ("line", "cause"),
  [
    (b"{", "is no JSON"),
    (b'{"body": "\xff"}', "is no JSON"),
    (b"[1]", "no JSON object"),
    (b"[" * 100_000, "is no JSON"),
    ({"body": None}, r"its text \('body'\) is null"),
    ({"body": 3.5}, "text was expected, not float"),
    ({"-": "body"}, r"has no column \['body'\]"),
    ({"topic": "maybe"}, "label 'maybe' is none of"),
    ({"topic": 2}, "label 2 is none of"),
    ({"photo": "../../etc/passwd"}, "is no file in"),
    ({"photo": "/etc/passwd"}, "is no file in"),
    ({"photo": 3}, "bytes or a path were expected, not int"),
    ({"sound": "media/9.wav"}, "is no file in"),
  ],
)
def test_bad_row_is_named_and_the_next_one_is_not(tmp_path, line, cause):
  raw_tools.folder_of(tmp_path, media(3))
  (tmp_path / "test.jsonl").write_bytes(raw_tools.json_lines(rows(1)))
  good = rows(3)
  if isinstance(line, dict):
    dropped = line.pop("-", None)
    spoilt = {k: v for k, v in (good[1] | line).items() if k != dropped}
    line = json.dumps(spoilt).encode()
  lines = [json.dumps(good[0]).encode(), line, json.dumps(good[2]).encode()]
  (tmp_path / "train.jsonl").write_bytes(b"\n".join(lines))
  raw = catalogue.open_raw(table_config(tmp_path))
  with pytest.raises(sources.BadRecordError, match=cause) as info:
    raw.record("train", 1)
  assert info.value.record_id in ("k1", "train.jsonl:2")
  assert raw.record("train", 0).id == "k0"
  assert raw.record("train", 2).id == "k2"


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"columns": {"id": "key"}}, "data.columns to say what is what"),
    ({"columns": {"label": "topic"}, "class_names": ()}, "names of the labels"),
    (
      {"columns": {"text": "body"}, "test_fraction": 1e-9},
      "rows in both splits",
    ),
  ],
)
def test_impossible_table_is_refused(tmp_path, fields, message):
  path = tmp_path / "all.jsonl"
  path.write_bytes(raw_tools.json_lines(rows(9)))
  with pytest.raises(ValueError, match=message):
    catalogue.open_raw(table_config(path, **fields))


def test_folder_without_tables_is_refused(tmp_path):
  (tmp_path / "train.csv").write_text("a,b")
  with pytest.raises(ValueError, match=r"\.jsonl.*tables=\[\]"):
    catalogue.open_raw(table_config(tmp_path))
  (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(b"{}\n" * 99)[:-9])
  with pytest.raises(ValueError, match="read to its end"):
    catalogue.open_raw(table_config(tmp_path))


def write_parquet(path, columns, **options):
  pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
  parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")
  table = pyarrow.table(columns)
  metadata = options.pop("metadata", None)
  if metadata:
    table = table.replace_schema_metadata(metadata)
  path.parent.mkdir(parents=True, exist_ok=True)
  parquet.write_table(table, path, **options)


def test_parquet_as_hugging_face_writes_it(tmp_path):
  features = {"topic": {"names": ["no", "yes"], "_type": "ClassLabel"}}
  for split, count in (("train", 11), ("test", 3)):
    write_parquet(
      tmp_path / "data" / f"{split}-00000-of-00001.parquet",
      {
        "body": [f"{split} {i}" for i in range(count)],
        "topic": [i % 2 for i in range(count)],
        "photo": [
          {"bytes": raw_tools.png(i), "path": None} for i in range(count)
        ],
      },
      row_group_size=4,
      metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
  config = table_config(
    tmp_path,
    columns={"text": "body", "label": "topic", "image": "photo"},
    class_names=(),
  )
  raw = pickle.loads(pickle.dumps(catalogue.open_raw(config)))
  assert raw.class_names == ("no", "yes")
  for i in [*range(11), 0, 10, 4]:  # In order, then not.
    record = raw.record("train", i)
    assert (record.text, record.label) == (f"train {i}", i % 2)
    assert record.media["image"] == (raw_tools.png(i),)
  config.columns.text = "words"
  with pytest.raises(ValueError, match=r"the columns \['words'\] in"):
    catalogue.open_raw(config)


def test_damaged_parquet_is_named(tmp_path):
  write_parquet(tmp_path / "train.parquet", {"body": ["a"] * 50})
  path = tmp_path / "train.parquet"
  content = path.read_bytes()
  path.write_bytes(content[: len(content) // 2])
  with pytest.raises(ValueError, match=r"a Parquet file.*train\.parquet"):
    catalogue.open_raw(table_config(tmp_path, columns={"text": "body"}))


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
  (tmp_path / "train.parquet").write_bytes(b"PAR1")
  monkeypatch.setitem(sys.modules, "pyarrow", None)
  with pytest.raises(ValueError, match=r"pip install 'ppnet\[prepare\]'"):
    catalogue.open_raw(table_config(tmp_path, columns={"text": "body"}))


def write_tfds(path, *, splits=("train", "test"), file_format="array_record"):
  """Writes a TFDS set, as `tfds build` leaves it, without TensorFlow."""
  tfds = pytest.importorskip(
    "tensorflow_datasets", reason="needs tensorflow-datasets"
  )
  from tensorflow_datasets.core import example_serializer

  path.mkdir(parents=True)
  features = tfds.features.FeaturesDict(
    {
      "image": tfds.features.Image(shape=(3, 4, 1)),
      "label": tfds.features.ClassLabel(names=["no", "yes"]),
      "text": tfds.features.Text(),
      "writer": tfds.features.Text(),
    }
  )
  serializer = example_serializer.ExampleSerializer(
    features.get_serialized_info()
  )
  info = []
  for split in splits:
    name = f"tiny-{split}.{file_format}-00000-of-00001"
    writer = array_record_module.ArrayRecordWriter(
      str(path / name), "group_size:1"
    )
    for i in range(5):
      writer.write(
        serializer.serialize_example(
          {
            "image": raw_tools.png(i),
            "label": i % 2,
            "text": f"{split} {i} ☃".encode(),
            "writer": b"ann",
          }
        )
      )
    writer.close()
    info.append(
      {
        "name": split,
        "shardLengths": ["5"],
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
      }
    )
  features.save_config(str(path))
  (path / "dataset_info.json").write_text(
    json.dumps(
      {
        "name": "tiny",
        "version": "1.0.0",
        "fileFormat": file_format,
        "splits": info,
      }
    )
  )
  return path


def test_tfds_set_is_read_with_its_features(tmp_path):
  path = write_tfds(tmp_path / "tiny" / "1.0.0")
  raw = catalogue.open_raw(raw_tools.config(_TFDS, path))
  raw = pickle.loads(pickle.dumps(raw))
  assert raw.class_names == ("no", "yes")
  assert raw.media == {"image": (1, 1)}
  assert raw.record("train", 3) == sources.Record(
    id="train-0000003",
    media={"image": (raw_tools.png(3),)},
    text="train 3 ☃",
    label=1,
  )
  columns = config_lib.ColumnsConfig(text="text", user="writer")
  raw = catalogue.open_raw(raw_tools.config(_TFDS, path, columns=columns))
  assert raw.record("test", 0) == sources.Record(
    id="test-0000000", text="test 0 ☃", user="ann"
  )
  columns = config_lib.ColumnsConfig(text="body")
  with pytest.raises(ValueError, match=r"missing=\['body'\]"):
    catalogue.open_raw(raw_tools.config(_TFDS, path, columns=columns))


def test_tfds_set_that_cannot_be_used_is_refused(tmp_path):
  path = write_tfds(tmp_path / "tiny" / "1.0.0", splits=("train",))
  with pytest.raises(ValueError, match=r"the splits.*splits=\['train'\]"):
    catalogue.open_raw(raw_tools.config(_TFDS, path))
  path = write_tfds(tmp_path / "other" / "1.0.0", file_format="tfrecord")
  with pytest.raises(ValueError, match="--file_format=array_record"):
    catalogue.open_raw(raw_tools.config(_TFDS, path))
  with pytest.raises(ValueError, match="the folder of a built set"):
    catalogue.open_raw(raw_tools.config(_TFDS, tmp_path / "tiny"))


_WITHOUT_TENSORFLOW = """
import sys
from ppnet import config as config_lib
from ppnet.data import pipeline, prepare
from ppnet.train import loop
assert "tensorflow_datasets" not in sys.modules
config = config_lib.ExperimentConfig()
config.data = config_lib.DataConfig(
  source=config_lib.Source.TFDS, path=sys.argv[1], prompt="",
  tokenizer=config_lib.TokenizerKind.BYTES, vocab_size=300,
)
config.model.decoder.vocab_size = 300
config.model.decoder.max_seq_len = 64
config.model.audio = None
config_lib.validate(config)
prepare.prepare(config.data, sys.argv[2], progress=False)
dataset = pipeline.examples(config, sys.argv[2], split="train")
assert dataset[0]["image"].shape == (8, 8, 1)
assert "tensorflow" not in sys.modules
try:
  import tensorflow
except RuntimeError:
  print("done")
"""


def test_tfds_set_is_prepared_and_read_without_tensorflow(tmp_path):
  path = write_tfds(tmp_path / "tiny" / "1.0.0")
  # It looks installed, and must not be imported.
  raw_tools.folder_of(
    tmp_path / "fake",
    {"tensorflow/__init__.py": b"raise RuntimeError('was imported')"},
  )
  result = subprocess.run(
    [sys.executable, "-c", _WITHOUT_TENSORFLOW, path, tmp_path / "out"],
    capture_output=True,
    text=True,
    timeout=100,
    check=False,
    env=os.environ
    | {"PYTHONPATH": os.pathsep.join([str(tmp_path / "fake"), os.getcwd()])},
  )
  assert result.stdout == "done\n", result.stderr
  # Fails if: a picture is decoded by TFDS, or its sound is read.


def test_own_array_records_are_read_in_place(tmp_path):
  for split in sources.SPLITS:
    writer = array_record_module.ArrayRecordWriter(
      str(tmp_path / f"{split}.array_record"), "group_size:1"
    )
    for i in range(4):
      record = sources.Record(id=f"{split}{i}", text=f"{i}", label=i % 2)
      writer.write(sources.encode_record(record))
    writer.close()
  raw = catalogue.open_raw(
    raw_tools.config(
      config_lib.Source.ARRAY_RECORD, tmp_path, class_names=_CLASSES
    )
  )
  raw = pickle.loads(pickle.dumps(raw))
  assert raw.in_place
  assert raw_tools.ids(raw)["test"] == [f"test{i}" for i in range(4)]
  (tmp_path / "test.array_record").unlink()
  with pytest.raises(ValueError, match="no_file_of='test'"):
    catalogue.open_raw(
      raw_tools.config(config_lib.Source.ARRAY_RECORD, tmp_path)
    )
