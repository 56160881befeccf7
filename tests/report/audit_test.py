"""The audit's report and figure, from records alone."""

import copy

import pytest

from ppnet.core import records
from ppnet.report import audit


def estimate(value, low=None, high=None):
  low, high = low or value / 2, high or (1 + value) / 2
  return {"value": value, "interval": [low, high]}


def row(attack, auc, advantage):
  return {
    "attack": attack,
    "knowledge": "anybody who may query the model",
    "auc": estimate(auc),
    "advantage": estimate(advantage),
    "balanced_accuracy": estimate((1 + advantage) / 2),
    "tpr_at_0.001": estimate(0.0213),
    "tpr_at_0.01": estimate(0.1),
  }


def bound(method, epsilon, allowed, **changes):
  return {
    "method": method,
    "epsilon": epsilon,
    "claimed_epsilon": 4.0,
    "allowed_epsilon": allowed,
    "observer": "sees models (black box)",
    "num_trials": 1200,
    "needs_independence": method in ("clopper_pearson", "gaussian"),
    "exceeds": epsilon > allowed,
  } | changes


@pytest.fixture
def record():
  attacks = [row("lira_online", 0.8, 0.5), row("loss", 0.6, 0.2)]
  best = {
    name: {"attack": "lira_online", **attacks[0][name]}
    for name in ("advantage", "auc", "tpr_at_0.001", "tpr_at_0.01")
  }
  return {
    "name": "letters",
    "confidence": 0.95,
    "claim": {
      "epsilon": 4.0,
      "delta": 1e-5,
      "neighboring_relation": "ADD_OR_REMOVE_ONE",
      "guarantee": "100 steps are (4, 1e-05)-differentially private.",
      "seeded": False,
    },
    "membership": {
      "judged": "shadow models",
      "num_judged_models": 16,
      "num_models": 16,
      "num_records": 600,
      "num_members": 4800,
      "num_nonmembers": 4800,
      "attacks": attacks,
      "left_out": {"rmia_online": "no score named loss"},
      "strongest": best,
      "held_out": {"value": 0.47, "interval": [0.4, 0.55], "attacks": []},
      "chance": {"mean": 0.021, "p_value": 0.0099},
      "blind": estimate(0.5, 0.49, 0.51),
      "roc": {
        name: {"fpr": [0, 0.01, 0.3, 1], "tpr": [0, 0.1, 0.7, 1]}
        for name in ("lira_online", "loss")
      },
      "groups": {
        "class": {
          "rows": [
            {"group": f"class {i}", "num_records": 7}
            | row("x", 0.9 - i / 50, 0.3)
            for i in range(14)
          ],
          "highest_auc_by_chance": 0.56,
        }
      },
      "groups_attack": "lira_online",
    },
    "bounds": [
      bound("one_run", 1.239, 4.0),
      bound("gaussian", 3.999, 4.6, observer="sees every update (white box)"),
    ],
  }  # fmt: skip


def flat(record):
  return " ".join(audit.markdown(record).split())


def test_report_answers_what_somebody_who_was_not_there_asks(record):
  text = flat(record)
  for said in (
    "The claim is not contradicted",
    "Claimed: ε = 4.00. Audited: ε at least 3.99",  # Down, never up to 4.00.
    "Leakage 0.500 [0.250, 0.750] by LiRA, online (chance alone: 0.021)",
    "chosen on other models 0.470 [0.400, 0.550]",
    "Attackers can tell members from others",
    "16 models were trained as configured",
    "A: sees models (black box).",
    "B: sees every update (white box).",
    "RMIA, online was left out: no score named loss",
    "A low leakage or a low bound proves nothing",
    "class 0",
    "2 more in audit.json",
    "about 0.560",
    "Decide by the groups that leak most",
  ):
    assert said in text, said
  assert "class 13" not in text
  assert "YES" not in text


