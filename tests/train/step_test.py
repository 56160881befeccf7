"""The step against a loop, and what must not change it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ppnet import config as config_lib
from ppnet.core import prng
from ppnet.privacy import mechanism as mechanism_lib
from ppnet.train import state as state_lib
from ppnet.train import step as step_lib
from tests import tiny

N, D = 40, 3
LEARNING_RATE = 0.5
TX = optax.sgd(LEARNING_RATE)


def loss_fn(params, batch):
  """A linear model; a little of the example's own key, to see it used."""
  jitter = jax.vmap(lambda key: jax.random.normal(key))(batch["key"])
  losses = batch["x"] @ params["w"] + params["b"] + 0.0 * jitter
  return losses, {"task": losses, "attention_consistency": jitter}


def build(**changes):
  return mechanism_lib.build(
    tiny.experiment(expected_batch_size=10, **changes), N
  )


def records(rng, count):
  return {
    "x": rng.normal(size=(count, D)).astype(np.float32) * 3,
    "index": np.arange(count, dtype=np.int32) + 5,
    "is_padding_example": np.zeros(count, bool),
    "label": np.zeros(count, np.int32),
  }


def fresh_state():
  params = {"w": jnp.array([0.5, -1.0, 2.0]), "b": jnp.float32(0.25)}
  return state_lib.TrainState(
    step=jnp.int32(0), params=params, opt_state=TX.init(params)
  )


def take(mechanism, batch, *, cut, state=None, noise_seed=3):
  """One whole step, its batch cut at `cut` into padded microbatches."""
  state = fresh_state() if state is None else state
  grad_sum = step_lib.init_grad_sum(state.params)
  accumulate = jax.jit(
    lambda *args: step_lib.accumulate(
      *args, clipped_grad_fn=mechanism.clipped_grad_fn(loss_fn, has_aux=True)
    )
  )
  parts = []
  for start in range(0, len(batch["x"]), cut):
    rows = {name: value[start : start + cut] for name, value in batch.items()}
    missing = cut - len(rows["x"])
    padded = {
      name: np.concatenate([value, np.zeros_like(value[:1]).repeat(missing, 0)])
      for name, value in rows.items()
    }
    padded["is_padding_example"][len(rows["x"]) :] = True
    padded["x"][len(rows["x"]) :] = 1e6  # Must not count.
    grad_sum, part = accumulate(
      grad_sum,
      state.params,
      padded,
      prng.root(1),
      state.step,
      state.clip_norm,
    )
    parts.append(part)
  update = jax.jit(
    lambda *args: step_lib.update(
      *args,
      mechanism=mechanism,
      tx=TX,
      learning_rate_fn=optax.constant_schedule(LEARNING_RATE),
    )
  )
  noise_state = mechanism.privatizer().init(state.params)
  new, _, scalars = update(state, grad_sum, prng.root(noise_seed), noise_state)
  return new, scalars, parts


def flat(state):
  return np.concatenate(
    [np.ravel(leaf) for leaf in jax.tree.leaves(state.params)]
  )


def test_step_without_noise_matches_loop_over_examples():
  batch = records(np.random.default_rng(0), 7)
  mechanism = build(noise=False)
  new, _, parts = take(mechanism, batch, cut=4)
  total = np.zeros(D + 1)
  for x in batch["x"]:
    grad = np.concatenate([[1.0], x])  # Leaves in order: b, w.
    total += grad * min(1.0, 1.0 / np.linalg.norm(grad))
  expected = flat(fresh_state()) - LEARNING_RATE * total / 10
  np.testing.assert_allclose(flat(new), expected, rtol=1e-4)
  assert int(new.step) == 1
  norms = np.concatenate([part.grad_norm for part in parts])[:7]
  np.testing.assert_allclose(
    norms, np.sqrt(1 + (batch["x"] ** 2).sum(axis=1)), rtol=1e-5
  )


def test_the_sum_is_divided_by_the_expected_size_and_not_by_the_realised_one():
  """Twice the examples, twice the step: the divisor does not move."""
  mechanism = build(noise=False)
  batch = records(np.random.default_rng(1), 4)
  double = {name: np.concatenate([v, v]) for name, v in batch.items()}
  start = flat(fresh_state())
  one = flat(take(mechanism, batch, cut=8)[0]) - start
  two = flat(take(mechanism, double, cut=8)[0]) - start
  np.testing.assert_allclose(two, 2 * one, rtol=1e-4)
  # Fails if: the noisy sum is divided by the realised batch size.


@pytest.mark.parametrize("cut", [2, 3, 16])
def test_how_a_batch_is_cut_changes_nothing(cut):
  batch = records(np.random.default_rng(2), 7)
  mechanism = build()
  expected, _, whole = take(mechanism, batch, cut=7)
  got, _, parts = take(mechanism, batch, cut=cut)
  np.testing.assert_allclose(flat(got), flat(expected), atol=1e-6)

  def jitter(parts):
    rows = [np.asarray(p.terms["attention_consistency"]) for p in parts]
    counted = np.concatenate([np.asarray(p.counted) for p in parts])
    return np.concatenate(rows)[counted]

  np.testing.assert_array_equal(jitter(parts), jitter(whole))
  # Fails if: a record's key is its place in the microbatch.


