"""Whole tiny runs: resuming, budgets, meshes, bad records, bad numbers."""

import dataclasses
import io
import json
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import PIL.Image
import pytest

from ppnet import config as config_lib
from ppnet.core import records
from ppnet.data import prepare, sources
from ppnet.train import loop, watching
from ppnet.train import state as state_lib
from tests import tiny


class Stop(Exception):
  """Stands for a kill at a chosen point."""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  folder = tmp_path_factory.mktemp("prepared")
  prepare.prepare(tiny.experiment().data, folder)
  return str(folder)


def open_run(workdir, prepared, *, devices=1, **changes):
  config = tiny.experiment(**changes)
  config.data.prepared_dir = prepared
  workdir.mkdir(exist_ok=True)
  records.write_json(workdir / "config.json", {"config": config})
  return loop.open_experiment(config, workdir, devices=jax.devices()[:devices])


def run(workdir, prepared, **kwargs):
  experiment = open_run(workdir, prepared, **kwargs)
  return loop.train(experiment, log=io.StringIO())


def flat(state: state_lib.TrainState):
  leaves = jax.tree.leaves(jax.device_get(state))
  return np.concatenate([np.ravel(leaf) for leaf in leaves])


def rows(workdir, split="train"):
  return records.latest_rows(workdir / "metrics.jsonl", split=split)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, prepared):
  workdir = tmp_path_factory.mktemp("uninterrupted")
  summary, state = run(workdir, prepared)
  return workdir, summary, state


def test_a_run_writes_its_records(uninterrupted):
  workdir, summary, _ = uninterrupted
  assert summary["num_steps"] == summary["charged_steps"] == 6
  assert summary["status"] == "complete"
  assert 0 < summary["epsilon"] <= 1.0
  assert summary["seeded"]
  assert summary["attention_noise"]["guarantee"].startswith("None.")
  assert {"accuracy", "f1", "auc_roc", "delta", "noise_multiplier"} <= set(
    summary
  )
  train_rows = rows(workdir)
  assert [row["step"] for row in train_rows] == list(range(1, 7))
  epsilons = [row["epsilon"] for row in train_rows]
  assert epsilons == sorted(epsilons)
  assert epsilons[-1] == summary["epsilon"]
  assert [row["step"] for row in rows(workdir, "test")] == [3, 6]
  ledger = records.read_json(workdir / "privacy.json")
  assert ledger["charged_steps"] == 6
  assert list((workdir / "tensorboard").iterdir())
  json.dumps(records.to_plain(summary), allow_nan=False)


def interrupted_at(workdir, prepared, monkeypatch, *, dispatch, **changes):
  """Runs until the given dispatch, which never happens."""
  experiment = open_run(workdir, prepared, **changes)
  original = loop._Run._dispatch

  def stopping(self, data):
    if data["step"] == dispatch:
      self._checkpoints.wait()
      raise Stop
    return original(self, data)

  with monkeypatch.context() as patch:
    patch.setattr(loop._Run, "_dispatch", stopping)
    with pytest.raises(Stop):
      loop.train(experiment, log=io.StringIO())


@pytest.mark.parametrize(
  "dispatch",
  [
    pytest.param(0, marks=pytest.mark.slow),
    3,
    pytest.param(5, marks=pytest.mark.slow),
  ],
)
def test_a_resumed_seeded_run_equals_an_uninterrupted_one_bit_for_bit(
  uninterrupted, prepared, tmp_path, monkeypatch, dispatch
):
  whole_dir, whole, state = uninterrupted
  interrupted_at(tmp_path, prepared, monkeypatch, dispatch=dispatch)
  charged = records.read_json(tmp_path / "privacy.json")["charged_steps"]
  assert charged == dispatch + 1  # Charged though it never ran.
  summary, resumed = run(tmp_path, prepared)
  np.testing.assert_array_equal(flat(resumed), flat(state))
  for name in ("accuracy", "f1", "auc_roc", "loss", "epsilon", "num_steps"):
    assert summary[name] == whole[name]
  for row, other in zip(rows(tmp_path), rows(whole_dir), strict=True):
    # A repeated step was charged before, so its epsilon may already be later.
    assert row.pop("epsilon") >= other.pop("epsilon")
    assert row.keys() == other.keys()
    for name, value in row.items():
      if not name.startswith(watching.PREFIX):  # Of this clock.
        assert value == other[name], name
  assert records.read_json(tmp_path / "privacy.json")["charged_steps"] == 6
  # Fails if: step, optimizer, data position, sampler or noise is not restored.


