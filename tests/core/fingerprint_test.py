"""Tests of ppnet.core.trees.fingerprint."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ppnet.core import trees


@pytest.mark.parametrize(
  "dtype", [jnp.float32, jnp.bfloat16, jnp.int32, jnp.int8, jnp.bool_]
)
def test_every_single_bit_changes_it(dtype):
  rng = np.random.default_rng(0)
  leaf = np.asarray(jnp.asarray(rng.integers(0, 2, (3, 4)), dtype))
  before = trees.fingerprint({"a": jnp.asarray(leaf)})
  bits = 1 if dtype == jnp.bool_ else 8 * leaf.dtype.itemsize
  seen = set()
  for entry in range(leaf.size):
    for bit in range(bits):
      content = bytearray(leaf.tobytes())
      at = entry * leaf.dtype.itemsize + bit // 8
      content[at] ^= 1 << bit % 8
      changed = np.frombuffer(bytes(content), leaf.dtype).reshape(leaf.shape)
      seen.add(int(trees.fingerprint({"a": jnp.asarray(changed)})[0]))
  assert int(before[0]) not in seen


def test_exchanged_entries_change_it_and_the_mesh_does_not():
  value = jnp.arange(64.0).reshape(8, 8)
  one = trees.fingerprint([value, value.T])
  assert one[0] != one[1]
  mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
  spread = jax.device_put(value, NamedSharding(mesh, P("a", "b")))
  many = jax.jit(trees.fingerprint)([spread, spread.T])
  np.testing.assert_array_equal(one, many)


def test_nothing_has_no_words():
  assert trees.fingerprint({}).shape == (0,)
