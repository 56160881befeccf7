"""Layers that own parameters. All of them multiply through `param_ops` only."""

from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ppnet import config as config_lib
from ppnet.core import checks, param_ops
from ppnet.sharding import layout

# Gaussian, as in Hu et al. 2021, section 4.1; its output has the input's scale.
LORA_A_INIT = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
_GROUP_EPS = 1e-5  # Added to a group's variance.


def _path(module: nn.Module, name: str) -> str:
  """The parameter's path, for engines' error messages."""
  return "/".join((*module.path, name))


def _param(
  module: nn.Module,
  name: str,
  init: nn.initializers.Initializer,
  *,
  shape: tuple[int, ...],
  axes: tuple[str | None, ...],
) -> jax.Array:
  """A float32 parameter that carries its logical axes until it is unboxed."""
  value = module.param(name, nn.with_logical_partitioning(init, axes), shape)
  return cast(jax.Array, value)  # Linen declares the box; apply() unboxes.


class Dense(nn.Module):
  """x @ kernel, without bias, as everywhere in Llama.

  With an adapter: x @ kernel + (alpha / rank) x @ lora_a @ lora_b, where lora_b
  begins at zero (Hu et al. 2021, eq. 3, https://arxiv.org/abs/2106.09685).

  Attributes:
    features: O, size of the output.
    axes: logical axes of the kernel [I, O].
    ops: implementation of the parametrised operations.
    init_scale: variance of the initial kernel times the input size.
    lora: shape of the adapter, or None.
    kernel_init: draws the initial kernel in place of `init_scale`; None does
      not.
  """

  features: int
  axes: tuple[str | None, str | None]
  ops: param_ops.ParamOps
  init_scale: float = 1.0
  lora: config_lib.LoraConfig | None = None
  kernel_init: nn.initializers.Initializer | None = None

  @property
  def out_axis(self) -> str | None:
    """Logical axis of the outputs; residual streams are whole."""
    return None if self.axes[1] == "embed" else self.axes[1]

  @nn.compact
  def __call__(self, x: Float[Array, "*b I"]) -> Float[Array, "*b O"]:
    """Multiplies the last axis."""
    kernel = _param(
      self,
      "kernel",
      self.kernel_init
      or nn.initializers.variance_scaling(self.init_scale, "fan_in", "normal"),
      shape=(x.shape[-1], self.features),
      axes=self.axes,
    )
    out = self.ops.dense(
      _path(self, "kernel"), layout.weight(kernel.astype(x.dtype), self.axes), x
    )
    out = layout.activation(out, self.out_axis)
    if self.lora is None:
      return out
    rank = self.lora.rank
    lora_a = _param(
      self,
      "lora_a",
      LORA_A_INIT,
      shape=(x.shape[-1], rank),
      axes=(self.axes[0], None),
    )
    lora_b = _param(
      self,
      "lora_b",
      nn.initializers.zeros,
      shape=(rank, self.features),
      axes=(None, self.axes[1]),
    )
    low = self.ops.dense(_path(self, "lora_a"), lora_a.astype(x.dtype), x)
    low = low * (self.lora.alpha / rank)  # Where it is smallest.
    return out + self.ops.dense(
      _path(self, "lora_b"), lora_b.astype(x.dtype), low
    )


class RMSNorm(nn.Module):
  """x / rms(x) * scale, computed in float32.

  Zhang and Sennrich 2019, eq. 4, https://arxiv.org/abs/1910.07467.
  """

  eps: float
  ops: param_ops.ParamOps
  axes: tuple[str | None] = ("embed",)

  @nn.compact
  def __call__(self, x: Float[Array, "*b D"]) -> Float[Array, "*b D"]:
    """Normalises the last axis; the dtype stays."""
    scale = _param(
      self,
      "scale",
      nn.initializers.ones,
      shape=(x.shape[-1],),
      axes=self.axes,
    )
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(
      jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps
    )
    normed = (wide * inverse).astype(x.dtype)
    return self.ops.scale(
      _path(self, "scale"),
      layout.weight(scale.astype(x.dtype), self.axes),
      normed,
    )


class Embed(nn.Module):
  """A table of token embeddings, also usable as the output head.

  Attributes:
    vocab_size: V, rows.
    features: D.
    ops: implementation of the parametrised operations.
    table_init: draws the initial table; None: standard normal.
  """

  vocab_size: int
  features: int
  ops: param_ops.ParamOps
  table_init: nn.initializers.Initializer | None = None

  def setup(self):
    """Declares the table [V, D]."""
    self.table = _param(
      self,
      "table",
      self.table_init or nn.initializers.normal(stddev=1.0),
      shape=(self.vocab_size, self.features),
      axes=("vocab", "embed"),
    )

  def __call__(
    self, tokens: Int[Array, "*b"], *, dtype: jnp.dtype
  ) -> Float[Array, "*b D"]:
    """Rows of the table."""
    table = layout.weight(self.table.astype(dtype), ("vocab", "embed"))
    rows = self.ops.embed(_path(self, "table"), table, tokens)
    return layout.activation(rows)

  def attend(self, x: Float[Array, "*b D"]) -> Float[Array, "*b V"]:
    """Logits with tied weights: x @ table.T."""
    return self.ops.dense(_path(self, "table"), self.table.T.astype(x.dtype), x)


