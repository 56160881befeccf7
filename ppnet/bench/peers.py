"""Clipped sums by other JAX libraries, on our model and loss.

None of them is needed by the package; where one is missing its row says so.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import jax

PyTree = Any
LossFn = Callable[..., jax.Array]
Step = Callable[..., tuple[PyTree, jax.Array]]

EXTRA = "peers"


def missing(*packages: str) -> str:
  """What to install if one of `packages` is not there; nothing if all are.

  >>> missing("jax"), missing("jax", "no_such_package")
  ('', "not installed: no_such_package; pip install 'ppnet[peers]'")
  """
  absent = [name for name in packages if importlib.util.find_spec(name) is None]
  if not absent:
    return ""
  return f"not installed: {', '.join(absent)}; pip install 'ppnet[{EXTRA}]'"


def jax_privacy_step(
  loss_fn: LossFn, *, l2_clip_norm: float, microbatch_size: int | None
) -> Step:
  """JAX-Privacy's `clipped_grad`, its other options at their defaults.

  Args:
    loss_fn: `loss_fn(params, batch) -> losses f32[B]`.
    l2_clip_norm: C.
    microbatch_size: handed on.

  Returns:
    `step(params, batch) -> (grad_sum, losses)`.
  """
  from jax_privacy import clipping

  grad_fn = clipping.clipped_grad(
    lambda params, batch: loss_fn(params, batch)[0],  # Of one example.
    l2_clip_norm=l2_clip_norm,
    return_values=True,
    microbatch_size=microbatch_size,
  )

  def step(params, batch):
    grad_sum, aux = grad_fn(params, batch)
    return grad_sum, aux.values

  return step


def optax_step(loss_fn: LossFn, *, l2_clip_norm: float) -> Step:
  """optax's `differentially_private_aggregate` of `vmap`ped gradients.

  It cannot do without noise: what it draws is multiplied by 0 here, and the
  drawing is in its time. It divides by the number of examples, which is made
  good, in one product per parameter.

  Args:
    loss_fn: `loss_fn(params, batch) -> losses f32[B]`.
    l2_clip_norm: C.

  Returns:
    `step(params, (batch, key data)) -> (grad_sum, losses)`: a key in the
    program itself would let the compiler draw the noise.
  """
  from optax import contrib

  def one_loss(params, example):
    example = jax.tree.map(lambda leaf: leaf[None], example)
    return loss_fn(params, example)[0]

  def step(params, batch_and_key):
    batch, key_data = batch_and_key
    # Banned elsewhere for what it does to privacy; here it is the subject.
    tx = contrib.differentially_private_aggregate(  # noqa: TID251
      l2_norm_clip=l2_clip_norm,
      noise_multiplier=0.0,
      key=jax.random.wrap_key_data(key_data),
    )
    losses, grads = jax.vmap(jax.value_and_grad(one_loss), in_axes=(None, 0))(
      params, batch
    )
    mean, _ = tx.update(grads, tx.init(params))
    return jax.tree.map(lambda g: g * losses.shape[0], mean), losses

  return step
