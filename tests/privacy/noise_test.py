"""Tests of the noise: its scale, its independence, and what it depends on."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from ppnet.privacy import noise


def _zeros(dtype=jnp.float32):
  return {
    "a": jnp.zeros((64, 56), dtype),
    "b": jnp.zeros((64, 56), dtype),
    "c": jnp.zeros(24, dtype),
  }


def _noise(key, *, noise_stddev=1.0, grad_sum=None):
  tx = noise.gaussian_privatizer(noise_stddev=noise_stddev)
  grad_sum = _zeros() if grad_sum is None else grad_sum
  return tx.update(grad_sum, tx.init(grad_sum), noise_key=key)[0]


def _flat(tree):
  return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@pytest.mark.parametrize("noise_stddev", [0.05, 1.0, 30.0])
def test_noise_is_gaussian_at_this_scale_and_no_other(noise_stddev):
  draws = _flat(_noise(jax.random.key(1), noise_stddev=noise_stddev))
  p_value = lambda scale: stats.kstest(draws / scale, "norm").pvalue
  assert p_value(noise_stddev) > 0.01
  assert p_value(noise_stddev * 2 / 3) < 1e-6
  assert p_value(noise_stddev * 3 / 2) < 1e-6
  # Fails if: the standard deviation is used as a variance.


def test_every_leaf_has_the_full_scale():
  for leaf in jax.tree.leaves(_noise(jax.random.key(2), noise_stddev=3.0)):
    assert np.std(leaf) == pytest.approx(3.0, rel=0.4)
    if leaf.size > 1000:
      assert stats.kstest(np.ravel(leaf) / 3.0, "norm").pvalue > 0.01
  # Fails if: the noise is shared out among the leaves.


def test_entries_leaves_steps_and_keys_all_differ():
  keys = jax.random.split(jax.random.key(3), 3)
  draws = [_flat(_noise(keys[i])) for i in range(3)]
  # 2^23 magnitudes in float32: a few of 21,000 draws may meet by chance.
  assert len(np.unique(np.concatenate(draws))) > 0.995 * 3 * len(draws[0])
  for one, other in [(0, 1), (0, 2), (1, 2)]:
    assert abs(np.corrcoef(draws[one], draws[other])[0, 1]) < 0.05
  # Fails if: all leaves, or all steps, get the same noise.


def test_leaves_of_one_shape_are_independent():
  drawn = _noise(jax.random.key(4))
  a, b = np.ravel(drawn["a"]), np.ravel(drawn["b"])
  assert not np.intersect1d(a[:50], b[:50]).size
  assert abs(np.corrcoef(a, b)[0, 1]) < 4 / np.sqrt(a.size)
  # Fails if: every leaf is drawn from the same key.


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_noise_is_drawn_in_float32(dtype):
  drawn = _noise(jax.random.key(5), grad_sum=_zeros(dtype))
  chex.assert_trees_all_equal(drawn, _noise(jax.random.key(5)))
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(drawn))
  assert len(np.unique(_flat(drawn))) > 7000  # bfloat16 has 128.
  # Fails if: noise is drawn in the dtype of the gradient.


def test_noise_is_added_and_does_not_depend_on_the_sum():
  key = jax.random.key(6)
  grad_sum = jax.tree.map(lambda leaf: leaf + 2.5, _zeros())
  noised = _noise(key, noise_stddev=0.5, grad_sum=grad_sum)
  alone = _noise(jax.random.clone(key), noise_stddev=0.5)
  chex.assert_trees_all_close(
    noised, jax.tree.map(lambda leaf: leaf + 2.5, alone), rtol=1e-6, atol=1e-6
  )


def test_update_is_pure_jitted_or_not():
  tx = noise.gaussian_privatizer(noise_stddev=2.0)
  state = tx.init(_zeros())
  run = lambda update: update(_zeros(), state, noise_key=jax.random.key(7))
  chex.assert_trees_all_equal(run(tx.update), run(tx.update))
  chex.assert_trees_all_equal(run(jax.jit(tx.update)), run(jax.jit(tx.update)))
  # XLA may fuse the product and the sum.
  chex.assert_trees_all_close(
    run(tx.update), run(jax.jit(tx.update)), rtol=1e-6, atol=1e-6
  )


def test_state_is_empty():
  tx = noise.gaussian_privatizer(noise_stddev=1.0)
  state = tx.init(_zeros())
  _, after = tx.update(_zeros(), state, noise_key=jax.random.key(8))
  assert state == after == optax.EmptyState()
  assert not jax.tree.leaves(after)
  # Fails if: the key travels in the state, and so into checkpoints.


def test_stddev_zero_returns_the_sum_exactly():
  grad_sum = {"a": jnp.arange(6.0).reshape(2, 3) / 7, "b": jnp.float32(1e30)}
  chex.assert_trees_all_equal(
    _noise(jax.random.key(9), noise_stddev=0.0, grad_sum=grad_sum), grad_sum
  )


def test_noise_does_not_depend_on_the_mesh():
  tx = noise.gaussian_privatizer(noise_stddev=1.3)
  grad_sum = {
    "a": jnp.linspace(-1, 1, 64 * 56).reshape(64, 56),
    "c": jnp.linspace(-1, 1, 24),
  }

  def update(grad_sum, key):
    return tx.update(grad_sum, optax.EmptyState(), noise_key=key)[0]

  expected = jax.jit(update)(grad_sum, jax.random.key(10))
  for shape in [(1, 8), (4, 2), (8, 1)]:
    mesh = jax.make_mesh(
      shape, ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    spec = jax.sharding.PartitionSpec
    shardings = {
      "a": jax.sharding.NamedSharding(mesh, spec("x", "y")),
      "c": jax.sharding.NamedSharding(mesh, spec(("x", "y"))),
    }
    replicated = jax.sharding.NamedSharding(mesh, spec())
    sharded = jax.jit(
      update, in_shardings=(shardings, replicated), out_shardings=shardings
    )(jax.device_put(grad_sum, shardings), jax.random.key(10))
    assert len(sharded["a"].sharding.device_set) == 8
    chex.assert_trees_all_equal(
      jax.device_get(sharded), jax.device_get(expected)
    )
  # Fails if: noise is drawn per shard.


def test_privatizer_chains_with_optax():
  tx = optax.chain(noise.gaussian_privatizer(noise_stddev=0.7), optax.sgd(0.1))
  key = jax.random.key(11)
  updates, _ = tx.update(_zeros(), tx.init(_zeros()), noise_key=key)
  alone = _noise(jax.random.clone(key), noise_stddev=0.7)
  chex.assert_trees_all_close(
    updates, jax.tree.map(lambda leaf: -0.1 * leaf, alone), rtol=1e-6
  )


@pytest.mark.parametrize("bad", [-1.0, np.inf, np.nan])
def test_bad_stddev_is_named(bad):
  with pytest.raises(ValueError, match="noise_stddev"):
    noise.gaussian_privatizer(noise_stddev=bad)


@pytest.mark.parametrize("noise_stddev", [0.0, 1.0])
@pytest.mark.parametrize(
  ("make_key", "message"),
  [
    (lambda: jnp.zeros(2, jnp.uint32), "a typed JAX key"),
    (lambda: jax.random.key(0, impl="rbg"), "threefry2x32"),
    (lambda: jax.random.key(0, impl="unsafe_rbg"), "threefry2x32"),
    (lambda: jax.random.split(jax.random.key(0), 3), "one key"),
  ],
)
def test_bad_key_is_refused(make_key, message, noise_stddev):
  with pytest.raises(ValueError, match=message):
    _noise(make_key(), noise_stddev=noise_stddev)
  # Fails if: a generator whose draws depend on the mesh is accepted.


def test_key_is_required():
  tx = noise.gaussian_privatizer(noise_stddev=1.0)
  with pytest.raises(TypeError, match="noise_key"):
    functools.partial(tx.update, _zeros(), optax.EmptyState())()
