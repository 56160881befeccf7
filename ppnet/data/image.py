"""Pictures: encoded bytes to normalised float32 [S, S, C].

Two Grain transformations. `Decode` gives values in [0, 1]: min-max scaling by
the range of the pixel type (0..255 or 0..65535), which is public. `ZScore`
then subtracts and divides by constants from the config. Neither looks at any
other record, so neither can leak one record into another.

>>> content = encode_png(np.full((2, 2), 255, np.uint8))
>>> record = {"id": "a", "image": content}
>>> Decode(image_size=3, image_channels=1).map(record)["image"].shape
(3, 3, 1)
"""

import dataclasses
import io
from collections.abc import Mapping
from typing import Any

import grain
import numpy as np
from PIL import Image, ImageOps

from ppnet import config as config_lib
from ppnet.core import checks
from ppnet.data import sources

# Below Pillow's own warning threshold: one picture of this size takes 200 MB.
MAX_PIXELS = 1 << 26
# 16-bit grey, in Pillow's words. "I" is what Pillow before 10 calls it.
_MODES_16_BIT = ("I;16", "I;16B", "I;16L", "I;16N")
# Modes whose range no file format fixes, so min-max has no public range.
_MODES_WITHOUT_RANGE = ("I", "F")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decode(grain.transforms.Map):
  """Encoded picture -> float32 [image_size, image_size, image_channels].

  The picture is turned upright (EXIF), converted to grey (ITU-R BT.601 luma)
  or RGB (an alpha channel is dropped), resized where needed (bilinear with
  antialiasing; the aspect ratio is not kept), and scaled so that the pixel
  type's lowest value is 0 and its highest is 1.

  Attributes:
    image_size: height and width of the result in pixels.
    image_channels: 1 (grey) or 3 (RGB).
  """

  image_size: int
  image_channels: int

  def __post_init__(self):
    checks.positive(image_size=self.image_size)
    if self.image_channels not in (1, 3):
      checks.fail(
        "image_channels to be 1 (grey) or 3 (RGB)",
        image_channels=self.image_channels,
      )

  def map(self, element: Mapping[str, Any]) -> dict[str, Any]:
    """Decodes `element["image"]`.

    Raises:
      sources.BadRecordError: there is no picture, or it is empty, not a
        picture, cut short, too large, or of a type without a public range.
    """
    content = element["image"]
    if not content:
      cause = "has no picture." if content is None else "the picture is empty."
      raise sources.BadRecordError(element["id"], cause)
    try:
      pixels = self._decode(content)
    except Exception as error:
      # Pillow's format readers raise almost anything on damaged bytes:
      # OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
      raise sources.BadRecordError(
        element["id"],
        f"the picture cannot be decoded ({type(error).__name__}: {error}).",
      ) from error
    return {**element, "image": pixels}

  def _decode(self, content: bytes) -> np.ndarray:
    """Returns float32 [S, S, C] in [0, 1]."""
    with Image.open(io.BytesIO(content)) as image:
      if image.width * image.height > MAX_PIXELS:  # Before any decompression.
        raise ValueError(
          f"{image.width} x {image.height} pixels is more than {MAX_PIXELS}"
        )
      if image.mode in _MODES_WITHOUT_RANGE:
        raise ValueError(f"pixel type {image.mode!r} has no public range")
      ImageOps.exif_transpose(image, in_place=True)
      size = (self.image_size, self.image_size)
      if image.mode in _MODES_16_BIT:
        unit = np.asarray(image).astype(np.float32) / 65535
        grey = Image.fromarray(unit)
        if grey.size != size:
          grey = grey.resize(size, Image.Resampling.BILINEAR)
        pixels = np.asarray(grey, np.float32)[:, :, None]
        return np.repeat(pixels, self.image_channels, axis=2)
      flat = image.convert("L" if self.image_channels == 1 else "RGB")
      if flat.size != size:
        flat = flat.resize(size, Image.Resampling.BILINEAR)
      pixels = np.asarray(flat, np.float32) / 255
      return pixels.reshape(*size, self.image_channels)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZScore(grain.transforms.Map):
  """(x - mean) / std with public constants; float32 in, float32 out.

  Attributes:
    mean: subtracted from every pixel, in units of [0, 1].
    std: divided by, in the same units.
  """

  mean: float
  std: float

  def __post_init__(self):
    checks.positive(pixel_std=self.std)

  def map(self, element: Mapping[str, Any]) -> dict[str, Any]:
    """Normalises `element["image"]`."""
    image = (element["image"] - np.float32(self.mean)) / np.float32(self.std)
    return {**element, "image": image}


def transforms(
  config: config_lib.DataConfig,
) -> tuple[grain.transforms.Map, ...]:
  """Returns the transformations from encoded to normalised picture."""
  return (
    Decode(image_size=config.image_size, image_channels=config.image_channels),
    ZScore(mean=config.pixel_mean, std=config.pixel_std),
  )


def encode_png(pixels: np.ndarray) -> bytes:
  """Returns uint8 [height, width] (grey) or [height, width, 3] as PNG."""
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, format="PNG")
  return buffer.getvalue()
