"""Pictures, changed at random: rotation, flip, crop and colour.

Each is a Grain random transformation of pixels [H, W, C], uint8 or float32 in
[0, 1], and gives the same type back. So they stand after `image.Decode` and
before `image.ZScore`. They work on bytes at half the cost or less, where
`image.MinMax` follows later.

Everything random comes from the generator that is given; see
`randomness.generator`.

>>> pixels = np.zeros((4, 5, 1), np.uint8)
>>> rng = np.random.default_rng(0)
>>> Flip().random_map({"id": "a", "image": pixels}, rng)["image"].shape
(4, 5, 1)
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import grain
import numpy as np
from PIL import Image, ImageEnhance

from ppnet.core import checks
from ppnet.data import image as image_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotate(grain.transforms.RandomMap):
  """Turns the picture about its centre, by a uniform angle.

  Bilinear (Pillow); the size stays, corners that come from outside are black
  (0), and what leaves the frame is lost.

  Attributes:
    max_degrees: the angle is uniform in [-max_degrees, max_degrees], positive
      is counterclockwise; at most 180.
  """

  max_degrees: float

  kind: ClassVar[str] = "augmentation"

  def __post_init__(self):
    checks.non_negative(max_degrees=self.max_degrees)
    checks.at_most(180, max_degrees=self.max_degrees)

  @property
  def label(self) -> str:
    """Words for a table."""
    return f"rotation up to ±{self.max_degrees:g}°"

  def random_map(
    self, element: Mapping[str, Any], rng: np.random.Generator
  ) -> dict[str, Any]:
    """Turns `element["image"]`."""
    degrees = self.max_degrees * (2 * rng.random() - 1)
    turned = image_lib.per_channel(
      element["image"],
      lambda image: image.rotate(degrees, Image.Resampling.BILINEAR),
    )
    return {**element, "image": turned}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flip(grain.transforms.RandomMap):
  """Mirrors the picture.

  Attributes:
    horizontal_prob: probability that left and right change places.
    vertical_prob: probability that top and bottom do, independently.
  """

  horizontal_prob: float = 0.5
  vertical_prob: float = 0.0

  kind: ClassVar[str] = "augmentation"

  def __post_init__(self):
    for name in ("horizontal_prob", "vertical_prob"):
      value = getattr(self, name)
      if not 0 <= value <= 1:
        checks.fail(f"0 <= {name} <= 1", **{name: value})

  @property
  def label(self) -> str:
    """Words for a table."""
    ways = [
      f"{way} flip ({prob:g})"
      for way, prob in [
        ("horizontal", self.horizontal_prob),
        ("vertical", self.vertical_prob),
      ]
      if prob
    ]
    return ", ".join(ways) or "no flip"

  def random_map(
    self, element: Mapping[str, Any], rng: np.random.Generator
  ) -> dict[str, Any]:
    """Mirrors `element["image"]`, or not."""
    pixels = element["image"]
    # Both are always drawn, so that one setting does not move the other.
    horizontal, vertical = rng.random(), rng.random()
    if horizontal < self.horizontal_prob:
      pixels = pixels[:, ::-1]
    if vertical < self.vertical_prob:
      pixels = pixels[::-1]
    return {**element, "image": np.ascontiguousarray(pixels)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomCrop(grain.transforms.RandomMap):
  """Cuts out a square at a uniform place.

  Evaluation leaves out what is random. Put `image.CenterCrop` of the same size
  after it: there it does the work, and in training nothing.

  Attributes:
    size: height and width of the result in pixels.
    padding: rows and columns of black (0) put on every side before.
  """

  size: int
  padding: int = 0

  kind: ClassVar[str] = "augmentation"

  def __post_init__(self):
    checks.positive(size=self.size)
    checks.non_negative(padding=self.padding)

  @property
  def label(self) -> str:
    """Words for a table."""
    padding = f" of the picture padded by {self.padding}" * (self.padding > 0)
    return f"random crop {self.size} × {self.size}{padding}"

  def random_map(
    self, element: Mapping[str, Any], rng: np.random.Generator
  ) -> dict[str, Any]:
    """Crops `element["image"]`.

    Raises:
      sources.BadRecordError: the padded picture is smaller than the crop.
    """
    border = (self.padding, self.padding)
    pixels = np.pad(element["image"], (border, border, (0, 0)))
    padded = {**element, "image": pixels}
    height, width = image_lib.check_holds(padded, size=self.size)
    top = int(rng.integers(height - self.size + 1))
    left = int(rng.integers(width - self.size + 1))
    return {**element, "image": image_lib.crop(pixels, top, left, self.size)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ColorJitter(grain.transforms.RandomMap):
  """Changes brightness, contrast, saturation and hue, in this order.

  Each of the first three is a factor, uniform in [1 - x, 1 + x]: the picture is
  mixed with black, with its mean grey, or with its own grey version (Pillow's
  `ImageEnhance`), and cut to the range. The hue is shifted on its circle.
  Colours are rounded to 8 bits after each change, also where they are floats.
  Grey pictures have neither saturation nor hue.

  Attributes:
    brightness: x of the brightness, from 0 to 1; 0 leaves it.
    contrast: x of the contrast.
    saturation: x of the saturation.
    hue: largest shift, as a share of the circle, from 0 to 0.5.
  """

  brightness: float = 0.0
  contrast: float = 0.0
  saturation: float = 0.0
  hue: float = 0.0

  kind: ClassVar[str] = "augmentation"

  def __post_init__(self):
    for name, top in [
      ("brightness", 1),
      ("contrast", 1),
      ("saturation", 1),
      ("hue", 0.5),
    ]:
      value = getattr(self, name)
      checks.non_negative(**{name: value})
      checks.at_most(top, **{name: value})

  @property
  def label(self) -> str:
    """Words for a table."""
    parts = [
      f"{name} ±{getattr(self, name):g}"
      for name in ("brightness", "contrast", "saturation", "hue")
      if getattr(self, name)
    ]
    return ", ".join(parts) or "no change of colour"

  def random_map(
    self, element: Mapping[str, Any], rng: np.random.Generator
  ) -> dict[str, Any]:
    """Changes the colours of `element["image"]`.

    Raises:
      ValueError: floats outside [0, 1].
    """
    # All four are always drawn, so that one setting does not move another.
    draws = 2 * rng.random(4) - 1
    pixels = element["image"]
    if pixels.dtype == np.uint8:
      return {**element, "image": self._jitter(pixels, draws)}
    if pixels.size and not (pixels.min() >= 0 and pixels.max() <= 1):
      checks.fail(
        "pixels in [0, 1] for ColorJitter",
        "Put it before ZScore.",
        lowest=float(pixels.min()),
        highest=float(pixels.max()),
      )
    levels = np.rint(pixels * np.float32(255)).astype(np.uint8)
    changed = self._jitter(levels, draws) / np.float32(255)
    return {**element, "image": changed}

  def _jitter(self, pixels: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Changes uint8 [H, W, C]; `draws` f64[4] in [-1, 1)."""
    is_grey = pixels.shape[2] == 1
    image = Image.fromarray(pixels[:, :, 0] if is_grey else pixels)
    if self.brightness:
      factor = 1 + self.brightness * draws[0]
      image = ImageEnhance.Brightness(image).enhance(factor)
    if self.contrast:
      factor = 1 + self.contrast * draws[1]
      image = ImageEnhance.Contrast(image).enhance(factor)
    if self.saturation and not is_grey:
      factor = 1 + self.saturation * draws[2]
      image = ImageEnhance.Color(image).enhance(factor)
    if self.hue and not is_grey:
      hue, saturation, value = image.convert("HSV").split()
      shift = round(256 * self.hue * draws[3])
      turned = hue.point([(level + shift) % 256 for level in range(256)])
      hsv = Image.merge("HSV", (turned, saturation, value))
      image = hsv.convert("RGB")
    changed = np.asarray(image)
    return changed[:, :, None] if is_grey else changed
