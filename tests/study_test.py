"""Tables of results: cells are run once, and holes end in an error."""

import json
import pathlib
import subprocess
import types

import pytest

from ppnet import config as config_lib
from ppnet import main, study
from ppnet.core import records


def experiment(**changes):
  return config_lib.ExperimentConfig(
    name="t",
    job=config_lib.Job.TABLE,
    seed=7,
    data=config_lib.DataConfig(path="/d"),
    table=config_lib.TableConfig(
      **{
        "subject": config_lib.TableSubject.RESULTS,
        "title": "A table",
        "cell_config": "cell.py",
        "tasks": "fsdd, reviews",
        "rows": "plain,private",
        "baseline": "plain",
      }
      | changes
    ),
  )


@pytest.fixture
def started(monkeypatch):
  """What was started; each process writes its record but reviews, private."""
  commands = []

  def fake(command, check):
    del check
    commands.append(command)
    flags = dict(flag.lstrip("-").split("=", 1) for flag in command[3:])
    task, row, *_ = flags["config"].split(":")[1].split(",")
    if (task, row) == ("reviews", "private") and len(commands) < 5:
      return subprocess.CompletedProcess(command, 1)
    folder = pathlib.Path(flags["workdir"])
    folder.mkdir(parents=True)
    record = {
      "claim": {"epsilon": "inf"},
      "utility": [{"accuracy": 0.5}, {"accuracy": 0.7}],
      "membership": {"by_model": [{"leakage": 0.1}, {"leakage": 0.2}]},
      "bounds": [{"epsilon": 0.3, "exceeds": False}],
    }
    (folder / "audit.json").write_text(json.dumps(record))
    (folder / "config.json").write_text('{"commit": "c0ffee"}')
    return subprocess.CompletedProcess(command, 0)

  monkeypatch.setattr(study, "subprocess", types.SimpleNamespace(run=fake))
  return commands


def test_a_hole_is_named_and_only_it_is_run_again(started, tmp_path, capsys):
  config = experiment()
  with pytest.raises(RuntimeError, match=r"1 of 4 .* reviews, private\."):
    main.run_job(config, tmp_path)
  assert len(started) == 4
  assert "reviews, private" in (tmp_path / "table.md").read_text()
  assert 'class="hole"' in (tmp_path / "table.html").read_text()
  main.run_job(config, tmp_path)
  assert len(started) == 5
  assert records.read_json(tmp_path / "table.json")["holes"] == []
  before = {
    path.name: path.read_bytes()
    for path in tmp_path.iterdir()
    if path.suffix in (".md", ".tex", ".csv", ".json", ".html")
  }
  main.run_job(config, tmp_path)
  assert len(started) == 5  # Run again, it only reads.
  for name, content in before.items():
    assert (tmp_path / name).read_bytes() == content, name
  assert "A table" in capsys.readouterr().out


def test_a_deleted_cell_is_run_again(started, tmp_path):
  config = experiment(tasks="fsdd")
  main.run_job(config, tmp_path)
  (tmp_path / "cells" / "fsdd" / "plain" / "audit.json").unlink()
  with pytest.raises(FileExistsError):  # The fake's: it was started.
    main.run_job(config, tmp_path)
  assert len(started) == 3


def test_a_cell_is_a_command_that_a_person_may_give(tmp_path):
  config = experiment()
  command = study.command(config, tmp_path, study.cells(config, tmp_path)[1])
  assert command[1:3] == ["-m", "ppnet.main"]
  assert "--config=cell.py:fsdd,private,cpu,/d" in command
  assert "--config.seed=7" in command
  assert f"--workdir={tmp_path}/cells/fsdd/private" in command


def test_a_table_of_training_trains_and_draws(monkeypatch, tmp_path):
  def fake(command, check):
    del check
    flags = dict(flag.lstrip("-").split("=", 1) for flag in command[3:])
    assert flags["config.job"] == "TRAIN"
    folder = pathlib.Path(flags["workdir"])
    folder.mkdir(parents=True)
    rows = [
      {"split": split, "step": step, "epoch": step / 2, "accuracy": 0.5}
      | {"nonprivate/loss/task": 1.0 / step}
      for split in ("train", "test")
      for step in (1, 2, 3, 4)
    ]
    (folder / "metrics.jsonl").write_text(
      "".join(f"{json.dumps(row)}\n" for row in rows)
    )
    (folder / "summary.json").write_text('{"accuracy": 0.625}')
    return subprocess.CompletedProcess(command, 0)

  monkeypatch.setattr(study, "subprocess", types.SimpleNamespace(run=fake))
  config = experiment(subject=config_lib.TableSubject.TRAINING, tasks="fsdd")
  assert "0.6250" in study.table(config, tmp_path)
  for name in ("losses", "indicators"):
    assert (tmp_path / "figures" / f"{name}.png").exists()


@pytest.mark.parametrize(
  ("field", "value", "says"),
  [
    ("rows", "", r"table\.rows"),
    ("tasks", "a,a", "once"),
    ("cell_config", "", r"table\.cell_config"),
  ],
)
def test_a_table_of_nothing_is_refused(field, value, says):
  with pytest.raises(ValueError, match=says):
    config_lib.validate(experiment(**{field: value}))