def test_an_empty_draw_is_a_step_of_pure_noise():
  mechanism = build()
  empty = {
    name: value[:0]
    for name, value in records(np.random.default_rng(0), 1).items()
  }
  new, scalars, parts = take(mechanism, empty, cut=4)
  moved = (flat(fresh_state()) - flat(new)) / LEARNING_RATE * 10
  assert parts == []
  assert (moved != 0).all()
  # 4 draws: within six standard deviations, and not all tiny.
  assert np.abs(moved).max() < 6 * mechanism.noise_stddev
  assert np.abs(moved).max() > 0.05 * mechanism.noise_stddev
  assert bool(scalars["params_finite"])


def test_noise_is_added_once_however_many_microbatches():
  mechanism = build()
  batch = records(np.random.default_rng(3), 8)
  quiet = dataclasses.replace(mechanism, noise_stddev=0.0)
  added = {
    cut: flat(take(mechanism, batch, cut=cut)[0])
    - flat(take(quiet, batch, cut=cut)[0])
    for cut in (1, 8)
  }
  np.testing.assert_allclose(added[1], added[8], atol=1e-6)
  # Fails if: every microbatch adds its own noise.


def test_steps_and_seeds_draw_different_noise():
  mechanism = build()
  empty = {
    name: value[:0]
    for name, value in records(np.random.default_rng(0), 1).items()
  }
  start = fresh_state()
  later = dataclasses.replace(start, step=jnp.int32(1))
  moves = [
    flat(take(mechanism, empty, cut=2, state=state, noise_seed=seed)[0])
    for state, seed in ((start, 3), (later, 3), (start, 4))
  ]
  for i in range(3):
    for j in range(i):
      assert np.abs(moves[i] - moves[j]).min() > 0
  again = take(mechanism, empty, cut=2, state=start, noise_seed=3)[0]
  np.testing.assert_array_equal(flat(again), moves[0])
  # Fails if: the step's number does not enter the noise key.


def test_dp_perturbation_is_the_noise_times_the_parameters():
  mechanism = build()
  batch = records(np.random.default_rng(5), 6)
  quiet = dataclasses.replace(mechanism, noise_stddev=0.0)
  noisy, scalars, _ = take(mechanism, batch, cut=6)
  clean, none, _ = take(quiet, batch, cut=6)
  z = (flat(clean) - flat(noisy)) / LEARNING_RATE  # Noise / expected size.
  np.testing.assert_allclose(
    scalars["dp_perturbation"], z @ flat(fresh_state()), rtol=1e-3
  )
  assert float(none["dp_perturbation"]) == 0.0


def test_a_bad_example_counts_as_zero_and_touches_no_other():
  mechanism = build(noise=False)
  batch = records(np.random.default_rng(6), 5)
  bad = {name: value.copy() for name, value in batch.items()}
  bad["x"][2] = np.nan
  without = {name: np.delete(value, 2, axis=0) for name, value in batch.items()}
  got, _, parts = take(mechanism, bad, cut=5)
  expected, _, _ = take(mechanism, without, cut=5)
  np.testing.assert_allclose(flat(got), flat(expected), rtol=1e-5)
  assert np.asarray(parts[0].is_nonfinite).tolist() == [
    False,
    False,
    True,
    False,
    False,
  ]


def test_batch_clipping_clips_the_mean_of_the_whole_batch():
  """The named ablation, over several microbatches."""
  mechanism = build(clipping=config_lib.Clipping.BATCH, noise=False)
  batch = records(np.random.default_rng(7), 6)
  new, _, _ = take(mechanism, batch, cut=2)
  mean = np.concatenate([[1.0], batch["x"].mean(axis=0)])
  clipped = mean * min(1.0, 1.0 / np.linalg.norm(mean)) * 6
  expected = flat(fresh_state()) - LEARNING_RATE * clipped / 10
  np.testing.assert_allclose(flat(new), expected, rtol=1e-4)


def test_the_train_state_holds_no_key():
  new, _, _ = take(build(), records(np.random.default_rng(8), 3), cut=3)
  for leaf in jax.tree.leaves(new):
    assert not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    assert leaf.dtype != jnp.uint32
  # Fails if: the noise key is kept in the optimizer's state.


