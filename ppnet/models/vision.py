"""The image stem: a small CNN whose output pixels become tokens."""

import flax.linen as nn
from jaxtyping import Array, Float

from ppnet import config as config_lib
from ppnet.core import param_ops
from ppnet.models import layers


class ImageStem(nn.Module):
  """Pictures to decoder embeddings.

  No batch normalisation anywhere: it couples the examples of a batch, and then
  no per-example gradient exists.

  Attributes:
    config: channels and strides.
    embed_dim: D of the decoder.
    ops: implementation of the parametrised operations.
  """

  config: config_lib.ImageStemConfig
  embed_dim: int
  ops: param_ops.ParamOps = param_ops.PLAIN

  @nn.compact
  def __call__(self, images: Float[Array, "B H W C"]) -> Float[Array, "B P D"]:
    """One embedding per pixel of the last feature map, row by row."""
    x = images
    for layer, (channels, stride) in enumerate(
      zip(self.config.channels, self.config.strides, strict=True)
    ):
      x = layers.Conv(channels, stride, self.ops, name=f"conv_{layer}")(x)
      x = nn.silu(x)
    x = x.reshape(x.shape[0], -1, x.shape[-1])  # [B, P, C]
    return layers.Dense(
      self.embed_dim, ("stem", "embed"), self.ops, name="projector"
    )(x)
