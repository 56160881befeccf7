"""Tests of ppnet.data.augment_image and of crops and sizes in data.image."""

import dataclasses
import io

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

from ppnet.data import augment_image, image, sources

_PIXELS = np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)


def _apply(transform, pixels, *, seed=0):
  element = {"id": "r6", "image": pixels}
  if hasattr(transform, "random_map"):
    rng = np.random.default_rng(seed)
    return transform.random_map(element, rng)["image"]
  return transform.map(element)["image"]


class _Draws:
  """Stands in for a generator: gives these numbers, one call each."""

  def __init__(self, *values):
    self._values = list(values)

  def random(self, size=None):
    return np.array(self._values) if size else self._values.pop(0)


def _with_draws(transform, pixels, *draws):
  element = {"id": "r6", "image": pixels}
  return transform.random_map(element, _Draws(*draws))["image"]


# Rotation.


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_quarter_turn_is_exact_and_counterclockwise(dtype, channels):
  pixels = _PIXELS[:, :9, :channels].astype(dtype)
  turned = _with_draws(augment_image.Rotate(max_degrees=90), pixels, 1.0)
  assert turned.dtype == dtype
  np.testing.assert_allclose(turned, np.rot90(pixels), atol=1e-3)


def test_rotation_moves_a_point_about_the_centre():
  y, x = np.mgrid[:41, :41]
  for degrees in (-33.0, 10.0, 57.0):
    spot = np.exp(-((x - 32) ** 2 + (y - 20) ** 2) / 8).astype(np.float32)
    transform = augment_image.Rotate(max_degrees=60)
    turned = _with_draws(transform, spot[:, :, None], (degrees / 60 + 1) / 2)
    weights = turned[:, :, 0] / turned.sum()
    across, up = (weights * x).sum() - 20, 20 - (weights * y).sum()
    assert np.degrees(np.arctan2(up, across)) == pytest.approx(degrees, abs=0.5)
    assert np.hypot(across, up) == pytest.approx(12, abs=0.1)


def test_rotated_ramp_is_the_ramp_at_the_other_angle():
  y, x = np.mgrid[:41, :41] - 20.0
  ramp = (x / 60 + 0.5).astype(np.float32)[:, :, None]
  transform = augment_image.Rotate(max_degrees=60)
  turned = _with_draws(transform, ramp, (17 / 60 + 1) / 2)[:, :, 0]
  angle = np.radians(17)
  expected = (x * np.cos(angle) - y * np.sin(angle)) / 60 + 0.5
  inside = np.hypot(x, y) < 19
  # Bilinear is exact on a ramp; the nearest pixel would be off by 0.5 / 60.
  np.testing.assert_allclose(turned[inside], expected[inside], atol=1e-4)


def test_angles_are_uniform_within_the_range():
  y, x = np.mgrid[:41, :41]
  spot = np.exp(-((x - 34) ** 2 + (y - 20) ** 2) / 8).astype(np.float32)
  angles = []
  for seed in range(150):
    turned = _apply(
      augment_image.Rotate(max_degrees=20), spot[:, :, None], seed=seed
    )
    weights = turned[:, :, 0] / turned.sum()
    across, up = (weights * x).sum() - 20, 20 - (weights * y).sum()
    angles.append(np.degrees(np.arctan2(up, across)))
  angles = np.sort(angles)
  assert np.abs(angles).max() < 20.5
  uniform = -20 + 40 * (np.arange(150) + 0.5) / 150
  assert np.abs(angles - uniform).max() < 40 * 1.95 / np.sqrt(150)


def test_bytes_and_floats_turn_alike():
  transform = augment_image.Rotate(max_degrees=30)
  for seed in range(5):
    from_bytes = _apply(transform, _PIXELS, seed=seed)
    floats = _apply(transform, _PIXELS / np.float32(255), seed=seed)
    np.testing.assert_allclose(from_bytes / 255, floats, atol=1.01 / 255)


# Flip and crop.


def test_flip_mirrors_as_often_as_asked():
  for prob in (0.0, 0.3, 1.0):
    transform = augment_image.Flip(horizontal_prob=prob)
    flipped = [
      np.array_equal(_apply(transform, _PIXELS, seed=i), _PIXELS[:, ::-1])
      for i in range(400)
    ]
    assert abs(np.mean(flipped) - prob) <= 4 * np.sqrt(prob * (1 - prob) / 400)
  both = augment_image.Flip(horizontal_prob=1, vertical_prob=1)
  np.testing.assert_array_equal(_apply(both, _PIXELS), _PIXELS[::-1, ::-1])
  assert _apply(both, _PIXELS).flags.c_contiguous