def test_an_adaptive_clip_norm_scales_the_step_and_moves_to_its_quantile():
  mechanism = build(
    noise=False, clip_quantile=0.5, clip_learning_rate=0.3, l2_clip_norm=1.0
  )
  batch = records(np.random.default_rng(9), 7)
  for clip_norm in (0.5, 3.0):
    state = dataclasses.replace(fresh_state(), clip_norm=jnp.float32(clip_norm))
    new, scalars, _ = take(mechanism, batch, cut=3, state=state)
    grads = np.concatenate([np.ones((7, 1)), batch["x"]], axis=1)
    norms = np.linalg.norm(grads, axis=1)
    factors = np.minimum(1.0, clip_norm / norms)[:, None]
    total = (grads * factors).sum(axis=0)
    expected = flat(fresh_state()) - LEARNING_RATE * total / 10
    np.testing.assert_allclose(flat(new), expected, rtol=1e-4)
    # The share is of the expected size, 10, around a half.
    share = 0.5 + (np.sum(norms <= clip_norm) - 3.5) / 10
    np.testing.assert_allclose(
      new.clip_norm, clip_norm * np.exp(-0.3 * (share - 0.5)), rtol=1e-6
    )
    assert float(scalars["clip_norm"]) == clip_norm
  # Fails if: padding is counted, the sum stays in units of the clip norm, or
  # the count is divided by the realised size.


def test_the_released_count_has_its_noise():
  mechanism = build(
    clip_quantile=0.5,
    clip_learning_rate=1.0,
    clip_count_stddev=4.0,
    epsilon=None,
    noise_multiplier=1.0,
  )
  state = dataclasses.replace(fresh_state(), clip_norm=jnp.float32(1.0))
  update = jax.jit(
    lambda key: (
      step_lib.update(
        state,
        step_lib.init_grad_sum(state.params),
        key,
        mechanism.privatizer().init(state.params),
        mechanism=mechanism,
        tx=TX,
        learning_rate_fn=optax.constant_schedule(LEARNING_RATE),
      )[0].clip_norm
    )
  )
  moves = [-10 * np.log(update(prng.root(seed))) for seed in range(40)]
  # 40 draws: three standard errors of the deviation and of the mean.
  assert 0.65 < np.std(moves) / 4 < 1.35
  assert abs(np.mean(moves)) < 3 * 4 / np.sqrt(40)
  # Fails if: the count is released without noise, or with another one.


def test_views_of_a_record_differ_and_are_averaged():
  mechanism = build(noise=False, views_per_example=3)
  batch = records(np.random.default_rng(10), 4)
  repeated = {name: v.repeat(3, axis=0) for name, v in batch.items()}
  repeated["view"] = np.tile(np.arange(3, dtype=np.int32), 4)
  new, _, parts = take(mechanism, repeated, cut=6)
  alone, _, whole = take(build(noise=False), batch, cut=4)
  # A linear model: all views of a record have the same gradient.
  np.testing.assert_allclose(flat(new), flat(alone), rtol=1e-5)
  jitter = np.concatenate(
    [np.asarray(part.terms["attention_consistency"]) for part in parts]
  )
  assert len(np.unique(jitter)) == 12
  norms = np.concatenate([part.grad_norm for part in parts])
  np.testing.assert_allclose(norms, whole[0].grad_norm, rtol=1e-6)
  # Fails if: views share a key, or their gradients are summed.


def test_replayed_noise_is_that_of_the_steps_taken():
  mechanism = build(
    noise_mechanism=config_lib.NoiseMechanism.BANDED,
    num_bands=3,
    epsilon=None,
    noise_multiplier=1.0,
  )
  state = fresh_state()
  taken = replayed = mechanism.privatizer().init(state.params)
  for step in range(4):
    batch = records(np.random.default_rng(step), 2)
    grad_sum = step_lib.init_grad_sum(state.params)
    grad_sum = dataclasses.replace(
      grad_sum,
      total={"b": jnp.float32(batch["x"][0, 0]), "w": batch["x"][0]},
    )
    replayed = step_lib.replay_noise(
      state.params, prng.root(3), replayed, state.step, mechanism=mechanism
    )
    state, taken, _ = step_lib.update(
      state,
      grad_sum,
      prng.root(3),
      taken,
      mechanism=mechanism,
      tx=TX,
      learning_rate_fn=optax.constant_schedule(LEARNING_RATE),
    )
  for one, other in zip(
    jax.tree.leaves(taken), jax.tree.leaves(replayed), strict=True
  ):
    np.testing.assert_array_equal(one, other)
  assert int(replayed.step) == 4
  assert all(np.any(leaf) for leaf in jax.tree.leaves(replayed.history))
  # Fails if: a restart draws the earlier steps' noise from other keys.


def test_dropout_keys_are_the_record_s_own():
  root, step = jax.random.key(3), jnp.int32(4)

  def keys(index, step=step, **more):
    batch = step_lib.grad_batch({"index": jnp.array(index), **more}, root, step)
    return (
      jax.random.key_data(jax.random.clone(batch[name]))
      for name in ("dropout_key", "key")
    )

  dropout, attention = keys([7, 8, 9])
  assert len(np.unique(np.concatenate([dropout, attention]), axis=0)) == 6
  # A record's key does not depend on its place or on who else is there.
  np.testing.assert_array_equal(next(keys([9, 7])), dropout[jnp.array([2, 0])])
  views = next(keys([7, 7], view=jnp.array([0, 1])))
  assert not np.array_equal(views[0], views[1])
  assert not np.array_equal(next(keys([7], step=jnp.int32(5)))[0], dropout[0])
  # Fails if: one draw decides for a whole batch, or for a whole run.
