"""What the arguments of `configs/records/` stand for."""

import pathlib
import runpy

import pytest

from ppnet import config as config_lib

_RECORDS = pathlib.Path(__file__).parents[1] / "configs" / "records"


@pytest.mark.parametrize(
  ("argument", "epsilon", "batch_size"),
  [("3", 3.0, 512), ("8,64", 8.0, 64), ("none", None, 512)],
)
def test_shakespeare_s_argument_is_epsilon_and_batch(
  argument, epsilon, batch_size
):
  get_config = runpy.run_path(str(_RECORDS / "shakespeare.py"))["get_config"]
  config = get_config(argument)
  config_lib.validate(config)
  assert config.privacy.enabled == (epsilon is not None)
  assert epsilon in (None, config.privacy.epsilon)
  assert config.train.expected_batch_size == batch_size
  # The claim's unit is one whole window, and so is a row.
  assert config.model.decoder.max_seq_len == config.data.window_bytes
  # Fails if: "none" trains privately, or a batch size changes nothing.
