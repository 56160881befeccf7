"""The covariance of the first features, measured privately, and made flat."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppnet import config as config_lib
from ppnet.core import records
from ppnet.models import centring, leading, linear, measuring
from ppnet.train import loop
from tests.models import centring_test, flattening_test

_ANSWERS = (3, 5, 6)
_NORM = 20.0
_SIZE = 24
_FIRST = 5
_FLOOR = 0.012
_SCALE = 1.5
_OPTIONS = {
  "num_leading": _FIRST,
  "num_leading_steps": 2,
  "leading_floor": _FLOOR,
}
_CENTRE, _ONE, _TWO, _AGAIN = (measuring.stage(n) for n in range(4))


def params_of(**stages):
  """Parameters; a stage that is not given is pending."""
  values = {
    _CENTRE: {"shift": np.zeros(_SIZE)},
    _ONE: {"covariance": np.zeros((_FIRST, _FIRST))},
    _TWO: {"covariance": np.zeros((_FIRST, _FIRST))},
    _AGAIN: {"shift": np.zeros(_SIZE)},
    "head": {"kernel": np.random.default_rng(2).normal(size=(_SIZE + 1, 3))},
  }
  return flattening_test.filled(values, stages)


def clipped(params, examples, **options):
  return flattening_test.clipped(params, examples, options=_OPTIONS, **options)


@pytest.mark.parametrize("engine", ["vmap", "ghost", "bookkeeping"])
@pytest.mark.parametrize("name", [_ONE, _TWO])
def test_a_sum_is_that_of_products_of_the_first_features(engine, name):
  examples = centring_test.batch(5)
  units = centring_test.units(examples)
  done = {_CENTRE: -units.mean(axis=0)}
  if name == _TWO:
    done[_ONE] = np.eye(_FIRST)
  z = (units - units.mean(axis=0))[:, :_FIRST]
  found = clipped(params_of(**done), examples, engine=engine)
  np.testing.assert_allclose(
    flattening_test.only(found, name), -_SCALE * z.T @ z, rtol=1e-3, atol=1e-5
  )
  np.testing.assert_allclose(
    found.grad_norms, _SCALE * np.square(z).sum(axis=1), rtol=1e-4
  )
  # Clipped, no summand is longer than 1, whatever the features are.
  longest = float(np.square(z).sum(axis=1).max()) * _SCALE
  found = clipped(params_of(**done), examples, engine=engine, clip=longest / 3)
  lengths = _SCALE * np.square(z).sum(axis=1)
  weights = np.minimum(1, longest / 3 / lengths)
  np.testing.assert_allclose(
    flattening_test.only(found, name),
    -_SCALE * (z * weights[:, None]).T @ z,
    rtol=1e-3,
    atol=1e-5,
  )
  # Fails if: all features are measured, or the gradient is not a product.


def test_what_follows_is_trained_on_features_without_large_variances():
  examples = centring_test.batch(6)
  units = centring_test.units(examples)
  mean = units.mean(axis=0)
  moved = units - mean
  z = moved[:, :_FIRST]
  covariance = z.T @ z / 6
  # Two measurements, neither of them symmetric, whose mean is right.
  off = np.triu(np.random.default_rng(3).normal(size=(_FIRST, _FIRST)), 1)
  one = _SCALE * (covariance + 0.1 * (off - off.T) + 0.01)
  two = _SCALE * (covariance - 0.01)
  done = {_CENTRE: -mean, _ONE: one, _TWO: two}
  variances, directions = np.linalg.eigh(covariance)
  assert variances[-1] > 2 * _FLOOR > 0.5 * _FLOOR > variances[0]
  factors = np.minimum(1, np.sqrt(_FLOOR / np.maximum(variances, 1e-9)))
  flat = np.concatenate(
    [z @ directions * factors @ directions.T, moved[:, _FIRST:]], axis=1
  )
  flat /= np.linalg.norm(flat, axis=1, keepdims=True)
  found = clipped(params_of(**done), examples)
  np.testing.assert_allclose(
    flattening_test.only(found, _AGAIN), flat.sum(axis=0), rtol=1e-3, atol=1e-5
  )
  params = params_of(**done, **{_AGAIN: -flat.mean(axis=0)})
  np.testing.assert_allclose(
    flattening_test.only(clipped(params, examples), "head"),
    flattening_test.head_sum(params, flat - flat.mean(axis=0), examples),
    rtol=1e-3,
    atol=1e-3,
  )
  # Fails if: one measurement counts alone, or their scale stays in them.


def test_no_variance_above_the_floor_is_left_and_small_ones_stay():
  rng = np.random.default_rng(1)
  x = rng.normal(size=(4000, 6)) * [3, 1, 0.1, 0.2, 5, 1]
  covariance = x[:, :4].T @ x[:, :4] / len(x)
  after = np.array(
    leading.flattened(
      jnp.array(x, jnp.float32), [jnp.array(covariance)], floor=0.5
    )
  )
  variances = np.linalg.eigvalsh(after[:, :4].T @ after[:, :4] / len(x))
  np.testing.assert_allclose(
    variances, [*np.linalg.eigvalsh(covariance)[:2], 0.5, 0.5], rtol=1e-3
  )
  np.testing.assert_array_equal(after[:, 4:], x[:, 4:].astype(np.float32))


@pytest.mark.parametrize("sign", [0.0, -1.0])
def test_what_is_not_measured_or_is_noise_changes_nothing(sign):
  x = jnp.array(np.random.default_rng(1).normal(size=(3, 6)), jnp.float32)
  found = leading.flattened(x, [sign * jnp.eye(4)], floor=0.5)
  np.testing.assert_allclose(found, x, rtol=1e-5, atol=1e-6)


def experiment(num_steps):
  return flattening_test.experiment(
    num_steps, num_leading=8, num_leading_steps=3, leading_floor=0.01
  )


def test_a_run_measures_the_covariance_by_steps_that_are_charged(tmp_path):
  config = experiment(num_steps=7)
  records.write_json(tmp_path / "config.json", {"config": config})
  opened = loop.open_experiment(config, tmp_path, devices=jax.devices()[:1])
  summary, state = loop.train(opened, log=io.StringIO())
  everything = np.stack(
    [
      np.ravel(opened.datasets["train"][i]["image"])
      for i in range(len(opened.datasets["train"]))
    ]
  )
  x = everything / np.linalg.norm(everything, axis=1, keepdims=True)
  x = x + np.array(state.params[_CENTRE][centring.PARAMETER])
  expected = x[:, :8].T @ x[:, :8] / len(x)
  found = np.mean(
    [
      np.array(state.params[measuring.stage(n)][leading.PARAMETER]) / _SCALE
      for n in (1, 2, 3)
    ],
    axis=0,
  )
  assert np.abs(found - expected).max() < 0.1 * np.abs(expected).max()
  assert summary["charged_steps"] == 7
  assert (np.array(state.params["head"]["kernel"]) != 0).any()


@pytest.mark.parametrize(
  ("change", "name"),
  [
    ({"num_leading": -1}, "num_leading"),
    ({"num_leading_steps": 0}, "num_leading_steps"),
    ({"leading_floor": 0.0}, "leading_floor"),
    ({"centre": False}, "centre"),
  ],
)
def test_a_covariance_that_cannot_be_measured_is_refused(change, name):
  config = experiment(num_steps=5)
  for field, value in change.items():
    setattr(config.model.linear, field, value)
  with pytest.raises(ValueError, match=rf"model\.linear\.{name}"):
    config_lib.validate(config)


def test_more_than_there_are_features_are_refused():
  model = linear.LinearClassifier(
    config_lib.LinearConfig(feature_norm=_NORM, centre=True, num_leading=25),
    vocab_size=8,
    answer_ids=_ANSWERS,
  )
  examples = centring_test.batch(2)
  with pytest.raises(ValueError, match=r"num_leading <= 24"):
    model.init(
      jax.random.key(0), examples["tokens"], media={"image": examples["image"]}
    )
