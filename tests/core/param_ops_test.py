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
