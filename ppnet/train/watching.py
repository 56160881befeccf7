"""What is seen of a running machine: time, speed, memory, and what hangs.

*Why all of it is named `nonprivate/machine/...`.* A Poisson draw has as many
microbatches as its size needs, rows of several lengths go to programs of their
own, and some records take longer to decode than others. So the time of a step
is a function of which records were drawn, exact up to the clock's jitter, with
no noise on it: it tells the batch's size, and over steps whether a record is
there, as a loss would. The same holds for whatever is computed from a time
(rates, MFU, goodput, the length of a stall), and for memory, of which every
microbatch's diagnostics take some. That rates have the *expected* batch size
above the time, a public constant, changes nothing of that. The realised one
would give away the size by itself, with any clock.

The events of TensorBoard and the files of a folder carry times of their own,
which are as private; whoever publishes a folder publishes them.
"""

import concurrent.futures
import contextlib
import pathlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import tqdm

from ppnet import config as config_lib
from ppnet.core import hosts, records
from ppnet.data import batching
from ppnet.train import goodput, metrics, profiling, stalls, throughput
from ppnet.train import program as program_lib

PREFIX = "nonprivate/machine/"


class Sent:
  """One step on its way: when it was sent, and when the devices ended it."""

  def __init__(self, *, num_done: int, waited_secs: float):
    """A step about to be sent.

    Args:
      num_done: steps that are done with it.
      waited_secs: for its data.
    """
    self.num_done = num_done
    self.waited_secs = waited_secs
    self.began = self.sent = time.perf_counter()
    self.is_new = False
    self.ended: concurrent.futures.Future[float] = concurrent.futures.Future()


class _Ends:
  """Notes when the devices end what they were sent.

  The loop fetches a step's numbers later than they are there. A thread of its
  own waits for them, and for nothing else.
  """

  def __init__(self):
    self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
    # A daemon: devices that hang must not keep the process.
    threading.Thread(target=self._follow, name="ends", daemon=True).start()

  def follow(self, sent: Sent, arrays: Any) -> None:
    """Will set `sent.ended` when the arrays are there."""
    self._queue.put((sent, arrays))

  def close(self) -> None:
    """Ends the thread behind the last step."""
    self._queue.put(None)

  def _follow(self) -> None:
    """The thread."""
    while (item := self._queue.get()) is not None:
      sent, arrays = item
      # What failed is raised where the loop fetches it.
      with contextlib.suppress(Exception):
        jax.block_until_ready(arrays)
      sent.ended.set_result(time.perf_counter())
      del item, sent, arrays  # Not kept while the next one is waited for.


