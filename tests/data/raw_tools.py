"""Small raw data sets, written without calling the package."""

import gzip
import io
import json
import pathlib
import wave
import zipfile

import numpy as np
import pytest
from PIL import Image

from ppnet import config as config_lib

SHARED = pathlib.Path(__file__).parents[3] / "shared" / "data"

needs_shared = pytest.mark.skipif(
  not SHARED.is_dir(), reason="needs ../shared/data"
)


def config(source: config_lib.Source, path, **fields) -> config_lib.DataConfig:
  """A config of one source whose tokenizer needs no file."""
  return config_lib.DataConfig(
    **{
      "source": source,
      "path": str(path),
      "tokenizer": config_lib.TokenizerKind.BYTES,
      "vocab_size": 400,
      "prompt": "",
    }
    | fields
  )


def ids(raw) -> dict[str, list[str]]:
  """Split -> ids of its records, in order."""
  return {
    split: [raw.record(split, i).id for i in range(raw.num_records(split))]
    for split in ("train", "test")
  }


def all_records(raw, split="train"):
  """Every record of a split."""
  return [raw.record(split, i) for i in range(raw.num_records(split))]


def png(value: int, size=(3, 4)) -> bytes:
  """A grey picture of one value."""
  buffer = io.BytesIO()
  Image.fromarray(np.full(size, value, np.uint8)).save(buffer, format="PNG")
  return buffer.getvalue()


def wav(value: int, num_samples: int = 80) -> bytes:
  """A recording of one value at 8 kHz."""
  buffer = io.BytesIO()
  with wave.open(buffer, "wb") as file:
    file.setnchannels(1)
    file.setsampwidth(2)
    file.setframerate(8000)
    file.writeframes(np.full(num_samples, value, "<i2").tobytes())
  return buffer.getvalue()


def zip_of(path: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
  """Writes a zip."""
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
    for name, content in files.items():
      archive.writestr(name, content)
  return path


def folder_of(path: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
  """Writes a folder."""
  for name, content in files.items():
    (path / name).parent.mkdir(parents=True, exist_ok=True)
    (path / name).write_bytes(content)
  return path


def idx(array: np.ndarray) -> bytes:
  """An IDX file of bytes."""
  header = bytes([0, 0, 8, array.ndim])
  header += b"".join(n.to_bytes(4) for n in array.shape)
  return header + array.tobytes()


def write_idx(
  path: pathlib.Path, *, train: int, test: int, shape=(4, 5), compress=False
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Writes a small MNIST; returns (pictures, labels) of each split."""
  rng = np.random.default_rng(1)
  path.mkdir(parents=True, exist_ok=True)
  written = {}
  for split, stem, count in (("train", "train", train), ("test", "t10k", test)):
    pictures = rng.integers(0, 256, (count, *shape), np.uint8)
    labels = (np.arange(count) * 7 % 10).astype(np.uint8)
    for kind, array in (("images-idx3", pictures), ("labels-idx1", labels)):
      content = idx(array)
      name = f"{stem}-{kind}-ubyte"
      if compress:
        (path / f"{name}.gz").write_bytes(gzip.compress(content, mtime=0))
      else:
        (path / name).write_bytes(content)
    written[split] = (pictures, labels)
  return written


def recordings(
  speakers=("ann", "bob"), *, digits=range(10), numbers=range(8)
) -> dict[str, bytes]:
  """Files of a small FSDD."""
  return {
    f"recordings/{digit}_{speaker}_{number}.wav": wav(
      digit * 100 + number + 1000 * place
    )
    for digit in digits
    for place, speaker in enumerate(speakers)
    for number in numbers
  }


def json_lines(rows) -> bytes:
  """Rows as JSON lines."""
  return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def squad(titles, *, per_article: int = 3) -> dict:
  """A SQuAD file with these articles."""
  return {
    "version": "1.1",
    "data": [
      {
        "title": title,
        "paragraphs": [
          {
            "context": f"About {title}, part {p}.",
            "qas": [
              {
                "id": f"{title}-{p}-{q}",
                "question": f" What is {q}? ",
                "answers": [
                  {"text": f"part {p}", "answer_start": 6},
                  {"text": "other", "answer_start": 0},
                ],
              }
              for q in range(2)
            ],
          }
          for p in range(per_article)
        ],
      }
      for title in titles
    ],
  }
