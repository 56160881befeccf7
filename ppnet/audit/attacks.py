"""Membership inference: can a score tell members from non-members?

NumPy only. Scores are oriented so that a higher one says "member".
"""

import dataclasses

import numpy as np
from sklearn import metrics

from ppnet.core import checks


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttackResult:
  """How well one score separates members from non-members.

  Attributes:
    attack: name of the score.
    advantage: max over thresholds of TPR - FPR, in [0, 1] (Yeom et al. 2018,
      definition 4, https://arxiv.org/abs/1709.01604). This is `leakage`.
    auc: area under the ROC curve; 0.5 is guessing.
    tpr_at_fpr: true positive rate at false positive rates of 0.1 % and 1 %
      (Carlini et al. 2022, https://arxiv.org/abs/2112.03570).
    num_members: records that were trained on.
    num_nonmembers: records that were not.
  """

  attack: str
  advantage: float
  auc: float
  tpr_at_fpr: dict[str, float]
  num_members: int
  num_nonmembers: int


def threshold_attack(
  member_scores: np.ndarray, nonmember_scores: np.ndarray, *, attack: str
) -> AttackResult:
  """The best single threshold on a score.

  The threshold is chosen on the records it is judged on, so the advantage is
  biased upwards by about sqrt(1/members + 1/nonmembers): with few records even
  an untouched one shows some.

  Args:
    member_scores: float[m].
    nonmember_scores: float[n].
    attack: name of the score.

  Raises:
    ValueError: no members, no non-members, or scores that are not finite.
  """
  for name, scores in (
    ("member_scores", member_scores),
    ("nonmember_scores", nonmember_scores),
  ):
    if not (scores.size and np.isfinite(scores).all()):
      checks.fail(f"at least one and only finite {name}", **{name: scores})
  is_member = np.concatenate(
    [np.ones(member_scores.size), np.zeros(nonmember_scores.size)]
  )
  scores = np.concatenate([member_scores, nonmember_scores])
  fpr, tpr, _ = metrics.roc_curve(is_member, scores, drop_intermediate=False)
  return AttackResult(
    attack=attack,
    advantage=float((tpr - fpr).max()),
    auc=float(metrics.auc(fpr, tpr)),
    tpr_at_fpr={
      str(target): float(tpr[fpr <= target].max()) for target in (0.001, 0.01)
    },
    num_members=member_scores.size,
    num_nonmembers=nonmember_scores.size,
  )
