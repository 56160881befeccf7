"""Pictures of random garments: what a shop's photographs show, from no data.

Outlines of tops, dresses, trousers, shoes and bags, made of random lengths and
filled with random greys, stripes, checks, prints and folds; one of them fills a
picture, bright on black. As with `strokes`, statistics of such pictures stand
in for those of private ones (Tang et al. 2023,
https://arxiv.org/abs/2306.06076). That clothes look like this is common
knowledge; no picture was traced or measured.

Lengths are in 28ths of the picture's shorter side, from its middle; y grows
downwards.

>>> pictures(3, height=28, width=28, seed=0).shape
(3, 28, 28)
"""

import numpy as np

from ppnet.data import drawing

_SIDE = 28
_END = 13.8  # Half a side, less a border.
_FINER = 2  # Points of the drawing along a pixel.
_FOLDS = 7  # Random greys along a side, between which folds are smooth.

# What is bright in a picture: two parts with greys of their own, bool [H, W].
_Parts = tuple[np.ndarray, np.ndarray]


def _between(x: np.ndarray, knots: list, values: list) -> np.ndarray:
  """Straight lines through (knot, value), and 0 outside."""
  return np.interp(x, knots, values, left=0.0, right=0.0)


def _bar(y, x, *, start, end, widths) -> np.ndarray:
  """A bar with round ends, whose half width goes from one to the other."""
  along = np.subtract(end, start)
  offset_y, offset_x = y - start[0], x - start[1]
  t = (offset_y * along[0] + offset_x * along[1]) / (along @ along + 1e-9)
  t = np.clip(t, 0, 1)
  distance = np.hypot(offset_y - t * along[0], offset_x - t * along[1])
  return distance < widths[0] + (widths[1] - widths[0]) * t


def _neck(y, x, *, top, half_width, depth) -> np.ndarray:
  """A round hole at the top."""
  below = np.clip(1 - (y - top) / depth, 0, 1)
  return (x < half_width * np.sqrt(below)) & (y < top + depth)


def _shirt(rng: np.random.Generator, y: np.ndarray, x: np.ndarray) -> _Parts:
  """What is worn above: with short sleeves, long ones or none."""
  x = np.abs(x)
  top, bottom = rng.uniform(-13, -11.5), rng.uniform(11, _END)
  shoulder = rng.uniform(5.5, 8.5)
  waist = shoulder * rng.uniform(0.75, 1.05)
  body = x < _between(
    y,
    [top, top + 2, top + 5, (top + bottom) / 2 + 2, bottom],
    [
      rng.uniform(2.5, shoulder * 0.7),
      shoulder,
      shoulder * rng.uniform(0.85, 1),
      waist,
      waist * rng.uniform(0.9, 1.25),
    ],
  )
  body &= ~_neck(
    y,
    x,
    top=top,
    half_width=rng.uniform(1.5, 3.5),
    depth=rng.uniform(0.3, 3.5),
  )
  if rng.random() < 0.12:
    return body, np.zeros_like(body)
  is_long = rng.random() < 0.5
  length = rng.uniform(17, 24) if is_long else rng.uniform(4, 9)
  angle = rng.uniform(0.02, 0.55) if is_long else rng.uniform(0.2, 0.9)
  width = rng.uniform(1.8, 3.2)
  start = (top + 3, shoulder - 0.7 * width)
  end = (
    min(start[0] + length * np.cos(angle), bottom),
    min(start[1] + length * np.sin(angle), _END),
  )
  widths = (width, width * rng.uniform(0.55, 0.95))
  return body, _bar(y, x, start=start, end=end, widths=widths) & ~body


def _dress(rng: np.random.Generator, y: np.ndarray, x: np.ndarray) -> _Parts:
  """Narrow at the waist, as long as the picture; every second has sleeves."""
  x = np.abs(x)
  shoulder, hem = rng.uniform(2.5, 5), rng.uniform(2.5, 8)
  waist, waist_y = rng.uniform(2, 4), rng.uniform(-6, 0)
  body = x < _between(
    y,
    [-_END, -_END + 3, waist_y, waist_y + rng.uniform(3, 8), _END],
    [
      shoulder * rng.uniform(0.5, 1),
      shoulder,
      waist,
      (waist + hem) / 2 * rng.uniform(0.9, 1.2),
      hem,
    ],
  )
  body &= ~_neck(
    y,
    x,
    top=-_END,
    half_width=rng.uniform(1, shoulder * 0.8),
    depth=rng.uniform(0.3, 4),
  )
  if rng.random() < 0.5:
    return body, np.zeros_like(body)
  length, angle = rng.uniform(3, 16), rng.uniform(0.05, 0.6)
  width = rng.uniform(1, 1.8)
  start = (-_END + 3, shoulder - 0.6 * width)
  end = (
    start[0] + length * np.cos(angle),
    start[1] + length * np.sin(angle),
  )
  sleeves = _bar(y, x, start=start, end=end, widths=(width, 0.8 * width))
  return body, sleeves & ~body


