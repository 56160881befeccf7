"""A run's folder: who owns it, what it was made for, where it is by default."""

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import pathlib
import platform
import subprocess
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from ppnet.core import records

# What may differ between two uses of one folder: fields, and groups of fields.
_NOT_PART_OF_THE_EXPERIMENT = (
  "job",
  "topology",
  "generate.",
  "account.",
  "audit.",
)
# What a resumed run may change: the machine and how it is used, and what is
# said of many runs. Neither the result, but for rounding, nor the guarantee
# depends on them.
_MAY_CHANGE = ("perf.", "mesh.", "table.", "tuning")
# Once one of these is there the run has begun, and its configuration stands.
_BINDING = ("privacy.json", "summary.json", "bench.json")
_VERSIONED = (
  "ppnet",
  "jax",
  "jaxlib",
  "flax",
  "optax",
  "orbax-checkpoint",
  "grain",
  "dp-accounting",
  "numpy",
)


class WorkdirError(ValueError):
  """A folder that cannot be used for this run."""


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """{"a": {"b": 1}} as {"a.b": 1}."""
  flat = {}
  for name, item in value.items():
    if isinstance(item, Mapping):
      flat |= flatten(item, f"{prefix}{name}.")
    else:
      flat[f"{prefix}{name}"] = item
  return flat


def differences(
  old: Mapping[str, Any],
  new: Mapping[str, Any],
  *,
  ignore: Collection[str] = (),
) -> list[str]:
  """What differs between two nested records, by dotted name.

  >>> differences({"a": {"b": 1}, "job": 1}, {"a": {"b": 2}}, ignore=["job"])
  ['a.b (1 there, 2 now)']
  """
  old, new = flatten(old), flatten(new)
  return [
    f"{name} ({old.get(name)!r} there, {new.get(name)!r} now)"
    for name in sorted(old.keys() | new.keys())
    if name not in ignore and old.get(name) != new.get(name)
  ]


def completed(old: Mapping[str, Any], config: Any) -> dict[str, Any]:
  """A former record of a configuration, with the fields that have come since.

  They get their defaults: what was new when it was added left everything as it
  had been where nobody set it.

  Args:
    old: what `records.to_plain` made of a configuration then.
    config: a configuration now, a dataclass of dataclasses.
  """
  full = dict(old)
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if field.name in old:
      then = old[field.name]
      if dataclasses.is_dataclass(value) and isinstance(then, Mapping):
        full[field.name] = completed(then, value)
    elif field.default is not dataclasses.MISSING:
      full[field.name] = records.to_plain(field.default)
    elif field.default_factory is not dataclasses.MISSING:
      full[field.name] = records.to_plain(field.default_factory())
  return full


def run_name(name: str, overrides: Sequence[str]) -> str:
  """A folder name from the experiment's name and its "field=value" overrides.

  >>> run_name("quickstart", ["seed=1", "privacy.epsilon=3"])
  'quickstart-privacy.epsilon=3,seed=1'
  >>> run_name("quickstart", ["job=GENERATE", "generate.top_k=5"])
  'quickstart'
  """
  kept = sorted(o for o in overrides if _is_part(o.split("=")[0]))
  text = "-".join([name, *([",".join(kept)] if kept else [])])
  text = text.replace("/", "_").replace(" ", "_")
  if len(text) <= 120:
    return text
  # Two long lists of overrides must not meet in one folder.
  return f"{text[:100]}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _is_part(name: str) -> bool:
  """Whether a field decides what a folder's experiment is."""
  return not is_among(name, _NOT_PART_OF_THE_EXPERIMENT)


def is_among(name: str, fields: Sequence[str]) -> bool:
  """Whether a field, or its group, is listed."""
  return any(
    name.startswith(other) if other.endswith(".") else name == other
    for other in fields
  )


@contextlib.contextmanager
def opened(path: pathlib.Path, config: Any) -> Iterator[pathlib.Path]:
  """Makes the folder, takes it for this process, and writes `config.json`.

  A run that never began (its configuration was refused, say) binds nobody: the
  folder takes the next configuration. One that has charged its ledger keeps it.

  Args:
    path: the folder.
    config: the experiment, a dataclass.

  Yields:
    The folder.

  Raises:
    WorkdirError: it cannot be written, another process has it, or it belongs
      to another configuration; the differing fields are named.
  """
  path = pathlib.Path(path)
  try:
    path.mkdir(parents=True, exist_ok=True)
    lock = (path / ".lock").open("w")
  except OSError as error:
    raise WorkdirError(
      f"Expected a --workdir that can be written, got {path} ({error})."
    ) from error
  with lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      raise WorkdirError(
        f"Another process is using {path}. Wait for it, or pass another"
        " --workdir."
      ) from error
    if any((path / name).exists() for name in _BINDING):
      check_same(path, config)
    else:
      records.write_json(
        path / "config.json",
        {"config": records.to_plain(config)} | provenance(),
      )
    yield path


def check_same(path: pathlib.Path, config: Any) -> None:
  """Raises `WorkdirError` where `path` belongs to another configuration.

  A run that a former version began goes on; see `completed`.
  """
  recorded = path / "config.json"
  if not recorded.exists():
    raise WorkdirError(
      f"Expected {recorded} beside the records of a run. Restore it, or pass"
      " another --workdir."
    )
  old = completed(records.read_json(recorded)["config"], config)
  new = records.to_plain(config)
  names = flatten(old).keys() | flatten(new).keys()
  ignore = [
    name for name in names if not _is_part(name) or is_among(name, _MAY_CHANGE)
  ]
  differing = differences(old, new, ignore=ignore)
  if differing:
    raise WorkdirError(
      f"Expected {path} to belong to this configuration, but these fields"
      f" differ: {'; '.join(differing)}. Nothing was changed. Set them back, or"
      " pass another --workdir."
    )


def is_finished(path: pathlib.Path) -> bool:
  """Whether a training run ended in `path`; an audit alone is none."""
  summary = pathlib.Path(path) / "summary.json"
  return summary.exists() and "num_steps" in records.read_json(summary)


def provenance(*, packages: Sequence[str] = ()) -> dict[str, Any]:
  """Commit and versions of our dependencies and of further `packages`."""
  return {
    "commit": _commit(),
    "python": platform.python_version(),
    "versions": {name: _version(name) for name in (*_VERSIONED, *packages)},
  }


def _version(package: str) -> str | None:
  """The installed version, or None."""
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def _commit() -> str | None:
  """The checkout's commit, "+changes" where it is not clean; else None."""

  def git(*arguments: str) -> str:
    return subprocess.run(
      ["git", *arguments],
      cwd=pathlib.Path(__file__).parent,
      capture_output=True,
      text=True,
      check=True,
    ).stdout.strip()

  try:
    changes = "+changes" if git("status", "--porcelain", ".") else ""
    return git("rev-parse", "HEAD") + changes
  except (OSError, subprocess.CalledProcessError):
    return None  # Installed from a wheel, or no git.
