"""A linear classifier on fixed features: what a network must beat.

Tramèr and Boneh 2021, section 3 (https://arxiv.org/abs/2011.11660): features
that no record was used for, each record's normalised by itself, and one matrix.
It stands in PPNet's place and speaks its language: the classes are the tokens
of the answers, so losses, engines, evaluation and attacks are the same.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ppnet import config as config_lib
from ppnet.core import checks, param_ops
from ppnet.models import centring, flattening, layers, measuring

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
  ) -> Float[Array, "B T V"]:
    """The same logits at every position, float32; only media are read.

    Args:
      tokens: for their shape.
      media: modality to one item per example: [B, H, W, C] or [B, F, M].
      **unused: what PPNet has beside them: noise, keys, positions.

    Raises:
      ValueError: no media, or groups that do not divide the feature maps.
    """
    del unused
    if not media:
      checks.fail("a picture or a sound for a linear model", media=list(media))
    num_examples = tokens.shape[0]
    parts = []
    for name in sorted(media):
      values = media[name].astype(jnp.float32)
      if name == "image":
        values = layers.group_norm(values, num_groups=self.config.num_groups)
      parts.append(values.reshape(num_examples, -1))
    features = jnp.concatenate(parts, axis=1)
    if self.config.centre:
      features = self._measured(features) * self.config.feature_norm
    else:
      features = centring.scaled(features, norm=self.config.feature_norm)
    ones = jnp.ones((num_examples, 1))  # Its weights are the bias.
    features = jnp.concatenate([features, ones], axis=1)
    logits = layers.Dense(
      len(self.answer_ids), (None, None), self.ops, init_scale=0.0, name="head"
    )(features[:, None, :])  # [B, 1, classes]
    over_all = jnp.full((num_examples, 1, self.vocab_size), _NEVER)
    over_all = over_all.at[:, :, jnp.array(self.answer_ids)].set(logits)
    return jnp.broadcast_to(over_all, (*tokens.shape, self.vocab_size))

  def _measured(self, features: Float[Array, "B D"]) -> Float[Array, "B D"]:
    """Features of norm 1 less their mean; and flat, then likewise again.

    The first step measures the mean, the next ones the directions that are made
    smaller, and one more the mean of what that gives.
    """
    unit = centring.scaled(features, norm=1.0)
    moved = centring.Centre(self.ops, name=measuring.stage(0))(unit)
    if not self.config.num_directions:
      return moved
    found = None
    for number in range(1, 1 + self.config.num_power_steps):
      found = flattening.PowerStep(
        self.config.num_directions, self.ops, name=measuring.stage(number)
      )(moved, found)
    assert found is not None, "validated: one step at least"
    flat = centring.scaled(flattening.flattened(moved, found), norm=1.0)
    last = measuring.stage(1 + self.config.num_power_steps)
    return centring.Centre(self.ops, name=last)(flat)