class Watch:
  """Watches one process of a run. Not for several threads."""

  def __init__(
    self,
    config: config_lib.ExperimentConfig,
    workdir: pathlib.Path,
    program: program_lib.Program,
    *,
    began: float,
    log: Any,
    profile_steps: profiling.Steps | None = None,
  ):
    """Begins to watch.

    Args:
      config: the experiment.
      workdir: where the first process keeps the record `machine.json`.
      program: of the experiment.
      began: when this process began, in Unix time.
      log: where stalls are reported, a text file.
      profile_steps: the first and last step of a trace.
    """
    self._work = work = throughput.work(config, program)
    self._write: Callable[[Mapping[str, Any]], Any] | None = None
    self._watchdog = stalls.Watchdog(
      limit_secs=config.perf.stall_secs, log=log, record=self._record_stall
    )
    self._time = goodput.Goodput(
      workdir if hosts.is_first() else None,
      {
        "device_kind": work.device_kind,
        "num_devices": work.num_devices,
        "peak_flops_per_sec": work.peak_flops_per_sec,
        "no_mfu_because": work.no_mfu_because,
      },
      began=began,
    )
    self._began: float | None = began
    self._trace = profiling.Trace(
      workdir / "tensorboard", profile_steps, log=log
    )
    self._ends = _Ends()
    self._num_done = 0
    self._waited_secs = 0.0
    self._away_secs = 0.0
    self._last: tuple[float, float] | None = None
    self._shapes: set[Any] = set()
    self._positions = [0, 0]  # Rows, and positions of all of them.
    self._taken = [0, 0.0]  # Steps that were measured, and their seconds.
    self._row_length = 0.0

  def __enter__(self) -> "Watch":
    return self

  def __exit__(self, *error: object) -> None:
    self.close()

  def close(self) -> None:
    """Writes what is left to write."""
    self._started()
    with self.away("profile", "the trace to be written"):
      self._trace.close()
    self._ends.close()
    self._watchdog.close()
    self._time.save(now=True)

  def begin(
    self,
    num_done: int,
    *,
    lengths: Sequence[int],
    writer: metrics.Writer | metrics.NoWriter,
  ) -> None:
    """The first step is next.

    Args:
      num_done: steps that were done before.
      lengths: that rows may have.
      writer: of the metrics, for stalls.
    """
    self._num_done = num_done
    self._write = writer.write_durably
    # Until a row is seen: where all have one length, this is it.
    self._row_length = float(lengths[-1])
    self._started()
    self._time.save(now=True)
    with self.away("profile", "the trace to begin"):
      self._trace.begin(num_done)

  def _started(self) -> None:
    """Whatever comes now is no part of the start."""
    if self._began is not None:
      self._time.add("start", max(time.time() - self._began, 0.0))
      self._began = None

  @contextlib.contextmanager
  def waiting_for(self, what: str) -> Iterator[None]:
    """Names what the loop waits for, should it take long."""
    if jax.process_count() > 1:
      what += (
        f" (process {jax.process_index()} of {jax.process_count()}; it may wait"
        " for another one)"
      )
    with self._watchdog.waiting_for(what):
      yield

  @contextlib.contextmanager
  def away(self, name: str, what: str) -> Iterator[None]:
    """Likewise, for what is no part of a step; `name` is one of goodput's."""
    began = time.perf_counter()
    try:
      with self.waiting_for(what):
        yield
    finally:
      secs = time.perf_counter() - began
      self._away_secs += secs
      self._time.add(name, secs)
      self._time.save(now=name == "checkpoint")

  def now(self, what: str) -> None:
    """A wait goes on to its next part, which may take as long again."""
    self._watchdog.now(what)

  def each(self, steps: Iterator[Any]) -> Iterator[Any]:
    """The same steps, noting how long the loop waits for each."""
    while True:
      began = time.perf_counter()
      with self.waiting_for(f"the data of step {self._num_done + 1}"):
        data = next(steps, None)
      self._waited_secs = time.perf_counter() - began
      if data is None:
        return
      yield data

  @contextlib.contextmanager
  def sending(self, data: Mapping[str, Any]) -> Iterator[Sent]:
    """The loop sends a step to the devices, in this block."""
    self._num_done = data["step"] + 1
    sent = Sent(num_done=self._num_done, waited_secs=self._waited_secs)
    shapes: set[Any] = {"update"}
    for batch in data["microbatches"]:
      shapes.add(batch["tokens"].shape)
      num_rows = int((~batch[batching.PADDING_KEY]).sum())
      self._positions[0] += num_rows
      self._positions[1] += num_rows * batch["tokens"].shape[1]
    sent.is_new = not shapes <= self._shapes
    what = "compiled and sent" if sent.is_new else "sent"
    with (
      self.waiting_for(f"step {sent.num_done} to be {what} to the devices"),
      jax.profiler.StepTraceAnnotation("train", step_num=sent.num_done),
    ):
      yield sent
    self._shapes |= shapes
    sent.sent = time.perf_counter()

  def follow(self, sent: Sent, arrays: Any) -> None:
    """Will know when a step's last arrays are there."""
    self._ends.follow(sent, arrays)

  def ended(self, sent: Sent) -> dict[str, float | None]:
    """What a step that was fetched says of the machine.

    Returns:
      Named with `PREFIX`: "step_secs", from the end of the step before to its
      own, without what was no part of either, and None for the first one and
      where there was a compilation; "data_wait_secs", of which the devices may
      have worked; the rates of `throughput.Work`; "goodput" so far; and the
      largest memory so far of a device, or of this process where devices do
      not say.
    """
    ended = sent.ended.result()
    before, away_before = self._last or (sent.began, self._away_secs)
    sent_at = sent.began
    if sent.is_new:
      sent_at = max(sent.sent, before)
      self._time.add("compile", max(sent_at - max(sent.began, before), 0.0))
    self._time.add_step(sent.num_done, max(ended - max(sent_at, before), 0.0))
    step_secs = None
    if self._last is not None and not sent.is_new:
      step_secs = ended - before - (self._away_secs - away_before)
      self._taken = [self._taken[0] + 1, self._taken[1] + step_secs]
    self._last = (ended, self._away_secs)
    self._time.save(now=False)
    if self._positions[0]:
      self._row_length = self._positions[1] / self._positions[0]
    seen = {
      "step_secs": step_secs,
      "data_wait_secs": sent.waited_secs,
      "goodput": self._time.goodput,
      **self._work.rates(step_secs, self._row_length),
      **memory(),
    }
    return {PREFIX + name: value for name, value in seen.items()}

  def changes_after(self, num_done: int) -> bool:
    """Whether a trace wants all earlier steps to be done by then."""
    return self._trace.changes_after(num_done)

  def done(self, num_done: int) -> None:
    """So many steps are done, and the devices have nothing to do."""
    if self.changes_after(num_done):
      with self.away("profile", "the trace to be written"):
        self._trace.reached(num_done)

  def progress(self, *, loss: float | None, epsilon: float) -> str:
    """For the progress line; speeds are this process's averages so far."""
    count, secs = self._taken
    mean = secs / count if count else None
    rates = self._work.rates(mean, self._row_length)
    return ", ".join(
      [
        f"loss {_short(loss, '.3f')}",
        f"ε {epsilon:.2f}",
        f"{_short(mean, '.2f')} s/step",
        f"{_short(rates['tokens_per_sec'], '.0f')} tokens/s",
        *([f"MFU {_short(rates['mfu'], '.1%')}"] if "mfu" in rates else []),
        f"waited {self._waited_secs:.2f} s",
        *(f"{size / 1e9:.1f} GB" for size in memory().values()),
        f"goodput {self._time.goodput:.0%}",
      ]
    )

  def totals(self, workdir: pathlib.Path) -> dict[str, Any]:
    """Of the whole run, restarts included, for `summary.json`."""
    rows = records.latest_rows(workdir / "metrics.jsonl", split="train")
    secs = [row.get(f"{PREFIX}step_secs") for row in rows]
    secs = [value for value in secs if value is not None]
    mean = sum(secs) / len(secs) if secs else None
    num_stalls = sum(
      row.get("split") == "stall"
      for row in records.read_json_lines(workdir / "metrics.jsonl")
    )
    seen = {
      "step_secs": mean,
      **self._work.rates(mean, self._row_length),
      "data_wait_secs": sum(
        row.get(f"{PREFIX}data_wait_secs") or 0.0 for row in rows
      ),
      **memory(),
      "num_stalls": num_stalls,
      "wall_secs": self._time.wall_secs,
      "goodput": self._time.goodput,
      **{f"secs/{name}": value for name, value in self._time.secs().items()},
    }
    return {
      "no_mfu_because": self._work.no_mfu_because,
      **{PREFIX + name: value for name, value in seen.items()},
    }

  def _record_stall(self, what: str, secs: float) -> None:
    """Writes a row of a stall; in the watchdog's thread."""
    if self._write is not None:
      self._write(
        {
          "split": "stall",
          "step": self._num_done,
          "waiting_for": what,
          f"{PREFIX}waited_secs": secs,
        }
      )


