"""Tests of ppnet.data.audio. Oracles are loops and formulas written here."""

import io
import math

import hypothesis
import numpy as np
import pytest
import scipy.signal
import soundfile
from hypothesis import strategies as st

from ppnet import config as config_lib
from ppnet.data import audio, sources

# ITU-T Q.23, written out: digit -> row and column in Hz.
_KEYS_HZ = {
  1: (697, 1209), 2: (697, 1336), 3: (697, 1477),
  4: (770, 1209), 5: (770, 1336), 6: (770, 1477),
  7: (852, 1209), 8: (852, 1336), 9: (852, 1477),
  0: (941, 1336),
}  # fmt: skip


def _wav(waveform, *, rate_hz=8000, subtype="FLOAT") -> bytes:
  buffer = io.BytesIO()
  soundfile.write(buffer, waveform, rate_hz, format="WAV", subtype=subtype)
  return buffer.getvalue()


def _decode(content, *, rate_hz=8000, max_secs=0.05):
  decode = audio.Decode(sample_rate_hz=rate_hz, max_secs=max_secs)
  return decode.map({"id": "r5", "audio": content})["audio"]


def _sine(hz, *, secs=0.4, rate_hz=8000, level=0.5):
  time = np.arange(round(secs * rate_hz)) / rate_hz
  return (level * np.sin(2 * np.pi * hz * time)).astype(np.float32)


def _naive_corners_hz(count, low_hz, high_hz):
  """Slaney's scale by its definition: 66.67 Hz steps, then 27 per 6.4x."""

  def to_mel(hz):
    return hz / (200 / 3) if hz < 1000 else 15 + 27 * math.log(hz / 1000, 6.4)

  def to_hz(mel):
    return mel * 200 / 3 if mel < 15 else 1000 * 6.4 ** ((mel - 15) / 27)

  low, high = to_mel(low_hz), to_mel(high_hz)
  step = (high - low) / (count + 1)
  return [to_hz(low + step * i) for i in range(count + 2)]


