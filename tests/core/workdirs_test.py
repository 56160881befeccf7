"""A folder belongs to one experiment and to one process at a time."""

import subprocess
import sys

import pytest

from ppnet.core import records, workdirs

CONFIG = {"job": "TRAIN", "privacy": {"epsilon": 3.0}, "seed": 0}


def begin(path):
  """Opens a folder and charges its ledger, so to say."""
  with workdirs.opened(path, CONFIG):
    (path / "privacy.json").write_text("{}")


def test_writes_config_commit_and_versions(tmp_path):
  with workdirs.opened(tmp_path / "run", CONFIG) as path:
    record = records.read_json(path / "config.json")
  assert record["config"] == CONFIG
  assert record["versions"]["jax"]
  assert "commit" in record


def test_a_begun_run_keeps_the_config_it_was_begun_with(tmp_path):
  begin(tmp_path)
  text = (tmp_path / "config.json").read_text() + " "
  (tmp_path / "config.json").write_text(text)
  with workdirs.opened(tmp_path, CONFIG | {"job": "EVALUATE"}):
    pass  # Another job may use the folder.
  other = CONFIG | {
    "job": "GENERATE",
    "generate": {"top_k": 3},
    "audit": {"num_models": 8},
    "account": {"num_examples": 5},
  }
  with workdirs.opened(tmp_path, other):
    pass  # And ask for other continuations.
  assert (tmp_path / "config.json").read_text() == text


def test_refuses_another_config_by_field_and_changes_nothing(tmp_path):
  begin(tmp_path)
  before = {p.name: p.read_text() for p in tmp_path.iterdir()}
  other = CONFIG | {"privacy": {"epsilon": 8.0}}
  with (
    pytest.raises(
      workdirs.WorkdirError, match=r"privacy\.epsilon \(3\.0 there, 8\.0 now\)"
    ),
    workdirs.opened(tmp_path, other),
  ):
    pass
  assert {p.name: p.read_text() for p in tmp_path.iterdir()} == before


def test_a_run_that_never_began_binds_nobody(tmp_path):
  with workdirs.opened(tmp_path, CONFIG):
    pass
  other = CONFIG | {"seed": 5}
  with workdirs.opened(tmp_path, other) as path:
    assert records.read_json(path / "config.json")["config"] == other


def test_records_without_their_config_are_refused(tmp_path):
  begin(tmp_path)
  (tmp_path / "config.json").unlink()
  with (
    pytest.raises(workdirs.WorkdirError, match=r"config\.json"),
    workdirs.opened(tmp_path, CONFIG),
  ):
    pass


def test_refuses_a_folder_that_another_process_has(tmp_path):
  holder = subprocess.Popen(
    [
      sys.executable,
      "-c",
      "import sys; from ppnet.core import workdirs\n"
      f"with workdirs.opened({str(tmp_path)!r}, {CONFIG!r}):\n"
      "  print('held', flush=True); sys.stdin.read()",
    ],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  try:
    assert holder.stdout.readline().strip() == "held"
    with (
      pytest.raises(workdirs.WorkdirError, match="Another process"),
      workdirs.opened(tmp_path, CONFIG),
    ):
      pass
  finally:
    holder.communicate()
  with workdirs.opened(tmp_path, CONFIG):  # Free again once it is gone.
    pass


def test_refuses_a_path_that_cannot_be_written(tmp_path):
  (tmp_path / "file").write_text("")
  with (
    pytest.raises(workdirs.WorkdirError, match="can be written"),
    workdirs.opened(tmp_path / "file" / "run", CONFIG),
  ):
    pass


def test_run_names_of_different_overrides_differ_even_when_long():
  long = [f"data.prompt={'x' * 150}", "seed=1"]
  names = {
    workdirs.run_name("q", []),
    workdirs.run_name("q", ["seed=1"]),
    workdirs.run_name("q", long),
    workdirs.run_name("q", [long[0], "seed=2"]),
  }
  assert len(names) == 4
  assert all(len(name) <= 120 for name in names)
  assert workdirs.run_name("q", ["job=EVALUATE"]) == "q"
