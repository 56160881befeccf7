"""Schedules and updates against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppnet import config as config_lib
from ppnet.train import optimizer


def test_warmup_then_cosine_to_zero():
  config = config_lib.OptimizerConfig(learning_rate=2.0, warmup_steps=4)
  rate = optimizer.schedule(config, 12)
  values = [float(rate(step)) for step in range(13)]
  np.testing.assert_allclose(values[:5], [0.0, 0.5, 1.0, 1.5, 2.0])
  expected = [1 + np.cos(np.pi * step / 8) for step in range(9)]
  np.testing.assert_allclose(values[4:], expected, atol=1e-6)


def test_constant_schedule_is_constant():
  config = config_lib.OptimizerConfig(
    learning_rate=0.3, schedule=config_lib.Schedule.CONSTANT
  )
  rate = optimizer.schedule(config, 5)
  assert [float(rate(step)) for step in (0, 3, 9)] == pytest.approx([0.3] * 3)


@pytest.mark.parametrize("name", list(config_lib.OptimizerName))
def test_first_update_matches_closed_form(name):
  config = config_lib.OptimizerConfig(
    name=name,
    learning_rate=0.1,
    schedule=config_lib.Schedule.CONSTANT,
    weight_decay=0.5,
  )
  tx = optimizer.build(config, 10)
  params = {"w": jnp.array([1.0, -2.0])}
  grad = {"w": jnp.array([0.4, 3.0])}
  updates, _ = tx.update(grad, tx.init(params), params)
  decay = 0.5 * np.array([1.0, -2.0])
  if name is config_lib.OptimizerName.SGD:
    expected = -0.1 * (np.array([0.4, 3.0]) + decay)
  else:  # The first Adam step has size 1 in every coordinate.
    expected = -0.1 * (np.sign([0.4, 3.0]) + decay)
  np.testing.assert_allclose(
    jax.tree.leaves(updates)[0], expected, rtol=1e-5, atol=1e-6
  )
