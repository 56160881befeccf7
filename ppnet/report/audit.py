"""What an AUDIT job found, for somebody who decides about a release.

Reads `audit.json` alone. A lower bound is rounded down and a claim up, so that
no rounding settles what is between them.
"""

import math
import pathlib
import string
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import axes, figure, layout_engine

from ppnet.core import records
from ppnet.report import figures, inversion, saving, tables

_WIDTH = 80
_MAX_GROUPS = 12  # Of each kind in the report; the record has all.
_LOWEST_RATE = 1e-5
# Colours of Okabe and Ito, dash patterns and markers: each tells them apart.
_LINES = (
  (figures.BLUE, "-", "o"),
  (figures.ORANGE, "--", "s"),
  ("#009E73", "-.", "^"),
  ("#CC79A7", (0, (1, 1)), "D"),
  (figures.BLACK, (0, (5, 1, 1, 1, 1, 1)), "v"),
)
_NAMES = {
  "loss": "loss",
  "margin": "margin",
  "min_k": "Min-K%",
  "min_k_plus_plus": "Min-K%++",
  "zlib": "zlib ratio",
  "gradient_norm": "gradient norm",
  "calibrated_loss": "calibrated loss",
  "reference_ratio": "reference ratio",
  "lira_online": "LiRA, online",
  "lira_offline": "LiRA, offline",
  "rmia_online": "RMIA, online",
  "rmia_offline": "RMIA, offline",
}
_METHODS = {
  "one_run": "one run (Steinke et al.)",
  "f_dp_one_run": "one run, f-DP (Mahloujifar et al.)",
  "clopper_pearson": "Clopper–Pearson",
  "gaussian": "Gaussian DP",
}


def write(workdir: pathlib.Path) -> str:
  """Writes `audit.md` and, of attacks, `figures/roc.png` from `audit.json`.

  Where gradients were inverted, `figures/inversion.png` as well.

  Returns:
    The report's text.
  """
  workdir = pathlib.Path(workdir)
  record = records.read_json(workdir / "audit.json")
  if record["membership"] is not None:
    saving.save(draw(record), workdir / "figures" / "roc")
  if record.get("inversion"):
    inversion.inversion_figure(workdir)
  text = markdown(record)
  records.write_bytes(workdir / "audit.md", (text + "\n").encode())
  return text


def markdown(record: Mapping[str, Any]) -> str:
  """The report: verdict first, then what it rests on.

  Args:
    record: the content of `audit.json`.

  Returns:
    Markdown, without a newline at the end.
  """
  is_attacked = record["membership"] is not None
  sections = [
    f"# Audit of {record['name']}",
    *_verdict(record),
    *(_told(record) if is_attacked else []),
    "## What was attacked",
    *_subject(record),
    "## Claimed ε against the audited lower bound",
    *_bounds(record),
    *(["## Who can tell a member?", *_attacks(record)] if is_attacked else []),
    *(_groups(record) if is_attacked else []),
    *_secrets(record),
    *_inversion(record),
    "## What this does not show",
    _list(_limits(record)),
    "## What to do",
    _list(_advice(record)),
  ]
  return "\n\n".join(sections)


def draw(record: Mapping[str, Any]) -> figure.Figure:
  """ROC curves on logarithmic axes: the best of the attacks, and guessing.

  Args:
    record: the content of `audit.json`, of models that were attacked.

  Returns:
    A figure that belongs to no window; the caller saves it.
  """
  found = record["membership"]
  layout = layout_engine.ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
  fig = figure.Figure(figsize=(6.4, 5.8), layout=layout)
  ax = fig.subplots()
  ax.set_title(
    f"{record['name']}: membership attacks on"
    f" {_count(found['num_judged_models'], found['judged'])}",
    fontsize=11,
  )
  shown = _shown(found)
  # Below one non-member there is nothing to see.
  lowest = max(_LOWEST_RATE, 0.5 / found["num_nonmembers"])
  for (color, dashes, marker), row in zip(_LINES, shown, strict=False):
    _line(ax, found["roc"][row["attack"]], row, color, dashes, marker, lowest)
  ax.plot(
    [lowest, 1],
    [lowest, 1],
    color="#666666",
    linewidth=1,
    linestyle=":",
    label="guessing",
  )
  ax.set_xscale("log")
  ax.set_yscale("log")
  ax.set_xlim(lowest, 1)
  ax.set_ylim(lowest, 1)
  ax.set_aspect("equal")
  ax.set_xlabel("false positive rate")
  ax.set_ylabel("true positive rate")
  ax.grid(True, which="major", color="#DDDDDD", linewidth=0.6)
  ax.set_axisbelow(True)
  ax.spines[["top", "right"]].set_visible(False)
  ax.legend(loc="lower right", fontsize=9, framealpha=0.9, edgecolor="none")
  return fig


