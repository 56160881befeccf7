"""Whole tiny runs whose unit is a user, with a clip norm that adapts."""

import io

import jax
import numpy as np
import PIL.Image
import pytest

from ppnet import config as config_lib
from ppnet.core import records
from ppnet.train import loop
from tests import tiny

NUM_USERS, NUM_STEPS = 12, 4


@pytest.fixture(scope="module")
def images(tmp_path_factory):
  """User u has u % 4 + 1 pictures of either animal."""
  folder = tmp_path_factory.mktemp("images")
  rng = np.random.default_rng(0)
  for split in ("train", "test"):
    for name in ("cat", "dog"):
      (folder / split / name).mkdir(parents=True)
      for user in range(NUM_USERS):
        for number in range(user % 4 + 1):
          pixels = rng.integers(0, 256, (9, 7), np.uint8)
          PIL.Image.fromarray(pixels).save(
            folder / split / name / f"u{user}_{number}.png"
          )
  return folder


def open_run(workdir, images, **changes):
  config = tiny.experiment(
    **{
      "unit": config_lib.PrivacyUnit.USER,
      "max_records_per_user": 3,
      "clip_quantile": 0.5,
      "clip_count_stddev": 20.0,
      "expected_batch_size": 6,
      "num_steps": NUM_STEPS,
      "microbatch_size": 4,
      "accountant": config_lib.Accountant.RDP,  # It is quick.
    }
    | changes
  )
  config.data.source = config_lib.Source.IMAGE_FOLDER
  config.data.path = str(images)
  config.data.user_pattern = "[^/]*/(u[0-9]*)_.*"
  config.data.prompt = "Which animal is it?"
  config_lib.validate(config)
  workdir.mkdir(exist_ok=True)
  records.write_json(workdir / "config.json", {"config": config})
  return loop.open_experiment(config, workdir, devices=jax.devices()[:1])


def train(experiment):
  return loop.train(experiment, log=io.StringIO())


def flat(state):
  leaves = jax.tree.leaves(jax.device_get(state))
  return np.concatenate([np.ravel(leaf) for leaf in leaves])


def test_a_user_level_run_says_so_and_resumes_bit_for_bit(
  images, tmp_path, monkeypatch
):
  whole = open_run(tmp_path / "whole", images)
  assert whole.mechanism.sampler.num_examples == NUM_USERS
  summary, state = train(whole)
  assert summary["num_units"] == NUM_USERS
  assert summary["num_train"] == 2 * sum(u % 4 + 1 for u in range(NUM_USERS))
  assert summary["unit"] == "USER"
  assert "training user with all their records" in summary["guarantee"]
  assert "noisy counts included" in summary["guarantee"]
  rows = records.latest_rows(tmp_path / "whole/metrics.jsonl", split="train")
  assert max(row["nonprivate/batch_size"] for row in rows) <= NUM_USERS
  clip_norms = [row["clip_norm"] for row in rows]
  assert clip_norms[0] == 1.0
  assert len(set(clip_norms)) == NUM_STEPS  # Released, hence not nonprivate/.
  assert float(state.clip_norm) not in clip_norms

  broken = open_run(tmp_path / "broken", images)
  original = loop._Run._dispatch

  def stopping(self, data):
    if data["step"] == 3:
      self._checkpoints.wait()
      raise KeyboardInterrupt
    return original(self, data)

  with monkeypatch.context() as patch:
    patch.setattr(loop._Run, "_dispatch", stopping)
    with pytest.raises(KeyboardInterrupt):
      train(broken)
  _, resumed = train(open_run(tmp_path / "broken", images))
  np.testing.assert_array_equal(flat(resumed), flat(state))
  again = records.latest_rows(tmp_path / "broken/metrics.jsonl", split="train")
  assert [row["clip_norm"] for row in again] == clip_norms
  # Fails if: the clip norm is not in the checkpoint, or a resumed step takes
  # other records of a user.


@pytest.mark.slow
@pytest.mark.parametrize(
  "changes",
  [
    {},
    {"clip_quantile": None, "clip_rule": config_lib.ClipRule.NORMALIZE},
    {"clip_quantile": None, "clip_scope": config_lib.ClipScope.PER_LAYER},
    {
      "unit": config_lib.PrivacyUnit.EXAMPLE,
      "max_records_per_user": 1,
      "views_per_example": 2,
    },
  ],
)
def test_every_engine_trains_the_same_parameters(images, tmp_path, changes):
  trained = {}
  for engine in config_lib.Engine:
    experiment = open_run(
      tmp_path / engine.value, images, engine=engine, **changes
    )
    trained[engine] = flat(train(experiment)[1].params)
  for engine, params in trained.items():
    np.testing.assert_allclose(
      params, trained[config_lib.Engine.VMAP], atol=1e-5, err_msg=engine.name
    )
