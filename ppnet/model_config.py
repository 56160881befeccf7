"""The shapes of networks: decoder, stems, adapters. Part of `ppnet.config`.

Everybody else reads these names there.
"""

import dataclasses
import enum
import math

from ppnet import config_attention
from ppnet.core import checks


class ComputeDtype(enum.Enum):
  """What activations are computed in, whatever dtype parameters have."""

  FLOAT32 = "float32"
  BFLOAT16 = "bfloat16"


@dataclasses.dataclass(slots=True, kw_only=True)
class RopeScalingConfig:
  """Llama 3.1's slower rotary frequencies, for sequences beyond training's.

  Llama Team 2024, section 3.4.2, https://arxiv.org/abs/2407.21783, and its
  published code. A frequency whose wavelength is below `original_max_seq_len /
  high_freq_factor` tokens stays, one above `original_max_seq_len /
  low_freq_factor` is divided by `factor`, and between the two it is blended.

  Attributes:
    factor: what low frequencies are divided by.
    low_freq_factor: turns in the original length, below which it is in full.
    high_freq_factor: turns in the original length, above which it is not.
    original_max_seq_len: the length that the model was trained with first.
  """

  factor: float = 8.0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_max_seq_len: int = 8192


# What an adapter may stand beside: every matrix of a decoder layer.
_IN_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
PROJECTIONS = (*_IN_ATTENTION, "gate_proj", "up_proj", "down_proj")
# What may begin at zero and yet have a gradient, now or a step later.
ZEROABLE = ("lm_head", "o_proj", "down_proj")


@dataclasses.dataclass(slots=True, kw_only=True)
class LoraConfig:
  """Low-rank adapters beside frozen projections.

  Hu et al. 2021, eq. 3, https://arxiv.org/abs/2106.09685.

  Attributes:
    rank: r, columns of A and rows of B.
    alpha: the adapter's output is multiplied by alpha / rank.
    targets: which of `PROJECTIONS` have one, in every layer.
  """

  rank: int = 8
  alpha: float = 16.0
  targets: tuple[str, ...] = ("q_proj", "v_proj")


@dataclasses.dataclass(slots=True, kw_only=True)
class LlamaConfig:
  """Shape of the decoder; the defaults are Llama-7B.

  Touvron et al. 2023, https://arxiv.org/abs/2302.13971.

  Attributes:
    vocab_size: rows of the embedding; at least `data.vocab_size`.
    embed_dim: features of a token.
    num_layers: decoder blocks.
    num_heads: query heads.
    num_kv_heads: key and value heads; divides `num_heads`.
    head_dim: features of a head; even.
    mlp_dim: hidden features of the feed-forward block.
    max_seq_len: longest sequence, in tokens.
    rope_theta: base of the rotary frequencies.
    rope_scaling: Llama 3.1's change of the low frequencies, or None.
    rms_norm_eps: added to the mean square before its root.
    tie_embeddings: use the embedding as the output head.
    remat: compute activations again in the backward pass: less memory.
    compute_dtype: of activations; parameters have a dtype of their own, which
      is float32 unless they were loaded in another one.
    lora: adapters beside the projections, or None.
    attention: code that computes attention; None chooses by the platform.
    noise_layers: layers, counted from 0, whose attention is noised where
      `attention_noise` is on; none named: all of them.
    zero_init: which of `ZEROABLE` begin at zero: the head, so that all tokens
      are equally likely at first; or what ends a layer's branches.
    look_back: above 0: head n of every layer begins by attending to the token n
      places back, whose score is this; see `models.first_weights`.
  """

  vocab_size: int = 32000
  embed_dim: int = 4096
  num_layers: int = 32
  num_heads: int = 32
  num_kv_heads: int = 32
  head_dim: int = 128
  mlp_dim: int = 11008
  max_seq_len: int = 2048
  rope_theta: float = 10000.0
  rope_scaling: RopeScalingConfig | None = None
  rms_norm_eps: float = 1e-6
  tie_embeddings: bool = False
  remat: bool = False
  compute_dtype: ComputeDtype = ComputeDtype.FLOAT32
  lora: LoraConfig | None = None
  attention: config_attention.AttentionImplementation | None = None
  noise_layers: tuple[int, ...] = ()
  zero_init: tuple[str, ...] = ()
  look_back: float = 0.0


