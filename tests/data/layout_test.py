"""Tests of ppnet.data.layout."""

import numpy as np
import pytest

from ppnet import config as config_lib
from ppnet.data import layout as layout_lib
from ppnet.data import sources, tokenizers

TOKENIZER = tokenizers.ByteTokenizer(class_names=["no", "yes"])
BOS, EOS = TOKENIZER.bos_id, TOKENIZER.eos_id
IMAGE, AUDIO = (TOKENIZER.placeholder_ids[name] for name in ("image", "audio"))


def _layout(task, *, counts=None, prompt="Q", max_seq_len=16, **data):
  config = config_lib.ExperimentConfig()
  config.data = config_lib.DataConfig(
    task=task,
    prompt=prompt,
    tokenizer=config_lib.TokenizerKind.BYTES,
    vocab_size=300,
    image_size=2,
    **data,
  )
  config.model.decoder.max_seq_len = max_seq_len
  config.model.image = config_lib.ImageStemConfig(channels=(1,), strides=(2,))
  config.model.audio = config_lib.AudioStemConfig(frames_per_token=12)
  return layout_lib.Layout(
    config, counts=counts or {}, has_text=True, tokenizer=TOKENIZER
  )


def _bytes(text: str) -> list[int]:
  return TOKENIZER.encode(text)


def test_class_follows_prompt_and_text():
  layout = _layout(config_lib.Task.CLASSIFY)
  found = layout.tokens(sources.Record(id="r", text="ab", label=1))
  answer = int(TOKENIZER.answer_ids[1])
  assert found.tokens.tolist() == [BOS, *_bytes("Qab")]
  assert found.targets.tolist() == [*_bytes("Qab"), answer]
  assert found.loss_mask.tolist() == [0, 0, 0, 1]
  assert found.num_bytes == 0


def test_answer_counts_with_its_end_and_nothing_else():
  layout = _layout(config_lib.Task.ANSWER)
  found = layout.tokens(sources.Record(id="r", text="ab", answer="é"))
  assert found.tokens.tolist() == [BOS, *_bytes("Qabé")]
  assert found.targets.tolist() == [*_bytes("Qabé"), EOS]
  assert found.loss_mask.tolist() == [0, 0, 0, 1, 1, 1]
  assert found.num_bytes == 2


def test_every_byte_of_a_causal_text_counts():
  layout = _layout(config_lib.Task.CAUSAL, prompt="")
  found = layout.tokens(sources.Record(id="r", text="abc"))
  assert found.tokens.tolist() == [BOS, *_bytes("ab")]
  assert found.targets.tolist() == _bytes("abc")
  assert found.loss_mask.tolist() == [1, 1, 1]
  assert found.num_bytes == 3


def test_media_take_the_places_they_have():
  layout = _layout(
    config_lib.Task.CLASSIFY, counts={"image": (0, 3), "audio": (0, 1)}
  )
  record = sources.Record(
    id="r", media={"image": (b"a", b"b")}, text="t", label=0
  )
  found = layout.tokens(record)
  assert found.tokens.tolist() == [BOS, IMAGE, IMAGE, *_bytes("Qt")]
  alone = layout.tokens(sources.Record(id="r", text="t", label=0))
  assert alone.tokens.tolist() == [BOS, *_bytes("Qt")]
  with pytest.raises(sources.BadRecordError, match="has 4 image; 0 to 3"):
    layout.tokens(sources.Record(id="r", media={"image": (b"",) * 4}, label=0))


@pytest.mark.parametrize("task", config_lib.Task)
def test_long_text_is_cut_at_its_end_and_answers_are_not(task):
  layout = _layout(task, max_seq_len=8)
  found = layout.tokens(
    sources.Record(id="r", text="0123456789", answer="xyz", label=0)
  )
  assert len(found.tokens) == 8
  whole = [*found.tokens.tolist(), int(found.targets[-1])]
  given, counted = {
    config_lib.Task.CLASSIFY: ("Q012345", [int(TOKENIZER.answer_ids[0])]),
    config_lib.Task.ANSWER: ("Q012", [*_bytes("xyz"), EOS]),
    config_lib.Task.CAUSAL: ("Q", _bytes("0123456")),
  }[task]
  assert whole == [BOS, *_bytes(given), *counted]
  assert found.loss_mask.sum() == len(counted)
  assert found.num_bytes == {"CLASSIFY": 0, "ANSWER": 3, "CAUSAL": 7}[task.name]


def test_answer_without_room_is_a_bad_record():
  layout = _layout(config_lib.Task.ANSWER, max_seq_len=8)
  layout.tokens(sources.Record(id="r", answer="123456"))
  with pytest.raises(sources.BadRecordError, match="takes 8 tokens where 7"):
    layout.tokens(sources.Record(id="r", answer="1234567"))


@pytest.mark.parametrize(
  ("task", "cause"),
  [
    (config_lib.Task.CLASSIFY, "label None is none of 2"),
    (config_lib.Task.ANSWER, "answer is empty"),
    (config_lib.Task.CAUSAL, "text is empty"),
  ],
)
def test_what_the_task_needs_and_is_missing_is_named(task, cause):
  with pytest.raises(sources.BadRecordError, match=cause):
    _layout(task).tokens(sources.Record(id="r"))


def test_text_that_is_no_unicode_is_a_bad_record():
  with pytest.raises(sources.BadRecordError, match="cannot be encoded"):
    _layout(config_lib.Task.CAUSAL).tokens(
      sources.Record(id="r", text="\ud800")
    )


def test_rows_are_padded_to_the_smallest_length_that_holds_them():
  layout = _layout(config_lib.Task.CLASSIFY, lengths=(4, 6, 16))
  assert [layout.padded_length(n) for n in (1, 4, 5, 6, 7, 16)] == [
    4, 4, 6, 6, 16, 16,
  ]  # fmt: skip


def test_media_and_prompt_that_leave_no_room_are_refused():
  with pytest.raises(ValueError, match=r"max_seq_len=16.*image=14.*total=18"):
    _layout(config_lib.Task.CLASSIFY, counts={"image": (1, 14)})
  with pytest.raises(ValueError, match=r"data.lengths=\(4,\)"):
    _layout(config_lib.Task.CLASSIFY, prompt="long", lengths=(4,))


@pytest.mark.parametrize("task", config_lib.Task)
def test_generation_begins_before_the_answer(task):
  layout = _layout(task)
  record = sources.Record(id="r", text="abcd", answer="xyz", label=0)
  found = layout.tokens(record)
  pad = (0, 16 - len(found.tokens))
  example = {
    "tokens": np.pad(found.tokens, pad),
    "loss_mask": np.pad(found.loss_mask, pad),
  }
  given = {"CLASSIFY": "Qabcd", "ANSWER": "Qabcd", "CAUSAL": "Qab"}[task.name]
  assert layout_lib.given_tokens(example, task) == [BOS, *_bytes(given)]
