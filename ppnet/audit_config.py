"""What an AUDIT job does: dataclass and checks.

`ppnet.config` gives all of it its public names.
"""

import dataclasses

from ppnet.core import checks


@dataclasses.dataclass(slots=True, kw_only=True)
class AuditConfig:
  """How a model, or the way it is trained, is attacked.

  Attributes:
    num_models: shadow models, an even number: each record is trained on by
      exactly one of every two. 0 trains none: then planted gradients alone are
      looked for, no model is attacked, and the bounds on epsilon are fewer.
    models_at_once: how many of them are one program, an even number; the rest
      follow. Bounds the memory, and where a killed audit goes on.
    num_records: training records that the shadow models are drawn from; None
      takes all. Fewer are memorised more.
    num_canaries: of these records, how many are planted: mislabelled, or given
      a random secret. The worst case of what can leak.
    num_gradient_canaries: gradients planted in one run, each in it or not with
      probability one half, for the bound of an observer who sees every update.
      0 leaves it out.
    robustness: also measure how the shadow models bear noise and missing
      modalities.
    inversion: also draw a training picture from its gradient at several levels
      of noise; for records with one picture each.
    confidence: of the lower bounds on epsilon and of all intervals.
  """

  num_models: int = 16
  models_at_once: int = 16
  num_records: int | None = None
  num_canaries: int = 0
  num_gradient_canaries: int = 1000
  robustness: bool = False
  inversion: bool = False
  confidence: float = 0.95


def validate(config: AuditConfig) -> None:
  """Raises ValueError, naming the field, its value and what to do."""
  for name, least in (("num_models", 0), ("models_at_once", 2)):
    value = getattr(config, name)
    if value < least or value % 2:
      checks.fail(
        f"audit.{name} to be even and at least {least}",
        "Models come in pairs: what one is trained on, the other is not.",
        **{f"audit.{name}": value},
      )
  if config.num_records is not None:
    checks.positive(**{"audit.num_records": config.num_records})
  for name in ("num_canaries", "num_gradient_canaries"):
    if getattr(config, name) < 0:
      checks.fail(
        f"audit.{name} not to be negative",
        **{f"audit.{name}": getattr(config, name)},
      )
  if config.num_models == 0:
    # What needs models would be left out without a word.
    checks.positive(
      "Without shadow models there is nothing else to audit.",
      **{"audit.num_gradient_canaries": config.num_gradient_canaries},
    )
    for name in ("num_canaries", "robustness"):
      if getattr(config, name):
        checks.fail(
          f"audit.num_models > 0 with audit.{name}",
          "Shadow models are what that is measured on.",
          **{"audit.num_models": 0, f"audit.{name}": getattr(config, name)},
        )
  if not 0.5 <= config.confidence < 1:
    checks.fail(
      "audit.confidence in [0.5, 1)",
      "0.95 is usual.",
      **{"audit.confidence": config.confidence},
    )