def _line(
  ax: axes.Axes,
  points: Mapping[str, Sequence[float]],
  row: Mapping[str, Any],
  color: str,
  dashes: Any,
  marker: str,
  lowest: float,
) -> None:
  """One attack's curve, as steps: between two vertices lies no threshold."""
  ax.plot(
    [max(rate, lowest) for rate in points["fpr"]],
    [max(rate, lowest * 1e-3) for rate in points["tpr"]],
    drawstyle="steps-post",
    color=color,
    linestyle=dashes,
    marker=marker,
    markevery=(0.06, 0.18),
    markersize=5,
    linewidth=1.8,
    label=f"{_name(row['attack'])}, AUC {row['auc']['value']:.3f}",
  )


def _shown(found: Mapping[str, Any]) -> list[Mapping[str, Any]]:
  """The attacks to draw: the best, and always the plain loss."""
  rows = list(found["attacks"])
  best = rows[: len(_LINES)]
  plain = [row for row in rows if row["attack"] == "loss"]
  if plain and plain[0] not in best:
    best = [*best[:-1], *plain]
  return best


def _verdict(record: Mapping[str, Any]) -> list[str]:
  """What comes first, in a sentence."""
  wrong = [row for row in record["bounds"] if row["exceeds"]]
  confidence = f"{record['confidence']:.4g}"
  if wrong:
    worst = max(wrong, key=lambda row: row["epsilon"])
    line = (
      "**THE PRIVACY CLAIM IS CONTRADICTED. DO NOT RELEASE THIS MODEL UNDER"
      f" IT. Claimed: ε at most {_up(worst['allowed_epsilon'])}. Audited: ε at"
      f" least {_down(worst['epsilon'])}, at confidence {confidence}.**"
    )
  elif _is_claimed(record):
    line = (
      "**The claim is not contradicted.** Claimed: ε ="
      f" {_up(record['claim']['epsilon'])}. Audited: ε at least"
      f" {_down(_highest(record))}, at confidence {confidence}."
    )
  else:
    line = (
      "**There is no privacy claim (ε = ∞)**, so no bound can contradict one."
      f" Audited: ε at least {_down(_highest(record))}, at confidence"
      f" {confidence}."
    )
  return [_fill(line)]


def _told(record: Mapping[str, Any]) -> list[str]:
  """How much of membership the attacks told, in sentences."""
  found = record["membership"]
  best = found["strongest"]
  held_out = found["held_out"]
  numbers = (
    f"Leakage {best['advantage']['value']:.3f}"
    f" {_interval(best['advantage']['interval'])} by"
    f" {_name(best['advantage']['attack'])} (chance alone:"
    f" {found['chance']['mean']:.3f});"
    + (
      " with attack and threshold chosen on other models"
      f" {held_out['value']:.3f} {_interval(held_out['interval'])};"
      if held_out
      else " no other models to choose a threshold on;"
    )
    + f" attack AUC {best['auc']['value']:.3f}"
    f" {_interval(best['auc']['interval'])}; true positives at 0.1 % false"
    f" positives {_percent(best['tpr_at_0.001']['value'])}"
    f" {_interval(best['tpr_at_0.001']['interval'], _percent)} by"
    f" {_name(best['tpr_at_0.001']['attack'])}."
  )
  verdict = (
    "**Attackers can tell members from others.**"
    if _leaks(record)
    else "No attack told members from others better than chance does."
  )
  return [_fill(numbers), verdict]


def _subject(record: Mapping[str, Any]) -> list[str]:
  """Who was judged, on what, by whom."""
  found = record["membership"]
  claim = _fill(f"Claim: {record['claim']['guarantee']}")
  if found is None:
    what = (
      "The way of training: gradients were planted in one run, trained as"
      " configured, and looked for in its updates. No shadow models were"
      " trained, and no model was attacked (audit.num_models=0)."
    )
    return [_fill(what), claim]
  if found["judged"] == "finished run":
    what = (
      f"The finished run in this folder, on {found['num_members']:,} records it"
      f" was trained on and {found['num_nonmembers']:,} test records."
      f" {found['num_models'] - 1:,} shadow models, trained in the same way on"
      " random halves of these records, show attackers what membership does."
    )
  else:
    what = (
      f"The way of training, not one model: {found['num_models']:,} models were"
      f" trained as configured, each on a random half of"
      f" {found['num_records']:,} records, and every one of them is attacked."
    )
  return [
    _fill(what),
    claim,
    _fill(
      f"Intervals are at confidence {record['confidence']:.4g}, each by"
      " itself. Models (in pairs) and records were drawn again with"
      " replacement, because scores of one model, and of one record, are not"
      " independent."
      if found["num_judged_models"] > 1
      else f"Intervals are at confidence {record['confidence']:.4g}, each by"
      " itself, over records: they hold for this model, not for another one"
      " trained alike."
    ),
  ]


