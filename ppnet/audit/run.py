"""Attacks on a finished run's own model."""

from typing import Any

from ppnet.audit import attacks
from ppnet.train import loop


def loss_attack(
  experiment: loop.Experiment, params: Any
) -> attacks.AttackResult:
  """The loss threshold attack: training records tend to have lower losses.

  Yeom et al. 2018, adversary 2 (https://arxiv.org/abs/1709.01604), with the
  test split as non-members. It is the weakest attack there is: a low number
  says little, a high one says that the model leaks.

  Args:
    experiment: from `train.loop.open_experiment`.
    params: trained parameters on the program's mesh.
  """
  members = loop.predictions(experiment, params, split="train")
  others = loop.predictions(experiment, params, split="test")
  return attacks.threshold_attack(
    -members.losses, -others.losses, attack="loss_threshold"
  )
