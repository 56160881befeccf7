"""Sums over trees are float32 and complete."""

import jax.numpy as jnp
import numpy as np

from ppnet.core import trees


def test_vdot_matches_flat_product_in_float32():
  left = {"a": jnp.arange(3, dtype=jnp.bfloat16), "b": jnp.full((2, 2), 0.5)}
  right = {"a": jnp.full(3, 2.0), "b": jnp.arange(4.0).reshape(2, 2)}
  result = trees.vdot(left, right)
  assert result.dtype == jnp.float32
  np.testing.assert_allclose(result, 2 * 3 + 0.5 * 6)


def test_all_finite_sees_one_bad_entry_in_any_leaf():
  tree = {"a": jnp.zeros(3), "b": jnp.zeros((2, 2))}
  assert trees.all_finite(tree)
  assert trees.all_finite({})
  for bad in (jnp.nan, jnp.inf):
    assert not trees.all_finite(tree | {"b": tree["b"].at[1, 0].set(bad)})


def test_num_parameters_counts_entries():
  assert trees.num_parameters({"a": np.zeros((2, 3)), "b": np.zeros(())}) == 7