def memory() -> dict[str, float]:
  """The largest memory so far, in bytes: of a device, or else of the process.

  Returns:
    "device_memory_bytes" of the device of this process that had most, where
    devices tell; else "process_memory_bytes", the largest resident set, where
    the system tells; else nothing.
  """
  stats = [device.memory_stats() for device in jax.local_devices()]
  key = "peak_bytes_in_use"
  peaks = [each[key] for each in stats if each and key in each]
  if peaks:
    return {"device_memory_bytes": float(max(peaks))}
  try:
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
      if line.startswith("VmHWM:"):
        return {"process_memory_bytes": 1024.0 * int(line.split()[1])}
  except OSError:
    pass  # Not Linux.
  return {}


def progress_bar(
  config: config_lib.ExperimentConfig, *, num_done: int, log: Any
) -> tqdm.tqdm:
  """The first process's line on the screen; the others have none."""
  return tqdm.tqdm(
    total=config.train.num_steps,
    initial=num_done,
    desc=config.name,
    unit="step",
    file=log,
    bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}"
    "{postfix}]",
    dynamic_ncols=True,
    mininterval=0.1 if log.isatty() else 10.0,
    disable=not hosts.is_first(),
  )


def _short(value: float | None, form: str) -> str:
  """A number, or a dash."""
  return "-" if value is None else format(value, form)
