"""Recordings, changed at random: noise, speed and pitch.

Each is a Grain random transformation of a waveform float [samples], so it
stands after `audio.Decode` and before any spectrum.

Everything random comes from the generator that is given; see
`randomness.generator`.

>>> clip = np.sin(np.arange(800, dtype=np.float32))
>>> noise = AddNoise(min_snr_db=10.0, max_snr_db=10.0)
>>> rng = np.random.default_rng(0)
>>> noisy = noise.random_map({"id": "a", "audio": clip}, rng)["audio"]
>>> added = noisy - clip
>>> round(float(10 * np.log10(np.square(clip).sum() / np.square(added).sum())))
10
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import grain
import numpy as np

from ppnet.core import checks
from ppnet.data import audio as audio_lib
from ppnet.data import phase_vocoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class AddNoise(grain.transforms.RandomMap):
  """Adds white Gaussian noise at a signal-to-noise ratio.

  The ratio of the clip's energy to that of the noise is exactly what was drawn:
  the noise is scaled by its own root mean square, not by its expected one. The
  silence that pads a clip at its end stays silent, so the ratio is that of the
  recording, whatever it is padded to. Pure silence stays.

  Attributes:
    min_snr_db: the ratio is uniform in decibels, from this
    max_snr_db: to this.
  """

  min_snr_db: float
  max_snr_db: float

  kind: ClassVar[str] = "augmentation"

  def __post_init__(self):
    _check_range(min_snr_db=self.min_snr_db, max_snr_db=self.max_snr_db)
    if max(-self.min_snr_db, self.max_snr_db) > 200:
      checks.fail(
        "ratios between -200 and 200 dB",
        min_snr_db=self.min_snr_db,
        max_snr_db=self.max_snr_db,
      )

  @property
  def label(self) -> str:
    """Words for a table."""
    return f"noise at {_interval(self.min_snr_db, self.max_snr_db)} dB SNR"

  def random_map(
    self, element: Mapping[str, Any], rng: np.random.Generator
  ) -> dict[str, Any]:
    """Adds noise to the waveform `element["audio"]`; float32."""
    waveform = audio_lib.checked_waveform(element)
    snr_db = _uniform(rng, self.min_snr_db, self.max_snr_db)
    size = audio_lib.num_sounding(waveform)
    noise = rng.standard_normal(size)
    if not size:
      return dict(element)
    sounding = waveform[:size].astype(np.float64)
    energy_ratio = np.square(sounding).sum() / np.square(noise).sum()
    noise *= math.sqrt(energy_ratio) * 10 ** (-snr_db / 20)
    noisy = waveform.astype(np.float32)  # A copy.
    noisy[:size] = sounding + noise
    return {**element, "audio": noisy}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimeStretch(grain.transforms.RandomMap):
  """Plays the clip faster or slower, at its own pitch.

  The result has max(1, round(samples / rate)) samples: `audio.FixLength` after
  it brings all to one length again. See `phase_vocoder.stretch`.

  Attributes:
    min_rate: the rate is drawn with a uniform logarithm, from this
    max_rate: to this; above 1 is faster and shorter.
    window: samples of the phase vocoder's window, a multiple of 4; about 50 ms.
  """

  min_rate: float
  max_rate: float
  window: int = 512

  kind: ClassVar[str] = "augmentation"

  def __post_init__(self):
    _check_range(min_rate=self.min_rate, max_rate=self.max_rate)
    if not (self.min_rate >= 0.1 and self.max_rate <= 10):
      checks.fail(
        "rates between 0.1 and 10",
        min_rate=self.min_rate,
        max_rate=self.max_rate,
      )
    phase_vocoder.check_window(self.window)

  @property
  def label(self) -> str:
    """Words for a table."""
    return f"time stretch × {_interval(self.min_rate, self.max_rate)}"

  def random_map(
    self, element: Mapping[str, Any], rng: np.random.Generator
  ) -> dict[str, Any]:
    """Stretches the waveform `element["audio"]`; float32."""
    waveform = audio_lib.checked_waveform(element)
    low, high = math.log(self.min_rate), math.log(self.max_rate)
    rate = math.exp(_uniform(rng, low, high))
    stretched = phase_vocoder.stretch(waveform, rate=rate, window=self.window)
    return {**element, "audio": stretched}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PitchShift(grain.transforms.RandomMap):
  """Moves the pitch up or down; the length stays. See `phase_vocoder`.

  Attributes:
    max_semitones: the shift is uniform in [-max_semitones, max_semitones]; at
      most 24.
    window: as that of `TimeStretch`.
  """

  max_semitones: float
  window: int = 512

  kind: ClassVar[str] = "augmentation"

  def __post_init__(self):
    checks.non_negative(max_semitones=self.max_semitones)
    checks.at_most(24, max_semitones=self.max_semitones)
    phase_vocoder.check_window(self.window)

  @property
  def label(self) -> str:
    """Words for a table."""
    return f"pitch shift up to ±{self.max_semitones:g} semitones"

  def random_map(
    self, element: Mapping[str, Any], rng: np.random.Generator
  ) -> dict[str, Any]:
    """Shifts the waveform `element["audio"]`; float32."""
    waveform = audio_lib.checked_waveform(element)
    shifted = phase_vocoder.shift_pitch(
      waveform,
      semitones=_uniform(rng, -self.max_semitones, self.max_semitones),
      window=self.window,
    )
    return {**element, "audio": shifted}


def _uniform(rng: np.random.Generator, low: float, high: float) -> float:
  """A number in [low, high); `low` itself where they are equal."""
  return low + (high - low) * rng.random()


def _interval(low: float, high: float) -> str:
  """Words for a range that may be one number."""
  return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _check_range(**values: float) -> None:
  """Raises `ValueError` unless two named values are finite and in order."""
  (low_name, low), (high_name, high) = values.items()
  if not (math.isfinite(low) and math.isfinite(high) and low <= high):
    checks.fail(f"finite {low_name} <= {high_name}", **values)
