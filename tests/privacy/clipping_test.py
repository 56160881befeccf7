"""Tests of the clipped gradient sum: against loops, and at the edges."""

import functools
import math

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppnet import config
from ppnet.privacy import clipping

_ADD = config.NeighboringRelation.ADD_OR_REMOVE_ONE
_REPLACE = config.NeighboringRelation.REPLACE_ONE
_settings = hypothesis.settings(
  derandomize=True, deadline=None, max_examples=20
)


def _linear_loss(params, batch):
  """Gradient of example i is its row, so everything has a closed form."""
  return sum(
    jnp.sum(batch[name] * params[name], axis=tuple(range(1, batch[name].ndim)))
    for name in params
  )


def _linear_params(dtype=jnp.float32):
  return {"a": jnp.zeros((1, 3), dtype), "b": jnp.zeros((1, 2, 4), dtype)}


def _linear_batch(rows, dtype=jnp.float32):
  """Splits rows [B, 11] over the leaves of `_linear_params`."""
  rows = np.asarray(rows)
  return {
    "a": jnp.asarray(rows[:, :3], dtype),
    "b": jnp.asarray(rows[:, 3:].reshape(-1, 2, 4), dtype),
  }


def _flat(grad_sum):
  """The sum as one float64 vector [11]."""
  return np.concatenate(
    [np.ravel(leaf).astype(np.float64) for leaf in jax.tree.leaves(grad_sum)]
  )


@functools.cache
def _linear_fn(l2_clip_norm, **kwargs):
  """Jitted, so that hypothesis compiles once for each shape."""
  return jax.jit(
    clipping.clipped_grad(_linear_loss, l2_clip_norm=l2_clip_norm, **kwargs)
  )


def _network_loss(params, batch):
  """A small network with dropout from per-example keys; aux is its output."""
  keep = jax.vmap(lambda key: jax.random.bernoulli(key, 0.7, (4,)))(
    batch["key"]
  )
  hidden = jnp.tanh(batch["x"] @ params["w"]) * keep  # [B, 4]
  output = hidden @ params["v"]  # [B, 2]
  return jnp.sum((output - batch["y"]) ** 2, axis=-1), {"output": output}


def _network_case(batch_size=7):
  keys = jax.random.split(jax.random.key(0), 5)
  params = {
    "w": jax.random.normal(keys[0], (3, 4)),
    "v": jax.random.normal(keys[1], (4, 2)),
  }
  batch = {
    "x": jax.random.normal(keys[2], (batch_size, 3)),
    "y": jax.random.normal(keys[3], (batch_size, 2)),
    "key": jax.random.split(keys[4], batch_size),
  }
  return params, batch


@functools.cache  # So that tests share what they compile.
def _network_fn(*, jitted=True, **kwargs):
  fn = clipping.clipped_grad(
    _network_loss, l2_clip_norm=0.8, has_aux=True, **kwargs
  )
  return _on_fresh_keys(jax.jit(fn) if jitted else fn)


def _on_fresh_keys(fn):
  """The same call twice would reuse the batch's keys, here on purpose."""

  def call(params, batch, *args):
    return fn(params, dict(batch, key=jax.random.clone(batch["key"])), *args)

  return call


def test_clipped_grad_matches_loop():
  params, batch = _network_case()
  is_padding = jnp.arange(7) == 2
  result = _network_fn()(params, batch, is_padding)
  fresh = lambda example: dict(example, key=jax.random.clone(example["key"]))
  expected = jax.tree.map(np.zeros_like, params)
  for i in range(7):
    example = jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], batch)
    (loss, aux), grad = jax.value_and_grad(
      lambda p, e=example: jax.tree.map(
        jnp.squeeze, _network_loss(p, fresh(e))
      ),
      has_aux=True,
    )(params)
    if i == 2:
      assert result.losses[i] == result.grad_norms[i] == 0
      continue
    norm = np.sqrt(sum(np.sum(g.astype(float) ** 2) for g in _leaves(grad)))
    np.testing.assert_allclose(result.grad_norms[i], norm, rtol=1e-6)
    np.testing.assert_allclose(result.losses[i], loss, rtol=1e-6)
    np.testing.assert_allclose(
      result.aux["output"][i], aux["output"], rtol=1e-5
    )
    scale = min(1, 0.8 / norm)
    expected = jax.tree.map(lambda a, g, s=scale: a + s * g, expected, grad)
  assert np.ptp(result.grad_norms) > 1  # Some clipped, not all alike.
  # The clip bound is 1e-5 below C.
  chex.assert_trees_all_close(result.grad_sum, expected, rtol=2e-5, atol=1e-6)
  assert not result.is_nonfinite.any()
  # Fails if: the clip norm applies per leaf, or to the mean.


