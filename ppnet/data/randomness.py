"""Random numbers of augmentation: a function of five integers, nothing else.

A view of a record is named by the seed, the visit (the training step that
draws the record), the record's position in the split, the number of the view
and the stream (which transform of which media item). So it does not depend on
how many workers there are, on the batch size, on which other records are
drawn, or on where a run was resumed.

These numbers protect nobody: sampling and DP noise have their own roots, from
the operating system's entropy.

>>> rng = generator(7, visit=3, record=41, view=0, stream=1)
>>> again = generator(7, visit=3, record=41, view=0, stream=1)
>>> rng.random() == again.random()
True
"""

import hashlib
import operator
from typing import Any

import numpy as np
from numpy.random import bit_generator

from ppnet.core import checks

_WORD_BYTES = 16  # Each integer has a fixed place, so no two names collide.
_PERSON = b"ppnet/data"  # Another use of the same five integers differs.


class _Key(bit_generator.ISeedSequence):
  """Hands given words to a bit generator as its key."""

  __slots__ = ("_words",)

  def __init__(self, words: np.ndarray):
    self._words = words

  def generate_state(self, n_words, dtype=np.uint32):
    """Returns the words; Philox asks for two of 64 bits."""
    assert n_words == 2, n_words
    assert dtype is np.uint64, dtype
    return self._words


def generator(
  seed: int, *, visit: int, record: int, view: int, stream: int
) -> np.random.Generator:
  """Makes the generator that belongs to one transform of one view.

  The five integers are hashed (BLAKE2b, Aumasson et al. 2013, RFC 7693) to the
  128-bit key of a Philox4x64 counter (Salmon et al. 2011, "Parallel random
  numbers: as easy as 1, 2, 3", section 3.3). Generators with different keys are
  independent streams; that two names share a key has a chance of about
  n² / 2¹²⁹ among n names.

  Args:
    seed: of the run.
    visit: the training step.
    record: position of the record in its split.
    view: 0 to K - 1 of the record's K views.
    stream: number of the transform and of the media item that it works on.

  Returns:
    A generator of its own; nothing else advances it.

  Raises:
    ValueError: a number is negative or takes more than 128 bits.
    TypeError: a number is no integer.

  | case | result |
  | --- | --- |
  | the same five integers, in another process or order | the same numbers |
  | one of them differs, in any bit | an independent stream |
  | NumPy integers, True | as the Python integer of that value |
  | 1.0, "1" | TypeError |
  | -1, 2**128 | ValueError |
  """
  names = (seed, visit, record, view, stream)
  try:
    content = b"".join(
      [operator.index(n).to_bytes(_WORD_BYTES, "little") for n in names]
    )
  except OverflowError:
    checks.fail(
      "integers from 0 to 2**128 - 1",
      seed=seed,
      visit=visit,
      record=record,
      view=view,
      stream=stream,
    )
  digest = hashlib.blake2b(content, digest_size=16, person=_PERSON).digest()
  # NumPy takes any ISeedSequence here; its annotations name one of them.
  key: Any = _Key(np.frombuffer(digest, "<u8"))
  return np.random.Generator(np.random.Philox(key))