def test_random_crop_reaches_every_place_alike():
  pixels = np.arange(6 * 5, dtype=np.uint8).reshape(6, 5, 1)
  transform = augment_image.RandomCrop(size=4)
  corners = [
    int(_apply(transform, pixels, seed=i)[0, 0, 0]) for i in range(600)
  ]
  expected = {5 * top + left for top in range(3) for left in range(2)}
  counts = np.array([corners.count(corner) for corner in sorted(expected)])
  assert counts.sum() == 600
  assert ((counts - 100) ** 2 / 100).sum() < 20.5  # Chi squared, 5 df, 0.1 %.
  corner = _apply(transform, pixels)[0, 0, 0]
  top, left = divmod(int(corner), 5)
  np.testing.assert_array_equal(
    _apply(transform, pixels), pixels[top : top + 4, left : left + 4]
  )


def test_random_crop_pads_with_black():
  pixels = np.full((4, 4, 3), 9, np.uint8)
  sums = {
    int(
      _apply(augment_image.RandomCrop(size=4, padding=2), pixels, seed=i).sum()
    )
    for i in range(60)
  }
  assert max(sums) == 9 * 48
  assert min(sums) == 9 * 12  # Two by two pixels of the picture are left.


@pytest.mark.parametrize("size", [3, 4, 9])
def test_centre_crop_takes_the_middle(size):
  top, left = (9 - size) // 2, (12 - size) // 2
  cropped = _apply(image.CenterCrop(size=size), _PIXELS)
  np.testing.assert_array_equal(
    cropped, _PIXELS[top : top + size, left : left + size]
  )
  assert cropped.base is None  # The whole picture can be freed.


def test_resize_keeps_aspect_ratio_and_type():
  for pixels in (_PIXELS, _PIXELS[:, :, :1], _PIXELS / np.float32(255)):
    for side, shape in [(3, (3, 4)), (9, (9, 12)), (18, (18, 24))]:
      resized = _apply(image.Resize(shorter_side=side), pixels)
      assert resized.shape == (*shape, pixels.shape[2])
      assert resized.dtype == pixels.dtype
  ramp = np.linspace(0, 1, 64, dtype=np.float32)[None, :, None]
  ramp = np.repeat(ramp, 32, axis=0)
  half = _apply(image.Resize(shorter_side=16), ramp)
  np.testing.assert_allclose(
    half[0, 2:-2, 0], ramp[0, 4:-4, 0].reshape(-1, 2).mean(axis=1), atol=1e-3
  )


# Colour.


def test_brightness_contrast_and_saturation_match_their_formulas():
  jitter = augment_image.ColorJitter
  pixels = _PIXELS.astype(np.float64)
  grey = pixels @ [0.299, 0.587, 0.114]
  mean = np.floor(grey.mean() + 0.5)
  for draw, factor in [(0.0, 0.6), (0.75, 1.2), (1.0, 1.4)]:
    for name, place, towards in [
      ("brightness", 0, np.zeros_like(pixels)),
      ("contrast", 1, np.full_like(pixels, mean)),
      ("saturation", 2, np.repeat(grey[:, :, None], 3, axis=2)),
    ]:
      draws = [0.5] * 4
      draws[place] = draw
      changed = _with_draws(jitter(**{name: 0.4}), _PIXELS, *draws)
      expected = np.clip(towards + factor * (pixels - towards), 0, 255)
      assert changed.dtype == np.uint8
      np.testing.assert_allclose(changed, expected, atol=2)


def test_hue_turns_on_its_circle():
  red = np.zeros((2, 3, 3), np.uint8)
  red[:, :, 0] = 200
  third = _with_draws(augment_image.ColorJitter(hue=0.5), red, 0, 0, 0, 5 / 6)
  np.testing.assert_allclose(third[0, 0], [0, 200, 0], atol=8)  # Green.
  back = _with_draws(augment_image.ColorJitter(hue=0.5), red, 0, 0, 0, 1 / 6)
  np.testing.assert_allclose(back[0, 0], [0, 0, 200], atol=8)  # Blue.