def test_an_unseeded_resume_is_charged_again_and_stops_within_the_budget(
  prepared, tmp_path, monkeypatch
):
  unseeded = {"noise_seed": None, "sampler_seed": None}
  interrupted_at(tmp_path, prepared, monkeypatch, dispatch=3, **unseeded)
  # Steps 0 to 3 were charged; the checkpoint is at step 2, so 2 and 3 run
  # again with fresh noise: 2 + 4 + 2 > 6 charges would be needed.
  summary, state = run(tmp_path, prepared, **unseeded)
  assert summary["status"] == "stopped_by_budget"
  assert summary["charged_steps"] == 6
  assert summary["num_steps"] == int(state.step) == 4
  assert summary["epsilon"] <= 1.0
  history = records.read_json(tmp_path / "privacy.json")["history"]
  assert [h["resumed_at_step"] for h in history] == [0, 2]
  # Fails if: a repeated step with fresh noise is not charged.


_BANDED = {
  "noise_mechanism": config_lib.NoiseMechanism.BANDED,
  "num_bands": 3,
  "epsilon": None,
  "noise_multiplier": 2.0,
}


@pytest.mark.slow
def test_a_resumed_banded_run_draws_the_noise_before_again(
  prepared, tmp_path, monkeypatch
):
  whole_dir, cut_dir = tmp_path / "whole", tmp_path / "cut"
  _, state = run(whole_dir, prepared, **_BANDED)
  interrupted_at(cut_dir, prepared, monkeypatch, dispatch=5, **_BANDED)
  summary, resumed = run(cut_dir, prepared, **_BANDED)
  np.testing.assert_array_equal(flat(resumed), flat(state))
  assert summary["charged_steps"] == 6
  saved, _ = loop.restore(open_run(cut_dir, prepared, **_BANDED))
  whole, _ = loop.restore(open_run(whole_dir, prepared))
  # The same leaves as without bands: no noise is in a checkpoint.
  assert jax.tree.map(np.shape, saved) == jax.tree.map(np.shape, whole)
  # Fails if: a resumed factorisation begins anew, or its history is saved.


@pytest.mark.slow
def test_banded_noise_does_not_depend_on_the_mesh(
  prepared, tmp_path, monkeypatch
):
  _, one = run(tmp_path / "one", prepared, **_BANDED)
  mesh = config_lib.MeshConfig(data=2, fsdp=2, tensor=2)
  original = tiny.experiment
  monkeypatch.setattr(
    tiny,
    "experiment",
    lambda **changes: dataclasses.replace(original(**changes), mesh=mesh),
  )
  _, many = run(tmp_path / "many", prepared, devices=8, **_BANDED)
  np.testing.assert_allclose(flat(many), flat(one), rtol=2e-3, atol=2e-4)


@pytest.mark.slow
def test_an_unseeded_banded_resume_begins_a_new_turn_and_pays_for_it(
  prepared, tmp_path, monkeypatch
):
  unseeded = {**_BANDED, "noise_seed": None, "sampler_seed": None}
  interrupted_at(tmp_path, prepared, monkeypatch, dispatch=3, **unseeded)
  summary, _ = run(tmp_path, prepared, **unseeded)
  # 4 charges are two turns of 3; the new one begins at its third step: 6 + 2,
  # and then the steps 2 to 5.
  assert (summary["num_steps"], summary["charged_steps"]) == (6, 12)
  experiment = open_run(tmp_path, prepared, **unseeded)
  assert summary["epsilon"] >= experiment.mechanism.epsilon(12)
  assert experiment.mechanism.epsilon(12) > experiment.mechanism.epsilon(9)
  # Fails if: an example that is drawn in both halves of a turn is charged once.


def test_a_finished_run_is_not_trained_again(uninterrupted, prepared):
  workdir, summary, state = uninterrupted
  again, resumed = run(workdir, prepared)
  assert again["charged_steps"] == 6
  np.testing.assert_array_equal(flat(resumed), flat(state))


def test_a_lost_ledger_is_refused(prepared, tmp_path, monkeypatch):
  interrupted_at(tmp_path, prepared, monkeypatch, dispatch=3)
  (tmp_path / "privacy.json").unlink()
  with pytest.raises(ValueError, match=r"privacy\.json"):
    run(tmp_path, prepared)
  # Fails if: a run goes on as if it had spent nothing.


def test_an_older_ledger_is_refused(prepared, tmp_path, monkeypatch):
  interrupted_at(tmp_path, prepared, monkeypatch, dispatch=3)
  ledger = records.read_json(tmp_path / "privacy.json")
  records.write_json(tmp_path / "privacy.json", ledger | {"charged_steps": 1})
  with pytest.raises(ValueError, match="older than the checkpoint"):
    run(tmp_path, prepared)


