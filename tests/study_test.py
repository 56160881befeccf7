"""Tables of results: cells are run once, and holes end in an error."""

import base64
import dataclasses
import json
import os
import pathlib
import runpy
import subprocess
import sys
import types

import pytest

from ppnet import config as config_lib
from ppnet import main, study
from ppnet.core import records, workdirs
from tests.report import attention_test


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


_CELL = """
from ppnet import config


def get_config(argument):
  task, row, *_ = argument.split(",", 3)
  made = config.ExperimentConfig(name=f"{task}-{row}")
  made.attention_noise.stddev = 0.5 if "noisy" in row else 0.0
  return made
"""


@pytest.fixture
def started(monkeypatch, tmp_path):
  """What was started; each process writes its record but reviews, private."""
  commands = []

  def fake(command, check, env):
    del check, env
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
    argument = f"{task},{row},cpu,/d"
    made = runpy.run_path("cell.py")["get_config"](argument)
    made.seed = int(flags["config.seed"])
    made.audit.num_models = int(flags["config.audit.num_models"])
    plain = {"config": records.to_plain(made)} | workdirs.provenance()
    (folder / "config.json").write_text(json.dumps(plain))
    return subprocess.CompletedProcess(command, 0)

  monkeypatch.setattr(study, "subprocess", types.SimpleNamespace(run=fake))
  (tmp_path / "here").mkdir()
  (tmp_path / "here" / "cell.py").write_text(_CELL)
  monkeypatch.chdir(tmp_path / "here")
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


def test_a_finished_cell_is_taken_for_what_it_was_run_as(started, tmp_path):
  config = experiment()
  with pytest.raises(RuntimeError, match="1 of 4"):
    main.run_job(config, tmp_path)
  main.run_job(config, tmp_path)
  for path in (tmp_path / "cells").rglob("config.json"):  # As once written:
    record = json.loads(path.read_text())
    del record["config"]["train"]["views_per_example"]  # Came since.
    record["config"]["train"]["went_since"] = 3
    path.write_text(json.dumps(record))
  main.run_job(config, tmp_path)
  assert len(started) == 5
  cell = pathlib.Path("cell.py")
  for changed in ("train.views_per_example", "train.num_steps"):
    cell.write_text(
      _CELL.replace("  return made", f"  made.{changed} = 2\n  return made")
    )
    with pytest.raises(ValueError, match=rf"hold the cell.*{changed}"):
      main.run_job(config, tmp_path)
  assert len(started) == 5
  # Fails if: what an old record does not say is not compared.


@pytest.fixture
def real_cells(monkeypatch, tmp_path):
  """Cells that are real processes: each waits until two others have begun."""
  code = (
    "import os, pathlib, sys, time\n"
    "here = pathlib.Path(sys.argv[1])\n"
    "(here / f'began_{os.getpid()}').touch()\n"
    "print('devices', os.environ.get('JAX_NUM_CPU_DEVICES'))\n"
    "end = time.monotonic() + 20\n"
    "while len(list(here.glob('began_*'))) < 2 and time.monotonic() < end:\n"
    "  time.sleep(0.01)\n"
    "print(len(list(here.glob('began_*'))), 'have begun')\n"
    "sys.exit(3)\n"
  )
  command = [sys.executable, "-c", code, str(tmp_path)]
  monkeypatch.setattr(study, "command", lambda *unused: command)
  monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "")
  monkeypatch.delenv("JAX_NUM_CPU_DEVICES")
  (tmp_path / "cell.py").write_text(_CELL)
  (tmp_path / "w").mkdir()
  monkeypatch.chdir(tmp_path)


def test_cells_run_side_by_side_and_say_why_they_failed(
  real_cells, tmp_path, capsys
):
  config = experiment(cells_at_once=2, tasks="fsdd")
  with pytest.raises(RuntimeError, match="2 of 2 cells have no record"):
    study.table(config, tmp_path / "w", maps=None)
  for row in ("plain", "private"):
    said = (tmp_path / "w" / "cells" / "fsdd" / f"{row}.log").read_text()
    assert "2 have begun" in said
    assert f"devices {max(1, (os.cpu_count() or 1) // 2)}" in said
  told = capsys.readouterr().out
  assert "fsdd, private: failed with 3\n" in told
  assert "  2 have begun" in told
  # Fails if: a cell waits for the one before it.


def test_one_cell_at_a_time_has_the_terminal_and_all_devices(
  real_cells, tmp_path, capfd
):
  config = experiment(rows="plain", tasks="fsdd", baseline="", cells_at_once=2)
  (tmp_path / "began_0").touch()
  with pytest.raises(RuntimeError, match="1 of 1 cells"):
    study.table(config, tmp_path / "w", maps=None)
  assert "devices None" in capfd.readouterr().out
  assert not (tmp_path / "w" / "cells" / "fsdd" / "plain.log").exists()


