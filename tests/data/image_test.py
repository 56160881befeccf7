"""Tests of ppnet.data.image."""

import io

import numpy as np
import pytest
import sklearn.datasets
from PIL import Image

from ppnet import config as config_lib
from ppnet.data import image, raw_media, sources
from tests.data import conftest

_PIXELS = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)


def _decode(content, *, size=5, channels=3):
  decode = image.Decode(image_size=size, image_channels=channels)
  return decode.map({"id": "r3", "image": content})["image"]


def _encode(pixels, **options) -> bytes:
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, **options)
  return buffer.getvalue()


def test_every_digit_survives_png_exactly():
  levels = sklearn.datasets.load_digits().images
  for digit in levels:
    content = image.encode_png(raw_media.digit_to_pixels(digit))
    decoded = _decode(content, size=8, channels=1)
    assert decoded.shape == (8, 8, 1)
    assert decoded.dtype == np.float32
    np.testing.assert_array_equal(np.round(decoded[:, :, 0] * 16), digit)
    np.testing.assert_allclose(
      decoded[:, :, 0], digit / 16, atol=1 / 510 + 1e-6
    )
  assert levels.max() == 16
  assert raw_media.digit_to_pixels(np.array([0, 16])).tolist() == [0, 255]


def test_rgb_and_grey_match_hand_formula():
  square = _PIXELS[:, :5]
  np.testing.assert_array_equal(
    _decode(conftest.png(square)), square.astype(np.float32) / 255
  )
  luma = square @ np.array([0.299, 0.587, 0.114]) / 255  # ITU-R BT.601.
  # Pillow rounds the luma to a whole grey value.
  np.testing.assert_allclose(
    _decode(conftest.png(square), channels=1)[:, :, 0], luma, atol=0.6 / 255
  )


@pytest.mark.parametrize("channels", [1, 3])
def test_every_pixel_type_has_its_own_public_range(channels):
  ones = np.ones((5, 5))
  whites = [
    _encode(ones.astype(np.uint8) * 255, format="PNG"),
    _encode((ones * 65535).astype(np.uint16), format="PNG"),
    _encode((ones * 65535).astype(np.uint16), format="TIFF"),
    _encode(ones.astype(bool), format="PNG"),
    _encode(np.full((5, 5, 4), 255, np.uint8), format="PNG"),
  ]
  palette = io.BytesIO()
  Image.new("RGB", (5, 5), "white").quantize(2).save(palette, format="GIF")
  for white in [*whites, palette.getvalue()]:
    decoded = _decode(white, channels=channels)
    assert decoded.dtype == np.float32
    np.testing.assert_array_equal(decoded, np.ones((5, 5, channels)))
  half = _encode((ones * 32768).astype(np.uint16), format="PNG")
  np.testing.assert_allclose(
    _decode(half, channels=channels), 32768 / 65535, rtol=1e-6
  )


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_resize_halves_like_triangle_filter(dtype):
  # Bilinear with antialiasing: a triangle two new pixels wide, over pixels
  # 0..2 for new pixel 0: weights 0.75, 0.75, 0.25, cut at the edge.
  row = np.array([10, 20, 40, 80], dtype)
  pixels = np.repeat(row[None], 4, axis=0)
  decoded = _decode(conftest.png(pixels), size=2, channels=1)
  weights = np.array([0.75, 0.75, 0.25])
  expected = [weights @ row[:3], weights @ row[:0:-1]] / weights.sum()
  np.testing.assert_allclose(
    decoded[0, :, 0] * np.iinfo(dtype).max,
    expected,
    atol=1.0 if dtype is np.uint8 else 1e-2,  # Rounded twice to uint8.
  )


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_resized_constant_stays_constant(dtype):
  pixels = np.full((7, 4), np.iinfo(dtype).max // 3, dtype)
  decoded = _decode(conftest.png(pixels), size=6, channels=1)
  np.testing.assert_allclose(decoded, 1 / 3, rtol=1e-5)


def test_exif_orientation_is_undone():
  exif = Image.Exif()
  exif[0x0112] = 3  # Upside down.
  square = _PIXELS[:, :5]
  np.testing.assert_array_equal(
    _decode(conftest.png(square, exif=exif)),
    square[::-1, ::-1].astype(np.float32) / 255,
  )


_GOOD = conftest.png(
  np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
)


@pytest.mark.parametrize(
  ("content", "cause"),
  [
    (None, "no picture"),
    (b"", "empty"),
    (b"just some text", "UnidentifiedImageError"),
    (_GOOD[: len(_GOOD) // 2], "OSError.*truncated"),
    (_GOOD[:30], "cannot be decoded"),
    (_GOOD[:200] + b"\0" * 500 + _GOOD[700:], "cannot be decoded"),
    (_encode(np.ones((5, 5), np.float32), format="TIFF"), "no public range"),
  ],
)
def test_bad_picture_names_record_and_cause(content, cause):
  with pytest.raises(sources.BadRecordError, match=f"'r3'.*{cause}"):
    _decode(content)


def test_decompression_bomb_is_refused_before_decoding(monkeypatch):
  bomb = io.BytesIO()
  Image.new("1", (9000, 9000)).save(bomb, format="PNG")
  assert len(bomb.getvalue()) < 100_000

  def never(*args, **kwargs):
    raise AssertionError("the pixels were decoded")

  monkeypatch.setattr(Image.Image, "convert", never)
  monkeypatch.setattr(Image.Image, "resize", never)
  with pytest.raises(sources.BadRecordError, match="9000 x 9000 pixels"):
    _decode(bomb.getvalue())


def test_transforms_match_hand_normalisation():
  config = config_lib.DataConfig(
    image_size=5, image_channels=3, pixel_mean=0.25, pixel_std=2.0
  )
  element = {"id": "r3", "image": conftest.png(_PIXELS[:, :5]), "label": 4}
  original = dict(element)
  result = element
  for transform in image.transforms(config):
    result = transform.map(result)
  np.testing.assert_allclose(
    result["image"], (_PIXELS[:, :5] / 255 - 0.25) / 2, atol=1e-6
  )
  assert result["image"].dtype == np.float32
  assert result["label"] == 4
  assert element == original  # Arguments are not mutated.


@pytest.mark.parametrize(
  "field", [{"image_size": 0}, {"image_channels": 2}, {"pixel_std": 0.0}]
)
def test_invalid_setting_is_named(field):
  with pytest.raises(ValueError, match=next(iter(field))):
    image.transforms(config_lib.DataConfig(**field))


@pytest.mark.parametrize("as_uint8", [False, True])
@pytest.mark.parametrize("size", [None, 5, 6])
def test_plain_pgm_is_what_pillow_reads(as_uint8, size):
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (5, 5), np.uint8)
  pixels[0, 0] = ord("#")  # Where a comment could begin.
  content = b"P5 5 5 255\n" + pixels.tobytes()
  decode = image.Decode(image_size=size, image_channels=1, as_uint8=as_uint8)
  plain = decode.map({"id": "a", "image": content})["image"]
  other = decode.map({"id": "a", "image": content.replace(b" ", b"\n", 1)})
  np.testing.assert_array_equal(plain, other["image"])
  assert plain.dtype == other["image"].dtype
  for cut in (content[:-1], content[:8], b"P5 0 5 255\n"):
    with pytest.raises(sources.BadRecordError):
      decode.map({"id": "a", "image": cut})