def test_a_ledger_that_forgot_a_restart_is_refused(
  prepared, tmp_path, monkeypatch
):
  """It counts the checkpoint's steps, but not those that ran twice."""
  unseeded = {
    "noise_seed": None,
    "sampler_seed": None,
    "epsilon": None,
    "noise_multiplier": 2.0,
  }
  interrupted_at(tmp_path, prepared, monkeypatch, dispatch=3, **unseeded)
  summary, _ = run(tmp_path, prepared, **unseeded)
  assert (summary["num_steps"], summary["charged_steps"]) == (6, 8)
  assert summary["guarantee"].startswith("8 steps are")
  ledger = records.read_json(tmp_path / "privacy.json")
  records.write_json(tmp_path / "privacy.json", ledger | {"charged_steps": 7})
  with pytest.raises(ValueError, match="older than the checkpoint"):
    run(tmp_path, prepared, **unseeded)
  # Fails if: only the checkpoint's step is compared with the ledger.


def test_no_key_reaches_a_checkpoint(uninterrupted, prepared):
  workdir, _, _ = uninterrupted
  experiment = open_run(workdir, prepared)
  state, position = loop.restore(experiment)
  for leaf in jax.tree.leaves(state):
    assert leaf.dtype in (np.float32, np.int32)
  assert set(position) == {"data", "sampler", "charged_steps", "fingerprint"}
  assert position["data"] == {"next_step": 6}
  # Fails if: a noise key is part of what is saved.


@pytest.mark.parametrize(
  ("axes", "gather_weights"),
  [
    pytest.param((8, 1, 1), False, marks=pytest.mark.slow),
    pytest.param((2, 2, 2), False, marks=pytest.mark.slow),
    ((2, 2, 2), True),
  ],
)
def test_result_does_not_depend_on_the_mesh(
  uninterrupted, prepared, tmp_path, monkeypatch, axes, gather_weights
):
  _, whole, state = uninterrupted
  original = tiny.experiment

  def on_mesh(**changes):
    config = original(**changes)
    config.mesh = config_lib.MeshConfig(
      **dict(zip(("data", "fsdp", "tensor"), axes, strict=True))
    )
    return config

  monkeypatch.setattr(tiny, "experiment", on_mesh)
  summary, meshed = run(
    tmp_path, prepared, devices=8, gather_weights=gather_weights
  )
  # Sums over shards round differently, 1e-7 each; six Adam steps amplify.
  np.testing.assert_allclose(flat(meshed), flat(state), atol=2e-4)
  assert summary["accuracy"] == pytest.approx(whole["accuracy"], abs=0.02)


def test_microbatch_that_does_not_divide_over_the_mesh_is_refused(
  prepared, tmp_path
):
  with pytest.raises(ValueError, match=r"microbatch_size.*Use 16"):
    open_run(tmp_path, prepared, devices=8, microbatch_size=12)


def test_a_diverging_run_stops_and_saves_nothing_of_it(prepared, tmp_path):
  experiment = open_run(tmp_path, prepared, checkpoint_every_steps=1)
  experiment.config.optimizer.learning_rate = 1e30
  experiment = loop.open_experiment(
    experiment.config, tmp_path, devices=jax.devices()[:1]
  )
  with pytest.raises(
    loop.NonFiniteError, match=r"Step \d.*learning_rate"
  ) as caught:
    loop.train(experiment, log=io.StringIO())
  state, _ = loop.restore(experiment)
  assert np.isfinite(flat(state)).all()
  bad_step = int(str(caught.value).split()[1].rstrip(":"))
  assert int(state.step) == bad_step - 1
  # Fails if: a checkpoint is written before its metrics were looked at.


@pytest.mark.parametrize(
  "changes",
  [
    {"enabled": False},
    pytest.param({"noise": False}, marks=pytest.mark.slow),
    pytest.param(
      {"clipping": config_lib.Clipping.NONE}, marks=pytest.mark.slow
    ),
    {"clipping": config_lib.Clipping.BATCH},
  ],
)
def test_runs_without_a_guarantee_say_infinity(prepared, tmp_path, changes):
  summary, _ = run(tmp_path, prepared, num_steps=2, **changes)
  assert summary["epsilon"] == np.inf
  assert summary["guarantee"].startswith("No guarantee")
  assert records.read_json(tmp_path / "privacy.json")["epsilon"] == "inf"
  assert all(row["epsilon"] == "inf" for row in rows(tmp_path))


def write_images(folder, *, broken=()):
  rng = np.random.default_rng(0)
  for split, count in (("train", 12), ("test", 4)):
    for name in ("cat", "dog"):
      (folder / split / name).mkdir(parents=True)
      for number in range(count):
        pixels = rng.integers(0, 256, (9, 7), np.uint8)
        path = folder / split / name / f"{number}.png"
        PIL.Image.fromarray(pixels).save(path)
        if f"{split}/{name}/{number}.png" in broken:
          path.write_bytes(path.read_bytes()[:40])


