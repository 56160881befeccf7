"""What a configuration spends, answered without training.

Every number comes from the accountant that a run would use, asked about the
mechanism that a run would build; nothing here knows another formula.
"""

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

from ppnet import config as config_lib
from ppnet.privacy import accounting, parts
from ppnet.privacy import mechanism as mechanism_lib
from ppnet.privacy import participation as participation_lib

TARGETS = (0.5, 1.0, 2.0, 3.0, 4.0, 8.0, 10.0)
_CURVE_POINTS = 12
_ACCOUNTANTS = tuple(config_lib.Accountant)
_RELATIONS = tuple(config_lib.NeighboringRelation)


def budget(
  config: config_lib.ExperimentConfig,
  num_examples: int,
  *,
  progress: Callable[[Iterable[Any], int], Iterable[Any]] | None = None,
) -> dict[str, Any]:
  """Everything that a person may want to know before the first step.

  Epsilons of one table belong to one noise: under REPLACE_ONE the sensitivity
  is twice that of ADD_OR_REMOVE_ONE, so the noise multiplier is half. The
  reason for a pair that no accountant covers stands in `why_not`.

  Args:
    config: the experiment.
    num_examples: size of the training set; treated as public.
    progress: wraps the parts of the computation, of which there are so many;
      for a progress bar.

  Returns:
    Plain values for `account.json`: those of `Mechanism.claim()`, and lists of
    rows under "accountants", "over_steps", "needed", "samplers" and "curves".
    The lists are empty where there is no guarantee.

  Raises:
    ValueError: as `mechanism.build`.
  """
  # Nothing is drawn: the root is neither secret nor kept.
  built = mechanism_lib.build(config, num_examples, sampler_root=0)
  result: dict[str, Any] = {
    "name": config.name,
    **built.claim(),
    "epsilon": built.epsilon(built.num_steps),
    "epochs": built.num_steps * built.sampling_prob,
    "accountants": [],
    "over_steps": [],
    "needed": [],
    "samplers": [],
    "curves": [],
  }
  if not built.has_guarantee:
    return result
  tasks = [
    *(
      ("accountants", lambda a=a, r=r: _under(built, a, r))
      for a in _ACCOUNTANTS
      for r in _RELATIONS
    ),
    *(
      ("over_steps", lambda i=i: _after(built, -(-built.num_steps * i // 4)))
      for i in range(1, 5)
    ),
    *(("needed", lambda t=t: _needed(built, t)) for t in TARGETS),
    ("samplers", lambda: _own_sampler(built)),
    *(
      ("samplers", lambda s=s: _with_sampler(config, built, num_examples, s))
      for s in config_lib.Sampler
      if s.name != built.sampler_name
    ),
    *(
      ("curves", lambda a=a, r=r, n=n: _under(built, a, r, num_steps=n))
      for a in _ACCOUNTANTS
      for r in _RELATIONS
      for n in _step_counts(built.num_steps)
    ),
  ]
  for name, task in progress(tasks, len(tasks)) if progress else tasks:
    result[name].append(task())
  return result


def _step_counts(num_steps: int) -> list[int]:
  """Step counts spread as epsilon grows: evenly in their square root."""
  counts = {
    math.ceil(num_steps * (i / _CURVE_POINTS) ** 2)
    for i in range(1, _CURVE_POINTS + 1)
  }
  return sorted(counts)


def _noise_multiplier(
  built: mechanism_lib.Mechanism, relation: config_lib.NeighboringRelation
) -> float:
  """That of the same noise under another relation."""
  replace = config_lib.NeighboringRelation.REPLACE_ONE
  doublings = (relation is replace) - (built.neighboring_relation is replace)
  return built.noise_multiplier / 2.0**doublings


def _row(spent: Callable[[], float], name: str) -> dict[str, Any]:
  """The number, or why there is none."""
  try:
    return {name: spent(), "why_not": ""}
  except ValueError as error:
    return {name: None, "why_not": str(error)}


def _under(
  built: mechanism_lib.Mechanism,
  accountant: config_lib.Accountant,
  relation: config_lib.NeighboringRelation,
  *,
  num_steps: int | None = None,
) -> dict[str, Any]:
  """Epsilon of the same noise by one accountant under one relation."""
  num_steps = built.num_steps if num_steps is None else num_steps
  noise_multiplier = _noise_multiplier(built, relation)
  return {
    "accountant": accountant.name,
    "neighboring_relation": relation.name,
    "num_steps": num_steps,
    "noise_multiplier": noise_multiplier,
  } | _row(
    lambda: accounting.epsilon(
      noise_multiplier=noise_multiplier,
      participation=built.participation,
      num_steps=num_steps,
      delta=built.delta,
      accountant=accountant,
      neighboring_relation=relation,
    ),
    "epsilon",
  )


def _after(built: mechanism_lib.Mechanism, num_steps: int) -> dict[str, Any]:
  """Epsilon of the run's first steps."""
  return {"num_steps": num_steps, "epsilon": built.epsilon(num_steps)}


def _needed(built: mechanism_lib.Mechanism, target: float) -> dict[str, Any]:
  """The noise multiplier that a target needs."""
  return {"epsilon": target} | _row(
    lambda: accounting.calibrate_noise_multiplier(
      epsilon=target,
      delta=built.delta,
      participation=built.participation,
      num_steps=built.num_steps,
      accountant=built.accountant,
      neighboring_relation=built.neighboring_relation,
    ),
    "noise_multiplier",
  )


def _own_sampler(built: mechanism_lib.Mechanism) -> dict[str, Any]:
  """The row of the run itself, before those that it is compared with."""
  which = built.participation
  return {
    "sampler": built.sampler_name,
    "max_batch_size": getattr(which, "max_batch_size", None),
    "sampling_prob": built.sampling_prob,
    "epsilon": built.epsilon(built.num_steps),
    "why_not": "",
  }


def _with_sampler(
  config: config_lib.ExperimentConfig,
  built: mechanism_lib.Mechanism,
  num_examples: int,
  sampler: config_lib.Sampler,
) -> dict[str, Any]:
  """Epsilon of the same noise, but independent, and of other batches."""
  config = copy.deepcopy(config)
  config.privacy.noise_mechanism = config_lib.NoiseMechanism.INDEPENDENT
  config.privacy.num_bands = None
  config.privacy.sampler = sampler
  size = config.train.expected_batch_size
  if sampler is not config_lib.Sampler.TRUNCATED_POISSON:
    config.privacy.max_batch_size = None
  elif config.privacy.max_batch_size is None:
    # Four deviations and more: fewer than one batch in 30,000 is cut.
    config.privacy.max_batch_size = min(
      size + math.ceil(4 * math.sqrt(size)), num_examples
    )
  drawn = parts.sampler(config, num_examples, 0)
  return {
    "sampler": sampler.name,
    "max_batch_size": config.privacy.max_batch_size,
    "sampling_prob": drawn.sampling_prob,
  } | _row(lambda: _spent(built, drawn.participation), "epsilon")


def _spent(
  built: mechanism_lib.Mechanism,
  participation: participation_lib.Participation,
) -> float:
  """Epsilon of the whole run with another sampler."""
  return accounting.epsilon(
    noise_multiplier=built.noise_multiplier,
    participation=participation,
    num_steps=built.num_steps,
    delta=built.delta,
    accountant=built.accountant,
    neighboring_relation=built.neighboring_relation,
  )
