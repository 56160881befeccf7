"""The command line, as a user meets it: real processes, real kills."""

import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from ppnet import config as config_lib
from ppnet import main
from ppnet.core import records
from ppnet.data import text
from ppnet.models import hf
from tests import tiny

ROOT = pathlib.Path(__file__).parents[1]
NUM_STEPS = 40
FLAGS = (
  "--config=tests/tiny.py",
  f"--config.train.num_steps={NUM_STEPS}",
  "--config.train.eval_every_steps=20",
  "--config.train.checkpoint_every_steps=3",
  # Every process computes the whole curve of epsilon: RDP takes no time.
  "--config.privacy.accountant=rdp",
)


def start(*flags, workdir=None):
  where = [] if workdir is None else [f"--workdir={workdir}"]
  return subprocess.Popen(
    [sys.executable, "-m", "ppnet.main", *flags, *where],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def run(*flags, workdir=None):
  process = start(*flags, workdir=workdir)
  output, _ = process.communicate(timeout=300)
  return process.returncode, output


def parameters(workdir):
  folder = max((workdir / "checkpoints").iterdir(), key=lambda p: int(p.name))
  state = ocp.StandardCheckpointer().restore(folder / "state")
  leaves = []

  def visit(node):
    for _, child in sorted(node.items()):
      visit(child) if isinstance(child, dict) else leaves.append(child)

  visit(state["params"])
  return np.concatenate([np.ravel(leaf) for leaf in leaves])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("finished") / "run"
  code, output = run(*FLAGS, workdir=workdir)
  assert code == 0, output
  return workdir, output


def charged_steps(workdir):
  path = workdir / "privacy.json"
  return records.read_json(path)["charged_steps"] if path.exists() else 0


def kill_when_charged(workdir, target, delay_secs):
  """Starts the run and kills it, hard, soon after `target` charges."""
  process = start(*FLAGS, workdir=workdir)
  deadline = time.monotonic() + 120
  while charged_steps(workdir) < target and process.poll() is None:
    assert time.monotonic() < deadline
    time.sleep(0.002)
  time.sleep(delay_secs)
  process.send_signal(signal.SIGKILL)
  process.communicate()


def test_kills_at_random_moments_lose_nothing_and_never_under_report(
  finished, tmp_path
):
  """Seeded, so the end must equal the uninterrupted run's, bit for bit."""
  rng = random.Random(0)
  released = 0
  for target in (1, 8, 17, 29):
    kill_when_charged(tmp_path, target, rng.uniform(0, 0.08))
    steps = [
      row["step"] for row in records.read_json_lines(tmp_path / "metrics.jsonl")
    ]
    saved = [
      int(folder.name)
      for folder in (tmp_path / "checkpoints").glob("*")
      if folder.name.isdigit()
    ]
    released = max([released, *steps, *saved])
    assert charged_steps(tmp_path) >= released
  code, output = run(*FLAGS, workdir=tmp_path)
  assert code == 0, output
  whole, _ = finished
  np.testing.assert_array_equal(parameters(tmp_path), parameters(whole))
  summaries = [records.read_json(d / "summary.json") for d in (tmp_path, whole)]
  clock = "nonprivate/machine/"
  assert any(name.startswith(clock) for name in summaries[0])
  for name in summaries[0].keys() | summaries[1].keys():
    if not name.startswith(clock):
      assert summaries[0][name] == summaries[1][name], name
  assert charged_steps(tmp_path) == NUM_STEPS
  restarts = records.read_json(tmp_path / "privacy.json")["history"]
  assert len(restarts) == 5
  machine = records.read_json(tmp_path / "machine.json")
  assert machine["num_starts"] == 5
  assert machine["num_steps"] == NUM_STEPS
  assert machine["nonprivate/secs"]["stopped"] > 0
  # Fails if: a step is charged after it ran, or a restart forgets anything.


def test_sigterm_saves_and_the_same_command_goes_on(finished, tmp_path):
  process = start(*FLAGS, workdir=tmp_path)
  deadline = time.monotonic() + 120
  while charged_steps(tmp_path) < 4 and process.poll() is None:
    assert time.monotonic() < deadline
    time.sleep(0.002)
  process.send_signal(signal.SIGTERM)
  output, _ = process.communicate(timeout=120)
  assert process.returncode == 75, output
  saved = max(
    int(folder.name)
    for folder in (tmp_path / "checkpoints").iterdir()
    if folder.name.isdigit()
  )
  assert f"SIGTERM) after step {saved} of {NUM_STEPS}" in output
  assert charged_steps(tmp_path) == saved < NUM_STEPS
  # The machine that it goes on with may be another one.
  code, output = run(
    *FLAGS,
    "--config.perf.data_workers=1",
    "--config.perf.data_threads=2",
    workdir=tmp_path,
  )
  assert code == 0, output
  assert charged_steps(tmp_path) == NUM_STEPS
  np.testing.assert_array_equal(parameters(tmp_path), parameters(finished[0]))
  # Fails if: steps are lost or repeated, or workers see other records.


def test_a_run_leaves_everything_a_reader_needs(finished):
  workdir, output = finished
  for name in (
    "config.json",
    "metrics.jsonl",
    "privacy.json",
    "summary.json",
    "figures/training.png",
    "checkpoints",
    "tensorboard",
  ):
    assert (workdir / name).exists()
  for word in ("accuracy", "macro F1", "AUC", "ε", "δ", "guarantee", "leakage"):
    assert word in output
  summary = records.read_json(workdir / "summary.json")
  assert 0 <= summary["leakage"] <= 1
  assert summary["num_steps"] == NUM_STEPS


def test_a_finished_run_is_shown_and_not_trained_again(finished):
  workdir, _ = finished
  before = parameters(workdir)
  code, output = run(*FLAGS, workdir=workdir)
  assert code == 0
  assert "nothing is trained again" in output
  np.testing.assert_array_equal(parameters(workdir), before)


def test_evaluate_repeats_the_run_s_own_numbers(finished):
  workdir, _ = finished
  code, output = run(*FLAGS, "--config.job=EVALUATE", workdir=workdir)
  assert code == 0, output
  summary = records.read_json(workdir / "summary.json")
  evaluation = records.read_json(workdir / "evaluation.json")
  for name in ("accuracy", "f1", "auc_roc", "loss", "epsilon", "num_steps"):
    assert evaluation[name] == summary[name]
  for name in ("charged_steps", "guarantee", "seeded"):
    assert evaluation[name] == summary[name]
  assert "seed" in output  # The mark of a run that others can repeat.
  maps = records.read_json(workdir / "attention.json")
  assert maps["tokens"][:3] == ["<s>", "image", "image"]
  clean, noisy = np.array(maps["clean"]), np.array(maps["noisy"])
  assert clean.shape == noisy.shape == (2, *[len(maps["tokens"])] * 2)
  assert (workdir / "figures" / "attention.png").exists()
  np.testing.assert_array_equal(noisy[:, 0], clean[:, 0])  # The first token.
  assert np.abs(noisy - clean).max() > 0.01


def test_generate_continues_test_records_of_a_checkpoint(finished):
  workdir, _ = finished
  code, output = run(
    *FLAGS,
    "--config.job=GENERATE",
    # These do not make it another experiment.
    "--config.generate.num_records=3",
    "--config.generate.max_new_tokens=2",
    workdir=workdir,
  )
  assert code == 0, output
  rows = records.read_json(workdir / "generations.json")
  assert len(rows) == 3
  prompt = tiny.experiment().data.prompt
  for row in rows:
    assert row["prompt"].startswith("<image><image>")
    assert row["prompt"].endswith(prompt)
    assert 1 <= len(row["tokens"]) <= 2
    assert repr(row["continuation"]) in output


def test_generate_continues_texts_with_published_weights(tmp_path):
  decoder = config_lib.llama_tiny(vocab_size=96)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda leaf: rng.normal(size=leaf.shape).astype(np.float32),
    hf.abstract_shapes(decoder),
  )
  hf.save(tmp_path / "llama", decoder, params)
  text.train_tokenizer(
    text.public_sentences("Which one?"),
    vocab_size=90,
    class_names=[],
    model_path=tmp_path / "llama" / "tokenizer.model",
  )
  config = tiny.experiment(job=config_lib.Job.GENERATE)
  config.generate = config_lib.GenerateConfig(
    weights=str(tmp_path / "llama"),
    prompts=("Which one?", "the digit"),
    max_prompt_len=16,
    max_new_tokens=3,
  )
  main.run_job(config, tmp_path / "run")
  rows = records.read_json(tmp_path / "run" / "generations.json")
  assert [row["prompt"] for row in rows] == ["Which one?", "the digit"]
  assert all(1 <= len(row["tokens"]) <= 3 for row in rows)
  config.generate.prompts = ()
  with pytest.raises(ValueError, match="generate.prompts beside"):
    main.run_job(config, tmp_path / "run")


