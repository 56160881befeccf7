"""Image stems: a small CNN, or a patch transformer. Pictures become tokens.

No batch normalisation anywhere: it couples the examples of a batch, and then no
per-example gradient exists.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ppnet import config as config_lib
from ppnet.core import param_ops
from ppnet.kernels import noisy_attention
from ppnet.models import layers


def image_stem(
  config: config_lib.ImageStemConfig,
  embed_dim: int,
  ops: param_ops.ParamOps = param_ops.PLAIN,
) -> nn.Module:
  """The stem that a configuration describes; see `ConvStem`, `PatchStem`."""
  if config.patches is not None:
    return PatchStem(config.patches, embed_dim, ops)
  return ConvStem(config, embed_dim, ops)


class ConvStem(nn.Module):
  """Pictures to decoder embeddings, by convolutions.

  Attributes:
    config: channels, strides, and what stands between convolutions.
    embed_dim: D of the decoder.
    ops: implementation of the parametrised operations.
  """

  config: config_lib.ImageStemConfig
  embed_dim: int
  ops: param_ops.ParamOps = param_ops.PLAIN

  @nn.compact
  def __call__(
    self, images: Float[Array, "*b H W C"]
  ) -> Float[Array, "*b P D"]:
    """One embedding per pixel of the last feature map, row by row."""
    cfg = self.config
    activation = _activation(cfg)
    x = images
    for layer, (channels, stride) in enumerate(
      zip(cfg.channels, cfg.strides, strict=True)
    ):
      x = layers.Conv(
        channels,
        stride,
        self.ops,
        is_standardised=cfg.weight_standardisation,
        name=f"conv_{layer}",
      )(x)
      x = activation(layers.group_norm(x, num_groups=cfg.num_groups))
    x = x.reshape(*x.shape[:-3], -1, x.shape[-1])  # [*b, P, C]
    return layers.Dense(
      self.embed_dim, ("stem", "embed"), self.ops, name="projector"
    )(x)


def _activation(
  config: config_lib.ImageStemConfig,
) -> Callable[[jax.Array], jax.Array]:
  """What follows each convolution."""
  match config.activation:
    case config_lib.Activation.SILU:
      return nn.silu
    case config_lib.Activation.TANH:
      return jnp.tanh
    case config_lib.Activation.TEMPERED_SIGMOID:
      shape = config.tempered_sigmoid
      return lambda x: (
        shape.scale * nn.sigmoid(shape.temperature * x) - shape.offset
      )


class PatchStem(nn.Module):
  """Pictures to decoder embeddings, by a transformer over patches.

  Attributes:
    config: its shape.
    embed_dim: D of the decoder.
    ops: implementation of the parametrised operations.
  """

  config: config_lib.PatchStemConfig
  embed_dim: int
  ops: param_ops.ParamOps = param_ops.PLAIN

  @nn.compact
  def __call__(
    self, images: Float[Array, "*b H W C"]
  ) -> Float[Array, "*b P D"]:
    """One embedding per patch, row by row.

    Height and width must be multiples of `config.patch_size`.
    """
    cfg = self.config
    x = layers.Dense(
      cfg.embed_dim, ("stem", "embed"), self.ops, name="patch_embed"
    )(_patches(images, cfg.patch_size))
    x = layers.Positions(self.ops, name="positions")(x)
    layer = _PatchLayer
    if cfg.remat:
      # Inside scan the loop already prevents merging across the boundary.
      layer = nn.remat(layer, prevent_cse=False)
    x, _ = nn.scan(
      layer,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=cfg.num_layers,
      metadata_params={nn.PARTITION_NAME: "layers"},
    )(cfg, self.ops, name="layers")(x, None)
    x = layers.RMSNorm(cfg.rms_norm_eps, self.ops, name="final_norm")(x)
    return layers.Dense(
      self.embed_dim, ("embed", "stem_out"), self.ops, name="projector"
    )(x)


class _PatchLayer(nn.Module):
  """One block, in the (carry, per-layer input) form that `nn.scan` wants.

  Dosovitskiy et al. 2020, eq. 2 and 3, https://arxiv.org/abs/2010.11929.
  """

  config: config_lib.PatchStemConfig
  ops: param_ops.ParamOps

  @nn.compact
  def __call__(
    self, x: Float[Array, "*b P D"], _: None
  ) -> tuple[Float[Array, "*b P D"], None]:
    """Adds attention and feed-forward to the residual stream."""
    cfg = self.config

    def dense(name, features, axes):
      return layers.Dense(features, axes, self.ops, name=name)

    def norm(name):
      return layers.RMSNorm(cfg.rms_norm_eps, self.ops, name=name)

    h = norm("attention_norm")(x)
    q, k, v = (
      dense(name, cfg.embed_dim, ("embed", "q_heads"))(h)
      for name in ("q_proj", "k_proj", "v_proj")
    )
    attended = _attend(q, k, v, num_heads=cfg.num_heads)
    x = x + dense("o_proj", cfg.embed_dim, ("q_heads", "embed"))(attended)
    h = dense("up_proj", cfg.mlp_dim, ("embed", "mlp"))(norm("mlp_norm")(x))
    x = x + dense("down_proj", cfg.embed_dim, ("mlp", "embed"))(nn.gelu(h))
    return x, None


def _attend(
  q: Float[Array, "*b P D"],
  k: Float[Array, "*b P D"],
  v: Float[Array, "*b P D"],
  *,
  num_heads: int,
) -> Float[Array, "*b P D"]:
  """Every patch attends to every patch of its own picture."""

  def by_picture(x: jax.Array) -> jax.Array:
    return x.reshape(-1, x.shape[-2], num_heads, x.shape[-1] // num_heads)

  out = noisy_attention.noisy_attention(
    by_picture(q),
    by_picture(k),
    by_picture(v),
    noise=None,
    causal=False,
    # Pictures are a few hundred tokens: nothing for a kernel to save.
    implementation=config_lib.AttentionImplementation.REFERENCE,
  )
  return out.reshape(q.shape)


def _patches(
  images: Float[Array, "*b H W C"], size: int
) -> Float[Array, "*b P K"]:
  """Square patches, row by row; K = size * size * C."""
  *leading, height, width, channels = images.shape
  rows, columns = height // size, width // size
  x = images.reshape(*leading, rows, size, columns, size, channels)
  x = x.swapaxes(-4, -3)  # [*b, rows, columns, size, size, C]
  return x.reshape(*leading, rows * columns, size * size * channels)
