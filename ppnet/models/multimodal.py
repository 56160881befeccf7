"""PPNet: a Llama that reads pictures and sounds among its tokens.

Each modality has a stem that turns it into embeddings; a placeholder token
stands for each of them in the token stream, and the embeddings take the
placeholders' places. Adding a modality is one stem and one `merge_span` call.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ppnet import config as config_lib
from ppnet.core import param_ops
from ppnet.kernels import noisy_attention
from ppnet.models import audio as audio_lib
from ppnet.models import llama, vision


def merge_span(
  embeddings: Float[Array, "B T D"],
  tokens: Int[Array, "B T"],
  *,
  placeholder: int,
  span: Float[Array, "B P D"],
) -> Float[Array, "B T D"]:
  """Puts the n-th embedding of `span` where the n-th placeholder stands.

  Placeholders beyond P take the last embedding; the pipeline never makes any.
  """
  here = tokens == placeholder
  order = jnp.clip(jnp.cumsum(here, axis=1) - 1, 0, span.shape[1] - 1)
  placed = jnp.take_along_axis(span, order[:, :, None], axis=1)
  return jnp.where(
    here[:, :, None], placed.astype(embeddings.dtype), embeddings
  )


class PPNet(nn.Module):
  """Stems, projectors and decoder.

  Attributes:
    config: shapes of all parts; a stem that is None is left out.
    image_id: placeholder token of pictures.
    audio_id: placeholder token of sounds.
    ops: implementation of the parametrised operations.
  """

  config: config_lib.ModelConfig
  image_id: int
  audio_id: int
  ops: param_ops.ParamOps = param_ops.PLAIN

  def setup(self):
    """Declares the parts that the configuration asks for."""
    decoder = self.config.decoder
    self.decoder = llama.Llama(decoder, self.ops)
    if self.config.image is not None:
      self.image_stem = vision.ImageStem(
        self.config.image, decoder.embed_dim, self.ops
      )
    if self.config.audio is not None:
      self.audio_stem = audio_lib.AudioStem(
        self.config.audio, decoder.embed_dim, self.ops
      )

  def __call__(
    self,
    tokens: Int[Array, "B T"],
    *,
    image: Float[Array, "B H W C"] | None = None,
    audio: Float[Array, "B F M"] | None = None,
    noise: noisy_attention.AttentionNoise | None = None,
  ) -> Float[Array, "B T V"]:
    """Logits of the next token at every position, float32.

    Args:
      tokens: ids with a placeholder for each embedding of each modality.
      image: normalised pictures, or None.
      audio: normalised frames, or None.
      noise: attention noise, or None.
    """
    embeddings = self.decoder.embed(tokens)
    dtype = embeddings.dtype
    if image is not None:
      embeddings = merge_span(
        embeddings,
        tokens,
        placeholder=self.image_id,
        span=self.image_stem(image.astype(dtype)),
      )
    if audio is not None:
      embeddings = merge_span(
        embeddings,
        tokens,
        placeholder=self.audio_id,
        span=self.audio_stem(audio.astype(dtype)),
      )
    return self.decoder(tokens, embeddings=embeddings, noise=noise)
