"""Flash attention with noise for TPU, in Pallas Mosaic; formulas in `flash`.

Four kernels. Two walk over key tokens for a block of queries (the output; dQ),
two over queries for a block of key tokens (dK and dV; d scale), and these hold
their blocks transposed, [key tokens, queries]: what belongs to the block that
stays is turned into a column once, what belongs to the one that walks is a row
as it comes.

On other devices the kernels are interpreted, for tests.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from ppnet import config as config_lib
from ppnet.kernels import counter_noise, flash

_WEIGHTS = config_lib.NoiseMode.WEIGHTS
# Lanes of a vector register; also the least that Mosaic turns around.
_LANES = 128
# Of a tile's number in its seed; large, so that heads' seeds do not meet.
_SEED_FACTORS = (0x2C1B3C6D, 0x297A2D39)

Ref = Any


def _call(kernel: Callable[..., None], operands: tuple, **kwargs: Any) -> Any:
  """A Pallas call that is compiled for TPU and interpreted elsewhere."""

  def run(interpret: bool, *operands):
    return pl.pallas_call(kernel, interpret=interpret, **kwargs)(*operands)

  return jax.lax.platform_dependent(
    *operands,
    tpu=functools.partial(run, False),
    default=functools.partial(run, True),
  )


def _params() -> pltpu.CompilerParams:
  # Batch, heads and blocks of the side that stays; then what is summed over.
  return pltpu.CompilerParams(
    dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
  )


def _as_column(row: Array) -> Array:
  """[1, n] to [n, 1]."""
  return jnp.broadcast_to(row, (_LANES, row.shape[1])).T[:, :1]


def _as_row(column: Array) -> Array:
  """[n, 1] to [1, n]."""
  return jnp.broadcast_to(column, (column.shape[0], _LANES)).T[:1]


def _put(scratch: Any, refs: Any) -> None:
  """Stores rows of `refs` as the columns of `scratch`, leaf by leaf."""
  for to, ref in zip(
    jax.tree.leaves(scratch), jax.tree.leaves(refs), strict=True
  ):
    to[...] = _as_column(ref[...])


def _read(refs: Any) -> Any:
  return jax.tree.map(lambda ref: ref[...], refs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Grid:
  """Block specs of one kernel: which block each operand shows at each step.

  Attributes:
    spec: the op.
    groups: query heads per key head.
    head_dim: H.
    index: grid position -> batch, query head, key head, query block, key block.
  """

  spec: flash.Spec
  groups: int
  head_dim: int
  index: Callable[..., tuple[Any, ...]]

  def _block(self, shape: tuple[int | None, ...], pick: Any) -> pl.BlockSpec:
    return pl.BlockSpec(shape, lambda *g: pick(*self.index(*g)))

  def queries(self) -> pl.BlockSpec:
    """[B, N, T, H]."""
    return self._block(
      (None, None, self.spec.block_q, self.head_dim),
      lambda b, n, h, i, j: (b, n, i, 0),
    )

  def key_tokens(self) -> pl.BlockSpec:
    """[B, K, S, H]."""
    return self._block(
      (None, None, self.spec.block_k, self.head_dim),
      lambda b, n, h, i, j: (b, h, j, 0),
    )

  def row(self) -> pl.BlockSpec:
    """[B, N, 1, T]."""
    return self._block(
      (None, None, 1, self.spec.block_q), lambda b, n, h, i, j: (b, n, 0, i)
    )

  def column(self) -> pl.BlockSpec:
    """[B, N, 1, S]."""
    return self._block(
      (None, None, 1, self.spec.block_k), lambda b, n, h, i, j: (b, n, 0, j)
    )

  def noise(self, noise: flash.Noise | None) -> flash.Noise | None:
    """Of the noise's words and scale."""
    if noise is None:
      return None
    if self.spec.hardware:
      seed = pl.BlockSpec(
        (None, None, 1, 2),
        lambda *g: (self.index(*g)[0], self.index(*g)[1], 0, 0),
        memory_space=pltpu.SMEM,
      )
      return flash.Noise(row=seed, column=None, scale=self.column())
    return flash.Noise(
      row=self.row(), column=self.column(), scale=self.column()
    )

  def segments(self, segments: flash.Segments | None) -> Any:
    """[B, 1, T] and [B, 1, S]."""
    if segments is None:
      return None
    return flash.Segments(
      query=self._block(
        (None, 1, self.spec.block_q), lambda b, n, h, i, j: (b, 0, i)
      ),
      key_token=self._block(
        (None, 1, self.spec.block_k), lambda b, n, h, i, j: (b, 0, j)
      ),
    )


