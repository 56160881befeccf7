"""What a run carries from step to step, and nothing secret."""

import dataclasses
import functools
from typing import Any

import jax

Leaf = Any


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["step", "params", "opt_state", "clip_norm", "average"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
  """Parameters and optimizer state after `step` steps.

  It holds no key: the DP noise root must never reach a checkpoint.

  Attributes:
    step: steps taken, i32[].
    params: plain dict of float32 arrays.
    opt_state: optax state, of the noisy mean gradients only.
    clip_norm: bound on a unit's gradient in the next step, f32[], where it
      follows a quantile; a function of noisy releases. None where it is fixed.
    average: of the parameters of all steps, in their structure; a function of
      noisy releases (`train.averaging`). None where none is asked for.
  """

  step: Leaf
  params: Leaf
  opt_state: Leaf
  clip_norm: Leaf = None
  average: Leaf = None

  @property
  def released(self) -> Any:
    """The parameters to evaluate, attack and use: the average, if there is one.

    Training goes on from `params`.
    """
    return self.params if self.average is None else self.average
