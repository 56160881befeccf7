"""Command-line flags that name fields of the configuration.

`ml_collections` sets `--config.a.b=value` on the dataclasses. What it lacks is
here: an unknown field suggests the closest one, `none` unsets an optional
field, and `--help` lists every field.
"""

import dataclasses
import enum
import inspect
import pathlib
import re
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ppnet import config as config_lib
from ppnet.core import checks

_PREFIX = "--config."
# What ml_collections says of a field whose holder is None.
_IS_NONE = re.compile(r'Flag (\S+) can not be applied because field "(\w+)" is')
_HELP = ("--help", "-h", "--helpshort", "-help")


def fields(
  cls: type = config_lib.ExperimentConfig, prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
  """(dotted name, type, default) of every field, nested ones included."""
  hints = typing.get_type_hints(cls)
  for field in dataclasses.fields(cls):
    hint = hints[field.name]
    default = (
      field.default_factory()
      if field.default_factory is not dataclasses.MISSING
      else field.default
    )
    yield f"{prefix}{field.name}", hint, default
    for option in _dataclasses_in(hint):
      yield from fields(option, f"{prefix}{field.name}.")


def _meanings(
  cls: type = config_lib.ExperimentConfig, prefix: str = ""
) -> Iterator[tuple[str, str]]:
  """(dotted name, text) of each field described in its class's docstring."""
  described = (inspect.getdoc(cls) or "").partition("Attributes:\n")[2]
  # Entries begin with "  name: "; their later lines are indented deeper.
  parts = re.split(r"^  (\w+): ", described, flags=re.MULTILINE)[1:]
  for name, text in zip(parts[::2], parts[1::2], strict=True):
    yield f"{prefix}{name}", " ".join(text.split())
  for field in dataclasses.fields(cls):
    for option in _dataclasses_in(typing.get_type_hints(cls)[field.name]):
      yield from _meanings(option, f"{prefix}{field.name}.")


def _dataclasses_in(hint: Any) -> list[type]:
  """The dataclasses that a field may hold."""
  return [
    option
    for option in typing.get_args(hint) or (hint,)
    if dataclasses.is_dataclass(option) and isinstance(option, type)
  ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
  """A command line, sorted into what concerns the configuration.

  Attributes:
    argv: all of it, the program's name first.
    values: (field, value) of each `--config.FIELD=VALUE`.
  """

  argv: tuple[str, ...]
  values: tuple[tuple[str, str], ...]

  @classmethod
  def split(cls, argv: Sequence[str]) -> "Arguments":
    """Sorts a command line.

    Raises:
      ValueError: a field's flag without "=".
    """
    values = []
    for argument in argv[1:]:
      if argument.startswith(_PREFIX):
        name, equals, value = argument.removeprefix(_PREFIX).partition("=")
        if not equals:
          checks.fail(f"{_PREFIX}FIELD=VALUE, with the =", argument=argument)
        values.append((name, value))
    return cls(argv=tuple(argv), values=tuple(values))

  @property
  def overrides(self) -> list[str]:
    """["field=value", ...], for the run's default folder."""
    return [f"{name}={value}" for name, value in self.values]

  @property
  def config_flags(self) -> list[str]:
    """The flags about the configuration alone, to be given to a child."""
    kept = []
    for position, argument in enumerate(self.argv[1:], start=1):
      if argument.startswith((_PREFIX, "--config=")):
        kept.append(argument)
      elif argument == "--config":
        kept.append(f"--config={''.join(self.argv[position + 1 :][:1])}")
    return kept

  def check_file(self) -> None:
    """Raises `ValueError` for a config file that is not there."""
    for flag in self.config_flags:
      if flag.startswith("--config="):
        path = pathlib.Path(flag.removeprefix("--config=").split(":")[0])
        if not path.is_file():
          near = [str(other) for other in path.parent.glob("*.py")]
          checks.fail(
            "--config to name a file",
            checks.did_you_mean(str(path), near).strip(),
            config=str(path),
          )

  @property
  def wants_help(self) -> bool:
    """Whether the user asked for help."""
    return any(argument in _HELP for argument in self.argv[1:])

  @property
  def _unset(self) -> set[str]:
    """Optional plain fields that were given as `none`."""
    optional = {
      name
      for name, hint, _ in fields()
      if isinstance(hint, types.UnionType) and type(None) in hint.__args__
    }
    return {
      name
      for name, value in self.values
      if value.lower() == "none" and name in optional
    }

  @property
  def without_none(self) -> list[str]:
    """The command line without the flags that `set_none` takes care of."""
    drop = tuple(f"{_PREFIX}{name}=" for name in self._unset)
    return [a for a in self.argv if not (drop and a.startswith(drop))]

  def set_none(self, config: config_lib.ExperimentConfig) -> None:
    """Unsets the optional fields that were given as `none`."""
    for name in self._unset:
      *parents, last = name.split(".")
      holder: Any = config
      for parent in parents:
        holder = getattr(holder, parent)
      setattr(holder, last, None)

  def explain(self, error: Exception) -> str | None:
    """What to do about an error of the parser; None where it is not known."""
    found = _IS_NONE.search(str(error))
    if found is None:
      return None
    name, part = found.groups()
    holder = name[: name.rindex(f".{part}.") + len(part) + 1]
    given = dict(self.values).get(name)
    return (
      f"Expected {holder} to be there before one of its fields is set, got"
      f" {holder}=None, {name}={given!r}. Put {_PREFIX}{holder}=build before"
      " it."
    )

  def check_fields(self, names: Iterable[str] | None = None) -> None:
    """Raises `ValueError` for an unknown field, suggesting the closest."""
    known = [name for name, _, _ in fields()]
    for name in [name for name, _ in self.values] if names is None else names:
      # "channels[0]" is one entry of the field "channels".
      if name.split("[")[0] not in known:
        checks.fail(
          "a field of the configuration",
          f"{checks.did_you_mean(name, known).strip()} --help lists them all.",
          field=name,
        )

  def describe_fields(self) -> str:
    """Every field: name, default, choices, and what its class says of it."""
    lines = ["Fields (--config.FIELD=VALUE) and the defaults of config.py:"]
    meanings = dict(_meanings())
    for name, hint, default in fields():
      if dataclasses.is_dataclass(default):
        continue
      shown = default.value if isinstance(default, enum.Enum) else default
      choices = (
        " (" + ", ".join(member.value for member in hint) + ")"
        if isinstance(hint, type) and issubclass(hint, enum.Enum)
        else ""
      )
      lines.append(f"  {name} = {shown}{choices}")
      lines += textwrap.wrap(
        meanings.get(name, ""),
        80,
        initial_indent=" " * 6,
        subsequent_indent=" " * 6,
      )
    return "\n".join(lines)
