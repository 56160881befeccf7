"""Memory that is freed and taken again, in processes of their own."""

import pathlib
import platform
import subprocess
import sys

import pytest

from ppnet.core import allocator

_CODE = """
import resource
import numpy as np
from ppnet.core import allocator

if {keeps}:
  assert allocator.keep_freed()
np.ones(1 << 25, np.uint8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
  np.ones(1 << 25, np.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*, keeps):
  """Pages that the kernel gave for twenty times 32 MiB."""
  out = subprocess.run(
    [sys.executable, "-c", _CODE.format(keeps=keeps)],
    capture_output=True,
    check=True,
    text=True,
  )
  return int(out.stdout)


@pytest.mark.skipif(
  platform.libc_ver()[0] != "glibc", reason="settings of glibc's malloc"
)
def test_what_is_freed_is_taken_again_without_the_kernel():
  assert faults(keeps=True) < 100
  # Else this test says nothing: huge pages would need 16 for each array.
  assert faults(keeps=False) > 300


_LARGE_CODE = """
import resource
import numpy as np
from ppnet.core import allocator

assert allocator.keep_freed()
def work():
  for array in [np.ones(1 << 27, np.uint8) for _ in range(20)]:
    del array
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(
  platform.libc_ver()[0] != "glibc", reason="settings of glibc's malloc"
)
def test_more_than_two_gigabytes_are_kept_as_well():
  out = subprocess.run(
    [sys.executable, "-c", _LARGE_CODE],
    capture_output=True,
    check=True,
    text=True,
  )
  assert int(out.stdout) < 100
  # Fails if: what is free at the end of the heap is given back from 2 GiB on.


_THREADS_CODE = """
import ctypes
import jax, jax.numpy as jnp
from ppnet.core import allocator

{first}
{then}
jax.jit(lambda x: x @ x)(jnp.ones((1000, 1000))).block_until_ready()
libc = ctypes.CDLL(None)
libc.fdopen.restype = ctypes.c_void_p
libc.malloc_info.argtypes = [ctypes.c_int, ctypes.c_void_p]
libc.fflush.argtypes = [ctypes.c_void_p]
out = libc.fdopen(1, b"w")
libc.malloc_info(0, out)
libc.fflush(out)
"""


def pools(first, then):
  """Pools of a process whose backend starts before or after."""
  out = subprocess.run(
    [
      sys.executable,
      "-c",
      _THREADS_CODE.format(first=first, then=then),
    ],
    capture_output=True,
    check=True,
    text=True,
  )
  return out.stdout.count("<heap nr")


@pytest.mark.skipif(
  platform.libc_ver()[0] != "glibc", reason="settings of glibc's malloc"
)
def test_a_backend_s_threads_share_the_pool_if_they_start_later():
  keep, start = "assert allocator.keep_freed()", "jax.devices()"
  assert pools(keep, start) == 1
  # Else this test says nothing. Blocks above 64 MiB go past such a pool.
  assert pools(start, keep) > 1


@pytest.mark.parametrize(
  ("name", "found"),
  [
    ("nvidia0", True),
    ("accel3", True),
    ("vfio/7", True),
    ("vfio/vfio", False),
    ("null", False),
    ("nvidiactl", False),
  ],
)
def test_an_accelerator_is_known_by_its_device_file(tmp_path, name, found):
  path = pathlib.Path(tmp_path, name)
  path.parent.mkdir(exist_ok=True)
  path.touch()
  assert allocator.has_accelerator(tmp_path) == found
