"""Features times a power of how rare they are, which one step measures.

Words that most texts have tell little apart and take most of the norm. Their
counterpart in search is the inverse document frequency (Spärck Jones 1972,
https://doi.org/10.1108/eb026526). Here, with u_i the features of norm 1 and m
their mean as the first step measured it, noise included,

    x_i = u_i (max(m, 0) + floor)^-power, feature by feature, norm 1 again.

How a step measures is in `models.measuring`; the loss of this one is that of
`models.centring`. Before it m is 0 and x_i is u_i.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ppnet.core import param_ops
from ppnet.models import centring


class Rarity(nn.Module):
  """The weighted features of norm 1; sows what its step minimises.

  Attributes:
    power: of what a mean feature is, with `floor` on top.
    floor: keeps the noise of the mean from making a feature too large.
    ops: implementation of the parametrised operations.
  """

  power: float
  floor: float
  ops: param_ops.ParamOps

  @nn.compact
  def __call__(self, u: Float[Array, "B D"]) -> Float[Array, "B D"]:
    """Weights the features, and lets no gradient of what follows through.

    Args:
      u: features of norm 1, or zeros.
    """
    shift, _ = centring.measure(self, u, self.ops)
    mean = jnp.maximum(-jax.lax.stop_gradient(shift), 0.0)
    weights = (mean + self.floor) ** -self.power
    return jax.lax.stop_gradient(centring.scaled(u * weights[None], norm=1.0))
