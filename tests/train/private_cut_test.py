"""A run with a private cut: fresh draws, and a record that says what holds."""

import io

import jax
import numpy as np
import pytest

from ppnet import config as config_lib
from ppnet.core import records
from ppnet.train import loop
from tests import tiny


@pytest.mark.parametrize(
  "seed", [None, pytest.param(5, marks=pytest.mark.slow)]
)
def test_a_run_claims_its_cut_and_never_repeats_a_draw(tmp_path, seed):
  config = tiny.experiment(num_steps=1, eval_every_steps=1)
  config.model.private_cut = config_lib.PrivateCutConfig(
    layer=1, l2_clip_norm=2.0, epsilon=4.0, noise_seed=seed
  )
  config_lib.validate(config)
  records.write_json(tmp_path / "config.json", {"config": config})
  experiment = loop.open_experiment(config, tmp_path, devices=jax.devices()[:1])
  summary, state = loop.train(experiment, log=io.StringIO())
  claim = summary["private_cut"]
  assert (claim["layer"], claim["epsilon"]) == (1, 4.0)
  assert claim["seeded"] == (seed is not None)
  assert claim["noise_stddev"] == experiment.program.model.cut.noise_stddev
  # One model, one record, twice: the outputs differ by their noise alone.
  once, again = (
    loop.predictions(experiment, state.params, split="test").logits
    for _ in range(2)
  )
  assert np.abs(once - again).max() > 1e-3
  # Fails if: two evaluations share a draw, whose difference would then show
  # the clean states' difference.
