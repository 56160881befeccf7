"""Features whose largest directions, among the first of them, are made smaller.

Where a prior has put the features in order (`data.whitening`), those that come
first hold most of what it is wrong about. Among the first k alone a covariance
can be measured whole, at a cost in noise that k decides and not the number of
features: with z_i the first k of what `models.centring` leaves, a step measures

    S = mean of scale z_i z_i^T + noise,

the mean of the steps' S is taken, made symmetric, and z_i is multiplied by the
matrix with its eigenvectors and the factors

    min(1, sqrt(floor / eigenvalue)),

so that no variance among them is above `floor`. A floor well below the noise of
an eigenvalue, sigma sqrt(2 k / steps) / (scale batch size), makes noise small
in place of features. This is the private covariance of Dwork et al. 2014,
"Analyze Gauss" (https://doi.org/10.1145/2591796.2591883), algorithm 1, for
clipped summands and a sampled batch.

How a step measures is in `models.measuring`; the loss of this one is

    l_i = - scale <z_i S, z_i>    with S the parameter, z_i held constant.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ppnet.core import param_ops
from ppnet.models import measuring

PARAMETER = "covariance"

# Of features of norm 1 the first ones' squared norm is well below 1. The longer
# the summands, the smaller the noise beside them, and the more are clipped.
_SCALE = 1.5
_SMALLEST = 1e-12


class Covariance(nn.Module):
  """A step's measurement of S; sows what that step minimises.

  Attributes:
    ops: implementation of the parametrised operations.
  """

  ops: param_ops.ParamOps

  @nn.compact
  def __call__(self, z: Float[Array, "B k"]) -> Float[Array, "k k"]:
    """The measured S over `scale`, or zeros before it is measured.

    Args:
      z: the first features without their mean; with all others they had norm 1.
    """
    shape = (z.shape[-1], z.shape[-1])
    parameter = measuring.parameter(self, PARAMETER, shape)
    name = "/".join((*self.path, PARAMETER))
    # With the axis of tokens that the engines' rules expect.
    out = self.ops.dense(name, parameter, z[:, None, :])[:, 0]
    along = jax.lax.stop_gradient(z)  # Of the centring's shift.
    measuring.sow(self, -_SCALE * (out * along).sum(axis=-1), parameter)
    return jax.lax.stop_gradient(parameter) / _SCALE


def flattened(
  x: Float[Array, "B D"],
  covariances: Sequence[Float[Array, "k k"]],
  *,
  floor: float,
) -> Float[Array, "B D"]:
  """x with no variance above `floor` among its first k features.

  | edge case | result |
  | --- | --- |
  | all zeros: not measured yet | x |
  | a direction of negative variance, which is noise | left as it is |

  Args:
    x: features without their mean.
    covariances: of the first k, as several steps measured them.
    floor: in units of x squared.
  """
  mean = jnp.stack(covariances).mean(axis=0)
  variances, directions = jnp.linalg.eigh((mean + mean.T) / 2)
  factors = jnp.sqrt(floor / jnp.maximum(variances, max(floor, _SMALLEST)))
  first, rest = jnp.split(x, [len(mean)], axis=-1)
  highest = jax.lax.Precision.HIGHEST
  along = jnp.matmul(first, directions, precision=highest) * factors[None]
  first = jnp.matmul(along, directions.T, precision=highest)
  return jnp.concatenate([first, rest], axis=-1)
