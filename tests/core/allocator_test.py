"""Memory that is freed and taken again, in processes of their own."""

import platform
import subprocess
import sys

import pytest

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
