"""Standard normals as a pure function of (key, head, query, key token).

A counter-based generator (Salmon et al. 2011, "Parallel random numbers: as easy
as 1, 2, 3", https://doi.org/10.1145/2063384.2063405): the value at one position
depends on that position's own indices and on nothing else. So it is the same in
any block, on any mesh, in any microbatch and in any implementation, and a
backward pass can draw it again instead of keeping it.

The noise regularises and carries no privacy guarantee; the DP noise is drawn by
`privacy.noise` and never here.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt32

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA  # Salmon et al. 2011, section 3.2.
_NUM_GROUPS = 5  # Of four rounds: threefry2x32-20, the variant the paper tests.


def threefry2x32(
  key: tuple[Array, Array], counter: tuple[Array, Array]
) -> tuple[Array, Array]:
  """Threefry-2x32 with 20 rounds (Salmon et al. 2011, section 3.3).

  Args:
    key: two uint32 arrays.
    counter: two uint32 arrays; all four broadcast against each other.

  Returns:
    Two uint32 arrays of the broadcast shape.
  """
  schedule = (key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(_PARITY))
  left, right = counter[0] + schedule[0], counter[1] + schedule[1]
  for group in range(_NUM_GROUPS):
    for distance in _ROTATIONS[group % 2]:
      left = left + right
      right = (right << distance) | (right >> (32 - distance))
      right = right ^ left
    left = left + schedule[(group + 1) % 3]
    right = right + schedule[(group + 2) % 3] + jnp.uint32(group + 1)
  return left, right


def head_keys(
  keys: Key[Array, " B"], num_heads: int
) -> tuple[UInt32[Array, "B N"], UInt32[Array, "B N"]]:
  """One generator key per example and head.

  Args:
    keys: one typed threefry key per example.
    num_heads: N.

  Raises:
    TypeError: the keys are not typed threefry keys.
  """
  check_threefry(keys)
  words = jax.random.key_data(keys)  # u32[B, 2]
  heads = jnp.arange(num_heads, dtype=jnp.uint32)[None, :]
  zeros = jnp.zeros_like(heads)
  return threefry2x32((words[:, :1], words[:, 1:]), (heads, zeros))


def check_threefry(keys: Array) -> None:
  """Raises `TypeError` unless `keys` are typed threefry keys."""
  if not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key):
    raise TypeError(
      f"Expected typed PRNG keys, got {keys.dtype}. Use"
      " jax.random.wrap_key_data on raw key words."
    )
  if jax.random.key_impl(keys) != "threefry2x32":
    raise TypeError(
      "Expected threefry2x32 keys, whose two words seed the generator, got"
      f" {jax.random.key_impl(keys)!r}."
    )


def bits(
  keys: Key[Array, " B"],
  *,
  num_heads: int,
  query_index: Array,
  key_index: Array,
) -> tuple[UInt32[Array, "B N T S"], UInt32[Array, "B N T S"]]:
  """The 64 random bits of each position, as two words; see `normal`.

  Key tokens 2 i and 2 i + 1 share their bits.
  """
  word0, word1 = head_keys(keys, num_heads)
  query = query_index.astype(jnp.uint32)[None, None, :, None]
  pair = key_index.astype(jnp.uint32)[None, None, None, :] >> 1
  return threefry2x32(
    (word0[:, :, None, None], word1[:, :, None, None]), (query, pair)
  )


def normal(
  keys: Key[Array, " B"],
  *,
  num_heads: int,
  query_index: Array,
  key_index: Array,
) -> Float[Array, "B N T S"]:
  """Standard normals, float32[B, N, T, S].

  Neighbouring key tokens share one 64-bit draw: Box and Muller (1958,
  https://doi.org/10.1214/aoms/1177706645) make two independent normals of it,
  the cosine for the even index and the sine for the odd one. The bits are the
  same in every program; their logarithm and cosine may differ in the last place
  where a compiler orders them otherwise.

  Args:
    keys: one typed threefry key per example, [B].
    num_heads: N.
    query_index: global positions of the queries, int[T].
    key_index: global positions of the key tokens, int[S].
  """
  bits0, bits1 = bits(
    keys, num_heads=num_heads, query_index=query_index, key_index=key_index
  )
  # The half keeps the logarithm's argument above 0; 24 bits fill a float32.
  uniform = ((bits0 >> 8).astype(jnp.float32) + 0.5) * 2.0**-24
  angle = (bits1 >> 8).astype(jnp.float32) * (2.0 * jnp.pi * 2.0**-24)
  # A quarter turn makes the cosine of an even index the sine of an odd one.
  odd = (key_index & 1).astype(jnp.float32)[None, None, None, :]
  return jnp.sqrt(-2.0 * jnp.log(uniform)) * jnp.cos(angle - 0.5 * jnp.pi * odd)
