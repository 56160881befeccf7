"""What a COMPILE job found, as a table: does a step fit the chip?"""

from collections.abc import Mapping
from typing import Any

from ppnet.report import tables

_TIMES = {
  "compute_secs": "compute",
  "kernel_secs": "kernels",
  "memory_secs": "of it memory",
  "collective_secs": "collectives",
  "least_secs": "at least",
  "most_secs": "at most",
}
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
  is train state that a program does not touch. Times and what is sent are those
  of conditionals' cheapest branches; the record has the dearest, too.
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
  lines += _times(record) + _sent(record) + _recommended(record)
  return "\n".join(lines)


def _times(record: Mapping[str, Any]) -> list[str]:
  """Estimated time of each program and of a step, and what is left out."""
  rows = [
    [
      program["name"],
      f"{program['least']['matmul_flops'] / 1e12:,.1f}",
      *(_secs(program["least"][name]) for name in _TIMES),
    ]
    for program in record["programs"]
    if program["least"]
  ]
  step = record["step"]
  if not rows or not step:
    return []
  rows.append(
    [
      f"step: {step['num_microbatches']} x accumulate, and the rest",
      "",
      *(_secs(step[name]) for name in _TIMES),
    ]
  )
  header = ("estimated, per device", "TFLOP", *_TIMES.values())
  return [
    "",
    tables.markdown_table(header, rows),
    "\nThe estimate leaves out:",
    *(f"- {each}" for each in step["left_out"]),
  ]


def _sent(record: Mapping[str, Any]) -> list[str]:
  """What a device sends in each program, by kind of collective and by axes."""
  rows = [
    [program["name"], each["kind"], each["axes"], _size(each["bytes"])]
    for program in record["programs"]
    if program["least"]
    for each in program["least"]["sent_bytes"]
    if each["bytes"] >= 1e-3 * program["least"]["sent_bytes"][0]["bytes"]
  ]
  if not rows:
    return []
  header = ("sent by a device", "collective", "along", "bytes")
  return ["", tables.markdown_table(header, rows)]


def _recommended(record: Mapping[str, Any]) -> list[str]:
  """What else was compiled, and what to take."""
  found = record.get("recommended")
  if not found:
    return []
  rows = [
    [
      " ".join((each["engine"], *_flags(each["flags"]))),
      str(each["microbatch_size"]),
      _size(each["total_bytes"]),
      "yes" if each["fits"] else "no",
      _secs(each["step"]["most_secs"]) if each["step"] else "-",
      _size(each["step"]["sent_bytes"]) if each["step"] else "-",
    ]
    for each in found["tried"]
  ]
  header = ("engine", "microbatch", "together", "fits", "step", "sent")
  lines = ["", tables.markdown_table(header, rows), ""]
  best, leanest = found["best"], found["leanest"]
  if best is None:
    return [*lines, "Nothing that was tried fits: split more ways (mesh)."]
  lines.append(f"Recommended: {_advice(best, record)}")
  if leanest != best:
    lines.append(f"Least memory: {_advice(leanest, record)}")
  return lines


def _advice(tried: Mapping[str, Any], record: Mapping[str, Any]) -> str:
  """Flags that make a run of it."""
  flags = {"perf.microbatch_size": tried["microbatch_size"]}
  if tried["engine"] != record["tried_engine"]:
    flags["perf.engine"] = tried["engine"].lower()
  return " ".join(f"--config.{flag}" for flag in _flags(flags | tried["flags"]))


def _flags(flags: Mapping[str, Any]) -> list[str]:
  """As they are typed."""
  return [f"{name}={str(value).lower()}" for name, value in flags.items()]


def _secs(secs: float) -> str:
  """For people."""
  return f"{secs:.3f} s"


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


def _size(num_bytes: float | None) -> str:
  """For people."""
  if num_bytes is None:
    return "-"
  if 0 < num_bytes < 2**20:
    return f"{num_bytes / 2**10:.2f} KiB"
  return f"{num_bytes / 2**30:.2f} GiB"