def _bounds(record: Mapping[str, Any]) -> list[str]:
  """The table of bounds and what they mean."""
  observers = list(dict.fromkeys(row["observer"] for row in record["bounds"]))
  rows = []
  for row in record["bounds"]:
    rows.append(
      [
        _METHODS[row["method"]],
        string.ascii_uppercase[observers.index(row["observer"])],
        f"{row['num_trials']:,}",
        _down(row["epsilon"]),
        _up(row["claimed_epsilon"]),
        _up(row["allowed_epsilon"]),
        "**YES**" if row["exceeds"] else "no",
      ]
    )
  relation = tables.format_relation(record["claim"]["neighboring_relation"])
  delta = tables.format_delta(tables.to_float(record["claim"]["delta"]))
  notes = [
    f"δ = {delta}. All bounds together hold at confidence"
    f" {record['confidence']:.4g}. They are about adding or removing one record"
    f" with an own coin; the claim is about: {relation}.",
    "Shadow models and the model with gradient canaries have claims of their"
    " own, in the column “claimed”: fewer or more records, the same mechanism.",
    "The f-DP and Gaussian rows hold for mechanisms whose trade-off curve is a"
    " Gaussian one. They are compared with “allowed”: the smallest Gaussian"
    " curve that the claimed curve does not fall below.",
  ]
  if any(row["needs_independence"] for row in record["bounds"]):
    notes.append(
      "Clopper–Pearson and Gaussian DP need independent trials: models trained"
      " separately, or canaries whose gradients do not overlap. Where the"
      " mechanism is faulty that may fail; the claim is contradicted either"
      " way, but the number is then no bound on the faulty one."
    )
  who = [
    f"{letter}: {observer}."
    for letter, observer in zip(string.ascii_uppercase, observers, strict=False)
  ]
  header = ["bound", "who", "trials", "ε at least", "claimed", "allowed",
            "contradicted"]  # fmt: skip
  return [
    tables.markdown_table(header, rows),
    _list(who),
    *map(_fill, notes),
  ]


def _attacks(record: Mapping[str, Any]) -> list[str]:
  """Every attack, best first."""
  found = record["membership"]
  rows = [
    [
      _name(row["attack"]),
      f"{row['auc']['value']:.3f} {_interval(row['auc']['interval'])}",
      f"{row['advantage']['value']:.3f}"
      f" {_interval(row['advantage']['interval'])}",
      f"{row['balanced_accuracy']['value']:.3f}",
      *(
        f"{_percent(row[name]['value'])}"
        f" {_interval(row[name]['interval'], _percent)}"
        for name in ("tpr_at_0.001", "tpr_at_0.01")
      ),
    ]
    for row in found["attacks"]
  ]
  header = ["attack", "AUC", "leakage", "balanced accuracy", "TPR at 0.1 % FPR",
            "TPR at 1 % FPR"]  # fmt: skip
  who: dict[str, list[str]] = {}
  for row in found["attacks"]:
    who.setdefault(row["knowledge"], []).append(_name(row["attack"]))
  notes = [
    f"{', '.join(names)}: {knowledge}." for knowledge, names in who.items()
  ]
  notes += [
    f"{_name(name)} was left out: {reason}."
    for name, reason in found["left_out"].items()
  ]
  parts = [tables.markdown_table(header, rows), _list(notes)]
  parts.append(
    _fill(
      "Leakage is the membership advantage, the largest difference of true and"
      " false positive rates. Its threshold is the best one on these very"
      " scores: models that leak nothing would show"
      f" {found['chance']['mean']:.3f} here, and what was found has p ="
      f" {found['chance']['p_value']:.2g}."
    )
  )
  if found["num_nonmembers"] < 1000:
    parts.append(
      _fill(
        f"With {found['num_nonmembers']:,} non-members, 0.1 % of them is less"
        " than one: that column is the share of members found without any"
        " false positive."
      )
    )
  blind = found["blind"]
  if blind and found["judged"] == "finished run":
    low, high = blind["interval"]
    unlike = not low <= 0.5 <= high
    parts.append(
      _fill(
        "Control: guessing without looking at the judged model, by how easy"
        f" each record is, has AUC {blind['value']:.3f}"
        f" {_interval(blind['interval'])}."
        + (
          " **Members and non-members differ by themselves, so the attacks"
          " above are partly told that difference and not membership.**"
          if unlike
          else " That is what it should be: 0.5."
        )
      )
    )
  return [*parts, "![ROC curves on logarithmic axes](figures/roc.png)"]