def llama_tiny(*, vocab_size: int) -> LlamaConfig:
  """A decoder for examples and laptops: 27,000 parameters or so."""
  return LlamaConfig(
    vocab_size=vocab_size,
    embed_dim=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=16,
    mlp_dim=64,
    max_seq_len=64,
  )


@dataclasses.dataclass(slots=True, kw_only=True)
class PatchStemConfig:
  """A patch transformer: square patches become tokens that see each other.

  Dosovitskiy et al. 2020, section 3.1, https://arxiv.org/abs/2010.11929, with
  RMSNorm, without biases and without a class token.

  Attributes:
    patch_size: pixels on a patch's side; divides `data.image_size`.
    embed_dim: features of a patch; a multiple of `num_heads`.
    num_layers: blocks.
    num_heads: heads of each block.
    mlp_dim: hidden features of the feed-forward block.
    rms_norm_eps: added to the mean square before its root.
    remat: compute activations again in the backward pass: less memory.
  """

  patch_size: int = 14
  embed_dim: int = 1024
  num_layers: int = 24
  num_heads: int = 16
  mlp_dim: int = 4096
  rms_norm_eps: float = 1e-6
  remat: bool = False


class Activation(enum.Enum):
  """What follows each convolution, entry by entry.

  SILU grows without bound. A bounded one bounds what a picture can put into
  the next weight's gradient: Papernot et al. 2021
  (https://arxiv.org/abs/2007.14191), whose tempered sigmoid has tanh among it.
  """

  SILU = "silu"
  TANH = "tanh"
  TEMPERED_SIGMOID = "tempered_sigmoid"


@dataclasses.dataclass(slots=True, kw_only=True)
class TemperedSigmoidConfig:
  """scale * sigmoid(temperature * x) - offset; the defaults are tanh.

  Papernot et al. 2021, https://arxiv.org/abs/2007.14191: s, T and o.

  Attributes:
    scale: distance between the two ends; positive.
    temperature: the *inverse* temperature: how steep it is; positive.
    offset: how far below 0 the lower end is.
  """

  scale: float = 2.0
  temperature: float = 2.0
  offset: float = 1.0


