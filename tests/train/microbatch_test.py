"""The largest microbatch that fits is found with few compiles."""

import dataclasses

import pytest

from ppnet.train import microbatch


@dataclasses.dataclass(frozen=True)
class Tried:
  fits: bool
  total_bytes: int | None


def searched(
  *, fixed, each, available, start, unit=8, largest=10_000, oom=True
):
  """Microbatches tried where memory is a line; whether the compiler gave up."""

  def compile_with(size):
    assert size % unit == 0
    total = fixed + each * size
    fits = total <= available
    return Tried(fits, total if fits or not oom else None)

  return microbatch.search(
    compile_with,
    start=start,
    unit=unit,
    largest=largest,
    available_bytes=available,
  )


def best(found):
  return max(size for size, each in found.items() if each.fits)


@pytest.mark.parametrize("oom", [True, False])
@pytest.mark.parametrize(
  ("fixed", "start", "expected"),
  [(500, 16, 48), (0, 16, 96), (890, 8, 8), (500, 96, 48), (500, 48, 48)],
)
def test_a_line_is_followed_to_the_limit(fixed, start, expected, oom):
  found = searched(fixed=fixed, each=10, available=1000, start=start, oom=oom)
  assert best(found) == expected
  assert len(found) <= 4
  assert next(iter(found)) == start


def test_no_more_is_compiled_than_a_batch_needs():
  found = searched(fixed=0, each=1, available=1000, start=16, largest=50)
  assert list(found) == [16, 56]  # Whole units, all of the batch in one.


def test_what_fits_nowhere_ends_at_one_unit():
  found = searched(fixed=2000, each=1, available=1000, start=32)
  assert list(found) == [32, 16, 8]
  assert not any(each.fits for each in found.values())