def test_a_deleted_cell_is_run_again(started, tmp_path):
  config = experiment(tasks="fsdd")
  main.run_job(config, tmp_path)
  (tmp_path / "cells" / "fsdd" / "plain" / "audit.json").unlink()
  with pytest.raises(FileExistsError):  # The fake's: it was started.
    main.run_job(config, tmp_path)
  assert len(started) == 3


@pytest.mark.parametrize(
  ("tuning", "says"),
  [
    ("NONE", "not chosen by looking at runs"),
    ("PUBLIC", "on public data alone"),
    ("PRIVATE", "of this table covers that choice"),
  ],
)
def test_a_table_says_how_hyper_parameters_were_chosen(
  started, tmp_path, tuning, says
):
  cell = pathlib.Path("cell.py")
  told = f"  made.tuning = config.Tuning.{tuning}\n  return made"
  cell.write_text(cell.read_text().replace("  return made", told))
  main.run_job(experiment(tasks="fsdd"), tmp_path)
  for name in ("table.md", "table.tex", "table.html"):
    assert says in (tmp_path / name).read_text()


def test_a_cell_of_another_experiment_is_refused(started, tmp_path):
  config = experiment(tasks="fsdd")
  main.run_job(config, tmp_path)
  config.seed = 8
  with pytest.raises(ValueError, match=r"fsdd/plain .*seed \(7 there, 8 now"):
    main.run_job(config, tmp_path)
  config.seed, config.data.path = 7, "/elsewhere"
  main.run_job(config, tmp_path)  # Where data lie does not matter.
  assert len(started) == 2
  # Fails if: numbers of two experiments may stand in one table.


def test_attention_is_drawn_once_for_each_task(started, tmp_path, monkeypatch):
  asked = []

  def maps(config, folder):
    asked.append((config.attention_noise.stddev, folder.parent.name))
    return attention_test.record(num_heads=1)

  monkeypatch.setattr(main.audit_attention, "first_models_maps", maps)
  config = experiment(rows="plain,noisy,noisy_2", tasks="fsdd")
  for _ in range(2):  # The second time it is read.
    main.run_job(config, tmp_path)
    assert asked == [(0.5, "fsdd")]
  folder = tmp_path / "cells" / "fsdd"
  assert (folder / "noisy" / "attention.json").exists()
  assert not (folder / "noisy_2" / "attention.json").exists()
  assert (tmp_path / "figures" / "attention_fsdd.png").exists()
  page = (tmp_path / "table.html").read_text()
  assert page.count('<img alt="') == 1
  assert "fsdd, noisy: the first model" in page


def test_a_page_says_why_it_has_no_attention(started, tmp_path):
  config = experiment(rows="noisy", tasks="fsdd", baseline="")
  main.run_job(config, tmp_path)  # The fake left no models.
  page = (tmp_path / "table.html").read_text()
  assert "No attention maps of fsdd, noisy" in page
  assert "group-000.npz" in page


def test_a_page_has_the_curves_of_all_cells(started, tmp_path):
  config = experiment(tasks="fsdd")
  main.run_job(config, tmp_path)
  for row in ("plain", "private"):
    figures = tmp_path / "cells" / "fsdd" / row / "figures"
    figures.mkdir()
    (figures / "roc.png").write_bytes(row.encode())
  main.run_job(config, tmp_path)
  page = (tmp_path / "table.html").read_text()
  for row in ("plain", "private"):
    assert base64.b64encode(row.encode()).decode() in page


_PART = """
from ppnet import config


def get_config(size):
  return config.ExperimentConfig(
    name="part",
    job=config.Job.TABLE,
    table=config.TableConfig(
      subject=config.TableSubject.RESULTS,
      title="Part {rows}",
      cell_config="cell.py",
      tasks="fsdd",
      rows="{rows}",
      size=size,
    ),
  )
"""


def test_a_collection_is_several_tables_with_shared_cells(started, tmp_path):
  for name, rows in (("one", "plain,private"), ("two", "plain,dp_2=x")):
    pathlib.Path(f"{name}.py").write_text(_PART.format(rows=rows))
  config = experiment(
    subject=config_lib.TableSubject.COLLECTION, parts="one.py,two.py", rows=""
  )
  workdir = tmp_path / "all"
  main.run_job(config, workdir)
  assert len(started) == 3
  assert all("--config.seed=7" in command for command in started)
  assert (workdir / "cells" / "fsdd" / "x" / "audit.json").exists()
  for name in ("one", "two"):
    assert (workdir / name / "table.tex").exists()
  page = (workdir / "table.html").read_text()
  assert page.count("<h2>Part") == 2
  assert page.count("<details>") == 3  # A shared cell stands there once.
  main.run_job(config, workdir)
  assert len(started) == 3
  (workdir / "cells" / "fsdd" / "x" / "audit.json").unlink()
  with pytest.raises(FileExistsError):  # The fake's: it was started.
    main.run_job(config, workdir)


