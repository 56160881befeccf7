"""Recordings: encoded bytes to float32 frames [A, M], and DTMF key tones.

The chain is decode -> STFT power spectrogram -> mel bands -> logarithm ->
(MFCC: cosine transform) -> z-score. The z-score takes mean and deviation from
the clip itself, all its frames and bands together. So it needs no statistic of
the data set: nothing about one record enters the features of another, and no
privacy budget is spent on normalisation.

Frames start at multiples of the hop, with no padding around the clip: frame i
holds samples [i * hop, i * hop + window).

>>> num_frames(config_lib.AudioConfig())
24
"""

import dataclasses
import functools
import io
import math
from collections.abc import Mapping
from typing import Any

import grain
import numpy as np
import scipy.fft
import soundfile
import soxr

from ppnet import config as config_lib
from ppnet.core import checks
from ppnet.data import sources

# Power below which a band counts as silent; -100 dB under full scale.
POWER_FLOOR = 1e-10
# Read beyond the cut, so that the resampler's filter sees what follows it.
_RESAMPLER_MARGIN_SECS = 0.1

# ITU-T Recommendation Q.23 (1988), section 6, in Hz.
_DTMF_ROWS_HZ = (697.0, 770.0, 852.0, 941.0)
_DTMF_COLUMNS_HZ = (1209.0, 1336.0, 1477.0)
_DTMF_MIN_SECS, _DTMF_MAX_SECS = 0.15, 0.4
_DTMF_TWIST_DB = 3.0
_DTMF_MIN_LEVEL_DB = -20.0
_DTMF_SNR_DB = 10.0  # Either way of even: some tones drown, most do not.


def num_samples(config: config_lib.AudioConfig) -> int:
  """Samples of a clip after cutting or padding to `max_secs`."""
  return round(config.max_secs * config.sample_rate_hz)


def window_samples(config: config_lib.AudioConfig) -> int:
  """Samples of one STFT window."""
  return round(config.window_secs * config.sample_rate_hz)


def hop_samples(config: config_lib.AudioConfig) -> int:
  """Samples between the starts of two frames."""
  return round(config.hop_secs * config.sample_rate_hz)


def num_frames(config: config_lib.AudioConfig) -> int:
  """Frames of every clip: 1 + (samples - window) // hop.

  Raises:
    ValueError: the window or hop rounds to no sample, or a clip is shorter than
      one window.
  """
  remedy = "Raise window_secs, hop_secs or sample_rate_hz."
  checks.positive(
    remedy,
    window_samples=window_samples(config),
    hop_samples=hop_samples(config),
  )
  if num_samples(config) < window_samples(config):
    checks.fail(
      "a clip to hold at least one window",
      "Raise max_secs or lower window_secs.",
      max_secs=config.max_secs,
      window_secs=config.window_secs,
    )
  return config_lib.num_audio_frames(config)


def num_features(config: config_lib.AudioConfig) -> int:
  """Numbers per frame: mel bands, or cepstral coefficients."""
  if config.feature is config_lib.AudioFeature.MFCC:
    return config.num_mfcc
  return config.num_mels


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decode(grain.transforms.Map):
  """Encoded recording -> mono waveform float32 [samples] in [-1, 1].

  Channels are averaged, the rate is converted where it differs, then the clip
  is cut or padded at its end with silence. Only the part that is kept (and a
  tenth of a second more) is ever decoded. A WAV file that was cut short is a
  shorter clip: libsndfile, like every player, trusts the bytes that are there.

  Attributes:
    sample_rate_hz: rate of the result.
    max_secs: length of the result.
  """

  sample_rate_hz: int
  max_secs: float

  def __post_init__(self):
    checks.positive(sample_rate_hz=self.sample_rate_hz, max_secs=self.max_secs)

  def map(self, element: Mapping[str, Any]) -> dict[str, Any]:
    """Decodes `element["audio"]`.

    Raises:
      sources.BadRecordError: there is no recording, or it is not one, holds no
        sample, or a sample is NaN or infinite.
    """
    content = element["audio"]
    if not content:
      raise sources.BadRecordError(
        element["id"],
        "has no recording." if content is None else "the recording is empty.",
      )
    try:
      waveform = self._decode(content)
    except (RuntimeError, ValueError, TypeError) as error:
      # soundfile's LibsndfileError is a RuntimeError; soxr raises the others.
      raise sources.BadRecordError(
        element["id"],
        f"the recording cannot be decoded ({type(error).__name__}: {error}).",
      ) from error
    return {**element, "audio": waveform}

  def _decode(self, content: bytes) -> np.ndarray:
    """Returns float32 [samples]."""
    with soundfile.SoundFile(io.BytesIO(content)) as file:
      rate_hz = file.samplerate
      wanted = math.ceil((self.max_secs + _RESAMPLER_MARGIN_SECS) * rate_hz)
      channels = file.read(wanted, dtype="float32", always_2d=True)
    if not channels.size:
      raise ValueError("it holds no sample")
    if not np.isfinite(channels).all():
      raise ValueError("a sample is NaN or infinite")
    waveform = channels.mean(axis=1)
    if rate_hz != self.sample_rate_hz:
      waveform = soxr.resample(waveform, rate_hz, self.sample_rate_hz)
    size = round(self.max_secs * self.sample_rate_hz)
    waveform = waveform[:size]
    return np.pad(waveform, (0, size - len(waveform))).astype(np.float32)