@dataclasses.dataclass(slots=True, kw_only=True)
class ImageStemConfig:
  """A small CNN: 3x3 convolutions, then one token per pooled patch.

  After each convolution: group normalisation if asked for, then the activation.
  None of the options adds a parameter or changes one's shape.

  Attributes:
    channels: output channels of each convolution; each halves the picture
      where `strides` says 2.
    strides: stride of each convolution.
    activation: see `Activation`.
    tempered_sigmoid: its shape; read with TEMPERED_SIGMOID alone.
    num_groups: groups of channels that are normalised within each picture, Wu
      and He 2018, eq. 7 (https://arxiv.org/abs/1803.08494), without weights;
      divides all of `channels`. 0 does without.
    weight_standardisation: convolve with a kernel whose inputs to each channel
      have mean 0 and norm 1, Qiao et al. 2019
      (https://arxiv.org/abs/1903.10520); De et al. 2022
      (https://arxiv.org/abs/2204.13650) use it with group normalisation. What
      is clipped and noised is the gradient of the kernel as it is stored.
    patches: a patch transformer in the convolutions' place, or None.
  """

  channels: tuple[int, ...] = (16, 32)
  strides: tuple[int, ...] = (1, 2)
  activation: Activation = Activation.SILU
  tempered_sigmoid: TemperedSigmoidConfig = dataclasses.field(
    default_factory=TemperedSigmoidConfig
  )
  num_groups: int = 0
  weight_standardisation: bool = False
  patches: PatchStemConfig | None = None

  def num_tokens(self, image_size: int) -> int:
    """Tokens that one square picture becomes."""
    if self.patches is not None:
      return (image_size // self.patches.patch_size) ** 2
    for stride in self.strides:
      image_size = -(-image_size // stride)  # SAME padding.
    return image_size**2


@dataclasses.dataclass(slots=True, kw_only=True)
class AudioStemConfig:
  """Groups of consecutive frames.

  Attributes:
    frames_per_token: frames that make one token.
  """

  frames_per_token: int = 6


@dataclasses.dataclass(slots=True, kw_only=True)
class WordsConfig:
  """Which words a text has, as features of a linear model: `models.words`.

  Attributes:
    num_buckets: features; a word's is given by a hash of its bytes.
    num_stem_bytes: bytes of a word that count, from its first; what begins
      alike is one word.
    heading_weight: value of a second feature of a word that stands in the first
      of several lines; 1 is that of a word anywhere. 0: there is none.
  """

  num_buckets: int = 8192
  num_stem_bytes: int = 6
  heading_weight: float = 0.0


@dataclasses.dataclass(slots=True, kw_only=True)
class LinearConfig:
  """A linear classifier on fixed features, in the decoder's place.

  Attributes:
    words: reads the text as well, by the words that it has; None reads media
      alone. It needs data.tokenizer=BYTES.
    num_groups: groups of feature maps, each given mean 0 and variance 1 within
      a picture; 0 leaves the features as the data have them.
    feature_norm: Euclidean norm that the features of every record are scaled
      to, after that; 0 leaves it as it is.
    rarity_power: multiply each feature by a power of how rare it is,
      (mean + rarity_floor)^-rarity_power, and scale again; the first step
      measures the mean of the features of norm 1. 0 leaves them. See
      `models.rarity`.
    rarity_floor: what a mean feature is raised by there; it should not be far
      below the noise of that step.
    centre: take the mean feature away, which a step measures under
      the same clipping and noise as any other step; see `models.centring`.
    num_leading: measure the covariance of the first so many of the centred
      features, which `data.whitening` puts first for it, and leave no variance
      among them above `leading_floor`; scale again, and take the mean away once
      more. 0 leaves them. See `models.leading`.
    num_leading_steps: steps that measure it.
    leading_floor: a variance of features of norm 1; it should not be far below
      the noise of these steps.
    num_directions: k: find the k largest directions of the centred features,
      make the features as small along them as along the k-th, scale them again,
      and take their mean away once more; 0 leaves them. See
      `models.flattening`.
    num_power_steps: steps that find them; one more measures the new mean.
  """

  words: WordsConfig | None = None
  num_groups: int = 0
  feature_norm: float = 0.0
  rarity_power: float = 0.0
  rarity_floor: float = 1e-3
  centre: bool = False
  num_leading: int = 0
  num_leading_steps: int = 4
  leading_floor: float = 4e-3
  num_directions: int = 0
  num_power_steps: int = 2


@dataclasses.dataclass(slots=True, kw_only=True)
class ModelConfig:
  """The multimodal network: stems, projectors, decoder.

  Attributes:
    decoder: see `LlamaConfig`.
    decoder_weights: a Hugging Face directory that the decoder begins with;
      empty begins at random. No private record may have entered them, or the
      guarantee is of what was trained here alone.
    image: stem of pictures; None leaves them out.
    audio: stem of sounds; None leaves them out.
    modality_dropout: probability that a training example goes without one of
      its modalities, drawn for each by itself. Its placeholders then keep their
      own token embeddings.
    private_cut: makes the decoder's hidden state private.
    linear: instead of stems and decoder, one matrix on the media as the data
      have them, and on words; of `decoder` only `vocab_size` and `max_seq_len`
      are read.
  """

  decoder: LlamaConfig = dataclasses.field(default_factory=LlamaConfig)
  decoder_weights: str = ""
  image: ImageStemConfig | None = dataclasses.field(
    default_factory=ImageStemConfig
  )
  audio: AudioStemConfig | None = dataclasses.field(
    default_factory=AudioStemConfig
  )
  modality_dropout: float = 0.0
  private_cut: config_attention.PrivateCutConfig = dataclasses.field(
    default_factory=config_attention.PrivateCutConfig
  )
  linear: LinearConfig | None = None


def validate_options(decoder: LlamaConfig) -> None:
  """Raises `ValueError` for scaled positions or adapters that cannot be."""
  scaling, lora = decoder.rope_scaling, decoder.lora
  if scaling is not None:
    checks.positive(
      **{
        "rope_scaling.factor": scaling.factor,
        "rope_scaling.low_freq_factor": scaling.low_freq_factor,
        "rope_scaling.original_max_seq_len": scaling.original_max_seq_len,
      }
    )
    if not scaling.high_freq_factor > scaling.low_freq_factor:
      checks.fail(
        "rope_scaling.high_freq_factor > low_freq_factor",
        high_freq_factor=scaling.high_freq_factor,
        low_freq_factor=scaling.low_freq_factor,
      )
  if lora is not None:
    checks.positive(
      **{
        "model.decoder.lora.rank": lora.rank,
        "model.decoder.lora.alpha": lora.alpha,
      }
    )
    unknown = [name for name in lora.targets if name not in PROJECTIONS]
    if unknown or not lora.targets:
      checks.fail(
        f"model.decoder.lora.targets among {PROJECTIONS}, at least one",
        **{"model.decoder.lora.targets": lora.targets},
      )


def is_measured(linear: LinearConfig) -> bool:
  """Whether the first step of a linear model measures a mean."""
  return linear.centre or linear.rarity_power > 0


def validate_first_weights(model: ModelConfig) -> None:
  """Raises `ValueError` for first weights that cannot be, or that none see."""
  decoder = model.decoder
  checks.non_negative(**{"model.decoder.look_back": decoder.look_back})
  unknown = [name for name in decoder.zero_init if name not in ZEROABLE]
  if unknown or (decoder.tie_embeddings and "lm_head" in decoder.zero_init):
    checks.fail(
      f"model.decoder.zero_init among {ZEROABLE}, and no lm_head where"
      " tie_embeddings has none",
      "Other matrices would stay at zero.",
      **{"model.decoder.zero_init": decoder.zero_init},
    )
  if not decoder.zero_init and not decoder.look_back:
    return
  for name, is_set in (
    ("decoder_weights", bool(model.decoder_weights)),
    ("decoder.lora", decoder.lora is not None),
    ("linear", model.linear is not None),
  ):
    if is_set:
      checks.fail(
        f"no model.{name} beside model.decoder.zero_init or look_back",
        "They are of a decoder that is trained whole, from its beginning.",
        **{
          "model.decoder.zero_init": decoder.zero_init,
          "model.decoder.look_back": decoder.look_back,
        },
      )


def validate_linear(model: ModelConfig, *, tokenizer: str) -> None:
  """Raises `ValueError` for what a linear model has no place for.

  Args:
    model: what is checked.
    tokenizer: the name of what turns text into tokens.
  """
  if model.linear is None:
    return
  words = model.linear.words
  if words is not None:
    _validate_words(words, tokenizer=tokenizer)
  if model.linear.num_groups < 0:
    checks.fail(
      "model.linear.num_groups not to be negative",
      **{"model.linear.num_groups": model.linear.num_groups},
    )
  checks.non_negative(
    **{
      "model.linear.feature_norm": model.linear.feature_norm,
      "model.linear.rarity_power": model.linear.rarity_power,
    }
  )
  checks.positive(**{"model.linear.rarity_floor": model.linear.rarity_floor})
  if is_measured(model.linear) and not model.linear.feature_norm:
    checks.fail(
      "model.linear.feature_norm above 0 with model.linear.centre or"
      " model.linear.rarity_power",
      "The mean is measured of features of one norm, so that none is clipped.",
      **{"model.linear.feature_norm": model.linear.feature_norm},
    )
  _validate_leading(model.linear)
  _validate_directions(model.linear)
  for name, is_set in (
    ("decoder_weights", bool(model.decoder_weights)),
    ("modality_dropout", model.modality_dropout > 0),
    ("private_cut.layer", model.private_cut.layer is not None),
    ("decoder.lora", model.decoder.lora is not None),
  ):
    if is_set:
      checks.fail(
        f"no model.{name} beside model.linear",
        "A linear model has no hidden state and no decoder.",
        **{f"model.{name}": is_set},
      )


def _validate_words(words: WordsConfig, *, tokenizer: str) -> None:
  """Raises `ValueError` for words that cannot be read."""
  checks.positive(
    **{
      "model.linear.words.num_buckets": words.num_buckets,
      "model.linear.words.num_stem_bytes": words.num_stem_bytes,
    }
  )
  checks.non_negative(
    **{"model.linear.words.heading_weight": words.heading_weight}
  )
  if tokenizer != "BYTES":
    checks.fail(
      "data.tokenizer=BYTES with model.linear.words",
      "Words are read from bytes. Set --config.data.tokenizer=bytes, or"
      " --config.model.linear.words=none.",
      tokenizer=tokenizer,
    )


def _validate_leading(linear: LinearConfig) -> None:
  """Raises `ValueError` for a covariance that cannot be measured."""
  checks.non_negative(**{"model.linear.num_leading": linear.num_leading})
  checks.positive(
    **{
      "model.linear.num_leading_steps": linear.num_leading_steps,
      "model.linear.leading_floor": linear.leading_floor,
    }
  )
  if linear.num_leading and not linear.centre:
    checks.fail(
      "model.linear.centre with model.linear.num_leading",
      "It is measured of features without their mean. Set"
      " --config.model.linear.centre=true.",
      **{
        "model.linear.num_leading": linear.num_leading,
        "model.linear.centre": linear.centre,
      },
    )


def _validate_directions(linear: LinearConfig) -> None:
  """Raises `ValueError` for directions that cannot be found."""
  checks.positive(**{"model.linear.num_power_steps": linear.num_power_steps})
  if not linear.num_directions:
    return
  if linear.num_directions < 2 or not linear.centre:
    checks.fail(
      "model.linear.num_directions to be 0, or at least 2 with"
      " model.linear.centre",
      "Features are made as small along all directions as along the last one.",
      **{
        "model.linear.num_directions": linear.num_directions,
        "model.linear.centre": linear.centre,
      },
    )


def validate_stems(model: ModelConfig, *, image_size: int) -> None:
  """Raises `ValueError` for stems that cannot be built."""
  image = model.image
  if image is not None and len(image.channels) != len(image.strides):
    checks.fail(
      "as many model.image.channels as model.image.strides",
      channels=image.channels,
      strides=image.strides,
    )
  if image is not None:
    _validate_convolutions(image, image_size=image_size)
  if image is not None and image.patches is not None:
    _validate_patches(image.patches, image_size=image_size)
  if model.audio is not None:
    checks.positive(
      **{"model.audio.frames_per_token": model.audio.frames_per_token}
    )
  if not 0 <= model.modality_dropout < 1:
    checks.fail(
      "0 <= model.modality_dropout < 1",
      "Leave a modality out for good with model.image=none or"
      " model.audio=none.",
      **{"model.modality_dropout": model.modality_dropout},
    )


def _validate_convolutions(image: ImageStemConfig, *, image_size: int) -> None:
  """Raises `ValueError` for options of the CNN that cannot be, or not act."""
  sigmoid = image.tempered_sigmoid
  checks.positive(
    **{
      "model.image.tempered_sigmoid.scale": sigmoid.scale,
      "model.image.tempered_sigmoid.temperature": sigmoid.temperature,
    }
  )
  if not math.isfinite(sigmoid.offset):
    checks.fail(
      "model.image.tempered_sigmoid.offset to be finite",
      **{"model.image.tempered_sigmoid.offset": sigmoid.offset},
    )
  is_tempered = image.activation is Activation.TEMPERED_SIGMOID
  if sigmoid != TemperedSigmoidConfig() and not is_tempered:
    checks.fail(
      "model.image.activation=tempered_sigmoid with a shape for it",
      **{
        "model.image.activation": image.activation.value,
        "model.image.tempered_sigmoid": sigmoid,
      },
    )
  if image.num_groups < 0 or (
    image.num_groups and any(c % image.num_groups for c in image.channels)
  ):
    checks.fail(
      "model.image.num_groups to be 0, or to divide all of"
      " model.image.channels",
      **{
        "model.image.num_groups": image.num_groups,
        "model.image.channels": image.channels,
      },
    )
  side = image_size
  for channels, stride in zip(image.channels, image.strides, strict=True):
    side = -(-side // stride)
    if side == 1 and channels == image.num_groups:
      checks.fail(
        "groups of more than one number",
        "A number by itself is its own mean, and all that is left is 0.",
        **{
          "model.image.num_groups": image.num_groups,
          "model.image.channels": image.channels,
          "height and width": side,
        },
      )
  for name, is_set in (
    ("activation", image.activation is not Activation.SILU),
    ("num_groups", image.num_groups > 0),
    ("weight_standardisation", image.weight_standardisation),
  ):
    if is_set and image.patches is not None:
      checks.fail(
        f"no model.image.{name} beside model.image.patches",
        "It is an option of the convolutions, and a patch transformer has"
        " none.",
        **{f"model.image.{name}": getattr(image, name)},
      )


def _validate_patches(patches: PatchStemConfig, *, image_size: int) -> None:
  sizes = {
    name: getattr(patches, name)
    for name in (
      "patch_size",
      "embed_dim",
      "num_layers",
      "num_heads",
      "mlp_dim",
      "rms_norm_eps",
    )
  }
  checks.positive(**{f"model.image.patches.{n}": v for n, v in sizes.items()})
  for name, whole, part in (
    ("data.image_size", image_size, "patch_size"),
    ("model.image.patches.embed_dim", patches.embed_dim, "num_heads"),
  ):
    if whole % sizes[part]:
      checks.fail(
        f"{name} to be a multiple of model.image.patches.{part}",
        **{name: whole, f"model.image.patches.{part}": sizes[part]},
      )