def test_a_collection_refuses_a_foreign_cell_before_it_runs_any(
  started, tmp_path
):
  for name, rows in (("one", "plain"), ("two", "dp_2=x")):
    pathlib.Path(f"{name}.py").write_text(_PART.format(rows=rows))
  config = experiment(
    subject=config_lib.TableSubject.COLLECTION, parts="two.py", rows=""
  )
  main.run_job(config, tmp_path / "all")
  assert len(started) == 1
  config.table.parts, config.seed = "one.py,two.py", 8
  with pytest.raises(ValueError, match=r"fsdd/x .*seed \(7 there, 8 now"):
    study.collection(config, tmp_path / "all", maps=None)
  assert len(started) == 1
  # Fails if: hours of the first table are spent before the second is looked at.


def test_the_papers_collection_has_every_table_of_results():
  config = load("all", "cpu")
  config_lib.validate(config)
  folder = pathlib.Path(__file__).parents[1] / "configs" / "paper"
  others = {path.stem for path in folder.glob("*.py")} - {"all", "cell"}
  parts = {pathlib.Path(part).stem for part in config.table.parts.split(",")}
  assert parts == others - {"table1"}  # It is about data alone.


def test_a_cell_is_a_command_that_a_person_may_give(tmp_path):
  config = experiment()
  command = study.command(config, tmp_path, study.cells(config, tmp_path)[1])
  assert command[1:3] == ["-m", "ppnet.main"]
  assert "--config=cell.py:fsdd,private,cpu,/d" in command
  assert "--config.seed=7" in command
  assert f"--workdir={tmp_path}/cells/fsdd/private" in command


def test_a_table_of_training_trains_and_draws(monkeypatch, tmp_path):
  def fake(command, check, env):
    del check, env
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
    made = runpy.run_path("cell.py")["get_config"](
      flags["config"].split(":")[1]
    )
    made.audit.num_models = int(flags["config.audit.num_models"])
    made.seed = int(flags["config.seed"])
    plain = {"config": records.to_plain(made)} | workdirs.provenance()
    (folder / "config.json").write_text(json.dumps(plain))
    return subprocess.CompletedProcess(command, 0)

  monkeypatch.setattr(study, "subprocess", types.SimpleNamespace(run=fake))
  monkeypatch.chdir(tmp_path)
  (tmp_path / "cell.py").write_text(_CELL)
  config = experiment(subject=config_lib.TableSubject.TRAINING, tasks="fsdd")
  assert "0.6250" in study.table(config, tmp_path, maps=None)
  for name in ("losses", "indicators"):
    assert (tmp_path / "figures" / f"{name}.png").exists()
    assert f"{name} by epoch" in (tmp_path / "table.html").read_text()
  config.audit.num_models += 2  # A collection's; no run is attacked.
  assert "0.6250" in study.table(config, tmp_path, maps=None)
  config.seed += 1
  with pytest.raises(ValueError, match="seed"):
    study.table(config, tmp_path, maps=None)


def test_tables_share_a_folder_of_cells(started, tmp_path):
  def table(name, rows):
    config = experiment(
      tasks="fsdd", rows=rows, cells_dir=str(tmp_path / "shared")
    )
    main.run_job(config, tmp_path / name)
    return records.read_json(tmp_path / name / "table.json")["rows"]

  table("one", "plain,no_noise")
  assert len(started) == 2
  (flag,) = (f for f in started[0] if "prepared_dir" in f)
  assert flag.endswith(f"={tmp_path}/shared/prepared/fsdd")
  rows = table("two", "plain, dp_8 = no_noise, dp_2")
  assert len(started) == 3  # Only what the first table did not have.
  assert [row["model"] for row in rows] == ["plain", "dp_8", "dp_2"]
  assert not (tmp_path / "two" / "cells").exists()
  assert "dp_<wbr>8" in (tmp_path / "two" / "table.html").read_text()
  # Fails if: the folder of a cell is the table's, or bears the label.