def _groups(record: Mapping[str, Any]) -> list[str]:
  """Who leaks most."""
  found = record["membership"]
  parts = []
  for kind, group in found["groups"].items():
    rows = [
      [
        row["group"],
        f"{row['num_records']:,}",
        f"{row['auc']['value']:.3f} {_interval(row['auc']['interval'])}",
        f"{row['advantage']['value']:.3f}",
        _percent(row["tpr_at_0.01"]["value"]),
      ]
      for row in group["rows"][:_MAX_GROUPS]
    ]
    header = [kind, "records", "AUC", "leakage", "TPR at 1 % FPR"]
    parts.append(tables.markdown_table(header, rows))
    more = len(group["rows"]) - len(rows)
    parts.append(
      _fill(
        (f"{more} more in audit.json. " if more else "")
        + "If none of them leaked, the highest AUC among so many groups would"
        f" still be about {group['highest_auc_by_chance']:.3f}."
      )
    )
  if not parts:
    return []
  attack = _name(found["groups_attack"])
  return [f"## Who leaks most? ({attack})", *parts]


def _secrets(record: Mapping[str, Any]) -> list[str]:
  """Planted secrets: how exposed, how many came out."""
  parts = []
  exposure = record.get("exposure")
  if exposure:
    rows = [
      [
        row["kind"],
        f"{row['num_canaries']:,}",
        f"{row['mean_exposure']:.2f}",
        f"{row['control_exposure']:.2f}",
        f"{row['chance_exposure']:.2f}",
        f"{row['max_exposure']:.2f}",
        f"{row['p_value']:.2g}",
      ]
      for row in exposure
    ]
    header = ["planted in", "canaries", "mean exposure, bits", "not planted",
              "by chance", "most", "p"]  # fmt: skip
    parts.append(tables.markdown_table(header, rows))
  extraction = record.get("extraction")
  if extraction:
    rows = [
      [
        row["how"],
        f"{row['num_canaries']:,}",
        _percent(row["verbatim"]),
        _percent(row["near_verbatim"]),
      ]
      for row in extraction
    ]
    header = ["continued by", "canaries", "verbatim", "nearly"]
    parts.append(tables.markdown_table(header, rows))
  if not parts:
    return []
  return ["## Can planted secrets be pulled out?", *parts]


def _inversion(record: Mapping[str, Any]) -> list[str]:
  """How near a picture comes that is drawn from one gradient."""
  found = record.get("inversion")
  if not found:
    return []
  guess = float(found["guess_psnr"])
  rows = []
  for noise, epsilon, psnr in zip(
    found["noise_multipliers"], found["epsilons"], found["psnr"], strict=True
  ):
    near = tables.to_float(psnr)
    verdict = "yes" if near > guess else "no"
    rows.append([f"{noise:g}", _up(epsilon), f"{near:.1f} dB", verdict])
  header = ["noise multiplier", "ε of the step", "PSNR", "better than a guess"]
  delta = tables.format_delta(tables.to_float(found["delta"]))
  return [
    "## What does one step reveal?",
    _fill(
      "A training picture was drawn from its clipped gradient alone, by an"
      " attacker who knows the parameters and all of the record but the"
      f" picture: one record, one step, no sampling, δ = {delta}. PSNR says how"
      " near the drawing is, higher is nearer. The mean of other pictures,"
      f" which needs no gradient, has {guess:.1f} dB."
    ),
    tables.markdown_table(header, rows),
    "![The record and what was drawn of it](figures/inversion.png)",
  ]