def image_run(tmp_path, **data):
  config = tiny.experiment(expected_batch_size=24, num_steps=2)
  config.data = dataclasses.replace(
    config.data,
    source=config_lib.Source.IMAGE_FOLDER,
    path=str(tmp_path / "images"),
    prompt="Which animal is it?",
    **data,
  )
  workdir = tmp_path / "run"
  workdir.mkdir()
  experiment = loop.open_experiment(config, workdir, devices=jax.devices()[:1])
  return loop.train(experiment, log=io.StringIO())


@pytest.mark.slow
def test_a_folder_of_images_trains_without_sound(tmp_path):
  write_images(tmp_path / "images")
  summary, _ = image_run(tmp_path)
  assert summary["num_train"] == 24
  assert summary["num_test"] == 8
  assert summary["bad_records"] == {}


def test_a_truncated_image_is_named(tmp_path):
  write_images(tmp_path / "images", broken=("train/dog/3.png",))
  with pytest.raises(sources.BadRecordError, match=r"dog/3\.png"):
    image_run(tmp_path)


def test_skipped_images_are_counted_and_reported(tmp_path):
  broken = ("train/cat/0.png", "test/dog/1.png")
  write_images(tmp_path / "images", broken=broken)
  summary, _ = image_run(tmp_path, on_bad_record=config_lib.BadRecord.SKIP)
  assert sorted(summary["bad_records"]) == sorted(broken)
  assert summary["num_train"] == 24  # The accountant's number does not move.
  sizes = [row["nonprivate/batch_size"] for row in rows(tmp_path / "run")]
  assert max(sizes) <= 23


def _flip_bits(workdir, step):
  """Changes a bit in every kilobyte of a checkpoint's numbers.

  One bit alone may lie where nothing is read: of 200 bits of one checkpoint's
  largest file 66 changed no number.
  """
  for path in (workdir / "checkpoints" / str(step) / "state").rglob("d/*"):
    content = bytearray(path.read_bytes())
    for place in range(len(content) // 2 % 1024, len(content), 1024):
      content[place] ^= 4
    path.write_bytes(content)


def _change_a_number(workdir, step):
  """Writes a checkpoint again with one other number: files that are whole."""
  folder = workdir / "checkpoints" / str(step) / "state"
  with ocp.StandardCheckpointer() as checkpointer:
    state = checkpointer.restore(folder)
    largest = max(jax.tree.leaves(state["params"]), key=lambda leaf: leaf.size)
    place = (0,) * largest.ndim
    state = jax.tree.map(
      lambda leaf: leaf.at[place].add(1) if leaf is largest else leaf, state
    )
    checkpointer.save(folder, state, force=True)


# Orbax's other reads end after its event loop, which Python reports.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
  "damage",
  [
    "number",
    pytest.param("bits", marks=pytest.mark.slow),
    pytest.param("cut", marks=pytest.mark.slow),
    pytest.param("gone", marks=pytest.mark.slow),
  ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
  uninterrupted, prepared, tmp_path, monkeypatch, damage, caplog
):
  interrupted_at(tmp_path, prepared, monkeypatch, dispatch=5)
  folder = tmp_path / "checkpoints"
  assert sorted(path.name for path in folder.iterdir()) == ["2", "4"]
  if damage == "number":
    _change_a_number(tmp_path, 4)
  elif damage == "bits":
    _flip_bits(tmp_path, 4)
  elif damage == "cut":
    for path in (folder / "4" / "state").rglob("*"):
      if path.is_file():
        path.write_bytes(path.read_bytes()[:10])
  else:
    shutil.rmtree(folder / "4" / "state")
  with caplog.at_level("WARNING"):
    summary, resumed = run(tmp_path, prepared)
  assert "step 4 is damaged" in caplog.text
  assert "going on from step 2" in caplog.text
  assert (folder / "damaged-4.0").is_dir()
  _, _, state = uninterrupted
  np.testing.assert_array_equal(flat(resumed), flat(state))
  assert summary["status"] == "complete"
  ledger = records.read_json(tmp_path / "privacy.json")
  assert ledger["charged_steps"] == 6
  # Fails if: damaged numbers are trained on, or a damaged file ends the run.


def test_checkpoints_that_are_all_damaged_are_named_and_kept(
  prepared, tmp_path, monkeypatch
):
  interrupted_at(tmp_path, prepared, monkeypatch, dispatch=3)
  shutil.rmtree(tmp_path / "checkpoints" / "2" / "state")
  with pytest.raises(ValueError, match="can be restored.*step 2="):
    run(tmp_path, prepared)
  assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["2"]
