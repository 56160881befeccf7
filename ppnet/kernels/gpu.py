"""Flash attention with noise for NVIDIA GPUs, in Pallas Triton; see `flash`.

A program holds one block of queries (or, for dK, dV and d scale, one block of
key tokens, transposed) and loops over the other side itself, with a mask only
where a block needs one.

On other devices the kernels are interpreted, for tests.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

from ppnet import config as config_lib
from ppnet.kernels import flash

_WEIGHTS = config_lib.NoiseMode.WEIGHTS
_LEAST = 16  # Of every side of a matrix product of tensor cores.
_WARPS = 4

Carry = Any


def _call(kernel: Callable[..., None], operands: tuple, **kwargs: Any) -> Any:
  """A Pallas call that is compiled for CUDA and interpreted elsewhere."""

  def run(interpret: bool, *operands):
    return pl.pallas_call(
      kernel,
      interpret=interpret,
      # Triton by name: jax's own default is moving to another backend.
      compiler_params=plgpu.CompilerParams(num_warps=_WARPS, num_stages=2),
      **kwargs,
    )(*operands)

  return jax.lax.platform_dependent(
    *operands,
    cuda=functools.partial(run, False),
    default=functools.partial(run, True),
  )


def _pad_heads(*arrays: Array) -> tuple[Array, ...]:
  """Lengthens the last axis to a power of two, as Triton wants it."""
  size = max(_LEAST, pl.next_power_of_2(arrays[0].shape[-1]))
  return tuple(
    jnp.pad(x, [(0, 0)] * 3 + [(0, size - x.shape[-1])]) for x in arrays
  )


def _whole(shape: tuple[int, ...], per_group: int) -> pl.BlockSpec:
  """All of one head's array [B, heads, ...]; its head is n // per_group."""
  zeros = (0,) * (len(shape) - 2)
  return pl.BlockSpec(
    (None, None, *shape[2:]),
    lambda i, n, b: (b, flash.floor_div(n, per_group), *zeros),
  )


def _one(shape: tuple[int, ...], block: int) -> pl.BlockSpec:
  """The program's own block of an array [B, heads, size, ...]."""
  zeros = (0,) * (len(shape) - 3)
  return pl.BlockSpec(
    (None, None, block, *shape[3:]), lambda i, n, b: (b, n, i, *zeros)
  )


def _each_key_block(
  spec: flash.Spec,
  i: Any,
  *,
  has_segments: bool,
  step: Callable[[Any, Carry, bool], Carry],
  carry: Carry,
) -> Carry:
  """Runs `step(j, carry, masked)` over the blocks that queries i see."""
  end = whole = pl.cdiv(spec.num_keys, spec.block_k)
  if spec.num_keys % spec.block_k:
    whole = end - 1
  if spec.causal:
    # Key tokens up to and including this one are seen by all; by some.
    by_all = i * spec.block_q + spec.offset + 1
    by_some = by_all + spec.block_q - 1
    whole = jnp.minimum(whole, flash.floor_div(by_all, spec.block_k))
    end = jnp.minimum(
      end,
      flash.floor_div(jnp.maximum(by_some, 0) + spec.block_k - 1, spec.block_k),
    )
  if has_segments:
    whole = 0
  carry = jax.lax.fori_loop(0, whole, lambda j, c: step(j, c, False), carry)
  return jax.lax.fori_loop(whole, end, lambda j, c: step(j, c, True), carry)


def _each_query_block(
  spec: flash.Spec,
  j: Any,
  num_blocks: int,
  *,
  has_segments: bool,
  step: Callable[[Any, Carry, bool], Carry],
  carry: Carry,
) -> Carry:
  """Runs `step(i, carry, masked)` over the blocks that see key tokens j."""
  start = whole = 0
  if spec.causal:
    # Queries from this one on see one of the key tokens; see all of them.
    see_one = jnp.maximum(j * spec.block_k - spec.offset, 0)
    see_all = jnp.maximum((j + 1) * spec.block_k - 1 - spec.offset, 0)
    start = jnp.minimum(flash.floor_div(see_one, spec.block_q), num_blocks)
    whole = flash.floor_div(see_all + spec.block_q - 1, spec.block_q)
    whole = jnp.minimum(whole, num_blocks)
  if has_segments:
    whole = num_blocks
  elif spec.num_keys % spec.block_k:
    whole = jnp.where((j + 1) * spec.block_k > spec.num_keys, num_blocks, whole)
  carry = jax.lax.fori_loop(start, whole, lambda i, c: step(i, c, True), carry)
  return jax.lax.fori_loop(
    whole, num_blocks, lambda i, c: step(i, c, False), carry
  )


