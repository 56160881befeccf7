"""The plain operations compute what their names say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppnet.core import param_ops


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("size", [(5, 8), (7, 6), (1, 2)])
@pytest.mark.parametrize("kernel", [(3, 3), (2, 4)])
def test_conv_matches_xla_convolution(stride, size, kernel):
  keys = jax.random.split(jax.random.key(0), 2)
  x = jax.random.normal(keys[0], (2, *size, 3))
  weight = jax.random.normal(keys[1], (*kernel, 3, 4))
  expected = jax.lax.conv_general_dilated(
    x,
    weight,
    (stride, stride),
    "SAME",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )
  got = param_ops.PLAIN.conv("w", weight, x, stride)
  np.testing.assert_allclose(got, expected, atol=1e-5)


def test_dense_embed_scale_and_bias_match_numpy():
  x = np.arange(12.0, dtype=np.float32).reshape(2, 2, 3)
  weight = np.arange(15.0, dtype=np.float32).reshape(3, 5)
  vector = np.array([1.0, -2.0, 3.0], np.float32)
  ids = np.array([[2, 0, 2]])
  ops = param_ops.PLAIN
  np.testing.assert_allclose(ops.dense("w", weight, x), x @ weight)
  np.testing.assert_array_equal(ops.embed("t", weight, ids), weight[ids])
  np.testing.assert_allclose(
    ops.scale("s", jnp.asarray(vector), jnp.asarray(x)), x * vector
  )
  np.testing.assert_allclose(
    ops.bias("b", jnp.asarray(vector), jnp.asarray(x)), x + vector
  )


def test_standardised_columns_have_mean_zero_and_norm_one():
  weight = 0.1 * jax.random.normal(jax.random.key(0), (18, 4)) + 3.0
  found = np.array(param_ops.standardised(weight))
  np.testing.assert_allclose(found.mean(axis=0), 0, atol=1e-6)
  np.testing.assert_allclose(np.linalg.norm(found, axis=0), 1, rtol=1e-4)
  expected = np.array(weight) - np.array(weight).mean(axis=0)
  expected /= np.linalg.norm(expected, axis=0)
  np.testing.assert_allclose(found, expected, atol=1e-4)
  # Fails if: another axis is standardised, or the whole matrix at once.


def test_a_constant_column_is_zero_and_has_a_gradient():
  weight = jnp.full((6, 2), 5.0)
  assert not param_ops.standardised(weight).any()
  grad = jax.grad(lambda w: param_ops.standardised(w)[0].sum())(weight)
  assert np.isfinite(grad).all()
  assert grad.any()
  # Fails if: the norm is divided by as it is.


def test_a_standardised_convolution_is_that_of_the_standardised_kernel():
  keys = jax.random.split(jax.random.key(0), 2)
  x = jax.random.normal(keys[0], (2, 5, 7, 3))
  weight = jax.random.normal(keys[1], (3, 2, 3, 4))
  matrix = param_ops.standardised(weight.reshape(-1, 4))
  expected = param_ops.PLAIN.conv("w", matrix.reshape(weight.shape), x, 2)
  conv = lambda weight: param_ops.PLAIN.conv(
    "w", weight, x, 2, is_standardised=True
  )
  np.testing.assert_allclose(conv(weight), expected, atol=1e-6)
  np.testing.assert_allclose(conv(7 * weight + 2), expected, atol=1e-4)


def test_the_derivative_of_standardising_is_that_of_what_is_computed():
  keys = jax.random.split(jax.random.key(0), 2)
  weight = jax.random.normal(keys[0], (7, 3)).at[:, 1].set(2.0) + 0.5
  g = jax.random.normal(keys[1], (5, 7, 3))

  def spelt_out(weight):
    centred = weight - weight.mean(axis=0, keepdims=True)
    squared = jnp.square(centred).sum(axis=0, keepdims=True)
    return centred / jnp.sqrt(squared + 1e-5)

  expected, found = (
    jax.vmap(jax.vjp(fun, weight)[1])(g)[0]
    for fun in (spelt_out, param_ops.standardised)
  )
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
  # Fails if: the mean, or the part along the column, is left in.
