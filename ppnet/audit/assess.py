"""From a table of scores to what an audit says: attacks, groups and bounds.

NumPy only; everything here can be repeated from a saved table. What is judged
is the finished run where the table has one (a model without a partner), and all
shadow models where it has none.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ppnet.audit import bounds, lira, membership, metrics, score_table

_MAX_POINTS = 400  # Of a curve in the record; more than a figure can show.
_MIN_PAIRS_OF_TRIALS = 8  # Fewer prove nothing across models.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
  """What is promised of the models that bounds were taken from.

  Attributes:
    epsilon: inf where nothing is promised.
    delta: of both claims and bounds.
    neighboring_relation: of the claim.
    guarantee: in a sentence.
    profile: further (epsilon, delta) pairs, for `bounds.gaussian_claim`; only
      read where epsilon is finite.
  """

  epsilon: float
  delta: float
  neighboring_relation: str
  guarantee: str
  profile: Sequence[tuple[float, float]] = ()

  def allowed(self, bound: bounds.Bound) -> float:
    """The epsilon that a bound of this kind may reach."""
    if not np.isfinite(self.epsilon):
      return np.inf
    if not bound.is_gaussian:
      return self.epsilon
    return bounds.gaussian_claim(
      [*self.profile, (self.epsilon, self.delta)],
      delta=self.delta,
      smallest_rate=(1 - bound.confidence) / max(bound.num_trials, 2),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trials:
  """Coins and scores of which bounds can be taken.

  Attributes:
    observer: who saw what, for people.
    scores: f64[m].
    is_in: bool[m].
    methods: which bounds hold for them.
    claim: what is promised of the models that they come from.
    threshold: known without the scores, or None.
  """

  observer: str
  scores: np.ndarray
  is_in: np.ndarray
  methods: Sequence[str]
  claim: Claim
  threshold: float | None = None


def attacks(
  table: score_table.ScoreTable, *, confidence: float, num_draws: int = 400
) -> dict[str, Any]:
  """Every attack on the table, judged; plain values for the record.

  Args:
    table: of scores; see the module.
    confidence: of each interval by itself.
    num_draws: of the bootstrap; half as many for groups.

  Raises:
    ValueError: the judged models have no members, or no non-members.
  """
  found, left_out = membership.run_all(
    table.scores, membership=table.membership, partner=table.partner
  )
  judged = _judged(table)
  partner = metrics.relabelled(table.partner, judged)
  labels = table.membership[judged]
  scores = {name: attack.scores for name, attack in found.items()}
  own = {name: values[judged] for name, values in scores.items()}
  rows: list[dict[str, Any]] = [
    {
      "attack": name,
      "knowledge": attack.knowledge,
      **metrics.measure(
        own[name],
        labels,
        partner=partner,
        confidence=confidence,
        num_draws=num_draws,
      ),
    }
    for name, attack in found.items()
  ]
  held_out = metrics.held_out(
    scores,
    table.membership,
    partner=table.partner,
    judged=judged,
    confidence=confidence,
    num_draws=num_draws,
  )
  chance = metrics.chance(
    metrics.best_advantage(own, labels), labels, partner=partner
  )[:, 0]
  best = {
    name: max(rows, key=lambda row: row[name].value)
    for name in ("advantage", "auc", "tpr_at_0.001", "tpr_at_0.01")
  }
  return {
    "judged": "finished run" if (partner < 0).all() else "shadow models",
    "num_judged_models": len(judged),
    "num_models": table.num_models,
    "num_records": table.num_records,
    "num_members": int(labels.sum()),
    "num_nonmembers": int((~labels).sum()),
    "confidence": confidence,
    "attacks": sorted(rows, key=lambda row: -row["auc"].value),
    "left_out": left_out,
    "strongest": {
      name: {
        "attack": row["attack"],
        "value": row[name].value,
        "interval": row[name].interval,
      }
      for name, row in best.items()
    },
    "held_out": held_out
    and {
      "value": held_out.advantage.value,
      "interval": held_out.advantage.interval,
      "attacks": sorted(set(held_out.attacks)),
    },
    "chance": {
      "mean": float(chance.mean()),
      # One of so many draws may be above by luck: hence the 1.
      "p_value": float(
        (1 + (chance >= best["advantage"]["advantage"].value).sum())
        / (1 + len(chance))
      ),
    },
    "blind": _blind(table, judged, confidence, num_draws // 2),
    "roc": {name: _points(own[name], labels) for name in own},
    "groups": _groups(
      table,
      own[best["auc"]["attack"]],
      judged,
      confidence=confidence,
      num_draws=num_draws // 2,
    ),
    "groups_attack": best["auc"]["attack"],
    "by_model": [
      {
        "leakage": curves["advantage"].advantage,
        "attack_auc": curves["auc"].auc,
        "tpr_at_0.1_fpr": curves["tpr_at_0.001"].tpr_at(0.001),
      }
      for model in range(len(judged))
      for curves in [
        {
          which: metrics.Ranked(
            own[row["attack"]][model], labels[model]
          ).curve()
          for which, row in best.items()
        }
      ]
    ],
  }


def black_box_trials(
  table: score_table.ScoreTable, claim: Claim
) -> list[Trials]:
  """Coins of the shadow models, guessed by who sees models and no coin.

  One model of each pair, as its partner's coins are the same ones; half of the
  pairs are audited, and the others are the references of the attack on them, so
  that no guess depends on a coin that is guessed. Which score is used depends
  on what there is and not on what it finds. Where canaries were planted, they
  alone are the trials: the worst case was the point of them.

  Args:
    table: with shadow models.
    claim: of one shadow model.
  """
  pairs = [
    (model, int(other))
    for model, other in enumerate(table.partner)
    if other > model
  ]
  if not pairs:
    return []
  columns = np.ones(table.num_records, bool)
  if "canary" in table.groups:
    is_canary = np.asarray(table.groups["canary"]) != ""
    columns = is_canary if is_canary.any() else columns
  num_references = max(len(pairs) // 2, min(len(pairs) - 1, 3))
  audited = [first for first, _ in pairs[num_references:]]
  reference = [model for pair in pairs[:num_references] for model in pair]
  rows = [*audited, *reference]
  partner = np.append(
    np.full(len(audited), -1),
    np.arange(len(reference)).reshape(-1, 2)[:, ::-1].ravel() + len(audited),
  )
  members = table.membership[rows][:, columns]
  part = {
    name: np.asarray(values, np.float64)[rows][:, columns]
    for name, values in table.scores.items()
  }
  # References are attacked along with the rest, and need others in turn.
  if "margin" in part and num_references >= 3:
    name, scores = "lira_online", lira.online(part["margin"], members, partner)
  elif "loss" in part and num_references >= 2:
    name = "calibrated_loss"
    scores = membership.calibrated_loss(part["loss"], members, partner)
  else:
    name = "loss" if "loss" in part else sorted(part)[0]
    scores = part[name]
  count = len(audited)
  found = [
    Trials(
      observer=f"sees {count} finished shadow model{'s' * (count > 1)} and"
      f" guesses which of {int(columns.sum()):,} records"
      f" {'each' if count > 1 else 'it'} was trained on, by {name} (black box)",
      scores=scores[:count].ravel(),
      is_in=members[:count].ravel(),
      methods=("one_run", "f_dp_one_run"),
      claim=claim,
    )
  ]
  if len(pairs) >= _MIN_PAIRS_OF_TRIALS:
    found.append(_across_models(table, pairs, columns, claim))
  return found


def bound(
  trials: Sequence[Trials], *, confidence: float
) -> list[dict[str, Any]]:
  """All bounds at once, each beside what its claim allows it.

  The risk of being too high is shared, so that with `confidence` none of them
  is.

  Returns:
    Plain rows; "exceeds" says that the claim is contradicted.
  """
  num_bounds = sum(len(one.methods) for one in trials)
  rows = []
  for one in trials:
    for method in one.methods:
      options: dict[str, Any] = {}
      if method in ("clopper_pearson", "gaussian"):
        options["threshold"] = one.threshold
      found = _METHODS[method](
        one.scores,
        one.is_in,
        delta=one.claim.delta,
        confidence=1 - (1 - confidence) / num_bounds,
        **options,
      )
      allowed = one.claim.allowed(found)
      rows.append(
        dataclasses.asdict(found)
        | {
          "observer": one.observer,
          "claimed_epsilon": one.claim.epsilon,
          "allowed_epsilon": allowed,
          "claimed_relation": one.claim.neighboring_relation,
          "exceeds": found.epsilon > allowed,
        }
      )
  return rows


_METHODS = {
  "one_run": bounds.one_run,
  "f_dp_one_run": bounds.f_dp_one_run,
  "clopper_pearson": bounds.clopper_pearson,
  "gaussian": bounds.gaussian,
}


def _judged(table: score_table.ScoreTable) -> np.ndarray:
  """The targets, or every model where there is none."""
  partner = np.asarray(table.partner)
  targets = np.flatnonzero(partner < 0)
  return targets if targets.size else np.arange(table.num_models)


def _across_models(
  table: score_table.ScoreTable,
  pairs: Sequence[tuple[int, int]],
  columns: np.ndarray,
  claim: Claim,
) -> Trials:
  """One record over separately trained models: independent trials.

  The record and the threshold are chosen on half of the pairs.
  """
  name = "margin" if "margin" in table.scores else sorted(table.scores)[0]
  models = [first for first, _ in pairs]
  scores = np.asarray(table.scores[name], np.float64)[models][:, columns]
  members = table.membership[models][:, columns]
  half = len(models) // 2
  seen, coins = scores[:half], members[:half]
  counts = np.stack([coins.sum(axis=0), (~coins).sum(axis=0)])
  means = [
    np.where(side, seen, 0).sum(axis=0) / np.maximum(count, 1)
    for side, count in zip((coins, ~coins), counts, strict=True)
  ]
  spread = seen.std(axis=0) + 1e-12
  # A record that all or none of these models saw has shown nothing.
  gain = np.where(
    counts.min(axis=0) > 0, (means[0] - means[1]) / spread, -np.inf
  )
  record = int(gain.argmax())
  return Trials(
    observer=f"sees {len(models) - half} models trained separately and guesses"
    " one record, the one that leaked most from others (black box)",
    scores=scores[half:, record],
    is_in=members[half:, record],
    methods=("clopper_pearson",),
    claim=claim,
    threshold=float(means[0][record] + means[1][record]) / 2,
  )


def _blind(
  table: score_table.ScoreTable,
  judged: np.ndarray,
  confidence: float,
  num_draws: int,
) -> dict[str, Any] | None:
  """The control that looks at no judged model; None without references."""
  if "loss" not in table.scores:
    return None
  try:
    scores = membership.blind(
      np.asarray(table.scores["loss"], np.float64), table.partner
    )
  except ValueError:
    return None  # No other models: nothing to look at instead.
  found = metrics.measure(
    scores[judged],
    table.membership[judged],
    partner=metrics.relabelled(table.partner, judged),
    confidence=confidence,
    num_draws=num_draws,
  )
  return {"value": found["auc"].value, "interval": found["auc"].interval}


def _points(scores: np.ndarray, labels: np.ndarray) -> dict[str, list[float]]:
  """A ROC curve for a figure with logarithmic axes: corners by size of FPR."""
  curve = metrics.Ranked(scores, labels).curve()
  if len(curve.fpr) > _MAX_POINTS:
    wanted = np.unique(
      np.concatenate(
        [
          np.searchsorted(curve.fpr, np.geomspace(1e-6, 1, _MAX_POINTS // 2)),
          np.searchsorted(curve.tpr, np.geomspace(1e-6, 1, _MAX_POINTS // 2)),
          [0, len(curve.fpr) - 1],
        ]
      )
    )
    wanted = wanted[wanted < len(curve.fpr)]
    curve = metrics.Curve(curve.fpr[wanted], curve.tpr[wanted])
  return {"fpr": curve.fpr.tolist(), "tpr": curve.tpr.tolist()}


def _groups(
  table: score_table.ScoreTable,
  scores: np.ndarray,
  judged: np.ndarray,
  *,
  confidence: float,
  num_draws: int,
) -> dict[str, Any]:
  """Who leaks most: one attack, group by group, worst first."""
  partner = metrics.relabelled(table.partner, judged)
  labels = table.membership[judged]
  found: dict[str, Any] = {}
  for kind, names in table.groups.items():
    names = np.asarray(names, np.str_)
    rows, ranked = [], []
    for name in sorted(set(names.tolist()) - {""}):
      columns = names == name
      own = labels[:, columns]
      if own.all() or not own.any():
        continue  # No curve; a group of one record, say.
      measured = metrics.measure(
        scores[:, columns],
        own,
        partner=partner,
        confidence=confidence,
        num_draws=num_draws,
      )
      ranked.append((columns, metrics.Ranked(scores[:, columns], own)))
      rows.append(
        {
          "group": name,
          "num_records": int(columns.sum()),
          **{
            which: measured[which]
            for which in ("auc", "advantage", "tpr_at_0.01")
          },
        }
      )
    if not rows:
      continue

    def highest(flipped: np.ndarray, ranked: Any = tuple(ranked)) -> np.ndarray:
      return np.array(
        [max(_auc(one, flipped[:, columns]) for columns, one in ranked)]
      )

    chance = metrics.chance(highest, labels, partner=partner, num_draws=50)
    found[kind] = {
      "rows": sorted(rows, key=lambda row: -row["auc"].value),
      # What the worst of so many groups shows if none leaks.
      "highest_auc_by_chance": float(chance.mean()),
    }
  return found


def _auc(ranked: metrics.Ranked, labels: np.ndarray) -> float:
  """Of other labels; a half where they are all of one kind."""
  if labels.all() or not labels.any():
    return 0.5
  return ranked.curve(is_member=labels).auc


def headline(record: Mapping[str, Any]) -> dict[str, float | None]:
  """What `summary.json` gets of an audit.

  Where no finished run was judged, also the means over the shadow models of
  what each is worth on the test split, such as `accuracy`, and `num_models`,
  which says of how many: each of them was trained on half of the records.

  Each number is that of the attack that does best by it. `leakage` is judged on
  the scores that chose its threshold; `leakage_held_out` is not, and None where
  there is no other model to choose on; `leakage_by_chance` is what `leakage`
  would be without any.

  Args:
    record: as in `audit.json`: "membership" from `attacks`, or None where no
      model was attacked; "bounds" from `bound`; and "utility", a row per shadow
      model.
  """
  highest = {
    "epsilon_lower_bound": max(
      (row["epsilon"] for row in record["bounds"]), default=None
    )
  }
  found = record["membership"]
  if found is None:
    return highest
  strongest = found["strongest"]
  worth: dict[str, Any] = {}
  utility = record.get("utility")
  if utility and found["judged"] == "shadow models":
    worth = {  # A record says "nan" where a class is missing from the split.
      name: float(np.mean([float(own[name]) for own in utility]))
      for name in utility[0]
    } | {"num_models": len(utility)}
  return worth | {
    "leakage": strongest["advantage"]["value"],
    "leakage_held_out": (found["held_out"] or {}).get("value"),
    "leakage_by_chance": found["chance"]["mean"],
    "attack_auc": strongest["auc"]["value"],
    "tpr_at_0.1_fpr": strongest["tpr_at_0.001"]["value"],
    **highest,
  }
