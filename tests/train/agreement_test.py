"""Twenty steps on every mesh and under every strategy end in one place."""

import io

import jax
import numpy as np
import pytest

from ppnet import config as config_lib
from ppnet.core import records
from ppnet.data import prepare
from ppnet.train import loop
from tests import tiny

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  folder = tmp_path_factory.mktemp("prepared")
  prepare.prepare(tiny.experiment().data, folder)
  return str(folder)


def parameters(workdir, prepared, *, mesh, num_devices):
  """After twenty seeded float32 steps of several microbatches."""
  config = tiny.experiment(
    num_steps=20, eval_every_steps=20, checkpoint_every_steps=20
  )
  config.data.prepared_dir = prepared
  config.data.lengths = (20,)  # 19 tokens do not divide over `sequence`.
  config.privacy.accountant = config_lib.Accountant.RDP
  config.mesh = mesh
  workdir.mkdir(exist_ok=True)
  records.write_json(workdir / "config.json", {"config": config})
  experiment = loop.open_experiment(
    config, workdir, devices=jax.devices()[:num_devices]
  )
  _, state = loop.train(experiment, log=io.StringIO())
  leaves = jax.tree.leaves(jax.device_get(state.params))
  return np.concatenate([np.ravel(leaf) for leaf in leaves])


@pytest.fixture(scope="module")
def alone(tmp_path_factory, prepared):
  workdir = tmp_path_factory.mktemp("alone")
  mesh = config_lib.MeshConfig()
  return parameters(workdir, prepared, mesh=mesh, num_devices=1)


@pytest.mark.parametrize("on", tiny.MESHES)
def test_twenty_steps_agree_on_every_mesh(alone, prepared, tmp_path, on):
  found = parameters(tmp_path, prepared, mesh=tiny.MESHES[on], num_devices=8)
  np.testing.assert_allclose(found, alone, rtol=0, atol=1e-5)
  # Fails if: attention noise counts a device's own tokens, a replica's sum is
  # lost, or an example's clip factor is that of a part of its gradient.
