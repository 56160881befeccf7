"""What stands behind the privatizer: `config.OptimizerConfig`.

`config` gives these their names; it alone is imported elsewhere. This module
imports neither JAX nor NumPy.
"""

import dataclasses
import enum

from ppnet.core import checks


class OptimizerName(enum.Enum):
  """The optimizer behind the privatizer."""

  ADAMW = "adamw"
  SGD = "sgd"


class Schedule(enum.Enum):
  """Learning rate over steps, after a linear warm-up."""

  CONSTANT = "constant"
  COSINE = "cosine"


@dataclasses.dataclass(slots=True, kw_only=True)
class OptimizerConfig:
  """The optimizer that sees the private mean gradient.

  Attributes:
    name: ADAMW or SGD.
    learning_rate: after the warm-up.
    schedule: CONSTANT, or COSINE to 0 at the last step.
    warmup_steps: linear from 0.
    beta1: momentum, SGD's as well.
    beta2: decay of AdamW's second moment.
    weight_decay: decoupled for AdamW, added to the gradient for SGD.
    ema_decay: share that a step leaves of the moving average of parameters,
      which is then what is evaluated, attacked and used in their place; see
      `train.averaging`. None: the last parameters are.
  """

  name: OptimizerName = OptimizerName.ADAMW
  learning_rate: float = 1e-3
  schedule: Schedule = Schedule.COSINE
  warmup_steps: int = 0
  beta1: float = 0.9
  beta2: float = 0.99
  weight_decay: float = 0.0
  ema_decay: float | None = None


def validate(optimizer: OptimizerConfig) -> None:
  """Checks the optimizer's part of a configuration; see `config.validate`."""
  checks.positive(**{"optimizer.learning_rate": optimizer.learning_rate})
  checks.non_negative(
    **{
      "optimizer.warmup_steps": optimizer.warmup_steps,
      "optimizer.weight_decay": optimizer.weight_decay,
    }
  )
  for name in ("beta1", "beta2"):
    value = getattr(optimizer, name)
    if not 0 <= value < 1:
      checks.fail(f"0 <= optimizer.{name} < 1", **{f"optimizer.{name}": value})
  if optimizer.ema_decay is not None:
    checks.in_open_unit_interval(
      "Set it to none for the last parameters themselves.",
      **{"optimizer.ema_decay": optimizer.ema_decay},
    )
