"""What the steps that measure do to the parameters; no other step.

See `models.measuring`.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ppnet.models import measuring

PyTree = Any


def task_grad(mean_grad: PyTree, params: PyTree) -> PyTree:
  """What the optimizer sees of a noisy mean: zeros while a step measures.

  Those steps say nothing about the task, and their noise is kept out of the
  optimizer's moments. What is measured is never the optimizer's.

  Args:
    mean_grad: the noisy sum over the expected batch size.
    params: before the step.
  """
  names = measuring.stages(params)
  if not names:
    return mean_grad
  is_task = jnp.logical_not(_any_pending(params, names))

  def kept(name, part):
    keep = jnp.logical_and(is_task, name not in names)
    return jax.tree.map(lambda g: jnp.where(keep, g, jnp.zeros_like(g)), part)

  return {name: kept(name, part) for name, part in mean_grad.items()}


def of_updates(updates: PyTree, mean_grad: PyTree, params: PyTree) -> PyTree:
  """The optimizer's updates, with the rule of what is measured in their place.

  | step | the first pending stage's update | other stages' | all others' |
  | --- | --- | --- | --- |
  | one that measures | minus the noisy mean, as it is | 0 | 0 |
  | a later one | none is pending | 0 | the optimizer's |
  | a model without stages | | | the optimizer's |

  Args:
    updates: of the optimizer.
    mean_grad: the noisy sum over the expected batch size.
    params: before the step.

  Returns:
    What to add to the parameters.
  """
  names = measuring.stages(params)
  if not names:
    return updates
  chosen = {}
  are_done = jnp.bool_(True)  # All stages before this one.
  for name in names:
    is_pending = measuring.is_pending(params[name])
    now = jnp.logical_and(are_done, is_pending)
    chosen[name] = jax.tree.map(
      lambda g, now=now: jnp.where(now, -g, jnp.zeros_like(g)), mean_grad[name]
    )
    are_done = jnp.logical_and(are_done, jnp.logical_not(is_pending))
  for name, part in updates.items():
    if name not in chosen:
      chosen[name] = jax.tree.map(
        lambda u: jnp.where(are_done, u, jnp.zeros_like(u)), part
      )
  return chosen


def _any_pending(params: PyTree, names: list[str]) -> jax.Array:
  """Whether a step would measure."""
  return jnp.stack([measuring.is_pending(params[name]) for name in names]).any()
