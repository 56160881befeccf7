"""Features less their mean, which the first step measures privately.

What all records have in common tells no classes apart, but it takes its part of
each gradient's norm, and so of the clip norm, and the noise along it is the
same for every record. Tramèr and Boneh 2021
(https://arxiv.org/abs/2011.11660, section 3.3) estimate it before training and
pay for that release beside the steps. Here it is a step: the loss of step 0 is

    l_i = <u_i + shift, u_i>    with u_i held constant on the right,

whose gradient is u_i for the parameter `shift` and 0 for all others. So the
clipped, noisy sum of that step over the expected batch size is a private mean,
and `train.shift` makes `shift` the negative of it, once. It is a step like any
other for sampler, clipping, noise and ledger; nothing else is released, and the
accountant need not know.

Whether the step is still to be taken is read from `shift` itself, which begins
at exactly zero and which noise leaves there with probability 0.
"""

from collections.abc import Mapping
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ppnet.core import param_ops

NAME = "centre"  # Of the module, and so of its part of the parameters.
PARAMETER = "shift"
COLLECTION = "measured"  # Of what is sown.
LOSS = "loss"

_SMALLEST = 1e-12  # A norm below it is a constant picture's.


def is_pending(shift: Float[Array, " D"]) -> Bool[Array, ""]:
  """Whether the mean is still to be measured."""
  return jnp.all(shift == 0)


def scaled(x: Float[Array, "B D"], *, norm: float) -> Float[Array, "B D"]:
  """Each row times what gives it the Euclidean norm `norm`.

  | edge case | result |
  | --- | --- |
  | a row of zeros | zeros |
  | `norm` 0 | x |
  """
  if norm == 0:
    return x
  length = jnp.linalg.norm(x, axis=-1, keepdims=True)
  return x * (norm / jnp.maximum(length, _SMALLEST))


def or_measured(
  task: Float[Array, " B"], measured: Mapping[str, Any]
) -> Float[Array, " B"]:
  """The losses of a step: of the task, or while it is pending of the mean.

  Args:
    task: of each example.
    measured: what the model sowed; empty where it has no centre.
  """
  if not measured:
    return task
  ((loss, pending),) = measured[NAME][LOSS]
  return jnp.where(pending, loss, task)


class Centre(nn.Module):
  """u + shift; sows what step 0 minimises.

  Attributes:
    ops: implementation of the parametrised operations.
  """

  ops: param_ops.ParamOps

  @nn.compact
  def __call__(self, u: Float[Array, "B D"]) -> Float[Array, "B D"]:
    """Moves the features, and lets no gradient of what follows through.

    Args:
      u: features, of a norm that the clip norm leaves whole.
    """
    shift = cast(  # Linen declares the box; apply() unboxes.
      jax.Array,
      self.param(
        PARAMETER,
        nn.with_logical_partitioning(nn.initializers.zeros, (None,)),
        u.shape[-1:],
      ),
    )
    name = "/".join((*self.path, PARAMETER))
    # With the axis of tokens that the engines' rules expect.
    moved = self.ops.bias(name, shift, u[:, None, :])[:, 0]
    constant = jax.lax.stop_gradient(u)
    loss = (moved * constant).sum(axis=-1)
    pending = is_pending(jax.lax.stop_gradient(shift))
    self.sow(COLLECTION, LOSS, (loss, jnp.broadcast_to(pending, loss.shape)))
    return jax.lax.stop_gradient(moved)
