"""The tokenizer of a prepared data set, whatever its kind.

| `data.tokenizer` | what it learnt from | covered by the guarantee |
| --- | --- | --- |
| PUBLIC | sentences that `data.text` writes itself, and the prompt | yes |
| BYTES | nothing: a token is a byte | yes |
| FILE | what its publisher took | yes, where that was not these records |
| PRIVATE | the training records | **no**, and the record says so |

>>> tokenizer = ByteTokenizer(class_names=["cat", "dog"])
>>> tokenizer.decode(tokenizer.encode("Fine."))
'Fine.'
"""

import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from ppnet import config as config_lib
from ppnet.core import checks
from ppnet.data import text

FILE_NAME = "tokenizer.model"


class Tokenizer(Protocol):
  """What the layout of tokens needs.

  Attributes:
    pad_id: stands where a row has no token.
    bos_id: begins a sequence.
    eos_id: ends one.
    placeholder_ids: modality to the id whose places its embeddings take.
    answer_ids: id of each class, int32 [num_classes].
    vocab_size: every id is below it.
  """

  pad_id: int
  bos_id: int
  eos_id: int
  placeholder_ids: dict[str, int]
  answer_ids: np.ndarray

  @property
  def vocab_size(self) -> int:
    """Number of tokens."""
    ...

  def encode(self, text: str) -> list[int]:
    """The ids of ordinary text; none of them is a special one."""
    ...

  def decode(self, ids: Iterable[int]) -> str:
    """The text of some ids."""
    ...


class ByteTokenizer:
  """UTF-8 bytes as tokens, after the special ones. Can be pickled.

      <pad> <s> </s> <image> <audio> answers... bytes 0 to 255

  Nothing is learnt, nothing is unknown, and no text becomes a special id.
  """

  def __init__(self, *, class_names: Sequence[str]):
    """Numbers the special ids; `class_names` have one answer id each."""
    self.pad_id, self.bos_id, self.eos_id = range(3)
    first = self.eos_id + 1
    self.placeholder_ids = {
      name: first + place for place, name in enumerate(config_lib.MODALITIES)
    }
    first += len(config_lib.MODALITIES)
    self.answer_ids = np.arange(first, first + len(class_names), dtype=np.int32)
    self._first_byte = first + len(class_names)
    self._spelling = {
      self.pad_id: text.PAD,
      self.bos_id: text.BOS,
      self.eos_id: text.EOS,
      **{
        token: text.placeholder_piece(name)
        for name, token in self.placeholder_ids.items()
      },
      **{
        int(token): text.answer_piece(name)
        for token, name in zip(self.answer_ids, class_names, strict=True)
      },
    }

  @property
  def vocab_size(self) -> int:
    """256 bytes and the special ids."""
    return self._first_byte + 256

  def encode(self, text: str) -> list[int]:
    """Returns an id per byte."""
    content = np.frombuffer(text.encode(), np.uint8)
    return (content.astype(np.int32) + self._first_byte).tolist()

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text; bytes that are no UTF-8 become U+FFFD.

    Raises:
      ValueError: an id that is not below `vocab_size`.
    """
    out = bytearray()
    for token in map(int, ids):
      if not 0 <= token < self.vocab_size:
        checks.fail(f"ids below vocab_size={self.vocab_size}", id=token)
      if token >= self._first_byte:
        out.append(token - self._first_byte)
      else:
        out += self._spelling[token].encode()
    return out.decode(errors="replace")


class PublishedTokenizer:
  """A published SentencePiece model with answers after its other added ids.

  See `text.PretrainedTokenizer`. Can be pickled.
  """

  def __init__(self, model: bytes, *, class_names: Sequence[str]):
    """Loads a model; raises `ValueError` if it is none."""
    self._model, self._class_names = model, tuple(class_names)
    self._inner = text.PretrainedTokenizer(model)
    self.pad_id = self._inner.pad_id
    self.bos_id = self._inner.bos_id
    self.eos_id = self._inner.eos_id
    self.placeholder_ids = self._inner.placeholder_ids
    first = self._inner.vocab_size
    self.answer_ids = np.arange(first, first + len(class_names), dtype=np.int32)
    self._spelling = {
      int(token): text.answer_piece(name)
      for token, name in zip(self.answer_ids, class_names, strict=True)
    }

  def __reduce__(self):
    return (_rebuild_published, (self._model, self._class_names))

  @property
  def vocab_size(self) -> int:
    """The model's pieces, the added ids and the answers."""
    return self._inner.vocab_size + len(self._class_names)

  def encode(self, text: str) -> list[int]:
    """Returns the ids that the model's own code gives, without <s>."""
    return self._inner.encode(text)

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text; answers and added ids by their spelling."""
    out: list[str] = []
    run: list[int] = []
    for token in map(int, ids):
      if token in self._spelling:
        out += [self._inner.decode(run), self._spelling[token]]
        run = []
      else:
        run.append(token)
    return "".join([*out, self._inner.decode(run)])


def _rebuild_published(
  model: bytes, class_names: tuple[str, ...]
) -> PublishedTokenizer:
  """Unpickles a `PublishedTokenizer`."""
  return PublishedTokenizer(model, class_names=class_names)


def load(
  config: config_lib.DataConfig,
  prepared_dir: str | os.PathLike[str],
  *,
  class_names: Sequence[str],
) -> Tokenizer:
  """The tokenizer of a prepared folder.

  Raises:
    ValueError: its file is no SentencePiece model, or another data set's.
  """
  if config.tokenizer is config_lib.TokenizerKind.BYTES:
    return ByteTokenizer(class_names=class_names)
  content = (pathlib.Path(prepared_dir) / FILE_NAME).read_bytes()
  if config.tokenizer is config_lib.TokenizerKind.FILE:
    return PublishedTokenizer(content, class_names=class_names)
  return text.Tokenizer(content, class_names=class_names)
