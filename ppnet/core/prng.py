"""Keys: where they begin, how they branch, and what may never share one.

A key is a *stem* (it is folded with a stream, a step, a layer or a record) or a
*leaf* (one draw, or one `split`), never both: `fold_in(k, i)` equals
`split(k, n)[i]`, so a key used both ways would repeat itself.

Roots are made here and nowhere else. The root of the DP noise comes from the
operating system's entropy (see `privacy.mechanism`) and never enters the train
state, hence never a checkpoint.
"""

import enum

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key


class Stream(enum.IntEnum):
  """What a key is for. Append only: a changed number changes every result."""

  INIT = 0
  ATTENTION_NOISE = 1
  DP_NOISE = 2
  EVAL_ATTENTION_NOISE = 3
  CLIP_COUNT_NOISE = 4
  GENERATE = 5
  PRIVATE_CUT = 6
  MODALITY_DROPOUT = 7


def root(seed: int) -> Key[Array, ""]:
  """A threefry root key from any non-negative integer, however large.

  Args:
    seed: up to 128 bits are used, folded in 32 bits at a time.

  Raises:
    ValueError: `seed` is negative or above 2**128 - 1.
  """
  if not 0 <= seed < 2**128:
    raise ValueError(f"Expected 0 <= seed < 2**128, got seed={seed}.")
  key = jax.random.key(seed & 0xFFFFFFFF, impl="threefry2x32")
  if seed >= 2**32:
    for shift in (32, 64, 96):
      key = jax.random.fold_in(key, (seed >> shift) & 0xFFFFFFFF)
  return key


def stream(
  root_key: Key[Array, ""], purpose: Stream, step: Int[Array, ""] | int
) -> Key[Array, ""]:
  """The stem for one purpose at one step."""
  return jax.random.fold_in(jax.random.fold_in(root_key, int(purpose)), step)


def per_record(
  stem_key: Key[Array, ""], index: Int[Array, " B"]
) -> Key[Array, " B"]:
  """One key per record, by the record's own number.

  The position in the batch does not enter, so microbatches, padding and order
  do not change any record's noise.
  """
  return jax.vmap(lambda i: jax.random.fold_in(stem_key, i))(
    index.astype(jnp.uint32)
  )


def per_view(
  keys: Key[Array, " B"], view: Int[Array, " B"]
) -> Key[Array, " B"]:
  """One key per view of a record, from the records' keys as stems."""
  return jax.vmap(jax.random.fold_in)(keys, view.astype(jnp.uint32))
