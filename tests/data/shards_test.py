"""Tests of ppnet.data.shards and of how PREPARE uses them."""

import csv
import json
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from ppnet import config as config_lib
from ppnet.core import records
from ppnet.data import pipeline, prepare, shards, sources
from tests.data import raw_tools

_IDX = config_lib.Source.IDX
_TABLE = config_lib.Source.TABLE
_SKIP = config_lib.BadRecord.SKIP


def contents(folder) -> dict[str, bytes]:
  return {path.name: path.read_bytes() for path in folder.iterdir()}


def read(folder, split) -> list[sources.Record]:
  source = sources.ArrayRecordSource(sorted(folder.glob(f"{split}-*")))
  return [source[i] for i in range(len(source))]


def table(tmp_path, rows, *, test=3, **fields) -> config_lib.DataConfig:
  """A table of texts; `rows` are those of the train split."""
  raw_tools.folder_of(
    tmp_path / "table",
    {
      "train.jsonl": raw_tools.json_lines(rows),
      "test.jsonl": raw_tools.json_lines(
        {"key": f"t{i}", "body": f"test {i}"} for i in range(test)
      ),
    },
  )
  columns = config_lib.ColumnsConfig(id="key", text="body")
  return raw_tools.config(_TABLE, tmp_path / "table", columns=columns, **fields)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
  """Config and prepared folder of a small MNIST in several shards."""
  path = tmp_path_factory.mktemp("idx")
  raw_tools.write_idx(path / "raw", train=1300, test=300)
  config = raw_tools.config(_IDX, path / "raw", records_per_shard=100)
  prepare.prepare(config, path / "out", progress=False)
  return config, path / "out"


def test_shards_hold_every_record_in_order(digits):
  config, folder = digits
  card = prepare.read_card(folder)
  assert (card.num_train, card.num_test) == (1300, 300)
  assert {path.name for path in folder.iterdir()} == {"dataset.json"} | {
    f"train-{i:05d}-of-00013.array_record" for i in range(13)
  } | {f"test-{i:05d}-of-00003.array_record" for i in range(3)}
  for name, digest in card.sha256.items():
    assert shards.sha256(folder / name) == digest
  assert [r.id for r in read(folder, "train")] == [
    f"train-{i:05d}" for i in range(1300)
  ]
  source = pipeline.open_source(config, folder, split="test")
  assert source[299].id == "test-00299"
  raw_folder = pathlib.Path(config.path)
  assert card.raw_sha256 == {
    path.name: shards.sha256(path) for path in raw_folder.iterdir()
  }


def test_number_of_workers_changes_no_byte(digits, tmp_path):
  config, folder = digits
  config = raw_tools.config(
    _IDX, config.path, records_per_shard=100, prepare_workers=2
  )
  prepare.prepare(config, tmp_path, progress=False)
  assert contents(tmp_path) == contents(folder)


_KILLED = """
import sys
from ppnet import config as config_lib
from ppnet.data import prepare
from tests.data import raw_tools
config = raw_tools.config(
  config_lib.Source.IDX, sys.argv[1], records_per_shard=100,
  prepare_workers=int(sys.argv[3]),
)
if __name__ == "__main__":
  prepare.prepare(config, sys.argv[2])
"""


@pytest.mark.parametrize(
  "workers", [0, pytest.param(2, marks=pytest.mark.slow)]
)
def test_run_that_is_killed_again_and_again_ends_with_the_same_bytes(
  digits, tmp_path, workers
):
  config, folder = digits
  out = tmp_path / "out"
  script = tmp_path / "killed.py"
  script.write_text(_KILLED)
  rng = random.Random(workers)
  kept = 0
  for _ in range(2):
    before = {p: p.stat().st_mtime_ns for p in out.glob("*.array_record")}
    process = subprocess.Popen(
      [sys.executable, script, config.path, out, str(workers)],
      stderr=subprocess.DEVNULL,
      env={"PYTHONPATH": ".", "PATH": ""},
    )
    with process:
      deadline = time.monotonic() + 100
      wanted = min(len(before) + rng.randint(2, 6), 12)
      while len(list(out.glob("*.array_record"))) < wanted:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.returncode
        time.sleep(0.001)
      process.send_signal(signal.SIGKILL)
    assert not (out / "dataset.json").exists()
    kept += sum(
      path.stat().st_mtime_ns == when for path, when in before.items()
    )
  assert kept  # What was whole was not made again.
  prepare.prepare(config, out, progress=False)
  assert contents(out) == contents(folder)
  # Fails if: a shard gets its name before it is whole, a summary is not
  # compared with its shard, or leftovers stay.