def _column(tree: Any) -> Any:
  """[n] to [n, 1], leaf by leaf."""
  return jax.tree.map(lambda ref: ref[...][:, None], tree)


def _slice_rows(tree: Any, start: Any, size: int) -> Any:
  """[1, size] of each leaf [n]."""
  return jax.tree.map(lambda ref: ref[pl.ds(start, size)][None, :], tree)


def _allowed(spec, i, j, segments, *, transposed, masked) -> Array | None:
  if not masked:
    return None
  return flash.mask(spec, i, j, segments=segments, transposed=transposed)


def _forward_kernel(
  spec, head_dim, q_ref, k_ref, v_ref, lse_ref, noise, segments, *outs
) -> None:
  """Output of a block of queries; with `lse_ref`, of the WEIGHTS mode."""
  out_ref, stat_ref = outs
  i = pl.program_id(0)
  q = q_ref[...]
  wide = flash.wide_dtype(q.dtype)
  row = None if noise is None else _column(noise.row)
  segment = None if segments is None else _column(segments.query)
  lse = None if lse_ref is None else _column(lse_ref)

  def step(j, carry, masked):
    acc, top, total = carry
    start = j * spec.block_k
    here = pl.ds(start, spec.block_k)
    v = v_ref[here, :]
    noise_ = segments_ = None
    if noise is not None:
      column, scale = _slice_rows(
        (noise.column, noise.scale), start, spec.block_k
      )
      noise_ = flash.Noise(row=row, column=column, scale=scale)
    if segments is not None:
      segments_ = flash.Segments(
        query=segment,
        key_token=_slice_rows(segments.key_token, start, spec.block_k),
      )
    allowed = _allowed(spec, i, j, segments_, transposed=False, masked=masked)
    s, draw = flash.scores(
      spec,
      q,
      k_ref[here, :],
      noise=noise_,
      allowed=allowed,
      transposed=False,
      head_dim=head_dim,
    )
    if lse is not None:
      assert draw is not None, "WEIGHTS is a mode of noise."
      assert noise_ is not None, "WEIGHTS is a mode of noise."
      p = flash.cut_weights(
        jnp.exp2(s - lse), draw, noise_.scale, allowed=allowed
      )
    else:
      highest = jnp.maximum(top, s.max(axis=1, keepdims=True))
      shrink = jnp.exp2(top - highest)
      p = jnp.exp2(s - highest)
      top, total, acc = highest, total * shrink, acc * shrink
    total = total + p.sum(axis=1, keepdims=True)
    acc = acc + flash.matmul(p.astype(v.dtype), v, contract=(1, 0))
    return acc, top, total

  acc, top, total = _each_key_block(
    spec,
    i,
    has_segments=segments is not None,
    step=step,
    carry=(
      jnp.zeros(q.shape, wide),
      jnp.full((spec.block_q, 1), flash.LOWEST, wide),
      jnp.zeros((spec.block_q, 1), wide),
    ),
  )
  seen = total > 0
  divisor = jnp.where(seen, total, 1)
  out_ref[...] = (acc / divisor).astype(out_ref.dtype)
  if lse is None:
    stat = jnp.where(seen, top + jnp.log2(divisor), flash.EMPTY_ROW)
  else:
    stat = total
  stat_ref[...] = stat[:, 0]


def _head_axis(tree: Any) -> Any:
  """[B, n] to [B, 1, n]: segments belong to every head."""
  return jax.tree.map(lambda leaf: leaf[:, None, :], tree)


