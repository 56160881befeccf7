"""Recordings: encoded bytes to float32 frames [A, M], and DTMF key tones.

Grain transformations, composed as a list: decode -> (loudness) -> STFT power
spectrogram -> mel bands -> logarithm -> (MFCC: cosine transform) -> z-score.
Loudness and z-score take their statistics from the clip itself. So they need
no statistic of the data set: nothing about one record enters the features of
another, and no privacy budget is spent on normalisation. What draws random
numbers is in `augment_audio`.

Frames start at multiples of the hop, with no padding around the clip: frame i
holds samples [i * hop, i * hop + window). With `center=True` it is librosa's
default instead: half a window of silence on both sides, so that sample i * hop
is the middle of frame i.

With `center=True, decibels=True, top_db=80.0` the features are librosa's own
(`feature.melspectrogram` with `power_to_db`, `feature.mfcc`), transposed.

>>> num_frames(config_lib.AudioConfig())
24
"""

import dataclasses
import functools
import io
import math
from collections.abc import Mapping
from typing import Any, ClassVar

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
_SILENCE = 1e-5  # Amplitude over the largest one.
# Sample rates outside are those of damaged headers.
_MIN_RATE_HZ, _MAX_RATE_HZ = 1_000, 1_000_000
# Floating-point files may pass full scale. Beyond the largest 32-bit integer a
# sample is none, and its square is near the end of float32.
MAX_AMPLITUDE = 2.0**31

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

  | recording | result |
  | --- | --- |
  | WAV, FLAC, OGG and what else libsndfile reads, of any depth | the clip |
  | one sample | it, and silence |
  | no sample, or bytes that are no recording | `BadRecordError` |
  | NaN, infinite, or over `MAX_AMPLITUDE` | `BadRecordError` |
  | a rate under 1 kHz or over 1 MHz | `BadRecordError` |

  Attributes:
    sample_rate_hz: rate of the result.
    max_secs: length of the result.
  """

  sample_rate_hz: int
  max_secs: float

  kind: ClassVar[str] = "decode"

  @property
  def label(self) -> str:
    """Words for a table."""
    return f"{self.sample_rate_hz / 1000:g} kHz mono, {self.max_secs:g} s"

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
    except Exception as error:
      # soundfile's LibsndfileError is a RuntimeError, soxr raises ValueError
      # and TypeError; what damaged bytes raise beside them is not documented.
      raise sources.BadRecordError(
        element["id"],
        f"the recording cannot be decoded ({type(error).__name__}: {error}).",
      ) from error
    return {**element, "audio": waveform}

  def _decode(self, content: bytes) -> np.ndarray:
    """Returns float32 [samples]."""
    with soundfile.SoundFile(io.BytesIO(content)) as file:
      rate_hz = file.samplerate
      if not _MIN_RATE_HZ <= rate_hz <= _MAX_RATE_HZ:
        raise ValueError(f"a sample rate of {rate_hz} Hz")
      wanted = math.ceil((self.max_secs + _RESAMPLER_MARGIN_SECS) * rate_hz)
      channels = file.read(wanted, dtype="float32", always_2d=True)
    if not channels.size:
      raise ValueError("it holds no sample")
    if not np.isfinite(channels).all():
      raise ValueError("a sample is NaN or infinite")
    if np.abs(channels).max() > MAX_AMPLITUDE:
      raise ValueError("a sample is far beyond full scale")
    waveform = channels.mean(axis=1)
    if rate_hz != self.sample_rate_hz:
      waveform = soxr.resample(waveform, rate_hz, self.sample_rate_hz)
    size = round(self.max_secs * self.sample_rate_hz)
    waveform = waveform[:size]
    return np.pad(waveform, (0, size - len(waveform))).astype(np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FixLength(grain.transforms.Map):
  """Waveform [samples] -> [num_samples], cut or padded at its end with silence.

  For clips whose length was changed, as by `augment_audio.TimeStretch`.

  Attributes:
    num_samples: of the result.
  """

  num_samples: int

  kind: ClassVar[str] = "decode"

  def __post_init__(self):
    checks.positive(num_samples=self.num_samples)

  @property
  def label(self) -> str:
    """Words for a table."""
    return f"{self.num_samples} samples"

  def map(self, element: Mapping[str, Any]) -> dict[str, Any]:
    """Cuts or pads the waveform `element["audio"]`."""
    waveform = checked_waveform(element)[: self.num_samples]
    missing = self.num_samples - len(waveform)
    return {**element, "audio": np.pad(waveform, (0, missing))}


def checked_waveform(element: Mapping[str, Any]) -> np.ndarray:
  """Returns the waveform of an element.

  Raises:
    sources.BadRecordError: it has no sample, or one is NaN or infinite.
    ValueError: it is no waveform, so the transforms are in a wrong order.
  """
  waveform = element["audio"]
  if not isinstance(waveform, np.ndarray) or waveform.ndim != 1:
    checks.fail(
      "a waveform [samples]",
      "Put Decode before this transform, and spectra after it.",
      audio=getattr(waveform, "shape", type(waveform).__name__),
    )
  if not waveform.size:
    raise sources.BadRecordError(element["id"], "it holds no sample.")
  if not np.isfinite(waveform).all():
    raise sources.BadRecordError(element["id"], "a sample is NaN or infinite.")
  return waveform


def num_sounding(waveform: np.ndarray) -> int:
  """Samples up to the last one within 100 dB of the loudest.

  What follows is the silence that pads a clip (or, after a resampler, what
  rounding has made of it). It is no part of the recording, so loudness and
  noise are measured without it.
  """
  size = np.abs(waveform)
  sounding = np.flatnonzero(size > _SILENCE * size.max(initial=0))
  return int(sounding[-1]) + 1 if sounding.size else 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loudness(grain.transforms.Map):
  """Waveform float [samples] -> the same at a given RMS level, float32.

  One gain for the whole clip, from its own root mean square, without the
  silence that pads it at its end. 0 dBFS is an RMS of 1, so a sine of full
  scale has -3.01 dBFS. The result may pass full scale and is not cut. Pure
  silence stays. (The gated loudness of ITU-R BS.1770 needs 0.4 s and more;
  many clips are shorter.)

  Attributes:
    target_dbfs: level of the result.
  """

  target_dbfs: float

  kind: ClassVar[str] = "normalisation"

  def __post_init__(self):
    if not -120 <= self.target_dbfs <= 60:
      checks.fail("-120 <= target_dbfs <= 60", target_dbfs=self.target_dbfs)

  @property
  def label(self) -> str:
    """Words for a table."""
    return f"loudness to {self.target_dbfs:g} dBFS RMS"

  def map(self, element: Mapping[str, Any]) -> dict[str, Any]:
    """Scales the waveform `element["audio"]`."""
    waveform = checked_waveform(element).astype(np.float64)
    sounding = waveform[: num_sounding(waveform)]
    if sounding.size:
      rms = math.sqrt(np.square(sounding).mean())
      waveform = waveform * (10 ** (self.target_dbfs / 20) / rms)
    return {**element, "audio": waveform.astype(np.float32)}


def spectrum(
  waveform: np.ndarray, *, window: int, hop: int, center: bool = False
) -> np.ndarray:
  """Short-time Fourier transform with a periodic Hann window.

  Computed in float64: in float32, bands under -120 dB of the loudest would be
  rounding errors.

  Args:
    waveform: float [samples], at least one window long unless centred.
    window: samples per frame.
    hop: samples between frames.
    center: pad with half a window of silence on both sides.

  Returns:
    complex128 [frames, window // 2 + 1], without any normalisation.
  """
  if center:
    waveform = np.pad(waveform, window // 2)
  frames = np.lib.stride_tricks.sliding_window_view(waveform, window)[::hop]
  return scipy.fft.rfft(frames * _hann(window))  # [frames, bins]


@functools.lru_cache(maxsize=16)
def _hann(window: int) -> np.ndarray:
  """Returns the periodic Hann window, float64 [window], read-only."""
  hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
  hann.flags.writeable = False
  return hann


def power_spectrogram(
  waveform: np.ndarray, *, window: int, hop: int, center: bool = False
) -> np.ndarray:
  """Squared magnitude of `spectrum`: float64 [frames, window // 2 + 1]."""
  values = spectrum(waveform, window=window, hop=hop, center=center)
  return values.real**2 + values.imag**2


def to_decibels(power: np.ndarray, *, top_db: float | None) -> np.ndarray:
  """10 log10(power), from `POWER_FLOOR` up.

  Args:
    power: of any shape; 1 is 0 dB.
    top_db: nothing lies further below the largest value than this; None: only
      the floor holds.
  """
  decibels = 10 * np.log10(np.maximum(power, POWER_FLOOR))
  if top_db is not None:
    decibels = np.maximum(decibels, decibels.max() - top_db)
  return decibels


_SPECTROGRAMS = {
  "complex": "complex STFT",
  "magnitude": "STFT magnitude",
  "power": "STFT power",
  "db": "STFT power in dB",
}


def _checked_frames(
  element: Mapping[str, Any], *, window: int, center: bool
) -> np.ndarray:
  """Returns the waveform, which holds at least one frame.

  Raises:
    sources.BadRecordError: it does not, or see `checked_waveform`.
  """
  waveform = checked_waveform(element)
  if not center and len(waveform) < window:
    raise sources.BadRecordError(
      element["id"],
      f"its {len(waveform)} samples do not fill a window of {window}.",
    )
  return waveform


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spectrogram(grain.transforms.Map):
  """Waveform float [samples] -> short-time Fourier transform [A, bins].

  Attributes:
    window: samples per frame; bins = window // 2 + 1.
    hop: samples between frames.
    output: "complex" (complex64), "magnitude", "power" or "db" (float32;
      10 log10 of the power, from -100 dB up).
    center: pad with half a window of silence on both sides.
    top_db: of "db" alone; see `to_decibels`.
  """

  window: int
  hop: int
  output: str = "db"
  center: bool = False
  top_db: float | None = None

  kind: ClassVar[str] = "feature extraction"

  def __post_init__(self):
    checks.positive(window=self.window, hop=self.hop)
    if self.output not in _SPECTROGRAMS:
      checks.fail(f"output to be one of {[*_SPECTROGRAMS]}", output=self.output)
    if self.top_db is not None:
      checks.positive(top_db=self.top_db)
      if self.output != "db":
        checks.fail("output='db' where top_db is set", output=self.output)

  @property
  def label(self) -> str:
    """Words for a table."""
    return f"{_SPECTROGRAMS[self.output]}, window {self.window}, hop {self.hop}"

  def map(self, element: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces the waveform `element["audio"]`."""
    waveform = _checked_frames(element, window=self.window, center=self.center)
    settings = {"window": self.window, "hop": self.hop, "center": self.center}
    if self.output == "complex":
      values = spectrum(waveform, **settings).astype(np.complex64)
      return {**element, "audio": values}
    values = power_spectrogram(waveform, **settings)
    if self.output == "magnitude":
      values = np.sqrt(values)
    elif self.output == "db":
      values = to_decibels(values, top_db=self.top_db)
    return {**element, "audio": values.astype(np.float32)}


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
  """Waveform float [samples] -> log-mel float32 [A, num_mels].

  The logarithm of the power in each band of `mel_filter_bank`, never below that
  of `POWER_FLOOR`: natural (nats), or 10 log10 (decibels).

  Attributes:
    sample_rate_hz: rate of the waveform.
    window: samples per frame.
    hop: samples between frames.
    num_mels: number of bands between `min_hz` and `max_hz`.
    center: pad with half a window of silence on both sides.
    decibels: decibels instead of nats.
    top_db: of decibels alone; see `to_decibels`.
  """

  sample_rate_hz: int
  window: int
  hop: int
  num_mels: int
  min_hz: float
  max_hz: float
  center: bool = False
  decibels: bool = False
  top_db: float | None = None

  kind: ClassVar[str] = "feature extraction"

  def __post_init__(self):
    self._bank()  # A band without a frequency is found here, not in a thread.
    if self.top_db is not None:
      checks.positive(top_db=self.top_db)
      if not self.decibels:
        checks.fail("decibels=True where top_db is set", decibels=False)

  @property
  def label(self) -> str:
    """Words for a table."""
    unit = ", dB" if self.decibels else ""
    return (
      f"log-mel, {self.num_mels} bands{unit}, window {self.window}, hop"
      f" {self.hop}"
    )

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
    """Replaces the waveform `element["audio"]`.

    Raises:
      sources.BadRecordError: the waveform does not fill a window, or holds NaN.
    """
    waveform = _checked_frames(element, window=self.window, center=self.center)
    power = power_spectrogram(
      waveform, window=self.window, hop=self.hop, center=self.center
    )
    mel = power @ self._bank().T
    if self.decibels:
      log_mel = to_decibels(mel, top_db=self.top_db)
    else:
      log_mel = np.log(np.maximum(mel, POWER_FLOOR))
    return {**element, "audio": log_mel.astype(np.float32)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mfcc(grain.transforms.Map):
  """Log-mel [A, num_mels] -> `num_mfcc` cepstral coefficients.

  The orthonormal DCT-II over the bands (Davis and Mermelstein 1980, equation 1,
  https://doi.org/10.1109/TASSP.1980.1163420), without liftering; float32, in
  the unit of the log-mel.

  Attributes:
    num_mfcc: coefficients kept; at most the number of bands.
    first: the lowest of them; from 1 on, a frame's level has no part.
  """

  num_mfcc: int
  first: int = 0

  kind: ClassVar[str] = "feature extraction"

  def __post_init__(self):
    checks.positive(num_mfcc=self.num_mfcc)

  @property
  def label(self) -> str:
    """Words for a table."""
    beginning = f" from {self.first}" if self.first else ""
    return f"MFCC, {self.num_mfcc} coefficients{beginning}"

  def map(self, element: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces the log-mel frames `element["audio"]`."""
    log_mel = element["audio"].astype(np.float64)
    end = self.first + self.num_mfcc
    if end > log_mel.shape[-1]:
      checks.at_most(log_mel.shape[-1] - self.first, num_mfcc=self.num_mfcc)
    cepstrum = scipy.fft.dct(log_mel, type=2, norm="ortho", axis=-1)
    kept = cepstrum[:, self.first : end]
    return {**element, "audio": kept.astype(np.float32)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZScoreClip(grain.transforms.Map):
  """Frames or waveform -> float32 of mean 0, deviation 1 over the clip itself.

  A clip without any variation (pure silence) becomes zeros.
  """

  kind: ClassVar[str] = "normalisation"

  @property
  def label(self) -> str:
    """Words for a table."""
    return "z-score of each clip by itself"

  def map(self, element: Mapping[str, Any]) -> dict[str, Any]:
    """Normalises `element["audio"]`."""
    values = element["audio"].astype(np.float64)
    mean = values.mean()
    centred = values - mean
    std = centred.std()
    # Below this the variation is the rounding of equal numbers, as of float32.
    if std <= 1e-6 * max(abs(mean), 1e-3):
      return {**element, "audio": np.zeros(values.shape, np.float32)}
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
    checks.at_most(
      config.num_mels - config.first_mfcc,
      "There is one per band.",
      num_mfcc=config.num_mfcc,
    )
    chain += (Mfcc(num_mfcc=config.num_mfcc, first=config.first_mfcc),)
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
