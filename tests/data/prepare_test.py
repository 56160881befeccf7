"""Tests of ppnet.data.prepare."""

import dataclasses
import hashlib
import io
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import sklearn.datasets
import soundfile
from PIL import Image

from ppnet import config as config_lib
from ppnet.data import audio, catalogue, prepare, sources, text
from tests.data import conftest

_FILES = {
  "dataset.json",
  "test-00000-of-00001.array_record",
  "tokenizer.model",
  "train-00000-of-00001.array_record",
}


def _contents(folder) -> dict[str, bytes]:
  return {path.name: path.read_bytes() for path in folder.iterdir()}


def _read(folder, split) -> list[sources.Record]:
  source = sources.ArrayRecordSource(sorted(folder.glob(f"{split}-*")))
  return [source[i] for i in range(len(source))]


@pytest.fixture(scope="module")
def splits(digits_dir) -> dict[str, list[sources.Record]]:
  return {split: _read(digits_dir, split) for split in sources.SPLITS}


def test_split_is_stratified_and_every_digit_is_there_once(splits):
  digits = sklearn.datasets.load_digits()
  ids = [record.id for split in splits.values() for record in split]
  assert sorted(ids) == [f"digits-{i:04d}" for i in range(1797)]
  assert len(splits["test"]) == 360
  share = np.bincount([r.label for r in splits["test"]]) / np.bincount(
    digits.target
  )
  np.testing.assert_allclose(share, 0.2, atol=0.005)
  for split in splits.values():
    assert [record.id for record in split] == sorted(
      record.id for record in split
    )


def test_pictures_and_labels_match_scikit_learn(splits):
  digits = sklearn.datasets.load_digits()
  for record in splits["test"]:
    index = int(record.id.removeprefix("digits-"))
    with Image.open(io.BytesIO(record.media["image"][0])) as picture:
      assert picture.format == "PNG"
      pixels = np.asarray(picture)
    np.testing.assert_array_equal(
      np.round(pixels / 255 * 16), digits.images[index]
    )
    assert record.label == digits.target[index]


def test_tone_is_that_of_the_label_and_of_the_index_alone(splits):
  for record in splits["train"][:40]:
    waveform, rate_hz = soundfile.read(
      io.BytesIO(record.media["audio"][0]), dtype="float32"
    )
    assert (rate_hz, waveform.shape) == (8000, (3200,))
    index = int(record.id.removeprefix("digits-"))
    expected = audio.dtmf_tone(
      record.label,
      np.random.default_rng([0, index]),
      sample_rate_hz=8000,
      max_secs=0.4,
    )
    np.testing.assert_allclose(waveform, expected, atol=1 / 32768)


def test_no_two_tones_are_the_same(splits):
  hashes = {
    hashlib.sha256(record.media["audio"][0]).digest()
    for split in splits.values()
    for record in split
  }
  assert len(hashes) == 1797


def test_card_describes_the_folder(digits_dir):
  card = prepare.read_card(digits_dir)
  assert card.class_names == tuple("0123456789")
  assert (card.num_records("train"), card.num_records("test")) == (1437, 360)
  assert card.media == {"image": (1, 1), "audio": (1, 1)}
  assert card.prompt == config_lib.DataConfig().prompt
  assert "CC BY" in card.licence
  assert set(card.sha256) | {"dataset.json"} == _FILES
  for name, digest in card.sha256.items():
    content = (digits_dir / name).read_bytes()
    assert hashlib.sha256(content).hexdigest() == digest
  assert prepare.Card.from_json(json.loads(json.dumps(card.to_json()))) == card
  with pytest.raises(dataclasses.FrozenInstanceError):
    card.num_train = 3


def test_tokenizer_holds_the_classes(digits_dir):
  tokenizer = text.Tokenizer.load(
    digits_dir / "tokenizer.model", class_names=tuple("0123456789")
  )
  assert tokenizer.decode(tokenizer.answer_ids[7:8]) == "<answer:7>"


def test_second_run_touches_nothing(digits_dir, monkeypatch):
  def never(*args, **kwargs):
    raise AssertionError("prepared again")

  before = {path: path.stat().st_mtime_ns for path in digits_dir.iterdir()}
  monkeypatch.setattr(catalogue, "open_raw", never)
  config = config_lib.DataConfig(
    on_bad_record=config_lib.BadRecord.SKIP, cache=False, prepared_dir="else"
  )
  card = prepare.prepare(config, digits_dir, progress=False)
  assert card == prepare.read_card(digits_dir)
  assert before == {
    path: path.stat().st_mtime_ns for path in digits_dir.iterdir()
  }


def test_another_config_is_refused_by_field(digits_dir):
  before = _contents(digits_dir)
  config = config_lib.DataConfig(test_fraction=0.3)
  config.audio.num_mels = 24
  with pytest.raises(ValueError, match="fields differ") as info:
    prepare.prepare(config, digits_dir, progress=False)
  message = str(info.value)
  assert "audio.num_mels (40 there, 24 now)" in message
  assert "test_fraction (0.2 there, 0.3 now)" in message
  assert "prepared_dir" in message
  assert "prompt" not in message
  assert _contents(digits_dir) == before


