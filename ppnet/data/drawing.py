"""Pictures that a random process draws, one after the other."""

from collections.abc import Callable

import numpy as np

from ppnet.core import checks

# Returns one picture, float [H, W] from 0 to 1.
Draw = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]

_SMALLEST = 8


def pictures(
  draw: Draw, num: int, *, height: int, width: int, seed: int
) -> np.ndarray:
  """Draws `num` pictures.

  Args:
    draw: one of them, of a shape.
    num: N.
    height: H, in pixels, at least 8.
    width: W, at least 8.
    seed: of the whole set.

  Returns:
    float32 [N, H, W]. With a larger N the first pictures stay the same.

  Raises:
    ValueError: `num` is not positive, or the pictures are too small to show
      anything.
  """
  checks.positive(num=num)
  if min(height, width) < _SMALLEST:
    checks.fail(
      f"pictures of {_SMALLEST} x {_SMALLEST} pixels at least",
      height=height,
      width=width,
    )
  rng = np.random.default_rng(seed)
  shape = (height, width)
  return np.stack([draw(rng, shape) for _ in range(num)]).astype(np.float32)
