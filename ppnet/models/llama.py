"""The Llama decoder (Touvron et al. 2023, https://arxiv.org/abs/2302.13971).

With x [B, T, D] the residual stream, one vector per token:

    x = embedding[tokens]
    for each layer:
      x = x + attention(norm(x))        tokens look back at earlier tokens
      x = x + feed_forward(norm(x))     each token by itself
    logits = norm(x) @ head

`norm` is RMSNorm, `attention` has rotary positions and may share a key head
among several query heads, `feed_forward` is SwiGLU. Layers are alike, so their
parameters are stacked and one layer is scanned over them: compile time does not
grow with depth.

Read `Llama`, then `DecoderLayer`, `Attention` and `FeedForward`. Three things
are not Llama's own and are None where they are not asked for: `noise` on
attention, a private `cut`, and the `cache` of generation.

>>> import jax
>>> from ppnet import config
>>> llama = Llama(config.LlamaConfig(
...   vocab_size=11, embed_dim=8, num_layers=2, num_heads=2, num_kv_heads=1,
...   head_dim=4, mlp_dim=12, max_seq_len=5))
>>> tokens = jax.numpy.array([[1, 2, 3]])
>>> init = jax.jit(llama.init_with_output)
>>> logits, variables = init(jax.random.key(0), tokens)
>>> logits.shape
(1, 3, 11)
"""

import dataclasses
import functools
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from ppnet import config as config_lib
from ppnet.core import checks, param_ops
from ppnet.kernels import noisy_attention, reference
from ppnet.models import first_weights, layers, private_cut
from ppnet.sharding import layout

Leaf = Any

# Collection of each layer's attention weights f32[L, B, N, T, S]. They are
# computed where a caller makes it mutable, and nowhere else.
MAPS = "attention_maps"


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=["k", "v"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVCache:
  """Keys and values of the tokens so far; slot s holds position s.

  A slot above a query's position is never read, whatever it holds.

  Attributes:
    k: turned keys, [L, B, S, K, H]; one layer's are [B, S, K, H].
    v: values, likewise.
  """

  k: Leaf
  v: Leaf

  @property
  def num_slots(self) -> int:
    """S."""
    return self.k.shape[-3]

  def insert(
    self, fresh: "KVCache", positions: Int[Array, "#B T"]
  ) -> "KVCache":
    """One layer's cache with fresh tokens [B, T, K, H] in their slots."""
    batch, num_tokens = fresh.k.shape[:2]
    rows = jnp.arange(batch)[:, None]
    slots = jnp.broadcast_to(positions, (batch, num_tokens))
    return jax.tree.map(
      lambda old, new: old.at[rows, slots].set(new), self, fresh
    )


def empty_cache(config: config_lib.LlamaConfig, *, batch_size: int) -> KVCache:
  """A cache without slots: what a prompt begins with."""
  heads = (config.num_kv_heads, config.head_dim)
  nothing = jnp.zeros(
    (config.num_layers, batch_size, 0, *heads),
    jnp.dtype(config.compute_dtype.value),
  )
  return KVCache(k=nothing, v=nothing)


class Attention(nn.Module):
  """Grouped-query attention with rotary positions and optional noise."""

  config: config_lib.LlamaConfig
  ops: param_ops.ParamOps

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "B T D"],
    *,
    noise: noisy_attention.AttentionNoise | None,
    positions: Int[Array, "#B T"],
    segment_ids: Int[Array, "B T"] | None,
    cache: KVCache | None,
  ) -> tuple[Float[Array, "B T D"], KVCache | None]:
    """Attends within each row, and to what its cache holds.

    Returns:
      The output; and, where there is a cache, the fresh keys and values.
    """
    cfg = self.config
    projection = functools.partial(_projection, cfg, self.ops)

    def heads(name: str, count: int, axis: str) -> Float[Array, "B T _ H"]:
      out = projection(name, count * cfg.head_dim, ("embed", axis))(x)
      return out.reshape(*x.shape[:2], count, cfg.head_dim)

    rotate = functools.partial(
      layers.rotary_embedding,
      positions=positions,
      theta=cfg.rope_theta,
      scaling=cfg.rope_scaling,
    )
    q = rotate(heads("q_proj", cfg.num_heads, "q_heads"))
    k = rotate(heads("k_proj", cfg.num_kv_heads, "kv_heads"))
    v = heads("v_proj", cfg.num_kv_heads, "kv_heads")
    if self.is_mutable_collection(MAPS) and not self.is_initializing():
      # Meant: what is looked at is drawn as it is used.
      same = noise and dataclasses.replace(
        noise, key=jax.random.clone(noise.key)
      )
      maps = noisy_attention.attention_weights(
        q, k, noise=same, segment_ids=segment_ids
      )
      self.sow(MAPS, "weights", maps)
    if cache is not None and cache.num_slots:
      known = cache.insert(KVCache(k=k, v=v), positions)
      out = _attend_to_cache(q, known, positions)
    else:
      out = noisy_attention.noisy_attention(
        q,
        k,
        v,
        noise=noise,
        segment_ids=segment_ids,
        implementation=cfg.attention,
      )
    out = projection("o_proj", cfg.embed_dim, ("q_heads", "embed"))(
      out.reshape(*x.shape[:2], -1)
    )
    return out, None if cache is None else KVCache(k=k, v=v)


