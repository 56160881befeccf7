"""PPNet: a Llama that reads pictures and sounds among its tokens.

Each modality has a stem that turns it into embeddings; a placeholder token
stands for each of them in the token stream, and the embeddings take the
placeholders' places.
"""

from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from ppnet import config as config_lib
from ppnet.core import param_ops
from ppnet.kernels import noisy_attention
from ppnet.models import audio as audio_lib
from ppnet.models import llama, private_cut, vision


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


# A new modality needs an entry here.
_STEMS = {"image": vision.ImageStem, "audio": audio_lib.AudioStem}


class PPNet(nn.Module):
  """Stems, projectors and decoder.

  Attributes:
    config: shapes of all parts; a stem that is None is left out.
    placeholder_ids: modality to the token whose places its embeddings take.
    ops: implementation of the parametrised operations.
    cut: where the decoder's hidden state is made private, or None.
  """

  config: config_lib.ModelConfig
  placeholder_ids: Mapping[str, int]
  ops: param_ops.ParamOps = param_ops.PLAIN
  cut: private_cut.PrivateCut | None = None

  def setup(self):
    """Declares the parts that the configuration asks for."""
    decoder = self.config.decoder
    self.decoder = llama.Llama(decoder, self.ops, self.cut)
    self.stems = {
      name: stem(getattr(self.config, name), decoder.embed_dim, self.ops)
      for name, stem in _STEMS.items()
      if getattr(self.config, name) is not None
    }

  def __call__(
    self,
    tokens: Int[Array, "B T"],
    *,
    media: Mapping[str, Array],
    noise: noisy_attention.AttentionNoise | None = None,
    cut_keys: Key[Array, " B"] | None = None,
    positions: Int[Array, "#B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
  ) -> Float[Array, "B T V"]:
    """Logits of the next token at every position, float32.

    Args:
      tokens: ids with a placeholder for each embedding of each modality.
      media: modality to its normalised arrays f32[B, ...]; one that the record
        lacks is left out, and costs nothing.
      noise: attention noise, or None.
      cut_keys: one secret key per example, where there is a private cut.
      positions: as for `llama.Llama`.
      segment_ids: as for `llama.Llama`.
    """
    return self.decoder(
      tokens,
      embeddings=self.embed(tokens, media),
      noise=noise,
      cut_keys=cut_keys,
      positions=positions,
      segment_ids=segment_ids,
    )

  def embed(
    self, tokens: Int[Array, "B T"], media: Mapping[str, Array]
  ) -> Float[Array, "B T D"]:
    """Embeddings of tokens, pictures and sounds in the placeholders' places."""
    embeddings = self.decoder.embed(tokens)
    for name, values in media.items():
      embeddings = merge_span(
        embeddings,
        tokens,
        placeholder=self.placeholder_ids[name],
        span=self.stems[name](values.astype(embeddings.dtype)),
      )
    return embeddings

  def extend(
    self,
    embeddings: Float[Array, "B T D"],
    *,
    positions: Int[Array, "#B T"],
    cache: llama.KVCache,
  ) -> tuple[Float[Array, "B T D"], llama.KVCache]:
    """See `llama.Llama.extend`."""
    return self.decoder.extend(embeddings, positions=positions, cache=cache)

  def embed_tokens(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Embeddings of tokens that are no placeholders."""
    return self.decoder.embed(tokens)

  def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    """See `llama.Llama.logits`."""
    return self.decoder.logits(x)
