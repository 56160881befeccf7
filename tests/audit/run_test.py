"""The AUDIT job through `main`: what it writes, and that it fails loudly.

The models are stand-ins here: a table whose truth is known. That real ones are
trained and asked is held by a slow test below.
"""

import dataclasses
import math
import types

import numpy as np
import pytest

from ppnet import config as config_lib
from ppnet import main
from ppnet.audit import assess, bounds, run
from ppnet.core import records, workdirs
from ppnet.privacy import accounting
from ppnet.privacy import mechanism as mechanism_lib
from tests import tiny
from tests.audit import assess_test, inversion_test

NUM_KEYS = (
  "leakage",
  "leakage_held_out",
  "leakage_by_chance",
  "attack_auc",
  "tpr_at_0.1_fpr",
  "epsilon_lower_bound",
)


def stand_in(monkeypatch, *, epsilon, shift, noise=1.0, has_target=False):
  """Models that leak `shift`, and gradients seen through `noise`."""
  claim = assess_test.claim(epsilon)

  def models(experiment, *, is_finished):
    return run.Models(
      table=assess_test.table(3, 60, shift=shift, has_target=is_finished),
      claim=claim,
      claimed={
        "epsilon": epsilon,
        "delta": claim.delta,
        "neighboring_relation": claim.neighboring_relation,
        "unit": "EXAMPLE",
        "guarantee": "What is claimed.",
        "seeded": False,
      },
      secrets={},
      utility=[{"accuracy": 0.5}, {"accuracy": 0.75}],
      robustness=None,
    )

  def gradient_trials(experiment):
    rng = np.random.default_rng(0)
    is_in = rng.random(400) < 0.5
    return [
      assess.Trials(
        observer="sees every noisy sum",
        scores=is_in + noise * rng.normal(size=400),
        is_in=is_in,
        methods=("one_run", "f_dp_one_run", "gaussian"),
        claim=claim,
      )
    ]

  monkeypatch.setattr(run, "_models", models)
  monkeypatch.setattr(run, "_gradient_trials", gradient_trials)
  monkeypatch.setattr(
    run.loop,
    "open_experiment",
    lambda config, _: types.SimpleNamespace(config=config),
  )
  monkeypatch.setattr(
    run.assess,
    "attacks",
    lambda table, confidence, whole=assess.attacks: whole(
      table, confidence=confidence, num_draws=20
    ),
  )
  config = tiny.experiment()
  config.job = config_lib.Job.AUDIT
  return config


def test_an_audit_leaves_its_record_report_figure_and_summary(
  monkeypatch, tmp_path, capsys
):
  config = stand_in(monkeypatch, epsilon=4.0, shift=1.0, noise=2.0)
  main.run_job(config, tmp_path)
  record = records.read_json(tmp_path / "audit.json")
  report = (tmp_path / "audit.md").read_text()
  assert "The claim is not contradicted" in report
  assert report.strip() in capsys.readouterr().out
  for name in ("roc.png", "roc.pdf"):
    assert (tmp_path / "figures" / name).stat().st_size > 5000
  summary = records.read_json(tmp_path / "summary.json")
  assert set(summary) == {"name", "accuracy", "num_models", *NUM_KEYS}
  assert (summary["accuracy"], summary["num_models"]) == (0.625, 2)
  assert summary["epsilon_lower_bound"] == max(
    row["epsilon"] for row in record["bounds"]
  )
  assert record["utility"] == [{"accuracy": 0.5}, {"accuracy": 0.75}]
  assert record["robustness"] is None  # It was not asked for.
  # All bounds share the risk: five of them here.
  assert len(record["bounds"]) == 5
  assert {row["confidence"] for row in record["bounds"]} == {0.99}
  assert not workdirs.is_finished(tmp_path)  # No run was trained here.


