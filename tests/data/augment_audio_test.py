"""Tests of ppnet.data.augment_audio and ppnet.data.phase_vocoder, on tones."""

import dataclasses

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from ppnet.data import augment_audio, phase_vocoder, sources

_RATE_HZ = 8000


def _tone(hz, *, secs=0.8, rate_hz=_RATE_HZ, level=0.4):
  time = np.arange(round(secs * rate_hz)) / rate_hz
  return (level * np.sin(2 * np.pi * hz * time)).astype(np.float32)


def _apply(transform, clip, *, seed=0):
  rng = np.random.default_rng(seed)
  return transform.random_map({"id": "r4", "audio": clip}, rng)["audio"]


def _frequency_hz(clip, *, rate_hz=_RATE_HZ) -> float:
  """The strongest frequency, to a fiftieth of a hertz, of the middle part."""
  middle = clip[len(clip) // 8 : -len(clip) // 8].astype(np.float64)
  size = 50 * rate_hz
  spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle)), size))
  return float(spectrum.argmax()) / 50


def _cents(ratio) -> float:
  return 1200 * np.log2(ratio)


def _snr_db(clip, noisy) -> float:
  """Over the whole clip, as anyone would measure it."""
  clip = clip.astype(np.float64)
  noise = noisy - clip
  return 10 * np.log10(np.sum(clip**2) / np.sum(noise**2))


# Noise.


@pytest.mark.parametrize("snr_db", [-5.0, 0.0, 3.0, 20.0, 40.0])
@pytest.mark.parametrize("padding", [0, 5000])
def test_snr_comes_out_as_asked(snr_db, padding):
  clip = np.pad(_tone(440, level=0.07), (0, padding))
  noise = augment_audio.AddNoise(min_snr_db=snr_db, max_snr_db=snr_db)
  noisy = _apply(noise, clip)
  assert _snr_db(clip, noisy) == pytest.approx(snr_db, abs=1e-3)
  assert noisy.dtype == np.float32
  np.testing.assert_array_equal(noisy[len(clip) - padding :], 0)
  # Fails if: amplitudes are scaled by the power ratio, or padding is counted.


def test_snr_is_uniform_between_its_ends():
  clip = _tone(300)
  noise = augment_audio.AddNoise(min_snr_db=4.0, max_snr_db=10.0)
  ratios = np.sort(
    [_snr_db(clip, _apply(noise, clip, seed=i)) for i in range(200)]
  )
  assert ratios[0] >= 4 - 1e-3
  assert ratios[-1] <= 10 + 1e-3
  uniform = 4 + 6 * (np.arange(200) + 0.5) / 200
  assert np.abs(ratios - uniform).max() < 6 * 1.95 / np.sqrt(200)


def test_noise_is_white_and_gaussian():
  clip = _tone(300, secs=4)
  noise = (
    _apply(augment_audio.AddNoise(min_snr_db=0, max_snr_db=0), clip) - clip
  )
  noise /= noise.std()
  assert abs(noise.mean()) < 4 / np.sqrt(noise.size)
  assert np.mean(noise**4) == pytest.approx(3, abs=0.15)
  halves = np.array_split(np.abs(np.fft.rfft(noise)[1:-1]) ** 2, 4)
  powers = np.array([half.mean() for half in halves])
  assert powers.max() / powers.min() < 1.12
  assert abs(np.corrcoef(noise, clip)[0, 1]) < 4 / np.sqrt(noise.size)


def test_silence_gets_no_noise():
  silence = np.zeros(100, np.float32)
  noise = augment_audio.AddNoise(min_snr_db=0, max_snr_db=10)
  np.testing.assert_array_equal(_apply(noise, silence), silence)


# Stretch and shift.


