"""Features whose directions are alike in size, by a prior that saw no record.

Gradient descent is slow along directions in which features vary little, and
under privacy there are only so many steps. With μ and Σ the mean and covariance
of features,

    x -> Λ^-1/2 Uᵀ (x - μ),   U Λ Uᵀ = Σ + λ I,   Λ from large to small,

gives every direction a variance of about 1. For a linear model trained by
gradients from zero and for noise that is the same in all directions, any other
root of the inverse, such as the symmetric one, only turns everything. This one
puts the directions in order, which `models.leading` makes use of.

Here μ and Σ are of pictures that a random process draws (`strokes` or
`garments`), so that no record has a part in them and no privacy budget is
spent. Where private pictures are unlike them, little is gained; nothing is
promised less.
"""

import dataclasses
import enum
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import grain
import numpy as np
import scipy.linalg
from absl import logging

from ppnet.core import checks
from ppnet.data import garments, stages, strokes

_EPS = 1e-5  # As in `models.layers.group_norm`.
_AT_ONCE = 64
_SMALLEST = 1e-12  # Keeps a picture of all zeros finite.


class Prior(enum.Enum):
  """What draws the pictures that whiten."""

  STROKES = "strokes"
  GARMENTS = "garments"


_DRAWN_BY = {
  Prior.STROKES: strokes.pictures,
  Prior.GARMENTS: garments.pictures,
}


def fit(
  features: np.ndarray, *, damping: float
) -> tuple[np.ndarray, np.ndarray]:
  """Measures what whitens.

  Args:
    features: float [N, D], of public or drawn records.
    damping: λ, added to every variance.

  Returns:
    μ float32 [D] and Λ^-1/2 Uᵀ float32 [D, D], the largest direction first.

  Raises:
    ValueError: `damping` is not positive: fewer records than features, or
      features that never vary, have no inverse.
  """
  checks.positive(damping=damping)
  mean = features.mean(axis=0)
  centred = features - mean
  covariance = np.asarray(centred.T @ centred / len(features), np.float64)
  variances, directions = scipy.linalg.eigh(
    covariance, overwrite_a=True, check_finite=False, driver="evd"
  )
  # Rounding may leave the smallest of few records' below zero.
  variances = np.maximum(variances, 0) + damping
  root = (directions / np.sqrt(variances)).T[::-1]
  return np.asarray(mean, np.float32), np.ascontiguousarray(root, np.float32)


def unit_groups(maps: np.ndarray, *, num_groups: int) -> np.ndarray:
  """Groups of maps with mean 0 and variance 1 each, all of it of norm 1.

  Args:
    maps: float32 [H, W, C] of one picture.
    num_groups: G; 0 leaves the maps as they are before the norm.

  Returns:
    float32 [H * W * C].
  """
  if num_groups:
    groups = maps.reshape(*maps.shape[:2], num_groups, -1)
    axes = (0, 1, 3)
    groups = groups - groups.mean(axis=axes, keepdims=True)
    variance = np.square(groups).mean(axis=axes, keepdims=True)
    maps = groups / np.sqrt(variance + _EPS)
  flat = maps.reshape(-1)
  return flat / max(float(np.linalg.norm(flat)), _SMALLEST)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Whitened(grain.transforms.Map):
  """Pixels float [H, W, C] -> float32 [H', W', K], whitened features.

  The features' groups of maps are normalised first, and all of it is scaled to
  norm 1; `model.linear.num_groups` has nothing left to do.

  Attributes:
    features: what makes features of pixels, such as `scattering.Scattering`.
    num_groups: see `unit_groups`.
    prior: what these pictures show.
    damping: λ, see `fit`; the variances of features of norm 1 add up to less
      than 1.
    num_pictures: how many random pictures μ and Σ are of.
    seed: of these pictures.
  """

  features: Any
  num_groups: int = 0
  prior: Prior = Prior.STROKES
  damping: float = 4e-4
  num_pictures: int = 12_000
  seed: int = 0

  kind: ClassVar[str] = "feature extraction"

  def __post_init__(self):
    checks.positive(damping=self.damping, num_pictures=self.num_pictures)
    checks.non_negative(num_groups=self.num_groups)

  @property
  def label(self) -> str:
    """Words for a table."""
    return f"{self.features.label}, whitened by random {self.prior.value}"

  def shape_after(self, shape: tuple[int, ...]) -> tuple[int, ...]:
    """[H, W, C] of the pixels -> [H', W', K].

    Raises:
      ValueError: the groups do not share the maps evenly.
    """
    after = self.features.shape_after(shape)
    if self.num_groups and after[-1] % self.num_groups:
      checks.fail(
        "num_groups to divide the feature maps",
        num_groups=self.num_groups,
        maps=after[-1],
      )
    return after

  def map(self, element: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces the pixels `element["image"]`; see `map_many`."""
    return self.map_many([element])[0]

  def map_many(
    self, elements: Sequence[Mapping[str, Any]]
  ) -> list[dict[str, Any]]:
    """Replaces the pixels of elements that are of one size, side by side.

    The first call draws and measures the random pictures.

    Raises:
      sources.BadRecordError: whatever `features` refuses.
    """
    mean, root = _fitted(self, elements[0]["image"].shape)
    maps = [
      element["image"] for element in stages.map_many(self.features, elements)
    ]
    flat = [unit_groups(one, num_groups=self.num_groups) for one in maps]
    white = (np.stack(flat) - mean) @ root.T
    return [
      {**element, "image": row.reshape(one.shape)}
      for element, row, one in zip(elements, white, maps, strict=True)
    ]


@functools.lru_cache(maxsize=2)
def _fitted(
  transform: Whitened, shape: tuple[int, int, int]
) -> tuple[np.ndarray, np.ndarray]:
  """μ and Λ^-1/2 Uᵀ for pictures of one shape, made once in a process."""
  height, width, channels = shape
  logging.info(
    "Whitening by %d random %s.", transform.num_pictures, transform.prior.value
  )
  drawn = _DRAWN_BY[transform.prior](
    transform.num_pictures, height=height, width=width, seed=transform.seed
  )
  size = int(np.prod(transform.shape_after(shape)))
  rows = np.empty((len(drawn), size), np.float32)
  for start in range(0, len(drawn), _AT_ONCE):
    pixels = np.repeat(drawn[start : start + _AT_ONCE, ..., None], channels, 3)
    elements = [{"id": "drawn", "image": picture} for picture in pixels]
    for place, element in enumerate(
      stages.map_many(transform.features, elements)
    ):
      rows[start + place] = unit_groups(
        element["image"], num_groups=transform.num_groups
      )
  return fit(rows, damping=transform.damping)