def test_a_label_is_printed_and_the_row_is_run(tmp_path):
  config = experiment(tasks="fsdd", rows="plain,noise_only=no_clipping")
  cell = study.cells(config, tmp_path)[1]
  assert (cell.row, cell.folder.name) == ("noise_only", "no_clipping")
  command = study.command(config, tmp_path, cell)
  assert "--config=cell.py:fsdd,no_clipping,cpu,/d" in command


def test_an_audit_and_a_run_have_no_folder_in_common(tmp_path):
  # In a finished run's folder AUDIT attacks that run.
  folders = [
    {cell.folder for cell in study.cells(experiment(subject=subject), tmp_path)}
    for subject in (
      config_lib.TableSubject.RESULTS,
      config_lib.TableSubject.TRAINING,
    )
  ]
  assert not folders[0] & folders[1]


def test_cells_share_what_they_compiled_but_where_somebody_chose(
  tmp_path, monkeypatch
):
  names = (
    "JAX_COMPILATION_CACHE_DIR",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS",
  )
  for name in names:
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv("OTHER", "kept")
  found = study.environment(tmp_path)
  assert [found[name] for name in names] == [f"{tmp_path}/compiled", "0.5"]
  assert found["OTHER"] == "kept"
  monkeypatch.setenv(names[0], "/mine")
  found = study.environment(tmp_path)
  assert [found[name] for name in names] == ["/mine", "0.5"]


def load(name, argument):
  path = pathlib.Path(__file__).parents[1] / "configs" / "paper" / f"{name}.py"
  return runpy.run_path(str(path))["get_config"](argument)


def test_the_papers_tables_share_their_cells(tmp_path):
  def folders(name):
    config = load(name, "cpu")
    return {cell.folder for cell in study.cells(config, tmp_path)}

  ablation = folders("table3")
  only = {
    name: sorted(folder.name for folder in folders(name) - ablation)
    for name in ("table2", "leakage", "epsilon", "attention_noise")
  }
  assert only == {
    "table2": ["llama"] * 4,
    "leakage": ["dp_2", "dp_2"],
    "epsilon": ["dp_0.5", "dp_1", "dp_2", "dp_4"],
    "attention_noise": [
      f"attention_noise_{stddev}" for stddev in ("0.25", "1", "2", "4")
    ],
  }


@pytest.mark.parametrize("size", ["cpu", "full"])
@pytest.mark.parametrize(
  "name",
  ["table2", "table3", "leakage", "epsilon", "attention_noise", "training"],
)
def test_every_cell_of_every_table_is_accepted(name, size, tmp_path):
  config = load(name, size)
  config_lib.validate(config)
  cells = study.cells(config, tmp_path)
  assert len(cells) >= 6
  for cell in cells:
    own = study.cell_config(config, tmp_path, cell)
    config_lib.validate(own)
    own.job, own.topology = config_lib.Job.COMPILE, "v5e:8x8"
    config_lib.validate(own)
    if size == "full":
      # No more can be drawn than there is.
      assert own.train.expected_batch_size < own.account.num_examples / 2
      assert own.audit.models_at_once == 2
      assert own.privacy.delta < 1 / own.account.num_examples
    # What a configuration accepts is also what a person's flags make of it.
    flags = study.command(config, tmp_path, cell)
    assert f"--config.data.prepared_dir={own.data.prepared_dir}" in flags


def test_what_a_device_bears_is_the_cells_to_say_unless_somebody_does(tmp_path):
  config = load("table2", "full")
  config.audit.models_at_once = 4
  (cell, *_) = study.cells(config, tmp_path)
  own = study.cell_config(config, tmp_path, cell)
  assert own.audit.models_at_once == 4
  flags = study.command(config, tmp_path, cell)
  assert "--config.audit.models_at_once=4" in flags


@pytest.mark.parametrize(
  ("label", "row"),
  [
    ("attention_noise_0.5", "no_dp_noise_no_clipping"),
    ("clipping", "no_dp_noise_no_attention_noise"),
    ("dp_8", "no_attention_noise"),
  ],
)
def test_a_row_under_another_name_is_the_same_experiment(label, row):
  made = [
    dataclasses.replace(load("cell", f"fsdd,{name},cpu,/d"), name="")
    for name in (label, row)
  ]
  assert made[0] == made[1]


@pytest.mark.parametrize(
  ("field", "value", "says"),
  [
    ("rows", "", r"table\.rows"),
    ("tasks", "a,a", "once"),
    ("rows", "a,a=b", "once"),
    ("rows", "a=c,b=c", "once"),
    ("rows", "a=", "LABEL=ROW"),
    ("cell_config", "", r"table\.cell_config"),
  ],
)
def test_a_table_of_nothing_is_refused(field, value, says):
  with pytest.raises(ValueError, match=says):
    config_lib.validate(experiment(**{field: value}))
