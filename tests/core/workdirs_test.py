"""A folder belongs to one experiment and to one process at a time."""

import dataclasses
import subprocess
import sys
from collections.abc import Mapping

import pytest

from ppnet.core import records, workdirs


@dataclasses.dataclass(kw_only=True)
class Privacy:
  epsilon: float = 3.0
  delta: float = 1e-5


@dataclasses.dataclass(kw_only=True)
class Config:
  job: str = "TRAIN"
  privacy: Privacy = dataclasses.field(default_factory=Privacy)
  seed: int = 0
  extra: Privacy | None = None
  audit: Mapping[str, int] = dataclasses.field(default_factory=dict)
  generate: Mapping[str, int] = dataclasses.field(default_factory=dict)


CONFIG = Config()


def begin(path):
  """Opens a folder and charges its ledger, so to say."""
  with workdirs.opened(path, CONFIG):
    (path / "privacy.json").write_text("{}")


def test_writes_config_commit_and_versions(tmp_path):
  with workdirs.opened(tmp_path / "run", CONFIG) as path:
    record = records.read_json(path / "config.json")
  assert record["config"] == records.to_plain(CONFIG)
  assert record["versions"]["jax"]
  assert "commit" in record


def test_a_begun_run_keeps_the_config_it_was_begun_with(tmp_path):
  begin(tmp_path)
  text = (tmp_path / "config.json").read_text() + " "
  (tmp_path / "config.json").write_text(text)
  with workdirs.opened(tmp_path, Config(job="EVALUATE")):
    pass  # Another job may use the folder.
  other = Config(job="GENERATE", generate={"top_k": 3}, audit={"num_models": 8})
  with workdirs.opened(tmp_path, other):
    pass  # And ask for other continuations.
  assert (tmp_path / "config.json").read_text() == text


def test_refuses_another_config_by_field_and_changes_nothing(tmp_path):
  begin(tmp_path)
  before = {p.name: p.read_text() for p in tmp_path.iterdir()}
  other = Config(privacy=Privacy(epsilon=8.0))
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
  other = Config(seed=5)
  with workdirs.opened(tmp_path, other) as path:
    record = records.read_json(path / "config.json")
  assert record["config"] == records.to_plain(other)


@pytest.mark.parametrize(
  ("now", "differing"),
  [
    (Config(), ""),
    (Config(privacy=Privacy(delta=1e-6)), r"privacy\.delta \(1e-05 there"),
    (Config(seed=1), r"seed \(0 there"),
    (Config(extra=Privacy()), r"extra"),
  ],
)
def test_a_run_of_a_former_version_goes_on_with_the_defaults_since(
  tmp_path, now, differing
):
  begin(tmp_path)
  record = records.read_json(tmp_path / "config.json")
  del record["config"]["privacy"]["delta"]  # These fields did not exist.
  del record["config"]["seed"]
  del record["config"]["extra"]
  records.write_json(tmp_path / "config.json", record)
  if differing:
    with (
      pytest.raises(workdirs.WorkdirError, match=differing),
      workdirs.opened(tmp_path, now),
    ):
      pass
    return
  with workdirs.opened(tmp_path, now):
    pass
  # Fails if: a field that came since is not looked at, or not by its default.


def test_a_field_that_has_gone_since_is_refused(tmp_path):
  begin(tmp_path)
  record = records.read_json(tmp_path / "config.json")
  record["config"]["privacy"]["gone"] = 1
  records.write_json(tmp_path / "config.json", record)
  with (
    pytest.raises(workdirs.WorkdirError, match=r"privacy\.gone \(1 there"),
    workdirs.opened(tmp_path, CONFIG),
  ):
    pass


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
      f"with workdirs.opened({str(tmp_path)!r}, {{}}):\n"
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