def _over_keys_specs(spec, q, k, noise, segments):
  """Block specs of q, k, noise and segments for a block of queries."""
  heads = q.shape[1]
  noise_spec = segments_spec = None
  if noise is not None:
    noise_spec = flash.Noise(
      row=_one(noise.row.shape, spec.block_q),
      column=_whole(noise.column.shape, 1),
      scale=_whole(noise.scale.shape, 1),
    )
  if segments is not None:
    segments_spec = flash.Segments(
      query=pl.BlockSpec((None, None, spec.block_q), lambda i, n, b: (b, 0, i)),
      key_token=_whole(segments.key_token.shape, heads),
    )
  groups = heads // k.shape[1]
  return (
    _one(q.shape, spec.block_q),
    _whole(k.shape, groups),
    noise_spec,
    segments_spec,
  )


def _run_forward(spec, q, k, v, lse, noise, segments):
  """Calls `_forward_kernel`; arguments as in `flash.Backend`."""
  head_dim = q.shape[-1]
  q, k, v = _pad_heads(q, k, v)
  segments = _head_axis(segments)
  wide = flash.wide_dtype(q.dtype)
  q_spec, k_spec, noise_spec, segments_spec = _over_keys_specs(
    spec, q, k, noise, segments
  )
  row_spec = _one(q.shape[:3], spec.block_q)
  out, stat = _call(
    functools.partial(_forward_kernel, spec, head_dim),
    (q, k, v, lse, noise, segments),
    grid=(q.shape[2] // spec.block_q, q.shape[1], q.shape[0]),
    in_specs=[
      q_spec,
      k_spec,
      k_spec,
      None if lse is None else row_spec,
      noise_spec,
      segments_spec,
    ],
    out_specs=[q_spec, row_spec],
    out_shape=[
      jax.ShapeDtypeStruct(q.shape, q.dtype),
      jax.ShapeDtypeStruct(q.shape[:3], wide),
    ],
    name="noisy_attention_forward",
  )
  return out[..., :head_dim], stat


def forward(spec, q, k, v, noise, segments):
  """See `flash.Backend`."""
  return _run_forward(spec, q, k, v, None, noise, segments)


def forward_weights(spec, q, k, v, lse, noise, segments):
  """See `flash.Backend`."""
  return _run_forward(spec, q, k, v, lse, noise, segments)


def _backward_q_kernel(
  spec, head_dim, q_ref, k_ref, v_ref, do_ref, stats, noise, segments, *outs
) -> None:
  """dQ of a block of queries, and P.G under WEIGHTS."""
  i = pl.program_id(0)
  q, do = q_ref[...], do_ref[...]
  wide = flash.wide_dtype(q.dtype)
  row = None if noise is None else _column(noise.row)
  segment = None if segments is None else _column(segments.query)
  stats = _column(stats)
  two_sums = spec.mode is _WEIGHTS

  def step(j, carry, masked):
    start = j * spec.block_k
    here = pl.ds(start, spec.block_k)
    k, v = k_ref[here, :], v_ref[here, :]
    noise_ = segments_ = None
    if noise is not None:
      column, scale = _slice_rows(
        (noise.column, noise.scale), start, spec.block_k
      )
      noise_ = flash.Noise(row=row, column=column, scale=scale)
    if segments is not None:
      segments_ = flash.Segments(
        query=segment,
        key_token=_slice_rows(segments.key_token, start, spec.block_k),
      )
    allowed = _allowed(spec, i, j, segments_, transposed=False, masked=masked)
    s, draw = flash.scores(
      spec,
      q,
      k,
      noise=noise_,
      allowed=allowed,
      transposed=False,
      head_dim=head_dim,
    )
    grads = flash.block_grads(
      spec,
      s,
      draw,
      flash.matmul(do, v, contract=(1, 1)),
      stats=stats,
      noise=noise_,
      allowed=allowed,
    )
    ds = grads.p * grads.grad if two_sums else grads.grad
    added = flash.matmul(ds.astype(k.dtype), k, contract=(1, 0))
    if not two_sums:
      return (carry[0] + added,)
    # P.G is known at the end of the row only: two sums, subtracted there.
    acc, acc_p, inner = carry
    return (
      acc + added,
      acc_p + flash.matmul(grads.p.astype(k.dtype), k, contract=(1, 0)),
      inner + ds.sum(axis=1, keepdims=True),
    )

  zeros = jnp.zeros(q.shape, wide)
  carry = (zeros,)
  if two_sums:
    carry = (zeros, zeros, jnp.zeros((spec.block_q, 1), wide))
  carry = _each_key_block(
    spec,
    i,
    has_segments=segments is not None,
    step=step,
    carry=carry,
  )
  dq = carry[0]
  if two_sums:
    dq = dq - carry[2] * carry[1]
    outs[1][...] = carry[2][:, 0]
  outs[0][...] = (dq * head_dim**-0.5).astype(outs[0].dtype)


def backward_q(spec, q, k, v, d_out, stats, noise, segments):
  """See `flash.Backend`."""
  head_dim = q.shape[-1]
  q, k, v, d_out = _pad_heads(q, k, v, d_out)
  segments = _head_axis(segments)
  q_spec, k_spec, noise_spec, segments_spec = _over_keys_specs(
    spec, q, k, noise, segments
  )
  row_spec = _one(q.shape[:3], spec.block_q)
  out_specs = [q_spec]
  out_shape = [jax.ShapeDtypeStruct(q.shape, q.dtype)]
  if spec.mode is _WEIGHTS:
    out_specs.append(row_spec)
    out_shape.append(
      jax.ShapeDtypeStruct(q.shape[:3], flash.wide_dtype(q.dtype))
    )
  outs = _call(
    functools.partial(_backward_q_kernel, spec, head_dim),
    (q, k, v, d_out, stats, noise, segments),
    grid=(q.shape[2] // spec.block_q, q.shape[1], q.shape[0]),
    in_specs=[
      q_spec,
      k_spec,
      k_spec,
      q_spec,
      jax.tree.map(lambda _: row_spec, stats),
      noise_spec,
      segments_spec,
    ],
    out_specs=out_specs,
    out_shape=out_shape,
    name="noisy_attention_backward_q",
  )
  return outs[0][..., :head_dim], (outs[1] if len(outs) == 2 else None)


def _backward_kv_kernel(
  spec,
  head_dim,
  of_scale,
  q_ref,
  k_ref,
  v_ref,
  do_ref,
  stats,
  noise,
  segments,
  *outs,
) -> None:
  """dK and dV of a block of key tokens, or d scale.

  What belongs to queries is [G, ...], the query heads of one key head.
  """
  j = pl.program_id(0)
  k, v = k_ref[...], v_ref[...]
  wide = flash.wide_dtype(k.dtype)
  segment = None if segments is None else _column(segments.key_token)
  num_groups, num_queries = q_ref.shape[:2]

  def of_head(g, carry):
    column = scale = None
    if noise is not None:
      column = noise.column[g, :][:, None]
      scale = noise.scale[g, :][:, None]

    def step(i, carry, masked):
      start = i * spec.block_q
      here = pl.ds(start, spec.block_q)
      q, do = q_ref[g, here, :], do_ref[g, here, :]
      rows = lambda tree: jax.tree.map(lambda ref: ref[g, here][None, :], tree)
      stats_ = rows(stats)
      noise_ = segments_ = None
      if noise is not None:
        noise_ = flash.Noise(row=rows(noise.row), column=column, scale=scale)
      if segments is not None:
        segments_ = flash.Segments(
          query=_slice_rows(segments.query, start, spec.block_q),
          key_token=segment,
        )
      allowed = _allowed(spec, i, j, segments_, transposed=True, masked=masked)
      s, draw = flash.scores(
        spec,
        q,
        k,
        noise=noise_,
        allowed=allowed,
        transposed=True,
        head_dim=head_dim,
      )
      grads = flash.block_grads(
        spec,
        s,
        draw,
        flash.matmul(v, do, contract=(1, 1)),
        stats=stats_,
        noise=noise_,
        allowed=allowed,
      )
      if of_scale:
        assert draw is not None, "Without noise there is no scale."
        grad = flash.scale_grad(spec, grads, draw, stats_)
        return (carry[0] + grad.sum(axis=1, keepdims=True),)
      ds = flash.score_grad(spec, grads, stats_)
      return (
        carry[0] + flash.matmul(ds.astype(q.dtype), q, contract=(1, 0)),
        carry[1]
        + flash.matmul(grads.weights.astype(do.dtype), do, contract=(1, 0)),
      )

    return _each_query_block(
      spec,
      j,
      num_queries // spec.block_q,
      has_segments=segments is not None,
      step=step,
      carry=carry,
    )

  if of_scale:
    carry = (jnp.zeros((spec.block_k, 1), wide),)
  else:
    carry = (jnp.zeros(k.shape, wide), jnp.zeros(v.shape, wide))
  carry = jax.lax.fori_loop(0, num_groups, of_head, carry)
  if of_scale:
    outs[0][...] = carry[0][:, 0]
    return
  outs[0][...] = (carry[0] * head_dim**-0.5).astype(outs[0].dtype)
  outs[1][...] = carry[1].astype(outs[1].dtype)


def _run_backward_kv(
  spec, q, k, v, d_out, stats, noise, segments, *, of_scale: bool
):
  """Calls `_backward_kv_kernel`; arguments as in `flash.Backend`."""
  head_dim = q.shape[-1]
  q, k, v, d_out = _pad_heads(q, k, v, d_out)
  segments = _head_axis(segments)
  wide = flash.wide_dtype(q.dtype)
  batch, num_heads = q.shape[:2]
  groups = num_heads // k.shape[1]
  # Programs stand for key heads, each with all its query heads; d scale is per
  # query head, so there a program has one.
  shared, per_program = (groups, 1) if of_scale else (1, groups)

  def queries(leaf):
    zeros = (0,) * (leaf.ndim - 2)
    return pl.BlockSpec(
      (None, per_program, *leaf.shape[2:]),
      lambda j, n, b: (b, n, *zeros),
    )

  def own(leaf):
    return pl.BlockSpec(
      (None, per_program, spec.block_k), lambda j, n, b: (b, n, j)
    )

  noise_spec = segments_spec = None
  if noise is not None:
    noise_spec = flash.Noise(
      row=queries(noise.row), column=own(noise.column), scale=own(noise.scale)
    )
  if segments is not None:
    segments_spec = flash.Segments(
      query=_whole(segments.query.shape, num_heads),
      key_token=pl.BlockSpec(
        (None, None, spec.block_k), lambda j, n, b: (b, 0, j)
      ),
    )
  k_spec = pl.BlockSpec(
    (None, None, spec.block_k, k.shape[-1]),
    lambda j, n, b: (b, flash.floor_div(n, shared), j, 0),
  )
  if of_scale:
    shape = (batch, num_heads, k.shape[2])
    out_specs = [_one(shape, spec.block_k)]
    out_shape = [jax.ShapeDtypeStruct(shape, wide)]
  else:
    out_specs = [k_spec, k_spec]
    out_shape = [
      jax.ShapeDtypeStruct(k.shape, k.dtype),
      jax.ShapeDtypeStruct(v.shape, v.dtype),
    ]
  outs = _call(
    functools.partial(_backward_kv_kernel, spec, head_dim, of_scale),
    (q, k, v, d_out, stats, noise, segments),
    grid=(k.shape[2] // spec.block_k, num_heads // per_program, batch),
    in_specs=[
      queries(q),
      k_spec,
      k_spec,
      queries(d_out),
      jax.tree.map(queries, stats),
      noise_spec,
      segments_spec,
    ],
    out_specs=out_specs,
    out_shape=out_shape,
    name="noisy_attention_backward_" + ("scale" if of_scale else "kv"),
  )
  return outs, head_dim


def backward_kv(spec, q, k, v, d_out, stats, noise, segments):
  """See `flash.Backend`."""
  (dk, dv), head_dim = _run_backward_kv(
    spec, q, k, v, d_out, stats, noise, segments, of_scale=False
  )
  return dk[..., :head_dim], dv[..., :head_dim]


def backward_scale(spec, q, k, v, d_out, stats, noise, segments):
  """See `flash.Backend`."""
  (grad,), _ = _run_backward_kv(
    spec, q, k, v, d_out, stats, noise, segments, of_scale=True
  )
  return grad.astype(noise.scale.dtype)


BACKEND = flash.Backend(
  forward=forward,
  forward_weights=forward_weights,
  backward_q=backward_q,
  backward_kv=backward_kv,
  backward_scale=backward_scale,
  block_multiple=_LEAST,
  block_q=64,
  block_k=64,
)
