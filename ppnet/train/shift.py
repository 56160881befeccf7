"""What the step that measures a mean does to the parameters; no other step.

See `models.centring`.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ppnet.models import centring

PyTree = Any


def of_updates(updates: PyTree, mean_grad: PyTree, params: PyTree) -> PyTree:
  """The optimizer's updates, with the shift's own rule in their place.

  | step | the shift's update | the others' |
  | --- | --- | --- |
  | the one that measures | minus the noisy mean: no learning rate | 0 |
  | a later one | 0 | the optimizer's |
  | a model without a shift | none | the optimizer's |

  Args:
    updates: of the optimizer.
    mean_grad: the noisy sum over the expected batch size.
    params: before the step.

  Returns:
    What to add to the parameters.
  """
  if centring.NAME not in params:
    return updates
  pending = centring.is_pending(params[centring.NAME][centring.PARAMETER])

  def later(update):
    return jnp.where(pending, jnp.zeros_like(update), update)

  chosen = {
    name: jax.tree.map(later, part)
    for name, part in updates.items()
    if name != centring.NAME
  }
  chosen[centring.NAME] = jax.tree.map(
    lambda g: jnp.where(pending, -g, jnp.zeros_like(g)),
    mean_grad[centring.NAME],
  )
  return chosen
