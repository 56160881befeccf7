"""Tests of ppnet.data.randomness."""

import itertools
import subprocess
import sys

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from ppnet.data import randomness

_NAMES = ("seed", "visit", "record", "view", "stream")
_IN_ANOTHER_PROCESS = """
import sys
from ppnet.data import randomness
numbers = [int(word) for word in sys.argv[1:]]
rng = randomness.generator(
  numbers[0], visit=numbers[1], record=numbers[2], view=numbers[3],
  stream=numbers[4])
print(rng.integers(2**63, size=5).tolist())
"""


def _generator(*numbers):
  seed, *others = numbers
  return randomness.generator(
    seed, **dict(zip(_NAMES[1:], others, strict=True))
  )


def _draw(*numbers, size=4):
  return tuple(_generator(*numbers).integers(2**63, size=size).tolist())


def test_numbers_are_the_same_in_another_process_and_in_any_order():
  numbers = (2**32 + 5, 1, 2, 3, 4)
  expected = _draw(*numbers, size=5)
  _draw(9, 9, 9, 9, 9)  # What else was drawn does not matter.
  assert _draw(*numbers, size=5) == expected
  result = subprocess.run(
    [sys.executable, "-c", _IN_ANOTHER_PROCESS, *map(str, numbers)],
    capture_output=True,
    text=True,
    check=True,
    env={"PYTHONHASHSEED": "123", "PYTHONPATH": "."},
  )
  assert result.stdout.strip() == str(list(expected))


def test_numbers_stay_those_of_the_first_release():
  # These may change only with a note that resumed runs see other views.
  assert _draw(0, 0, 0, 0, 0, size=2) == (
    3585185793719949649,
    1374193105645482898,
  )
  assert _draw(7, 3, 41, 0, 1, size=2) == (
    2958823483574098318,
    7293582488930469157,
  )


def test_every_name_counts_and_none_collide():
  values = (0, 1, 2, 255, 256, 2**32 - 1, 2**32, 2**32 + 1, 2**63, 2**64 + 1)
  seen = {}
  for place, value in itertools.product(range(5), values):
    numbers = [1, 2, 3, 4, 5]
    numbers[place] = value
    seen[tuple(numbers)] = _draw(*numbers)
  assert len(set(seen.values())) == len(seen)
  # Moving digits from one number to its neighbour is another name as well.
  assert _draw(1, 0, 0, 0, 0) != _draw(0, 1, 0, 0, 0)
  assert _draw(2**64, 0, 0, 0, 0) != _draw(0, 1, 0, 0, 0)
  assert _draw(2**128 - 1, 0, 0, 0, 0) != _draw(0, 2**128 - 1, 0, 0, 0)
  # Fails if: the view, or any one number, is left out of the hash.


@hypothesis.given(
  numbers=st.tuples(*[st.integers(0, 2**128 - 1)] * 5),
  place=st.integers(0, 4),
  bit=st.integers(0, 127),
)
def test_any_changed_bit_changes_the_numbers(numbers, place, bit):
  other = list(numbers)
  other[place] ^= 1 << bit
  assert _draw(*numbers) != _draw(*other)


def test_neighbouring_streams_are_uncorrelated_and_uniform():
  count = 4000
  for place in range(5):
    rows = []
    for value in range(2):
      numbers = [3] * 5
      numbers[place] = value
      rows.append(_generator(*numbers).standard_normal(count))
    correlation = np.corrcoef(rows)[0, 1]
    assert abs(correlation) < 4.5 / np.sqrt(count)
  # First numbers of successive records, views and visits are uniform too.
  for place in range(1, 5):
    first = []
    for value in range(2000):
      numbers = [3] * 5
      numbers[place] = value
      first.append(_generator(*numbers).random())
    correlation = np.corrcoef(first[:-1], first[1:])[0, 1]
    assert abs(correlation) < 4.5 / np.sqrt(2000)
    first = np.sort(first)
    distance = np.abs(first - (np.arange(2000) + 0.5) / 2000).max()
    assert distance < 1.95 / np.sqrt(2000)  # Kolmogorov-Smirnov, 0.1 %.


def test_generators_do_not_share_a_state():
  one, other = _generator(1, 2, 3, 4, 5), _generator(1, 2, 3, 4, 5)
  first = one.random(10)
  np.testing.assert_array_equal(other.random(10), first)


def test_numpy_integers_name_the_same_stream():
  numbers = (5, 6, 7, 8, 9)
  assert _draw(*map(np.int32, numbers)) == _draw(*numbers)
  assert _draw(*map(np.uint64, numbers)) == _draw(*numbers)


@pytest.mark.parametrize("place", range(5))
def test_negative_large_and_other_numbers_are_refused(place):
  for wrong, error in [
    (-1, ValueError),
    (2**128, ValueError),
    (1.0, TypeError),
    ("1", TypeError),
    (None, TypeError),
  ]:
    numbers = [1] * 5
    numbers[place] = wrong
    with pytest.raises(error):
      _generator(*numbers)