def test_a_contradicted_claim_is_the_first_thing_to_be_read(record):
  record["bounds"].append(bound("one_run", 4.006, 4.001))
  text = audit.markdown(record)
  first = " ".join(text.split("## ")[0].split())
  assert "THE PRIVACY CLAIM IS CONTRADICTED. DO NOT RELEASE" in first
  assert "Claimed: ε at most 4.01. Audited: ε at least 4.00" in first
  assert "withdraw the claim" in text
  assert "Nothing found here speaks against a release" not in text


def test_planted_gradients_alone_are_no_attack_on_a_model(record):
  record["membership"] = None
  text = flat(record)
  for said in (
    "The claim is not contradicted",
    "B: sees every update (white box).",
    "no model was attacked (audit.num_models=0)",
    "--config.audit.num_models=16",
  ):
    assert said in text, said
  for unsaid in ("Leakage", "roc.png", "speaks against a release"):
    assert unsaid not in text, unsaid
  record["bounds"].append(bound("one_run", 4.006, 4.001))
  assert "Do not release the model" in flat(record)
  # Fails if: who was not attacked is said not to leak.


def test_no_leak_and_no_claim_are_said_as_they_are(record):
  record["claim"]["epsilon"] = "inf"
  record["membership"]["held_out"]["interval"] = [-0.01, 0.03]
  text = flat(record)
  assert "There is no privacy claim (ε = ∞)" in text
  assert "No attack told members from others better than chance" in text
  assert "nothing here speaks for it" in text
  # Without other models to choose on, the randomisation test decides.
  record["membership"]["held_out"] = None
  assert "**Attackers can tell members from others.**" in flat(record)


def test_a_finished_run_s_control_says_when_splits_are_not_alike(record):
  found = record["membership"]
  found |= {"judged": "finished run", "num_judged_models": 1}
  assert "That is what it should be: 0.5" in flat(record)
  found["blind"] = estimate(0.7, 0.65, 0.75)
  assert "Members and non-members differ by themselves" in flat(record)
  found["num_nonmembers"] = 300
  assert "300 non-members, 0.1 % of them is less than one" in flat(record)


def test_secrets_have_their_tables_where_they_were_planted(record):
  assert "planted secrets" not in flat(record)
  record["exposure"] = [
    {
      "kind": "image+text",
      "num_canaries": 30,
      "mean_exposure": 5.5,
      "chance_exposure": 1.44,
      "control_exposure": 1.3,
      "max_exposure": 9.0,
      "p_value": 0.001,
    }
  ]
  record["extraction"] = [
    {
      "how": "a beam of 8",
      "num_canaries": 30,
      "verbatim": 0.4,
      "near_verbatim": 0.5,
    }  # fmt: skip
  ]
  text = flat(record)
  assert "Can planted secrets be pulled out?" in text
  assert "image+text" in text
  assert "5.50" in text
  assert "a beam of 8" in text
  assert "40 %" in text


def test_figure_draws_the_best_and_the_plain_loss_on_log_axes(record):
  found = record["membership"]
  for number in range(6):
    name = f"more {number}"
    found["attacks"].insert(1, row(name, 0.7, 0.3))
    found["roc"][name] = copy.deepcopy(found["roc"]["loss"])
  (ax,) = audit.draw(record).axes
  assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
  *lines, guessing = ax.get_lines()
  assert len(lines) == 5
  labels = [line.get_label() for line in lines]
  assert labels[0] == "LiRA, online, AUC 0.800"
  assert labels[-1] == "loss, AUC 0.600"
  # Told apart three ways, so also in grey and by any eyes.
  for kind in ("get_color", "get_linestyle", "get_marker"):
    if kind != "get_linestyle":
      assert len({getattr(line, kind)() for line in lines}) == 5
  assert list(guessing.get_xdata()) == list(guessing.get_ydata())
  assert guessing.get_label() == "guessing"


def test_files_are_written_from_the_record_alone(record, tmp_path):
  records.write_json(tmp_path / "audit.json", record)
  text = audit.write(tmp_path)
  assert (tmp_path / "audit.md").read_text() == text + "\n"
  assert (tmp_path / "figures" / "roc.png").exists()
  assert all(
    len(line) <= 80 or line.startswith("|") for line in text.splitlines()
  )
