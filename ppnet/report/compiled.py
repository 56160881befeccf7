"""What a COMPILE job found, as a table: does a step fit the chip?"""

from collections.abc import Mapping
from typing import Any

from ppnet.report import tables

_HEADER = (
  "per device",
  "arguments",
  "temporaries",
  "outputs",
  "waiting",
  "together",
  "fits",
)


def compile_table(record: Mapping[str, Any]) -> str:
  """Lays out `compile.json` for a terminal, in Markdown.

  Outputs that take a donated argument's place are not counted twice. "Waiting"
  is train state that a program does not touch.
  """
  mesh = " x ".join(f"{axis} {size}" for axis, size in record["mesh"].items())
  engine = record["engine"]
  lines = [
    f"{record['topology']}: {record['num_devices']} devices ({mesh}),"
    f" {_size(record['available_bytes'])} each",
    f"{record['num_parameters']:,} parameters trained,"
    f" {record['num_frozen']:,} frozen; microbatches of"
    f" {record['microbatch_size']} x {record['num_tokens']:,} tokens; engine"
    f" {engine['engine'] if engine else 'none'}",
    "",
    tables.markdown_table(
      _HEADER, [_cells(program) for program in record["programs"]]
    ),
  ]
  lines += [
    f"\n{program['name']}: {program['message']}"
    for program in record["programs"]
    if program["message"]
  ]
  return "\n".join(lines)


def _cells(program: Mapping[str, Any]) -> list[str]:
  """One program's row."""
  fresh = None
  if program["output_bytes"] is not None:
    fresh = program["output_bytes"] - program["alias_bytes"]
  sizes = (
    program["argument_bytes"],
    program["temp_bytes"],
    fresh,
    program["resident_bytes"],
    program["total_bytes"],
  )
  return [
    program["name"],
    *map(_size, sizes),
    "yes" if program["fits"] else "no",
  ]


def _size(num_bytes: int | None) -> str:
  """For people."""
  return "-" if num_bytes is None else f"{num_bytes / 2**30:.2f} GiB"
