"""Tests of ppnet.data.pipeline."""

import dataclasses
import io
import threading

import numpy as np
import pytest
import sklearn.datasets
import soundfile
from array_record.python import array_record_module

from ppnet import config as config_lib
from ppnet.data import audio, pipeline, prepare, sources, text
from ppnet.data import examples as examples_lib
from tests.data import conftest, tiny_examples

_PETS = {"train": {"cat": 3, "dog": 4}, "test": {"cat": 2, "dog": 1}}


@pytest.fixture
def pets(tmp_path):
  """A prepared image folder: its config and its prepared folder."""
  conftest.write_folder(tmp_path / "pets", _PETS)
  config = conftest.folder_config(tmp_path / "pets")
  prepare.prepare(config.data, tmp_path / "out", progress=False)
  return config, tmp_path / "out"


# Examples.


def test_tokens_spell_the_layout(digits_dir):
  config = conftest.digits_config()
  dataset = pipeline.examples(config, digits_dir, split="train")
  names = tuple("0123456789")
  tokenizer = text.Tokenizer.load(
    digits_dir / "tokenizer.model", class_names=names
  )
  prompt = tokenizer.encode(config.data.prompt)
  for position in (0, 5, 1436):
    example = dataset[position]
    whole = (
      [tokenizer.bos_id]
      + [tokenizer.placeholder_ids["image"]] * 16
      + [tokenizer.placeholder_ids["audio"]] * 4
      + prompt
      + [tokenizer.answer_ids[example["label"]]]
    )
    assert example["tokens"].tolist() == whole[:-1]
    assert example["targets"].tolist() == whole[1:]
    mask = [0.0] * (len(whole) - 2) + [1.0]
    assert example["loss_mask"].tolist() == mask
    assert example["index"] == position
    assert tokenizer.decode(example["targets"][-1:]) == (
      f"<answer:{example['label']}>"
    )
    # Fails if: the answer is among the inputs.


def test_digit_arrays_match_their_sources(digits_dir):
  digits = sklearn.datasets.load_digits()
  config = conftest.digits_config()
  source = pipeline.open_source(config.data, digits_dir, split="test")
  dataset = pipeline.examples(config, digits_dir, split="test")
  assert len(dataset) == len(source) == 360
  for position in (0, 3, 359):
    example, record = dataset[position], source[position]
    index = int(record.id.removeprefix("digits-"))
    assert example["label"] == digits.target[index] == record.label
    np.testing.assert_allclose(
      example["image"][:, :, 0], digits.images[index] / 8 - 1, atol=1 / 250
    )
    waveform, _ = soundfile.read(io.BytesIO(record.media["audio"][0]))
    log_mel = audio.LogMel(
      sample_rate_hz=8000,
      window=256,
      hop=128,
      num_mels=40,
      min_hz=300.0,
      max_hz=4000.0,
    ).map({"audio": waveform})["audio"]
    np.testing.assert_allclose(
      example["audio"], (log_mel - log_mel.mean()) / log_mel.std(), atol=1e-5
    )


def test_every_example_has_one_structure(digits_dir):
  config = conftest.digits_config()
  dataset = pipeline.examples(config, digits_dir, split="test")
  expected = {
    "index": ((), np.int32),
    "tokens": ((33,), np.int32),
    "targets": ((33,), np.int32),
    "loss_mask": ((33,), np.float32),
    "label": ((), np.int32),
    "is_padding_example": ((), np.bool_),
    "image": ((8, 8, 1), np.float32),
    "audio": ((24, 40), np.float32),
  }
  for position in range(0, 360, 17):
    example = dataset[position]
    assert {
      name: (value.shape, value.dtype) for name, value in example.items()
    } == expected
    assert not example["is_padding_example"]
    assert all(np.isfinite(value).all() for value in example.values())


@pytest.mark.parametrize("dropped", ["image", "audio"])
def test_absent_stem_takes_no_tokens_and_no_array(digits_dir, dropped):
  config = conftest.digits_config()
  setattr(config.model, dropped, None)
  example = pipeline.examples(config, digits_dir, split="test")[0]
  assert dropped not in example
  assert len(example["tokens"]) == 33 - {"image": 16, "audio": 4}[dropped]


