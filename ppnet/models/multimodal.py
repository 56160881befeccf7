"""PPNet: a Llama that reads pictures and sounds among its tokens.

Each modality has a stem that turns a picture or a sound into embeddings. In the
token stream a placeholder stands for each embedding, wherever the picture or
the sound is to be read, and the embeddings take the placeholders' places:

    tokens       <s>  IMG  IMG  a  b  IMG  IMG  c
    embeddings   <s>  p1   p2   a  b  p3   p4   c

with p1 p2 of a record's first picture and p3 p4 of its second.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from ppnet import config as config_lib
from ppnet.core import checks, param_ops
from ppnet.kernels import noisy_attention
from ppnet.models import audio as audio_lib
from ppnet.models import llama, private_cut, vision


def merge_span(
  embeddings: Float[Array, "B T D"],
  tokens: Int[Array, "B T"],
  *,
  placeholder: int,
  span: Float[Array, "B P D"],
  is_kept: Bool[Array, " B"] | None = None,
) -> Float[Array, "B T D"]:
  """Puts the n-th embedding of `span` where the n-th placeholder stands.

  | edge case | result |
  | --- | --- |
  | fewer placeholders than P | the last embeddings go nowhere |
  | more of them | those beyond P take the last embedding |
  | an example that is not kept | its placeholders keep their own embedding |

  Args:
    embeddings: of the tokens.
    tokens: ids.
    placeholder: the modality's token.
    span: what takes the placeholders' places, in order.
    is_kept: examples whose placeholders are replaced; None is all.
  """
  here = tokens == placeholder
  order = jnp.clip(jnp.cumsum(here, axis=1) - 1, 0, span.shape[1] - 1)
  placed = jnp.take_along_axis(span, order[:, :, None], axis=1)
  if is_kept is not None:
    here = here & is_kept[:, None]
  return jnp.where(
    here[:, :, None], placed.astype(embeddings.dtype), embeddings
  )


# A new modality needs an entry here and in `_NUM_AXES`.
_STEMS = {"image": vision.image_stem, "audio": audio_lib.AudioStem}
# Of one picture [H, W, C], of one sound's features [F, M].
_NUM_AXES = {"image": 3, "audio": 2}


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
    dropout_keys: Key[Array, " B"] | None = None,
    positions: Int[Array, "#B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
  ) -> Float[Array, "B T V"]:
    """Logits of the next token at every position, float32.

    Args:
      tokens: ids with a placeholder for each embedding of each modality.
      media: see `embed`.
      noise: attention noise, or None.
      cut_keys: one secret key per example, where there is a private cut.
      dropout_keys: one key per example, for `config.modality_dropout`; None
        drops nothing, as outside of training.
      positions: as for `llama.Llama`.
      segment_ids: as for `llama.Llama`.
    """
    return self.decoder(
      tokens,
      embeddings=self.embed(tokens, media, dropout_keys=dropout_keys),
      noise=noise,
      cut_keys=cut_keys,
      positions=positions,
      segment_ids=segment_ids,
    )

  def embed(
    self,
    tokens: Int[Array, "B T"],
    media: Mapping[str, Array],
    *,
    dropout_keys: Key[Array, " B"] | None = None,
  ) -> Float[Array, "B T D"]:
    """Embeddings of tokens, pictures and sounds in the placeholders' places.

    Args:
      tokens: ids with a placeholder for each embedding of each modality.
      media: modality to normalised arrays, one item per example, [B, H, W, C]
        or [B, F, M], or several, [B, N, ...]. Where an example has fewer than
        N, zeros come last: they have no placeholders, so nothing sees them. A
        modality that no example has is left out, and costs nothing.
      dropout_keys: as for `__call__`.

    Raises:
      ValueError: a modality without a stem, or an array with too many axes or
        too few.
    """
    embeddings = self.decoder.embed(tokens)
    for name, values in media.items():
      span = self._span(name, values.astype(embeddings.dtype))
      embeddings = merge_span(
        embeddings,
        tokens,
        placeholder=self.placeholder_ids[name],
        span=span,
        is_kept=self._is_kept(name, dropout_keys),
      )
    return embeddings

  def _span(self, name: str, values: Array) -> Float[Array, "B P D"]:
    """Embeddings of all items of each example, in order."""
    if name not in self.stems:
      checks.fail(
        "a stem for every modality of the media",
        f"Set model.{name}, or leave it out of the media.",
        modality=name,
        stems=sorted(self.stems),
      )
    extra = values.ndim - _NUM_AXES[name]
    if extra not in (1, 2):
      checks.fail(
        f"media[{name!r}] of {_NUM_AXES[name]} axes behind B, or B and N",
        shape=values.shape,
      )
    out = self.stems[name](values)
    return out.reshape(out.shape[0], -1, out.shape[-1])

  def _is_kept(
    self, name: str, dropout_keys: Key[Array, " B"] | None
  ) -> Bool[Array, " B"] | None:
    """Which examples keep a modality; None where all do."""
    rate = self.config.modality_dropout
    if rate == 0 or dropout_keys is None:
      return None
    number = config_lib.MODALITIES.index(name)  # Each modality's own draw.

    def one(key: Any) -> Array:
      return jax.random.bernoulli(jax.random.fold_in(key, number), 1 - rate)

    return jax.vmap(one)(dropout_keys)

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