def power_spectrogram(
  waveform: np.ndarray, *, window: int, hop: int
) -> np.ndarray:
  """Squared magnitude of the short-time Fourier transform.

  Args:
    waveform: float [samples], at least one window long.
    window: samples per frame, weighted by a periodic Hann window.
    hop: samples between frames.

  Returns:
    float64 [frames, window // 2 + 1], without any normalisation.
  """
  frames = np.lib.stride_tricks.sliding_window_view(waveform, window)[::hop]
  hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
  spectrum = np.fft.rfft(frames.astype(np.float64) * hann)  # [frames, bins]
  return spectrum.real**2 + spectrum.imag**2


def hz_to_mel(frequency_hz: np.ndarray) -> np.ndarray:
  """Slaney's mel scale: linear below 1 kHz, logarithmic above.

  mel = 3 f / 200 up to 1000 Hz (15 mel), then 27 mel per factor 6.4. Source:
  Slaney 1998, Auditory Toolbox version 2, Interval Research Technical Report
  1998-010, function `mfcc`. (HTK's 2595 log10(1 + f / 700) is another scale.)
  """
  frequency_hz = np.asarray(frequency_hz, np.float64)
  above = 15 + 27 * np.log(np.maximum(frequency_hz, 1000) / 1000) / np.log(6.4)
  return np.where(frequency_hz < 1000, 3 * frequency_hz / 200, above)


def mel_to_hz(mel: np.ndarray) -> np.ndarray:
  """The inverse of `hz_to_mel`."""
  mel = np.asarray(mel, np.float64)
  above = 1000 * 6.4 ** ((np.maximum(mel, 15) - 15) / 27)
  return np.where(mel < 15, 200 * mel / 3, above)


