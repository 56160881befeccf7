"""Scores of records under models: what a membership attack is made of.

All are oriented so that a higher one says "member". With p(y) the probability
that a model gives a token at one of the record's positions that count (one
under CLASSIFY, the text's own under the other tasks), and means taken over
those positions:

| name | score of a record |
| --- | --- |
| loss | mean log p(y): minus the loss (Yeom et al. 2018, adversary 2, |
| | https://arxiv.org/abs/1709.01604) |
| margin | mean of log p(y) - log sum over y' != y of p(y') (Carlini et al. |
| | 2022, section VI.A, https://arxiv.org/abs/2112.03570) |
| gradient_norm | minus the l2 norm of the loss's gradient |
| min_k | mean of the smallest 20 % of the log p(y) (Shi et al. 2023, eq. 1, |
| | https://arxiv.org/abs/2310.16789) |
| min_k_plus_plus | the same of (log p(y) - mu) / sigma, mu and sigma of |
| | log p(z) with z drawn from p (Zhang et al. 2024, eq. 3, |
| | https://arxiv.org/abs/2404.02936) |
| zlib | minus the loss over the bytes of the compressed text (Carlini et al. |
| | 2020, section 5.2, https://arxiv.org/abs/2012.07805) |

The last three are of texts, and there are none of them under CLASSIFY.

Everything is computed from margins. 1 - p(y) has no digits left in float32 once
p(y) is 1 to seven digits, as it is for what a model has memorised; the margin
has all of them, and log p(y) = -log(1 + exp(-margin)) keeps them.
"""

import zlib as zlib_lib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ppnet import config as config_lib
from ppnet.audit import pool as pool_lib
from ppnet.audit import score_table, shadows, side_by_side
from ppnet.models import lora
from ppnet.privacy import clipping
from ppnet.train import losses as losses_lib
from ppnet.train import program as program_lib
from ppnet.train import step as step_lib

MIN_K_SHARE = 0.2
Decode = Callable[[Sequence[int]], str]

# Keeps a sure prediction, whose log p(z) does not vary, from dividing by zero.
_MIN_VARIANCE = 1e-12


def margins(
  logits: Float[Array, "B _ V"], targets: Int[Array, "B T"]
) -> Float[Array, "B T"]:
  """log p(y) - log(1 - p(y)) at each position, without forming either."""
  is_target = jax.nn.one_hot(targets, logits.shape[-1], dtype=jnp.bool_)
  others = jax.nn.logsumexp(jnp.where(is_target, -jnp.inf, logits), axis=-1)
  own = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  return own - others


def normalised(
  logits: Float[Array, "B _ V"], log_probs: Float[Array, "B T"]
) -> Float[Array, "B T"]:
  """(log p(y) - mu) / sigma at each position (Zhang et al. 2024, eq. 3)."""
  all_of_them = jax.nn.log_softmax(logits, axis=-1)
  probs = jnp.exp(all_of_them)
  mean = (probs * all_of_them).sum(axis=-1)
  variance = (probs * jnp.square(all_of_them - mean[..., None])).sum(axis=-1)
  return (log_probs - mean) / jnp.sqrt(jnp.maximum(variance, _MIN_VARIANCE))


def smallest_mean(
  values: Float[Array, "B T"], mask: Float[Array, "B T"]
) -> Float[Array, " B"]:
  """Mean of the smallest `MIN_K_SHARE` of each row's counted values.

  At least one of them, and the share rounded down; 0 where nothing counts.
  """
  counted = mask > 0
  ordered = jnp.sort(jnp.where(counted, values, jnp.inf), axis=-1)
  size = counted.sum(axis=-1)
  # The slack keeps 5 * 0.2 from falling below 1.
  keep = jnp.floor(size * MIN_K_SHARE + 1e-4).astype(jnp.int32)
  keep = jnp.clip(keep, jnp.minimum(size, 1), size)
  is_kept = jnp.arange(values.shape[-1])[None] < keep[:, None]
  total = jnp.where(is_kept, ordered, 0.0).sum(axis=-1)
  return total / jnp.maximum(keep, 1)


def of_logits(
  logits: Float[Array, "B _ V"],
  targets: Int[Array, "B T"],
  loss_mask: Float[Array, "B T"],
  *,
  is_text: bool,
) -> dict[str, Float[Array, " B"]]:
  """The scores that a model's predictions alone give."""
  counted = jnp.maximum(loss_mask.sum(axis=-1), 1.0)
  mean = lambda values: (
    jnp.where(loss_mask > 0, values * loss_mask, 0.0).sum(axis=-1) / counted
  )
  margin = margins(logits, targets)
  log_probs = jax.nn.log_sigmoid(margin)
  found = {"loss": mean(log_probs), "margin": mean(margin)}
  if is_text:
    found["min_k"] = smallest_mean(log_probs, loss_mask)
    found["min_k_plus_plus"] = smallest_mean(
      normalised(logits, log_probs), loss_mask
    )
  return found


