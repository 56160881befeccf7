"""Text: SentencePiece tokenizers, one's own and published ones.

One's own (`train_tokenizer`, `Tokenizer`) is made from public sentences only.
The vocabulary is learnt from sentences that this module writes itself and from
the prompt in the config, never from records, so the tokenizer reveals nothing
about them. Special pieces come first: <pad>, <s>, </s>, <unk>, <image>,
<audio>, then one answer piece per class such as <answer:7>, a spelling that
ordinary text does not have.

A published one (`PretrainedTokenizer`: Llama, Llama 2, Mistral) keeps all of
its ids; the special pieces that it lacks come after them.

>>> content = train_tokenizer(
...   public_sentences("Which one?"),
...   vocab_size=96,
...   class_names=["cat", "dog"],
... )
>>> tokenizer = Tokenizer(content, class_names=["cat", "dog"])
>>> tokenizer.decode(tokenizer.encode("Which one?"))
'Which one?'
"""

import io
import os
import pathlib
import re
from collections.abc import Iterable, Sequence

import numpy as np
import sentencepiece

from ppnet import config as config_lib
from ppnet.core import checks, records

PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"
# One of SentencePiece's 256 byte pieces costs a vocabulary entry.
_NUM_BYTES = 256

_TEMPLATES = (
  "the picture shows the digit {}.",
  "in this image somebody wrote a {} by hand.",
  "the key that was pressed is {}.",
  "this sound is the tone of the number {}.",
  "which digit is written here? it is {}.",
  "which digit was dialled? it was {}.",
  "look at the picture, then listen to the recording: {}.",
)
_DIGITS = "0 1 2 3 4 5 6 7 8 9"
_DIGIT_WORDS = "zero one two three four five six seven eight nine"
# What a published vocabulary lacks, in the order of the added ids. Append only:
# a trained embedding's rows are known by these numbers.
_ADDED = (
  PAD,
  *(f"<{name}>" for name in config_lib.MODALITIES),
  "<user>",
  "</user>",
)
# A part of a prompt: plain text, or (a modality, its number of tokens), or
# ("user", what the user wrote).
Part = str | tuple[str, int] | tuple[str, str]
# What the prompt weighs among the sentences: its pieces become long ones,
# which makes every sequence shorter.
_PROMPT_REPEATS = 20


def placeholder_piece(modality: str) -> str:
  """Returns the piece whose place one embedding of a modality takes."""
  return f"<{modality}>"


def answer_piece(class_name: str) -> str:
  """Returns the piece that stands for a class."""
  return f"<answer:{class_name}>"


def _special_pieces(class_names: Sequence[str]) -> list[str]:
  """What text may not spell: placeholders, then answers."""
  return [
    *(placeholder_piece(name) for name in config_lib.MODALITIES),
    *(answer_piece(name) for name in class_names),
  ]


def public_sentences(prompt: str) -> list[str]:
  """Writes the public text that a tokenizer is trained on.

  Args:
    prompt: the public prompt; every character of it gets a piece.

  Returns:
    Some hundred sentences about pictures, sounds and digits, and the prompt.
  """
  sentences = [
    template.format(digit)
    for template in _TEMPLATES
    for digit in f"{_DIGITS} {_DIGIT_WORDS}".split()
  ]
  return sentences + [prompt] * _PROMPT_REPEATS


