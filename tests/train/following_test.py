"""What a process does that is not the first: all that it is told, on no disk.

One process plays both: what the first one says is written down, and a second
run hears it. Nothing is seeded, so that only what was told can be the same.
"""

import io

import jax
import numpy as np
import pytest

from ppnet import config as config_lib
from ppnet.core import hosts, records
from ppnet.train import loop
from tests import tiny


def train(workdir):
  """(summary, parameters) of two steps."""
  config = tiny.experiment(
    num_steps=2,
    eval_every_steps=2,
    checkpoint_every_steps=2,
    noise_seed=None,
    sampler_seed=None,
  )
  config.privacy.accountant = config_lib.Accountant.RDP
  config.attention_noise.consistency_weight = 0.0
  workdir.mkdir()
  records.write_json(workdir / "config.json", {"config": config})
  experiment = loop.open_experiment(config, workdir, devices=jax.devices()[:1])
  summary, state = loop.train(experiment, log=io.StringIO())
  leaves = jax.tree.leaves(jax.device_get(state.params))
  return summary, np.concatenate([np.ravel(leaf) for leaf in leaves])


@pytest.mark.slow  # Two real processes are a default test (processes_test).
def test_a_follower_draws_counts_and_trains_as_the_first(tmp_path, monkeypatch):
  told = []

  def say(make):
    told.append(make())
    return told[-1]

  monkeypatch.setattr(hosts, "from_first", say)
  summary, params = train(tmp_path / "first")
  heard = iter(told)
  monkeypatch.setattr(hosts, "from_first", lambda make: next(heard))
  monkeypatch.setattr(hosts, "is_first", lambda: False)
  followed, same = train(tmp_path / "follower")
  assert next(heard, None) is None
  np.testing.assert_array_equal(same, params)
  assert followed["charged_steps"] == summary["charged_steps"] == 2
  assert followed["epsilon"] == summary["epsilon"] > 0
  for name in ("privacy.json", "metrics.jsonl", "tensorboard"):
    assert (tmp_path / "first" / name).exists()
    assert not (tmp_path / "follower" / name).exists()
  # Fails if: a process draws a root of its own, does not count what the first
  # one charges, or writes into the first one's records.
