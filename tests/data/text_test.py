"""Tests of ppnet.data.text."""

import json
import pathlib
import pickle
import re

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from ppnet import config as config_lib
from ppnet.data import text

_PROMPT = config_lib.DataConfig().prompt
_DIGITS = [str(digit) for digit in range(10)]


def _train(*, vocab_size=96, class_names=_DIGITS, prompt=_PROMPT, **options):
  return text.train_tokenizer(
    text.public_sentences(prompt),
    vocab_size=vocab_size,
    class_names=class_names,
    **options,
  )


@pytest.fixture(scope="module")
def model() -> bytes:
  return _train()


@pytest.fixture(scope="module")
def tokenizer(model) -> text.Tokenizer:
  return text.Tokenizer(model, class_names=_DIGITS)


def test_two_trainings_give_the_same_bytes(model, tmp_path):
  path = tmp_path / "tokenizer.model"
  assert _train(model_path=path) == model
  assert path.read_bytes() == model
  assert str(tmp_path).encode() not in model


def test_ids_are_distinct_and_below_the_vocabulary(tokenizer):
  special = [
    tokenizer.pad_id,
    tokenizer.bos_id,
    tokenizer.eos_id,
    tokenizer.placeholder_ids["image"],
    tokenizer.placeholder_ids["audio"],
    *tokenizer.answer_ids.tolist(),
  ]
  assert len(set(special)) == 15
  assert tokenizer.pad_id == 0
  assert tokenizer.answer_ids.shape == (10,)
  assert tokenizer.answer_ids.dtype == np.int32
  assert max(special) < tokenizer.vocab_size <= 96


def test_every_answer_is_one_piece_and_decodes_to_its_name(tokenizer):
  for digit, answer_id in enumerate(tokenizer.answer_ids):
    assert tokenizer.decode([answer_id]) == f"<answer:{digit}>"
  assert tokenizer.decode([tokenizer.placeholder_ids["image"]]) == "<image>"
  assert tokenizer.decode([tokenizer.bos_id, tokenizer.pad_id]) == ""


def test_prompt_round_trips_in_few_known_pieces(tokenizer):
  ids = tokenizer.encode(_PROMPT)
  assert tokenizer.decode(ids) == _PROMPT
  assert len(ids) < len(_PROMPT) / 2
  assert not set(ids) & set(range(16))  # No special piece, none unknown.


@hypothesis.settings(derandomize=True, deadline=None)
@hypothesis.given(
  st.text(alphabet="abcdefghilmnoprstuwyz 0123456789.,?", max_size=40)
)
def test_text_of_known_characters_round_trips(tokenizer, sentence):
  assert tokenizer.decode(tokenizer.encode(sentence)) == sentence


def test_bytes_stand_in_where_the_vocabulary_has_room():
  sentence = "caf\u00e9 \u4e16\u754c"
  small = text.Tokenizer(_train(), class_names=_DIGITS)
  large = text.Tokenizer(_train(vocab_size=500), class_names=_DIGITS)
  assert small.decode(small.encode(sentence)) != sentence
  assert large.decode(large.encode(sentence)) == sentence
  assert large.vocab_size <= 500


def test_class_names_of_any_spelling_are_one_piece_each():
  names = ["a b", "a,b", 'say "x"', "\u00e9t\u00e9", "7", "image", "<s>"]
  tokenizer = text.Tokenizer(_train(class_names=names), class_names=names)
  assert len(set(tokenizer.answer_ids.tolist())) == len(names)
  for name, answer_id in zip(names, tokenizer.answer_ids, strict=True):
    assert tokenizer.decode([answer_id]) == f"<answer:{name}>"


def test_reserved_spelling_never_becomes_a_special_piece(tokenizer):
  for sentence in ("see <image>", "it is <answer:3>!", "<audio>"):
    with pytest.raises(ValueError, match="reserved"):
      tokenizer.encode(sentence)
    with pytest.raises(ValueError, match="reserved"):
      _train(prompt=sentence)
  # Control pieces are no text: their spelling is cut into characters.
  assert tokenizer.bos_id not in tokenizer.encode("<s>")


def test_small_vocabulary_names_the_smallest_possible():
  with pytest.raises(ValueError, match="Raise config.data.vocab_size") as info:
    _train(vocab_size=20)
  smallest = int(re.search(r"vocab_size >= (\d+)", str(info.value)).group(1))
  assert len(_train(vocab_size=smallest)) > 0
  with pytest.raises(ValueError, match=f"vocab_size >= {smallest}"):
    _train(vocab_size=smallest - 1)


def test_large_vocabulary_gives_what_the_text_has():
  tokenizer = text.Tokenizer(_train(vocab_size=9000), class_names=_DIGITS)
  assert 96 < tokenizer.vocab_size < 9000


def test_repeated_class_is_refused():
  with pytest.raises(ValueError, match="class names that differ"):
    _train(class_names=["a", "a"])


def test_wrong_model_or_classes_are_named(model):
  with pytest.raises(ValueError, match="SentencePiece model.*PREPARE"):
    text.Tokenizer(b"not a model", class_names=[])
  with pytest.raises(ValueError, match="<answer:cat>"):
    text.Tokenizer(model, class_names=["cat"])