def test_another_seed_changes_split_and_tones(digits_dir, splits, tmp_path):
  config = config_lib.DataConfig(split_seed=3, test_fraction=0.35)
  card = prepare.prepare(config, tmp_path, progress=False)
  assert (card.num_train, card.num_test) == (1168, 629)
  theirs = {r.id: r for r in splits["train"] + splits["test"]}
  ours = _read(tmp_path, "test")
  assert all(
    r.media["audio"][0] != theirs[r.id].media["audio"][0] for r in ours
  )
  assert all(
    r.media["image"][0] == theirs[r.id].media["image"][0] for r in ours
  )


_KILLED = """
import pathlib, sys
from ppnet import config as config_lib
from ppnet.data import prepare
prepare.prepare(config_lib.DataConfig(), pathlib.Path(sys.argv[1]))
"""


@pytest.mark.parametrize(
  "moment",
  ["tokenizer.model", ".unfinished-train-*", "train-*", ".unfinished-test-*"],
)
def test_killed_run_is_completed_by_the_next(digits_dir, tmp_path, moment):
  process = subprocess.Popen(
    [sys.executable, "-c", _KILLED, str(tmp_path)], stderr=subprocess.DEVNULL
  )
  with process:
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(moment)):
      assert time.monotonic() < deadline, f"{moment} never appeared"
      assert process.poll() is None, "finished before it could be killed"
      time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
  assert process.returncode == -signal.SIGKILL
  assert not (tmp_path / "dataset.json").exists()
  with pytest.raises(ValueError, match="Run the PREPARE job first"):
    prepare.read_card(tmp_path)
  prepare.prepare(config_lib.DataConfig(), tmp_path, progress=False)
  assert _contents(tmp_path) == _contents(digits_dir)  # And nothing is left.
  # Fails if: files are written under their final names, or the card first.


def test_leftovers_of_a_killed_run_are_removed(digits_dir, tmp_path):
  for name in (
    ".unfinished-train-00000-of-00001.array_record",
    ".unfinished-train-00000-of-00002.array_record",
    ".tokenizer.model.a1b2c3",
    ".dataset.json.d4e5f6",
  ):
    (tmp_path / name).write_bytes(b"half of it")
  prepare.prepare(config_lib.DataConfig(), tmp_path, progress=False)
  assert _contents(tmp_path) == _contents(digits_dir)


def test_two_processes_at_once_write_one_whole_folder(digits_dir, tmp_path):
  command = [sys.executable, "-c", _KILLED, str(tmp_path)]
  processes = [
    subprocess.Popen(command, stderr=subprocess.DEVNULL) for _ in range(2)
  ]
  assert [process.wait(timeout=60) for process in processes] == [0, 0]
  assert _contents(tmp_path) == _contents(digits_dir)


def test_damaged_or_foreign_card_is_named(digits_dir, tmp_path):
  path = tmp_path / "dataset.json"
  path.write_text('{"version": 1')
  with pytest.raises(ValueError, match="damaged"):
    prepare.prepare(config_lib.DataConfig(), tmp_path, progress=False)
  fields = json.loads((digits_dir / "dataset.json").read_text())
  path.write_text(json.dumps({**fields, "version": 99}))
  with pytest.raises(ValueError, match=r"version=99.*|version 1"):
    prepare.prepare(config_lib.DataConfig(), tmp_path, progress=False)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"test_fraction": 1.0}, "0 < test_fraction < 1"),
    ({"split_seed": -1}, "split_seed >= 0"),
    ({"vocab_size": 20}, "vocab_size >="),
  ],
)
def test_impossible_setting_is_named(tmp_path, fields, message):
  with pytest.raises(ValueError, match=message):
    prepare.prepare(config_lib.DataConfig(**fields), tmp_path, progress=False)
  assert not list(tmp_path.iterdir())


def test_image_folder_is_read_in_place(tmp_path):
  counts = {"train": {"cat": 3, "dog": 4}, "test": {"cat": 1, "dog": 1}}
  conftest.write_folder(tmp_path / "pets", counts)
  config = conftest.folder_config(tmp_path / "pets").data
  card = prepare.prepare(config, tmp_path / "out", progress=False)
  assert {path.name for path in (tmp_path / "out").iterdir()} == {
    "dataset.json",
    "tokenizer.model",
  }
  assert (card.name, card.class_names) == ("pets", ("cat", "dog"))
  assert (card.num_train, card.num_test) == (7, 2)
  assert card.media == {"image": (1, 1)}


def test_progress_is_silent_on_request(tmp_path, capfd):
  config = config_lib.DataConfig(split_seed=4)
  prepare.prepare(config, tmp_path, progress=False)
  output = capfd.readouterr()
  assert (output.out, output.err) == ("", "")