def half_done(config, out):
  """Leaves a folder as a run leaves it that was killed near its end."""
  prepare.prepare(config, out, progress=False)
  whole = contents(out)

  def stop(*args, **kwargs):
    raise KeyboardInterrupt

  patch = pytest.MonkeyPatch()
  with patch.context() as patched:
    for path in out.iterdir():
      path.unlink()
    patched.setattr(prepare, "Card", stop)
    with pytest.raises(KeyboardInterrupt):
      prepare.prepare(config, out, progress=False)
  assert not (out / "dataset.json").exists()
  return whole


@pytest.mark.parametrize("fault", ["shard", "summary", "no summary", "gone"])
def test_shard_that_does_not_fit_its_summary_is_made_again(
  digits, tmp_path, fault
):
  config, _ = digits
  whole = half_done(config, tmp_path)
  shard = tmp_path / "train-00004-of-00013.array_record"
  summary = tmp_path / f".summary-{shard.name}.json"
  others = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*.array_record")}
  del others[shard]
  if fault == "shard":
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
  elif fault == "summary":
    fields = records.read_json(summary)
    records.write_json(summary, fields | {"sha256": "0" * 64})
  elif fault == "no summary":
    summary.unlink()
  else:
    shard.unlink()
  prepare.prepare(config, tmp_path, progress=False)
  assert contents(tmp_path) == whole
  assert others == {p: p.stat().st_mtime_ns for p in others}


def test_unfinished_files_do_not_pile_up(digits, tmp_path, monkeypatch):
  config, _ = digits
  half_done(config, tmp_path)
  (tmp_path / ".unfinished-train-00004.array_record.ab12").write_bytes(b"?")

  def begins(*args, **kwargs):
    assert not list(tmp_path.glob(".unfinished-*"))
    assert len(list(tmp_path.glob("*.array_record"))) == 16
    raise KeyboardInterrupt

  monkeypatch.setattr(shards, "make_all", begins)
  with pytest.raises(KeyboardInterrupt):
    prepare.prepare(config, tmp_path, progress=False)


@pytest.mark.parametrize("change", ["raw", "config"])
def test_unfinished_work_on_other_data_is_thrown_away(tmp_path, change):
  rows = [{"key": f"k{i}", "body": f"text {i}"} for i in range(25)]
  config = table(tmp_path, rows, records_per_shard=10)
  half_done(config, tmp_path / "out")
  if change == "raw":
    rows[0]["body"] = "another"
    config = table(tmp_path, rows, records_per_shard=10)
  else:
    config.records_per_shard = 7
  prepare.prepare(config, tmp_path / "out", progress=False)
  prepare.prepare(config, tmp_path / "fresh", progress=False)
  assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
  # Fails if: the plan does not name the raw files' hashes.


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("place", [3, 24])
def test_id_that_comes_twice_is_refused_by_name(tmp_path, place, skips):
  rows = [{"key": f"k{i}", "body": f"text {i}"} for i in range(25)]
  rows[place]["key"] = "k1"
  config = table(tmp_path, rows, records_per_shard=10)
  if skips:
    config.on_bad_record = _SKIP
  with pytest.raises(ValueError, match="id of its own, got id='k1'"):
    prepare.prepare(config, tmp_path / "out", progress=False)
  assert not (tmp_path / "out" / "dataset.json").exists()
  rows[place]["key"] = "t2"  # Which the test split has.
  with pytest.raises(ValueError, match="id of its own, got id='t2'"):
    prepare.prepare(
      table(tmp_path, rows, records_per_shard=10),
      tmp_path / "out",
      progress=False,
    )


