"""The audio stem: groups of log-mel or MFCC frames become tokens."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from ppnet import config as config_lib
from ppnet.core import param_ops
from ppnet.models import layers


class AudioStem(nn.Module):
  """Frames to decoder embeddings.

  Consecutive frames are stacked (a strided convolution over time with kernel
  and stride `frames_per_token`) and projected.

  Attributes:
    config: frames per token.
    embed_dim: D of the decoder.
    ops: implementation of the parametrised operations.
  """

  config: config_lib.AudioStemConfig
  embed_dim: int
  ops: param_ops.ParamOps = param_ops.PLAIN

  @nn.compact
  def __call__(self, frames: Float[Array, "*b F M"]) -> Float[Array, "*b A D"]:
    """One embedding per group of frames; the last group is zero-padded."""
    group = self.config.frames_per_token
    *leading, num_frames, num_features = frames.shape
    missing = -num_frames % group
    x = jnp.pad(frames, (*[(0, 0)] * len(leading), (0, missing), (0, 0)))
    x = x.reshape(*leading, -1, group * num_features)  # [*b, A, group * M]
    return layers.Dense(
      self.embed_dim, ("stem", "embed"), self.ops, name="projector"
    )(x)
