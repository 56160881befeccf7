"""Tests of ppnet.data.text_transforms."""

import dataclasses
import pickle
import time
import unicodedata

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from ppnet.data import sources, text, text_transforms

_CLASSES = ("yes", "no")


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
  path = tmp_path_factory.mktemp("model") / "tokenizer.model"
  text.train_tokenizer(
    text.public_sentences("Do you recommend it?"),
    vocab_size=500,
    class_names=_CLASSES,
    model_path=path,
  )
  return str(path)


def _apply(transform, written):
  return transform.map({"id": "r1", "text": written})["text"]


def _refused(error: sources.BadRecordError) -> None:
  assert error.record_id == "r1"


def _chain(content, max_chars=50) -> str | None:
  """The normalised text; None where the record was refused by name."""
  try:
    decoded = _apply(text_transforms.Decode(max_chars=max_chars), content)
    assert 0 < len(decoded) <= max_chars
    return _apply(text_transforms.Nfkc(), decoded)
  except sources.BadRecordError as error:
    return _refused(error)


# Decoding and cutting.


@hypothesis.given(written=st.text(max_size=60), max_chars=st.integers(1, 70))
def test_bytes_and_str_give_the_same_beginning(written, max_chars):
  decode = text_transforms.Decode(max_chars=max_chars)
  expected = written.removeprefix("\ufeff")[:max_chars]
  for content in (written, written.encode()):
    if not expected.strip():
      with pytest.raises(sources.BadRecordError, match="'r1'.*empty"):
        _apply(decode, content)
    else:
      assert _apply(decode, content) == expected


@pytest.mark.parametrize(
  "content",
  [
    b"\xff\xfe",
    b"caf\xe9",
    b"abc\xc3",
    b"\xed\xa0\x80",
    b"\xc0\xafx",
    "\ud800x",
    12,
    3.5,
    np.zeros(3),
  ],
  ids=[
    "bom 16",
    "latin",
    "cut",
    "surrogate",
    "overlong",
    "str",
    "int",
    "f",
    "a",
  ],
)
def test_invalid_text_names_the_record(content):
  with pytest.raises(sources.BadRecordError, match="'r1'.*no valid Unicode"):
    _apply(text_transforms.Decode(max_chars=9), content)


@pytest.mark.parametrize(
  "content", [b"", "", "  \n\t", b" \xe2\x80\x83 ", "\ufeff"]
)
def test_empty_text_names_the_record(content):
  with pytest.raises(sources.BadRecordError, match="'r1'.*empty"):
    _apply(text_transforms.Decode(max_chars=9), content)
  with pytest.raises(sources.BadRecordError, match="'r1'.*no text"):
    _apply(text_transforms.Decode(max_chars=9), None)


def test_bytes_behind_the_cut_are_not_looked_at():
  content = "é".encode() * 40 + b"\xff"
  decode = text_transforms.Decode(max_chars=5)
  assert _apply(decode, content) == "é" * 5
  with pytest.raises(sources.BadRecordError):
    _apply(text_transforms.Decode(max_chars=41), content)


# Normalisation.


@hypothesis.given(
  written=st.text(
    st.one_of(
      st.characters(codec="utf-8"),
      st.sampled_from("e\u0301\u0323\u0308ﬁｆ①㍿한\u1112\u1161\u11ab\ufdfa"),
    ),
    min_size=1,
    max_size=50,
  )
)
def test_result_is_the_normalised_beginning(written):
  result = _chain(written.encode())
  expected = unicodedata.normalize("NFKC", written.removeprefix("\ufeff"))
  if result is None:
    assert not expected.strip()
  else:
    assert result == expected
    assert unicodedata.is_normalized("NFKC", result)


def test_spellings_become_one():
  for spellings in (
    ("é", "e\u0301"),
    ("fi", "ﬁ"),
    ("A1", "Ａ①"),
    ("한", "\u1112\u1161\u11ab"),
  ):
    assert {_chain(spelling) for spelling in spellings} == {spellings[0]}


