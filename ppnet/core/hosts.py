"""Several processes that run one program: who speaks, and what all agree on.

One process is the first. It alone owns the run's folder: it draws secrets,
charges the ledger and writes records, and tells the others what they must know.
With one process all of this is plain function calls.
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

# After so long without a sign of life a process is taken for dead.
_HEARTBEAT_SECS = 30

# How long those that are done wait for the first process, which has figures to
# draw and records to write. It may be slow; were it dead, its heartbeat would
# say so.
_SHUTDOWN_SECS = 900


def start(
  *,
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
) -> None:
  """Joins the job's other processes; call it before anything touches a device.

  On a TPU slice and under SLURM all three are found out.

  Args:
    coordinator: "host:port" of the first process.
    num_processes: how many there are.
    process_id: which one this is, from 0.
  """
  jax.distributed.initialize(
    coordinator_address=coordinator,
    num_processes=num_processes,
    process_id=process_id,
    heartbeat_timeout_seconds=_HEARTBEAT_SECS,
    shutdown_timeout_seconds=_SHUTDOWN_SECS,
  )


def is_first() -> bool:
  """Whether this process owns the run's folder."""
  return jax.process_index() == 0


def from_first(make: Callable[[], Any]) -> Any:
  """What `make` returns on the first process, on all of them.

  Args:
    make: called on the first process alone; returns JSON values.

  Returns:
    The same values everywhere.
  """
  if jax.process_count() == 1:
    return make()
  content = np.zeros(0, np.uint8)
  value = None
  if is_first():
    value = make()
    content = np.frombuffer(json.dumps(value).encode(), np.uint8)
  size = int(multihost_utils.broadcast_one_to_all(np.int32(content.size)))
  buffer = np.zeros(size, np.uint8)
  buffer[: content.size] = content
  told = bytes(np.asarray(multihost_utils.broadcast_one_to_all(buffer)))
  return value if is_first() else json.loads(told)


def first_then_others(work: Callable[[], Any]) -> Any:
  """Calls `work` on the first process, then on the others; each its result."""
  if jax.process_count() == 1:
    return work()
  result = work() if is_first() else None
  multihost_utils.sync_global_devices("first")
  return result if is_first() else work()


def leave(message: str, *, exit_code: int) -> NoReturn:
  """Ends this process at once: others that are gone are not waited for."""
  print(message, file=sys.stderr, flush=True)
  os._exit(exit_code)