def test_a_finished_run_s_summary_keeps_what_it_says(monkeypatch, tmp_path):
  config = stand_in(monkeypatch, epsilon=4.0, shift=1.0, noise=2.0)
  before = {"num_steps": 6, "accuracy": 0.125, "leakage": 0.01}
  records.write_json(tmp_path / "summary.json", before)
  records.write_json(
    tmp_path / "config.json", {"config": records.to_plain(config)}
  )
  main.run_job(config, tmp_path)
  summary = records.read_json(tmp_path / "summary.json")
  # Of the run, and not of the shadow models.
  assert (summary["num_steps"], summary["accuracy"]) == (6, 0.125)
  assert "num_models" not in summary
  assert summary["leakage"] > 0.1  # The strongest attack's now.
  assert workdirs.is_finished(tmp_path)
  record = records.read_json(tmp_path / "audit.json")
  assert record["membership"]["judged"] == "finished run"


def test_without_shadow_models_planted_gradients_are_all_there_is(
  monkeypatch, tmp_path
):
  config = tiny.experiment()
  config.job = config_lib.Job.AUDIT
  config.audit.num_models = 0

  def gradient_trials(experiment):
    is_in = np.arange(40) % 2 == 0
    return [
      assess.Trials(
        observer="sees every noisy sum",
        scores=is_in + np.linspace(-3, 3, 40),
        is_in=is_in,
        methods=("one_run", "f_dp_one_run", "gaussian"),
        claim=run.claim_of(experiment.mechanism),
      )
    ]

  monkeypatch.setattr(run, "_gradient_trials", gradient_trials)
  main.run_job(config, tmp_path)
  record = records.read_json(tmp_path / "audit.json")
  assert record["membership"] is None
  assert record["utility"] == []
  # Three share the risk, and not five.
  assert [row["confidence"] for row in record["bounds"]] == [
    pytest.approx(1 - 0.05 / 3)
  ] * 3
  assert set(records.read_json(tmp_path / "summary.json")) == {
    "name",
    "epsilon_lower_bound",
  }
  assert "(audit.num_models=0)" in (tmp_path / "audit.md").read_text()
  assert not (tmp_path / "figures").exists()
  assert not (tmp_path / "audit").exists()  # Nothing was trained.


def test_an_inversion_that_was_asked_for_is_drawn_and_reported(
  monkeypatch, tmp_path
):
  config = stand_in(monkeypatch, epsilon=4.0, shift=1.0, noise=2.0)
  config.audit.inversion = True
  counts = {"image": 1}
  experiment = types.SimpleNamespace(
    config=config,
    workdir=tmp_path,
    datasets={
      "train": types.SimpleNamespace(
        layout=types.SimpleNamespace(counts=counts)
      )
    },
  )
  monkeypatch.setattr(run.loop, "open_experiment", lambda *_: experiment)
  monkeypatch.setattr(
    run.inversion, "invert_gradient", lambda *_, key: inversion_test.example()
  )
  main.run_job(config, tmp_path)
  assert (tmp_path / "figures" / "inversion.png").stat().st_size > 1000
  report = (tmp_path / "audit.md").read_text()
  section = report.split("## What does one step reveal?")[1].split("## ")[0]
  assert "12.1 dB" in section
  rows = [line.split("|")[1:-1] for line in section.splitlines() if "|" in line]
  cells = [[cell.strip() for cell in row] for row in rows[2:]]
  assert [row[0] for row in cells] == ["0", "0.01", "1"]
  assert cells[0][1:] == ["∞", "31.2 dB", "yes"]
  assert cells[2][2:] == ["5.6 dB", "no"]
  assert "figures/inversion.png" in section
  counts["image"] = 2
  with pytest.raises(ValueError, match=r"audit\.inversion=False"):
    main.run_job(config, tmp_path)


@pytest.mark.parametrize(
  ("fault", "where"),
  [({"noise": 0.05, "shift": 0.0}, "gaussian"), ({"shift": 9.0}, "one_run")],
)
def test_a_contradicted_claim_fails_loudly_with_the_record_written(
  monkeypatch, tmp_path, capsys, fault, where
):
  """White box: too little noise. Black box: models that remember all."""
  config = stand_in(monkeypatch, epsilon=0.2, **({"noise": 20.0} | fault))
  with pytest.raises(RuntimeError, match="CLAIM IS CONTRADICTED") as caught:
    main.run_job(config, tmp_path)
  assert main._raised_by_ppnet(caught.value)  # One line and exit code 1.
  assert "Do not release" in str(caught.value)
  record = records.read_json(tmp_path / "audit.json")
  wrong = {row["method"] for row in record["bounds"] if row["exceeds"]}
  assert where in wrong
  assert "epsilon_lower_bound" in records.read_json(tmp_path / "summary.json")
  report = (tmp_path / "audit.md").read_text()
  assert "DO NOT RELEASE" in report.split("## ")[0]
  assert "**YES**" in report
  assert "DO NOT RELEASE" in capsys.readouterr().out


