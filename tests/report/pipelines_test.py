"""Table 1: read from the pipelines in use, with a picture of each."""

import csv

import pytest

from ppnet import config as config_lib
from ppnet import main
from ppnet.core import records
from ppnet.data import augment_image, image
from tests.data import raw_tools


@pytest.fixture
def table(tmp_path):
  """A TABLE job on a small IDX set with a class, a text-free one."""
  raw_tools.write_idx(tmp_path / "idx", train=12, test=4, shape=(6, 6))
  config = config_lib.ExperimentConfig(
    job=config_lib.Job.TABLE,
    data=raw_tools.config(
      config_lib.Source.IDX,
      tmp_path / "idx",
      image_size=6,
      image_transforms=(
        image.Decode(image_size=6, image_channels=1, as_uint8=True),
        augment_image.Rotate(max_degrees=7.0),
        image.MinMax(),
        image.ZScore(mean=0.25, std=0.5),
      ),
    ),
  )
  config.model.audio = None
  config.model.decoder.vocab_size = 400
  main.run_job(config, tmp_path / "run")
  return tmp_path / "run"


def test_words_come_from_the_transformations(table):
  (row,) = records.read_json(table / "table.json")["rows"]
  assert row["modality"] == "image"
  assert "0.25" in row["normalisation"]
  assert "±7°" in row["augmentation"]
  assert "CNN stem" in row["feature_extraction"]
  assert row["num_records"] == 12
  for name in ("table.md", "table.tex"):
    assert "CNN stem" in (table / name).read_text()
  assert r"$\pm$7$^\circ$" in (table / "table.tex").read_text()


def test_numbers_are_of_the_records(table):
  (row,) = csv.DictReader((table / "table.csv").read_text().splitlines())
  before, after = (
    float(row[f"nonprivate/{when}/mean"]) for when in ("before", "after")
  )
  assert after == pytest.approx((before / 255 - 0.25) / 0.5, abs=1e-5)
  assert row["shape_before"] == row["shape_after"] == "6 × 6 × 1"
  assert (table / "figures" / "pipeline_image.png").stat().st_size > 5_000


def test_texts_have_a_row_of_their_own(tmp_path):
  (tmp_path / "text.txt").write_text("To be, or not to be. " * 40)
  config = config_lib.ExperimentConfig(
    job=config_lib.Job.TABLE,
    data=raw_tools.config(
      config_lib.Source.TEXT_FILE,
      tmp_path / "text.txt",
      task=config_lib.Task.CAUSAL,
      window_bytes=32,
    ),
  )
  config.model.image = config.model.audio = None
  config.model.decoder.vocab_size = 400
  config.model.decoder.max_seq_len = 32
  main.run_job(config, tmp_path / "run")
  (row,) = records.read_json(tmp_path / "run" / "table.json")["rows"]
  assert row["modality"] == "text"
  assert row["normalisation"] == "Unicode NFKC"
  assert row["feature_extraction"] == "bytes, at most 32 tokens"
