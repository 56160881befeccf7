"""Tests of the correlated noise: its covariance, its sampler, its restarts."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax_privacy.experimental import accounting as peer
from jax_privacy.matrix_factorization import banded

from ppnet import config as config_lib
from ppnet.core import prng
from ppnet.privacy import (
  accounting,
  correlated,
  mechanism,
  noise,
  participation,
)

_NUM_STEPS, _BANDS = 7, 3


def _zeros(dtype=jnp.float32):
  return {"a": jnp.zeros((50, 40), dtype), "b": jnp.zeros(30, dtype)}


def _tx(noise_stddev=1.0, num_bands=_BANDS, num_steps=_NUM_STEPS):
  return correlated.banded_privatizer(
    noise_stddev=noise_stddev, num_steps=num_steps, num_bands=num_bands
  )


def _key(step, seed=3):
  return prng.stream(prng.root(seed), prng.Stream.DP_NOISE, step)


def _run(tx, *, state=None, start=0, grad_sum=None, seed=3):
  """The noises of all steps from `start` on, f32[steps, entries]."""
  grad_sum = _zeros() if grad_sum is None else grad_sum
  state = tx.init(grad_sum) if state is None else state
  update = jax.jit(lambda s, key: tx.update(grad_sum, s, noise_key=key))
  rows = []
  for step in range(start, _NUM_STEPS):
    noisy, state = update(state, _key(step, seed))
    rows.append(
      np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(noisy)])
    )
  return np.stack(rows)


def _strategy(num_steps=_NUM_STEPS, num_bands=_BANDS):
  """C, written out: Toeplitz, cut to its bands, columns of norm 1."""
  coefs = [1.0]
  for k in range(1, num_bands):
    coefs.append(coefs[-1] * (2 * k - 1) / (2 * k))
  matrix = np.zeros((num_steps, num_steps))
  for k, coef in enumerate(coefs):
    matrix += coef * np.eye(num_steps, k=-k)
  return matrix / np.linalg.norm(matrix, axis=0)


def _largest_z_score(rows, inverse, noise_stddev):
  """Of the noises' second moments over the steps, against C^-1 C^-T."""
  claimed = noise_stddev**2 * inverse @ inverse.T
  found = rows @ rows.T / rows.shape[1]
  diagonal = np.diag(claimed)
  # The variance of a product of two Gaussians, over the entries.
  spread = np.sqrt((np.outer(diagonal, diagonal) + claimed**2) / rows.shape[1])
  return np.abs((found - claimed) / spread).max()


@pytest.mark.parametrize("noise_stddev", [0.2, 1.0, 5.0])
def test_covariance_over_steps_is_that_of_the_inverse_and_no_other(
  noise_stddev,
):
  rows = _run(_tx(noise_stddev))
  inverse = np.linalg.inv(_strategy())
  score = lambda matrix, scale: _largest_z_score(rows, matrix, scale)
  assert score(inverse, noise_stddev) < 5
  assert score(inverse, noise_stddev * 2 / 3) > 8
  assert score(inverse, noise_stddev * 3 / 2) > 8
  assert score(np.eye(_NUM_STEPS), noise_stddev) > 8  # Independent noise.
  # Fails if: the noise is independent, or C is used for its inverse.


def test_noise_is_the_matrix_times_the_draws_of_each_step():
  drawn = np.stack(
    [
      np.concatenate(
        [
          np.ravel(leaf)
          for leaf in jax.tree.leaves(
            noise.standard_normal(_key(step), _zeros())
          )
        ]
      )
      for step in range(_NUM_STEPS)
    ]
  )
  np.testing.assert_allclose(
    _run(_tx(2.5)),
    2.5 * np.linalg.inv(_strategy()) @ drawn,
    rtol=1e-5,
    atol=2e-5,  # A recurrence in float32 against one product in float64.
  )


def test_columns_of_the_strategy_have_norm_one_and_bands():
  # Theirs, from the parameters: what the recurrence inverts.
  params = np.asarray(
    banded.ColumnNormalizedBanded.default(_NUM_STEPS, _BANDS).params
  )
  matrix = np.zeros((_NUM_STEPS, _NUM_STEPS))
  for column, values in enumerate(params):
    below = min(_BANDS, _NUM_STEPS - column)
    matrix[column : column + below, column] = values[:below]
  matrix /= np.linalg.norm(matrix, axis=0)
  np.testing.assert_allclose(matrix, _strategy(), rtol=1e-6)
  for first in range(_BANDS):
    chosen = _strategy()[:, first::_BANDS]
    gram = chosen.T @ chosen  # Participations of one example are orthogonal.
    np.testing.assert_allclose(gram, np.eye(len(gram)), atol=1e-12)


