"""Tests of ppnet.report.pipeline_figures and ppnet.report.pipeline_table."""

import io
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from PIL import Image

from ppnet.data import (
  audio,
  augment_audio,
  augment_image,
  image,
  scattering,
  sources,
  text,
  text_transforms,
)
from ppnet.report import pipeline_figures, pipeline_table

_RNG = np.random.default_rng(0)


def _picture(channels=3) -> dict:
  pixels = _RNG.integers(0, 256, (20, 30, channels), np.uint8)
  buffer = io.BytesIO()
  Image.fromarray(pixels.squeeze()).save(buffer, format="PNG")
  return {"id": "train/3", "image": buffer.getvalue()}


def _recording(secs=0.3) -> dict:
  clip = 0.3 * np.sin(2 * np.pi * 600 * np.arange(round(8000 * secs)) / 8000)
  buffer = io.BytesIO()
  soundfile.write(buffer, clip, 8000, format="WAV")
  return {"id": "test/9", "audio": buffer.getvalue()}


_IMAGE = [
  image.Decode(image_size=None, image_channels=3, as_uint8=True),
  image.CenterCrop(size=16),
  augment_image.Rotate(max_degrees=15),
  augment_image.Flip(),
  augment_image.ColorJitter(brightness=0.3),
  image.MinMax(),
  image.ZScore(mean=0.4, std=0.25),
]
_LOG_MEL = audio.LogMel(
  sample_rate_hz=8000, window=256, hop=128, num_mels=24, min_hz=100.0,
  max_hz=4000.0,
)  # fmt: skip
_DECODE = audio.Decode(sample_rate_hz=8000, max_secs=0.5)
_AUDIO = [
  _DECODE,
  augment_audio.AddNoise(min_snr_db=5, max_snr_db=25),
  _LOG_MEL,
  audio.ZScoreClip(),
]


@pytest.fixture(scope="module")
def text_chain(tmp_path_factory) -> list:
  path = tmp_path_factory.mktemp("model") / "tokenizer.model"
  text.train_tokenizer(
    text.public_sentences("Which?"),
    vocab_size=400,
    class_names=["a"],
    model_path=path,
  )
  return [
    text_transforms.Decode(max_chars=300),
    text_transforms.Nfkc(),
    text_transforms.Tokenize(
      model_path=str(path), class_names=("a",), max_tokens=40, bos=True
    ),
  ]


def _titles(fig) -> list[str]:
  return [
    ax.get_title(loc="left") for ax in fig.axes if ax.get_title(loc="left")
  ]


def _words(fig) -> str:
  return "\n".join(t.get_text() for ax in fig.axes for t in ax.texts)


# Figures.


def test_picture_shows_every_stage_and_every_view():
  fig = pipeline_figures.draw(
    _IMAGE, _picture(), modality="image", seed=1, num_views=3
  )
  titles = _titles(fig)
  names = [title.split("\n")[0] for title in titles]
  assert names == [
    "As stored",
    "Decode",
    "CenterCrop",
    "Rotate (random)",
    "Flip (random)",
    "ColorJitter (random)",
    "MinMax",
    "ZScore",
    *(f"View {view} (augmented)" for view in range(3)),
  ]
  shown = [ax.images[0].get_array() for ax in fig.axes if ax.images]
  assert shown[0].shape == (20, 30, 3)
  assert shown[1].shape == (20, 30, 3)
  assert all(pixels.shape == (16, 16, 3) for pixels in shown[2:])
  views = shown[-3:]
  np.testing.assert_allclose(views[0], shown[5])  # What the stages showed.
  assert not np.array_equal(views[0], views[1])
  assert not np.array_equal(views[1], views[2])
  assert "No privacy guarantee covers this" in _words(fig)


def test_grey_picture_and_scattering_maps_are_shown():
  chain = [
    image.Decode(image_size=28, image_channels=1),
    scattering.Scattering(),
  ]
  fig = pipeline_figures.draw(chain, _picture(1), modality="image", seed=1)
  titles = _titles(fig)
  assert len(titles) == 3  # Nothing is random, so there are no views.
  assert "min–max to [0, 1]" in titles[1].replace("\n", " ")
  wall = fig.axes[-1].images[0].get_array()
  assert wall.shape == (9 * 8 - 1, 9 * 8 - 1)
  assert "7 × 7 × 81" in fig.axes[-1].get_xlabel()


