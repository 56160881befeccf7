"""The mean that step 0 measures: its gradient, its step, and what follows."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppnet import config as config_lib
from ppnet.core import prng, records
from ppnet.models import centring, linear, measuring
from ppnet.privacy import clipping
from ppnet.train import loop, losses, measured
from tests import tiny

_ANSWERS = (3, 5, 6)
_NORM = 20.0
_CENTRE = measuring.stage(0)


def batch(count):
  rng = np.random.default_rng(0)
  return {
    "tokens": jnp.zeros((count, 2), jnp.int32),
    "targets": jnp.array(rng.choice(_ANSWERS, (count, 2)), jnp.int32),
    "loss_mask": jnp.tile(jnp.array([0.0, 1.0]), (count, 1)),
    "image": jnp.array(rng.normal(1.0, 1.0, (count, 2, 3, 4)), jnp.float32),
    "key": jax.random.split(prng.root(0), count),
  }


def model():
  return linear.LinearClassifier(
    config_lib.LinearConfig(feature_norm=_NORM, centre=True),
    vocab_size=8,
    answer_ids=_ANSWERS,
  )


def params_with(shift_value, *, scale=1.0):
  kernel = jax.random.normal(prng.root(2), (25, 3))
  return {
    _CENTRE: {"shift": jnp.array(shift_value, jnp.float32)},
    "head": {"kernel": scale * kernel},
  }


def units(examples):
  x = np.array(examples["image"]).reshape(len(examples["image"]), -1)
  return x / np.linalg.norm(x, axis=1, keepdims=True)


def clipped(engine, params, examples, *, clip=1.0):
  loss_fn = losses.make_loss_fn(model(), config_lib.AttentionNoiseConfig())
  return clipping.clipped_grad(
    loss_fn, l2_clip_norm=clip, engine=engine, has_aux=True
  )(params, examples)


@pytest.mark.parametrize("engine", ["vmap", "ghost", "bookkeeping"])
def test_the_first_sum_is_that_of_the_features_and_nothing_else(engine):
  examples = batch(5)
  found = clipped(engine, params_with(np.zeros(24)), examples)
  np.testing.assert_allclose(
    found.grad_sum[_CENTRE]["shift"], units(examples).sum(axis=0), rtol=1e-4
  )
  assert (np.array(found.grad_sum["head"]["kernel"]) == 0).all()
  np.testing.assert_allclose(found.grad_norms, 1.0, rtol=1e-5)
  # Fails if: a feature is longer than the clip norm, and the mean too short.


@pytest.mark.parametrize(
  "engine",
  [
    "bookkeeping",
    pytest.param("vmap", marks=pytest.mark.slow),
    pytest.param("ghost", marks=pytest.mark.slow),
  ],
)
def test_a_later_gradient_is_that_of_the_moved_features(engine):
  examples = batch(4)
  mean = units(examples).mean(axis=0)
  params = params_with(-mean, scale=0.1)
  found = clipped(engine, params, examples, clip=1e6)
  moved = _NORM * (units(examples) - mean)
  features = np.concatenate([moved, np.ones((4, 1))], axis=1)
  logits = features @ np.array(params["head"]["kernel"])
  likely = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
  answers = np.array(examples["targets"])[:, 1]
  error = likely - (answers[:, None] == np.array(_ANSWERS))
  np.testing.assert_allclose(
    found.grad_sum["head"]["kernel"],
    features.T @ error,
    rtol=1e-3,
    atol=1e-3,
  )
  assert (np.array(found.grad_sum[_CENTRE]["shift"]) == 0).all()
  # Fails if: the shift is trained on after its step.


def test_the_shift_is_set_once_and_nothing_else_moves_with_it():
  updates = jax.tree.map(jnp.ones_like, params_with(np.zeros(24)))
  grad = jax.tree.map(lambda x: 3.0 * x, updates)
  first = measured.of_updates(updates, grad, params_with(np.zeros(24)))
  assert (first[_CENTRE]["shift"] == -3.0).all()
  assert (first["head"]["kernel"] == 0).all()
  later = measured.of_updates(updates, grad, params_with(np.full(24, 0.1)))
  assert (later[_CENTRE]["shift"] == 0).all()
  assert (later["head"]["kernel"] == 1.0).all()
  plain = {"head": updates["head"]}
  assert measured.of_updates(plain, plain, plain) is plain
  # Fails if: noise goes on moving the shift.


def experiment(**changes):
  config = tiny.experiment(**changes)
  config.attention_noise = config_lib.AttentionNoiseConfig()
  config.model.audio = None
  config.model.linear = config_lib.LinearConfig(feature_norm=4.0, centre=True)
  config.optimizer = config_lib.OptimizerConfig(
    name=config_lib.OptimizerName.SGD, learning_rate=0.5
  )
  return config


def test_a_run_measures_the_mean_in_a_step_that_is_charged(tmp_path):
  config = experiment(num_steps=2, expected_batch_size=900, epsilon=None)
  config.privacy.noise_multiplier = 0.5
  records.write_json(tmp_path / "config.json", {"config": config})
  opened = loop.open_experiment(config, tmp_path, devices=jax.devices()[:1])
  summary, state = loop.train(opened, log=io.StringIO())
  everything = np.stack(
    [np.ravel(opened.datasets["train"][i]["image"]) for i in range(300)]
  )
  mean = (everything / np.linalg.norm(everything, axis=1, keepdims=True)).mean(
    axis=0
  )
  found = -np.array(state.params[_CENTRE][centring.PARAMETER])
  assert np.linalg.norm(found - mean) < 0.2 * np.linalg.norm(mean)
  assert summary["charged_steps"] == 2
  assert (np.array(state.params["head"]["kernel"]) != 0).any()


@pytest.mark.parametrize(
  ("change", "says"),
  [
    (lambda c: setattr(c.model.linear, "feature_norm", 0.0), "feature_norm"),
    (lambda c: setattr(c.model.linear, "feature_norm", -1.0), "feature_norm"),
    (lambda c: setattr(c.privacy, "l2_clip_norm", 0.5), "l2_clip_norm"),
    (
      lambda c: setattr(
        c.privacy, "clip_scope", config_lib.ClipScope.PER_LAYER
      ),
      "clip_scope",
    ),
  ],
)
def test_what_would_cut_the_mean_short_is_refused(change, says):
  config = experiment()
  change(config)
  with pytest.raises(ValueError, match=says):
    config_lib.validate(config)


def test_features_get_their_norm_and_zeros_stay():
  x = jnp.array([[3.0, 4.0], [0.0, 0.0]])
  np.testing.assert_allclose(
    centring.scaled(x, norm=10.0), [[6.0, 8.0], [0.0, 0.0]], rtol=1e-6
  )
  assert centring.scaled(x, norm=0.0) is x