def test_colours_of_floats_and_bytes_change_alike():
  jitter = augment_image.ColorJitter(
    brightness=0.3, contrast=0.3, saturation=0.3, hue=0.1
  )
  for channels in (1, 3):
    pixels = _PIXELS[:, :, :channels]
    from_bytes = _apply(jitter, pixels)
    from_floats = _apply(jitter, pixels / np.float32(255))
    assert from_floats.dtype == np.float32
    np.testing.assert_allclose(from_floats, from_bytes / 255, atol=1e-6)


def test_colour_after_zscore_is_refused():
  jitter = augment_image.ColorJitter(brightness=0.2)
  for wrong in (-0.5, 1.5, np.nan):
    pixels = np.full((2, 2, 3), wrong, np.float32)
    with pytest.raises(ValueError, match="before ZScore"):
      _apply(jitter, pixels)


# All of them.

_RANDOM = (
  augment_image.Rotate(max_degrees=15),
  augment_image.Flip(),
  augment_image.RandomCrop(size=7, padding=1),
  augment_image.ColorJitter(brightness=0.3, contrast=0.3, hue=0.2),
)
_ALL = (
  *_RANDOM,
  image.Decode(image_size=None, image_channels=3, as_uint8=True),
  image.Resize(shorter_side=5),
  image.CenterCrop(size=5),
  image.MinMax(),
  image.ZScore(mean=(0.1, 0.2, 0.3), std=(0.5, 0.5, 1.0)),
)


@pytest.mark.parametrize("transform", _RANDOM, ids=lambda t: type(t).__name__)
def test_result_depends_on_the_generator_alone_and_leaves_its_argument(
  transform,
):
  for pixels in (_PIXELS, _PIXELS / np.float32(255)):
    kept = pixels.copy()
    pixels.flags.writeable = False  # As the pipeline's cache has it.
    results = [_apply(transform, pixels, seed=i) for i in (3, 3, 4, 5, 6, 7)]
    np.testing.assert_array_equal(results[0], results[1])
    assert any(not np.array_equal(results[0], other) for other in results[2:])
    np.testing.assert_array_equal(pixels, kept)
    pixels.flags.writeable = True
    assert results[0].dtype == pixels.dtype


@pytest.mark.parametrize("transform", _ALL, ids=lambda t: type(t).__name__)
def test_transform_is_plain_data_with_words(transform):
  fields = dataclasses.asdict(transform)
  assert type(transform)(**fields) == transform
  assert transform.kind in ("decode", "normalisation", "augmentation")
  assert isinstance(transform.label, str)
  assert transform.label


def test_whole_batches_are_normalised_as_single_pictures():
  batch = np.random.default_rng(2).integers(0, 256, (2, 4, 9, 12, 3), np.uint8)
  for chain in (
    [image.MinMax()],
    [image.MinMax(), image.ZScore(mean=0.3, std=0.4)],
    [image.MinMax(), image.ZScore(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))],
  ):
    together, alone = batch, batch[1, 2]
    for transform in chain:
      assert transform.elementwise
      together, alone = _apply(transform, together), _apply(transform, alone)
    assert together.dtype == alone.dtype == np.float32
    np.testing.assert_array_equal(together[1, 2], alone)


