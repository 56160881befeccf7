"""Fixtures of the data room: one prepared set of digits, and small pictures."""

import io
import pathlib

import numpy as np
import pytest
from PIL import Image

from ppnet import config as config_lib
from ppnet.data import prepare


def digits_config() -> config_lib.ExperimentConfig:
  """An experiment on the digits whose decoder is long enough."""
  config = config_lib.ExperimentConfig()
  config.model.decoder.max_seq_len = 64
  return config


def write_folder(
  path: pathlib.Path, counts: dict[str, dict[str, int]], *, size: int = 6
) -> None:
  """Writes <path>/<split>/<class>/<i>.png with pictures of random noise."""
  rng = np.random.default_rng(0)
  for split, classes in counts.items():
    for name, count in classes.items():
      folder = path / split / name
      folder.mkdir(parents=True)
      for i in range(count):
        pixels = rng.integers(0, 256, (size, size + 1, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")


def folder_config(path: pathlib.Path) -> config_lib.ExperimentConfig:
  """An experiment on an image folder."""
  config = digits_config()
  config.data.source = config_lib.Source.IMAGE_FOLDER
  config.data.path = str(path)
  config.data.image_size = 5
  config.data.image_channels = 3
  config.data.prompt = "What is it?"
  return config


def png(pixels: np.ndarray, **options) -> bytes:
  """Encodes a picture without calling the package."""
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, format="PNG", **options)
  return buffer.getvalue()


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory) -> pathlib.Path:
  """The digits, prepared once for all tests; never written to."""
  out_dir = tmp_path_factory.mktemp("digits")
  prepare.prepare(digits_config().data, out_dir, progress=False)
  return out_dir
