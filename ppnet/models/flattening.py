"""Features whose largest directions are made as small as the next.

Where a few directions hold most of the features' variance, the learning rate
that suits the others makes these swing. Here the k largest are found by the
noisy power method (Hardt and Price 2014, https://arxiv.org/abs/1311.2495,
algorithm 1): with U of k orthonormal columns, a step measures

    Y = mean of x_i (x_i^T U) + noise,    the next U spans the columns of Y,

and the singular values of the last Y are the variances along its left singular
vectors, up to the scale of the first. Of unit vectors x_i no summand is longer
than 1, so that none is clipped. The first U is random, and x_i^T U about
sqrt(k / D) long: there the summands are made longer, and few are clipped.

How a step measures is in `models.measuring`; the loss of this one is

    l_i = - scale <x_i V, x_i U>    with x_i U held constant, V the parameter.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ppnet.core import param_ops
from ppnet.models import measuring

PARAMETER = "directions"

# The first step's summands are about this long. Then 0.1 % of the records of
# Fashion-MNIST are clipped.
_FIRST_NORM = 0.7
_SMALLEST = 1e-30  # Keeps what is not measured yet, all zeros, finite.
_START_SEED = 0  # Of a constant that no record has a part in.


def singular(
  y: Float[Array, "D k"],
) -> tuple[Float[Array, "D k"], Float[Array, " k"]]:
  """Left singular vectors and singular values of a tall matrix, largest first.

  By the eigenvectors of y^T y, which is small. Of zeros both are zeros.
  """
  gram = jnp.einsum("dk,dl->kl", y, y, precision=jax.lax.Precision.HIGHEST)
  squares, right = jnp.linalg.eigh(gram)
  values = jnp.sqrt(jnp.maximum(squares, _SMALLEST))[::-1]
  left = jnp.matmul(y, right[:, ::-1], precision=jax.lax.Precision.HIGHEST)
  return left / values[None], jnp.where(values**2 > _SMALLEST, values, 0.0)


def flattened(
  x: Float[Array, "B D"], y: Float[Array, "D k"]
) -> Float[Array, "B D"]:
  """x with its variance along k directions as small as along the last of them.

  | edge case | result |
  | --- | --- |
  | `y` all zeros: not measured yet | x |

  Args:
    x: features without their mean.
    y: a measured Y; see the file's heading.
  """
  directions, variances = singular(y)
  largest = jnp.maximum(variances, np.sqrt(_SMALLEST))
  factors = jnp.sqrt(largest[-1] / largest)
  along = jnp.matmul(x, directions, precision=jax.lax.Precision.HIGHEST)
  return x - jnp.matmul(
    along * (1 - factors)[None],
    directions.T,
    precision=jax.lax.Precision.HIGHEST,
  )


class PowerStep(nn.Module):
  """One step of the noisy power method; sows what that step minimises.

  Attributes:
    num_directions: k.
    ops: implementation of the parametrised operations.
  """

  num_directions: int
  ops: param_ops.ParamOps

  @nn.compact
  def __call__(
    self, x: Float[Array, "B D"], last: Float[Array, "D k"] | None
  ) -> Float[Array, "D k"]:
    """The measured Y, or zeros before it is.

    Args:
      x: features without their mean; before that they had norm 1.
      last: Y of the step before; None begins with a random U.
    """
    shape = (x.shape[-1], self.num_directions)
    parameter = measuring.parameter(self, PARAMETER, shape)
    if last is None:
      random = np.random.default_rng(_START_SEED).standard_normal(shape)
      start = jnp.asarray(np.linalg.qr(random)[0], jnp.float32)
      scale = _FIRST_NORM * np.sqrt(shape[0] / shape[1])
    else:
      start, scale = singular(last)[0], 1.0
    along = jax.lax.stop_gradient(x @ start)
    name = "/".join((*self.path, PARAMETER))
    # With the axis of tokens that the engines' rules expect.
    out = self.ops.dense(name, parameter, x[:, None, :])[:, 0]
    measuring.sow(self, -scale * (out * along).sum(axis=-1), parameter)
    return jax.lax.stop_gradient(parameter)