def _over_keys(spec: flash.Spec, q: Array, k: Array) -> tuple[tuple, _Grid]:
  """Grid of a kernel that walks over key tokens for a block of queries."""
  batch, num_heads, num_queries, head_dim = q.shape
  groups = num_heads // k.shape[1]
  num_blocks = k.shape[2] // spec.block_k

  def index(b, n, i, j):
    if spec.causal:  # Blocks that nobody sees are not fetched either.
      last = flash.floor_div(
        (i + 1) * spec.block_q - 1 + spec.offset, spec.block_k
      )
      j = jnp.minimum(j, jnp.minimum(last, num_blocks - 1))
    return b, n, flash.floor_div(n, groups), i, j

  grid = (batch, num_heads, num_queries // spec.block_q, num_blocks)
  return grid, _Grid(spec=spec, groups=groups, head_dim=head_dim, index=index)


def _over_queries(
  spec: flash.Spec, q: Array, k: Array, *, per_query_head: bool
) -> tuple[tuple, _Grid]:
  """Grid of a kernel that walks over queries for a block of key tokens.

  A key head belongs to several query heads. They are walked over too, so that
  their sum is made in place, unless the result is per query head.
  """
  batch, num_heads, num_queries, head_dim = q.shape
  num_kv_heads, num_keys = k.shape[1:3]
  groups = num_heads // num_kv_heads
  num_blocks = num_queries // spec.block_q

  def index(b, h, j, step):
    i = jax.lax.rem(step, np.int32(num_blocks))
    if per_query_head:
      n, h = h, flash.floor_div(h, groups)
    else:
      n = h * groups + flash.floor_div(step, num_blocks)
    if spec.causal:
      first = flash.floor_div(j * spec.block_k - spec.offset, spec.block_q)
      i = jnp.maximum(i, jnp.minimum(first, num_blocks - 1))
    return b, n, h, i, j

  heads = num_heads if per_query_head else num_kv_heads
  steps = num_blocks if per_query_head else num_blocks * groups
  grid = (batch, heads, num_keys // spec.block_k, steps)
  return grid, _Grid(spec=spec, groups=groups, head_dim=head_dim, index=index)


def _visit(
  spec: flash.Spec, i: Any, j: Any, segments: Any, step: Callable[[Any], None]
) -> None:
  """Runs `step(masked)` where the block is visible, masked where it must be."""
  visible = flash.is_visible(spec, i, j)
  if segments is not None:
    pl.when(visible)(lambda: step(True))
    return
  whole = flash.is_whole(spec, i, j)
  pl.when(visible & whole)(lambda: step(False))
  pl.when(visible & jnp.logical_not(whole))(lambda: step(True))


def _allowed(
  spec: flash.Spec, i: Any, j: Any, *, segments: Any, transposed: bool, masked
) -> Array | None:
  if not masked:
    return None
  return flash.mask(spec, i, j, segments=_read(segments), transposed=transposed)


def _column_scratch(size: int, tree: Any) -> Any:
  """Scratch [size, 1] for each leaf."""
  return jax.tree.map(lambda leaf: pltpu.VMEM((size, 1), leaf.dtype), tree)


def _forward_kernel(
  spec, q_ref, k_ref, v_ref, lse_ref, noise, segments, *rest
) -> None:
  """Output of a block of queries; with `lse_ref`, of the WEIGHTS mode.

  Outputs are the block's output and its log-sum-exp, or the total Z of its cut
  weights.
  """
  out_ref, stat_ref, acc, top, total, columns = rest
  i, j = pl.program_id(2), pl.program_id(3)
  rows = (
    _row_words(spec, noise),
    None if segments is None else segments.query,
    lse_ref,
  )

  @pl.when(j == 0)
  def _start():
    acc[...] = jnp.zeros_like(acc)
    total[...] = jnp.zeros_like(total)
    top[...] = jnp.full_like(top, flash.LOWEST)
    _put(columns, rows)

  def step(masked):
    word, segment, lse = columns
    noise_, segments_ = _with_rows(noise, word), _with_query(segments, segment)
    allowed = _allowed(
      spec, i, j, segments=segments_, transposed=False, masked=masked
    )
    s, draw = flash.scores(
      spec,
      q_ref[...],
      k_ref[...],
      noise=_read(noise_),
      allowed=allowed,
      transposed=False,
      drawn=_drawn(spec, noise, i, j, transposed=False),
    )
    v = v_ref[...]
    if lse is not None:
      assert draw is not None, "WEIGHTS is a mode of noise."
      p = flash.cut_weights(
        jnp.exp2(s - lse[...]), draw, noise.scale[...], allowed=allowed
      )
    else:
      highest = jnp.maximum(top[...], s.max(axis=1, keepdims=True))
      shrink = jnp.exp2(top[...] - highest)
      p = jnp.exp2(s - highest)
      top[...] = highest
      total[...] = total[...] * shrink
      acc[...] = acc[...] * shrink
    total[...] += p.sum(axis=1, keepdims=True)
    acc[...] += flash.matmul(p.astype(v.dtype), v, contract=(1, 0))

  _visit(spec, i, j, segments, step)

  @pl.when(j == pl.num_programs(3) - 1)
  def _finish():
    seen = total[...] > 0
    divisor = jnp.where(seen, total[...], 1)
    out_ref[...] = (acc[...] / divisor).astype(out_ref.dtype)
    if lse_ref is None:
      lse = jnp.where(seen, top[...] + jnp.log2(divisor), flash.EMPTY_ROW)
      stat_ref[...] = _as_row(lse)
    else:
      stat_ref[...] = _as_row(total[...])


def _with_rows(noise: Any, row: Any) -> Any:
  return None if noise is None else dataclasses.replace(noise, row=row)


def _row_words(spec: flash.Spec, noise: Any) -> Any:
  """The words of queries, which become a column; the hardware has none."""
  return None if noise is None or spec.hardware else noise.row


def _drawn(
  spec: flash.Spec, noise: Any, i: Any, j: Any, *, transposed: bool
) -> Array | None:
  """Raw noise of block (i, j) by hardware, each tile from a seed of its own."""
  if noise is None or not spec.hardware:
    return None
  tile = counter_noise.HARDWARE_TILE
  num_rows, num_columns = spec.block_q // tile, spec.block_k // tile

  def draw(row, column):
    # Odd factors: no two tiles of a head share a seed.
    pltpu.prng_seed(
      noise.row[0, 0] + (i * num_rows + row) * _SEED_FACTORS[0],
      noise.row[0, 1] + (j * num_columns + column) * _SEED_FACTORS[1],
    )
    bits = pltpu.prng_random_bits((tile, tile))
    bits = jax.lax.bitcast_convert_type(bits, jnp.uint32)
    return bits.T if transposed else bits

  tiles = [
    [draw(row, column) for column in range(num_columns)]
    for row in range(num_rows)
  ]
  if transposed:
    tiles = list(zip(*tiles, strict=True))
  bits = jnp.concatenate([jnp.concatenate(row, axis=1) for row in tiles])
  return counter_noise.raw_of_bits(bits)


def _with_query(segments: Any, query: Any) -> Any:
  return (
    None if segments is None else dataclasses.replace(segments, query=query)
  )


def forward_weights(spec, q, k, v, lse, noise, segments):
  """See `flash.Backend`; without `lse`, its `forward`."""
  grid, blocks = _over_keys(spec, q, k)
  wide = flash.wide_dtype(q.dtype)
  noise, segments, lse = flash.as_rows((noise, segments, lse))
  rows = (
    _row_words(spec, noise),
    None if segments is None else segments.query,
    lse,
  )
  batch, num_heads, num_queries, head_dim = q.shape
  column = lambda: pltpu.VMEM((spec.block_q, 1), wide)
  out, stat = _call(
    functools.partial(_forward_kernel, spec),
    (q, k, v, lse, noise, segments),
    grid=grid,
    in_specs=[
      blocks.queries(),
      blocks.key_tokens(),
      blocks.key_tokens(),
      None if lse is None else blocks.row(),
      blocks.noise(noise),
      blocks.segments(segments),
    ],
    out_specs=[blocks.queries(), blocks.row()],
    out_shape=[
      jax.ShapeDtypeStruct(q.shape, q.dtype),
      jax.ShapeDtypeStruct((batch, num_heads, 1, num_queries), wide),
    ],
    scratch_shapes=[
      pltpu.VMEM((spec.block_q, head_dim), wide),
      column(),
      column(),
      _column_scratch(spec.block_q, rows),
    ],
    compiler_params=_params(),
    name="noisy_attention_forward",
  )
  return out, stat[:, :, 0]


def forward(spec, q, k, v, noise, segments):
  """See `flash.Backend`."""
  return forward_weights(spec, q, k, v, None, noise, segments)


def _backward_q_kernel(
  spec, q_ref, k_ref, v_ref, do_ref, stats, noise, segments, *rest
) -> None:
  """dQ of a block of queries, and P.G under WEIGHTS."""
  inner_ref: Any = None
  acc_p: Any = None
  inner: Any = None
  if spec.mode is _WEIGHTS:
    dq_ref, inner_ref, acc, columns, acc_p, inner = rest
  else:
    dq_ref, acc, columns = rest
  i, j = pl.program_id(2), pl.program_id(3)
  rows = (
    _row_words(spec, noise),
    None if segments is None else segments.query,
    stats,
  )

  @pl.when(j == 0)
  def _start():
    for ref in (acc, acc_p, inner):
      if ref is not None:
        ref[...] = jnp.zeros_like(ref)
    _put(columns, rows)

  def step(masked):
    word, segment, stats_ = columns
    stats_ = _read(stats_)
    noise_ = _read(_with_rows(noise, word))
    allowed = _allowed(
      spec,
      i,
      j,
      segments=_with_query(segments, segment),
      transposed=False,
      masked=masked,
    )
    k, v = k_ref[...], v_ref[...]
    s, draw = flash.scores(
      spec,
      q_ref[...],
      k,
      noise=noise_,
      allowed=allowed,
      transposed=False,
      drawn=_drawn(spec, noise, i, j, transposed=False),
    )
    grads = flash.block_grads(
      spec,
      s,
      draw,
      flash.matmul(do_ref[...], v, contract=(1, 1)),
      stats=stats_,
      noise=noise_,
      allowed=allowed,
    )
    if inner is None:
      ds = grads.grad
    else:
      # P.G is known at the end of the row only: two sums, subtracted there.
      ds = grads.p * grads.grad
      inner[...] += ds.sum(axis=1, keepdims=True)
      acc_p[...] += flash.matmul(grads.p.astype(k.dtype), k, contract=(1, 0))
    acc[...] += flash.matmul(ds.astype(k.dtype), k, contract=(1, 0))

  _visit(spec, i, j, segments, step)

  @pl.when(j == pl.num_programs(3) - 1)
  def _finish():
    dq = acc[...]
    if inner is not None:
      dq = dq - inner[...] * acc_p[...]
      inner_ref[...] = _as_row(inner[...])
    dq_ref[...] = (dq * q_ref.shape[-1] ** -0.5).astype(dq_ref.dtype)


def backward_q(spec, q, k, v, d_out, stats, noise, segments):
  """See `flash.Backend`."""
  grid, blocks = _over_keys(spec, q, k)
  wide = flash.wide_dtype(q.dtype)
  stats, noise, segments = flash.as_rows((stats, noise, segments))
  rows = (
    _row_words(spec, noise),
    None if segments is None else segments.query,
    stats,
  )
  batch, num_heads, num_queries, head_dim = q.shape
  tile = pltpu.VMEM((spec.block_q, head_dim), wide)
  out_specs = [blocks.queries()]
  out_shape = [jax.ShapeDtypeStruct(q.shape, q.dtype)]
  scratch = [tile, _column_scratch(spec.block_q, rows)]
  if spec.mode is _WEIGHTS:
    out_specs.append(blocks.row())
    out_shape.append(
      jax.ShapeDtypeStruct((batch, num_heads, 1, num_queries), wide)
    )
    scratch += [tile, pltpu.VMEM((spec.block_q, 1), wide)]
  outs = _call(
    functools.partial(_backward_q_kernel, spec),
    (q, k, v, d_out, stats, noise, segments),
    grid=grid,
    in_specs=[
      blocks.queries(),
      blocks.key_tokens(),
      blocks.key_tokens(),
      blocks.queries(),
      jax.tree.map(lambda _: blocks.row(), stats),
      blocks.noise(noise),
      blocks.segments(segments),
    ],
    out_specs=out_specs,
    out_shape=out_shape,
    scratch_shapes=scratch,
    compiler_params=_params(),
    name="noisy_attention_backward_q",
  )
  if spec.mode is not _WEIGHTS:
    return outs[0], None
  return outs[0], outs[1][:, :, 0]


def _backward_kv_kernel(
  spec, num_blocks, q_ref, k_ref, v_ref, do_ref, stats, noise, segments, *rest
) -> None:
  """dK and dV of a block of key tokens; or d scale, where that is asked for."""
  *out_refs, acc, columns = rest
  j, step_index = pl.program_id(2), pl.program_id(3)
  i = jax.lax.rem(step_index, np.int32(num_blocks))
  kept = (
    None if noise is None else (noise.column, noise.scale),
    None if segments is None else segments.key_token,
  )

  @pl.when(step_index == 0)
  def _start():
    for ref in acc:
      ref[...] = jnp.zeros_like(ref)

  @pl.when(i == 0)  # Each query head has a noise of its own.
  def _next_head():
    _put(columns, kept)

  def step(masked):
    noise_, segments_ = noise, segments
    if noise is not None:
      noise_ = dataclasses.replace(
        noise, column=columns[0][0], scale=columns[0][1]
      )
    if segments is not None:
      segments_ = dataclasses.replace(segments, key_token=columns[1])
    noise_, stats_ = _read(noise_), _read(stats)
    allowed = _allowed(
      spec, i, j, segments=segments_, transposed=True, masked=masked
    )
    q, do = q_ref[...], do_ref[...]
    s, draw = flash.scores(
      spec,
      q,
      k_ref[...],
      noise=noise_,
      allowed=allowed,
      transposed=True,
      drawn=_drawn(spec, noise, i, j, transposed=True),
    )
    grads = flash.block_grads(
      spec,
      s,
      draw,
      flash.matmul(v_ref[...], do, contract=(1, 1)),
      stats=stats_,
      noise=noise_,
      allowed=allowed,
    )
    if len(acc) == 1:
      assert draw is not None, "Without noise there is no scale."
      grad = flash.scale_grad(spec, grads, draw, stats_)
      acc[0][...] += grad.sum(axis=1, keepdims=True)
      return
    ds = flash.score_grad(spec, grads, stats_)
    acc[0][...] += flash.matmul(ds.astype(q.dtype), q, contract=(1, 0))
    acc[1][...] += flash.matmul(
      grads.weights.astype(do.dtype), do, contract=(1, 0)
    )

  _visit(spec, i, j, segments, step)

  @pl.when(step_index == pl.num_programs(3) - 1)
  def _finish():
    if len(acc) == 1:
      out_refs[0][...] = _as_row(acc[0][...])
      return
    dk = acc[0][...] * q_ref.shape[-1] ** -0.5
    out_refs[0][...] = dk.astype(out_refs[0].dtype)
    out_refs[1][...] = acc[1][...].astype(out_refs[1].dtype)


def _run_backward_kv(
  spec, q, k, v, d_out, stats, noise, segments, *, of_scale: bool
):
  """Calls `_backward_kv_kernel`; arguments as in `flash.Backend`."""
  grid, blocks = _over_queries(spec, q, k, per_query_head=of_scale)
  wide = flash.wide_dtype(q.dtype)
  stats, noise, segments = flash.as_rows((stats, noise, segments))
  kept = (
    None if noise is None else (noise.column, noise.scale),
    None if segments is None else segments.key_token,
  )
  batch, num_heads, _, head_dim = q.shape
  if of_scale:
    out_specs = [blocks.column()]
    out_shape = [jax.ShapeDtypeStruct((batch, num_heads, 1, k.shape[2]), wide)]
    acc = [pltpu.VMEM((spec.block_k, 1), wide)]
  else:
    out_specs = [blocks.key_tokens()] * 2
    out_shape = [
      jax.ShapeDtypeStruct(k.shape, k.dtype),
      jax.ShapeDtypeStruct(v.shape, v.dtype),
    ]
    acc = [pltpu.VMEM((spec.block_k, head_dim), wide)] * 2
  return _call(
    functools.partial(_backward_kv_kernel, spec, q.shape[2] // spec.block_q),
    (q, k, v, d_out, stats, noise, segments),
    grid=grid,
    in_specs=[
      blocks.queries(),
      blocks.key_tokens(),
      blocks.key_tokens(),
      blocks.queries(),
      jax.tree.map(lambda _: blocks.row(), stats),
      blocks.noise(noise),
      blocks.segments(segments),
    ],
    out_specs=out_specs,
    out_shape=out_shape,
    scratch_shapes=[acc, _column_scratch(spec.block_k, kept)],
    compiler_params=_params(),
    name="noisy_attention_backward_" + ("scale" if of_scale else "kv"),
  )


def backward_kv(spec, q, k, v, d_out, stats, noise, segments):
  """See `flash.Backend`."""
  return tuple(
    _run_backward_kv(
      spec, q, k, v, d_out, stats, noise, segments, of_scale=False
    )
  )


def backward_scale(spec, q, k, v, d_out, stats, noise, segments):
  """See `flash.Backend`."""
  (grad,) = _run_backward_kv(
    spec, q, k, v, d_out, stats, noise, segments, of_scale=True
  )
  return grad[:, :, 0].astype(noise.scale.dtype)


BACKEND = flash.Backend(
  forward=forward,
  forward_weights=forward_weights,
  backward_q=backward_q,
  backward_kv=backward_kv,
  backward_scale=backward_scale,
  block_multiple=_LANES,
  block_q=256,
  block_k=512,
  has_generator=True,
)