def _attend_to_cache(
  q: Float[Array, "B T N H"], known: KVCache, positions: Int[Array, "#B T"]
) -> Float[Array, "B T N H"]:
  """Attention to every slot up to a query's own position."""
  slot = jnp.arange(known.num_slots).reshape(1, 1, -1)
  return reference.attention(
    q,
    known.k,
    known.v,
    mask=slot <= positions[:, :, None],
    score_noise=None,
    weight_noise=None,
  )


def _projection(
  config: config_lib.LlamaConfig,
  ops: param_ops.ParamOps,
  name: str,
  features: int,
  axes: tuple[str, str],
) -> layers.Dense:
  """A projection of the layer, with its adapter where it is to have one."""
  lora = config.lora
  if lora is not None and name not in lora.targets:
    lora = None
  return layers.Dense(
    features,
    axes,
    ops,
    lora=lora,
    kernel_init=first_weights.of_projection(config, name),
    name=name,
  )


class FeedForward(nn.Module):
  """SwiGLU: (silu(x gate) * (x up)) down.

  Shazeer 2020, eq. 6, https://arxiv.org/abs/2002.05202.
  """

  config: config_lib.LlamaConfig
  ops: param_ops.ParamOps

  @nn.compact
  def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Applies the block to each token."""
    width, outside = self.config.mlp_dim, self.config.embed_dim
    projection = functools.partial(_projection, self.config, self.ops)
    gate = projection("gate_proj", width, ("embed", "mlp"))(x)
    up = projection("up_proj", width, ("embed", "mlp"))(x)
    return projection("down_proj", outside, ("mlp", "embed"))(
      nn.silu(gate) * up
    )


class DecoderLayer(nn.Module):
  """One block, in the (carry, per-layer input) form that `nn.scan` wants."""

  config: config_lib.LlamaConfig
  ops: param_ops.ParamOps
  cut: private_cut.PrivateCut | None

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "B T D"],
    layer: Int[Array, ""],
    noise: noisy_attention.AttentionNoise | None,
    cut_noise: Float[Array, "B T D"] | None,
    positions: Int[Array, "#B T"],
    segment_ids: Int[Array, "B T"] | None,
    cache: KVCache | None,
  ) -> tuple[Float[Array, "B T D"], KVCache | None]:
    """Adds attention and feed-forward to the residual stream."""
    if self.cut is not None and cut_noise is not None:
      # All that this layer and the later ones compute, they compute from x.
      private = private_cut.privatize(x, cut_noise, cut=self.cut)
      x = jnp.where(layer == self.cut.layer, private, x)
    if noise is not None:
      noise = _of_layer(noise, layer, self.config.noise_layers)
    eps = self.config.rms_norm_eps
    attended, fresh = Attention(self.config, self.ops, name="attention")(
      layers.RMSNorm(eps, self.ops, name="attention_norm")(x),
      noise=noise,
      positions=positions,
      segment_ids=segment_ids,
      cache=cache,
    )
    x = layout.activation(x + attended)
    x = x + FeedForward(self.config, self.ops, name="mlp")(
      layers.RMSNorm(eps, self.ops, name="mlp_norm")(x)
    )
    return layout.activation(x), fresh


def _of_layer(
  noise: noisy_attention.AttentionNoise,
  layer: Array,
  noise_layers: tuple[int, ...],
) -> noisy_attention.AttentionNoise:
  """The layer's own noise: its key, and no noise where it has none."""
  stddev = noise.stddev
  if noise_layers:
    # Layers share one program, so a layer without noise is one with 0.
    has_noise = jnp.isin(layer, jnp.array(noise_layers))
    stddev = jnp.where(has_noise, stddev, 0.0)
  return dataclasses.replace(
    noise, key=fold_in(noise.key, layer), stddev=stddev
  )


def fold_in(keys: Array, layer: Array) -> Array:
  """The layer's own key, for one key or for one per example."""
  if keys.ndim == 0:
    return jax.random.fold_in(keys, layer)
  return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, layer)


