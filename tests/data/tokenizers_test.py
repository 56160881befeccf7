"""Tests of ppnet.data.tokenizers."""

import pathlib
import pickle

import hypothesis
import pytest
from hypothesis import strategies as st

from ppnet import config as config_lib
from ppnet.data import prepare, text, tokenizers

_MODEL = (
  pathlib.Path(__file__).parents[3]
  / "shared/data/tokenizers/sentencepiece/test_model.model"
)


@hypothesis.given(st.text())
def test_bytes_round_trip_and_never_spell_a_special_token(words):
  tokenizer = tokenizers.ByteTokenizer(class_names=["a", "<image>"])
  ids = tokenizer.encode(words)
  assert len(ids) == len(words.encode())
  assert tokenizer.decode(ids) == words
  special = {0, 1, 2, *tokenizer.placeholder_ids.values()}
  assert not (special | set(tokenizer.answer_ids.tolist())) & set(ids)
  assert all(token < tokenizer.vocab_size for token in ids)


def test_byte_tokens_spell_what_is_special():
  tokenizer = pickle.loads(
    pickle.dumps(tokenizers.ByteTokenizer(class_names=["no", "yes"]))
  )
  assert tokenizer.decode([1, *tokenizer.answer_ids, 0]) == (
    "<s><answer:no><answer:yes><pad>"
  )
  special = [0, 1, 2, *tokenizer.placeholder_ids.values()]
  assert len(set(special) | set(tokenizer.answer_ids.tolist())) == 7
  with pytest.raises(ValueError, match="vocab_size=263"):
    tokenizer.decode([263])
  assert tokenizer.decode(tokenizer.encode("é")[:1]) == "\ufffd"


@pytest.mark.skipif(not _MODEL.exists(), reason="needs ../shared/data")
def test_published_model_keeps_its_ids_and_gets_answers(tmp_path):
  config = config_lib.DataConfig(
    tokenizer=config_lib.TokenizerKind.FILE,
    tokenizer_path=str(_MODEL),
    vocab_size=1100,
  )
  prepare.prepare(config, tmp_path, progress=False)
  tokenizer = tokenizers.load(config, tmp_path, class_names=["no", "yes"])
  tokenizer = pickle.loads(pickle.dumps(tokenizer))
  published = text.PretrainedTokenizer.load(_MODEL)
  words = "I saw a girl. <answer:no>"
  assert tokenizer.encode(words) == published.encode(words)
  assert tokenizer.answer_ids.tolist() == [
    published.vocab_size,
    published.vocab_size + 1,
  ]
  assert tokenizer.vocab_size == published.vocab_size + 2
  ids = [*tokenizer.encode("I saw"), tokenizer.answer_ids[1]]
  assert tokenizer.decode(ids) == "I saw<answer:yes>"


def test_missing_model_and_private_digits_are_refused(tmp_path):
  config = config_lib.DataConfig(
    tokenizer=config_lib.TokenizerKind.FILE, tokenizer_path="gone.model"
  )
  with pytest.raises(ValueError, match="tokenizer_path='gone.model'"):
    prepare.prepare(config, tmp_path / "a", progress=False)
  config = config_lib.DataConfig(tokenizer=config_lib.TokenizerKind.PRIVATE)
  with pytest.raises(ValueError, match="tokenizer=PRIVATE"):
    prepare.prepare(config, tmp_path / "b", progress=False)


def test_bytes_need_no_file(tmp_path):
  config = config_lib.DataConfig(
    tokenizer=config_lib.TokenizerKind.BYTES, vocab_size=300
  )
  card = prepare.prepare(config, tmp_path, progress=False)
  assert not (tmp_path / "tokenizer.model").exists()
  assert "byte" in card.tokenizer
  tokenizer = tokenizers.load(config, tmp_path, class_names=card.class_names)
  assert len(tokenizer.answer_ids) == 10
