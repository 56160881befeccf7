"""Pictures of random strokes: what handwriting looks like, from no data.

A process that draws random curves gives pictures whose statistics are near
enough to those of private ones to be of use, at no cost in privacy: learning
priors from random processes (Tang et al. 2023, https://arxiv.org/abs/2306.06076).
Their box and their place are those of MNIST's digits, as its authors describe
them (LeCun et al. 1998, section III.A): the ink fills a box of 20 of 28 pixels,
and its centre of mass is the picture's centre.

>>> pictures(3, height=28, width=28, seed=0).shape
(3, 28, 28)
"""

import numpy as np

from ppnet.data import drawing

_SIDE = 28  # Pixels of the pictures that these lengths are for:
_BOX = 20.5  # The longer side of the ink.
_REACH = (1.2, 2.2)  # From the middle of a stroke to where no ink is left.

_CLOSED = 0.3  # Probability that a stroke ends where it began.
_SECOND = 0.35  # Probability of a second stroke.
_KNOTS = (3, 7)  # Random points that a stroke goes through, 3 to 6.
_POINTS = 16  # Points between two knots.


def _stroke(rng: np.random.Generator) -> np.ndarray:
  """A Catmull-Rom spline through random points of the unit square: [P, 2]."""
  knots = rng.uniform(size=(rng.integers(*_KNOTS), 2))
  if rng.random() < _CLOSED:
    knots = np.concatenate([knots[-1:], knots, knots[:2]])
  else:  # One more at each end, on the line through the last two.
    before, after = 2 * knots[0] - knots[1], 2 * knots[-1] - knots[-2]
    knots = np.concatenate([before[None], knots, after[None]])
  t = np.linspace(0, 1, _POINTS, endpoint=False)[:, None]
  a, b, c, d = (knots[i : len(knots) - 3 + i, None] for i in range(4))
  pieces = b + 0.5 * t * (
    c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a))
  )
  return pieces.reshape(-1, 2)


def _ink(points: np.ndarray, reach: float, shape: tuple[int, int]):
  """Ink of a pen that visits `points`, in pixels: float64 [H, W] in [0, 1]."""
  rows = np.square(np.arange(shape[0])[:, None] - points[:, 0])
  columns = np.square(np.arange(shape[1])[:, None] - points[:, 1])
  nearest = (rows[:, None] + columns[None]).min(axis=-1)
  return np.clip(reach - np.sqrt(nearest), 0, 1)


def _picture(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
  """One picture: float64 [H, W]."""
  num_strokes = 1 + (rng.random() < _SECOND)
  points = np.concatenate([_stroke(rng) for _ in range(num_strokes)])
  scale = min(shape) / _SIDE
  reach = rng.uniform(*_REACH) * scale
  span = np.ptp(points, axis=0).max()
  points *= (_BOX * scale - 2 * reach) / span
  middle = (np.array(shape) - 1) / 2
  points += middle - points.mean(axis=0)
  ink = _ink(points, reach, shape)
  mass = np.array(
    [
      (ink.sum(axis=1 - axis) * np.arange(shape[axis])).sum() / ink.sum()
      for axis in range(2)
    ]
  )
  return _ink(points + middle - mass, reach, shape)


def pictures(num: int, *, height: int, width: int, seed: int) -> np.ndarray:
  """Draws pictures of one or two random strokes each: see `drawing.pictures`.

  Returns:
    float32 [N, H, W] from 0, nothing, to 1, ink.
  """
  return drawing.pictures(_picture, num, height=height, width=width, seed=seed)
