"""Scores of words, and runs whose records are texts."""

import dataclasses
import math

import flax.linen as nn
import jax
import numpy as np
import pytest

from ppnet import config as config_lib
from ppnet.core import records
from ppnet.data import examples as examples_lib
from ppnet.data import packing, pipeline, prepare
from ppnet.models import multimodal
from ppnet.train import loop, losses, metrics
from ppnet.train import step as step_lib
from tests import tiny


def test_bits_per_byte_count_every_token_once():
  # Two texts: 3 tokens of 2 bits each for 6 bytes, 1 token of 8 bits for 2.
  scores = metrics.language(
    np.array([2.0, 8.0]) * math.log(2),
    num_targets=np.array([3, 1]),
    num_bytes=np.array([6, 2]),
  )
  assert scores["bits_per_byte"] == pytest.approx((3 * 2 + 8) / 8)
  assert scores["perplexity"] == pytest.approx(2 ** (14 / 4))
  # Fails if: records are averaged whatever their lengths.


def _experiment(folder, **changes):
  text = "".join(
    f"{word} and {word} again; " for word in "abcdefghijklmnopqrstuvwxyz" * 6
  )
  (folder / "text.txt").write_text(text)
  config = tiny.experiment(**changes)
  config.privacy.accountant = config_lib.Accountant.RDP
  config.data = config_lib.DataConfig(
    source=config_lib.Source.TEXT_FILE,
    path=str(folder / "text.txt"),
    task=config_lib.Task.CAUSAL,
    prompt="",
    tokenizer=config_lib.TokenizerKind.BYTES,
    vocab_size=264,
    window_bytes=24,
  )
  config.model.decoder.vocab_size = 264
  config.model.decoder.max_seq_len = 64
  config.model.image = config.model.audio = None
  return config


@pytest.mark.parametrize(
  "unit", [pytest.param("EXAMPLE", marks=pytest.mark.slow), "PACKED_ROW"]
)
def test_a_run_on_texts_reports_bits_per_byte_and_its_unit(tmp_path, unit):
  config = _experiment(
    tmp_path,
    unit=config_lib.PrivacyUnit[unit],
    num_steps=2,
    expected_batch_size=8,
    eval_every_steps=2,
  )
  config_lib.validate(config)
  workdir = tmp_path / "run"
  workdir.mkdir()
  experiment = loop.open_experiment(config, workdir)
  summary, _ = loop.train(experiment)
  assert summary["num_steps"] == 2
  assert 0 < summary["bits_per_byte"] < 12
  assert "accuracy" not in summary
  num_train = experiment.card.num_train
  if unit == "EXAMPLE":
    assert summary["num_units"] == num_train
    assert "training example" in summary["guarantee"]
  else:
    # Two windows of 24 bytes fill a row of 64 tokens.
    assert summary["num_units"] == -(-num_train // 2)
    assert "training packed row" in summary["guarantee"]
    ledger = records.read_json(workdir / "privacy.json")
    assert ledger["num_examples"] == summary["num_units"]
  # Fails if: the accountant counts records where rows are drawn.


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
  """A configuration and its prepared texts."""
  folder = tmp_path_factory.mktemp("texts")
  config = _experiment(folder)
  prepare.prepare(config.data, folder / "prepared", progress=False)
  return config, folder / "prepared"


def _with_unit(config, unit):
  return dataclasses.replace(
    config,
    privacy=dataclasses.replace(
      config.privacy, unit=config_lib.PrivacyUnit[unit]
    ),
  )


def test_n_counts_what_is_clipped(texts):
  config, folder = texts
  by_record, by_row = (
    _with_unit(config, unit) for unit in ("EXAMPLE", "PACKED_ROW")
  )
  records_alone = pipeline.training_examples(by_record, folder)
  assert isinstance(records_alone, examples_lib.Examples)
  num_records = len(records_alone)
  assert loop.num_units(by_record, folder) == num_records
  rows = pipeline.training_examples(by_row, folder)
  assert isinstance(rows, packing.PackedExamples)
  assert loop.num_units(by_row, folder) == len(rows) == -(-num_records // 2)
  # Every record is in one row.
  assert [
    position for row in range(len(rows)) for position in rows.records(row)
  ] == list(range(num_records))
  # Fails if: N counts records where rows are drawn, or rows where records are.


def test_records_of_a_row_do_not_see_each_other_in_training(texts):
  config, folder = texts
  rows = pipeline.training_examples(_with_unit(config, "PACKED_ROW"), folder)
  alone = pipeline.training_examples(_with_unit(config, "EXAMPLE"), folder)
  first, second = rows.records(0)
  model = multimodal.PPNet(config.model, {})
  together = rows.batch([examples_lib.Row(0)], size=2)
  apart = alone.batch(
    [examples_lib.Row(first), examples_lib.Row(second)], size=2, length=64
  )
  init = jax.jit(
    lambda key: model.init(key, jax.device_put(apart["tokens"]), media={})
  )
  params = nn.meta.unbox(init(jax.random.key(0))["params"])
  loss_fn = losses.make_loss_fn(
    model, config_lib.AttentionNoiseConfig(stddev=0.0)
  )

  @jax.jit
  def of_rows(batch):  # As a step hands them to the loss.
    batch = step_lib.grad_batch(batch, jax.random.key(1), np.int32(0))
    return loss_fn(params, batch)[0]

  counts = apart["loss_mask"].sum(axis=1)
  np.testing.assert_allclose(
    of_rows(jax.device_put(together))[0],
    (of_rows(jax.device_put(apart)) * counts).sum() / counts.sum(),
    rtol=1e-5,
  )
  # Fails if: segments are lost on the way to the loss. (Positions are not
  # missed: rotary embeddings see differences alone.)