def compressed_sizes(pool: pool_lib.Pool, decode: Decode) -> np.ndarray:
  """Bytes of each record's counted text after zlib, f64[n].

  Of the tokens that the loss counts, so that a planted text is itself.
  """
  targets, masks = pool.rows["targets"], pool.rows["loss_mask"]
  return np.array(
    [
      len(zlib_lib.compress(decode(own[mask > 0].tolist()).encode()))
      for own, mask in zip(targets, masks, strict=True)
    ],
    np.float64,
  )


class Scorer:
  """Scores records under M models at a time; compiled once for each pool size.

  Models predict as in an evaluation: nothing is dropped, and attention noise is
  on only where the configuration keeps it on.
  """

  def __init__(
    self,
    config: config_lib.ExperimentConfig,
    program: program_lib.Program,
    *,
    num_models: int,
    decode: Decode,
    devices: Sequence[jax.Device] | None = None,
  ):
    """Compiles nothing yet.

    Args:
      config: the experiment.
      program: of it; its network and what is frozen.
      num_models: M.
      decode: tokens to text, of the tokenizer.
      devices: all of this process when None.
    """
    self._decode = decode
    self._batch_size = config.perf.microbatch_size
    self._is_text = config.data.task is not config_lib.Task.CLASSIFY
    self._model = program.model
    self._noise_config = config.attention_noise
    self._loss_fn = losses_lib.make_loss_fn(
      program.model, config_lib.AttentionNoiseConfig()
    )
    self._engine = config.perf.engine
    self._beside = side_by_side.SideBySide(
      program,
      num_models=num_models,
      microbatch_size=self._batch_size,
      devices=devices,
    )
    # A bound method is another object each time it is asked for.
    self._fn = self._of_batch

  def __call__(
    self, params: Any, roots: np.ndarray, pool: pool_lib.Pool
  ) -> dict[str, np.ndarray]:
    """All scores of every record under every model, f64[M, n] by name.

    Args:
      params: leaves [M, ...]. One finished model's have the shape [1, ...].
      roots: words of the roots of the models' attention noise, u32[M, 2]: a
        group's `init_roots`, or `side_by_side.key_words([config.seed])`.
      pool: n records.
    """
    found = self._beside.over_records(
      self._fn,
      params,
      roots,
      pool,
      batch_size=min(self._batch_size, len(pool)),
    )
    scores = {
      name: np.asarray(array, np.float64) for name, array in found.items()
    }
    if self._is_text:
      sizes = compressed_sizes(pool, self._decode)
      scores["zlib"] = scores["loss"] / sizes[None]
    return scores

  def _of_batch(
    self,
    params: Any,
    batch: Mapping[str, Array],
    root_key: Array,
    frozen: Any,
  ) -> dict[str, Array]:
    """The scores of a batch under one model."""
    logits = step_lib.predict(
      lora.combine(params, frozen or {}),
      batch,
      root_key,
      model=self._model,
      noise_config=self._noise_config,
    )
    found = of_logits(
      logits, batch["targets"], batch["loss_mask"], is_text=self._is_text
    )
    # Keys are among what a loss is given; without noise none is used.
    seen = dict(step_lib.grad_batch(batch, root_key, jnp.int32(0)))
    del seen["dropout_key"]
    norms = clipping.clipped_grad(
      lora.with_frozen(self._loss_fn, frozen or {}),
      l2_clip_norm=1.0,
      engine=self._engine,
      has_aux=True,
    )(params, seen).grad_norms
    return {**found, "gradient_norm": -norms}


def table(
  config: config_lib.ExperimentConfig,
  trained: shadows.Shadows,
  pool: pool_lib.Pool,
  *,
  decode: Decode,
  devices: Sequence[jax.Device] | None = None,
) -> score_table.ScoreTable:
  """Every record of the pool under every shadow model, a group at a time.

  Args:
    config: the experiment.
    trained: from `shadows.train`.
    pool: the records that its design is of.
    decode: tokens to text, of the tokenizer.
    devices: all of this process when None.
  """
  scorers: dict[int, Scorer] = {}
  parts: list[Mapping[str, np.ndarray]] = []
  for group in trained.groups():
    size = len(group.models)
    if size not in scorers:
      scorers[size] = Scorer(
        config,
        trained.program,
        num_models=size,
        decode=decode,
        devices=devices,
      )
    parts.append(scorers[size](group.params, group.init_roots, pool))
  return score_table.ScoreTable(
    scores={
      name: np.concatenate([part[name] for part in parts]) for name in parts[0]
    },
    membership=trained.design.membership,
    record_ids=tuple(pool.record_ids),
    groups=pool.groups,
    partner=trained.design.partner,
  )
