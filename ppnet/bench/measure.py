"""Programs measured side by side: time, temporary memory, FLOPs, as ratios.

Absolute times on a shared machine are noise, so nothing is measured alone: in
each round every contender runs once, and what is reported is the ratio of its
median to its baseline's. The order changes from round to round, so that neither
a slow minute nor a neighbour's warm cache always falls on the same one.

Beside the time on the clock stands the processor time of all threads. On a busy
machine it is the steadier of the two, as waiting for others is not in it; it
does not tell how well the work is spread over the cores.
"""

import dataclasses
import os
import pathlib
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ppnet.core import checks, hlo, workdirs

# Others' share of the processor above which ratios may be off.
QUIET_SHARE = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
  """Something that can be run again and again.

  Attributes:
    run: runs once, waits for the result and returns it.
    memory_bytes: most memory in use at one time besides arguments and result.
    flops: of its matrix products, (fewest, most): they differ where the
      program decides as it runs. None where they cannot be read.
  """

  run: Callable[[], Any]
  memory_bytes: int
  flops: tuple[int, int] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contender:
  """One row of a table before it is measured.

  Attributes:
    name: of the row.
    framework: its ratios are to the first contender of the same framework.
    program: None for a row that cannot be measured here.
    is_peer: whether it is another project's.
    note: what a reader of the row should know; why there is no program.
    facts: further columns, as they are known before measuring.
  """

  name: str
  framework: str
  program: Program | None
  is_peer: bool = False
  note: str = ""
  facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Goal:
  """What a row should reach, both at once.

  Attributes:
    time_ratio: at most.
    memory_ratio: at most.
  """

  time_ratio: float
  memory_ratio: float


def compile_program(fn: Callable[..., Any], *args: Any) -> Program:
  """Compiles `fn` for `args` and reads off memory and FLOPs.

  Temporary memory is what XLA reserves for the execution besides arguments and
  results (`temp_size_in_bytes`).

  Args:
    fn: a pure function of arrays.
    *args: what it will be run on, always the same.

  Raises:
    ValueError: the backend does not tell the memory.
  """
  executable = jax.jit(fn).lower(*args).compile()
  memory = executable.memory_analysis()
  if memory is None:
    checks.fail(
      "a backend that tells the memory of a program",
      backend=jax.default_backend(),
    )
  try:
    flops = hlo.matmul_flops(executable.as_text() or "")
  except ValueError:
    flops = None  # A hole in the table is better than a wrong number.
  return Program(
    run=lambda: jax.block_until_ready(executable(*args)),
    memory_bytes=int(memory.temp_size_in_bytes),
    flops=flops,
  )


def named(
  names: str, known: Mapping[str, Any], *, also: Sequence[str] = ()
) -> list[Any]:
  """The cases of `known` that `bench.cases` names, commas between them.

  Raises:
    ValueError: unknown names; `also` has further ones that are understood.
  """
  unknown = [name for name in names.split(",") if name not in known]
  if unknown:
    checks.fail(
      f"bench.cases among {', '.join([*also, *known])}", unknown=unknown
    )
  return [known[name] for name in names.split(",")]


def order(names: Sequence[str], round_number: int) -> list[str]:
  """The order of one round: one further each time, and back in odd rounds.

  >>> [order("abcd", n) for n in range(2)]
  [['a', 'b', 'c', 'd'], ['b', 'a', 'd', 'c']]
  """
  step = -1 if round_number % 2 else 1
  return [
    names[(round_number + step * place) % len(names)]
    for place in range(len(names))
  ]


def interleaved(
  runs: Mapping[str, Callable[[], Any]],
  *,
  rounds: int,
  on_run: Callable[[], Any] = lambda: None,
) -> dict[str, np.ndarray]:
  """Times each of `runs` once per round.

  Args:
    runs: what to time, by name; each has run before, so that nothing is
      compiled or loaded in a round.
    rounds: how often.
    on_run: called after each run, outside the time.

  Returns:
    Seconds f64[rounds, 2] by name, in the order of the rounds: on the clock,
    and of processor time.

  Raises:
    ValueError: fewer than one round.
  """
  checks.positive(rounds=rounds)
  secs: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
  for round_number in range(rounds):
    for name in order(list(runs), round_number):
      start, own_start = time.perf_counter(), time.process_time()
      runs[name]()
      end, own_end = time.perf_counter(), time.process_time()
      secs[name].append((end - start, own_end - own_start))
      on_run()
  return {name: np.array(pairs) for name, pairs in secs.items()}


def rows(
  contenders: Sequence[Contender],
  *,
  case: str,
  rounds: int,
  goal: Goal | None = None,
  on_run: Callable[[], Any] = lambda: None,
) -> list[dict[str, Any]]:
  """Measures the contenders of one case together.

  | key of a row | what |
  | --- | --- |
  | name, case, framework, is_peer, is_baseline, note | as given |
  | time_ratio | median seconds over the baseline's median |
  | time_ratio_quartiles | of the ratios within each round |
  | cpu_time_ratio | the same of processor time; None unless on a CPU |
  | memory_ratio | temporary memory over the baseline's |
  | flops_ratio, flops_ratio_most | fewest and most over the baseline's |
  | secs, secs_quartiles, memory_bytes, flops | what the ratios come from |
  | meets_time, meets_memory, meets_both | the goal; None for a baseline |

  A contender without a program, or without a baseline, has None for its ratios.

  Args:
    contenders: the first one of a framework is that framework's baseline.
    case: name of the case.
    rounds: timed executions of each.
    goal: what the rows should reach.
    on_run: called after each timed execution.

  Returns:
    One row per contender, in order.

  Raises:
    ValueError: two contenders of one name, or fewer than one round.
  """
  programs = {c.name: c.program for c in contenders if c.program is not None}
  if len({c.name for c in contenders}) < len(contenders):
    checks.fail("contenders of distinct names", names=list(programs))
  secs = interleaved(
    {name: program.run for name, program in programs.items()},
    rounds=rounds,
    on_run=on_run,
  )
  baselines: dict[str, str] = {}
  for contender in contenders:
    baselines.setdefault(contender.framework, contender.name)
  measured = []
  for contender in contenders:
    baseline = baselines[contender.framework]
    row: dict[str, Any] = {
      "name": contender.name,
      "case": case,
      "framework": contender.framework,
      "is_peer": contender.is_peer,
      "is_baseline": baseline == contender.name,
    }
    row |= _ratios(contender.name, baseline, programs, secs)
    measured.append(
      row
      | _verdict(row, goal)
      | dict(contender.facts)
      | {"note": contender.note}
    )
  return measured