def train_tokenizer(
  sentences: Iterable[str],
  *,
  vocab_size: int,
  class_names: Sequence[str],
  model_path: str | os.PathLike[str] | None = None,
) -> bytes:
  """Trains a byte-pair SentencePiece model; the same bytes for the same input.

  Text is taken as it is (no Unicode normalisation, spaces kept), so decoding
  gives back what was encoded wherever the characters are known. Bytes stand in
  for unknown characters (`byte_fallback`) where the vocabulary has room for
  256 more pieces.

  Source: Kudo and Richardson 2018, https://arxiv.org/abs/1808.06226, section 3.

  Args:
    sentences: public text.
    vocab_size: upper bound on the number of pieces; short text gives fewer.
    class_names: one answer piece each, in this order.
    model_path: where to write the model, atomically; None writes nothing.

  Returns:
    The serialised model.

  Raises:
    ValueError: the vocabulary cannot hold the special pieces and every
      character, a class name is repeated, or the text already contains a
      special piece.
  """
  sentences = list(sentences)
  pieces = _special_pieces(class_names)
  if len(set(pieces)) != len(pieces):
    checks.fail("class names that differ", class_names=list(class_names))
  for sentence in sentences:
    _check_plain(sentence, class_names=class_names)
  # SentencePiece counts a space as one more character of its own.
  characters = set("".join(sentences).replace(" ", "\u2581")) | {"\u2581"}
  smallest = len((PAD, BOS, EOS, UNK)) + len(pieces) + len(characters)
  if vocab_size < smallest:
    checks.fail(
      f"vocab_size >= {smallest}, which is {len(pieces) + 4} special pieces"
      f" and {len(characters)} characters",
      "Raise config.data.vocab_size.",
      vocab_size=vocab_size,
    )
  model = io.BytesIO()  # In memory: a path would end up inside the model.
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(sentences),
    model_writer=model,
    model_type="bpe",
    vocab_size=vocab_size,
    hard_vocab_limit=False,
    character_coverage=1.0,
    byte_fallback=vocab_size >= smallest + _NUM_BYTES,
    normalization_rule_name="identity",
    remove_extra_whitespaces=False,
    user_defined_symbols=pieces,
    pad_id=0,
    bos_id=1,
    eos_id=2,
    unk_id=3,
    pad_piece=PAD,
    bos_piece=BOS,
    eos_piece=EOS,
    unk_piece=UNK,
    num_threads=1,  # Byte-pair merges draw nothing, so this fixes the bytes.
    minloglevel=2,
  )
  content = model.getvalue()
  if model_path is not None:
    records.write_bytes(pathlib.Path(model_path), content)
  return content


