"""Texts: UTF-8 bytes to token ids, one Grain transformation for each step.

`Decode` -> `Nfkc` -> `Tokenize`. There is no augmentation of text. Padding and
packing of token ids are in `batching` and `packing`. The tokenizers themselves
are in `text`, which loads without Grain.

>>> element = {"id": "a", "text": "ｆｕｌｌ width ①".encode()}
>>> for transform in (Decode(max_chars=100), Nfkc()):
...   element = transform.map(element)
>>> element["text"]
'full width 1'
"""

import codecs
import dataclasses
import functools
import re
import sys
import unicodedata
from collections.abc import Mapping
from typing import Any, ClassVar

import grain
import numpy as np

from ppnet.core import checks
from ppnet.data import sources, text

# A UTF-8 character has at most so many bytes.
_MAX_BYTES_PER_CHAR = 4
# UAX #15 (Unicode 16), section 13, Stream-Safe Text Format: longer runs of
# marks are of no language, and ordering them takes quadratic time.
_MAX_MARKS = 30
_GRAPHEME_JOINER = "\u034f"
_BYTE_ORDER_MARK = "\ufeff"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decode(grain.transforms.Map):
  """UTF-8 bytes, or a str, -> str of at most `max_chars` characters.

  The cut comes first: of a text of ten megabytes only the first
  `4 * max_chars` bytes are looked at. So bytes behind them need not be valid,
  and every later step costs as much as for a short text. A character is a
  Unicode code point; a mark may be cut off its letter.

  | text | result |
  | --- | --- |
  | a byte order mark before it | left out |
  | none, empty, or white space alone | `BadRecordError` |
  | invalid UTF-8, or a str with half a surrogate pair | `BadRecordError` |

  Attributes:
    max_chars: what is longer is cut at its end.
  """

  max_chars: int

  kind: ClassVar[str] = "decode"

  def __post_init__(self):
    checks.positive(max_chars=self.max_chars)

  @property
  def label(self) -> str:
    """Words for a table."""
    return f"UTF-8, at most {self.max_chars:,} characters"

  def map(self, element: Mapping[str, Any]) -> dict[str, Any]:
    """Decodes `element["text"]`.

    Raises:
      sources.BadRecordError: there is no text, or see the table.
    """
    content = element["text"]
    if content is None:
      raise sources.BadRecordError(element["id"], "has no text.")
    try:
      if isinstance(content, str):
        written = content[: self.max_chars + 1]
        written.encode()  # Raises where half a pair stands alone.
      else:
        # One character more than is kept, and one for a byte order mark.
        part = content[: _MAX_BYTES_PER_CHAR * (self.max_chars + 1)]
        decoder = codecs.getincrementaldecoder("utf-8")()
        written = decoder.decode(part, final=len(part) == len(content))
    except (UnicodeError, TypeError) as error:
      raise sources.BadRecordError(
        element["id"], f"the text is no valid Unicode ({error})."
      ) from error
    written = written.removeprefix(_BYTE_ORDER_MARK)[: self.max_chars]
    return {**element, "text": _not_blank(element, written)}


def _not_blank(element: Mapping[str, Any], written: str) -> str:
  """Returns the text, which holds more than white space."""
  if not written or written.isspace():
    raise sources.BadRecordError(element["id"], "the text is empty.")
  return written


@functools.cache
def _long_runs() -> re.Pattern[str]:
  """Finds `_MAX_MARKS` marks that another one follows."""
  marks = "".join(
    re.escape(chr(code))
    for code in range(sys.maxunicode + 1)
    if unicodedata.combining(chr(code))
  )
  return re.compile(f"([{marks}]{{{_MAX_MARKS}}})(?=[{marks}])")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nfkc(grain.transforms.Map):
  """str -> str in Unicode normalisation form KC.

  Compatible spellings of a character (full width, ligatures, circled numbers,
  a letter and its mark) become one (UAX #15). It stands after `Decode`, which
  has cut the text. In runs of more than 30 marks a joiner is put after each 30
  of them, as the Stream-Safe Text Format has it. The result can be longer than
  the text, 18 times at most.
  """

  kind: ClassVar[str] = "normalisation"

  @property
  def label(self) -> str:
    """Words for a table."""
    return "Unicode NFKC"

  def map(self, element: Mapping[str, Any]) -> dict[str, Any]:
    """Normalises `element["text"]`.

    Raises:
      sources.BadRecordError: nothing but white space is left.
    """
    written = element["text"]
    if not written.isascii():  # ASCII is in every normalisation form.
      written = _long_runs().sub(rf"\1{_GRAPHEME_JOINER}", written)
      written = unicodedata.normalize("NFKC", written)
    return {**element, "text": _not_blank(element, written)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenize(grain.transforms.Map):
  """str -> token ids int32 [n], 1 <= n <= max_tokens, by SentencePiece.

  The model is read when the first text comes, once in each process.

  Attributes:
    model_path: file of the serialised model.
    class_names: of a tokenizer of one's own (`text.Tokenizer`); None: the model
      is a published one (`text.PretrainedTokenizer`).
    max_tokens: what is longer is cut at its end, and has no </s> then.
    bos: begin with <s>.
    eos: end with </s>.
  """

  model_path: str
  class_names: tuple[str, ...] | None = None
  max_tokens: int
  bos: bool = False
  eos: bool = False

  kind: ClassVar[str] = "feature extraction"

  def __post_init__(self):
    checks.positive(max_tokens=self.max_tokens)

  @property
  def label(self) -> str:
    """Words for a table."""
    return f"SentencePiece, at most {self.max_tokens:,} tokens"

  @functools.cached_property
  def tokenizer(self) -> text.Tokenizer | text.PretrainedTokenizer:
    """The tokenizer.

    Raises:
      ValueError: the file holds no such model.
      OSError: it cannot be read.
    """
    if self.class_names is None:
      return text.PretrainedTokenizer.load(self.model_path)
    return text.Tokenizer.load(self.model_path, class_names=self.class_names)

  def map(self, element: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces the text `element["text"]` by its ids.

    Raises:
      sources.BadRecordError: the text spells a special piece of the tokenizer,
        such as <image>, or no token comes out of it.
    """
    tokenizer = self.tokenizer
    try:
      ids = tokenizer.encode(element["text"])
    except ValueError as error:
      raise sources.BadRecordError(
        element["id"], f"its text cannot be tokenised ({error})."
      ) from error
    if not ids:
      raise sources.BadRecordError(element["id"], "no token is in its text.")
    ids = [tokenizer.bos_id] * self.bos + ids + [tokenizer.eos_id] * self.eos
    return {**element, "text": np.array(ids[: self.max_tokens], np.int32)}