def test_pixel_types_have_their_own_range():
  for dtype in (np.uint8, np.uint16):
    top = np.array([[[0], [np.iinfo(dtype).max]]], dtype)
    np.testing.assert_array_equal(_apply(image.MinMax(), top), [[[0], [1]]])
    dark = _apply(image.MinMax(), top // 4)  # Not by the picture's own range.
    np.testing.assert_allclose(dark[0, 1, 0], 0.25, atol=0.01)
  with pytest.raises(ValueError, match="uint8 or uint16"):
    _apply(image.MinMax(), np.zeros((2, 2, 1), np.float32))
  with pytest.raises(ValueError, match="Put MinMax before"):
    _apply(image.ZScore(mean=0.5, std=0.5), _PIXELS)


@pytest.mark.parametrize(
  "transform", [image.CenterCrop(size=10), augment_image.RandomCrop(size=10)]
)
def test_picture_smaller_than_its_crop_names_the_record(transform):
  with pytest.raises(sources.BadRecordError, match="'r6'.*9 x 12.*10 x 10"):
    _apply(transform, _PIXELS)


def test_absurd_aspect_ratio_names_the_record():
  pixels = np.zeros((1, 100_000, 1), np.uint8)
  with pytest.raises(sources.BadRecordError, match="'r6'.*pixels"):
    _apply(image.Resize(shorter_side=100), pixels)


@pytest.mark.parametrize(
  ("name", "options"),
  [
    ("Rotate", {"max_degrees": -1}),
    ("Rotate", {"max_degrees": 181}),
    ("Flip", {"horizontal_prob": 1.5}),
    ("Flip", {"vertical_prob": -0.1}),
    ("RandomCrop", {"size": 0}),
    ("RandomCrop", {"size": 3, "padding": -1}),
    ("ColorJitter", {"brightness": 1.1}),
    ("ColorJitter", {"hue": 0.6}),
  ],
)
def test_impossible_setting_is_named(name, options):
  *_, field = options
  with pytest.raises(ValueError, match=field):
    getattr(augment_image, name)(**options)


# Bad input, through a whole chain.

_CHAIN = (
  image.Decode(image_size=None, image_channels=3, as_uint8=True),
  image.Resize(shorter_side=8),
  augment_image.RandomCrop(size=8),
  augment_image.Rotate(max_degrees=20),
  augment_image.Flip(),
  augment_image.ColorJitter(brightness=0.2, contrast=0.2, hue=0.1),
  image.MinMax(),
  image.ZScore(mean=0.5, std=0.5),
)


def _refused(error: sources.BadRecordError) -> None:
  assert error.record_id == "r6"


def _through_chain(content) -> np.ndarray | None:
  """Pixels; None where the record was refused by name."""
  element = {"id": "r6", "image": content}
  rng = np.random.default_rng(0)
  try:
    for transform in _CHAIN:
      if hasattr(transform, "random_map"):
        element = transform.random_map(element, rng)
      else:
        element = transform.map(element)
  except sources.BadRecordError as error:
    return _refused(error)
  assert element["image"].shape == (8, 8, 3)
  assert element["image"].dtype == np.float32
  assert np.abs(element["image"]).max() <= 1
  return element["image"]


def _encode(picture: Image.Image, **options) -> bytes:
  buffer = io.BytesIO()
  picture.save(buffer, **options)
  return buffer.getvalue()


def _pictures() -> dict[str, bytes]:
  colour = Image.fromarray(_PIXELS)
  deep = Image.fromarray(_PIXELS[:, :, 0].astype(np.uint16) * 257)
  clear = colour.copy()
  clear.putalpha(Image.fromarray(_PIXELS[:, :, 1]))
  palette = colour.quantize(8)
  return {
    "png": _encode(colour, format="PNG"),
    "png 16 bit": _encode(deep, format="PNG"),
    "tiff 16 bit": _encode(deep, format="TIFF"),
    "png alpha": _encode(clear, format="PNG"),
    "png grey alpha": _encode(clear.convert("LA"), format="PNG"),
    "png one bit": _encode(colour.convert("1"), format="PNG"),
    "png palette": _encode(palette, format="PNG"),
    "png clear palette": _encode(palette, format="PNG", transparency=bytes(8)),
    "png one clear colour": _encode(palette, format="PNG", transparency=3),
    "jpeg": _encode(colour, format="JPEG"),
    "jpeg grey": _encode(colour.convert("L"), format="JPEG"),
    "jpeg cmyk": _encode(colour.convert("CMYK"), format="JPEG"),
    "jpeg progressive": _encode(colour, format="JPEG", progressive=True),
    "tiff cmyk": _encode(colour.convert("CMYK"), format="TIFF"),
    "gif": _encode(palette, format="GIF"),
    "webp": _encode(colour, format="WEBP", lossless=True),
    "webp alpha": _encode(clear, format="WEBP", lossless=True),
    "bmp": _encode(colour, format="BMP"),
    "ppm": _encode(colour, format="PPM"),
  }


_ENCODED = _pictures()


@pytest.mark.parametrize("name", _ENCODED)
def test_every_kind_of_picture_decodes(name):
  assert _through_chain(_ENCODED[name]) is not None
  decode = image.Decode(image_size=None, image_channels=3, as_uint8=True)
  pixels = _apply(decode, _ENCODED[name])
  assert pixels.dtype == np.uint8
  floats = image.Decode(image_size=None, image_channels=3)
  np.testing.assert_allclose(
    _apply(floats, _ENCODED[name]), pixels / 255, atol=0.5001 / 255
  )
  lossless = {"png", "png alpha", "webp", "webp alpha", "bmp", "ppm"}
  if name in lossless:  # What is transparent keeps its colour, but in WebP.
    seen = _PIXELS[:, :, 1] > 0 if name == "webp alpha" else slice(None)
    np.testing.assert_array_equal(pixels[seen], _PIXELS[seen])
  if name in ("jpeg", "jpeg cmyk", "tiff cmyk"):
    flat = Image.open(io.BytesIO(_ENCODED[name])).convert("RGB")
    np.testing.assert_array_equal(pixels, np.asarray(flat))


def test_first_frame_of_an_animation_is_taken():
  frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "blue")]
  options = {"save_all": True, "append_images": frames[1:]}
  for kind in ("GIF", "PNG", "TIFF", "WEBP"):
    content = _encode(frames[0], format=kind, **options)
    assert Image.open(io.BytesIO(content)).n_frames == 2
    pixels = _apply(image.Decode(image_size=5, image_channels=3), content)
    np.testing.assert_allclose(pixels[2, 2], [1, 0, 0], atol=0.02)