def test_id_that_comes_twice_is_found_after_a_restart(tmp_path):
  rows = [{"key": f"k{i}", "body": f"text {i}"} for i in range(25)]
  rows[24]["key"] = "k1"
  config = table(tmp_path, rows, records_per_shard=10)
  for _ in range(2):  # The second run finds the shards of the first.
    with pytest.raises(ValueError, match="got id='k1'"):
      prepare.prepare(config, tmp_path / "out", progress=False)


_BAD_ROWS = [
  ({"key": "k2", "body": None}, "is null"),
  ({"key": "k2"}, "has no column"),
  ({"key": "k2", "body": "lone \ud800 surrogate"}, "not valid UTF-8"),
  ({"key": "k2", "body": "x" * (1 << 24) + "x"}, "longer than 16777216"),
]


@pytest.mark.parametrize(("row", "cause"), _BAD_ROWS)
def test_bad_row_stops_by_name_or_is_skipped_and_counted(tmp_path, row, cause):
  rows = [{"key": f"k{i}", "body": f"text {i}"} for i in range(9)]
  rows[2] = row
  config = table(tmp_path, rows, records_per_shard=4)
  with pytest.raises(sources.BadRecordError, match=f"'k2'.*{cause}"):
    prepare.prepare(config, tmp_path / "out", progress=False)
  config.on_bad_record = _SKIP
  card = prepare.prepare(config, tmp_path / "out", progress=False)
  assert (card.num_train, card.num_test) == (8, 3)
  assert card.num_skipped == {"train": 1, "test": 0}
  assert cause in card.skipped["k2"]
  ids = [record.id for record in read(tmp_path / "out", "train")]
  assert ids == [f"k{i}" for i in range(9) if i != 2]


@pytest.mark.slow
def test_bad_row_in_a_worker_stops_by_name(tmp_path):
  rows = [{"key": f"k{i}", "body": f"text {i}"} for i in range(9)]
  rows[2]["body"] = None
  config = table(tmp_path, rows, records_per_shard=4, prepare_workers=2)
  with pytest.raises(sources.BadRecordError, match="'k2'.*is null"):
    prepare.prepare(config, tmp_path / "out", progress=False)


def test_text_of_ten_megabytes_is_kept_whole(tmp_path):
  body = "é " * 3_500_000
  config = table(tmp_path, [{"key": "k", "body": body}])
  prepare.prepare(config, tmp_path / "out", progress=False)
  assert read(tmp_path / "out", "train")[0].text == body


def test_shard_of_bad_rows_alone_leaves_no_file(tmp_path):
  rows = [{"key": f"k{i}", "body": f"text {i}"} for i in range(12)]
  for i in range(4, 8):
    rows[i]["body"] = None
  config = table(tmp_path, rows, records_per_shard=4, on_bad_record=_SKIP)
  card = prepare.prepare(config, tmp_path / "out", progress=False)
  assert sorted(card.sha256) == [
    "test-00000-of-00001.array_record",
    "train-00000-of-00003.array_record",
    "train-00002-of-00003.array_record",
  ]
  source = pipeline.open_source(config, tmp_path / "out", split="train")
  assert len(source) == card.num_train == 8
  config = table(tmp_path, [{"key": "k", "body": None}], on_bad_record=_SKIP)
  with pytest.raises(ValueError, match="one record in the train split"):
    prepare.prepare(config, tmp_path / "other", progress=False)


def test_bytes_of_a_csv_that_are_no_utf_8_are_a_bad_row(tmp_path):
  path = tmp_path / "reviews.csv"
  with path.open("w", newline="", errors="surrogateescape") as file:
    writer = csv.writer(file)
    writer.writerow(["Title", "Review Text", "Recommended IND"])
    writer.writerows([["", f"text {i}", i % 2] for i in range(40)])
    writer.writerow(["", "bytes \udcff", 1])
  config = raw_tools.config(
    config_lib.Source.CLOTHING_REVIEWS, path, on_bad_record=_SKIP
  )
  card = prepare.prepare(config, tmp_path / "out", progress=False)
  assert card.skipped == {"row-000041": "its text is not valid UTF-8."}


