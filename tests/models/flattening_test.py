"""The directions that steps find privately, and the features without them."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppnet import config as config_lib
from ppnet.core import records
from ppnet.models import centring, flattening, linear, measuring
from ppnet.privacy import clipping
from ppnet.train import loop, losses, measured
from tests import tiny
from tests.models import centring_test

_ANSWERS = (3, 5, 6)
_NORM = 20.0
_SIZE = 24
_CENTRE, _FIRST, _SECOND, _AGAIN = (measuring.stage(n) for n in range(4))


def orthonormal(columns, *, seed=4):
  random = np.random.default_rng(seed).normal(size=(_SIZE, columns))
  return np.linalg.qr(random)[0]


def filled(values, stages):
  """Parameters with those of the given stages, each of which has one."""
  for name, value in stages.items():
    ((parameter, _),) = values[name].items()
    values[name] = {parameter: value}
  return jax.tree.map(lambda x: jnp.array(x, jnp.float32), values)


def params_of(**stages):
  """Parameters; a stage that is not given is pending."""
  values = {
    _CENTRE: {"shift": np.zeros(_SIZE)},
    _FIRST: {"directions": np.zeros((_SIZE, 3))},
    _SECOND: {"directions": np.zeros((_SIZE, 3))},
    _AGAIN: {"shift": np.zeros(_SIZE)},
    "head": {"kernel": np.random.default_rng(2).normal(size=(_SIZE + 1, 3))},
  }
  return filled(values, stages)


_DIRECTIONS = {"num_directions": 3, "num_power_steps": 2}


def clipped(
  params, examples, *, engine="bookkeeping", clip=1e6, options=_DIRECTIONS
):
  model = linear.LinearClassifier(
    config_lib.LinearConfig(feature_norm=_NORM, centre=True, **options),
    vocab_size=8,
    answer_ids=_ANSWERS,
  )
  return clipping.clipped_grad(
    losses.make_loss_fn(model, config_lib.AttentionNoiseConfig()),
    l2_clip_norm=clip,
    engine=engine,
    has_aux=True,
  )(params, examples)


def only(found, name):
  """The sum of one stage; no other part has any."""
  for other, part in found.grad_sum.items():
    if other != name:
      assert all((np.array(x) == 0).all() for x in jax.tree.leaves(part)), other
  ((value,),) = [jax.tree.leaves(found.grad_sum[name])]
  return np.array(value)


def head_sum(params, features, examples):
  """The sum of the head's gradients where these features are trained on."""
  features = np.concatenate(
    [_NORM * features, np.ones((len(features), 1))], axis=1
  )
  logits = features @ np.array(params["head"]["kernel"])
  logits -= logits.max(axis=1, keepdims=True)
  likely = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
  error = likely - (
    np.array(examples["targets"])[:, 1][:, None] == np.array(_ANSWERS)
  )
  return features.T @ error


@pytest.mark.parametrize("engine", ["vmap", "ghost", "bookkeeping"])
def test_the_second_sum_is_that_of_projections_on_a_random_start(engine):
  examples = centring_test.batch(5)
  mean = centring_test.units(examples).mean(axis=0)
  found = clipped(params_of(**{_CENTRE: -mean}), examples, engine=engine)
  moved = centring_test.units(examples) - mean
  start = np.linalg.qr(np.random.default_rng(0).standard_normal((_SIZE, 3)))[0]
  scale = 0.7 * np.sqrt(_SIZE / 3)
  np.testing.assert_allclose(
    only(found, _FIRST), -scale * moved.T @ moved @ start, rtol=1e-3, atol=1e-5
  )
  np.testing.assert_allclose(
    found.grad_norms,
    scale
    * np.linalg.norm(moved, axis=1)
    * np.linalg.norm(moved @ start, axis=1),
    rtol=1e-4,
  )


def test_the_third_sum_is_that_of_projections_on_what_was_found():
  examples = centring_test.batch(5)
  mean = centring_test.units(examples).mean(axis=0)
  last = orthonormal(3) * [3.0, 2.0, 1.0]
  found = clipped(params_of(**{_CENTRE: -mean, _FIRST: last}), examples)
  moved = centring_test.units(examples) - mean
  np.testing.assert_allclose(
    np.abs(only(found, _SECOND)),
    np.abs(moved.T @ moved @ orthonormal(3)),
    rtol=1e-3,
    atol=1e-5,
  )
  assert (np.array(found.grad_norms) <= 4).all()  # |x - mean|^2, |x| = 1.
  # Fails if: the columns are not made orthonormal, or the first scale stays.


