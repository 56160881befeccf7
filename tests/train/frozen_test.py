"""Fine-tuning: what is frozen stays, and no state of it is kept."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppnet import config as config_lib
from ppnet.core import records, trees
from ppnet.data import prepare
from ppnet.models import hf, lora
from ppnet.train import loop
from tests import tiny


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  folder = tmp_path_factory.mktemp("prepared")
  prepare.prepare(tiny.experiment().data, folder)
  return str(folder)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
  """A directory with random weights of the tiny decoder."""
  rng = np.random.default_rng(0)
  decoder = tiny.experiment().model.decoder
  params = jax.tree.map(
    lambda leaf: rng.normal(size=leaf.shape).astype(np.float32),
    hf.abstract_shapes(decoder),
  )
  folder = tmp_path_factory.mktemp("weights")
  hf.save(folder, decoder, params)
  return folder, params


def open_run(workdir, prepared, change):
  config = tiny.experiment(num_steps=2, engine=config_lib.Engine.BOOKKEEPING)
  config.data.prepared_dir = prepared
  change(config)
  records.write_json(workdir / "config.json", {"config": config})
  return loop.open_experiment(config, workdir, devices=jax.devices()[:1])


def names_of(tree):
  return [
    jax.tree_util.keystr(path, simple=True, separator="/")
    for path, _ in jax.tree_util.tree_leaves_with_path(tree)
  ]


def test_adapters_and_stems_are_trained_beside_stored_weights(
  tmp_path, prepared, weights
):
  folder, stored = weights

  def change(config):
    config.model.decoder.lora = config_lib.LoraConfig(rank=2)
    config.model.decoder_weights = str(folder)

  experiment = open_run(tmp_path, prepared, change)
  summary, state = loop.train(experiment, log=io.StringIO())
  assert np.isfinite(summary["loss"])
  trained = names_of(state.params)
  assert len([name for name in trained if lora.is_adapter(name)]) == 4
  assert all(
    lora.is_adapter(name) or name.startswith("stems_") for name in trained
  )
  b = state.params["decoder"]["layers"]["attention"]["v_proj"]["lora_b"]
  assert np.abs(b).max() > 0
  # Adam keeps two numbers per trained parameter, and none for the others.
  arrays = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
  size = sum(leaf.size for leaf in arrays)
  assert size == 2 * trees.num_parameters(state.params)
  frozen = experiment.program.frozen()
  assert frozen.keys() == {"decoder"}
  jax.tree.map(
    lambda leaf, value: np.testing.assert_array_equal(
      leaf, value.astype(jnp.bfloat16)
    ),
    frozen["decoder"],
    stored,
  )
  restored, _ = loop.restore(experiment)
  jax.tree.map(np.testing.assert_array_equal, restored.params, state.params)
  # Fails if: the base is trained, moved, or not the stored one.


def test_patterns_say_what_is_trained(tmp_path, prepared):
  def change(config):
    config.train.trained = (r"decoder/final_norm/.*", r".*/mlp_norm/scale")

  program = open_run(tmp_path, prepared, change).program
  assert names_of(program.abstract_state.params) == [
    "decoder/final_norm/scale",
    "decoder/layers/mlp_norm/scale",
  ]
  assert program.num_parameters == 3 * 8


def test_weights_of_another_decoder_are_refused_by_field(
  tmp_path, prepared, weights
):
  def change(config):
    config.model.decoder_weights = str(weights[0])
    config.model.decoder.rope_theta = 5.0

  with pytest.raises(ValueError, match=r"rope_theta=\(10000.0, 5.0\)"):
    open_run(tmp_path, prepared, change)


def test_patterns_that_match_nothing_are_refused(tmp_path, prepared):
  def change(config):
    config.train.trained = ("deocder/.*",)

  with pytest.raises(ValueError, match="at least one parameter"):
    open_run(tmp_path, prepared, change)


def test_stored_weights_go_straight_to_each_device_s_part(
  tmp_path, prepared, weights, monkeypatch
):
  folder, stored = weights
  read = []

  def load(path, **kwargs):
    read.append(kwargs)
    return original(path, **kwargs)

  original = hf.load
  monkeypatch.setattr(hf, "load", load)
  config = tiny.experiment(num_steps=2, engine=config_lib.Engine.BOOKKEEPING)
  config.data.prepared_dir = prepared
  config.model.decoder.lora = config_lib.LoraConfig(rank=2)
  config.model.decoder_weights = str(folder)
  config.mesh = config_lib.MeshConfig(data=1, fsdp=2, tensor=1)
  records.write_json(tmp_path / "config.json", {"config": config})
  program = loop.open_experiment(
    config, tmp_path, devices=jax.devices()[:2]
  ).program
  program.init()
  assert not read  # Adapters alone are trained: nothing is read for them.
  frozen = program.frozen()["decoder"]
  (call,) = read
  assert call["mesh"] == program.mesh  # One device would hold all of it.
  jax.tree.map(
    lambda leaf, abstract, value: (
      np.testing.assert_array_equal(leaf, value.astype(jnp.bfloat16)),
      leaf.sharding == abstract.sharding or pytest.fail(str(leaf.sharding)),
    ),
    frozen,
    program.abstract_frozen["decoder"],
    stored,
  )
  kernel = frozen["layers"]["mlp"]["up_proj"]["kernel"]
  assert kernel.addressable_shards[0].data.shape == (2, 4, 12)