def _trousers(rng: np.random.Generator, y: np.ndarray, x: np.ndarray) -> _Parts:
  """Two legs; some are short."""
  x = np.abs(x)
  bottom = rng.uniform(0, 9) if rng.random() < 0.15 else _END
  waist, crotch = rng.uniform(2.8, 4.5), rng.uniform(-8, -3)
  outside, leg = rng.uniform(3, 7.5), rng.uniform(2.4, 5.6)
  hip = waist * rng.uniform(1, 1.35)
  outer = _between(y, [-_END, crotch, bottom], [waist, hip, outside])
  inner = _between(y, [crotch, bottom], [0, max(outside - leg, 0.3)])
  legs = (x < outer) & (x >= inner)
  return legs, np.zeros_like(legs)


def _shoe(rng: np.random.Generator, y: np.ndarray, x: np.ndarray) -> _Parts:
  """From the side, its tip to the left: low, a boot, or with straps."""
  kind = rng.choice(["low", "boot", "straps"])
  places = np.linspace(-_END, _END, 9)
  length, bottom = _END, rng.uniform(4, 8)
  if kind == "low":
    lowest = [2, 3, 4, 5, 6, 7, 6, 6, 3]
    heights = rng.uniform(lowest, [4, 5, 6, 8, 10, 11, 10, 11, 9])
  elif kind == "boot":
    bottom, length = rng.uniform(11, _END), rng.uniform(9, _END)
    front, shaft = rng.uniform(-3, 2), rng.uniform(14, 26)
    foot = [rng.uniform(2, 4), rng.uniform(8, 12)]
    heights = np.interp(places, [-_END, front], foot)
    heights[places > front] = shaft * rng.uniform(0.95, 1)
  else:
    bottom = rng.uniform(3, 13)
    ends = [rng.uniform(1, 5), rng.uniform(2, 8), rng.uniform(3, 13)]
    heights = np.interp(places, [-_END, 0, _END], ends)
  above = np.interp(x * (_END / length), places, heights)
  shoe = (np.abs(x) < length) & (y < bottom) & (y > bottom - above)
  rise = np.zeros_like(x)
  if rng.random() < 0.35:  # A heel: the sole rises, and a post holds it.
    rise = np.clip((x + rng.uniform(0, 8)) / 14, 0, 1) * rng.uniform(1, 7)
    shoe &= (y < bottom - rise) | (x > length - rng.uniform(1.5, 5))
  sole = np.zeros_like(shoe)
  if rng.random() < 0.6:
    sole = shoe & (y >= bottom - rng.uniform(0.8, 2.5))
  if kind == "straps" and rng.random() < 0.7:
    straps = sole | (shoe & (y > bottom - 1.6 - rise))
    for _ in range(rng.integers(2, 5)):
      foot = (bottom, rng.uniform(-_END, _END))
      tip = (bottom - rng.uniform(4, 14), foot[1] + rng.uniform(-7, 7))
      widths = rng.uniform(0.5, 1.6, 2)
      straps |= _bar(y, x, start=foot, end=tip, widths=widths)
    shoe = straps & (y <= bottom) & (y > bottom - 13)
  if rng.random() < 0.5:  # Where the foot goes in.
    middle = rng.uniform(2, 9)
    edge = bottom - np.interp(middle, places, heights)
    across, down = rng.uniform(2.5, 6), rng.uniform(1, 3)
    shoe &= np.hypot((x - middle) / across, (y - edge) / down) >= 1
  return shoe & ~sole, sole & shoe


def _bag(rng: np.random.Generator, y: np.ndarray, x: np.ndarray) -> _Parts:
  """A box with round corners; most have a handle, some a flap."""
  half_width, half_height = rng.uniform(9, _END), rng.uniform(5, 11)
  middle = rng.uniform(half_height * 0.9, 13.5) - half_height
  tapered = 1 + rng.uniform(-0.2, 0.1) * (middle - y) / half_height
  power = rng.uniform(2, 8)
  box = np.abs(x / (half_width * tapered)) ** power
  box = box + np.abs((y - middle) / half_height) ** power < 1
  trim = np.zeros_like(box)
  if rng.random() < 0.75:
    across, up = rng.uniform(3, half_width * 0.9), rng.uniform(3, 12)
    foot = middle - half_height * 0.8
    ring = np.abs(np.hypot(x / across, (y - foot) / up) - 1) * min(across, up)
    trim = (ring < rng.uniform(0.4, 1.4)) & (y < foot + 1) & ~box
  if rng.random() < 0.4:
    fold = middle + half_height * rng.uniform(-0.4, 0.4)
    trim = trim | (box & (np.abs(y - fold) < 0.5))
  return box & ~trim, trim