def pictures(tmp_path, **fields) -> config_lib.DataConfig:
  raw_tools.write_idx(tmp_path / "raw", train=500, test=20, shape=(6, 6))
  return raw_tools.config(
    _IDX,
    tmp_path / "raw",
    **{
      "statistics": config_lib.Statistics.PUBLIC_SPLIT,
      "public_fraction": 0.2,
      "image_size": 6,
      "records_per_shard": 150,
    }
    | fields,
  )


def test_public_pictures_are_measured_and_not_trained_on(tmp_path):
  config = pictures(tmp_path)
  card = prepare.prepare(config, tmp_path / "out", progress=False)
  assert card.num_public + card.num_train == 500
  assert 60 < card.num_public < 140
  kept = {record.id for record in read(tmp_path / "out", "train")}
  assert len(kept) == card.num_train
  written = raw_tools.write_idx(
    tmp_path / "again", train=500, test=20, shape=(6, 6)
  )["train"][0]
  public = [i for i in range(500) if f"train-{i:05d}" not in kept]
  pixels = written[public] / 255
  assert card.statistics["num_pixels"] == pixels.size
  np.testing.assert_allclose(
    [card.statistics["pixel_mean"], card.statistics["pixel_std"]],
    [pixels.mean(), pixels.std()],
    rtol=1e-6,
  )
  assert "set aside as public" in card.normalisation
  assert len(card.uncovered) == 1
  assert f"{card.num_public} records were set aside" in card.uncovered[0]
  # Fails if: all training records are measured, or public ones are written.


def test_measured_constants_are_what_pictures_are_normalised_by(tmp_path):
  config = config_lib.ExperimentConfig()
  config.data = pictures(tmp_path, prepare_workers=0)
  config.model.decoder.vocab_size = 400
  config.model.audio = None
  card = prepare.prepare(config.data, tmp_path / "out", progress=False)
  dataset = pipeline.examples(config, tmp_path / "out", split="train")
  record = read(tmp_path / "out", "train")[7]
  pixels = np.frombuffer(record.media["image"][0][-36:], np.uint8) / 255
  np.testing.assert_allclose(
    dataset[7]["image"].ravel(),
    (pixels - card.statistics["pixel_mean"]) / card.statistics["pixel_std"],
    rtol=1e-4,
    atol=1e-5,
  )


def test_statistics_are_those_of_pictures_or_refused(tmp_path):
  rows = [{"key": f"k{i}", "body": f"text {i}"} for i in range(50)]
  config = table(
    tmp_path,
    rows,
    statistics=config_lib.Statistics.PUBLIC_SPLIT,
    public_fraction=0.3,
  )
  with pytest.raises(ValueError, match="public records with pictures"):
    prepare.prepare(config, tmp_path / "out", progress=False)
  config = config_lib.DataConfig(public_fraction=0.1)
  with pytest.raises(ValueError, match="data.public_fraction between 0 and 1"):
    config_lib.validate(config_lib.ExperimentConfig(data=config))


def test_users_are_public_whole_or_not_at_all(tmp_path):
  rows = [
    {"key": f"k{i}", "photo": f"{i}.png", "sender": f"s{i // 4}"}
    for i in range(120)
  ]
  raw_tools.folder_of(
    tmp_path / "table",
    {f"{i}.png": raw_tools.png(i) for i in range(120)}
    | {
      "train.jsonl": raw_tools.json_lines(rows[:100]),
      "test.jsonl": raw_tools.json_lines(rows[100:]),
    },
  )
  config = raw_tools.config(
    _TABLE,
    tmp_path / "table",
    columns=config_lib.ColumnsConfig(id="key", image="photo", user="sender"),
    statistics=config_lib.Statistics.PUBLIC_SPLIT,
    public_fraction=0.3,
    records_per_shard=30,
  )
  card = prepare.prepare(config, tmp_path / "out", progress=False)
  users = [record.user for record in read(tmp_path / "out", "train")]
  assert all(users.count(user) == 4 for user in users)
  assert card.num_users == len(set(users)) < 25
  assert card.num_public == 100 - len(users)


