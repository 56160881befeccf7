"""The budget table says what the accountant of a run says."""

import json
import math

import pytest

from ppnet import config as config_lib
from ppnet.core import records
from ppnet.privacy import accounting, budget, mechanism
from ppnet.report import budget as figures
from ppnet.report import tables

_REPLACE = config_lib.NeighboringRelation.REPLACE_ONE


def _config(**privacy):
  return config_lib.ExperimentConfig(
    name="small",
    privacy=config_lib.PrivacyConfig(**privacy),
    train=config_lib.TrainConfig(num_steps=30, expected_batch_size=90),
  )


@pytest.fixture(scope="module")
def found():
  seen = []

  def progress(tasks, total):
    for task in tasks:
      seen.append(total)
      yield task

  # RDP, because it is quick; PLD is asked for in the tables of both.
  config = _config(epsilon=4.0, accountant=config_lib.Accountant.RDP)
  result = budget.budget(config, 900, progress=progress)
  assert len(seen) == seen[0] == len(seen)
  return result


def _spent(noise_multiplier, **more):
  arguments = {
    "sampling_prob": 0.1,
    "num_steps": 30,
    "delta": 1e-5,
    "accountant": "rdp",
    **more,
  }
  return accounting.epsilon(noise_multiplier=noise_multiplier, **arguments)


def test_every_accountant_and_relation_is_of_the_same_noise(found):
  by_pair = {
    (row["accountant"], row["neighboring_relation"]): row
    for row in found["accountants"]
  }
  noise = found["noise_multiplier"]
  pld = by_pair["PLD", "ADD_OR_REMOVE_ONE"]["epsilon"]
  assert pld == _spent(noise, accountant="pld")
  rdp = by_pair["RDP", "ADD_OR_REMOVE_ONE"]["epsilon"]
  assert 0.995 * 4 <= found["epsilon"] == rdp == _spent(noise) <= 4
  replaced = by_pair["PLD", "REPLACE_ONE"]["epsilon"]
  assert replaced == _spent(
    noise / 2, accountant="pld", neighboring_relation=_REPLACE
  )
  assert replaced > pld
  hole = by_pair["RDP", "REPLACE_ONE"]
  assert hole["epsilon"] is None
  assert "REPLACE_ONE" in hole["why_not"]
  # Fails if: one noise multiplier is used for both sensitivities.


def test_noise_under_replace_one_is_twice_as_far_under_the_other_relation():
  built = mechanism.build(
    _config(epsilon=None, noise_multiplier=1.5, neighboring_relation=_REPLACE),
    900,
    sampler_root=0,
  )
  row = budget._under(
    built,
    config_lib.Accountant.PLD,
    config_lib.NeighboringRelation.ADD_OR_REMOVE_ONE,
  )
  assert row["noise_multiplier"] == 3.0
  assert row["epsilon"] == _spent(3.0, accountant="pld")


def test_steps_targets_and_samplers(found):
  assert [row["num_steps"] for row in found["over_steps"]] == [8, 15, 23, 30]
  assert found["over_steps"][-1]["epsilon"] == found["epsilon"]
  assert [row["epsilon"] for row in found["needed"]] == list(budget.TARGETS)
  for row in found["needed"]:
    spent = _spent(row["noise_multiplier"])
    assert 0.995 * row["epsilon"] <= spent <= row["epsilon"]
  epsilons = {row["sampler"]: row["epsilon"] for row in found["samplers"]}
  assert set(epsilons) == {member.name for member in config_lib.Sampler}
  assert epsilons["POISSON"] == found["epsilon"]
  assert epsilons["POISSON"] < epsilons["SHUFFLE"] < epsilons["FULL_BATCH"]
  assert epsilons["TRUNCATED_POISSON"] is None  # RDP does not cover it.
  last = [row["epsilon"] for row in found["curves"] if row["num_steps"] == 30]
  assert found["epsilon"] in last
  # Fails if: the other samplers are given another noise.


def test_record_is_json_and_becomes_a_table_and_a_figure(found, tmp_path):
  record = json.loads(json.dumps(records.to_plain(found), allow_nan=False))
  text = tables.budget_table(record)
  assert "# Privacy budget of small" in text
  (rdp,) = [line for line in text.splitlines() if line.startswith("| RDP")]
  shown = [cell.strip() for cell in rdp.strip("|").split("|")]
  assert shown[1] == tables.format_epsilon(found["epsilon"])
  assert rdp.rstrip(" |").endswith(tables.HOLE)
  assert "Use the PLD accountant" in text
  assert max(map(len, text.splitlines())) <= 100
  for row in found["needed"]:  # Rounded towards more noise.
    assert (
      float(tables._rounded_up(row["noise_multiplier"]))
      >= (row["noise_multiplier"])
    )
  path = figures.budget_figure(tmp_path, record)
  assert path.stat().st_size > 10_000
  assert path.with_suffix(".pdf").exists()
  drawn = figures.draw(record).axes[0].get_lines()
  assert [len(line.get_xdata()) for line in drawn][:3] == [11] * 3
  assert max(drawn[2].get_ydata()) == pytest.approx(found["epsilon"])


def test_banded_run_is_compared_with_samplers_of_its_own_noise():
  config = _config(
    epsilon=None,
    noise_multiplier=2.0,
    accountant=config_lib.Accountant.RDP,
    noise_mechanism=config_lib.NoiseMechanism.BANDED,
    num_bands=3,
  )
  built = mechanism.build(config, 900, sampler_root=0)
  own = budget._own_sampler(built)
  assert own["sampler"] == "CYCLIC_POISSON"
  assert own["epsilon"] == _spent(2.0, sampling_prob=0.3, num_steps=10)
  other = budget._with_sampler(config, built, 900, config_lib.Sampler.POISSON)
  assert other["epsilon"] == _spent(2.0)
  # Fails if: every row is of the sampler that the run has.


def test_without_a_guarantee_nothing_is_computed():
  result = budget.budget(_config(clipping=config_lib.Clipping.NONE), 900)
  assert result["epsilon"] == math.inf
  assert result["accountants"] == result["needed"] == result["curves"] == []
  text = tables.budget_table(records.to_plain(result))
  assert "∞" in text
  assert "No guarantee" in text
  # Fails if: an ablation is given the epsilon of the run it belongs to.