def _leaves(tree):
  return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


@pytest.mark.filterwarnings("ignore:optax.global_norm:DeprecationWarning")
def test_clipped_grad_matches_jax_privacy():
  oracle = pytest.importorskip("jax_privacy.clipping")
  params, batch = _network_case()
  oracle_fn = oracle.clipped_grad(
    lambda p, x, y, key: _network_loss(p, {"x": x, "y": y, "key": key})[0][0],
    l2_clip_norm=0.8,
    batch_argnums=(1, 2, 3),
  )
  result = _network_fn()(params, batch)
  expected = oracle_fn(
    params, batch["x"], batch["y"], jax.random.clone(batch["key"])
  )
  chex.assert_trees_all_close(result.grad_sum, expected, rtol=2e-5, atol=1e-6)


def test_clipped_sum_has_closed_form():
  # Example i's gradient is full of i's, with 0 among them.
  rows = np.repeat(np.arange(5.0)[:, None], 11, axis=1)
  result = _linear_fn(4.0)(_linear_params(), _linear_batch(rows))
  norms = np.arange(5) * np.sqrt(11)
  factors = [1, 1, *(4.0 / norms[2:])]
  np.testing.assert_allclose(result.grad_norms, norms, rtol=1e-6)
  np.testing.assert_allclose(
    _flat(result.grad_sum), np.full(11, np.arange(5) @ factors), rtol=2e-5
  )


def test_sum_is_not_divided_by_the_batch_size():
  row = np.full((1, 11), 0.01)
  for batch_size in (1, 5):
    batch = _linear_batch(np.repeat(row, batch_size, axis=0))
    np.testing.assert_allclose(
      _flat(_linear_fn(1.0)(_linear_params(), batch).grad_sum),
      0.01 * batch_size,
      rtol=1e-6,
    )
  # Fails if: the sum is divided by the realised batch size.


@pytest.mark.parametrize(
  ("microbatch_size", "jitted"),
  [(1, True), (2, True), (3, True), (20, True), (None, False), (3, False)],
)
def test_microbatch_size_and_jit_do_not_matter(microbatch_size, jitted):
  params, batch = _network_case()
  is_padding = jnp.arange(7) == 4
  whole = _network_fn()(params, batch, is_padding)
  fn = _network_fn(microbatch_size=microbatch_size, jitted=jitted)
  result = fn(params, batch, is_padding)
  chex.assert_trees_all_close(result, whole, rtol=1e-6, atol=1e-6)
  # Fails if: the last, partly filled microbatch is dropped or counted twice.


def test_order_of_examples_does_not_matter():
  params, batch = _network_case()
  order = np.array([3, 0, 6, 2, 5, 1, 4])
  whole = _network_fn()(params, batch)
  result = _network_fn(microbatch_size=2)(
    params, jax.tree.map(lambda leaf: leaf[order], batch)
  )
  chex.assert_trees_all_close(
    result.grad_sum, whole.grad_sum, rtol=1e-5, atol=1e-6
  )
  chex.assert_trees_all_close(
    result.grad_norms, whole.grad_norms[order], rtol=1e-6
  )
  # Fails if: rows come back in another order than they went in.


_magnitudes = st.sampled_from(
  [0.0, 1e-30, 1e-8, 0.3, 1.0, 7.0, 1e4, 1e19, 1e25, 3e38]
)
_rows = st.lists(
  st.tuples(_magnitudes, st.integers(0, 2**32 - 1)), min_size=5, max_size=5
)


def _draw_rows(specs):
  """Rows [B, 11] of given largest entry and random direction."""
  rows = []
  for magnitude, seed in specs:
    direction = np.random.default_rng(seed).uniform(-1, 1, 11)
    rows.append(magnitude * direction / np.abs(direction).max())
  return np.array(rows)


