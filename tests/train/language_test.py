"""Scores of words, and runs whose records are texts."""

import math

import numpy as np
import pytest

from ppnet import config as config_lib
from ppnet.core import records
from ppnet.train import loop, metrics
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