def test_without_a_claim_nothing_is_contradicted(monkeypatch, tmp_path):
  config = stand_in(monkeypatch, epsilon=math.inf, shift=9.0, noise=0.01)
  main.run_job(config, tmp_path)
  report = " ".join((tmp_path / "audit.md").read_text().split())
  assert "There is no privacy claim (ε = ∞)" in report
  assert "do not release without differential privacy" in report
  assert records.read_json(tmp_path / "audit.json")["claim"]["epsilon"] == "inf"


def test_a_mechanism_claims_its_own_curve():
  config = tiny.experiment(accountant=config_lib.Accountant.RDP)
  mechanism = mechanism_lib.build(config, 500)
  claim = run.claim_of(mechanism)
  assert claim.epsilon == mechanism.epsilon(mechanism.num_steps)
  for epsilon, delta in claim.profile:
    assert epsilon == accounting.epsilon(
      noise_multiplier=mechanism.noise_multiplier,
      sampling_prob=mechanism.sampling_prob,
      num_steps=mechanism.num_steps,
      delta=delta,
      accountant="rdp",
    )
  epsilons = [epsilon for epsilon, _ in claim.profile]
  assert epsilons == sorted(epsilons)  # Smaller deltas cost more.
  one = bounds.one_run(
    np.zeros(100), np.arange(100) < 50, delta=claim.delta, confidence=0.95
  )
  assert claim.allowed(one) == claim.epsilon
  of_curve = dataclasses.replace(one, is_gaussian=True)
  assert claim.epsilon <= claim.allowed(of_curve) < 20 * claim.epsilon
  config.privacy.enabled = False
  nothing = run.claim_of(mechanism_lib.build(config, 500))
  assert nothing.epsilon == math.inf
  assert nothing.allowed(of_curve) == math.inf


def test_what_one_gaussian_release_allows_is_hardly_more_than_its_claim():
  config = tiny.experiment(epsilon=8.0)
  config.train.num_steps = 1
  config.train.expected_batch_size = 500
  claim = run.claim_of(mechanism_lib.build(config, 500))
  one = bounds.one_run(
    np.zeros(1000), np.arange(1000) < 500, delta=claim.delta, confidence=0.98
  )
  of_curve = dataclasses.replace(one, is_gaussian=True)
  assert claim.epsilon <= claim.allowed(of_curve) < 1.1 * 8.0
  # Fails if: the curve is known at so few points that 8 allows 14.


@pytest.mark.slow
@pytest.mark.parametrize("has_run", [False, True])
def test_real_models_are_trained_attacked_and_reported(tmp_path, has_run):
  config = tiny.experiment(accountant=config_lib.Accountant.RDP)
  config.privacy.noise_seed = config.privacy.sampler_seed = None
  config.audit = config_lib.AuditConfig(
    num_models=4,
    models_at_once=4,
    num_records=48,
    num_canaries=0 if has_run else 12,
    num_gradient_canaries=60,
  )
  if has_run:
    main.run_job(config, tmp_path)
  config.job = config_lib.Job.AUDIT
  main.run_job(config, tmp_path)
  record = records.read_json(tmp_path / "audit.json")
  found = record["membership"]
  assert found["judged"] == ("finished run" if has_run else "shadow models")
  names = {row["attack"] for row in found["attacks"]}
  assert {"loss", "margin", "gradient_norm", "calibrated_loss"} <= names
  assert {row["method"] for row in record["bounds"]} >= {"one_run", "gaussian"}
  assert not any(row["exceeds"] for row in record["bounds"])
  assert ("exposure" in record) == (not has_run)
  assert {"class", "modality"} <= found["groups"].keys()
  if has_run:
    assert found["num_members"] == 48
    config.audit.num_canaries = 1
    with pytest.raises(ValueError, match="audit.num_canaries=1"):
      main.run_job(config, tmp_path)