def _naive_log_mel(waveform, *, rate_hz, window, hop, count, low_hz, high_hz):
  """Log-mel from the definitions of the DFT and of the triangles."""
  corners = _naive_corners_hz(count, low_hz, high_hz)
  rows = []
  for start in range(0, len(waveform) - window + 1, hop):
    power = []
    for k in range(window // 2 + 1):
      value = 0j
      for n in range(window):
        weight = math.sin(math.pi * n / window) ** 2
        angle = -2 * math.pi * k * n / window
        value += (
          waveform[start + n]
          * weight
          * complex(math.cos(angle), math.sin(angle))
        )
      power.append(abs(value) ** 2)
    row = []
    for m in range(count):
      left, middle, right = corners[m : m + 3]
      total = 0.0
      for k, value in enumerate(power):
        hz = k * rate_hz / window
        if left < hz <= middle:
          height = (hz - left) / (middle - left)
        elif middle < hz < right:
          height = (right - hz) / (right - middle)
        else:
          height = 0.0
        total += height * 2 / (right - left) * value
      row.append(math.log(max(total, 1e-10)))
    rows.append(row)
  return np.array(rows)


def test_log_mel_matches_naive_loops():
  rng = np.random.default_rng(0)
  waveform = rng.normal(0, 0.3, 100).astype(np.float32)
  settings = {"window": 40, "hop": 17}
  log_mel = audio.LogMel(
    sample_rate_hz=6000, num_mels=5, min_hz=200.0, max_hz=2900.0, **settings
  )
  result = log_mel.map({"id": "", "audio": waveform})["audio"]
  expected = _naive_log_mel(
    waveform.tolist(),
    rate_hz=6000, count=5, low_hz=200.0, high_hz=2900.0, **settings,
  )  # fmt: skip
  assert result.shape == (4, 5)
  np.testing.assert_allclose(result, expected, rtol=1e-6)


@pytest.mark.parametrize(("window", "hop"), [(64, 16), (50, 21)])
def test_power_spectrogram_matches_scipy(window, hop):
  waveform = np.random.default_rng(1).normal(size=333)
  hann = scipy.signal.get_window("hann", window, fftbins=True)
  _, _, spectrum = scipy.signal.spectrogram(
    waveform,
    window=hann,
    noverlap=window - hop,
    detrend=False,
    scaling="spectrum",
    mode="complex",
  )
  result = audio.power_spectrogram(waveform, window=window, hop=hop)
  np.testing.assert_allclose(
    result, (np.abs(spectrum) * hann.sum()).T ** 2, rtol=1e-9, atol=1e-12
  )


def test_mel_scale_matches_published_points():
  hz = np.array([0.0, 200.0, 1000.0, 6400.0])
  mel = np.array([0.0, 3.0, 15.0, 42.0])
  np.testing.assert_allclose(audio.hz_to_mel(hz), mel, atol=1e-12)
  np.testing.assert_allclose(audio.mel_to_hz(mel), hz, atol=1e-9)
  grid = np.linspace(0, 8000, 77)
  np.testing.assert_allclose(audio.mel_to_hz(audio.hz_to_mel(grid)), grid)


def test_mel_bands_have_unit_area():
  bank = audio.mel_filter_bank(
    sample_rate_hz=8000, window=8000, num_mels=12, min_hz=300.0, max_hz=4000.0
  )
  np.testing.assert_allclose(bank.sum(axis=1), 1.0, rtol=1e-3)  # 1 Hz bins.


@pytest.mark.parametrize("band", [0, 7, 18, 31, 39])
def test_pure_tone_lands_in_its_band(band):
  config = config_lib.AudioConfig()
  centre = _naive_corners_hz(40, config.min_hz, config.max_hz)[band + 1]
  element = {"id": "", "audio": _wav(_sine(centre))}
  for transform in audio.transforms(config):
    element = transform.map(element)
  assert element["audio"].shape == (24, 40)
  assert set(element["audio"].argmax(axis=1)) == {band}


def test_mfcc_matches_double_loop():
  log_mel = np.random.default_rng(2).normal(size=(3, 7))
  expected = np.zeros((3, 4))
  for i in range(4):
    scale = math.sqrt((1 if i == 0 else 2) / 7)
    for j in range(7):
      expected[:, i] += (
        scale * log_mel[:, j] * math.cos(math.pi * i * (j + 0.5) / 7)
      )
  result = audio.Mfcc(num_mfcc=4).map({"audio": log_mel})["audio"]
  np.testing.assert_allclose(result, expected, rtol=1e-6)  # float32.
  later = audio.Mfcc(num_mfcc=2, first=1).map({"audio": log_mel})["audio"]
  np.testing.assert_allclose(later, expected[:, 1:3], rtol=1e-6)


def test_mfcc_from_the_second_on_know_no_level():
  log_mel = np.random.default_rng(4).normal(size=(5, 8))
  level = np.arange(5)[:, None]  # Each frame by another factor louder.
  quiet, loud = (
    [
      audio.Mfcc(num_mfcc=3, first=first).map({"audio": frames})["audio"]
      for frames in (log_mel, log_mel + level)
    ]
    for first in (0, 1)
  )
  assert not np.allclose(*quiet, atol=0.1)
  np.testing.assert_allclose(*loud, atol=1e-6)
  # Fails if: the coefficient that is left out is another one.


def test_features_are_normalised_per_clip_and_ignore_loudness():
  rng = np.random.default_rng(3)
  clip = rng.normal(0, 0.1, 3200).astype(np.float32)
  for feature, size in [("LOG_MEL", 40), ("MFCC", 13)]:
    config = config_lib.AudioConfig(
      feature=config_lib.AudioFeature[feature], num_mfcc=13
    )
    results = []
    for gain in (1, 0.25):
      element = {"id": "", "audio": _wav(clip * gain)}
      for transform in audio.transforms(config):
        element = transform.map(element)
      results.append(element["audio"])
    assert results[0].shape == (24, size)
    assert results[0].dtype == np.float32
    assert abs(results[0].mean()) < 1e-6
    assert results[0].std() == pytest.approx(1, abs=1e-5)
    if feature == "LOG_MEL":  # Loudness adds a constant to the logarithm.
      np.testing.assert_allclose(results[0], results[1], atol=1e-5)


def test_silence_becomes_zeros():
  element = {"id": "", "audio": _wav(np.zeros(3200, np.float32))}
  for transform in audio.transforms(config_lib.AudioConfig()):
    element = transform.map(element)
  np.testing.assert_array_equal(element["audio"], np.zeros((24, 40)))


@hypothesis.settings(derandomize=True, deadline=None, max_examples=40)
@hypothesis.given(
  max_ms=st.integers(100, 700),
  window_ms=st.integers(60, 90),
  hop_ms=st.integers(5, 60),
  mfcc=st.booleans(),
)
def test_announced_shape_matches_features(max_ms, window_ms, hop_ms, mfcc):
  config = config_lib.AudioConfig(
    max_secs=max_ms / 1000,
    window_secs=window_ms / 1000,
    hop_secs=hop_ms / 1000,
    num_mels=11,
    num_mfcc=6,
    feature=config_lib.AudioFeature.MFCC
    if mfcc
    else config_lib.AudioFeature.LOG_MEL,
  )
  element = {"id": "", "audio": _wav(_sine(440))}
  for transform in audio.transforms(config):
    element = transform.map(element)
  assert element["audio"].shape == (
    audio.num_frames(config),
    audio.num_features(config),
  )


def test_decode_cuts_pads_and_averages_channels():
  ramp = np.linspace(-0.9, 0.9, 500, dtype=np.float32)
  np.testing.assert_array_equal(_decode(_wav(ramp)), ramp[:400])
  padded = _decode(_wav(ramp[:130]))
  np.testing.assert_array_equal(padded[:130], ramp[:130])
  np.testing.assert_array_equal(padded[130:], np.zeros(270))
  stereo = np.stack([ramp, 0 * ramp], axis=1)
  np.testing.assert_allclose(_decode(_wav(stereo)), ramp[:400] / 2, rtol=1e-6)
  assert _decode(_wav(stereo, subtype="PCM_16")).dtype == np.float32


@pytest.mark.parametrize("rate_hz", [16000, 11025, 6000])
def test_resampled_tone_matches_tone_at_target_rate(rate_hz):
  # Long source: most of it must be neither needed nor read.
  content = _wav(_sine(440, secs=2.0, rate_hz=rate_hz), rate_hz=rate_hz)
  result = _decode(content, max_secs=0.3)
  expected = _sine(440, secs=0.3)
  assert result.shape == expected.shape
  middle = slice(200, None)  # The filter starts up; it must not end early.
  np.testing.assert_allclose(result[middle], expected[middle], atol=2e-3)


@pytest.mark.parametrize(
  ("content", "cause"),
  [
    (None, "no recording"),
    (b"", "empty"),
    (b"this is text", "cannot be decoded"),
    (_wav(np.zeros(9, np.float32))[:20], "cannot be decoded"),
    (_wav(np.zeros(0, np.float32)), "no sample"),
    (_wav(np.array([0, np.nan, 0], np.float32)), "NaN"),
    (_wav(np.array([0, np.inf, 0], np.float32)), "infinite"),
  ],
  # The bytes of a WAV file hold a time stamp, and names must not change.
  ids=["none", "empty", "text", "cut", "silent", "nan", "infinite"],
)
def test_bad_recording_names_record_and_cause(content, cause):
  with pytest.raises(sources.BadRecordError, match=f"'r5'.*{cause}"):
    _decode(content)


@pytest.mark.parametrize("digit", range(10))
def test_two_strongest_peaks_are_the_keys_frequencies(digit):
  power = 0.0
  for seed in range(20):  # One tone may drown in its noise; twenty do not.
    clip = audio.dtmf_tone(
      digit, np.random.default_rng(seed), sample_rate_hz=8000, max_secs=0.5
    )
    assert clip.shape == (4000,)
    clip = clip / clip.std()  # Levels differ by 20 dB.
    power = power + np.abs(np.fft.rfft(clip)) ** 2  # 2 Hz per bin.
  first = int(power.argmax())
  power[max(0, first - 30) : first + 30] = 0
  peaks = sorted([2 * first, 2 * int(power.argmax())])
  assert peaks == pytest.approx(_KEYS_HZ[digit], abs=4)


def test_tones_vary_within_the_documented_ranges():
  rng = np.random.default_rng(0)
  clips = [
    audio.dtmf_tone(5, rng, sample_rate_hz=8000, max_secs=0.4)
    for _ in range(300)
  ]
  levels_db = [20 * np.log10(np.abs(clip).max()) for clip in clips]
  assert min(levels_db) >= -20.001
  assert min(levels_db) < -19
  assert max(levels_db) <= 0.001
  assert max(levels_db) > -1
  twists_db, snrs_db = [], []
  for clip in clips:
    # Least squares of both tones near the middle. A burst need not cover all
    # of it; what it does not cover is left over and counts as noise.
    time = np.arange(1400, 1800) / 8000
    basis = np.stack(
      [f(2 * np.pi * hz * time) for hz in (770, 1336) for f in (np.sin, np.cos)]
    ).T
    fit = np.linalg.lstsq(basis, clip[1400:1800], rcond=None)[0]
    row, column = np.hypot(*fit[:2]), np.hypot(*fit[2:])
    noise = clip[1400:1800] - basis @ fit
    snr_db = 10 * np.log10((row**2 + column**2) / 2 / noise.var())
    if snr_db > 5:
      twists_db.append(20 * np.log10(column / row))
      snrs_db.append(snr_db)
  assert len(twists_db) > 40
  assert np.abs(twists_db).max() < 4  # 3 dB and the error of the fit.
  assert min(twists_db) < -2
  assert max(twists_db) > 2
  assert 8.5 < max(snrs_db) < 11


def test_tone_depends_on_the_generator_alone():
  clips = [
    audio.dtmf_tone(
      5, np.random.default_rng(seed), sample_rate_hz=8000, max_secs=0.15
    )
    for seed in (1, 1, 2)
  ]
  np.testing.assert_array_equal(clips[0], clips[1])
  assert not np.array_equal(clips[0], clips[2])


def test_wav_round_trip_is_within_half_a_step():
  clip = audio.dtmf_tone(
    7, np.random.default_rng(0), sample_rate_hz=8000, max_secs=0.2
  )
  decoded = _decode(audio.encode_wav(clip, sample_rate_hz=8000), max_secs=0.2)
  np.testing.assert_allclose(decoded, clip, atol=1 / 32768)


@pytest.mark.parametrize(
  ("digit", "options", "message"),
  [
    (10, {}, "digit=10"),
    (1, {"sample_rate_hz": 2900}, "sample_rate_hz=2900.*8000"),
    (1, {"max_secs": 0.1}, r"max_secs=0\.1.*max_secs"),
  ],
)
def test_impossible_tone_is_refused(digit, options, message):
  options = {"sample_rate_hz": 8000, "max_secs": 0.4, **options}
  with pytest.raises(ValueError, match=message):
    audio.dtmf_tone(digit, np.random.default_rng(0), **options)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"max_secs": 0.01}, "Raise max_secs"),
    ({"hop_secs": 1e-6}, "hop_samples=0"),
    ({"max_hz": 4001.0}, "sample_rate_hz / 2"),
    ({"min_hz": 4000.0}, "min_hz < max_hz"),
    ({"num_mels": 200}, "Lower num_mels"),
    (
      {"num_mfcc": 41, "feature": config_lib.AudioFeature.MFCC},
      "num_mfcc <= 40",
    ),
    (
      {
        "num_mfcc": 40,
        "first_mfcc": 1,
        "feature": config_lib.AudioFeature.MFCC,
      },
      "num_mfcc <= 39",
    ),
  ],
)
def test_impossible_setting_is_named(fields, message):
  with pytest.raises(ValueError, match=message):
    audio.transforms(config_lib.AudioConfig(**fields))
