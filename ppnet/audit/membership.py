"""What attackers know, as scores: every membership attack on a table of models.

NumPy only. A table holds one number for each model and record, and which of the
records each model was trained on. An attack turns it into another table of the
same shape, higher meaning "member".

*What an attack may use.* Attacking model m, only its own scores and the scores
and memberships of its references: every other model that was trained for the
audit, without m itself and without its partner. The partner was trained on
exactly the other half of the records, so its membership is the answer. A target
that was not trained for the audit has no partner (-1) and is nobody's
reference. Of m's own membership nothing is ever read.

| attack | who can do it |
| --- | --- |
| a raw score, one threshold | anybody who may query the model |
| `gradient_norm` | with the model's parameters |
| `calibrated_loss`, `..._offline`, ... | with models of similar records |
| `..._online` | with models trained with the record and without it |
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from ppnet.audit import lira, references, rmia
from ppnet.core import checks

_RAW = "anybody who may query the model"
_WHITE_BOX = "somebody who has the model's parameters"
_OFFLINE = (
  "somebody who trained models on similar records, none of them on the record"
  " in question"
)
_ONLINE = (
  "somebody who trained models on similar records, with the record in question"
  " and without it"
)


class Attack(NamedTuple):
  """One attack's verdict on every model and record.

  Attributes:
    scores: f64[M, n], higher says "member".
    knowledge: who can do it, for people.
  """

  scores: np.ndarray
  knowledge: str


def calibrated_loss(
  loss_scores: np.ndarray, membership: np.ndarray, partner: np.ndarray
) -> np.ndarray:
  """How much lower the loss is than where the record was not trained on.

  Watson et al. 2022 (https://arxiv.org/abs/2111.08440), their calibrated
  score: the loss minus the mean loss of references that did not see the record,
  here negated.

  Args:
    loss_scores: minus the loss, f64[M, n].
    membership: bool[M, n].
    partner: i64[M].

  Returns:
    f64[M, n].

  Raises:
    ValueError: a record has no reference that did not see it.
  """
  usable = references.usable(partner)
  out, _ = references.means(loss_scores, ~membership, usable)
  return loss_scores - out


def reference_ratio(
  loss_scores: np.ndarray, membership: np.ndarray, partner: np.ndarray
) -> np.ndarray:
  """Log of (mean loss of references without the record / loss).

  Carlini et al. 2021, Section 5.2 (https://arxiv.org/abs/2012.07805), compare
  two models by the ratio of their log-perplexities; the reference here is the
  mean of several models. A loss of 0 counts as the smallest normal number.

  Args:
    loss_scores: minus the loss, f64[M, n], no loss below 0.
    membership: bool[M, n].
    partner: i64[M].

  Returns:
    f64[M, n].

  Raises:
    ValueError: a loss below 0, or a record that every reference saw.
  """
  if (loss_scores > 0).any():
    checks.fail("losses of at least 0", smallest_loss=-loss_scores.max())
  tiny = np.finfo(np.float64).tiny
  usable = references.usable(partner)
  out, _ = references.means(loss_scores, ~membership, usable)
  return np.log(np.maximum(-out, tiny)) - np.log(np.maximum(-loss_scores, tiny))


def run_all(
  scores: Mapping[str, np.ndarray],
  *,
  membership: np.ndarray,
  partner: np.ndarray,
) -> tuple[dict[str, Attack], dict[str, str]]:
  """Every attack that the table allows.

  Args:
    scores: name → f64[M, n]; "loss" is minus the loss, "margin" the logit of
      the true answer's probability; every one is attacked by a threshold.
    membership: bool[M, n].
    partner: i64[M].

  Returns:
    The attacks by name, and of those that could not be run, the reason.

  Raises:
    ValueError: a score that is not finite, or arrays that do not fit.
  """
  membership = np.asarray(membership, bool)
  partner = np.asarray(partner)
  for name, values in scores.items():
    if np.shape(values) != membership.shape or partner.shape != (
      len(membership),
    ):
      checks.fail(
        "scores [M, n], membership [M, n] and partner [M]",
        **{
          name: np.shape(values),
          "membership": membership.shape,
          "partner": partner.shape,
        },
      )
    if not np.isfinite(values).all():
      checks.fail(
        f"only finite scores of {name}",
        "A model that diverged cannot be ranked: train it with a lower rate.",
        not_finite=int((~np.isfinite(values)).sum()),
      )
  attacks = {
    name: Attack(
      np.asarray(values, np.float64),
      _WHITE_BOX if name == "gradient_norm" else _RAW,
    )
    for name, values in scores.items()
  }
  left_out: dict[str, str] = {}

  def add(name, knowledge, needs, attack):
    if needs not in scores:
      left_out[name] = f"the table has no score named {needs}"
      return
    values = np.asarray(scores[needs], np.float64)
    try:
      attacks[name] = Attack(attack(values, membership, partner), knowledge)
    except references.TooFewError as error:
      left_out[name] = str(error)

  add("calibrated_loss", _OFFLINE, "loss", calibrated_loss)
  add("reference_ratio", _OFFLINE, "loss", reference_ratio)
  add("lira_offline", _OFFLINE, "margin", lira.offline)
  add("rmia_offline", _OFFLINE, "loss", rmia.offline)
  add("lira_online", _ONLINE, "margin", lira.online)
  add("rmia_online", _ONLINE, "loss", rmia.online)
  return attacks, left_out


def blind(loss_scores: np.ndarray, partner: np.ndarray) -> np.ndarray:
  """A control that never looks at the model: how easy each record is.

  The mean score of the references, whatever they were trained on. Where members
  were drawn by coins it must guess like a coin. Where it does better, members
  and non-members differ by themselves (two splits that are not of one kind),
  and every attack is partly told that difference and not membership.

  Args:
    loss_scores: minus the loss, f64[M, n].
    partner: i64[M].

  Returns:
    f64[M, n].

  Raises:
    ValueError: a model has no reference.
  """
  usable = references.usable(partner)
  everyone = np.ones(loss_scores.shape, bool)
  mean, _ = references.means(loss_scores, everyone, usable)
  return mean
