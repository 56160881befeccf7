"""Keys branch without meeting again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppnet.core import prng


def words(key):
  return tuple(np.asarray(jax.random.key_data(key)).ravel().tolist())


def test_root_uses_every_bit_of_the_seed():
  seeds = [0, 1, 1 << 31, 1 << 32, 1 << 64, 1 << 96, (1 << 128) - 1, 3 << 100]
  assert len({words(prng.root(seed)) for seed in seeds}) == len(seeds)
  # Fails if: a 128-bit root is cut to 32 bits.


@pytest.mark.parametrize("seed", [-1, 1 << 128])
def test_root_rejects_what_it_would_have_to_cut(seed):
  with pytest.raises(ValueError, match="seed"):
    prng.root(seed)


def test_streams_and_steps_do_not_meet():
  root = prng.root(5)
  keys = {
    words(prng.stream(root, purpose, step))
    for purpose in prng.Stream
    for step in range(20)
  }
  assert len(keys) == len(prng.Stream) * 20


def test_stream_numbers_are_append_only():
  """A changed number changes every published result: add, never edit."""
  assert {stream.name: stream.value for stream in prng.Stream} == {
    "INIT": 0,
    "ATTENTION_NOISE": 1,
    "DP_NOISE": 2,
    "EVAL_ATTENTION_NOISE": 3,
    "CLIP_COUNT_NOISE": 4,
    "GENERATE": 5,
    "PRIVATE_CUT": 6,
    "MODALITY_DROPOUT": 7,
  }


def test_a_record_s_key_does_not_depend_on_its_place_in_the_batch():
  stem = prng.stream(prng.root(1), prng.Stream.ATTENTION_NOISE, 3)
  together = prng.per_record(stem, jnp.array([4, 9, 2]))
  alone = prng.per_record(stem, jnp.array([9]))
  assert words(together[1]) == words(alone[0])
  assert words(together[0]) != words(together[2])