def test_the_last_measuring_sum_is_that_of_flat_features_and_then_none_is():
  examples = centring_test.batch(6)
  mean = centring_test.units(examples).mean(axis=0)
  variances = np.array([9.0, 4.0, 1.0])
  directions = orthonormal(3)
  done = {_CENTRE: -mean, _FIRST: directions, _SECOND: directions * variances}
  found = clipped(params_of(**done), examples)
  moved = centring_test.units(examples) - mean
  factors = 1 / np.sqrt(variances)
  flat = moved - (moved @ directions * (1 - factors)) @ directions.T
  flat /= np.linalg.norm(flat, axis=1, keepdims=True)
  np.testing.assert_allclose(
    only(found, _AGAIN), flat.sum(axis=0), rtol=1e-3, atol=1e-5
  )
  params = params_of(**done, **{_AGAIN: -flat.mean(axis=0)})
  found = clipped(params, examples)
  np.testing.assert_allclose(
    only(found, "head"),
    head_sum(params, flat - flat.mean(axis=0), examples),
    rtol=1e-3,
    atol=1e-3,
  )
  # Fails if: what was measured is trained on later.


def test_each_measuring_step_sets_its_own_stage_and_nothing_else():
  params = params_of()
  grad = jax.tree.map(lambda x: jnp.full_like(x, 3.0), params)
  updates = jax.tree.map(jnp.ones_like, params)
  order = [_CENTRE, _FIRST, _SECOND, _AGAIN]
  for name in order:
    found = measured.of_updates(updates, grad, params)
    seen = measured.task_grad(grad, params)
    for other, part in found.items():
      expected = -3.0 if other == name else 0.0
      assert all((x == expected).all() for x in jax.tree.leaves(part)), other
    assert all((x == 0).all() for x in jax.tree.leaves(seen))
    params = jax.tree.map(jnp.add, params, found)
  found = measured.of_updates(updates, grad, params)
  seen = measured.task_grad(grad, params)
  for name in order:
    assert all((x == 0).all() for x in jax.tree.leaves(found[name]))
    assert all((x == 0).all() for x in jax.tree.leaves(seen[name]))
  assert (found["head"]["kernel"] == 1.0).all()
  assert (seen["head"]["kernel"] == 3.0).all()
  # Fails if: noise of measuring steps gets into the optimizer's moments.


def test_singular_vectors_and_values():
  random = np.random.default_rng(1).normal(size=(9, 4))
  left, values, _ = np.linalg.svd(random, full_matrices=False)
  found, sizes = flattening.singular(jnp.array(random, jnp.float32))
  np.testing.assert_allclose(sizes, values, rtol=1e-4)
  np.testing.assert_allclose(np.abs(found), np.abs(left), rtol=1e-3, atol=1e-5)
  found, sizes = flattening.singular(jnp.zeros((9, 4)))
  assert not found.any()
  assert not sizes.any()
  x = jnp.ones((2, 9))
  assert (flattening.flattened(x, jnp.zeros((9, 4))) == x).all()


def experiment(num_steps, **options):
  config = tiny.experiment(
    num_steps=num_steps, expected_batch_size=900, epsilon=None
  )
  config.privacy.noise_multiplier = 0.5
  config.attention_noise = config_lib.AttentionNoiseConfig()
  config.model.audio = None
  options = options or {"num_directions": 4, "num_power_steps": 4}
  config.model.linear = config_lib.LinearConfig(
    feature_norm=4.0, centre=True, **options
  )
  config.optimizer = config_lib.OptimizerConfig(
    name=config_lib.OptimizerName.SGD, learning_rate=0.5, beta1=0.9
  )
  return config


def test_a_run_finds_the_largest_directions_by_steps_that_are_charged(tmp_path):
  config = experiment(num_steps=7)
  records.write_json(tmp_path / "config.json", {"config": config})
  opened = loop.open_experiment(config, tmp_path, devices=jax.devices()[:1])
  summary, state = loop.train(opened, log=io.StringIO())
  everything = np.stack(
    [np.ravel(opened.datasets["train"][i]["image"]) for i in range(300)]
  )
  x = everything / np.linalg.norm(everything, axis=1, keepdims=True)
  x = x + np.array(state.params[_CENTRE][centring.PARAMETER])
  variances, vectors = np.linalg.eigh(x.T @ x / len(x))
  directions, found = flattening.singular(
    state.params[measuring.stage(4)][flattening.PARAMETER]
  )
  assert np.linalg.norm(np.array(directions).T @ vectors[:, -1]) > 0.95
  assert abs(found[0] / variances[-1] - 1) < 0.2
  assert summary["charged_steps"] == 7
  assert (np.array(state.params["head"]["kernel"]) != 0).any()


@pytest.mark.parametrize(
  "change",
  [
    {"num_directions": 1},
    {"num_directions": -2},
    {"num_power_steps": 0},
    {"centre": False},
  ],
)
def test_directions_that_cannot_be_found_are_refused(change):
  config = experiment(num_steps=5)
  for name, value in change.items():
    setattr(config.model.linear, name, value)
  with pytest.raises(ValueError, match=r"model\.linear\.num_"):
    config_lib.validate(config)