def test_one_band_is_independent_noise():
  grad_sum = jax.tree.map(lambda leaf: leaf + 1.5, _zeros())
  one = _run(_tx(0.7, num_bands=1), grad_sum=grad_sum)
  plain = noise.gaussian_privatizer(noise_stddev=0.7)
  for step in range(_NUM_STEPS):
    noisy, _ = plain.update(
      grad_sum, plain.init(grad_sum), noise_key=_key(step)
    )
    expected = np.concatenate(
      [np.ravel(leaf) for leaf in jax.tree.leaves(noisy)]
    )
    # Jitted and not: XLA may fuse the product and the sum.
    np.testing.assert_allclose(one[step], expected, rtol=1e-6, atol=1e-6)


def test_less_noise_is_left_in_the_sum_over_steps():
  inverse = np.linalg.inv(_strategy(num_steps=64, num_bands=8))
  left = np.linalg.norm(np.cumsum(inverse, axis=0), axis=1)
  independent = np.sqrt(np.arange(1, 65))
  assert left[-1] < 0.6 * independent[-1]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_noise_and_history_are_float32(dtype):
  rows = _run(_tx(), grad_sum=_zeros(dtype))
  np.testing.assert_array_equal(rows, _run(_tx()))
  state = _tx().init(_zeros(dtype))
  assert {leaf.dtype for leaf in jax.tree.leaves(state.history)} == {
    np.dtype("float32")
  }
  # Fails if: noise is drawn, or remembered, in the dtype of the gradient.


def test_noise_does_not_depend_on_the_sum_and_zero_is_exact():
  grad_sum = jax.tree.map(lambda leaf: leaf + 2.0, _zeros())
  np.testing.assert_allclose(
    _run(_tx(), grad_sum=grad_sum) - 2.0, _run(_tx()), atol=1e-6
  )
  np.testing.assert_array_equal(_run(_tx(0.0), grad_sum=grad_sum), 2.0)


def test_fresh_start_forgets_the_noise_before_and_loses_no_noise():
  tx = _tx()
  state = correlated.start_at(tx.init(_zeros()), 4, put=jnp.asarray)
  rows = _run(tx, state=state, start=4)
  inverse = np.linalg.inv(_strategy()[4:, 4:])
  assert _largest_z_score(rows, inverse, 1.0) < 5
  whole = np.linalg.inv(_strategy())[4:]
  assert _largest_z_score(rows, whole, 1.0) > 6  # A smaller difference.
  empty = noise.gaussian_privatizer(noise_stddev=1.0).init(_zeros())
  assert correlated.start_at(empty, 4, put=jnp.asarray) == empty
  # Fails if: the scale of the first rows is used again.


