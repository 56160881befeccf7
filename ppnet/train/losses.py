"""Per-example losses: the task term and the attention consistency term."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ppnet import config as config_lib
from ppnet.core import param_ops
from ppnet.kernels import noisy_attention
from ppnet.models import measuring, multimodal

Batch = Mapping[str, Any]
LossFn = Callable[..., tuple[Array, dict[str, Array]]]


def cross_entropy(
  logits: Float[Array, "B _ V"],
  targets: Int[Array, "B T"],
  loss_mask: Float[Array, "B T"],
) -> Float[Array, " B"]:
  """Mean over each example's own masked positions, nats.

  Logits of one position are those of all.
  """
  log_probs = jax.nn.log_softmax(logits, axis=-1)
  picked = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
  return -_masked_mean(picked, loss_mask)


def consistency(
  clean_logits: Float[Array, "B _ V"],
  noisy_logits: Float[Array, "B _ V"],
  loss_mask: Float[Array, "B T"],
) -> Float[Array, " B"]:
  """KL(clean || noisy) over each example's own masked positions, nats."""
  clean = jax.nn.log_softmax(clean_logits, axis=-1)
  noisy = jax.nn.log_softmax(noisy_logits, axis=-1)
  divergence = (jnp.exp(clean) * (clean - noisy)).sum(axis=-1)
  return _masked_mean(divergence, loss_mask)


def answer_logits(
  logits: Float[Array, "B _ V"], loss_mask: Float[Array, "B T"]
) -> Float[Array, "B V"]:
  """Logits at each example's one answer position.

  Logits of one position are those of all; an example of padding has zeros.
  """
  if logits.shape[1] == 1:
    loss_mask = loss_mask.sum(axis=1, keepdims=True)
  return jnp.einsum("btv,bt->bv", logits, loss_mask)


def media(batch: Batch) -> dict[str, Array]:
  """The arrays of the modalities that a batch has."""
  return {name: batch[name] for name in config_lib.MODALITIES if name in batch}


def predict(
  model: multimodal.PPNet,
  params: Any,
  batch: Batch,
  *,
  noise: noisy_attention.AttentionNoise | None,
) -> Float[Array, "B _ V"]:
  """Logits of a batch from the pipeline; absent modalities are left out.

  Of a linear model they have one position: they are the same at all.

  A packed batch has "positions" and "segment_ids" [B, T] (`data.packing`).

  `batch["cut_key"]`, where it is there, holds the keys of the private cut, and
  `batch["dropout_key"]` those of modality dropout, in training alone. Two
  predictions of one batch share their draws: one noisy state, released once,
  and one choice of what is dropped.
  """
  return _apply(model, params, batch, noise=noise)[0]


def _apply(
  model: multimodal.PPNet,
  params: Any,
  batch: Batch,
  *,
  noise: noisy_attention.AttentionNoise | None,
) -> tuple[Float[Array, "B _ V"], Mapping[str, Any]]:
  """See `predict`; and what a model that measures has sown beside it."""
  shared = {
    name: jax.random.clone(batch[name])  # Meant: see `predict`.
    for name in ("cut_key", "dropout_key")
    if name in batch
  }
  logits, measured = model.apply(
    {"params": params},
    batch["tokens"],
    media=media(batch),
    noise=noise,
    cut_keys=shared.get("cut_key"),
    dropout_keys=shared.get("dropout_key"),
    positions=batch.get("positions"),
    segment_ids=batch.get("segment_ids"),
    mutable=[measuring.COLLECTION],
  )
  assert isinstance(logits, jax.Array)  # Linen declares a union.
  return logits, measured.get(measuring.COLLECTION) or {}


def attention_noise(
  config: config_lib.AttentionNoiseConfig, keys: Array
) -> noisy_attention.AttentionNoise | None:
  """The noise of a batch, or None where the mechanism is off.

  A standard deviation that is traced is noise, whatever its value.
  """
  if not isinstance(config.stddev, jax.Array) and config.stddev == 0:
    return None
  return noisy_attention.AttentionNoise(
    key=keys,
    stddev=jnp.float32(config.stddev),
    mode=config.mode,
    generator=config.generator,
  )


def make_loss_fn(
  model: multimodal.PPNet, config: config_lib.AttentionNoiseConfig
) -> LossFn:
  """The total loss of the paper, per example.

  task + consistency_weight * KL(clean || noisy prediction). Both terms are
  inside the per-example gradient, before clipping and noise. In the steps in
  which a linear model measures its features (`models.measuring`), the task is
  that.

  Returns:
    `loss_fn(params, batch, ops=PLAIN) -> (losses f32[B], terms)`.
    `batch["key"]` holds one key per example; `terms` has "task" and
    "attention_consistency", f32[B]. `ops` are the operations that the model
    uses on its parameters, from the engine (see `privacy.clipping`).
  """

  def loss_fn(params, batch, ops: param_ops.ParamOps = param_ops.PLAIN):
    own = model.clone(ops=ops)
    noise = attention_noise(config, batch["key"])
    logits, measured = _apply(own, params, batch, noise=noise)
    task = cross_entropy(logits, batch["targets"], batch["loss_mask"])
    task = measuring.or_measured(task, measured)
    divergence = jnp.zeros_like(task)
    if noise is not None and config.consistency_weight > 0:
      clean = predict(own, params, batch, noise=None)
      divergence = consistency(clean, logits, batch["loss_mask"])
    terms = {"task": task, "attention_consistency": divergence}
    return task + config.consistency_weight * divergence, terms

  return loss_fn


def _masked_mean(
  values: Float[Array, "B _"], mask: Float[Array, "B T"]
) -> Float[Array, " B"]:
  """Mean over the masked positions; 0 where there are none (padding)."""
  return (values * mask).sum(axis=-1) / jnp.maximum(mask.sum(axis=-1), 1.0)
