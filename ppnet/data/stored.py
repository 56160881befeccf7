"""What the fixed transformations make of each record, kept on disk.

Scattering a picture takes a millisecond, and every run with the same data makes
the same numbers. With `data.store_fixed` the first run writes them into the
prepared folder, one file per split and modality:

    fixed-train-image-3f0c....npy       float32 [N, *shape]

The name holds a hash of all that the numbers depend on: the records (the hashes
on the data set's card), the transformations with their settings, the libraries
that they are made of, and the version of this file's rules. Another
configuration has another name and finds nothing; whoever changes the code of a
transformation raises `_VERSION`. A file gets its name in one rename when it is
complete, so that a killed run leaves none of that name; two runs at once write
the same bytes twice. It is mapped into memory, and runs on one machine share
its pages.

The file is as private as the records. It holds the test split as well, apart.
"""

import hashlib
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy
import tqdm

from ppnet.core import checks, records

_VERSION = 1
_AT_ONCE = 64  # Records: matrices times so many are as fast as they get.

Make = Callable[[Sequence[int]], Sequence[np.ndarray]]


def path(
  folder: pathlib.Path,
  *,
  split: str,
  modality: str,
  transforms: Sequence[Any],
  hashes: Sequence[Any],
) -> pathlib.Path:
  """Where the numbers of these transformations of these records are.

  Args:
    folder: the prepared folder.
    split: "train" or "test".
    modality: such as "image".
    transforms: the fixed ones, in order; their settings are fields.
    hashes: of the records, as the card has them.
  """
  content = {
    "version": _VERSION,
    "numpy": np.__version__,
    "scipy": scipy.__version__,
    "transforms": [
      [type(t).__module__, type(t).__qualname__, records.to_plain(t)]
      for t in transforms
    ],
    "hashes": hashes,
  }
  text = json.dumps(records.to_plain(content), sort_keys=True)
  digest = hashlib.sha256(text.encode()).hexdigest()[:16]
  return folder / f"fixed-{split}-{modality}-{digest}.npy"


def open_or_make(
  file: pathlib.Path,
  make: Make,
  *,
  count: int,
  shape: tuple[int, ...] | None = None,
) -> np.ndarray:
  """The stored array, mapped into memory and not writable.

  Args:
    file: from `path`.
    make: positions -> a float32 [*shape] for each; called for all positions, in
      order, some at a time, where there is no file yet, and not at all where
      there is one.
    count: N, the number of records, at least 1.
    shape: of one item, where that is known without making one.

  Returns:
    float32 [N, *shape].

  Raises:
    ValueError: the file is not of this shape; a new one would be written if it
      were not there.
    sources.BadRecordError: whatever `make` raises; no file is left.
  """
  if not file.exists():
    _write(file, make, count=count)
  array = np.load(file, mmap_mode="r", allow_pickle=False)
  item = array.shape[1:] if shape is None else shape
  if array.shape != (count, *item) or array.dtype != np.float32:
    checks.fail(
      f"{file} to hold float32 {[count, *item]}",
      "It is damaged. Delete it; it is made again.",
      shape=list(array.shape),
      dtype=str(array.dtype),
    )
  return array


def _write(file: pathlib.Path, make: Make, *, count: int) -> None:
  """Makes all items and gives the file its name."""
  (first,) = make([0])
  with records.replacing(file) as temporary:
    out = np.lib.format.open_memmap(
      temporary, mode="w+", dtype=np.float32, shape=(count, *first.shape)
    )
    with tqdm.tqdm(
      total=count, desc=f"transforming {file.name}", unit="record", delay=1
    ) as bar:
      for start in range(0, count, _AT_ONCE):
        positions = range(start, min(start + _AT_ONCE, count))
        out[positions.start : positions.stop] = make(positions)
        bar.update(len(positions))
    out.flush()