def test_source_without_audio_takes_no_audio_tokens(pets):
  config, prepared_dir = pets
  assert config.model.audio is not None
  example = pipeline.examples(config, prepared_dir, split="train")[6]
  assert "audio" not in example
  assert example["image"].shape == (5, 5, 3)
  assert example["label"] == 1
  tokenizer = text.Tokenizer.load(
    prepared_dir / "tokenizer.model", class_names=("cat", "dog")
  )
  assert tokenizer.placeholder_ids["audio"] not in example["tokens"]
  assert (example["tokens"] == tokenizer.placeholder_ids["image"]).sum() == 9


def test_long_sequence_is_refused_with_its_parts(digits_dir):
  config = conftest.digits_config()
  config.model.decoder.max_seq_len = 32
  with pytest.raises(ValueError, match=r"max_seq_len=32.*image=16.*total=33"):
    pipeline.examples(config, digits_dir, split="train")
  config.model.decoder.max_seq_len = 33
  pipeline.examples(config, digits_dir, split="train")


def test_unprepared_or_other_folder_is_refused(digits_dir, tmp_path):
  config = conftest.digits_config()
  with pytest.raises(ValueError, match="Run the PREPARE job first"):
    pipeline.examples(config, tmp_path, split="train")
  with pytest.raises(ValueError, match="split='validation'"):
    pipeline.examples(config, digits_dir, split="validation")
  config.data.audio.num_mels = 20
  with pytest.raises(ValueError, match=r"audio\.num_mels"):
    pipeline.examples(config, digits_dir, split="train")


def test_folder_that_grew_since_prepare_is_refused(pets):
  config, prepared_dir = pets
  folder = prepared_dir.parent / "pets" / "train" / "cat"
  (folder / "9.png").write_bytes((folder / "0.png").read_bytes())
  with pytest.raises(ValueError, match=r"7 records.*num_records=8"):
    pipeline.examples(config, prepared_dir, split="train")
  # Fails if: the accountant's number of records is not the real one.


def test_cached_and_uncached_examples_are_equal(digits_dir):
  config = conftest.digits_config()
  cached = pipeline.examples(config, digits_dir, split="test")
  config.data.cache = False
  uncached = pipeline.examples(config, digits_dir, split="test")
  for position in (2, 2, 11):
    tiny_examples.assert_equal(cached[position], uncached[position])


@pytest.mark.parametrize("cache", [True, False])
def test_second_visit_reads_nothing_only_if_cached(pets, cache):
  config, prepared_dir = pets
  config.data.cache = cache
  dataset = pipeline.examples(config, prepared_dir, split="train")
  first = dataset[0]
  (prepared_dir.parent / "pets" / "train" / "cat" / "0.png").unlink()
  if cache:
    tiny_examples.assert_equal(dataset[0], first)
  else:
    with pytest.raises(sources.BadRecordError, match="cat/0.png"):
      dataset[0]


def test_consumer_cannot_spoil_the_cache(digits_dir):
  dataset = pipeline.examples(
    conftest.digits_config(), digits_dir, split="test"
  )
  example = dataset[0]
  del example["image"]
  example["audio"][:] = 0
  example["tokens"][:] = 0
  assert dataset[0]["image"].shape == (8, 8, 1)
  assert dataset[0]["audio"].any()
  assert dataset[0]["tokens"].any()


# Bad records.


def _spoil(folder):
  """Cuts one picture short and replaces another by text."""
  cut = folder / "train" / "cat" / "1.png"
  cut.write_bytes(cut.read_bytes()[:90])
  (folder / "train" / "dog" / "2.png").write_text("no picture")
  return ("train/cat/1.png", "train/dog/2.png")  # Positions 1 and 5 of 7.


@pytest.mark.parametrize("num_threads", [0, 2])
def test_raise_names_the_record_through_threads(pets, num_threads):
  config, prepared_dir = pets
  _spoil(prepared_dir.parent / "pets")
  dataset = pipeline.examples(config, prepared_dir, split="train")
  for position, name in [(1, "train/cat/1.png"), (5, "train/dog/2.png")]:
    steps = iter(
      tiny_examples.steps(
        dataset,
        lambda step, position=position: np.array([position] if step else [0]),
        num_threads=num_threads,
      )
    )
    assert next(steps)["num_examples"] == 1
    with pytest.raises(sources.BadRecordError, match=name):
      next(steps)
    steps.close()
  with pytest.raises(sources.BadRecordError, match="train/cat/1.png"):
    list(pipeline.eval_batches(dataset, batch_size=3))


