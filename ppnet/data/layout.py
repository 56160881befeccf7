"""Where a record's parts stand in the token stream, and which tokens count.

    CLASSIFY  <s> <image>... <audio>... prompt text | answer of the class
    ANSWER    <s> <image>... <audio>... prompt text | answer </s>
    CAUSAL    <s> <image>... <audio>... prompt | text

Tokens before the bar are given; those after it are targets that count. Rows are
padded at their end, where a causal decoder's earlier tokens never look.

Text that is too long is cut at its end; an answer never is.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ppnet import config as config_lib
from ppnet.core import checks
from ppnet.data import sources, tokenizers


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
  """A record's tokens, not padded.

  Attributes:
    tokens: int32 [t], the inputs.
    targets: int32 [t], the tokens one position later.
    loss_mask: float32 [t], 1 where a target counts.
    num_bytes: of the text that counts, in UTF-8; 0 for a class.
  """

  tokens: np.ndarray
  targets: np.ndarray
  loss_mask: np.ndarray
  num_bytes: int


class Layout:
  """How records of one data set become tokens. Can be pickled.

  Attributes:
    lengths: numbers of tokens that rows are padded to, increasing.
    longest: the last of them.
    pad_id: what they are padded with.
    answer_ids: int32 [num_classes], the token of each class.
    task: which tokens count.
    counts: modality to the most items of a record.
  """

  def __init__(
    self,
    config: config_lib.ExperimentConfig,
    *,
    counts: Mapping[str, tuple[int, int]],
    has_text: bool,
    tokenizer: tokenizers.Tokenizer,
    text_transforms: Sequence[Any] = (),
  ):
    """Lays out what all records share.

    Args:
      config: decides how many tokens a picture and a recording take.
      counts: modality to the fewest and the most items of a record, of the
        modalities that both the source and the model have.
      has_text: whether records have a text or an answer of their own.
      tokenizer: of the same prepared folder.
      text_transforms: what texts and answers go through before they are
        tokenised.

    Raises:
      ValueError: a sequence may be longer than the decoder's, there is no
        room for text, or the tokenizer has more pieces than the vocabulary.
    """
    self.task = config.data.task
    self.counts = {name: most for name, (_, most) in counts.items()}
    self._fewest = {name: fewest for name, (fewest, _) in counts.items()}
    self._per_item = config_lib.num_media_tokens(config)
    self._tokenizer = tokenizer
    self._has_text = has_text
    self._text_transforms = tuple(text_transforms)
    self._shared: dict[tuple[int, ...], Tokens] = {}
    self.pad_id = tokenizer.pad_id
    self.answer_ids = tokenizer.answer_ids
    self._prompt = (
      tokenizer.encode(config.data.prompt) if config.data.prompt else []
    )
    checks.at_most(
      config.data.vocab_size,
      "Raise config.data.vocab_size (and the decoder's) to the tokenizer's.",
      tokenizer_vocab_size=tokenizer.vocab_size,
    )
    self.lengths = self._lengths(config)
    self.longest = self.lengths[-1]

  def _lengths(self, config: config_lib.ExperimentConfig) -> tuple[int, ...]:
    """The lengths to pad to; raises where media and prompt do not fit."""
    max_seq_len = config.model.decoder.max_seq_len
    taken = {
      name: most * self._per_item[name] for name, most in self.counts.items()
    }
    total = 1 + sum(taken.values()) + len(self._prompt)
    # Text must have room for something: a token, and its answer.
    needed = total + (2 if self._has_text else 0)
    lengths = config.data.lengths
    if not lengths:
      lengths = (max_seq_len if self._has_text else total,)
    if needed > (lengths[-1] if config.data.lengths else max_seq_len):
      checks.fail(
        f"a sequence of at most model.decoder.max_seq_len={max_seq_len} tokens"
        + (f" and data.lengths={lengths}" if config.data.lengths else ""),
        "Raise max_seq_len, shorten config.data.prompt, or let the stems make"
        " fewer tokens.",
        bos=1,
        **taken,
        prompt=len(self._prompt),
        total=needed,
      )
    return tuple(lengths)

  def padded_length(self, num_tokens: int) -> int:
    """The smallest of `lengths` that holds so many tokens."""
    for length in self.lengths:
      if num_tokens <= length:
        return length
    raise AssertionError(num_tokens)  # `tokens` cuts what is longer.

  def tokens(self, record: sources.Record) -> Tokens:
    """Lays out one record.

    Raises:
      sources.BadRecordError: it lacks media, a class, a text or an answer that
        the task asks for, has more than the card says, or its text or answer
        cannot be encoded.
    """
    counts = tuple(len(record.media.get(name, ())) for name in self.counts)
    if self.task is config_lib.Task.CLASSIFY and not record.text:
      # Records of as many items and one class have the same tokens.
      key = (*counts, self._checked_label(record))
      if key not in self._shared:
        self._shared[key] = self._lay_out(record, counts)
      return self._shared[key]
    return self._lay_out(record, counts)

  def _lay_out(self, record: sources.Record, counts: tuple[int, ...]) -> Tokens:
    """The tokens of a record with so many items of each modality."""
    head = [self._tokenizer.bos_id]
    for (name, most), count in zip(self.counts.items(), counts, strict=True):
      if not self._fewest[name] <= count <= most:
        raise sources.BadRecordError(
          record.id,
          f"has {count or 'no'} {name}; {self._fewest[name]} to {most} were"
          " declared.",
        )
      head += [self._tokenizer.placeholder_ids[name]] * (
        count * self._per_item[name]
      )
    head += self._prompt
    given, answer, num_bytes = self._parts(
      record, room=self.longest - len(head)
    )
    whole = np.array(head + given + answer, np.int32)
    loss_mask = np.zeros(len(whole) - 1, np.float32)
    loss_mask[len(whole) - 1 - len(answer) :] = 1
    return Tokens(
      tokens=whole[:-1],
      targets=whole[1:],
      loss_mask=loss_mask,
      num_bytes=num_bytes,
    )

  def _parts(
    self, record: sources.Record, *, room: int
  ) -> tuple[list[int], list[int], int]:
    """(tokens that are given, tokens that count, their bytes)."""
    # The last token is a target alone, so there is room for one more.
    if self.task is config_lib.Task.CLASSIFY:
      label = self._checked_label(record)
      text = self._encode(record, self._clean(record, record.text))[:room]
      return text, [int(self.answer_ids[label])], 0
    if self.task is config_lib.Task.ANSWER:
      words = self._required(record, "answer")
      answer = [*self._encode(record, words), self._tokenizer.eos_id]
      if len(answer) > room + 1:
        raise sources.BadRecordError(
          record.id,
          f"its answer takes {len(answer)} tokens where {room + 1} fit.",
        )
      text = self._encode(record, self._clean(record, record.text))
      return text[: room + 1 - len(answer)], answer, len(words.encode())
    words = self._required(record, "text")
    text = self._encode(record, words)
    kept = text[: room + 1]
    if len(kept) < len(text):
      words = self._tokenizer.decode(kept)
    return [], kept, len(words.encode())

  def _required(self, record: sources.Record, field: str) -> str:
    """A field that must not be empty, clean."""
    words = self._clean(record, getattr(record, field))
    if not words:
      raise sources.BadRecordError(record.id, f"its {field} is empty.")
    return words

  def _clean(self, record: sources.Record, words: str) -> str:
    """A record's own words after the transformations of text."""
    if not words:
      return ""
    element: Mapping[str, Any] = {"id": record.id, "text": words}
    for transform in self._text_transforms:
      element = transform.map(element)
    return element["text"]

  def _encode(self, record: sources.Record, words: str) -> list[int]:
    """The tokens of words; none of nothing."""
    if not words:
      return []
    try:
      return self._tokenizer.encode(words)
    except ValueError as error:  # It spells a special piece, or a surrogate.
      raise sources.BadRecordError(
        record.id, f"its text cannot be encoded ({error})."
      ) from error

  def _checked_label(self, record: sources.Record) -> int:
    """The record's label, which must be a class."""
    label, count = record.label, len(self.answer_ids)
    if not isinstance(label, int) or not 0 <= label < count:
      raise sources.BadRecordError(
        record.id, f"its label {label!r} is none of {count} classes."
      )
    return label


def given_tokens(
  example: Mapping[str, np.ndarray], task: config_lib.Task
) -> list[int]:
  """The tokens of an example that generation begins with.

  What comes before the answer; of a text that counts as a whole, its first
  half.
  """
  counted = np.flatnonzero(example["loss_mask"])
  end = counted[0] + 1
  if task is config_lib.Task.CAUSAL:
    end += len(counted) // 2
  return example["tokens"][:end].tolist()
