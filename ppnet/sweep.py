"""Grids of runs: one folder and one process each, restartable, shardable."""

import itertools
import pathlib
import subprocess
import sys
from collections.abc import Sequence

from ppnet import config as config_lib
from ppnet.core import checks, records, workdirs
from ppnet.report import sweeps


def parse_grid(text: str) -> list[tuple[str, ...]]:
  """Every combination of a sweep, as ("field=value", ...).

  >>> parse_grid("privacy.epsilon=1,8;seed=0,1")[1]
  ('privacy.epsilon=1', 'seed=1')

  Raises:
    ValueError: a part is not FIELD=VALUE,VALUE, or a field comes twice.
  """
  axes = []
  for part in text.split(";"):
    field, equals, values = part.strip().partition("=")
    choices = [value.strip() for value in values.split(",")]
    if not (field and equals and all(choices)):
      checks.fail(
        "--sweep to be FIELD=VALUE,VALUE;FIELD=VALUE,VALUE",
        'For instance --sweep="privacy.epsilon=1,8;seed=0,1,2".',
        part=part,
      )
    axes.append([f"{field}={value}" for value in choices])
  fields = [axis[0].split("=")[0] for axis in axes]
  if len(set(fields)) != len(fields):
    checks.fail("each field of --sweep once", fields=fields)
  return list(itertools.product(*axes))


def parse_shard(text: str) -> tuple[int, int]:
  """(i, n) from "i/n".

  Raises:
    ValueError: not 0 <= i < n.
  """
  index, _, count = text.partition("/")
  if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
    checks.fail("--sweep_shard=i/n with 0 <= i < n", sweep_shard=text)
  return int(index), int(count)


def main_command(flags: Sequence[str]) -> list[str]:
  """What starts this program again, with other flags."""
  safe_path = ["-P"] if sys.flags.safe_path else []
  return [sys.executable, *safe_path, "-m", "ppnet.main", *flags]


def run(
  runs: Sequence[tuple[str, ...]],
  *,
  flags: Sequence[str],
  workdir: pathlib.Path,
  shard: tuple[int, int],
  tuning: config_lib.Tuning,
) -> tuple[str, list[str]]:
  """Runs this shard's part of the grid, skipping what is finished.

  Each run is a process of its own, so one that fails takes no other with it.
  The summary in `sweep.md` and `sweep.json` is written again before and after
  each: it can be watched, and all shards that see the folder write the same.

  Args:
    runs: from `parse_grid`.
    flags: the command line's own flags, without the sweep's.
    workdir: holds one folder per run.
    shard: (i, n): runs i, i + n, i + 2 n, ...
    tuning: what the configuration says of choosing among them.

  Returns:
    The summary of the whole grid, this shard's runs and the others'; and the
    runs that failed here, by their overrides.
  """
  index, count = shard
  failed = []
  folders = {
    overrides: workdir / workdirs.run_name("run", overrides)
    for overrides in runs
  }
  workdir.mkdir(parents=True, exist_ok=True)
  for number, (overrides, folder) in enumerate(folders.items()):
    if number % count != index or (folder / "summary.json").exists():
      continue
    print(f"[{number + 1}/{len(runs)}] {', '.join(overrides)}", flush=True)
    overriding = [f"--config.{override}" for override in overrides]
    command = main_command([*flags, *overriding, f"--workdir={folder}"])
    (folder / sweeps.FAILED).unlink(missing_ok=True)
    sweeps.write(folders, workdir, tuning=tuning)
    code = subprocess.run(command, check=False).returncode
    if code:
      failed.append(", ".join(overrides))
      folder.mkdir(exist_ok=True)
      records.write_json(folder / sweeps.FAILED, {"exit_code": code})
  return sweeps.write(folders, workdir, tuning=tuning), failed
