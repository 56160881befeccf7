"""Freed memory that a process keeps, for hosts whose CPU trains.

A step on the CPU takes and frees arrays of a hundred megabytes. glibc gives
such blocks back to the kernel at once, which clears every page of them when
they are asked for again: up to a third of the processor time of a run was
spent there (BUILD_NOTES.md).
"""

import ctypes
import pathlib

# Of malloc.h.
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_MAX = -4
_M_ARENA_MAX = -8
_PAD_BYTES = 256 << 20
_NEVER = -1  # As malloc.h has it; 2 ** 31 - 1 trims a process of 4 GB.
_ACCELERATORS = ("accel[0-9]*", "vfio/[0-9]*", "nvidia[0-9]*", "kfd")


def has_accelerator(devices: pathlib.Path = pathlib.Path("/dev")) -> bool:
  """Whether this host has a TPU's or a GPU's device file.

  A guess, for when no backend may be started yet.
  """
  return any(any(devices.glob(name)) for name in _ACCELERATORS)


def keep_freed() -> bool:
  """Has the C library keep what this process frees, for itself.

  The process then never shrinks: not for a host that feeds an accelerator,
  where what a restored checkpoint took must go back. Threads share one pool,
  since the others could not grow without what is switched off. A thread that
  has its own pool keeps it: call this before a backend starts its threads.

  Returns:
    Whether it will; False without glibc, where nothing is changed.
  """
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (AttributeError, OSError):
    return False
  settings = (
    (_M_ARENA_MAX, 1),
    (_M_MMAP_MAX, 0),
    (_M_TRIM_THRESHOLD, _NEVER),
    (_M_TOP_PAD, _PAD_BYTES),
  )
  return all([mallopt(name, value) == 1 for name, value in settings])
