"""Which words a text has, as features of one record: hashed, counted once.

The hashing trick (Weinberger et al. 2009, https://arxiv.org/abs/0902.2206),
without signs: a word's feature is a hash of its bytes, so that no vocabulary
is learnt from a record. The text is read from the stream of tokens, which are
bytes (`data.tokenizers.ByteTokenizer`):

- a word is a run of letters A to Z, whatever their case, or bytes above 127;
  of a longer one the first `num_stem_bytes` count
- its feature is 1, however often the word occurs; of two words that share a
  bucket the larger feature stays
- where the text has several lines, a word of the first has a second feature,
  `heading_weight`

A word is known at its last byte. What stands behind an answer's token is not
read, and neither is the answer, which is a target alone.

| edge case | result |
| --- | --- |
| no text, or no letter in it | zeros |
| one line, or a line break after which nothing comes | no heading |
| padding, <s>, a placeholder, a digit | ends a word, is none |
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from ppnet import config as config_lib

_NUM_BYTES = 256
_LINE_BREAK = ord("\n")
# FNV-1's prime and two odd constants of MurmurHash3's finaliser.
_PRIME = 16777619
_MIX = (0x85EBCA6B, 0xC2B2AE35)
_HEADING_SALT = 0x9E3779B9  # 2^32 over the golden ratio.


def bag(
  tokens: Int[Array, "B T"],
  config: config_lib.WordsConfig,
  *,
  answer_ids: tuple[int, ...],
) -> Float[Array, "B D"]:
  """The features of each row, D of `config.num_buckets`, float32.

  Args:
    tokens: bytes come right after the answers' ids.
    config: see `config.WordsConfig`.
    answer_ids: tokens of the classes.
  """
  text = _bytes(tokens, answer_ids)
  is_word, stems = _words(text, num_bytes=config.num_stem_bytes)
  nowhere = jnp.uint32(config.num_buckets)
  buckets = jnp.where(is_word, _mixed(stems) % nowhere, nowhere)
  values = jnp.ones(tokens.shape)
  if config.heading_weight:
    again = _mixed(stems ^ jnp.uint32(_HEADING_SALT)) % nowhere
    is_heading = is_word & _in_heading(text)
    again = jnp.where(is_heading, again, nowhere)
    buckets = jnp.concatenate([buckets, again], axis=1)
    values = jnp.concatenate([values, config.heading_weight * values], axis=1)
  rows = jnp.arange(tokens.shape[0])[:, None]
  zeros = jnp.zeros((tokens.shape[0], config.num_buckets))
  return zeros.at[rows, buckets].max(values, mode="drop")


def _bytes(
  tokens: Int[Array, "B T"], answer_ids: tuple[int, ...]
) -> Int[Array, "B T"]:
  """The bytes before the first answer, small letters; -1 for what is none."""
  is_answer = jnp.isin(tokens, jnp.array(answer_ids))
  is_later = jax.lax.cummax(is_answer.astype(jnp.int32), axis=1) == 1
  text = tokens - (max(answer_ids) + 1)
  is_none = is_later | (text < 0) | (text >= _NUM_BYTES)
  is_capital = (text >= ord("A")) & (text <= ord("Z"))
  text = jnp.where(is_capital, text + (ord("a") - ord("A")), text)
  return jnp.where(is_none, -1, text)


def _words(
  text: Int[Array, "B T"], *, num_bytes: int
) -> tuple[Bool[Array, "B T"], UInt32[Array, "B T"]]:
  """(where the last counted byte of a word stands, a hash of the word)."""
  is_letter = (text >= ord("a")) & (text <= ord("z")) | (text > 127)
  places = jnp.arange(text.shape[1])[None]
  breaks = jnp.where(is_letter, -1, places)
  # Bytes of the word so far, this one among them.
  length = places - jax.lax.cummax(breaks, axis=1)
  is_last = ~jnp.pad(is_letter[:, 1:], ((0, 0), (0, 1)))
  is_word = is_letter & (
    (is_last & (length <= num_bytes)) | (length == num_bytes)
  )
  stems = jnp.zeros(text.shape, jnp.uint32)
  power = 1
  for back in range(min(num_bytes, text.shape[1])):
    before = jnp.pad(text, ((0, 0), (back, 0)))[:, : text.shape[1]]
    code = jnp.where(length > back, before + 1, 0).astype(jnp.uint32)
    stems += code * jnp.uint32(power)
    power = power * _PRIME % 2**32
  return is_word, stems


def _in_heading(text: Int[Array, "B T"]) -> Bool[Array, "B T"]:
  """Where the first of several lines stands."""
  is_break = text == _LINE_BREAK
  number = jnp.cumsum(is_break, axis=1)
  has_more = (number > 0) & (text >= 0) & ~is_break
  return (number == 0) & has_more.any(axis=1, keepdims=True)


def _mixed(x: UInt32[Array, "B T"]) -> UInt32[Array, "B T"]:
  """MurmurHash3's finaliser: every bit of x moves every bit of the result."""
  for shift, factor in zip((16, 13), _MIX, strict=True):
    x = (x ^ (x >> shift)) * jnp.uint32(factor)
  return x ^ (x >> 16)