def test_another_configuration_is_refused_by_field(finished):
  workdir, _ = finished
  before = {p.name: p.stat().st_mtime_ns for p in workdir.iterdir()}
  code, output = run(*FLAGS, "--config.privacy.epsilon=3", workdir=workdir)
  assert code == 1
  assert "privacy.epsilon (1.0 there, 3.0 now)" in output
  assert "Traceback" not in output
  del before[".lock"]
  for name, changed in before.items():
    assert (workdir / name).stat().st_mtime_ns == changed


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (("--config.privacy.epsilo=3",), "Did you mean 'privacy.epsilon'?"),
    (("--config.privacy.epsilon=-1",), "privacy.epsilon > 0"),
    (("--confg=x",), "Did you mean: config"),
    (("tests",), "unexpected arguments"),
    (("--sweep=seed",), "FIELD=VALUE"),
    (("--profile_steps=5:7",), "within the run's 6 steps"),
    (("--profile_steps=1:2", "--config.job=EVALUATE"), "with one TRAIN job"),
  ],
)
def test_mistakes_end_in_one_clear_line(tmp_path, flags, message):
  code, output = run("--config=tests/tiny.py", *flags, workdir=tmp_path / "w")
  assert code == 1
  assert message in output
  assert "Traceback" not in output


def test_help_explains_and_lists_every_field():
  code, output = run("--help")
  assert code == 0
  assert "configs/quickstart.py" in output
  assert "--workdir" in output
  assert "privacy.noise_multiplier = None" in output
  assert "privacy.accountant = pld (pld, rdp)" in output