class Positions(nn.Module):
  """x + table: a learned vector for each place of a fixed number of them.

  A bias of all places at once, so that its gradient, and each example's, is a
  vector and needs no sum over outer products.
  """

  ops: param_ops.ParamOps

  @nn.compact
  def __call__(self, x: Float[Array, "*b P D"]) -> Float[Array, "*b P D"]:
    """Adds the table [P, D]."""
    table = _param(
      self,
      "table",
      nn.initializers.normal(stddev=0.02),
      shape=x.shape[-2:],
      axes=(None, "embed"),
    )
    flat = x.reshape(*x.shape[:-2], -1)
    out = self.ops.bias(
      _path(self, "table"), table.astype(x.dtype).reshape(-1), flat
    )
    return out.reshape(x.shape)


class Conv(nn.Module):
  """3x3 convolution with SAME padding and a bias.

  Attributes:
    features: O, size of the output.
    stride: of the places that it is computed at.
    ops: implementation of the parametrised operations.
    is_standardised: whether the kernel is standardised first, see
      `param_ops.standardised`; the parameter is the same.
  """

  features: int
  stride: int
  ops: param_ops.ParamOps
  is_standardised: bool = False

  @nn.compact
  def __call__(self, x: Float[Array, "*b H W C"]) -> Float[Array, "*b H2 W2 O"]:
    """Convolves height and width."""
    kernel = _param(
      self,
      "kernel",
      nn.initializers.variance_scaling(2.0, "fan_in", "normal"),
      shape=(3, 3, x.shape[-1], self.features),
      axes=(None, None, "stem", "stem_out"),
    )
    bias = _param(
      self,
      "bias",
      nn.initializers.zeros,
      shape=(self.features,),
      axes=("stem_out",),
    )
    out = self.ops.conv(
      _path(self, "kernel"),
      kernel.astype(x.dtype),
      x,
      self.stride,
      is_standardised=self.is_standardised,
    )
    return self.ops.bias(_path(self, "bias"), bias.astype(x.dtype), out)


def group_norm(
  x: Float[Array, "*b H W C"], *, num_groups: int
) -> Float[Array, "*b H W C"]:
  """Gives each group of feature maps mean 0 and variance 1, without weights.

  Wu and He 2018, eq. 7 (https://arxiv.org/abs/1803.08494), over the places and
  the maps of a group of one picture: examples stay apart. In float32; the dtype
  stays.

  | edge case | result |
  | --- | --- |
  | a constant group | zeros |
  | `num_groups` 0 | x |

  Raises:
    ValueError: the groups do not share the maps evenly.
  """
  if num_groups == 0:
    return x
  *_, height, width, channels = x.shape
  if channels % num_groups:
    checks.fail(
      "num_groups to divide the feature maps",
      num_groups=num_groups,
      maps=channels,
    )
  groups = x.astype(jnp.float32).reshape(
    *x.shape[:-1], num_groups, channels // num_groups
  )
  axes = (-4, -3, -1)  # Height, width, maps of a group.
  mean = groups.mean(axis=axes, keepdims=True)
  variance = jnp.square(groups - mean).mean(axis=axes, keepdims=True)
  normed = (groups - mean) * jax.lax.rsqrt(variance + _GROUP_EPS)
  return normed.reshape(x.shape).astype(x.dtype)


def rotary_frequencies(
  head_dim: int,
  *,
  theta: float,
  scaling: config_lib.RopeScalingConfig | None = None,
) -> np.ndarray:
  """Angle per position of each feature pair, theta**(-2i/H), f32[H/2].

  Su et al. 2021, eq. 15, https://arxiv.org/abs/2104.09864; `scaling` as in
  `RopeScalingConfig`. Constants, so NumPy computes them, in float64: at
  position p an error of a frequency counts p times.

  >>> rotary_frequencies(4, theta=100.0)
  array([1. , 0.1], dtype=float32)
  """
  frequency = theta ** (-np.arange(head_dim // 2) * 2 / head_dim)
  if scaling is not None:
    turns = scaling.original_max_seq_len * frequency / (2 * np.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0, 1)
    frequency = frequency * (kept + (1 - kept) / scaling.factor)
  return frequency.astype(np.float32)


def rotary_embedding(
  x: Float[Array, "B T N H"],
  positions: Int[Array, "#B T"],
  *,
  theta: float,
  scaling: config_lib.RopeScalingConfig | None = None,
) -> Float[Array, "B T N H"]:
  """Turns feature pairs (i, i + H/2) by position times their frequency.

  Su et al. 2021, eq. 34, https://arxiv.org/abs/2104.09864, in the half-split
  layout of the published Llama weights. Angles are float32: bfloat16 rounds
  position 257 to 256, and their sines differ by far more than an ulp.
  """
  frequency = rotary_frequencies(x.shape[-1], theta=theta, scaling=scaling)
  angle = positions.astype(jnp.float32)[..., None] * frequency.reshape(1, 1, -1)
  sin, cos = jnp.sin(angle)[:, :, None], jnp.cos(angle)[:, :, None]
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate(
    (first * cos - second * sin, second * cos + first * sin), axis=-1
  ).astype(x.dtype)