@hypothesis.given(specs=_rows, clip=st.sampled_from([1e-10, 0.1, 1.0, 1e6]))
@hypothesis.example(specs=[(1e-8, i) for i in range(5)], clip=1e-10)
@_settings
def test_neighbours_differ_by_at_most_the_sensitivity(specs, clip):
  rows = _draw_rows(specs)
  fn = _linear_fn(clip, microbatch_size=2)
  bare = clipping.clipped_grad(_linear_loss, l2_clip_norm=clip)
  no_padding = jnp.zeros(4, bool)
  full = _flat(
    fn(_linear_params(), _linear_batch(rows[:4]), no_padding).grad_sum
  )
  removed = _flat(
    fn(_linear_params(), _linear_batch(rows[:4]), jnp.arange(4) == 1).grad_sum
  )
  replaced_rows = np.stack([rows[0], rows[4], rows[2], rows[3]])
  replaced = _flat(
    fn(_linear_params(), _linear_batch(replaced_rows), no_padding).grad_sum
  )
  # The sums of four clipped gradients are rounded to float32.
  rounding = 1 + 1e-6
  assert np.linalg.norm(full - removed) <= bare.sensitivity(_ADD) * rounding
  assert (
    np.linalg.norm(full - replaced) <= bare.sensitivity(_REPLACE) * rounding
  )
  # Fails if: replace-one is charged one clip norm, or squares underflow.


@hypothesis.given(
  spec=st.tuples(_magnitudes, st.integers(0, 2**32 - 1)),
  clip=st.sampled_from([1e-10, 0.1, 1.0, 3e4]),
)
@hypothesis.example(spec=(1e-8, 0), clip=1e-10)
@_settings
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_norm_of_what_is_added_is_within_the_bound(dtype, spec, clip):
  rows = _draw_rows([spec])
  hypothesis.assume(spec[0] <= float(jnp.finfo(dtype).max))
  result = _linear_fn(clip)(_linear_params(dtype), _linear_batch(rows, dtype))
  chex.assert_tree_all_finite(result.grad_sum)
  assert all(leaf.dtype == jnp.float32 for leaf in _leaves(result.grad_sum))
  added = _flat(result.grad_sum)
  assert np.linalg.norm(added) <= clip
  assert np.linalg.norm(added.astype(np.float32)) <= np.float32(clip)
  seen = _flat(_linear_batch(rows, dtype))
  norm = np.linalg.norm(seen)
  if norm > clip:  # Clipped to the bound, not to zero.
    np.testing.assert_allclose(
      added, seen * (clip / norm), rtol=2e-5, atol=1e-6 * clip
    )
  elif norm < 0.999 * clip:
    # Unchanged; float32 subnormals count as zero on some machines.
    np.testing.assert_allclose(added, seen, rtol=1e-7, atol=1e-37)
  # Fails if: there is no slack below C, or the sum is taken in bfloat16.


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_huge_gradients_are_clipped_not_dropped(dtype):
  rows = np.zeros((2, 11))
  rows[0, 4], rows[1, :] = 1e25, 3e38
  result = _linear_fn(2.0)(_linear_params(dtype), _linear_batch(rows, dtype))
  expected = np.full(11, 2 / np.sqrt(11))
  expected[4] += 2.0
  np.testing.assert_allclose(_flat(result.grad_sum), expected, rtol=2e-5)
  np.testing.assert_allclose(result.grad_norms[0], 1e25, rtol=4e-3)
  assert result.grad_norms[1] == np.finfo(np.float32).max
  assert not result.is_nonfinite.any()
  # Fails if: the norm overflows to infinity and C / infinity is 0.


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("position", [0, 10])
def test_nonfinite_gradient_is_exactly_zero(bad, position):
  rows = np.full((3, 11), 0.5)
  clean = _linear_fn(1.0)(
    _linear_params(), _linear_batch(rows), jnp.arange(3) == 1
  )
  rows[1, position] = bad
  result = _linear_fn(1.0)(
    _linear_params(), _linear_batch(rows), jnp.zeros(3, bool)
  )
  chex.assert_trees_all_equal(result.grad_sum, clean.grad_sum)
  np.testing.assert_array_equal(result.is_nonfinite, [False, True, False])
  assert result.grad_norms[1] == 0
  # Fails if: the gradient is multiplied by a factor 0 (0 * NaN is NaN).


def test_nonfinite_loss_is_exactly_zero():
  def loss_fn(params, batch):
    return batch @ params + jnp.where(batch[:, 0] > 1, jnp.inf, 0.0)

  result = clipping.clipped_grad(loss_fn, l2_clip_norm=1.0)(
    jnp.zeros(2), jnp.array([[2.0, 0.0], [0.0, 0.5]])
  )
  np.testing.assert_array_equal(result.grad_sum, [0.0, 0.5])
  np.testing.assert_array_equal(result.is_nonfinite, [True, False])


@pytest.mark.parametrize("microbatch_size", [None, 2])
def test_nan_example_cannot_touch_another(microbatch_size):
  params, batch = _network_case(5)
  batch["x"] = batch["x"].at[3].set(jnp.nan)
  bad = _network_fn(microbatch_size=microbatch_size)(params, batch)
  good = jax.tree.map(lambda leaf: leaf[np.array([0, 1, 2, 4])], batch)
  expected = _network_fn()(params, good)
  chex.assert_trees_all_close(
    bad.grad_sum, expected.grad_sum, rtol=1e-6, atol=1e-6
  )
  np.testing.assert_array_equal(bad.is_nonfinite, np.arange(5) == 3)
  # Fails if: non-finite examples are summed before they are dropped.


