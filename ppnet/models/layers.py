"""Layers that own parameters. All of them multiply through `param_ops` only."""

from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ppnet.core import param_ops


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

  Attributes:
    features: O, size of the output.
    axes: logical axes of the kernel [I, O].
    ops: implementation of the parametrised operations.
    init_scale: variance of the initial kernel times the input size.
  """

  features: int
  axes: tuple[str | None, str | None]
  ops: param_ops.ParamOps
  init_scale: float = 1.0

  @nn.compact
  def __call__(self, x: Float[Array, "*b I"]) -> Float[Array, "*b O"]:
    """Multiplies the last axis."""
    kernel = _param(
      self,
      "kernel",
      nn.initializers.variance_scaling(self.init_scale, "fan_in", "normal"),
      shape=(x.shape[-1], self.features),
      axes=self.axes,
    )
    return self.ops.dense(_path(self, "kernel"), kernel.astype(x.dtype), x)


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
    return self.ops.scale(_path(self, "scale"), scale.astype(x.dtype), normed)


class Embed(nn.Module):
  """A table of token embeddings, also usable as the output head."""

  vocab_size: int
  features: int
  ops: param_ops.ParamOps

  def setup(self):
    """Declares the table [V, D]."""
    self.table = _param(
      self,
      "table",
      nn.initializers.normal(stddev=1.0),
      shape=(self.vocab_size, self.features),
      axes=("vocab", "embed"),
    )

  def __call__(
    self, tokens: Int[Array, "*b"], *, dtype: jnp.dtype
  ) -> Float[Array, "*b D"]:
    """Rows of the table."""
    return self.ops.embed(
      _path(self, "table"), self.table.astype(dtype), tokens
    )

  def attend(self, x: Float[Array, "*b D"]) -> Float[Array, "*b V"]:
    """Logits with tied weights: x @ table.T."""
    return self.ops.dense(_path(self, "table"), self.table.T.astype(x.dtype), x)


class Conv(nn.Module):
  """3x3 convolution with SAME padding and a bias."""

  features: int
  stride: int
  ops: param_ops.ParamOps

  @nn.compact
  def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 O"]:
    """Convolves the two middle axes."""
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
      _path(self, "kernel"), kernel.astype(x.dtype), x, self.stride
    )
    return self.ops.bias(_path(self, "bias"), bias.astype(x.dtype), out)


def rotary_embedding(
  x: Float[Array, "B T N H"],
  positions: Int[Array, "#B T"],
  *,
  theta: float,
) -> Float[Array, "B T N H"]:
  """Turns feature pairs (i, i + H/2) by position * theta**(-2i/H).

  Su et al. 2021, eq. 15, https://arxiv.org/abs/2104.09864, in the half-split
  layout of the published Llama weights. Angles are float32: bfloat16 rounds
  position 257 to 256, and their sines differ by far more than an ulp.
  """
  half = x.shape[-1] // 2
  frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle = positions.astype(jnp.float32)[..., None] * frequency.reshape(1, 1, -1)
  sin, cos = jnp.sin(angle)[:, :, None], jnp.cos(angle)[:, :, None]
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate(
    (first * cos - second * sin, second * cos + first * sin), axis=-1
  ).astype(x.dtype)
