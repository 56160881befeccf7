"""What the flash kernels share: the op's derivative, and the inside of a block.

Attention in blocks (Dao et al. 2022, https://arxiv.org/abs/2205.14135): scores
of one block of queries and one block of key tokens at a time, in the fast
memory, with a running maximum and sum per query. Memory is O(T): what the
backward pass keeps is q, k, v, the output and one number per query, and it
computes scores and noise again. The noise needs no memory because it is a
function of two words, one of the query and one of the key token
(`counter_noise.raw`).

With L the logarithm of the sum of exp(scores) of a query's row, dO the output's
cotangent and dP = dO V':

    SCORES   P = exp(s + scale N - L),  dS = P (dP - dO.O),  d scale = sum dS N
    WEIGHTS  P = exp(s - L),  W = (P + scale N)_+ / Z,
             G = [W > 0] (dP - dO.O) / Z,  dS = P (G - P.G),  d scale = sum G N

    dV = P' dO or W' dO,  dQ = dS K / sqrt(H),  dK = dS' Q / sqrt(H)

A row whose every weight is cut to 0 keeps its clean ones, and then its W, G and
P.G are P, dP - dO.O and 0. Scores are kept in units of log 2, because
accelerators have the exponential to base 2.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from ppnet import config as config_lib
from ppnet.core import checks
from ppnet.kernels import counter_noise, partition

NoiseMode = config_lib.NoiseMode
Leaf = Any

_LOG2E = math.log2(math.e)
# Far below every score, and so far below `LOWEST` that their difference is too.
MASKED = -3e38
LOWEST = -1e30  # The running maximum before the first block.
EMPTY_ROW = 1e30  # Log-sum-exp that makes every weight exactly 0.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
  """What is known when a kernel is built.

  Attributes:
    causal: whether query t sees key tokens up to t + `offset` only.
    mode: what the noise is added to; None is attention without noise.
    num_keys: key tokens, padding excluded.
    offset: key tokens minus queries, padding excluded.
    block_q: queries of a block; divides the padded number of queries.
    block_k: key tokens of a block; divides the padded number of key tokens.
    hardware: the noise comes from the device's own generator.
  """

  causal: bool
  mode: NoiseMode | None
  num_keys: int
  offset: int
  block_q: int
  block_k: int
  hardware: bool = False


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["row", "column", "scale"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Noise:
  """The noise of one call: raw(row, column) * scale.

  Attributes:
    row: a word per query, u32[B, N, T]; the seed of each head, i32[B, N, 2],
      where the hardware draws.
    column: a word per key token, u32[B, N, S]; None where the hardware draws.
    scale: standard deviation times the generator's unit, f32[B, N, S].
  """

  row: Leaf
  column: Leaf
  scale: Leaf


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["query", "key_token"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Segments:
  """Segment of each query i32[B, T] and of each key token i32[B, S]."""

  query: Leaf
  key_token: Leaf


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["lse", "delta", "inverse_total", "inner"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class RowStats:
  """One number per query each, [B, N, T], for the backward pass.

  Attributes:
    lse: log2 of the sum of exp(scores).
    delta: output times its cotangent.
    inverse_total: 1 / Z, or 0 where the row kept its clean weights; None under
      SCORES.
    inner: P.G; None under SCORES, and before it is known.
  """

  lse: Leaf
  delta: Leaf
  inverse_total: Leaf = None
  inner: Leaf = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backend:
  """The kernels of one kind of device; arrays are [B, N, T, H] and padded.

  Attributes:
    forward: (spec, q, k, v, noise, segments) -> output and lse.
    forward_weights: (spec, q, k, v, lse, noise, segments) -> output, 0 where
      every weight was cut, and Z.
    backward_q: (spec, q, k, v, d_out, stats, noise, segments) -> dq and P.G,
      which is None under SCORES.
    backward_kv: likewise -> dk, dv.
    backward_scale: likewise -> d scale.
    block_multiple: blocks must be multiples of it.
    block_q: queries of a block, unless there are fewer.
    block_k: key tokens of a block, unless there are fewer.
    has_generator: whether it can draw by hardware.
  """

  forward: Callable[..., tuple[Array, Array]]
  forward_weights: Callable[..., tuple[Array, Array]]
  backward_q: Callable[..., tuple[Array, Array | None]]
  backward_kv: Callable[..., tuple[Array, Array]]
  backward_scale: Callable[..., Array]
  block_multiple: int
  block_q: int
  block_k: int
  has_generator: bool = False


def attention(
  backend: Backend,
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K H"],
  *,
  causal: bool,
  segment_ids: Int[Array, "B T"] | None,
  noise: Noise | None,
  mode: NoiseMode | None,
  block_sizes: tuple[int, int] | None = None,
) -> Float[Array, "B T N H"]:
  """Attention by `backend`; the arguments are those of `noisy_attention`.

  Args:
    backend: the kernels.
    q: queries.
    k: key tokens.
    v: values.
    causal: query t attends to key tokens up to t + S - T.
    segment_ids: tokens attend only within their segment.
    noise: words and scale, or None.
    mode: what the noise is added to; None where there is none.
    block_sizes: queries and key tokens of a block; None chooses.

  Raises:
    ValueError: block sizes that are not positive.
  """
  num_queries, num_keys = q.shape[1], k.shape[1]
  hardware = noise is not None and noise.column is None
  multiple = counter_noise.HARDWARE_TILE if hardware else backend.block_multiple
  if block_sizes is None:
    # Both are powers of two times the multiple.
    block_q, block_k = (
      min(most, multiple * pl.next_power_of_2(-(-size // multiple)))
      for most, size in (
        (backend.block_q, num_queries),
        (backend.block_k, num_keys),
      )
    )
  else:
    block_q, block_k = block_sizes
    checks.positive(block_q=block_q, block_k=block_k)
  if hardware:
    _check_hardware(backend, block_q=block_q, block_k=block_k)
  spec = Spec(
    causal=causal,
    mode=mode,
    num_keys=num_keys,
    offset=num_keys - num_queries,
    block_q=block_q,
    block_k=block_k,
    hardware=hardware,
  )
  pad_q = functools.partial(_pad, multiple=block_q)
  pad_k = functools.partial(_pad, multiple=block_k)
  segments = None
  if segment_ids is not None:
    # Padded queries see nothing, not even padded key tokens.
    segments = Segments(
      query=pad_q(segment_ids, axis=1, value=-1),
      key_token=pad_k(segment_ids, axis=1, value=-2),
    )
  scale = None
  words = None
  if noise is not None:
    scale = pad_k(noise.scale, axis=2)
    words = (noise.row, None)
    if not hardware:
      words = (pad_q(noise.row, axis=2), pad_k(noise.column, axis=2))
  out = _flash(
    (backend, spec, partition.ambient_mesh()),
    pad_q(jnp.swapaxes(q, 1, 2), axis=2),
    pad_k(jnp.swapaxes(k, 1, 2), axis=2),
    pad_k(jnp.swapaxes(v, 1, 2), axis=2),
    scale,
    words,
    segments,
  )
  return jnp.swapaxes(out[:, :, :num_queries], 1, 2)


def _check_hardware(backend: Backend, *, block_q: int, block_k: int) -> None:
  """Raises unless the backend can draw by hardware in blocks of this size."""
  if not backend.has_generator:
    checks.fail(
      "the TPU's kernels where the hardware draws the noise",
      "Use NoiseGenerator.PORTABLE, which is the same on every device.",
      block_q=block_q,
      block_k=block_k,
    )
  tile = counter_noise.HARDWARE_TILE
  if block_q % tile or block_k % tile:
    checks.fail(
      f"blocks that are multiples of {tile} where the hardware draws",
      block_q=block_q,
      block_k=block_k,
    )


def _pad(x: Array, *, multiple: int, axis: int, value: int = 0) -> Array:
  """Lengthens one axis to a multiple."""
  extra = -x.shape[axis] % multiple
  if not extra:
    return x
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, extra)
  return jnp.pad(x, widths, constant_values=value)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(static, q, k, v, scale, words, segments):
  """Attention of padded arrays [B, N, T, H]."""
  return _flash_forward(static, q, k, v, scale, words, segments)[0]


def _noise(scale, words) -> Noise | None:
  if scale is None:
    return None
  return Noise(row=words[0], column=words[1], scale=scale)


# What the first axes of q, k, v, noise and segments count.
_LEADING = (
  partition.Leading.QUERY_HEADS,
  partition.Leading.KEY_HEADS,
  partition.Leading.KEY_HEADS,
  partition.Leading.QUERY_HEADS,
  partition.Leading.EXAMPLES,
)


def _flash_forward(static, q, k, v, scale, words, segments):
  backend, spec, mesh = static
  out, lse, inverse_total = partition.call(
    functools.partial(_forward, backend, spec),
    (q, k, v, _noise(scale, words), segments),
    leading=_LEADING,
    out_leading=(partition.Leading.QUERY_HEADS,) * 3,
    mesh=mesh,
  )
  return out, (q, k, v, scale, words, segments, out, lse, inverse_total)


def _forward(backend, spec, q, k, v, noise, segments):
  """Output, log-sum-exp and, under WEIGHTS, 1 / Z."""
  if spec.mode is not NoiseMode.WEIGHTS:
    return *backend.forward(spec, q, k, v, noise, segments), None
  clean = dataclasses.replace(spec, mode=None)
  out, lse = backend.forward(clean, q, k, v, None, segments)
  noisy, total = backend.forward_weights(spec, q, k, v, lse, noise, segments)
  kept = total > 0
  out = jnp.where(kept[..., None], noisy, out)
  return out, lse, jnp.where(kept, 1 / jnp.where(kept, total, 1), 0)


def _flash_backward(static, residuals, d_out):
  backend, spec, mesh = static
  q, k, v, scale, words, segments, out, lse, inverse_total = residuals
  noise = _noise(scale, words)
  wide = lse.dtype
  stats = RowStats(
    lse=lse,
    delta=jnp.sum(out.astype(wide) * d_out.astype(wide), axis=-1),
    inverse_total=inverse_total,
  )
  of_queries, of_keys = _LEADING[:2]
  dq, stats, dk, dv = partition.call(
    functools.partial(_backward, backend, spec),
    (q, k, v, noise, segments, d_out, stats),
    leading=(*_LEADING, of_queries, of_queries),
    out_leading=(of_queries, of_queries, of_keys, of_keys),
    mesh=mesh,
  )
  d_scale = None
  if scale is not None:
    # A pass of its own: where nobody learns the scale it is never run.
    (d_scale,) = partition.call(
      functools.partial(_backward_scale, backend, spec),
      (q, k, v, noise, segments, d_out, stats),
      leading=(*_LEADING, of_queries, of_queries),
      out_leading=(of_queries,),
      mesh=mesh,
    )
  return dq, dk, dv, d_scale, None, None


def _backward(backend, spec, q, k, v, noise, segments, d_out, stats):
  """Gradients of q, k and v; and the statistics, now with P.G."""
  dq, inner = backend.backward_q(spec, q, k, v, d_out, stats, noise, segments)
  stats = dataclasses.replace(stats, inner=inner)
  dk, dv = backend.backward_kv(spec, q, k, v, d_out, stats, noise, segments)
  return dq, stats, dk, dv


def _backward_scale(backend, spec, q, k, v, noise, segments, d_out, stats):
  return (backend.backward_scale(spec, q, k, v, d_out, stats, noise, segments),)


_flash.defvjp(_flash_forward, _flash_backward)


# The inside of a block. Rows are queries and columns are key tokens, or the
# other way round (`transposed`): what belongs to rows then has shape [1, q] and
# what belongs to columns [k, 1], and everything broadcasts.


def as_rows(tree: Any) -> Any:
  """Gives each leaf [..., n] the axis that makes it a row [..., 1, n]."""
  return jax.tree.map(lambda leaf: leaf[..., None, :], tree)


def wide_dtype(dtype: Any) -> Any:
  """What is accumulated in: float32, or float64 for float64 inputs."""
  return jnp.promote_types(dtype, jnp.float32)


def matmul(
  a: Array, b: Array, *, contract: tuple[int, int], precise: bool = True
) -> Array:
  """Product of two blocks over one axis of each, in the wide dtype."""
  full = precise and a.dtype != jnp.bfloat16
  return jax.lax.dot_general(
    a,
    b,
    (((contract[0],), (contract[1],)), ((), ())),
    precision=jax.lax.Precision.HIGHEST if full else None,
    preferred_element_type=wide_dtype(a.dtype),
  )


def floor_div(numerator: Any, denominator: int) -> Any:
  """Of an index that is not negative; one that is counts as 0."""
  # As int32, whatever a Python integer stands for under x64.
  return jax.lax.div(
    jnp.maximum(numerator, 0).astype(jnp.int32), np.int32(denominator)
  )


def is_visible(spec: Spec, i: Any, j: Any) -> Any:
  """Whether block (i, j) has a pair that may attend, segments aside."""
  if not spec.causal:
    return j * spec.block_k < spec.num_keys
  last_query = (i + 1) * spec.block_q - 1 + spec.offset
  return j * spec.block_k <= last_query


def is_whole(spec: Spec, i: Any, j: Any) -> Any:
  """Whether every pair of block (i, j) may attend, segments aside."""
  last_key = (j + 1) * spec.block_k - 1
  whole = last_key < spec.num_keys
  if spec.causal:
    whole &= last_key <= i * spec.block_q + spec.offset
  return whole


def mask(
  spec: Spec, i: Any, j: Any, *, segments: Segments | None, transposed: bool
) -> Array:
  """True where a pair of block (i, j) may attend."""
  shape = (spec.block_q, spec.block_k)
  q_axis, k_axis = 0, 1
  if transposed:
    shape, q_axis, k_axis = shape[::-1], 1, 0
  key_token = j * spec.block_k + jax.lax.broadcasted_iota(
    jnp.int32, shape, k_axis
  )
  allowed = key_token < spec.num_keys
  if spec.causal:
    query = i * spec.block_q + jax.lax.broadcasted_iota(
      jnp.int32, shape, q_axis
    )
    allowed &= key_token <= query + spec.offset
  if segments is not None:
    allowed &= segments.query == segments.key_token
  return allowed


def scores(
  spec: Spec,
  q: Array,
  k: Array,
  *,
  noise: Noise | None,
  allowed: Array | None,
  transposed: bool,
  head_dim: int | None = None,
  drawn: Array | None = None,
) -> tuple[Array, Array | None]:
  """Scores of a block in units of log 2, and its raw noise.

  `head_dim` is H where q and k are padded; `drawn` is the block's raw noise
  where it does not come from words.
  """
  left, right = (k, q) if transposed else (q, k)
  scale = (head_dim or q.shape[-1]) ** -0.5 * _LOG2E
  s = matmul(left, right, contract=(1, 1)) * scale
  draw = None
  if noise is not None:
    draw = drawn
    if draw is None:
      draw = counter_noise.raw(noise.row, noise.column)
    if spec.mode is NoiseMode.SCORES:
      s = s + draw * (noise.scale * _LOG2E)
  if allowed is not None:
    s = jnp.where(allowed, s, MASKED)
  return s, draw


def cut_weights(
  p: Array, draw: Array, scale: Array, *, allowed: Array | None
) -> Array:
  """(P + scale N)_+, 0 where a pair may not attend."""
  noisy = jnp.maximum(p + draw * scale, 0)
  return noisy if allowed is None else jnp.where(allowed, noisy, 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockGrads:
  """What a block adds to the gradients, in float32.

  Attributes:
    p: softmax of the scores.
    weights: what multiplies the values.
    grad: dS under SCORES; G under WEIGHTS, whose dS is P (G - P.G).
  """

  p: Array
  weights: Array
  grad: Array


def block_grads(
  spec: Spec,
  s: Array,
  draw: Array | None,
  dp: Array,
  *,
  stats: RowStats,
  noise: Noise | None,
  allowed: Array | None,
) -> BlockGrads:
  """The formulas at the top of this file, for one block."""
  p = jnp.exp2(s - stats.lse)
  grad = dp - stats.delta
  if spec.mode is not NoiseMode.WEIGHTS:
    return BlockGrads(p=p, weights=p, grad=p * grad)
  assert draw is not None, "WEIGHTS is a mode of noise."
  assert noise is not None, "WEIGHTS is a mode of noise."
  cut = cut_weights(p, draw, noise.scale, allowed=allowed)
  kept_clean = stats.inverse_total == 0
  weights = jnp.where(kept_clean, p, cut * stats.inverse_total)
  grad = grad * jnp.where(
    kept_clean, 1, jnp.where(cut > 0, stats.inverse_total, 0)
  )
  return BlockGrads(p=p, weights=weights, grad=grad)


def score_grad(spec: Spec, grads: BlockGrads, stats: RowStats) -> Array:
  """dS of a block; under WEIGHTS the row's P.G must be known."""
  if spec.mode is not NoiseMode.WEIGHTS:
    return grads.grad
  return grads.p * (grads.grad - stats.inner)


def scale_grad(
  spec: Spec, grads: BlockGrads, draw: Array, stats: RowStats
) -> Array:
  """d scale of each pair of a block."""
  grad = grads.grad * draw
  if spec.mode is NoiseMode.WEIGHTS:
    grad = jnp.where(stats.inverse_total == 0, 0, grad)
  return grad