@pytest.mark.parametrize("rate_hz", [8000, 16000])
@pytest.mark.parametrize("hz", [110.0, 441.3, 1000.0, 2500.0])
@pytest.mark.parametrize("rate", [0.5, 0.83, 1.0, 1.21, 2.0])
def test_stretch_keeps_pitch_and_level_and_gives_the_length(hz, rate, rate_hz):
  tone = _tone(hz, rate_hz=rate_hz)
  result = phase_vocoder.stretch(tone, rate=rate, window=512)
  assert len(result) == round(len(tone) / rate)
  assert result.dtype == np.float32
  moved = _cents(_frequency_hz(result, rate_hz=rate_hz) / hz)
  assert abs(moved) < 1
  middle = result[len(result) // 4 : -len(result) // 4]
  assert middle.std() == pytest.approx(0.4 / np.sqrt(2), rel=0.01)
  # Fails if: frames are joined without turning their phases.


@pytest.mark.parametrize("hz", [150.0, 441.3, 1200.0])
@pytest.mark.parametrize("semitones", [-7.0, -0.5, 0.0, 0.5, 4.0, 12.0])
def test_shift_moves_pitch_as_asked_and_keeps_length(hz, semitones):
  tone = _tone(hz)
  result = phase_vocoder.shift_pitch(tone, semitones=semitones, window=512)
  assert len(result) == len(tone)
  assert result.dtype == np.float32
  moved = _cents(_frequency_hz(result) / hz)
  assert moved == pytest.approx(100 * semitones, abs=1)
  middle = result[len(result) // 4 : -len(result) // 4]
  assert middle.std() == pytest.approx(0.4 / np.sqrt(2), rel=0.02)
  # Fails if: the resampler's two rates are exchanged.


def test_two_tones_and_a_chord_keep_their_distance():
  chord = _tone(300) + _tone(900, level=0.2) + _tone(2100, level=0.1)
  result = phase_vocoder.stretch(chord, rate=0.8, window=512)
  middle = result[1000:-1000].astype(np.float64)
  spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle)), 80000))
  for hz, level in [(300, 0.4), (900, 0.2), (2100, 0.1)]:
    part = spectrum[10 * hz - 200 : 10 * hz + 200]
    assert abs(int(part.argmax()) - 200) <= 3  # 0.3 Hz.
    assert part.max() / spectrum.max() == pytest.approx(level / 0.4, rel=0.03)


@pytest.mark.parametrize("rate", [0.7, 1.3])
def test_stretch_moves_events_in_time(rate):
  clip = np.zeros(8000, np.float32)
  clip[2000:2400] = _tone(700, secs=0.05)
  clip[6000:6400] = _tone(700, secs=0.05)
  result = phase_vocoder.stretch(clip, rate=rate, window=256)
  energy = np.convolve(result**2, np.ones(400), "same")
  half = len(result) // 2
  first, second = energy[:half].argmax(), half + energy[half:].argmax()
  assert abs(first - 2200 / rate) < 150
  assert abs(second - 6200 / rate) < 150


def test_rate_of_one_and_shift_of_zero_change_nothing():
  noise = np.random.default_rng(1).normal(0, 0.3, 3001).astype(np.float32)
  same = phase_vocoder.stretch(noise, rate=1.0, window=128)
  np.testing.assert_allclose(same, noise, atol=1e-5)
  same = phase_vocoder.shift_pitch(noise, semitones=0.0, window=128)
  np.testing.assert_allclose(same, noise, atol=1e-5)


@hypothesis.given(
  size=st.integers(1, 1500),
  rate=st.floats(0.1, 10),
  quarter=st.integers(2, 100),
  silent=st.booleans(),
)
def test_any_length_is_exact_and_finite(size, rate, quarter, silent):
  clip = np.random.default_rng(size).normal(0, 0.2, size).astype(np.float32)
  clip *= not silent
  window = 4 * quarter
  result = phase_vocoder.stretch(clip, rate=rate, window=window)
  assert result.shape == (max(1, round(size / rate)),)
  assert np.isfinite(result).all()
  assert np.abs(result).max() <= 40 * np.abs(clip).max()
  semitones = min(24.0, max(-24.0, 12 * np.log2(rate)))
  shifted = phase_vocoder.shift_pitch(clip, semitones=semitones, window=window)
  assert shifted.shape == (size,)
  assert np.isfinite(shifted).all()
  if silent:
    assert not result.any()
    assert not shifted.any()