def test_recording_has_axes_in_seconds_and_hertz_and_bars_in_decibels():
  fig = pipeline_figures.draw(
    _AUDIO, _recording(), modality="audio", seed=1, num_views=2
  )
  by_title = {ax.get_title(loc="left").split("\n")[0]: ax for ax in fig.axes}
  wave = by_title["Waveform"]
  assert wave.get_xlabel() == "time (s)"
  seconds, samples = wave.lines[0].get_data()
  assert seconds[-1] == pytest.approx(3999 / 8000)
  assert samples.max() == pytest.approx(0.3, abs=1e-3)
  spectrogram = by_title["Spectrogram"]
  assert spectrogram.get_ylabel() == "frequency (Hz)"
  assert spectrogram.images[0].colorbar.ax.get_ylabel() == "power (dB)"
  left, right, bottom, top = spectrogram.images[0].get_extent()
  assert (bottom, top) == (0, 4000)
  frames = spectrogram.images[0].get_array()  # [bins, frames]
  assert frames.max() - frames.min() <= 80 + 1e-3
  loudest = int(frames[:, 3].argmax())
  assert abs((loudest + 0.5) / len(frames) * top - 600) < 40
  middle = left + 3.5 * (right - left) / frames.shape[1]
  assert middle == pytest.approx((3 * 128 + 128) / 8000)
  assert "not used by this pipeline" in by_title["MFCC"].get_title(loc="left")
  mel = by_title["Mel spectrogram"]
  assert mel.images[0].colorbar.ax.get_ylabel() == "power (dB)"
  assert mel.get_ylabel() == "frequency (Hz, mel scale)"
  # The tone's band is at the height that the axis calls 600 Hz.
  ticks = [float(label.get_text()) for label in mel.get_yticklabels()]
  height = np.interp(
    audio.hz_to_mel(600.0), audio.hz_to_mel(np.array(ticks)), mel.get_yticks()
  )
  band = int(mel.images[0].get_array()[:, 3].argmax())
  assert abs(band + 0.5 - height) <= 1
  model = by_title["What the model gets"].images[0].get_array()
  assert model.shape == (24, 30)
  for view in range(2):
    assert f"View {view}, waveform" in by_title
    assert f"View {view}, what the model gets" in by_title


@pytest.mark.parametrize(
  "chain",
  [
    [_DECODE],
    [_DECODE, audio.Loudness(target_dbfs=-20.0), audio.ZScoreClip()],
    [_DECODE, audio.Spectrogram(window=100, hop=50, output="complex")],
    [_DECODE, _LOG_MEL, audio.Mfcc(num_mfcc=1)],
    [_DECODE, _LOG_MEL, audio.Mfcc(num_mfcc=13), audio.ZScoreClip()],
    [
      _DECODE,
      augment_audio.TimeStretch(min_rate=0.8, max_rate=0.8),
      _LOG_MEL,
    ],
  ],
  ids=["wave", "loud", "complex", "one", "mfcc", "longer"],
)
def test_any_chain_of_recordings_is_drawn(chain):
  fig = pipeline_figures.draw(
    chain, _recording(), modality="audio", seed=1, num_views=2
  )
  fig.savefig(io.BytesIO(), format="png", dpi=30)


def test_silence_and_one_sample_are_drawn():
  for clip in (np.zeros(100), np.array([0.5])):
    buffer = io.BytesIO()
    soundfile.write(buffer, clip, 8000, format="WAV")
    element = {"id": "a", "audio": buffer.getvalue()}
    fig = pipeline_figures.draw(
      _AUDIO, element, modality="audio", seed=1, num_views=1
    )
    fig.savefig(io.BytesIO(), format="png", dpi=30)


def test_text_shows_spelling_and_ids(text_chain):
  written = "the ﬁrst $5 of _it_ \u4e00"
  fig = pipeline_figures.draw(
    text_chain, {"id": "x", "text": written.encode()}, modality="text", seed=0
  )
  words = _words(fig)
  assert "ﬁrst" in words
  assert "first" in words
  assert "<U+4E00>" in words  # DejaVu has no such letter.
  assert "<s>/1" in words
  assert r"\$5" in words  # No formula.
  fig.savefig(io.BytesIO(), format="png", dpi=30)


def test_files_are_written_and_the_same_again(tmp_path):
  settings = {"modality": "image", "seed": 1, "num_views": 2}
  element = _picture()
  paths = [
    pipeline_figures.write(
      tmp_path / name / "pipeline_image", _IMAGE[:3], element, **settings
    )
    for name in ("one", "two")
  ]
  assert paths[0] == tmp_path / "one" / "pipeline_image.png"
  for suffix in (".png", ".pdf"):
    first, second = (path.with_suffix(suffix).read_bytes() for path in paths)
    assert len(first) > 1000
    assert first == second