def _limits(record: Mapping[str, Any]) -> list[str]:
  """What no reader should take from it."""
  limits = [
    "A low leakage or a low bound proves nothing: better attacks may exist,"
    " and more shadow models make these ones better. The only upper limit on"
    " what can leak is a proven ε.",
    "Averages hide single records: look at true positives at low false"
    " positive rates, and at the groups.",
    "Attackers here know how the model was trained and have records of the"
    " same kind. The audit itself was computed from private data and is not"
    " covered by any guarantee: share it only with people who may see the"
    " data.",
  ]
  found = record["membership"]
  if found is None:
    limits.append(
      "No attack was made on a model: what somebody can tell who sees the"
      " finished one alone was not asked."
    )
  elif found["judged"] != "finished run":
    limits.append(
      "No finished run was in this folder. These are models trained as"
      " configured on half of the records each; a model trained on all of them"
      " memorises each a little less."
    )
  else:
    limits.append(
      "Bounds on ε come from models trained for the audit, not from the"
      " finished run, whose members were not drawn by coins."
    )
  if record["claim"].get("seeded"):
    limits.append(
      "Noise or sampler were seeded: towards whoever knows the seed there is no"
      " privacy, whatever the audit says."
    )
  return limits


def _advice(record: Mapping[str, Any]) -> list[str]:
  """What follows from it."""
  if any(row["exceeds"] for row in record["bounds"]):
    return [
      "Do not release the model under this claim, and withdraw the claim where"
      " it was made.",
      "Look for the fault where it was seen: the rows marked YES. Noise scale,"
      " clipping, a record counted several times and a sampler that is not the"
      " one accounted for are the usual ones. With the white-box row alone, it"
      " lies between the gradients and the update.",
      "Run the audit again after the repair. A chance of"
      f" {1 - record['confidence']:.2g} remains that a correct mechanism is"
      " accused; fresh seeds settle it.",
    ]
  found = record["membership"]
  if found is None:
    return [
      "Attack models as well before a release: --config.audit.num_models=16."
    ]
  advice = []
  claimed = _is_claimed(record)
  if _leaks(record):
    advice.append(
      "Membership shows. Where having been in the data is itself a secret,"
      + (
        " lower ε, or accept in writing what the table above shows."
        if claimed
        else " do not release without differential privacy:"
        " --config.privacy.epsilon=8 or less, and audit again."
      )
    )
    if found["groups"]:
      advice.append("Decide by the groups that leak most, not by the average.")
  else:
    advice.append(
      "Nothing found here speaks against a release"
      + (
        "; what speaks for it is the claim, not this audit."
        if claimed
        else ", and nothing here speaks for it: without a claim, the next"
        " attack may find more."
      )
    )
  if found["num_models"] < 16:
    advice.append(
      "The attack is weak with so few shadow models: repeat it with"
      " --config.audit.num_models=64 before relying on a low number."
    )
  return advice


def _leaks(record: Mapping[str, Any]) -> bool:
  """Whether more was found than chance shows."""
  found = record["membership"]
  held_out = found["held_out"]
  if held_out:
    return held_out["interval"][0] > 0
  return found["chance"]["p_value"] < 1 - record["confidence"]


def _is_claimed(record: Mapping[str, Any]) -> bool:
  """Whether there is a finite epsilon."""
  return math.isfinite(tables.to_float(record["claim"]["epsilon"]))


def _highest(record: Mapping[str, Any]) -> float:
  """The highest lower bound."""
  return max((row["epsilon"] for row in record["bounds"]), default=math.nan)


def _up(epsilon: object) -> str:
  """A claim, rounded up."""
  return tables.format_epsilon(tables.to_float(epsilon))


def _down(epsilon: object) -> str:
  """A lower bound, rounded down."""
  value = tables.to_float(epsilon)
  if not math.isfinite(value):
    return tables.format_epsilon(value)
  return f"{math.floor(value * 100) / 100:.2f}"


def _percent(value: float) -> str:
  """A share."""
  return f"{100 * value:.3g} %"


def _interval(interval: Sequence[float], form: Any = "{:.3f}".format) -> str:
  """Two ends in brackets."""
  low, high = (form(end) for end in interval)
  return f"[{low}, {high}]"


def _name(attack: str) -> str:
  """What people call an attack."""
  return _NAMES.get(attack, attack)


def _count(number: int, what: str) -> str:
  """Such as: finished run, 16 shadow models."""
  return what if number == 1 else f"{number:,} {what}"


def _fill(text: str) -> str:
  """A paragraph."""
  return textwrap.fill(
    text, _WIDTH, break_long_words=False, break_on_hyphens=False
  )


def _list(items: Sequence[str]) -> str:
  """A list of sentences."""
  return "\n".join(
    textwrap.fill(
      f"- {item}",
      _WIDTH,
      subsequent_indent="  ",
      break_long_words=False,
      break_on_hyphens=False,
    )
    for item in items
  )