@pytest.mark.parametrize("cache", [True, False])
def test_skip_gives_padding_and_counts_each_record_once(pets, cache):
  config, prepared_dir = pets
  names = _spoil(prepared_dir.parent / "pets")
  config.data.on_bad_record = config_lib.BadRecord.SKIP
  config.data.cache = cache
  dataset = pipeline.examples(config, prepared_dir, split="train")
  bad_records = dataset.bad_records
  assert bad_records.count == 0
  for _ in range(2):
    (batch,) = pipeline.eval_batches(dataset, batch_size=7)
    assert batch["is_padding_example"].nonzero()[0].tolist() == [1, 5]
    assert batch["index"].tolist() == list(range(7))
    for name, array in batch.items():
      if name not in ("index", "is_padding_example"):
        assert not array[[1, 5]].any()
        assert array[0].any() == (name != "label")
  assert bad_records.ids == names
  assert bad_records.count == 2
  assert "UnidentifiedImageError" in bad_records.causes[names[1]]
  # The draw is as it was: both bad records are still drawn and counted.
  (step,) = tiny_examples.steps(dataset, lambda step: np.arange(7), num_steps=1)
  assert step["num_examples"] == 7
  assert step["bad_records"].keys() == set(names)
  assert sum(b["is_padding_example"].sum() for b in step["microbatches"]) == 3
  # Fails if: a bad record changes the batch size or takes part in it.


def test_bad_audio_and_bad_label_are_bad_records(digits_dir, tmp_path):
  good = pipeline.open_source(
    conftest.digits_config().data, digits_dir, split="test"
  )
  spoilt = [
    dataclasses.replace(good[0], media={**good[0].media, "audio": (b"RIFF",)}),
    dataclasses.replace(good[1], label=10),
    dataclasses.replace(good[2], media={"audio": good[2].media["audio"]}),
    good[3],
  ]
  for name in ("dataset.json", "tokenizer.model"):
    content = (digits_dir / name).read_bytes()
    content = content.replace(b'"num_test": 360', b'"num_test": 4')
    (tmp_path / name).write_bytes(content)
  writer = array_record_module.ArrayRecordWriter(
    str(tmp_path / "test-00000-of-00001.array_record"), "group_size:1"
  )
  for record in spoilt:
    writer.write(sources.encode_record(record))
  writer.close()
  config = conftest.digits_config()
  dataset = pipeline.examples(config, tmp_path, split="test")
  for position, cause in enumerate(["recording", "label 10", "no image"]):
    with pytest.raises(sources.BadRecordError, match=cause):
      dataset[position]
  config.data.on_bad_record = config_lib.BadRecord.SKIP
  dataset = pipeline.examples(config, tmp_path, split="test")
  flags = [bool(dataset[i]["is_padding_example"]) for i in range(4)]
  assert flags == [True, True, True, False]


def test_bad_records_count_from_many_threads():
  bad_records = examples_lib.BadRecords()

  def add():
    for i in range(500):
      bad_records.add(f"r{i % 50}", "cause")

  threads = [threading.Thread(target=add) for _ in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert bad_records.count == 50


def test_records_are_grouped_by_the_name_of_their_file(pets):
  config, folder = pets
  config.data.user_pattern = "[^/]*/([0-9]).png"
  groups = pipeline.records_by_user(config, folder)
  # Three cats and four dogs, numbered from 0: one of each, but for user 3.
  assert [group.tolist() for group in groups] == [[0, 3], [1, 4], [2, 5], [6]]
  config.data.user_pattern = "cat/([0-9]).png"
  with pytest.raises(ValueError, match=r"user of every picture.*train/dog/0"):
    pipeline.records_by_user(config, folder)


def test_records_without_users_are_refused(digits_dir):
  with pytest.raises(ValueError, match="belong to a user"):
    pipeline.records_by_user(conftest.digits_config(), digits_dir)


def test_array_records_keep_their_users(tmp_path):
  record = sources.Record(id="a", label=1, user="eve")
  path = tmp_path / "one.array_record"
  writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
  writer.write(sources.encode_record(record))
  writer.close()
  source = sources.ArrayRecordSource([path])
  assert source.user(0) == source[0].user == "eve"