def test_examples_cannot_influence_each_other():
  def coupled_loss(params, batch):  # As batch normalisation would.
    return (batch - batch.mean(axis=0, keepdims=True) + 1.0) @ params

  fn = clipping.clipped_grad(coupled_loss, l2_clip_norm=100.0)
  one = fn(jnp.zeros(2), jnp.array([[1.0, 2.0]])).grad_sum
  three = fn(
    jnp.zeros(2), jnp.array([[1.0, 2.0], [5.0, 7.0], [9.0, -9.0]])
  ).grad_sum
  np.testing.assert_allclose(three, 3 * one)
  # Fails if: the loss function sees more than one example at a time.


@pytest.mark.parametrize("content", [0.0, 1e30, np.nan, np.inf])
@pytest.mark.parametrize("microbatch_size", [None, 2])
def test_padding_contributes_exactly_zero(content, microbatch_size):
  params, batch = _network_case(5)
  is_padding = jnp.array([False, True, False, False, True])
  junk = dict(batch, x=jnp.where(is_padding[:, None], content, batch["x"]))
  fn = _network_fn(microbatch_size=microbatch_size)
  result = fn(params, junk, is_padding)
  expected = fn(params, batch, is_padding)
  chex.assert_trees_all_equal(result, expected)
  only_real = jax.tree.map(lambda leaf: leaf[np.array([0, 2, 3])], batch)
  chex.assert_trees_all_close(
    result.grad_sum,
    _network_fn()(params, only_real).grad_sum,
    rtol=1e-6,
    atol=1e-6,
  )
  assert not result.is_nonfinite.any()
  assert not result.losses[np.array([1, 4])].any()
  assert not result.aux["output"][np.array([1, 4])].any()
  # Fails if: padding rows are not masked, or are masked by a product.


@pytest.mark.parametrize("microbatch_size", [None, 2])
def test_all_padding_and_empty_batches_sum_to_zero(microbatch_size):
  params, batch = _network_case(5)
  fn = _network_fn(microbatch_size=microbatch_size)
  zeros = jax.tree.map(jnp.zeros_like, params)
  padded = fn(params, batch, jnp.ones(5, bool))
  chex.assert_trees_all_equal(padded.grad_sum, zeros)
  empty = fn(params, jax.tree.map(lambda leaf: leaf[:0], batch))
  chex.assert_trees_all_equal(empty.grad_sum, zeros)
  assert empty.losses.shape == empty.grad_norms.shape == (0,)
  assert empty.aux["output"].shape == (0, 2)


def test_per_example_keys_give_different_randomness():
  def loss_fn(params, batch):
    noise = jax.vmap(lambda key: jax.random.normal(key, (2,)))(batch)
    return noise @ params

  keys = jax.random.split(jax.random.key(3), 4)
  result = clipping.clipped_grad(loss_fn, l2_clip_norm=1e3, microbatch_size=3)(
    jnp.zeros(2), keys
  )
  assert len(np.unique(result.grad_norms)) == 4
  # Fails if: all examples of a microbatch share one key.


def test_large_tensor_norm_is_within_the_slack():
  # 3e6 equal entries: where rounding accumulates in a naive running sum.
  size = 3_000_000
  fn = clipping.clipped_grad(
    lambda params, batch: batch * jnp.sum(params), l2_clip_norm=0.5
  )
  result = jax.jit(fn)(jnp.zeros(size), jnp.array([0.7]))
  exact = float(np.float32(0.7)) * math.sqrt(size)
  assert abs(result.grad_norms[0] / exact - 1) < 2e-6
  added = np.linalg.norm(np.asarray(result.grad_sum).astype(np.float64))
  assert 0.5 * (1 - 2e-5) < added <= 0.5


def test_sensitivity_depends_on_the_relation():
  fn = clipping.clipped_grad(_linear_loss, l2_clip_norm=0.3)
  assert fn.sensitivity(_ADD) == 0.3
  assert fn.sensitivity(_REPLACE) == 0.6
  # Fails if: replace-one is charged like add-or-remove-one.


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan, 1e-11, 1e16])
def test_bad_clip_norm_is_named(bad):
  with pytest.raises(ValueError, match="Expected l2_clip_norm"):
    clipping.clipped_grad(_linear_loss, l2_clip_norm=bad)


