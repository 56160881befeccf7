"""Weights that a decoder may begin with, so that noisy steps reach further.

A private run takes few steps, each with noise in every coordinate. Two choices,
which look at no record and so cost no privacy:

- zeros (`LlamaConfig.zero_init`): with a head of zeros every token is equally
  likely at first, and no step is spent on unlearning what was drawn; branches
  of zeros make the first model that of the token before alone.
- looking back (`LlamaConfig.look_back`): head n of every layer begins by
  attending to the token n places back, which takes plain weights long to find.

How a head looks back. The first feature of every embedding begins at
`sqrt(D) / 2`. After the norm it is about sqrt(D / 5), whatever the token (the
other features have variance 1). Queries and keys read that feature alone, as a
vector of H / 2 feature pairs, each of which the rotary embedding turns by its
frequency w_i times the position. Head n's query begins turned by -w_i n, so
that the score of the token d places back is

    look_back * mean_i cos(w_i (d - n)),

at most `look_back`, where d = n. Small `rope_theta` makes the frequencies
higher, and the maximum narrower.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from ppnet import config as config_lib
from ppnet.models import layers

# The square of an embedding's first feature after the norm, over D.
_SHARE = 0.2


def of_projection(
  config: config_lib.LlamaConfig, name: str
) -> nn.initializers.Initializer | None:
  """What a matrix begins with; None: as it does anyway.

  Args:
    config: of the decoder.
    name: of the matrix, among `model_config.PROJECTIONS` or "lm_head".

  | `zero_init` has the name | `look_back` | result |
  | --- | --- | --- |
  | yes | | zeros |
  | no | 0, or another matrix | None |
  | no | above 0, q_proj or k_proj | zeros but for the first row |
  """
  if name in config.zero_init:
    return nn.initializers.zeros
  if config.look_back and name in ("q_proj", "k_proj"):
    return functools.partial(_looking_back, config, name == "q_proj")
  return None


def of_table(
  config: config_lib.LlamaConfig,
) -> nn.initializers.Initializer | None:
  """What the embedding begins with; None: as it does anyway."""
  return _with_constant if config.look_back else None


def _with_constant(
  key: jax.Array, shape: tuple[int, int], dtype: jnp.dtype = jnp.float32
) -> jax.Array:
  """Standard normal but for the first feature, sqrt(D) / 2."""
  table = jax.random.normal(key, shape, dtype)
  return table.at[:, 0].set(jnp.sqrt(jnp.asarray(shape[1], dtype)) / 2)


def _looking_back(
  config: config_lib.LlamaConfig,
  is_query: bool,
  key: jax.Array,
  shape: tuple[int, int],
  dtype: jnp.dtype = jnp.float32,
) -> jax.Array:
  """The matrix [D, heads * H] of queries or of keys; nothing is drawn."""
  del key
  embed_dim, head_dim = config.embed_dim, config.head_dim
  num_heads = shape[1] // head_dim
  # |q| |k| of one pair: the score is their sum over sqrt(H).
  product = 2 * config.look_back / (_SHARE * embed_dim * head_dim**0.5)
  frequency = layers.rotary_frequencies(
    head_dim, theta=config.rope_theta, scaling=config.rope_scaling
  )
  places_back = jnp.arange(1, num_heads + 1) if is_query else jnp.zeros(1)
  angle = -places_back[:, None].astype(dtype) * frequency[None, :]
  pairs = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=1)
  row = product**0.5 * jnp.broadcast_to(pairs, (num_heads, head_dim))
  return jnp.zeros(shape, dtype).at[0].set(row.reshape(-1).astype(dtype))
