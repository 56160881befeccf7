"""Noisy attention written out in XLA: the meaning of the op, and its oracle."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Large enough that exp() of it is exactly 0, small enough to add noise to.
_MASKED_SCORE = -1e30


def attention_mask(
  num_queries: int,
  num_keys: int,
  *,
  causal: bool,
  segment_ids: Int[Array, "B T"] | None,
) -> Bool[Array, "#B T S"]:
  """True where a query may attend to a key token, bool[1 or B, T, S].

  The last query sits at the last key token, so query t sees key tokens up to
  t + S - T. For T = S = 3 and causal attention:

      [[1, 0, 0],
       [1, 1, 0],
       [1, 1, 1]]
  """
  query = jnp.arange(num_queries)[:, None] + (num_keys - num_queries)
  key_token = jnp.arange(num_keys)[None, :]
  mask = jnp.ones((1, num_queries, num_keys), bool)
  if causal:
    mask = mask & (key_token <= query)[None]
  if segment_ids is not None:
    mask = mask & (segment_ids[:, :, None] == segment_ids[:, None, :])
  return mask


def attention(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K H"],
  *,
  mask: Bool[Array, "#B T S"],
  score_noise: Float[Array, "B N T S"] | None,
  weight_noise: Float[Array, "B N T S"] | None,
) -> Float[Array, "B T N H"]:
  """softmax(q k' / sqrt(H) + score_noise) v, or noise on the weights.

  Scores, softmax and the weighted sum are float32 (float64 for float64 inputs).
  A query that may attend to nothing yields zeros.

  Args:
    q: queries.
    k: key tokens; N is a multiple of K (grouped-query attention).
    v: values.
    mask: True = may attend.
    score_noise: scaled noise added before the softmax.
    weight_noise: scaled noise added after it; negative weights become 0 and
      the rest is renormalised. A row that loses every weight keeps its clean
      ones.
  """
  batch, num_queries, num_heads, _ = q.shape
  num_keys, num_kv_heads = k.shape[1:3]
  weights = attention_weights(
    q, k, mask=mask, score_noise=score_noise, weight_noise=weight_noise
  ).reshape(
    batch, num_kv_heads, num_heads // num_kv_heads, num_queries, num_keys
  )  # [B, K, G, T, S]
  out = jnp.einsum(
    "bkgts,bskh->btkgh", weights, v, preferred_element_type=weights.dtype
  )
  return out.reshape(q.shape).astype(q.dtype)


def attention_weights(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  *,
  mask: Bool[Array, "#B T S"],
  score_noise: Float[Array, "B N T S"] | None,
  weight_noise: Float[Array, "B N T S"] | None,
) -> Float[Array, "B N T S"]:
  """What multiplies the values; the arguments are those of `attention`."""
  batch, num_queries, num_heads, head_dim = q.shape
  num_keys, num_kv_heads = k.shape[1:3]
  groups = num_heads // num_kv_heads
  wide = jnp.promote_types(q.dtype, jnp.float32)
  grouped = q.reshape(batch, num_queries, num_kv_heads, groups, head_dim)
  scores = jnp.einsum(
    "btkgh,bskh->bkgts", grouped, k, preferred_element_type=wide
  ).reshape(batch, num_heads, num_queries, num_keys)
  scores = scores * head_dim**-0.5
  if score_noise is not None:
    scores = scores + score_noise
  allowed = mask[:, None]  # [B or 1, 1, T, S]
  weights = jax.nn.softmax(jnp.where(allowed, scores, _MASKED_SCORE), axis=-1)
  weights = jnp.where(allowed, weights, 0.0)
  if weight_noise is None:
    return weights
  noisy = jnp.where(allowed, jax.nn.relu(weights + weight_noise), 0.0)
  total = noisy.sum(axis=-1, keepdims=True)
  kept = total > 0
  return jnp.where(kept, noisy / jnp.where(kept, total, 1.0), weights)