def test_no_config_is_explained():
  code, output = run()
  assert code == 1
  assert "--config is missing" in output


def test_sweep_runs_the_grid_once_and_shows_it(tmp_path):
  flags = (
    "--config=tests/tiny.py",
    "--config.train.num_steps=1",
    "--sweep=seed=3;privacy.enabled=true,false",
  )
  code, output = run(*flags, "--sweep_shard=0/2", workdir=tmp_path)
  assert code == 0, output
  runs = sorted(path.parent.name for path in tmp_path.glob("*/summary.json"))
  assert runs == ["run-privacy.enabled=true,seed=3"]
  code, output = run(*flags, "--sweep_shard=1/2", workdir=tmp_path)
  assert code == 0, output
  assert "[1/2]" not in output  # The other shard's, and finished.
  lines = (tmp_path / "sweep.csv").read_text().splitlines()
  assert len(lines) == 3
  assert lines[0].startswith("seed,privacy.enabled,accuracy")
  assert sum(",inf," in line for line in lines) == 1  # No privacy: infinity.


def test_every_job_is_there():
  assert set(main._JOBS) == set(config_lib.Job)


def test_account_answers_without_training_or_data(tmp_path, capsys):
  config = tiny.experiment(accountant=config_lib.Accountant.RDP)
  config.job = config_lib.Job.ACCOUNT
  config.account.num_examples = 5000
  main.run_job(config, tmp_path)
  record = records.read_json(tmp_path / "account.json")
  assert record["num_examples"] == 5000
  assert record["sampling_prob"] == 24 / 5000
  assert 0.995 <= record["epsilon"] <= 1.0
  assert "| steps " in capsys.readouterr().out
  assert (tmp_path / "figures" / "budget.png").exists()
  assert not (tmp_path / "prepared").exists()
  assert not (tmp_path / "privacy.json").exists()  # Nothing is bound by it.