class Tokenizer:
  """A trained SentencePiece model with the ids of its special pieces.

  Can be pickled. Padding is id 0, so a row of zeros is a row of padding.
  """

  def __init__(self, model: bytes, *, class_names: Sequence[str]):
    """Loads a model.

    Args:
      model: what `train_tokenizer` returned.
      class_names: the classes it was trained with.

    Raises:
      ValueError: the bytes are no model, or it lacks a special piece.
    """
    self._model = model
    self._class_names = tuple(class_names)
    self._processor = _load_model(
      model, "Run the PREPARE job again in an empty prepared_dir."
    )
    self.pad_id = self._special_id(PAD)
    self.bos_id = self._special_id(BOS)
    self.eos_id = self._special_id(EOS)
    self.placeholder_ids = {
      name: self._special_id(placeholder_piece(name))
      for name in config_lib.MODALITIES
    }
    answers = [self._special_id(answer_piece(name)) for name in class_names]
    self.answer_ids = np.array(answers, np.int32)  # [num_classes]

  @classmethod
  def load(
    cls, path: str | os.PathLike[str], *, class_names: Sequence[str]
  ) -> "Tokenizer":
    """Reads the model at `path`."""
    return cls(pathlib.Path(path).read_bytes(), class_names=class_names)

  def __reduce__(self):
    return (_rebuild, (self._model, self._class_names))

  @property
  def vocab_size(self) -> int:
    """Number of pieces; every id is below it."""
    return self._processor.vocab_size()

  def encode(self, text: str) -> list[int]:
    """Returns the ids of ordinary text, without <s> and </s>.

    Raises:
      ValueError: the text spells a placeholder or an answer, which would
        otherwise become that special piece.
    """
    _check_plain(text, class_names=self._class_names)
    return self._processor.encode(text)

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text; placeholders and answers by their spelling."""
    return self._processor.decode([int(token) for token in ids])

  def _special_id(self, piece: str) -> int:
    """Returns the id of a special piece that must be there."""
    token = self._processor.piece_to_id(piece)
    if self._processor.id_to_piece(token) != piece:
      checks.fail(
        f"the tokenizer to have the piece {piece!r}",
        "Run the PREPARE job again in an empty prepared_dir.",
        class_names=self._class_names,
      )
    return token


class PretrainedTokenizer:
  """A published SentencePiece model, with special pieces after its own.

  Text becomes exactly the ids that the model's own code gives it: its
  normalisation, its leading space, its byte pieces for unknown characters. No
  text whatever becomes a special id, added or not, so that a user cannot write
  the end of their own span. The added ids begin at the model's vocabulary size:

      <pad> <image> <audio> <user> </user>

  Can be pickled.

  Attributes:
    special_ids: added piece to its id.
    pad_id: id of the added <pad>.
    bos_id: id that begins a sequence.
    eos_id: id that ends one.
    placeholder_ids: modality to the id whose places its embeddings take.
  """

  def __init__(self, model: bytes):
    """Loads a model.

    Args:
      model: the content of a `tokenizer.model`.

    Raises:
      ValueError: the bytes are no SentencePiece model, or it has no ids for the
        beginning and the end of a sequence.
    """
    self._model = model
    self._processor = _load_model(
      model, "Llama 3's tokenizer is of another kind and is not read."
    )
    self._num_pieces = self._processor.vocab_size()
    self.bos_id = self._processor.bos_id()
    self.eos_id = self._processor.eos_id()
    if min(self.bos_id, self.eos_id) < 0:
      checks.fail(
        "a model with ids for <s> and </s>",
        bos_id=self.bos_id,
        eos_id=self.eos_id,
      )
    self.special_ids = {
      piece: self._num_pieces + place for place, piece in enumerate(_ADDED)
    }
    self.pad_id = self.special_ids[PAD]
    self.placeholder_ids = {
      name: self.special_ids[placeholder_piece(name)]
      for name in config_lib.MODALITIES
    }
    self._spelling = {token: piece for piece, token in self.special_ids.items()}

  @classmethod
  def load(cls, path: str | os.PathLike[str]) -> "PretrainedTokenizer":
    """Reads the model at `path`."""
    return cls(pathlib.Path(path).read_bytes())

  def __reduce__(self):
    return (PretrainedTokenizer, (self._model,))

  @property
  def vocab_size(self) -> int:
    """Number of pieces, added ones included; every id is below it."""
    return self._num_pieces + len(_ADDED)

  def encode(
    self, text: str, *, bos: bool = False, eos: bool = False
  ) -> list[int]:
    """Returns the ids of a text, between <s> and </s> if asked for."""
    ids = self._processor.encode(text)
    return [self.bos_id] * bos + ids + [self.eos_id] * eos

  def encode_parts(
    self, parts: Iterable[Part], *, bos: bool = True
  ) -> list[int]:
    """Returns the ids of a prompt of several parts.

    >>> from ppnet.data import text  # doctest: +SKIP
    >>> tokenizer.encode_parts(  # doctest: +SKIP
    ...   [("image", 16), ("user", "What is it?"), "It is"])

    Args:
      parts: each is plain text; or a modality and its number of tokens; or
        "user" and what the user wrote, which is put between <user> and </user>.
      bos: whether the prompt begins with <s>.

    Raises:
      ValueError: a part of another kind.
    """
    ids = [self.bos_id] * bos
    for part in parts:
      match part:
        case str():
          ids += self.encode(part)
        case ("user", str() as written):
          ids.append(self.special_ids["<user>"])
          ids += self.encode(written)
          ids.append(self.special_ids["</user>"])
        case (str() as name, int() as count) if name in self.placeholder_ids:
          ids += [self.placeholder_ids[name]] * count
        case _:
          checks.fail(
            f"text, ('user', text), or one of {config_lib.MODALITIES} and a"
            " number of tokens",
            part=part,
          )
    return ids

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text; added pieces by their spelling, <s> and </s> left out.

    Raises:
      ValueError: an id that is not below `vocab_size`.
    """
    out, run = [], []
    for token in map(int, ids):
      if not 0 <= token < self.vocab_size:
        checks.fail(f"ids below vocab_size={self.vocab_size}", id=token)
      if token in self._spelling:
        out += [self._processor.decode(run), self._spelling[token]]
        run = []
      else:
        run.append(token)
    return "".join([*out, self._processor.decode(run)])

  def pieces(self, text: str) -> list[str]:
    """Returns how a text is cut; an unknown character stands for itself."""
    return self._processor.encode(text, out_type=str)


def _load_model(
  model: bytes, remedy: str
) -> sentencepiece.SentencePieceProcessor:
  """Loads a serialised model; raises `ValueError` if it is none."""
  processor = sentencepiece.SentencePieceProcessor()
  try:
    processor.LoadFromSerializedProto(model)
  except RuntimeError as error:
    raise ValueError(
      f"Expected a SentencePiece model, got {len(model)} bytes that are none"
      f" ({error}). {remedy}"
    ) from error
  return processor


def _rebuild(model: bytes, class_names: tuple[str, ...]) -> Tokenizer:
  """Unpickles a `Tokenizer`."""
  return Tokenizer(model, class_names=class_names)


def _check_plain(text: str, *, class_names: Sequence[str]) -> None:
  """Raises `ValueError` if `text` spells a special piece."""
  special = _special_pieces(class_names)
  found = re.search("|".join(map(re.escape, special)), text)
  if found:
    checks.fail(
      f"text without {found.group()!r}",
      "That spelling is reserved for what is not text; use other words.",
      text=text,
    )
