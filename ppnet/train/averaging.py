"""An average of the parameters of all steps, released in their place.

Polyak and Juditsky 1992, "Acceleration of stochastic approximation by
averaging", for averages; De et al. 2022, "Unlocking high-accuracy
differentially private image classification through scale", section 4.3
(https://arxiv.org/abs/2204.13650), for exponential moving averages under
DP-SGD. Noise of many steps averages out, and a larger learning rate can be
afforded.

It costs no privacy: the parameters after each step are functions of noisy sums
that the accountant has paid for already, and so is what is computed from them
(post-processing). Gradients are taken at the parameters themselves, as ever.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

PyTree = Any


def decay_at(step: Int[Array, ""], *, decay: float) -> Float[Array, ""]:
  """Share of the average that the step leaves: min(decay, (1 + t) / (10 + t)).

  Early averages forget the initial parameters sooner.

  Args:
    step: t, the number of steps taken before this one.
    decay: the largest share, in (0, 1).

  | t | result, for a decay of 0.95 |
  | --- | --- |
  | 0 | 0.1 |
  | 170 | 0.95 |
  | 171 and later | 0.95 |
  """
  t = jnp.asarray(step, jnp.float32)
  return jnp.minimum(jnp.float32(decay), (1 + t) / (10 + t))


def update(
  average: PyTree, params: PyTree, step: Int[Array, ""], *, decay: float
) -> PyTree:
  """The average after a step: d * average + (1 - d) * params, float32.

  Args:
    average: before the step, as the parameters.
    params: after the step.
    step: number of steps taken before this one.
    decay: see `decay_at`, which gives d.
  """
  keep = decay_at(step, decay=decay)
  return jax.tree.map(
    lambda old, new: (keep * old + (1 - keep) * new).astype(old.dtype),
    average,
    params,
  )