@functools.lru_cache(maxsize=16)
def mel_filter_bank(
  *,
  sample_rate_hz: int,
  window: int,
  num_mels: int,
  min_hz: float,
  max_hz: float,
) -> np.ndarray:
  """Triangles that are equally spaced in mel, each of area 1 over Hz.

  Band m rises from corner m to corner m + 1 and falls to corner m + 2, where
  the num_mels + 2 corners divide [min_hz, max_hz] evenly in mel; its height is
  2 / (corner m + 2 - corner m). Source: as `hz_to_mel`; these are librosa's
  defaults (htk=False, norm="slaney").

  Args:
    sample_rate_hz: rate of the waveform.
    window: samples per frame.
    num_mels: number of bands.
    min_hz: lowest corner.
    max_hz: highest corner, at most half the rate.

  Returns:
    float64 [num_mels, window // 2 + 1]; read-only, as it is shared.

  Raises:
    ValueError: the corners are out of order or above half the rate, or a band
      is so narrow that it holds no frequency of the transform.
  """
  checks.positive(num_mels=num_mels, max_hz=max_hz)
  checks.non_negative(min_hz=min_hz)
  if not min_hz < max_hz <= sample_rate_hz / 2:
    checks.fail(
      "min_hz < max_hz <= sample_rate_hz / 2",
      min_hz=min_hz,
      max_hz=max_hz,
      sample_rate_hz=sample_rate_hz,
    )
  lowest, highest = hz_to_mel(np.array([min_hz, max_hz]))
  corners_hz = mel_to_hz(np.linspace(lowest, highest, num_mels + 2))
  lower, centre, upper = corners_hz[:-2], corners_hz[1:-1], corners_hz[2:]
  bins_hz = np.arange(window // 2 + 1) * (sample_rate_hz / window)
  rising = (bins_hz - lower[:, None]) / (centre - lower)[:, None]
  falling = (upper[:, None] - bins_hz) / (upper - centre)[:, None]
  bank = np.maximum(0, np.minimum(rising, falling))
  bank *= (2 / (upper - lower))[:, None]
  empty = np.flatnonzero(bank.sum(axis=1) == 0)
  if empty.size:
    checks.fail(
      "every mel band to hold a frequency of the transform",
      f"Band {empty[0]} holds none. Lower num_mels or raise window_secs.",
      num_mels=num_mels,
      window=window,
    )
  bank.flags.writeable = False
  return bank


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogMel(grain.transforms.Map):
  """Waveform float [samples] -> log-mel float64 [A, num_mels] in nats.

  The natural logarithm of the power in each band of `mel_filter_bank`, never
  below log(POWER_FLOOR).

  Attributes:
    sample_rate_hz: rate of the waveform.
    window: samples per frame.
    hop: samples between frames.
    num_mels: number of bands between `min_hz` and `max_hz`.
  """

  sample_rate_hz: int
  window: int
  hop: int
  num_mels: int
  min_hz: float
  max_hz: float

  def __post_init__(self):
    self._bank()  # A band without a frequency is found here, not in a thread.

  def _bank(self) -> np.ndarray:
    """Returns the filter bank of these settings."""
    return mel_filter_bank(
      sample_rate_hz=self.sample_rate_hz,
      window=self.window,
      num_mels=self.num_mels,
      min_hz=self.min_hz,
      max_hz=self.max_hz,
    )

  def map(self, element: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces the waveform `element["audio"]`."""
    power = power_spectrogram(
      element["audio"], window=self.window, hop=self.hop
    )
    mel = np.maximum(power @ self._bank().T, POWER_FLOOR)
    return {**element, "audio": np.log(mel)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mfcc(grain.transforms.Map):
  """Log-mel [A, num_mels] -> the first `num_mfcc` cepstral coefficients.

  The orthonormal DCT-II over the bands (Davis and Mermelstein 1980, equation 1,
  https://doi.org/10.1109/TASSP.1980.1163420), without liftering.

  Attributes:
    num_mfcc: coefficients kept; at most the number of bands.
  """

  num_mfcc: int

  def map(self, element: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces the log-mel frames `element["audio"]`."""
    cepstrum = scipy.fft.dct(element["audio"], type=2, norm="ortho", axis=-1)
    return {**element, "audio": cepstrum[:, : self.num_mfcc]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZScoreClip(grain.transforms.Map):
  """Frames -> float32 with mean 0 and deviation 1 over the clip itself.

  A clip without any variation (pure silence) becomes zeros.
  """

  def map(self, element: Mapping[str, Any]) -> dict[str, Any]:
    """Normalises `element["audio"]`."""
    frames = element["audio"]
    centred = frames - frames.mean()
    # Rounding alone gives a constant clip a deviation of about 1e-15.
    std = max(centred.std(), 1e-6)
    return {**element, "audio": (centred / std).astype(np.float32)}


def transforms(
  config: config_lib.AudioConfig,
) -> tuple[grain.transforms.Map, ...]:
  """Returns the transformations from encoded recording to frames.

  Raises:
    ValueError: the settings cannot be met; see `num_frames`,
      `mel_filter_bank`, and num_mfcc > num_mels.
  """
  num_frames(config)  # Raises where a clip holds no frame.
  chain: tuple[grain.transforms.Map, ...] = (
    Decode(sample_rate_hz=config.sample_rate_hz, max_secs=config.max_secs),
    LogMel(
      sample_rate_hz=config.sample_rate_hz,
      window=window_samples(config),
      hop=hop_samples(config),
      num_mels=config.num_mels,
      min_hz=config.min_hz,
      max_hz=config.max_hz,
    ),
  )
  if config.feature is config_lib.AudioFeature.MFCC:
    checks.positive(num_mfcc=config.num_mfcc)
    checks.at_most(
      config.num_mels, "There is one per band.", num_mfcc=config.num_mfcc
    )
    chain += (Mfcc(num_mfcc=config.num_mfcc),)
  return (*chain, ZScoreClip())


def dtmf_frequencies_hz(digit: int) -> tuple[float, float]:
  """Returns the row and the column frequency of a key (ITU-T Q.23, table 1)."""
  if not 0 <= digit <= 9:
    checks.fail("a digit from 0 to 9", digit=digit)
  if digit == 0:
    return _DTMF_ROWS_HZ[3], _DTMF_COLUMNS_HZ[1]
  row, column = divmod(digit - 1, 3)
  return _DTMF_ROWS_HZ[row], _DTMF_COLUMNS_HZ[column]


def dtmf_tone(
  digit: int,
  rng: np.random.Generator,
  *,
  sample_rate_hz: int,
  max_secs: float,
) -> np.ndarray:
  """Makes one noisy recording of a telephone key.

  The clip is `max_secs` long. White noise fills it, and somewhere in it the key
  is held for 0.15 to 0.4 s. Drawn from `rng`: how long, from when, both phases,
  the twist (column over row level, -3 to 3 dB), the signal-to-noise ratio while
  the key is held (-10 to 10 dB), and the peak of the clip (-20 to 0 dB relative
  to full scale).

  Args:
    digit: the key, 0 to 9.
    rng: the only source of randomness.
    sample_rate_hz: more than twice the highest frequency, 1477 Hz.
    max_secs: length of the clip, at least 0.15 s.

  Returns:
    float32 [round(max_secs * sample_rate_hz)] in [-1, 1].

  Raises:
    ValueError: an argument is out of range.
  """
  row_hz, column_hz = dtmf_frequencies_hz(digit)
  if sample_rate_hz <= 2 * _DTMF_COLUMNS_HZ[-1]:
    checks.fail(
      f"sample_rate_hz > {2 * _DTMF_COLUMNS_HZ[-1]:.0f} to hold a key tone",
      "Use 8000, the rate of telephony.",
      sample_rate_hz=sample_rate_hz,
    )
  if max_secs < _DTMF_MIN_SECS:
    checks.fail(
      f"max_secs >= {_DTMF_MIN_SECS} to hold a key tone",
      "Raise config.data.audio.max_secs.",
      max_secs=max_secs,
    )
  size = round(max_secs * sample_rate_hz)
  tone_secs = rng.uniform(_DTMF_MIN_SECS, min(_DTMF_MAX_SECS, max_secs))
  tone_size = min(size, round(tone_secs * sample_rate_hz))
  start = rng.integers(size - tone_size + 1)
  row_phase, column_phase = rng.uniform(0, 2 * np.pi, 2)
  twist = 10 ** (rng.uniform(-_DTMF_TWIST_DB, _DTMF_TWIST_DB) / 20)
  snr = 10 ** (rng.uniform(-_DTMF_SNR_DB, _DTMF_SNR_DB) / 10)
  peak = 10 ** (rng.uniform(_DTMF_MIN_LEVEL_DB, 0) / 20)

  radians = 2 * np.pi * np.arange(tone_size) / sample_rate_hz
  tone = np.sin(row_hz * radians + row_phase)
  tone += twist * np.sin(column_hz * radians + column_phase)
  tone_power = (1 + twist**2) / 2
  clip = rng.normal(0, math.sqrt(tone_power / snr), size)
  clip[start : start + tone_size] += tone
  return (clip * (peak / np.abs(clip).max())).astype(np.float32)


def encode_wav(waveform: np.ndarray, *, sample_rate_hz: int) -> bytes:
  """Returns float [samples] in [-1, 1] as 16-bit PCM WAV."""
  buffer = io.BytesIO()
  soundfile.write(
    buffer, waveform, sample_rate_hz, format="WAV", subtype="PCM_16"
  )
  return buffer.getvalue()
