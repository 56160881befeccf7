"""Standard normals as a pure function of (key, head, query, key token).

A counter-based generator (Salmon et al. 2011, "Parallel random numbers: as easy
as 1, 2, 3", https://doi.org/10.1145/2063384.2063405): the value at one position
depends on that position's own indices and on nothing else. So it is the same in
any block, on any mesh, in any microbatch and in any implementation, and a
backward pass can draw it again instead of keeping it.

    row[t], column[s] = threefry2x32-20(head's key, position)   O(T + S), once
    hash              = two rounds of multiply and shift of row[t] + column[s]
    value             = cubic(bits set in the hash + three uniforms)

The cryptographic hash runs once per query and per key token; what runs once per
position is 23 operations on a vector unit, against 150 for threefry and the Box
and Muller transform. The number of set bits is binomial (32, 1/2), which is
normal already but for its steps and its tails: three uniforms, of one step's
width each, fill the steps, and a cubic sets variance and kurtosis (Cornish and
Fisher 1938, https://doi.org/10.2307/1400905). The law was computed by counting
over all 2^32 hashes: its distribution function is within 5.7e-5 of the
normal's, its skewness is -5.5e-4, and no value lies beyond 6.1.

Every operation is either on integers or exactly rounded, and none of them can
be fused or reordered to another result, so the bits are the same in every
program on every device (`raw`).

The noise regularises and carries no privacy guarantee; the DP noise is drawn by
`privacy.noise` and never here.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt32

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA  # Salmon et al. 2011, section 3.2.
_NUM_GROUPS = 5  # Of four rounds: threefry2x32-20, the variant the paper tests.

# "lowbias32" without its last shift (Wellons 2018, "Prospecting for hash
# functions", https://nullprogram.com/blog/2018/07/31/): two multiplications
# that were searched for their avalanche.
_MULTIPLIERS = (0x7FEB352D, 0x846CA68B)

# One set bit weighs 2**13; the uniforms have 13 bits each.
_STEP_BITS = 13
_MEAN = 135167.5  # Of the sum below, exactly: 16.5 steps and half a unit less.
# z = linear * x + cubic * x**3, x in steps, has the variance and the kurtosis
# of the normal under the counted law.
_LINEAR, _CUBIC = 0.35633816770700183, 0.0001245028313162998
_OFFSET = _LINEAR / _CUBIC * 4.0**_STEP_BITS

# What `raw` must be multiplied by to have standard deviation 1. A caller
# multiplies its own factors first, so that each value is rounded once.
UNIT = _CUBIC / 8.0**_STEP_BITS


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


def position_words(
  keys: Key[Array, " B"],
  *,
  num_heads: int,
  query_index: Array,
  key_index: Array,
) -> tuple[UInt32[Array, "B N T"], UInt32[Array, "B N S"]]:
  """The word of each query and of each key token, which `raw` combines.

  Args:
    keys: one typed threefry key per example, [B].
    num_heads: N.
    query_index: global positions of the queries, int[T].
    key_index: global positions of the key tokens, int[S].
  """
  word0, word1 = (
    word[:, :, None] for word in head_keys(keys, num_heads)
  )  # [B, N, 1]

  def words(index: Array, which: int) -> Array:
    position = index.astype(jnp.uint32)[None, None, :]
    counter = (position, jnp.full_like(position, which))
    return threefry2x32((word0, word1), counter)[0]

  return words(query_index, 0), words(key_index, 1)


def raw(row: Array, column: Array) -> Array:
  """Normals of standard deviation 1 / `UNIT`, float32.

  Args:
    row: words of queries, uint32; broadcasts against `column`.
    column: words of key tokens, uint32.
  """
  x = row + column
  x = x ^ (x >> 16)
  x = x * jnp.uint32(_MULTIPLIERS[0])
  x = x ^ (x >> 15)
  x_next = x * jnp.uint32(_MULTIPLIERS[1])
  below = 32 - _STEP_BITS
  total = (
    (jax.lax.population_count(x_next) << _STEP_BITS)
    + (x >> below)
    + (x & jnp.uint32(2**_STEP_BITS - 1))
    - (x_next >> below)
  )
  # Below 2**24: both operations are exact.
  deviation = (
    jax.lax.bitcast_convert_type(total, jnp.int32).astype(jnp.float32) - _MEAN
  )
  # Clearing the last bit keeps a compiler from fusing product and sum into one
  # rounding, which some do and some do not.
  square = jax.lax.bitcast_convert_type(
    jax.lax.bitcast_convert_type(deviation * deviation, jnp.uint32)
    & jnp.uint32(0xFFFFFFFE),
    jnp.float32,
  )
  return deviation * (square + jnp.float32(_OFFSET))


# One tile of hardware noise is seeded by itself, so that the kernel's blocks,
# which are whole tiles, do not matter.
HARDWARE_TILE = 256
_HARDWARE_MEAN = 2.0 ** (_STEP_BITS + 4)
_HARDWARE_STDDEV = 23410.589964800  # Counted over all 2^32 words.
HARDWARE_UNIT = 1 / _HARDWARE_STDDEV


def raw_of_bits(bits: Array) -> Array:
  """Near normals of standard deviation 1 / `HARDWARE_UNIT` from random bits.

  Set bits and two uniforms of one step's width, without the cubic: symmetric,
  excess kurtosis -0.068, distribution function within 1.8e-3 of the normal's.

  Args:
    bits: uniform uint32.
  """
  total = (
    (jax.lax.population_count(bits) << _STEP_BITS)
    + (bits >> (32 - _STEP_BITS))
    - (bits & jnp.uint32(2**_STEP_BITS - 1))
  )
  signed = jax.lax.bitcast_convert_type(total, jnp.int32)
  return signed.astype(jnp.float32) - _HARDWARE_MEAN


def normal(
  keys: Key[Array, " B"],
  *,
  num_heads: int,
  query_index: Array,
  key_index: Array,
) -> Float[Array, "B N T S"]:
  """Standard normals, float32[B, N, T, S]; the same bits in every program.

  Args:
    keys: one typed threefry key per example, [B].
    num_heads: N.
    query_index: global positions of the queries, int[T].
    key_index: global positions of the key tokens, int[S].
  """
  row, column = position_words(
    keys, num_heads=num_heads, query_index=query_index, key_index=key_index
  )
  return raw(row[:, :, :, None], column[:, :, None, :]) * jnp.float32(UNIT)
