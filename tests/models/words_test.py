"""A bag of hashed words against one in plain Python; what it must not see."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppnet import config as config_lib
from ppnet.data import tokenizers
from ppnet.models import words

_NUM_BUCKETS = 97
_TEXTS = (
  "",
  "12 - 34!",
  "A dress; a DRESS, the dress",
  "disappointed disappointing dis",
  "Très joli, très cher",
  "Love it\nI love it, all of it.",
  "No second line\n",
  "\nno heading, two\nlines",
  "three\nlines of\nwords",
)


def tokenizer():
  return tokenizers.ByteTokenizer(class_names=["no", "yes"])


def rows(texts, *, length=64, behind=()):
  """<s>, the text, what stands behind it, padding."""
  own = tokenizer()
  out = np.full((len(texts), length), own.pad_id, np.int32)
  for row, text in zip(out, texts, strict=True):
    ids = [own.bos_id, *own.encode(text), *behind]
    row[: len(ids)] = ids
  return jnp.array(out)


def bag(tokens, **changes):
  changes = {"num_buckets": _NUM_BUCKETS, "num_stem_bytes": 5, **changes}
  one_program = jax.jit(  # Much faster than operation by operation.
    functools.partial(
      words.bag,
      config=config_lib.WordsConfig(**changes),
      answer_ids=tuple(tokenizer().answer_ids.tolist()),
    )
  )
  return np.array(one_program(tokens))


def bucket(word, *, salt=0):
  """The hash of a word's bytes with exact integers."""
  x = salt
  stem = 0
  for place, byte in enumerate(reversed(word)):
    stem += (byte + 1) * 16777619**place
  x ^= stem % 2**32
  x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
  x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
  return (x ^ x >> 16) % _NUM_BUCKETS


def expected(text, *, heading_weight):
  features = np.zeros(_NUM_BUCKETS, np.float32)
  content = text.encode().lower()
  runs = rb"[a-z\x80-\xff]+"
  for word in re.findall(runs, content):
    at = bucket(word[:5])
    features[at] = max(features[at], 1.0)
  first, *others = content.split(b"\n")
  if b"".join(others):
    for word in re.findall(runs, first):
      at = bucket(word[:5], salt=0x9E3779B9)
      features[at] = max(features[at], heading_weight)
  return features


@pytest.mark.parametrize("heading_weight", [0.0, 2.0])
def test_the_bag_is_that_of_a_loop_over_words(heading_weight):
  found = bag(rows(_TEXTS), heading_weight=heading_weight)
  for text, row in zip(_TEXTS, found, strict=True):
    np.testing.assert_array_equal(
      row, expected(text, heading_weight=heading_weight), err_msg=repr(text)
    )
  assert (found[:2] == 0).all()
  is_headed = (found == 2.0).any(axis=1)
  assert is_headed.tolist() == [
    heading_weight > 0 and n in (5, 8) for n in range(len(_TEXTS))
  ]


def test_a_stem_may_be_longer_than_the_row():
  tokens = rows(["dress"], length=7)
  assert (bag(tokens, num_stem_bytes=40) == bag(tokens)).all()


def test_neither_padding_nor_the_answer_nor_what_follows_it_is_read():
  own = tokenizer()
  alone = bag(rows(_TEXTS), heading_weight=2.0)
  longer = bag(rows(_TEXTS, length=80), heading_weight=2.0)
  np.testing.assert_array_equal(longer, alone)
  for answer in own.answer_ids.tolist():
    behind = (answer, *own.encode(" later\nwords"), own.eos_id)
    found = bag(rows(_TEXTS, length=96, behind=behind), heading_weight=2.0)
    np.testing.assert_array_equal(found, alone)
  # Fails if: a class has a feature of its own, or the text behind it has.