@hypothesis.settings(max_examples=80)
@hypothesis.given(data=st.data())
def test_damaged_pictures_are_refused_or_decode(data):
  content = bytearray(_ENCODED[data.draw(st.sampled_from(sorted(_ENCODED)))])
  damage = data.draw(st.sampled_from(["cut", "flip", "head", "swap"]))
  if damage == "cut":
    del content[data.draw(st.integers(0, len(content) - 1)) :]
  elif damage == "flip":
    for _ in range(data.draw(st.integers(1, 8))):
      place = data.draw(st.integers(0, len(content) - 1))
      content[place] ^= 1 << data.draw(st.integers(0, 7))
  elif damage == "head":
    del content[: data.draw(st.integers(1, 60))]
  else:
    other = _ENCODED[data.draw(st.sampled_from(sorted(_ENCODED)))]
    content[len(content) // 2 :] = other[len(other) // 2 :]
  _through_chain(bytes(content))


@hypothesis.settings(max_examples=60)
@hypothesis.given(content=st.binary(max_size=300))
def test_arbitrary_bytes_are_refused(content):
  assert _through_chain(content) is None


@pytest.mark.parametrize("depth", ["PNG", "TIFF"])
def test_sixteen_bits_are_rounded_to_eight(depth):
  levels = np.random.default_rng(1).integers(0, 65536, (9, 12), np.uint16)
  content = _encode(Image.fromarray(levels), format=depth)
  decode = image.Decode(image_size=None, image_channels=3, as_uint8=True)
  expected = np.rint(levels / 257).astype(np.uint8)
  for channel in range(3):
    np.testing.assert_array_equal(
      _apply(decode, content)[:, :, channel], expected
    )


def test_formats_that_start_programs_are_not_tried():
  # EPS goes to Ghostscript, in which no private record should be looked at.
  content = _encode(Image.fromarray(_PIXELS), format="EPS")
  with Image.open(io.BytesIO(content)) as opened:
    assert opened.format == "EPS"  # Pillow itself would.
  decode = image.Decode(image_size=8, image_channels=3)
  with pytest.raises(sources.BadRecordError, match="cannot identify"):
    _apply(decode, content)


@pytest.mark.parametrize("content", [None, b"", "text", 12, b"%!PS-Adobe-3.0"])
def test_what_is_no_picture_is_refused(content):
  assert _through_chain(content) is None


@pytest.mark.parametrize("kind", ["PNG", "GIF", "TIFF", "BMP"])
def test_bombs_are_refused_before_they_unfold(kind, monkeypatch):
  bomb = _encode(Image.new("1", (9000, 9000)), format=kind)

  def never(*args, **kwargs):
    raise AssertionError("the pixels were decoded")

  monkeypatch.setattr(Image.Image, "convert", never)
  monkeypatch.setattr(Image.Image, "resize", never)
  with pytest.raises(sources.BadRecordError, match="9000 x 9000 pixels"):
    _apply(image.Decode(image_size=8, image_channels=1), bomb)
