"""Fixed scattering features of pictures: wavelets, no weights, no data.

A picture is convolved with Morlet wavelets at a few scales and angles, the
modulus is taken, this is done once more, and everything is averaged by a
Gaussian over 2 ** num_scales pixels (Bruna and Mallat 2013, "Invariant
scattering convolution networks", https://arxiv.org/abs/1203.1513, equations 5
to 9). The filters are fixed in advance, so the features depend on no record but
their own, and no privacy budget is spent on them. A linear model on such
features is a strong baseline under differential privacy (Tramèr and Boneh 2021,
"Differentially private learning needs better features (or much more data)",
https://arxiv.org/abs/2011.11660, section 3; two scales, eight angles).

Constants, and what is kept of each filter at half resolution, are those of
Oyallon et al. 2018, "Scattering networks for hybrid representation learning",
https://arxiv.org/abs/1809.06367, as in the library Kymatio, whose
`Scattering2D(J=num_scales, L=num_angles, max_order=2)` gives the same numbers.

>>> Filters(height=28, width=28, num_scales=2, num_angles=8).num_maps
81
>>> features(np.zeros((3, 28, 28), np.float32)).shape
(3, 81, 7, 7)
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import grain
import numpy as np
import scipy.fft

from ppnet.core import checks
from ppnet.data import sources

_WIDTH = 0.8  # Standard deviation of the Gaussian at scale 0, in pixels.
_WAVE_NUMBER = 0.75 * np.pi  # Of the wavelet at scale 0, radians per pixel.
_CHUNK = 8  # Pictures at a time: their spectra stay in the cache.


def _gabor(
  shape: tuple[int, int],
  *,
  width: float,
  angle: float,
  wave_number: float,
  slant: float,
) -> np.ndarray:
  """A Gaussian times a plane wave, wrapped around: complex128 [H, W].

  The Gaussian has deviation `width` along the wave and `width / slant` across,
  and the integral of the Gaussian is 1.
  """
  total = np.zeros(shape, np.complex128)
  for wrap_y in range(-2, 3):
    for wrap_x in range(-2, 3):
      y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float64)
      y += wrap_y * shape[0]
      x += wrap_x * shape[1]
      along = y * np.cos(angle) + x * np.sin(angle)
      across = x * np.cos(angle) - y * np.sin(angle)
      exponent = -(along**2 + (slant * across) ** 2) / (2 * width**2)
      total += np.exp(exponent + 1j * wave_number * along)
  return total * slant / (2 * np.pi * width**2)


def _morlet(shape: tuple[int, int], *, scale: int, angle: float, slant: float):
  """Fourier transform of a Morlet wavelet, which is real: float64 [H, W].

  A Gabor function minus as much of its Gaussian as makes its mean 0.
  """
  settings = {"width": _WIDTH * 2**scale, "angle": angle, "slant": slant}
  wave = _gabor(shape, wave_number=_WAVE_NUMBER / 2**scale, **settings)
  gaussian = _gabor(shape, wave_number=0.0, **settings)
  wavelet = wave - wave.sum() / gaussian.sum() * gaussian
  return scipy.fft.fft2(wavelet).real


def _fold(spectrum: np.ndarray, factor: int) -> np.ndarray:
  """Spectrum [..., H, W] of the picture of which every `factor`-th is kept."""
  *batch, height, width = spectrum.shape
  parts = spectrum.reshape(
    *batch, factor, height // factor, factor, width // factor
  )
  return parts.mean(axis=(-4, -2))


def _kept(size: int, factor: int) -> np.ndarray:
  """Indices of the lowest size / factor frequencies, in the order of an FFT."""
  small = size // factor
  low = (small + 1) // 2
  return np.concatenate([np.arange(low), np.arange(size - small + low, size)])


def _averaging(size: int, *, width: float, factor: int, level: int):
  """The Gaussian average, then every 2 ** num_scales-th pixel, as a matrix.

  Args:
    size: pixels of the padded picture.
    width: deviation of the Gaussian, in those pixels.
    factor: 2 ** num_scales.
    level: log2 of the factor by which the input is already coarser.

  Returns:
    float32 [size // factor - 2, size >> level]: without the border, since the
    picture was padded by one coarse pixel or more on every side.
  """
  pixels = np.arange(size) + size * np.arange(-2, 3)[:, None]
  gaussian = np.exp(-(pixels**2) / (2 * width**2)).sum(axis=0)
  gaussian /= np.sqrt(2 * np.pi) * width
  response = scipy.fft.fft(gaussian).real[_kept(size, 1 << level)]
  kernel = scipy.fft.ifft(response)
  number = len(response)
  place = np.arange(0, number, factor >> level)[:, None] - np.arange(number)
  return kernel.real[place % number][1:-1].astype(np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Filters:
  """The filters for pictures of one size.

  Attributes:
    height: of the pictures, in pixels.
    width: of the pictures.
    num_scales: J; the averages are over 2 ** J pixels.
    num_angles: L, over half a turn.
  """

  height: int
  width: int
  num_scales: int
  num_angles: int

  def __post_init__(self):
    checks.positive(num_scales=self.num_scales, num_angles=self.num_angles)
    smallest = 2**self.num_scales
    if min(self.height, self.width) < smallest:
      checks.fail(
        f"pictures of at least {smallest} x {smallest} pixels",
        "Lower num_scales.",
        height=self.height,
        width=self.width,
      )

  @property
  def num_maps(self) -> int:
    """K = 1 + L J + L² J (J - 1) / 2."""
    first = self.num_angles * self.num_scales
    pairs = self.num_scales * (self.num_scales - 1) // 2
    return 1 + first + self.num_angles**2 * pairs

  @property
  def padded(self) -> tuple[int, int]:
    """Height and width after padding; see `padding`."""
    coarse = 2**self.num_scales
    return (
      ((self.height + coarse) // coarse + 1) * coarse,
      ((self.width + coarse) // coarse + 1) * coarse,
    )

  @property
  def map_shape(self) -> tuple[int, int]:
    """Height and width of every map."""
    coarse = 2**self.num_scales
    return self.padded[0] // coarse - 2, self.padded[1] // coarse - 2

  @property
  def padding(self) -> tuple[tuple[int, int], tuple[int, int]]:
    """Pixels before and after, for rows and for columns."""
    before = [
      (padded - size) // 2
      for padded, size in zip(
        self.padded, (self.height, self.width), strict=True
      )
    ]
    return (
      (before[0], self.padded[0] - self.height - before[0]),
      (before[1], self.padded[1] - self.width - before[1]),
    )

  @functools.cached_property
  def wavelets(self) -> list[list[np.ndarray]]:
    """[level][scale]: float32 [L, H >> level, W >> level], for scale >= level.

    At a coarser level the frequencies that it cannot hold are left out.
    """
    slant = 4 / self.num_angles
    first = int(self.num_angles / 2 - 1)
    full = [
      np.stack(
        [
          _morlet(
            self.padded,
            scale=scale,
            angle=(first - i) * np.pi / self.num_angles,
            slant=slant,
          )
          for i in range(self.num_angles)
        ]
      )
      for scale in range(self.num_scales)
    ]
    levels = []
    for level in range(self.num_scales):
      rows, columns = (_kept(size, 1 << level) for size in self.padded)
      levels.append(
        [bank[:, rows[:, None], columns].astype(np.float32) for bank in full]
      )
    return levels

  @functools.cached_property
  def averages(self) -> list[tuple[np.ndarray, np.ndarray]]:
    """[level]: the matrices that average rows and columns; see `_averaging`."""
    return [
      tuple(
        _averaging(
          size,
          width=_WIDTH * 2 ** (self.num_scales - 1),
          factor=2**self.num_scales,
          level=level,
        )
        for size in self.padded
      )
      for level in range(self.num_scales)
    ]


@functools.lru_cache(maxsize=8)
def _filters(
  height: int, width: int, num_scales: int, num_angles: int
) -> Filters:
  """The filters, made once for each size."""
  return Filters(
    height=height, width=width, num_scales=num_scales, num_angles=num_angles
  )


def features(
  images: np.ndarray, *, num_scales: int = 2, num_angles: int = 8
) -> np.ndarray:
  """Computes scattering coefficients of orders 0, 1 and 2.

  Args:
    images: float [B, H, W], grey.
    num_scales: J; every map has about H / 2 ** J by W / 2 ** J places.
    num_angles: L.

  Returns:
    float32 [B, K, H', W'] with K = 1 + L J + L² J (J - 1) / 2: the average,
    then order 1 by scale and angle, then order 2 by first scale, first angle,
    second scale (coarser than the first) and second angle. For 28 x 28 pixels,
    J = 2 and L = 8 it is [B, 81, 7, 7].

  Raises:
    ValueError: `images` has another rank, holds integers, or is smaller than
      2 ** J.

  | picture | result |
  | --- | --- |
  | constant c | order 0 is c, the rest 0 (up to rounding) |
  | NaN anywhere | NaN in its own features alone; `Scattering` refuses it |
  | B = 0 | [0, K, H', W'] |
  """
  if images.ndim != 3 or images.dtype.kind != "f":
    checks.fail(
      "images float [B, H, W]",
      "Scale integer pixels first (image.MinMax).",
      shape=images.shape,
      dtype=str(images.dtype),
    )
  filters = _filters(*images.shape[1:], num_scales, num_angles)
  out = np.empty(
    (len(images), filters.num_maps, *filters.map_shape), np.float32
  )
  for start in range(0, len(images), _CHUNK):
    part = slice(start, start + _CHUNK)
    out[part] = _scatter(images[part].astype(np.float32), filters)
  return out


def _average(values: np.ndarray, filters: Filters, level: int) -> np.ndarray:
  """[..., H >> level, W >> level] -> [..., H', W']."""
  rows, columns = filters.averages[level]
  return rows @ (values @ columns.T)


def _scatter(images: np.ndarray, filters: Filters) -> np.ndarray:
  """float32 [B, H, W] -> float32 [B, K, H', W']."""
  mode = "reflect"
  border = max(max(pair) for pair in filters.padding)
  if border >= min(filters.height, filters.width):
    mode = "symmetric"  # A reflection needs one pixel more than it pads.
  padded = np.pad(images, ((0, 0), *filters.padding), mode=mode)
  spectrum = scipy.fft.fft2(padded)[:, None]  # complex64 [B, 1, H, W]
  first, second = [], []
  for scale in range(filters.num_scales):
    filtered = _fold(spectrum * filters.wavelets[0][scale], 1 << scale)
    envelope = np.abs(scipy.fft.ifft2(filtered))  # [B, L, H, W] >> scale
    first.append(_average(envelope, filters, scale))
    if scale + 1 == filters.num_scales:
      break
    envelope_spectrum = scipy.fft.fft2(envelope)[:, :, None]
    coarser = [
      _average(
        np.abs(
          scipy.fft.ifft2(
            _fold(
              envelope_spectrum * filters.wavelets[scale][other],
              1 << (other - scale),
            )
          )
        ),
        filters,
        other,
      )
      for other in range(scale + 1, filters.num_scales)
    ]
    stacked = np.stack(coarser, axis=2)  # [B, L, scales, L, H', W']
    second.append(stacked.reshape(len(images), -1, *filters.map_shape))
  zeroth = _average(padded, filters, 0)[:, None]
  return np.concatenate([zeroth, *first, *second], axis=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scattering(grain.transforms.Map):
  """Pixels float [H, W, C] -> float32 [H', W', C * K] scattering features.

  The K maps of the first channel come first. See `features`.

  Attributes:
    num_scales: J.
    num_angles: L.
  """

  num_scales: int = 2
  num_angles: int = 8

  kind: ClassVar[str] = "feature extraction"

  def __post_init__(self):
    checks.positive(num_scales=self.num_scales, num_angles=self.num_angles)

  @property
  def label(self) -> str:
    """Words for a table."""
    return f"scattering, {self.num_scales} scales, {self.num_angles} angles"

  def shape_after(self, shape: tuple[int, ...]) -> tuple[int, ...]:
    """[H, W, C] of the pixels -> [H', W', C * K]."""
    filters = _filters(shape[0], shape[1], self.num_scales, self.num_angles)
    return (*filters.map_shape, shape[2] * filters.num_maps)

  def map(self, element: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces the pixels `element["image"]`; see `map_many`."""
    return self.map_many([element])[0]

  def map_many(
    self, elements: Sequence[Mapping[str, Any]]
  ) -> list[dict[str, Any]]:
    """Replaces the pixels of several elements, side by side.

    Raises:
      sources.BadRecordError: a picture is smaller than 2 ** num_scales pixels
        or a pixel is not finite.
      ValueError: the pixels are integers.
    """
    smallest = 2**self.num_scales
    for element in elements:
      pixels = element["image"]
      if min(pixels.shape[:2]) < smallest:
        raise sources.BadRecordError(
          element["id"],
          f"its {pixels.shape[0]} x {pixels.shape[1]} pixels are fewer than"
          f" {smallest} x {smallest}.",
        )
      if not np.isfinite(pixels).all():
        raise sources.BadRecordError(element["id"], "a pixel is not finite.")
    shapes = {element["image"].shape for element in elements}
    if len(shapes) > 1:
      return [self.map(element) for element in elements]
    pixels = np.stack([element["image"] for element in elements])
    maps = features(
      np.moveaxis(pixels, 3, 1).reshape(-1, *pixels.shape[1:3]),
      num_scales=self.num_scales,
      num_angles=self.num_angles,
    )  # [B * C, K, H', W']
    merged = maps.reshape(len(elements), -1, *maps.shape[2:])
    return [
      {**element, "image": np.ascontiguousarray(one.transpose(1, 2, 0))}
      for element, one in zip(elements, merged, strict=True)
    ]