def test_bad_arguments_are_named():
  with pytest.raises(ValueError, match="Did you mean 'vmap'"):
    clipping.clipped_grad(_linear_loss, l2_clip_norm=1.0, engine="vmapp")
  with pytest.raises(ValueError, match="microbatch_size"):
    clipping.clipped_grad(_linear_loss, l2_clip_norm=1.0, microbatch_size=0)
  with pytest.raises(ValueError, match="one loss per example"):
    clipping.clipped_grad(
      lambda params, batch: jnp.mean(batch @ params), l2_clip_norm=1.0
    )(jnp.zeros(2), jnp.zeros((3, 2)))
  with pytest.raises(ValueError, match="one leading axis"):
    clipping.clipped_grad(_linear_loss, l2_clip_norm=1.0)(
      {}, {"a": jnp.zeros((2, 3)), "b": jnp.zeros((4, 3))}
    )
  with pytest.raises(ValueError, match="is_padding_example to be bool"):
    clipping.clipped_grad(_linear_loss, l2_clip_norm=1.0)(
      _linear_params(), _linear_batch(np.zeros((2, 11))), jnp.zeros(2)
    )


def test_engine_accepts_its_string_value():
  clipping.clipped_grad(_linear_loss, l2_clip_norm=1.0, engine="vmap")


# The ablations.


def _unprotected_fn(which, l2_clip_norm=1.0, **kwargs):
  return clipping.unprotected_grad(
    _network_loss,
    clipping=which,
    l2_clip_norm=l2_clip_norm,
    has_aux=True,
    **kwargs,
  )


def _unprotected(*args, **kwargs):
  return _on_fresh_keys(jax.jit(_unprotected_fn(*args, **kwargs)))


@pytest.mark.parametrize("microbatch_size", [None, 3])
@pytest.mark.parametrize("content", [0.0, np.nan])
def test_unclipped_sum_matches_plain_gradient(microbatch_size, content):
  params, batch = _network_case()
  is_padding = jnp.arange(7) == 0
  junk = dict(batch, x=jnp.where(is_padding[:, None], content, batch["x"]))
  fn = _unprotected(config.Clipping.NONE, microbatch_size=microbatch_size)
  result = fn(params, junk, is_padding)
  fresh = dict(batch, key=jax.random.clone(batch["key"]))
  expected = jax.grad(
    lambda p: jnp.sum(_network_loss(p, jax.tree.map(lambda x: x[1:], fresh))[0])
  )(params)
  chex.assert_trees_all_close(result.grad_sum, expected, rtol=1e-5, atol=1e-5)
  assert result.grad_norms is None
  assert result.losses[0] == 0
  assert not result.is_nonfinite.any()
  # Fails if: a padding row that computes NaN reaches the sum.


def test_batch_clipping_clips_the_mean():
  params, batch = _network_case()
  is_padding = jnp.arange(7) == 5
  plain = _flat(
    _unprotected(config.Clipping.NONE)(params, batch, is_padding).grad_sum
  )
  mean_norm = np.linalg.norm(plain / 6)
  for clip, scale in [(0.1, 0.1 / mean_norm), (1e6, 1.0)]:
    result = _unprotected(config.Clipping.BATCH, clip)(
      params, batch, is_padding
    )
    np.testing.assert_allclose(
      _flat(result.grad_sum), plain * scale, rtol=1e-5, atol=1e-6
    )


def test_ablations_have_infinite_sensitivity_and_show_bad_examples():
  params, batch = _network_case()
  batch["x"] = batch["x"].at[1].set(jnp.nan)
  for which in (config.Clipping.NONE, config.Clipping.BATCH):
    fn = _unprotected_fn(which)
    assert fn.sensitivity(_ADD) == fn.sensitivity(_REPLACE) == math.inf
    result = _on_fresh_keys(jax.jit(fn))(params, batch)
    np.testing.assert_array_equal(result.is_nonfinite, np.arange(7) == 1)
    assert np.isnan(result.losses[1])
  # Fails if: an ablation claims a finite sensitivity.


def test_ablation_of_padding_only_is_zero():
  params, batch = _network_case(3)
  for which in (config.Clipping.NONE, config.Clipping.BATCH):
    result = _unprotected(which)(params, batch, jnp.ones(3, bool))
    chex.assert_trees_all_equal(
      result.grad_sum, jax.tree.map(jnp.zeros_like, params)
    )


def test_unprotected_grad_refuses_per_example():
  with pytest.raises(ValueError, match="Use clipped_grad"):
    _unprotected_fn(config.Clipping.PER_EXAMPLE)