def test_impossible_figure_is_named():
  with pytest.raises(ValueError, match="modality='smell'"):
    pipeline_figures.draw(_IMAGE, _picture(), modality="smell", seed=0)
  with pytest.raises(ValueError, match="num_transforms=0"):
    pipeline_figures.draw([], _picture(), modality="image", seed=0)
  with pytest.raises(ValueError, match=r"audio\.Decode"):
    pipeline_figures.draw(
      [audio.ZScoreClip()],
      {"id": "a", "audio": np.ones(9)},
      modality="audio",
      seed=0,
    )
  with pytest.raises(sources.BadRecordError, match="'b'"):
    pipeline_figures.draw(
      _IMAGE, {"id": "b", "image": b"none"}, modality="image", seed=0
    )


_WITHOUT_JAX = """
import sys
class Blocker:
  def find_spec(self, name, path=None, target=None):
    if name.split(".")[0] in ("jax", "jaxlib", "flax"):
      raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocker())
from ppnet.report import pipeline_figures, pipeline_table
"""


def test_report_works_where_jax_is_not_installed():
  subprocess.run([sys.executable, "-c", _WITHOUT_JAX], check=True)


# The table.


def test_rows_are_read_from_the_transforms_in_use(text_chain):
  pipelines = {"image": _IMAGE, "audio": _AUDIO, "text": text_chain}
  texts = ["one", "two words", "ﬁ"]
  samples = {
    "image": [_picture(), _picture()],
    "audio": [_recording(), _recording(0.1)],
    "text": [{"id": "", "text": t.encode()} for t in texts],
  }
  rows = {
    row["modality"]: row for row in pipeline_table.rows(pipelines, samples)
  }
  row = rows["image"]
  assert row["normalisation"] == (
    "min–max to [0, 1]; z-score, public mean 0.4, std 0.25"
  )
  assert row["feature_extraction"] == ""
  assert row["augmentation"] == (
    "rotation up to ±15°; horizontal flip (0.5); brightness ±0.3"
  )
  assert row["shape_before"] == "20 × 30 × 3"
  assert row["shape_after"] == "16 × 16 × 3"
  decoded = np.stack(
    [np.asarray(Image.open(io.BytesIO(s["image"]))) for s in samples["image"]]
  )
  assert row["nonprivate/before"]["mean"] == pytest.approx(decoded.mean())
  cropped = (decoded[:, 2:18, 7:23] / 255 - 0.4) / 0.25
  for name, value in [
    ("mean", cropped.mean()),
    ("std", cropped.std()),
    ("min", cropped.min()),
    ("max", cropped.max()),
  ]:
    assert row["nonprivate/after"][name] == pytest.approx(value, rel=1e-4)
  row = rows["audio"]
  assert row["augmentation"] == "noise at 5 to 25 dB SNR"
  assert "24 bands" in row["feature_extraction"]
  assert (row["shape_before"], row["shape_after"]) == ("4000", "30 × 24")
  assert row["nonprivate/after"]["std"] == pytest.approx(1, abs=1e-4)
  row = rows["text"]
  assert row["unit"] == "characters → tokens"
  assert row["nonprivate/before"]["mean"] == pytest.approx(13 / 3)
  assert row["nonprivate/before"]["max"] == 9
  assert row["normalisation"] == "Unicode NFKC"
  assert row["augmentation"] == ""

  markdown = pipeline_table.markdown([*rows.values()])
  for words in ("| image ", "Unicode NFKC", "2 or 3 record(s)", "–"):
    assert words in markdown
  # Fails if: a column is filled by hand and not from the list of transforms.


def test_decoding_to_floats_counts_as_normalisation():
  chain = [image.Decode(image_size=8, image_channels=1)]
  (row,) = pipeline_table.rows({"image": chain}, {"image": [_picture()]})
  assert row["normalisation"] == "min–max to [0, 1]"


def test_table_without_records_or_transforms_is_refused():
  for pipelines, samples in [
    ({"image": _IMAGE}, {}),
    ({"image": []}, {"image": [_picture()]}),
  ]:
    with pytest.raises(ValueError, match="a record of 'image'"):
      pipeline_table.rows(pipelines, samples)