def test_runs_of_marks_are_split_and_stay_cheap():
  marks = "\u0301\u0323" * 20_000  # Ordering them all would take seconds.
  start = time.thread_time()
  result = _chain("a" + marks, max_chars=50_000)
  assert time.thread_time() - start < 0.7
  longest = max(len(part) for part in result.split("\u034f"))
  assert longest <= 32
  assert result.count("\u0323") >= 19_990  # None of them is lost.
  short = "a" + marks[:30]
  assert _chain(short) == unicodedata.normalize("NFKC", short)


@pytest.mark.parametrize(
  "unit", ["a", "é", "ﷺ", "𝔘", "e\u0301\u0323", "\u0301\u0323", " x", "\0"]
)
def test_ten_megabytes_are_cheap(unit, model_path):
  content = (unit.encode() * (10_000_000 // len(unit.encode()) + 1))[
    :10_000_000
  ]
  tokenize = text_transforms.Tokenize(
    model_path=model_path, class_names=_CLASSES, max_tokens=64
  )
  _chain("é")  # The table of marks is made once.
  for form in (content, content.decode(errors="ignore")):
    start = time.thread_time()
    result = _chain(form, max_chars=2000)
    ids = _apply(tokenize, result)
    assert time.thread_time() - start < 0.1
    assert len(ids) == 64
  # Fails if: the whole text is normalised, or decoded, before it is cut.


@hypothesis.settings(max_examples=60)
@hypothesis.given(content=st.binary(max_size=120))
def test_arbitrary_bytes_are_refused_or_valid(content):
  result = _chain(content)
  if result is not None:
    result.encode()


# Tokens.


def _tokenize(model_path, **options) -> text_transforms.Tokenize:
  settings = {"max_tokens": 100, **options}
  return text_transforms.Tokenize(
    model_path=model_path, class_names=_CLASSES, **settings
  )


def test_ids_are_the_tokenizer_s_cut_at_the_end(model_path):
  tokenizer = text.Tokenizer.load(model_path, class_names=_CLASSES)
  written = "the picture shows the digit 4."
  ids = tokenizer.encode(written)
  result = _apply(_tokenize(model_path), written)
  assert result.dtype == np.int32
  assert result.tolist() == ids
  both = _tokenize(model_path, bos=True, eos=True)
  whole = [tokenizer.bos_id, *ids, tokenizer.eos_id]
  assert _apply(both, written).tolist() == whole
  cut = _tokenize(model_path, bos=True, eos=True, max_tokens=len(ids))
  assert _apply(cut, written).tolist() == whole[: len(ids)]


def test_special_pieces_in_a_text_name_the_record(model_path):
  for written in ("see <image> here", "<answer:yes>"):
    with pytest.raises(
      sources.BadRecordError, match="'r1'.*tokenised.*reserved"
    ):
      _apply(_tokenize(model_path), written)
  assert _apply(_tokenize(model_path), "a < b > c").size


@hypothesis.given(written=st.text(min_size=1, max_size=40))
def test_any_text_gives_ids_within_the_vocabulary(model_path, written):
  normal = _chain(written)
  if normal is None:
    return
  tokenize = _tokenize(model_path)
  ids = _apply(tokenize, normal)
  assert ids.min() >= 0
  assert ids.max() < tokenize.tokenizer.vocab_size


def test_transforms_are_plain_data_and_can_be_sent_to_workers(model_path):
  for transform in (
    text_transforms.Decode(max_chars=7),
    text_transforms.Nfkc(),
    _tokenize(model_path),
  ):
    fields = dataclasses.asdict(transform)
    assert type(transform)(**fields) == transform
    assert transform.kind != "augmentation"
    assert transform.label
    _apply(transform, "some text")  # With what it has loaded by now.
    again = pickle.loads(pickle.dumps(transform))
    assert again == transform
    np.testing.assert_array_equal(
      _apply(again, "some text"), _apply(transform, "some text")
    )


def test_impossible_setting_is_named(model_path, tmp_path):
  with pytest.raises(ValueError, match="max_chars > 0"):
    text_transforms.Decode(max_chars=0)
  with pytest.raises(ValueError, match="max_tokens > 0"):
    _tokenize(model_path, max_tokens=0)
  (tmp_path / "none").write_bytes(b"no model")
  with pytest.raises(ValueError, match="a SentencePiece model"):
    _apply(_tokenize(str(tmp_path / "none")), "text")
