"""Pictures: encoded bytes to normalised float32 [H, W, C].

Grain transformations, composed as a list. `Decode` gives the pixels, as bytes
or as values in [0, 1]; `MinMax` scales by the range of the pixel type (0..255
or 0..65535), which is public; `ZScore` subtracts and divides by constants from
the config. None looks at any other record, so none can leak one record into
another. What draws random numbers is in `augment_image`.

>>> content = encode_png(np.full((2, 2), 255, np.uint8))
>>> record = {"id": "a", "image": content}
>>> Decode(image_size=3, image_channels=1).map(record)["image"].shape
(3, 3, 1)
"""

import dataclasses
import io
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import grain
import numpy as np
from PIL import Image, ImageOps

from ppnet import config as config_lib
from ppnet.core import checks
from ppnet.data import sources

# Below Pillow's own warning threshold: one picture of this size takes 200 MB.
MAX_PIXELS = 1 << 26
# What Pillow may try. Others (EPS, for one) start programs or need plugins.
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "PPM", "TIFF", "WEBP")
# 16-bit grey, in Pillow's words. "I" is what Pillow before 10 calls it.
_MODES_16_BIT = ("I;16", "I;16B", "I;16L", "I;16N")
# Width and height of an 8-bit grey picture whose pixels follow.
_PLAIN_PGM = re.compile(rb"P5 ([1-9]\d{0,4}) ([1-9]\d{0,4}) 255\n")
_MIN_MAX = "min–max to [0, 1]"
# Modes whose range no file format fixes, so min-max has no public range.
_MODES_WITHOUT_RANGE = ("I", "F")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decode(grain.transforms.Map):
  """Encoded picture -> float32 or uint8 [H, W, image_channels].

  The picture is turned upright (EXIF), converted to grey (ITU-R BT.601 luma)
  or RGB, and resized where a size is asked for (bilinear with antialiasing; the
  aspect ratio is not kept, see `Resize` for that).

  | picture | result |
  | --- | --- |
  | 8 bits per channel | level / 255 |
  | 16-bit grey | level / 65535; as bytes, the nearest of 256 levels |
  | 16-bit colour | its upper 8 bits |
  | one bit | 0 or 1 |
  | palette | its colours |
  | alpha channel | dropped: the colours as stored, also where transparent |
  | CMYK | converted without a colour profile |
  | several frames or pages | the first one |
  | 32-bit or floating-point grey | `BadRecordError`: no public range |
  | over `MAX_PIXELS`, or not one of `FORMATS` | `BadRecordError` |

  Attributes:
    image_size: height and width of the result in pixels; None keeps those of
      the picture, which then differ between records.
    image_channels: 1 (grey) or 3 (RGB).
    as_uint8: give bytes, 0 to 255, for `MinMax` to scale later. They take a
      quarter of the memory of floats. Otherwise float32, the pixel type's
      lowest value being 0 and its highest 1.
  """

  image_size: int | None
  image_channels: int
  as_uint8: bool = False

  kind: ClassVar[str] = "decode"

  def __post_init__(self):
    if self.image_size is not None:
      checks.positive(image_size=self.image_size)
    if self.image_channels not in (1, 3):
      checks.fail(
        "image_channels to be 1 (grey) or 3 (RGB)",
        image_channels=self.image_channels,
      )

  @property
  def label(self) -> str:
    """Words for a table."""
    size = f"{self.image_size} × {self.image_size} " if self.image_size else ""
    colour = "grey" if self.image_channels == 1 else "RGB"
    return f"{size}{colour}"

  @property
  def normalisation_label(self) -> str:
    """Words for what it does beside decoding."""
    return "" if self.as_uint8 else _MIN_MAX

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
    """Returns [H, W, C], uint8 or float32 in [0, 1]."""
    pixels = self._plain(content)
    if pixels is not None:
      return pixels if self.as_uint8 else pixels / np.float32(255)
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
      if image.width * image.height > MAX_PIXELS:  # Before any decompression.
        raise ValueError(
          f"{image.width} x {image.height} pixels is more than {MAX_PIXELS}"
        )
      if image.mode in _MODES_WITHOUT_RANGE:
        raise ValueError(f"pixel type {image.mode!r} has no public range")
      ImageOps.exif_transpose(image, in_place=True)
      if image.mode in _MODES_16_BIT:
        unit = np.asarray(image).astype(np.float32) / 65535
        pixels = _resized(Image.fromarray(unit), self.image_size)[:, :, None]
        if self.as_uint8:
          pixels = np.rint(pixels * 255).astype(np.uint8)
        return np.repeat(pixels, self.image_channels, axis=2)
      if "transparency" in image.info and image.mode == "P":
        image = image.convert("RGBA")  # Straight to RGB Pillow would warn.
      flat = image.convert("L" if self.image_channels == 1 else "RGB")
      pixels = _resized(flat, self.image_size)
      if pixels.ndim == 2:
        pixels = pixels[:, :, None]
      return pixels if self.as_uint8 else pixels / np.float32(255)

  def _plain(self, content: bytes) -> np.ndarray | None:
    """Bytes that are already what is asked for, as PREPARE writes small ones.

    A binary PGM without comments; Pillow would take ten times as long.
    """
    found = _PLAIN_PGM.match(content) if self.image_channels == 1 else None
    if found is None:
      return None
    width, height = int(found[1]), int(found[2])
    if len(content) != found.end() + width * height or (
      self.image_size is not None
      and (height, width) != (self.image_size, self.image_size)
    ):
      return None
    pixels = np.frombuffer(content, np.uint8, offset=found.end())
    return pixels.reshape(height, width, 1)


