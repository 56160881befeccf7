"""Statistics of the features that the first steps measure privately.

Tramèr and Boneh 2021 (https://arxiv.org/abs/2011.11660, section 3.3) estimate
statistics of the features before training and pay for that release beside the
steps. Here each is a step: its loss is linear in a parameter that begins at
zero, so that the per-example gradient is minus what is to be averaged (or plus,
for what is to be taken away). The clipped, noisy sum of that step over the
expected batch size is a private mean, and `train.measured` sets the parameter
to minus that, once. It is a step like any other for sampler, clipping, noise
and ledger; nothing else is released, and the accountant need not know.

Parts of the parameters that are measured are called by `stage`, and each has
one parameter. The first whose parameter is still zero is measured next. Noise
leaves a parameter at exactly zero with probability 0.
"""

from collections.abc import Iterable, Mapping
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

COLLECTION = "measured"  # Of what is sown.
_LOSS = "loss"
_PREFIX = "measure_"


def stage(number: int) -> str:
  """Name of the module that measures as the step with this number."""
  return f"{_PREFIX}{number}"


def stages(names: Iterable[str]) -> list[str]:
  """Those of `names` that are measured, in their order."""
  return sorted(
    (name for name in names if name.startswith(_PREFIX)),
    key=lambda name: int(name.removeprefix(_PREFIX)),
  )


def parameter(module: nn.Module, name: str, shape: tuple[int, ...]) -> Array:
  """Declares what a step measures, in the `nn.compact` call of `module`."""
  zeros = nn.with_logical_partitioning(
    nn.initializers.zeros, (None,) * len(shape)
  )
  # Linen declares the box; apply() unboxes.
  return cast(jax.Array, module.param(name, zeros, shape))


def is_pending(part: Any) -> Bool[Array, ""]:
  """Whether a part of the parameters is still to be measured."""
  zeros = [jnp.all(leaf == 0) for leaf in jax.tree.leaves(part)]
  return jnp.stack(zeros).all()


def sow(module: nn.Module, loss: Float[Array, " B"], parameter: Array) -> None:
  """Hands on a module's loss, which counts while it is the first pending."""
  pending = is_pending(jax.lax.stop_gradient(parameter))
  module.sow(COLLECTION, _LOSS, (loss, jnp.broadcast_to(pending, loss.shape)))


def or_measured(
  task: Float[Array, " B"], sown: Mapping[str, Any]
) -> Float[Array, " B"]:
  """The losses of a step: of the first pending stage, or else of the task.

  Args:
    task: of each example.
    sown: by the modules, in `COLLECTION`; empty where nothing is measured.
  """
  for name in reversed(stages(sown)):
    ((loss, pending),) = sown[name][_LOSS]
    task = jnp.where(pending, loss, task)
  return task