_KINDS = ((_shirt, 0.4), (_dress, 0.1), (_trousers, 0.1), (_shoe, 0.3))
_KINDS += ((_bag, 0.1),)


def _waves(rng: np.random.Generator, lowest: float, places: np.ndarray):
  """A wave of random length along `places`."""
  return np.sin(2 * np.pi * rng.uniform(lowest, 0.45) * places)


def _fabric(rng: np.random.Generator, y: np.ndarray, x: np.ndarray):
  """What a garment's grey is multiplied by: float64 [H, W], around 1."""
  fabric = np.ones_like(y)
  kind = rng.choice(
    ["plain", "stripes", "checks", "print", "blocks"],
    p=[0.38, 0.25, 0.15, 0.15, 0.07],
  )
  if kind == "stripes":
    angle = rng.choice([0, np.pi / 2, rng.uniform(0, np.pi)])
    wave = _waves(rng, 0.15, y * np.cos(angle) + x * np.sin(angle))
    fabric -= rng.uniform(0.05, 0.5) * (wave > rng.uniform(-0.5, 0.9))
  elif kind == "checks":
    is_dark = _waves(rng, 0.15, y) * _waves(rng, 0.15, x) > 0
    fabric -= rng.uniform(0.05, 0.35) * is_dark
  elif kind == "print":
    is_near = np.abs(y - rng.uniform(-6, 2)) < rng.uniform(1, 5)
    is_near &= np.abs(x) < rng.uniform(2, 6)
    fabric[is_near] = rng.uniform(0.2, 1.4)
  elif kind == "blocks":
    fabric[y > rng.uniform(-8, 8)] = rng.uniform(0.3, 1)
  if rng.random() < 0.25:  # A zip, or buttons.
    fabric[np.abs(x) < rng.uniform(0.4, 1)] = rng.uniform(0.2, 0.8)
  return fabric + rng.uniform(0, 0.15) * _folds(rng, y, x)


def _folds(rng: np.random.Generator, y: np.ndarray, x: np.ndarray):
  """Smooth random light and shade of variance 1 or less: float64 [H, W]."""
  light = rng.normal(size=(_FOLDS, _FOLDS))
  scale = (_FOLDS - 1) / _SIDE
  row = np.clip((y + _SIDE / 2) * scale, 0, _FOLDS - 1.001)
  column = np.clip((x + _SIDE / 2) * scale, 0, _FOLDS - 1.001)
  i, j = row.astype(int), column.astype(int)
  down, right = row - i, column - j
  upper = (1 - right) * light[i, j] + right * light[i, j + 1]
  lower = (1 - right) * light[i + 1, j] + right * light[i + 1, j + 1]
  return (1 - down) * upper + down * lower


def _picture(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
  """One picture: float64 [H, W] in [0, 1]."""
  y, x = (
    ((np.arange(size * _FINER) + 0.5) / _FINER - size / 2)
    * (_SIDE / min(shape))
    for size in shape
  )
  y, x = np.meshgrid(y, x, indexing="ij")
  x = x - rng.normal(0, 0.3) + rng.normal(0, 0.03) * y  # Not quite upright,
  y = y - rng.normal(0, 0.3)  # nor in the middle.
  draws, odds = zip(*_KINDS, strict=True)
  body, trim = draws[rng.choice(len(draws), p=odds)](rng, y, x)
  grey = rng.beta(2.5, 1.5)
  other = grey * rng.uniform(0.7, 1.3)
  if rng.random() < 0.4:
    other = rng.uniform(0.1, 1)
  fabric = _fabric(rng, y, np.abs(x) if rng.random() < 0.5 else x)
  fabric = fabric + rng.uniform(0, 0.15) * rng.normal(size=y.shape)
  fine = np.clip((grey * body + other * trim) * fabric, 0, 1)
  height, width = shape
  return fine.reshape(height, _FINER, width, _FINER).mean(axis=(1, 3))


def pictures(num: int, *, height: int, width: int, seed: int) -> np.ndarray:
  """Draws pictures of one random garment each: see `drawing.pictures`.

  Returns:
    float32 [N, H, W] from 0, nothing, to 1.
  """
  return drawing.pictures(_picture, num, height=height, width=width, seed=seed)
