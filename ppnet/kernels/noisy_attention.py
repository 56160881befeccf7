"""Noise-injected attention: one op, its noise keyed explicitly.

    scores:  softmax(q k' / sqrt(H) + stddev * N) v
    weights: renormalise((softmax(q k' / sqrt(H)) + stddev * N)_+) v

N is i.i.d. standard normal, a function of (key, example, head, query, key
token) alone (`counter_noise`).

The noise is a regulariser and carries **no privacy guarantee**: under a causal
mask the first token attends only to itself, so its output is exactly v[0]
whatever the noise; values and the residual stream pass un-noised; and noise
inside one example's gradient, before clipping, leaves the sensitivity of the
clipped sum as it was. Its effect on attacks is measured, never claimed.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ppnet import config as config_lib
from ppnet.core import checks
from ppnet.kernels import counter_noise, flash, gpu, reference, tpu

NoiseMode = config_lib.NoiseMode
NoiseGenerator = config_lib.NoiseGenerator
Implementation = config_lib.AttentionImplementation
Leaf = Any


# By JAX's name of the platform.
_DEFAULTS = {
  "tpu": Implementation.TPU,
  "gpu": Implementation.GPU,
  "cuda": Implementation.GPU,
}
_BACKENDS = {
  Implementation.TPU: tpu.BACKEND,
  Implementation.GPU: gpu.BACKEND,
}


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["key", "stddev", "key_token_scale"],
  meta_fields=["mode", "generator"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionNoise:
  """Everything the noise needs, together: absent noise is `None`, not a flag.

  Attributes:
    key: typed threefry keys, one per example [B]; or one key [] for the whole
      batch, which is then folded with the example's position.
    stddev: standard deviation, a scalar or one per head, f32[] or f32[N].
    mode: whether scores or weights are noised.
    key_token_scale: factor on stddev per key token, f32[B, S]: above 1 where a
      token is marked sensitive. None means 1 everywhere.
    generator: PORTABLE is the same on every device. HARDWARE is a TPU's own
      generator: not portable to any other implementation, and positions are
      counted from the first query of the call.
  """

  key: Leaf
  stddev: Leaf
  mode: NoiseMode = NoiseMode.SCORES
  key_token_scale: Leaf = None
  generator: NoiseGenerator = NoiseGenerator.PORTABLE


def noisy_attention(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K H"],
  *,
  noise: AttentionNoise | None,
  causal: bool = True,
  segment_ids: Int[Array, "B T"] | None = None,
  implementation: Implementation | str | None = None,
  block_sizes: tuple[int, int] | None = None,
) -> Float[Array, "B T N H"]:
  """Attention with optional noise; `noise=None` is plain attention.

  Args:
    q: queries, any float dtype.
    k: key tokens; N must be a multiple of K (grouped-query attention).
    v: values.
    noise: keys and scale of the noise, or None.
    causal: query t attends to key tokens up to t + S - T.
    segment_ids: tokens attend only within their segment; needs T = S.
    implementation: None chooses by platform: the mesh's, in `jax.set_mesh`;
      the reference where there are several devices and no mesh is set.
    block_sizes: queries and key tokens of a kernel's block, which change no
      value but by rounding; None chooses.

  Returns:
    One output per query and head, in the dtype of `q`.

  Raises:
    ValueError: shapes that do not fit, or an unknown implementation.
    TypeError: keys that are not typed threefry keys.
  """
  chosen = _resolve(implementation)
  drawn = _checked_words_and_scale(q, k, noise, segment_ids)
  mode = None if noise is None else noise.mode
  is_hardware = noise is not None and noise.generator is NoiseGenerator.HARDWARE
  if is_hardware and chosen is not Implementation.TPU:
    checks.fail(
      "the TPU implementation where the hardware draws the noise",
      "Use NoiseGenerator.PORTABLE, which is the same on every device.",
      implementation=chosen.name,
    )
  if chosen is Implementation.REFERENCE:
    written_out = _written_out(
      q, k, causal=causal, segment_ids=segment_ids, noise=drawn, mode=mode
    )
    return reference.attention(q, k, v, **written_out)
  return flash.attention(
    _BACKENDS[chosen],
    q,
    k,
    v,
    causal=causal,
    segment_ids=segment_ids,
    noise=drawn,
    mode=mode,
    block_sizes=block_sizes,
  )


def attention_weights(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  *,
  noise: AttentionNoise | None,
  causal: bool = True,
  segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B N T S"]:
  """What multiplies the values, to look at: memory is O(T S).

  The arguments, their errors and the noise are those of `noisy_attention`.

  Raises:
    ValueError: shapes that do not fit, or noise by the hardware, which the
      kernels alone can draw.
  """
  if noise is not None and noise.generator is NoiseGenerator.HARDWARE:
    checks.fail(
      "noise that can be drawn outside the TPU's kernels",
      "Use NoiseGenerator.PORTABLE.",
      generator=noise.generator.name,
    )
  written_out = _written_out(
    q,
    k,
    causal=causal,
    segment_ids=segment_ids,
    noise=_checked_words_and_scale(q, k, noise, segment_ids),
    mode=None if noise is None else noise.mode,
  )
  return reference.attention_weights(q, k, **written_out)


def _checked_words_and_scale(
  q: Array, k: Array, noise: AttentionNoise | None, segment_ids: Array | None
) -> flash.Noise | None:
  """`_words_and_scale` of arrays whose shapes fit; None without noise."""
  batch, num_queries, num_heads, _ = q.shape
  num_keys, num_kv_heads = k.shape[1:3]
  if num_heads % num_kv_heads:
    checks.fail(
      "the number of query heads to be a multiple of the key heads",
      num_heads=num_heads,
      num_kv_heads=num_kv_heads,
    )
  if segment_ids is not None and num_queries != num_keys:
    checks.fail(
      "as many queries as key tokens where segment_ids are given",
      num_queries=num_queries,
      num_keys=num_keys,
    )
  if noise is None:
    return None
  return _words_and_scale(
    noise,
    batch=batch,
    num_heads=num_heads,
    num_queries=num_queries,
    num_keys=num_keys,
  )


def _written_out(
  q: Array,
  k: Array,
  *,
  causal: bool,
  segment_ids: Array | None,
  noise: flash.Noise | None,
  mode: NoiseMode | None,
) -> dict[str, Any]:
  """Mask and noise as arrays, as `reference` takes them."""
  mask = reference.attention_mask(
    q.shape[1], k.shape[1], causal=causal, segment_ids=segment_ids
  )
  scaled = None
  if noise is not None:
    raw = counter_noise.raw(
      noise.row[:, :, :, None], noise.column[:, :, None, :]
    )
    scaled = raw * noise.scale[:, :, None, :]
  is_scores = mode is NoiseMode.SCORES
  return {
    "mask": mask,
    "score_noise": scaled if is_scores else None,
    "weight_noise": None if is_scores else scaled,
  }


def _resolve(implementation: Implementation | str | None) -> Implementation:
  """The implementation asked for, or the platform's own."""
  if implementation is None:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
      platform = jax.default_backend()
      # Devices that are told nothing of a mesh may still share the arrays.
      known = jax.device_count() == 1
    else:
      # Of the mesh: a program for a pod is compiled on any machine.
      device = mesh.abstract_device
      platform = jax.default_backend() if device is None else device.platform
      known = True
    if not known:
      return Implementation.REFERENCE
    return _DEFAULTS.get(platform, Implementation.REFERENCE)
  try:
    return Implementation(implementation)
  except ValueError:
    known = [member.value for member in Implementation]
    checks.fail(f"implementation in {known}", implementation=implementation)