def test_noise_does_not_depend_on_the_mesh():
  tx = _tx(1.3)
  grad_sum = {"a": jnp.zeros((64, 16)), "c": jnp.zeros(24)}

  def steps(out_shardings=None):
    # A program for each step, as in training: its state comes in and goes out.
    update = jax.jit(
      lambda s, key: tx.update(grad_sum, s, noise_key=key),
      out_shardings=out_shardings,
    )
    state, noises = tx.init(grad_sum), []
    if out_shardings is not None:
      state = jax.device_put(state, out_shardings[1])
    for step in range(4):
      noisy, state = update(state, _key(step))
      noises.append(jax.device_get(noisy))
    return noises

  expected = steps()
  mesh = jax.make_mesh(
    (4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2
  )
  named = lambda *axes: jax.sharding.NamedSharding(
    mesh, jax.sharding.PartitionSpec(*axes)
  )
  sharded = steps(
    (
      {"a": named("x", "y"), "c": named(("x", "y"))},
      correlated.BandedState(
        step=named(),
        history={"a": named(None, "x", "y"), "c": named(None, ("x", "y"))},
      ),
    )
  )
  chex.assert_trees_all_equal(sharded, expected)
  # Fails if: noise is drawn per shard.


@pytest.mark.parametrize(
  "bad",
  [
    {"noise_stddev": -1.0},
    {"num_bands": 0},
    {"num_bands": 8},
    {"num_steps": 0},
  ],
)
def test_bad_argument_is_named(bad):
  with pytest.raises(ValueError, match=next(iter(bad))):
    _tx(**bad)


def test_key_is_checked():
  with pytest.raises(ValueError, match="one key"):
    _tx().update(
      _zeros(),
      _tx().init(_zeros()),
      noise_key=jax.random.split(jax.random.key(0), 2),
    )


def _config(num_bands=4, num_steps=22, size=90, **privacy):
  return config_lib.ExperimentConfig(
    privacy=config_lib.PrivacyConfig(
      noise_mechanism=config_lib.NoiseMechanism.BANDED,
      num_bands=num_bands,
      **privacy,
    ),
    train=config_lib.TrainConfig(num_steps=num_steps, expected_batch_size=size),
  )


@pytest.mark.parametrize("accountant", list(config_lib.Accountant))
def test_accounting_is_that_of_a_sampled_gaussian_per_turn(accountant):
  built = mechanism.build(_config(epsilon=4.0, accountant=accountant), 900)
  which = built.sampler.participation
  assert which == participation.CyclicPoisson(sampling_prob=0.4, num_groups=4)
  assert built.sampling_prob == pytest.approx(0.1)
  spent = accounting.epsilon(
    noise_multiplier=built.noise_multiplier,
    sampling_prob=0.4,
    num_steps=6,  # Of 22 steps in turns of 4.
    delta=1e-5,
    accountant=accountant,
  )
  assert 0.995 * 4 <= built.epsilon(22) == spent <= 4
  event = peer.amplified_bandmf_event(
    built.noise_multiplier, 22, num_bands=4, sampling_prob=0.4
  )
  assert which.dp_event(built.noise_multiplier, 22) == event
  claim = built.claim()
  assert claim["noise_mechanism"] == "BANDED"
  assert claim["num_bands"] == claim["steps_per_release"] == 4
  assert claim["sampler"] == "CYCLIC_POISSON"
  assert (
    f"CYCLIC_POISSON sampling, {accountant.name} accountant, noise of 4 bands"
    in claim["guarantee"]
  )
  assert "stays empty" in claim["guarantee"]
  # Fails if: the correlated noise is accounted for as independent noise.


def test_one_band_costs_what_independent_noise_costs():
  more = {"epsilon": None, "noise_multiplier": 1.5}
  one = mechanism.build(_config(num_bands=1, **more), 900)
  config = _config(num_bands=1, **more)
  config.privacy.noise_mechanism = config_lib.NoiseMechanism.INDEPENDENT
  config.privacy.num_bands = None
  plain = mechanism.build(config, 900)
  assert one.epsilon(22) == plain.epsilon(22)
  assert one.noise_stddev == plain.noise_stddev


def test_mechanism_adds_the_correlated_noise_that_it_claims():
  built = mechanism.build(
    _config(
      num_bands=_BANDS,
      num_steps=_NUM_STEPS,
      epsilon=None,
      noise_multiplier=2.0,
      l2_clip_norm=0.5,
      neighboring_relation=config_lib.NeighboringRelation.REPLACE_ONE,
    ),
    900,
  )
  assert built.noise_stddev == 2.0 * 2 * 0.5
  rows = _run(built.privatizer())
  inverse = np.linalg.inv(_strategy())
  assert _largest_z_score(rows, inverse, 2.0) < 5
  # Nobody is in two steps that share noise.
  draws = [set(built.sampler.draw(step).tolist()) for step in range(_NUM_STEPS)]
  for step, draw in enumerate(draws):
    for other in draws[step + 1 : step + _BANDS]:
      assert not draw & other
  # Fails if: batches are drawn from all examples in every step.


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"num_bands": None}, "BANDED noise with num_bands"),
    ({"num_bands": 11}, "num_bands=10 or less"),
    ({"num_bands": 23, "size": 9}, "num_bands <= 22"),
    ({"sampler": config_lib.Sampler.SHUFFLE}, "and the POISSON sampler"),
  ],
)
def test_bands_that_do_not_fit_are_named(changes, message):
  with pytest.raises(ValueError, match=message):
    mechanism.build(_config(**changes), 900)


def test_bands_and_groups_cannot_come_apart():
  built = mechanism.build(_config(epsilon=None, noise_multiplier=1.0), 900)
  with pytest.raises(ValueError, match="as many groups"):
    dataclasses.replace(built, num_bands=5)
  plain = _config(epsilon=None, noise_multiplier=1.0)
  plain.privacy.noise_mechanism = config_lib.NoiseMechanism.INDEPENDENT
  plain.privacy.num_bands = None
  with pytest.raises(ValueError, match="as many groups"):
    dataclasses.replace(mechanism.build(plain, 900), num_bands=4)
  # Fails if: correlated noise meets Poisson batches of everybody.