def test_private_tokenizer_says_that_it_is_not_covered(tmp_path):
  rows = [{"key": f"k{i}", "body": "zebra zebra wombat"} for i in range(40)]
  rows[0]["body"] = "wombat " * 2000  # Longer than SentencePiece reads.
  config = table(tmp_path, rows, tokenizer=config_lib.TokenizerKind.PRIVATE)
  config.prompt = "Who?"
  config.vocab_size = 60
  card = prepare.prepare(config, tmp_path / "out", progress=False)
  assert "not covered" in card.uncovered[0]
  assert "training records" in card.tokenizer
  source = (tmp_path / "out" / "tokenizer.model").read_bytes()
  assert b"zebra" in source
  again = prepare.prepare(config, tmp_path / "again", progress=False)
  assert again == card
  config.tokenizer = config_lib.TokenizerKind.PUBLIC
  config.vocab_size = 300
  card = prepare.prepare(config, tmp_path / "public", progress=False)
  assert b"zebra" not in (tmp_path / "public/tokenizer.model").read_bytes()
  assert card.uncovered == ()
  # Fails if: PUBLIC sees a record's text.


def test_own_array_records_are_checked_and_not_copied(tmp_path):
  def write(split, found):
    shards._write_array_record(tmp_path / f"{split}.array_record", iter(found))

  def record(i, **fields):
    return sources.Record(
      **{"id": f"r{i}", "text": "a", "label": 0, "user": f"u{i % 2}"} | fields
    )

  write("train", [record(i, media={"image": (b"?",) * i}) for i in range(3)])
  write("test", [record(9)])
  config = raw_tools.config(
    config_lib.Source.ARRAY_RECORD, tmp_path, class_names=("a",)
  )
  card = prepare.prepare(config, tmp_path / "out", progress=False)
  assert card.in_place
  assert card.media == {"image": (0, 2)}
  assert card.has_text
  assert card.num_users == 2
  assert set(contents(tmp_path / "out")) == {"dataset.json"}
  source = pipeline.open_source(config, tmp_path / "out", split="train")
  assert source[2] == record(2, media={"image": (b"?", b"?")})
  assert source.user(1) == "u1"
  write("test", [record(0)])
  with pytest.raises(ValueError, match="id of its own, got id='r0'"):
    prepare.prepare(config, tmp_path / "twice", progress=False)
  write("test", [record(9, label=1)])
  with pytest.raises(sources.BadRecordError, match="none of 1 classes"):
    prepare.prepare(config, tmp_path / "label", progress=False)


def test_settings_that_change_nothing_may_differ_later(digits):
  config, folder = digits
  other = raw_tools.config(
    _IDX,
    config.path,
    records_per_shard=7,
    prepare_workers=3,
    image_size=20,
    pixel_mean=0.1,
    on_bad_record=_SKIP,
  )
  other.audio.num_mels = 13
  assert prepare.prepare(other, folder) == prepare.read_card(folder)
  other.split_seed = 4
  with pytest.raises(ValueError, match="split_seed"):
    prepare.prepare(other, folder)


def test_user_pattern_of_a_zip_is_part_of_what_was_written(tmp_path):
  files = {
    f"{split}/cat/{user}_{i}.png": raw_tools.png(i)
    for split in sources.SPLITS
    for user in ("ann", "bob")
    for i in range(3)
  }
  path = raw_tools.zip_of(tmp_path / "pets.zip", files)
  config = raw_tools.config(
    config_lib.Source.IMAGE_FOLDER, path, user_pattern="[^/]*/([^_]*)_.*"
  )
  card = prepare.prepare(config, tmp_path / "out", progress=False)
  assert card.num_users == 2
  assert {r.user for r in read(tmp_path / "out", "train")} == {"ann", "bob"}
  config.user_pattern = "([^/]*)/.*"
  with pytest.raises(ValueError, match="user_pattern"):
    prepare.prepare(config, tmp_path / "out", progress=False)


def test_card_of_an_older_version_is_refused_by_version(digits, tmp_path):
  fields = json.loads((digits[1] / "dataset.json").read_text())
  (tmp_path / "dataset.json").write_text(json.dumps(fields | {"version": 2}))
  with pytest.raises(ValueError, match="version=2"):
    prepare.prepare(digits[0], tmp_path, progress=False)