def _words_and_scale(
  noise: AttentionNoise,
  *,
  batch: int,
  num_heads: int,
  num_queries: int,
  num_keys: int,
) -> flash.Noise:
  """What each implementation makes the noise of: O(T) numbers."""
  keys = noise.key
  counter_noise.check_threefry(keys)
  if keys.ndim == 0:
    positions = jnp.arange(batch, dtype=jnp.uint32)
    keys = jax.vmap(lambda i: jax.random.fold_in(noise.key, i))(positions)
  elif keys.shape != (batch,):
    checks.fail(f"noise.key of shape () or ({batch},)", shape=keys.shape)
  stddev = jnp.asarray(noise.stddev, jnp.float32)
  if stddev.shape not in ((), (num_heads,)):
    checks.fail(
      f"noise.stddev of shape () or ({num_heads},)", shape=stddev.shape
    )
  if noise.generator is NoiseGenerator.HARDWARE:
    seeds = jnp.stack(counter_noise.head_keys(keys, num_heads), axis=-1)
    row, column = jax.lax.bitcast_convert_type(seeds, jnp.int32), None
    unit = counter_noise.HARDWARE_UNIT
  else:
    row, column = counter_noise.position_words(
      keys,
      num_heads=num_heads,
      # Global positions: a later chunk of queries draws what it would have
      # drawn in one piece.
      query_index=jnp.arange(num_queries) + (num_keys - num_queries),
      key_index=jnp.arange(num_keys),
    )
    unit = counter_noise.UNIT
  scale = jnp.broadcast_to(stddev * unit, (num_heads,))
  scale = jnp.broadcast_to(scale[None, :, None], (batch, num_heads, num_keys))
  if noise.key_token_scale is not None:
    if noise.key_token_scale.shape != (batch, num_keys):
      checks.fail(
        f"noise.key_token_scale of shape ({batch}, {num_keys})",
        shape=noise.key_token_scale.shape,
      )
    scale = scale * noise.key_token_scale[:, None, :]
  return flash.Noise(row=row, column=column, scale=scale)