def _resized(image: Image.Image, size: int | None) -> np.ndarray:
  """Returns the pixels of a picture, brought to size x size if need be."""
  if size is not None and image.size != (size, size):
    image = image.resize((size, size), Image.Resampling.BILINEAR)
  return np.asarray(image)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resize(grain.transforms.Map):
  """Pixels [H, W, C] -> the same picture, its shorter side `shorter_side`.

  The aspect ratio is kept (the longer side is rounded to a whole pixel).
  Bilinear with antialiasing (Pillow). uint8 stays uint8, rounded; floats stay
  float32.

  Attributes:
    shorter_side: in pixels, of the result.
  """

  shorter_side: int

  kind: ClassVar[str] = "decode"

  def __post_init__(self):
    checks.positive(shorter_side=self.shorter_side)

  @property
  def label(self) -> str:
    """Words for a table."""
    return f"shorter side to {self.shorter_side}"

  def map(self, element: Mapping[str, Any]) -> dict[str, Any]:
    """Resizes `element["image"]`.

    Raises:
      sources.BadRecordError: the longer side would be so long that the picture
        has more than `MAX_PIXELS`.
    """
    height, width = element["image"].shape[:2]
    scale = self.shorter_side / min(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    if size == (width, height):
      return dict(element)
    if size[0] * size[1] > MAX_PIXELS:
      raise sources.BadRecordError(
        element["id"], f"resized it would have {size[0]} x {size[1]} pixels."
      )
    resized = per_channel(
      element["image"],
      lambda image: image.resize(size, Image.Resampling.BILINEAR),
    )
    return {**element, "image": resized}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CenterCrop(grain.transforms.Map):
  """Pixels [H, W, C] -> the middle [size, size, C].

  Where the border is odd, the pixel too many is left at the right and the
  bottom.

  Attributes:
    size: height and width of the result in pixels.
  """

  size: int

  kind: ClassVar[str] = "decode"

  def __post_init__(self):
    checks.positive(size=self.size)

  @property
  def label(self) -> str:
    """Words for a table."""
    return f"centre {self.size} × {self.size}"

  def map(self, element: Mapping[str, Any]) -> dict[str, Any]:
    """Crops `element["image"]`.

    Raises:
      sources.BadRecordError: the picture is smaller than the crop.
    """
    height, width = check_holds(element, size=self.size)
    top, left = (height - self.size) // 2, (width - self.size) // 2
    return {**element, "image": crop(element["image"], top, left, self.size)}


def crop(pixels: np.ndarray, top: int, left: int, size: int) -> np.ndarray:
  """Returns a copy of a square: a view would keep the whole picture alive."""
  return pixels[top : top + size, left : left + size].copy()


def check_holds(element: Mapping[str, Any], *, size: int) -> tuple[int, int]:
  """Returns height and width of the element's picture, both at least `size`.

  Raises:
    sources.BadRecordError: the picture is smaller.
  """
  height, width = element["image"].shape[:2]
  if min(height, width) < size:
    raise sources.BadRecordError(
      element["id"],
      f"its {height} x {width} pixels do not hold a crop of {size} x {size}.",
    )
  return height, width


def per_channel(pixels: np.ndarray, function) -> np.ndarray:
  """Applies a function of Pillow images to pixels [H, W, C].

  Args:
    pixels: uint8, one or three channels; or float32, any number of channels,
      which Pillow takes one by one.
    function: image -> image; the same for every channel.

  Returns:
    [H', W', C] of the same type.
  """
  if pixels.shape[2] == 1:
    return np.asarray(function(Image.fromarray(pixels[:, :, 0])))[:, :, None]
  if pixels.dtype == np.uint8 and pixels.shape[2] == 3:
    return np.asarray(function(Image.fromarray(pixels)))
  channels = [
    np.asarray(function(Image.fromarray(np.ascontiguousarray(channel))))
    for channel in np.moveaxis(pixels, 2, 0)
  ]
  return np.stack(channels, axis=2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MinMax(grain.transforms.Map):
  """uint8 or uint16 pixels -> float32 in [0, 1] by the type's public range.

  Acts on each number alone: a whole batch [..., H, W, C] may be given.
  """

  kind: ClassVar[str] = "normalisation"
  elementwise: ClassVar[bool] = True

  @property
  def label(self) -> str:
    """Words for a table."""
    return _MIN_MAX

  def map(self, element: Mapping[str, Any]) -> dict[str, Any]:
    """Scales `element["image"]`.

    Raises:
      ValueError: the pixels are not unsigned integers, so there is no range.
    """
    pixels = element["image"]
    if pixels.dtype not in (np.uint8, np.uint16):
      checks.fail(
        "uint8 or uint16 pixels for MinMax",
        "Use Decode(as_uint8=True) and nothing that makes floats before it.",
        dtype=str(pixels.dtype),
      )
    scale = np.float32(np.iinfo(pixels.dtype).max)
    return {**element, "image": pixels / scale}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZScore(grain.transforms.Map):
  """(x - mean) / std with public constants; float32 in, float32 out.

  Acts on each number alone: a whole batch [..., H, W, C] may be given.

  Attributes:
    mean: subtracted from every pixel, in units of [0, 1]; one number, or one
      for each channel.
    std: divided by, in the same units.
  """

  mean: float | tuple[float, ...]
  std: float | tuple[float, ...]

  kind: ClassVar[str] = "normalisation"
  elementwise: ClassVar[bool] = True

  def __post_init__(self):
    for std in np.atleast_1d(self.std).tolist():
      checks.positive(pixel_std=std)

  @property
  def label(self) -> str:
    """Words for a table."""
    return f"z-score, public mean {_words(self.mean)}, std {_words(self.std)}"

  def map(self, element: Mapping[str, Any]) -> dict[str, Any]:
    """Normalises `element["image"]`.

    Raises:
      ValueError: the pixels are integers, whose unit is not that of `mean`.
    """
    pixels = element["image"]
    if pixels.dtype.kind != "f":
      checks.fail(
        "pixels in [0, 1] for ZScore",
        "Put MinMax before it.",
        dtype=str(pixels.dtype),
      )
    centred = pixels - np.asarray(self.mean, np.float32)
    return {**element, "image": centred / np.asarray(self.std, np.float32)}


def _words(value: float | tuple[float, ...]) -> str:
  """One number, or several, for a table."""
  if isinstance(value, tuple):
    return f"({', '.join(f'{number:g}' for number in value)})"
  return f"{value:g}"


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
