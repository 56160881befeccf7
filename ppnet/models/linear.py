"""A linear classifier on fixed features: what a network must beat.

Tramèr and Boneh 2021, section 3 (https://arxiv.org/abs/2011.11660): features
that no record was used for, each record's normalised by itself, and one matrix.
Of a text the features are its words. It stands in PPNet's place and speaks its
language: the classes are the tokens of the answers, so losses, engines,
evaluation and attacks are the same.
"""

import itertools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ppnet import config as config_lib
from ppnet.core import checks, param_ops
from ppnet.models import (
  centring,
  flattening,
  layers,
  leading,
  measuring,
  rarity,
  words,
)

_NEVER = -1e9  # Logit of a token that is no answer; its exponential is 0.


class LinearClassifier(nn.Module):
  """Features times one matrix: logits of the answers.

  The matrix begins at zero: every answer is equally likely, whatever the
  features, and no scale has to be chosen.

  Attributes:
    config: what is done to the features.
    vocab_size: V.
    answer_ids: tokens of the classes, in order.
    ops: implementation of the parametrised operations.
    cut: never; there is no hidden state.
  """

  config: config_lib.LinearConfig
  vocab_size: int
  answer_ids: tuple[int, ...]
  ops: param_ops.ParamOps = param_ops.PLAIN
  cut: Any = None

  @nn.compact
  def __call__(
    self,
    tokens: Int[Array, "B T"],
    *,
    media: Mapping[str, Array],
    **unused: Any,
  ) -> Float[Array, "B 1 V"]:
    """Logits of the answer, float32: the same wherever it stands.

    Args:
      tokens: where `config.words` asks for them, the text up to the answer.
      media: modality to one item per example: [B, H, W, C] or [B, F, M].
      **unused: what PPNet has beside them: noise, keys, positions.

    Raises:
      ValueError: no features, or groups that do not divide the feature maps.
    """
    del unused
    num_examples = tokens.shape[0]
    parts = []
    for name in sorted(media):
      values = media[name].astype(jnp.float32)
      if name == "image":
        values = layers.group_norm(values, num_groups=self.config.num_groups)
      parts.append(values.reshape(num_examples, -1))
    if self.config.words is not None:
      parts.append(
        words.bag(tokens, self.config.words, answer_ids=self.answer_ids)
      )
    if not parts:
      checks.fail(
        "a picture, a sound or words for a linear model",
        "Of texts alone, set --config.model.linear.words=build.",
        media=list(media),
      )
    features = jnp.concatenate(parts, axis=1)
    if config_lib.is_measured(self.config):
      features = self._measured(features) * self.config.feature_norm
    else:
      features = centring.scaled(features, norm=self.config.feature_norm)
    ones = jnp.ones((num_examples, 1))  # Its weights are the bias.
    features = jnp.concatenate([features, ones], axis=1)
    logits = layers.Dense(
      len(self.answer_ids), (None, None), self.ops, init_scale=0.0, name="head"
    )(features[:, None, :])  # [B, 1, classes]
    over_all = jnp.full((num_examples, 1, self.vocab_size), _NEVER)
    return over_all.at[:, :, jnp.array(self.answer_ids)].set(logits)

  def _measured(self, features: Float[Array, "B D"]) -> Float[Array, "B D"]:
    """Features of norm 1, weighted, less their mean, flat, as configured.

    A step each measures the mean that weights them and the mean that is taken
    away, the next ones the covariance of the first features and the directions
    that are made smaller, and one more the mean of what that gives.

    Raises:
      ValueError: fewer features than `num_leading`.
    """
    config = self.config
    numbers = itertools.count()

    def stage() -> str:
      return measuring.stage(next(numbers))

    unit = centring.scaled(features, norm=1.0)
    if config.rarity_power:
      unit = rarity.Rarity(
        config.rarity_power, config.rarity_floor, self.ops, name=stage()
      )(unit)
    if not config.centre:
      return unit
    moved = centring.Centre(self.ops, name=stage())(unit)
    if not config.num_leading and not config.num_directions:
      return moved
    if config.num_leading:
      checks.at_most(
        moved.shape[-1],
        "There are no more features.",
        **{"model.linear.num_leading": config.num_leading},
      )
      first = moved[:, : config.num_leading]
      covariances = [
        leading.Covariance(self.ops, name=stage())(first)
        for _ in range(config.num_leading_steps)
      ]
      moved = leading.flattened(moved, covariances, floor=config.leading_floor)
    if config.num_directions:
      found = None
      for _ in range(config.num_power_steps):
        found = flattening.PowerStep(
          config.num_directions, self.ops, name=stage()
        )(moved, found)
      assert found is not None, "validated: one step at least"
      moved = flattening.flattened(moved, found)
    flat = centring.scaled(moved, norm=1.0)
    return centring.Centre(self.ops, name=stage())(flat)