def _ratios(
  name: str,
  baseline: str,
  programs: Mapping[str, Program],
  secs: Mapping[str, np.ndarray],
) -> dict[str, Any]:
  """The numbers of one row, None where it or its baseline did not run."""
  row: dict[str, Any] = dict.fromkeys(
    [
      "time_ratio",
      "time_ratio_quartiles",
      "cpu_time_ratio",
      "memory_ratio",
      "flops_ratio",
      "flops_ratio_most",
      "secs",
      "secs_quartiles",
      "memory_bytes",
      "flops",
    ]
  )
  if name not in programs:
    return row
  program, (own, own_cpu) = programs[name], secs[name].T
  row |= {
    "secs": float(np.median(own)),
    "secs_quartiles": _quartiles(own),
    "memory_bytes": program.memory_bytes,
    "flops": None if program.flops is None else program.flops[0],
  }
  if baseline not in programs:
    return row
  other, (base, base_cpu) = programs[baseline], secs[baseline].T
  row |= {
    "time_ratio": float(np.median(own) / np.median(base)),
    "time_ratio_quartiles": _quartiles(own / base),
    "memory_ratio": program.memory_bytes / max(other.memory_bytes, 1),
  }
  if jax.default_backend() == "cpu" and np.median(base_cpu) > 0:
    row["cpu_time_ratio"] = float(np.median(own_cpu) / np.median(base_cpu))
  if program.flops is not None and other.flops is not None:
    fewest = max(other.flops[0], 1)
    row["flops_ratio"] = program.flops[0] / fewest
    row["flops_ratio_most"] = program.flops[1] / fewest
  return row


def _verdict(
  row: Mapping[str, Any], goal: Goal | None
) -> dict[str, bool | None]:
  """Whether one row reaches the goal; None for baselines and holes."""
  if goal is None or row["is_baseline"] or row["time_ratio"] is None:
    return dict.fromkeys(["meets_time", "meets_memory", "meets_both"])
  meets_time = row["time_ratio"] <= goal.time_ratio
  meets_memory = row["memory_ratio"] <= goal.memory_ratio
  return {
    "meets_time": meets_time,
    "meets_memory": meets_memory,
    "meets_both": meets_time and meets_memory,
  }


def _quartiles(values: np.ndarray) -> list[float]:
  """The lower and the upper quartile."""
  return [float(np.quantile(values, q)) for q in (0.25, 0.75)]


class Load:
  """How busy the machine was with others' work since this was made."""

  def __init__(self):
    """Starts to count."""
    self._before = os.getloadavg()
    self._start = time.perf_counter(), time.process_time(), _busy_secs()

  def record(self) -> dict[str, Any]:
    """Load averages before and now, and others' share of the processor.

    The load average after a measurement counts the measurement itself; the
    share does not: it is the processor time that neither this process nor
    idleness had, over all there was. None where /proc/stat does not tell.
    """
    secs, own, busy = self._start
    now = _busy_secs()
    share = None
    if busy is not None and now is not None:
      elapsed = time.perf_counter() - secs
      others = now - busy - (time.process_time() - own)
      share = max(0.0, others / (elapsed * (os.cpu_count() or 1)))
    return {
      "load_average_before": list(self._before),
      "load_average_after": list(os.getloadavg()),
      "others_cpu_share": share,
    }


def _busy_secs() -> float | None:
  """Seconds that all processors together have worked since the start."""
  try:
    fields = pathlib.Path("/proc/stat").read_text().split("\n", 1)[0].split()
  except OSError:
    return None  # Not Linux.
  # user nice system idle iowait irq softirq steal; guests are within user.
  user, nice, system, _, _, irq, softirq, steal = map(int, fields[1:9])
  ticks = user + nice + system + irq + softirq + steal
  return ticks / os.sysconf("SC_CLK_TCK")


def machine(*, packages: Sequence[str] = ()) -> dict[str, Any]:
  """What was measured on: processor, devices, versions.

  Args:
    packages: further packages whose versions matter.
  """
  device = jax.devices()[0]
  return {
    "system": platform.platform(),
    "processor": _processor(),
    "cores": os.cpu_count(),
    "backend": jax.default_backend(),
    "device": device.device_kind,
    "devices": jax.device_count(),
  } | workdirs.provenance(packages=packages)


def _processor() -> str:
  """The processor's name."""
  try:
    text = pathlib.Path("/proc/cpuinfo").read_text()
  except OSError:
    return platform.processor()
  names = [line for line in text.splitlines() if line.startswith("model name")]
  return names[0].split(":", 1)[1].strip() if names else platform.processor()