def test_drawn_rates_and_shifts_fill_their_range():
  tone = _tone(500, secs=0.3)
  stretch = augment_audio.TimeStretch(min_rate=0.8, max_rate=1.25, window=256)
  rates = np.array(
    [2400 / len(_apply(stretch, tone, seed=i)) for i in range(80)]
  )
  assert rates.min() >= 0.799
  assert rates.max() <= 1.251
  assert rates.min() < 0.83
  assert rates.max() > 1.2
  assert abs(np.log(rates).mean()) < 0.06  # Slower as often as faster.
  shift = augment_audio.PitchShift(max_semitones=2.0, window=256)
  moved = np.array(
    [
      _cents(_frequency_hz(_apply(shift, tone, seed=i)) / 500)
      for i in range(40)
    ]
  )
  assert np.abs(moved).max() <= 202
  assert moved.min() < -150
  assert moved.max() > 150


# All of them.

_ALL = (
  augment_audio.AddNoise(min_snr_db=0, max_snr_db=10),
  augment_audio.TimeStretch(min_rate=0.8, max_rate=1.2),
  augment_audio.PitchShift(max_semitones=2),
)


@pytest.mark.parametrize("transform", _ALL, ids=lambda t: type(t).__name__)
def test_result_depends_on_the_generator_alone_and_leaves_its_argument(
  transform,
):
  clip = _tone(440)
  kept = clip.copy()
  clip.flags.writeable = False
  first, again, other = (_apply(transform, clip, seed=i) for i in (1, 1, 2))
  np.testing.assert_array_equal(first, again)
  assert first.shape != other.shape or not np.array_equal(first, other)
  np.testing.assert_array_equal(clip, kept)


@pytest.mark.parametrize("transform", _ALL, ids=lambda t: type(t).__name__)
def test_unusable_waveform_names_the_record(transform):
  for clip, cause in [
    (np.zeros(0, np.float32), "no sample"),
    (np.array([0.1, np.nan], np.float32), "NaN"),
  ]:
    with pytest.raises(sources.BadRecordError, match=f"'r4'.*{cause}"):
      _apply(transform, clip)
  one = _apply(transform, np.array([0.5], np.float32))
  assert np.isfinite(one).all()
  assert one.shape == (1,)


@pytest.mark.parametrize("transform", _ALL, ids=lambda t: type(t).__name__)
def test_transform_is_plain_data_with_words(transform):
  fields = dataclasses.asdict(transform)
  assert type(transform)(**fields) == transform
  assert all(isinstance(value, int | float) for value in fields.values())
  assert transform.kind == "augmentation"
  assert transform.label


@pytest.mark.parametrize(
  ("name", "options", "message"),
  [
    ("AddNoise", {"min_snr_db": 3, "max_snr_db": 1}, "min_snr_db <= max"),
    ("AddNoise", {"min_snr_db": 0, "max_snr_db": np.inf}, "finite"),
    ("AddNoise", {"min_snr_db": 0, "max_snr_db": 500}, "200 dB"),
    ("TimeStretch", {"min_rate": 0.0, "max_rate": 1}, "between 0.1 and 10"),
    ("TimeStretch", {"min_rate": 2, "max_rate": 1}, "min_rate <= max_rate"),
    ("TimeStretch", {"min_rate": 1, "max_rate": 1, "window": 30}, "multiple"),
    ("PitchShift", {"max_semitones": -1}, "max_semitones >= 0"),
    ("PitchShift", {"max_semitones": 25}, "max_semitones <= 24"),
  ],
)  # fmt: skip
def test_impossible_setting_is_named(name, options, message):
  with pytest.raises(ValueError, match=message):
    getattr(augment_audio, name)(**options)
