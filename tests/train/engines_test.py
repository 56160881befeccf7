"""The trainer with every engine, chosen by its flag alone."""

import io

import jax
import numpy as np
import pytest

from ppnet import config as config_lib
from ppnet.core import records
from ppnet.data import prepare
from ppnet.train import loop
from tests import tiny

_CONVOLUTIONS = config_lib.ImageStemConfig(
  channels=(4, 6),
  strides=(2, 2),
  activation=config_lib.Activation.TANH,
  num_groups=2,
  weight_standardisation=True,
)


@pytest.mark.slow
@pytest.mark.parametrize(
  "image", [tiny.experiment().model.image, _CONVOLUTIONS], ids=["plain", "all"]
)
def test_every_engine_trains_the_same_parameters(image, tmp_path):
  prepare.prepare(tiny.experiment().data, tmp_path / "prepared")
  trained = {}
  for engine in config_lib.Engine:
    config = tiny.experiment(engine=engine)
    config.model.image = image
    config.data.prepared_dir = str(tmp_path / "prepared")
    workdir = tmp_path / engine.value
    workdir.mkdir()
    records.write_json(workdir / "config.json", {"config": config})
    experiment = loop.open_experiment(
      config, workdir, devices=jax.devices()[:1]
    )
    _, state = loop.train(experiment, log=io.StringIO())
    params = jax.tree.leaves(jax.device_get(state.params))
    trained[engine] = np.concatenate([np.ravel(leaf) for leaf in params])
  # Adam divides by the root of a mean square, which is noise here: roundings
  # of the sum stay roundings of the parameters.
  for engine, params in trained.items():
    np.testing.assert_allclose(
      params, trained[config_lib.Engine.VMAP], atol=1e-5, err_msg=engine.name
    )
  # Fails if: an engine leaves out a use of a parameter, or the trainer does not
  # hand the model the engine's operations.