class Llama(nn.Module):
  """Tokens (or embeddings that stand in for them) to logits.

  Attributes:
    config: shape of the decoder.
    ops: implementation of the parametrised operations.
    cut: where the hidden state is made private, or None.
  """

  config: config_lib.LlamaConfig
  ops: param_ops.ParamOps = param_ops.PLAIN
  cut: private_cut.PrivateCut | None = None

  def setup(self):
    """Declares embedding, scanned layers, final norm and head."""
    cfg = self.config
    self.token_embed = layers.Embed(
      cfg.vocab_size,
      cfg.embed_dim,
      self.ops,
      table_init=first_weights.of_table(cfg),
    )
    layer = DecoderLayer
    if cfg.remat:
      # Inside scan the loop already prevents merging across the boundary.
      layer = nn.remat(layer, prevent_cse=False)
    self.layers = nn.scan(
      layer,
      variable_axes={"params": 0, MAPS: 0},
      split_rngs={"params": True},
      # Layer numbers and caches are sliced; noise, the cut's noise, positions
      # and segments are the same for all layers.
      in_axes=(0, *[nn.broadcast] * 4, 0),
      length=cfg.num_layers,
      metadata_params={nn.PARTITION_NAME: "layers"},
    )(cfg, self.ops, self.cut)
    self.final_norm = layers.RMSNorm(cfg.rms_norm_eps, self.ops)
    if not cfg.tie_embeddings:
      self.lm_head = layers.Dense(
        cfg.vocab_size,
        ("embed", "vocab"),
        self.ops,
        kernel_init=first_weights.of_projection(cfg, "lm_head"),
      )

  def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Token embeddings in the compute dtype."""
    return self.token_embed(
      tokens, dtype=jnp.dtype(self.config.compute_dtype.value)
    )

  def __call__(
    self,
    tokens: Int[Array, "B T"],
    *,
    embeddings: Float[Array, "B T D"] | None = None,
    noise: noisy_attention.AttentionNoise | None = None,
    cut_keys: Key[Array, " B"] | None = None,
    positions: Int[Array, "#B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
  ) -> Float[Array, "B T V"]:
    """Logits of the next token at every position, float32.

    Args:
      tokens: token ids.
      embeddings: used in place of the tokens' own embeddings where a picture
        or a sound takes their place.
      noise: attention noise; each layer folds its number into the key.
      cut_keys: one secret key per example, where there is a private cut.
      positions: rotary positions, 0..T-1 by default.
      segment_ids: tokens attend only within their segment. Padding is a segment
        of its own, left or right of the tokens.

    Raises:
      ValueError: more tokens than `max_seq_len`, or a private cut without
        keys.
    """
    if self.cut is not None and cut_keys is None and not self.is_initializing():
      checks.fail(
        "cut_keys for a model with a private cut",
        "Give one secret key per example.",
        cut_keys=cut_keys,
      )
    num_tokens = tokens.shape[1]
    checks.at_most(
      self.config.max_seq_len,
      "Raise model.decoder.max_seq_len or shorten the input.",
      num_tokens=num_tokens,
    )
    if positions is None:
      positions = jnp.arange(num_tokens)[None]
    x = self.embed(tokens) if embeddings is None else embeddings
    cut_noise = None
    if self.cut is not None and cut_keys is not None:
      # Once, before the layers' loop: it stands for one draw.
      shape = (num_tokens, self.config.embed_dim)
      cut_noise = private_cut.draw(cut_keys, shape, cut=self.cut)
    x, _ = self._through_layers(
      x,
      noise=noise,
      cut_noise=cut_noise,
      positions=positions,
      segment_ids=segment_ids,
    )
    return self.logits(x)

  def extend(
    self,
    embeddings: Float[Array, "B T D"],
    *,
    positions: Int[Array, "#B T"],
    cache: KVCache,
  ) -> tuple[Float[Array, "B T D"], KVCache]:
    """Runs further tokens of sequences whose past the cache holds.

    Args:
      embeddings: of the further tokens.
      positions: their positions; those of a prompt are 0..T-1.
      cache: the past; `empty_cache` before a prompt, whose tokens attend to
        each other. Later tokens must have slots of their own in it.

    Returns:
      What `logits` takes; and the keys and values [L, B, T, K, H] of the
      further tokens alone, for the caller to put into the cache.

    Raises:
      ValueError: there is a private cut, which needs the whole input at once.
    """
    if self.cut is not None:
      checks.fail(
        "a model without a private cut, where a sequence is made in pieces",
        "Set model.private_cut.layer to none; outputs are then not private.",
        layer=self.cut.layer,
      )
    x, fresh = self._through_layers(
      embeddings, positions=positions, cache=cache
    )
    return x, cast(KVCache, fresh)

  def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    """Logits of the next token from the last layer's output, float32."""
    x = self.final_norm(x)
    if self.config.tie_embeddings:
      logits = self.token_embed.attend(x)
    else:
      logits = self.lm_head(x)
    return logits.astype(jnp.float32)

  def _through_layers(
    self,
    x: Float[Array, "B T D"],
    *,
    positions: Int[Array, "#B T"],
    noise: noisy_attention.AttentionNoise | None = None,
    cut_noise: Float[Array, "B T D"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    cache: KVCache | None = None,
  ) -> tuple[Float[Array, "B T D"], KVCache | None]:
    """Scans the layers."""
    numbers = jnp.arange(self.config.num_layers)
    return self.layers(
      x, numbers, noise, cut_noise, positions, segment_ids, cache
    )