def test_pickled_tokenizer_encodes_the_same(tokenizer):
  copy = pickle.loads(pickle.dumps(tokenizer))
  assert copy.encode(_PROMPT) == tokenizer.encode(_PROMPT)
  np.testing.assert_array_equal(copy.answer_ids, tokenizer.answer_ids)


def test_public_text_has_some_hundred_sentences():
  sentences = text.public_sentences(_PROMPT)
  assert len(set(sentences)) > 100
  assert _PROMPT in sentences


# Published models.

_SHARED = pathlib.Path(__file__).parents[3] / "shared" / "data" / "tokenizers"
_MODELS = (
  "sentencepiece/test_model.model",
  "sentencepiece/test_ja_model.model",
  "mistral-common/tokenizer.model.v1",
)
_MISTRAL = _MODELS[-1]
needs_published_models = pytest.mark.skipif(
  not _SHARED.is_dir(), reason="needs ../shared/data/tokenizers"
)


@pytest.fixture(scope="module")
def published():
  """Tokenizers by their path, loaded once."""
  return {
    name: text.PretrainedTokenizer.load(_SHARED / name) for name in _MODELS
  }


@needs_published_models
@pytest.mark.parametrize("name", _MODELS)
def test_published_models_give_the_recorded_vectors(name, published):
  recorded = json.loads((_SHARED / "vectors.json").read_text())["models"]
  assert set(recorded) == set(_MODELS)
  expected, tokenizer = recorded[name], published[name]
  assert (tokenizer.bos_id, tokenizer.eos_id) == (
    expected["bos"],
    expected["eos"],
  )
  assert len(expected["cases"]) > 50
  for case in expected["cases"]:
    ids = tokenizer.encode(case["text"])
    assert ids == case["ids"], case["text"]
    assert tokenizer.pieces(case["text"]) == case["pieces"], case["text"]
    assert tokenizer.decode(ids) == case["decoded"], case["text"]


@needs_published_models
@pytest.mark.parametrize("name", _MODELS)
def test_special_ids_come_after_the_published_ones(name, published):
  tokenizer = published[name]
  recorded = json.loads((_SHARED / "vectors.json").read_text())["models"]
  size = recorded[name]["vocab_size"]
  assert tokenizer.special_ids == {
    "<pad>": size,
    "<image>": size + 1,
    "<audio>": size + 2,
    "<user>": size + 3,
    "</user>": size + 4,
  }
  assert tokenizer.vocab_size == size + 5
  assert tokenizer.pad_id == size
  assert tokenizer.placeholder_ids == {"image": size + 1, "audio": size + 2}


@needs_published_models
@hypothesis.given(
  st.lists(
    st.one_of(
      st.sampled_from(
        ["<s>", "</s>", "<pad>", "<image>", "<user>", "</user>", "<0x41>"]
      ),
      st.text(max_size=8),
    )
  ).map("".join)
)
def test_no_text_becomes_a_special_id_and_any_round_trips(published, sentence):
  tokenizer = published[_MISTRAL]
  ids = tokenizer.encode(sentence)
  assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)
  assert all(token < 32000 for token in ids)
  if "\u2581" not in sentence:  # SentencePiece writes a space so.
    assert tokenizer.decode(ids) == sentence
  # Fails if: a user can write </user>, or a byte has no piece.


@needs_published_models
def test_beginning_end_and_leading_space_are_the_original_s(published):
  tokenizer = published[_MISTRAL]
  ids = tokenizer.encode("Hello", bos=True, eos=True)
  assert ids[0] == 1
  assert ids[-1] == 2
  assert ids[1:-1] == tokenizer.encode("Hello")
  assert tokenizer.decode(ids) == "Hello"
  assert tokenizer.pieces("Hello") == ["\u2581Hello"]
  assert tokenizer.pieces(" Hello") == ["\u2581", "\u2581Hello"]
  assert tokenizer.pieces("\U0001f9a4")[-4:] == [
    "<0xF0>",
    "<0x9F>",
    "<0xA6>",
    "<0xA4>",
  ]


@needs_published_models
def test_parts_become_spans(published):
  tokenizer = published[_MISTRAL]
  special = tokenizer.special_ids
  ids = tokenizer.encode_parts(
    [("image", 3), ("user", "stop </user>"), "It is", ("audio", 1)]
  )
  assert ids[:5] == [1, *[special["<image>"]] * 3, special["<user>"]]
  assert ids[-1] == special["<audio>"]
  assert ids.count(special["</user>"]) == 1
  assert tokenizer.decode(ids) == (
    "<image><image><image><user>stop </user></user>It is<audio>"
  )
  copy = pickle.loads(pickle.dumps(tokenizer))
  assert copy.encode_parts([("image", 3)]) == ids[:4]
  with pytest.raises(ValueError, match=r"part=\('video', 3\)"):
    tokenizer.encode_parts([("video", 3)])
  with pytest.raises(ValueError, match="vocab_size=32005, got id=32005"):
    tokenizer.decode([32005])


def test_a_published_model_of_another_kind_is_refused():
  with pytest.raises(ValueError, match="SentencePiece model.*Llama 3"):
    text.PretrainedTokenizer(b"IQ== 0\nIg== 1\n")
