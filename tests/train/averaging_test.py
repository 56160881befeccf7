"""The average of parameters: its numbers, and what it must not move."""

import io

import jax
import numpy as np
import pytest

from ppnet import config as config_lib
from ppnet.core import records
from ppnet.data import prepare
from ppnet.train import averaging, loop
from tests import tiny


def experiment(**changes):
  """A linear model of digits, of which little has to be compiled."""
  config = tiny.experiment(**changes)
  config.attention_noise = config_lib.AttentionNoiseConfig()
  config.model.audio = None
  config.model.linear = config_lib.LinearConfig()
  config.optimizer = config_lib.OptimizerConfig(
    name=config_lib.OptimizerName.SGD, learning_rate=0.5, ema_decay=0.3
  )
  return config


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  folder = tmp_path_factory.mktemp("prepared")
  prepare.prepare(experiment().data, folder)
  return str(folder)


def open_run(workdir, prepared, config, *, devices=1):
  config.data.prepared_dir = prepared
  workdir.mkdir(exist_ok=True)
  records.write_json(workdir / "config.json", {"config": config})
  return loop.open_experiment(config, workdir, devices=jax.devices()[:devices])


def run(workdir, prepared, config):
  opened = open_run(workdir, prepared, config)
  return loop.train(opened, log=io.StringIO())


def kernel(params):
  (leaf,) = jax.tree.leaves(jax.device_get(params))
  return leaf


def test_the_decay_grows_to_its_bound():
  found = [float(averaging.decay_at(t, decay=0.95)) for t in (0, 8, 170, 500)]
  np.testing.assert_allclose(found, [0.1, 0.5, 0.95, 0.95], rtol=1e-6)


def test_averages_match_a_loop():
  rng = np.random.default_rng(0)
  values = rng.normal(size=(30, 2, 3)).astype(np.float32)
  average = values[0]
  expected = values[0].astype(np.float64)
  for step, value in enumerate(values[1:]):
    average = averaging.update(average, value, np.int32(step), decay=0.6)
    keep = min(0.6, (1 + step) / (10 + step))
    expected = keep * expected + (1 - keep) * value
  np.testing.assert_allclose(average, expected, rtol=1e-5)


@pytest.fixture(scope="module")
def with_average(tmp_path_factory, prepared):
  workdir = tmp_path_factory.mktemp("with")
  return workdir, *run(workdir, prepared, experiment())


def test_an_average_moves_neither_training_nor_the_ledger(
  with_average, prepared, tmp_path
):
  workdir, summary, state = with_average
  config = experiment()
  config.optimizer.ema_decay = None
  plain_summary, plain = run(tmp_path, prepared, config)
  np.testing.assert_array_equal(kernel(state.params), kernel(plain.params))
  ledgers = [
    records.read_json(folder / "privacy.json") for folder in (workdir, tmp_path)
  ]
  for ledger in ledgers:
    del ledger["history"]  # With the time.
  assert ledgers[0] == ledgers[1]
  assert summary["epsilon"] == plain_summary["epsilon"]
  assert plain.released is plain.params
  # Fails if: gradients are taken at the average, or it is charged for.


def test_what_is_released_and_evaluated_is_the_average(
  with_average, prepared, tmp_path
):
  _, summary, state = with_average
  assert state.released is state.average
  assert not np.allclose(kernel(state.average), kernel(state.params))
  opened = open_run(tmp_path, prepared, experiment())
  assert summary["loss"] == loop.evaluate(opened, state.average)["loss"]
  assert summary["loss"] != loop.evaluate(opened, state.params)["loss"]
  # Fails if: the last parameters are evaluated.


def test_a_resumed_average_is_that_of_an_uninterrupted_run(
  with_average, prepared, tmp_path, monkeypatch
):
  class Stop(Exception):
    pass

  original = loop._Run._dispatch

  def stopping(self, data):
    if data["step"] == 5:
      self._checkpoints.wait()
      raise Stop
    return original(self, data)

  with monkeypatch.context() as patch:
    patch.setattr(loop._Run, "_dispatch", stopping)
    with pytest.raises(Stop):
      run(tmp_path, prepared, experiment())
  _, resumed = run(tmp_path, prepared, experiment())
  np.testing.assert_array_equal(
    kernel(resumed.average), kernel(with_average[2].average)
  )
  # Fails if: the average is not in the checkpoint.


def test_an_average_lives_where_the_parameters_do(prepared, tmp_path):
  config = experiment()
  config.mesh = tiny.MESHES["2x2x2"]
  state = open_run(tmp_path, prepared, config, devices=8).program.abstract_state
  of = lambda tree: [leaf.sharding for leaf in jax.tree.leaves(tree)]
  assert of(state.average) == of(state.params)
  shapes = lambda tree: jax.tree.map(lambda leaf: leaf.shape, tree)
  assert shapes(state.average) == shapes(state.params)


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.5])
def test_a_decay_that_is_no_share_is_refused(decay):
  config = experiment()
  config.optimizer.ema_decay = decay
  with pytest.raises(ValueError, match=r"optimizer\.ema_decay"):
    config_lib.validate(config)
