"""Features less their mean, which one step measures privately.

What all records have in common tells no classes apart, but it takes its part of
each gradient's norm, and so of the clip norm, and the noise along it is the
same for every record. The loss of the step that measures it is

    l_i = <u_i + shift, u_i>    with u_i held constant on the right,

whose gradient is u_i for the parameter `shift` and 0 for all others: see
`models.measuring`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ppnet.core import param_ops
from ppnet.models import measuring

PARAMETER = "shift"

_SMALLEST = 1e-12  # A norm below it is a constant picture's.


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


def measure(
  module: nn.Module, u: Float[Array, "B D"], ops: param_ops.ParamOps
) -> tuple[Float[Array, " D"], Float[Array, "B D"]]:
  """Has a step measure the mean of u, in the `nn.compact` call of `module`.

  Args:
    module: has the parameter, and sows what its step minimises.
    u: features, of a norm that the clip norm leaves whole.
    ops: implementation of the parametrised operations.

  Returns:
    (shift: minus the mean, or zeros before it is measured; u + shift).
  """
  shift = measuring.parameter(module, PARAMETER, u.shape[-1:])
  name = "/".join((*module.path, PARAMETER))
  # With the axis of tokens that the engines' rules expect.
  moved = ops.bias(name, shift, u[:, None, :])[:, 0]
  measuring.sow(module, (moved * jax.lax.stop_gradient(u)).sum(axis=-1), shift)
  return shift, moved


class Centre(nn.Module):
  """u + shift; sows what its step minimises.

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
    return jax.lax.stop_gradient(measure(self, u, self.ops)[1])
