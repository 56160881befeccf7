"""Longer or shorter at the same pitch, higher or lower at the same length.

`stretch` is a phase vocoder with identity phase locking (Laroche and Dolson
1999, "Improved phase vocoder time-scale modification of audio", section III.C,
https://doi.org/10.1109/89.759041). Frames of the result are a quarter of a
window apart; each is a frame of the recording, taken at the time that it
stands for, with its phases turned so that it continues the frame before. How
far the phase of a partial moves in one hop is read from the recording one hop
earlier, so that no frequency has to be estimated and no phase unwrapped: a
steady tone keeps its frequency exactly. All bins around a peak are turned
together, which keeps the shape of a partial.

`shift_pitch` stretches and then resamples. Formants move with the pitch, as on
a record that is played faster.

>>> stretch(np.ones(1000, np.float32), rate=0.8, window=64).shape
(1250,)
"""

import numpy as np
import scipy.fft
import soxr

from ppnet.core import checks

# A product of two bins below this has no phase that float32 could tell.
_QUIET = 1e-30
_OVERLAP = 4  # Frames over every sample. Hann squared then adds up to 1.5.


def check_window(window: int) -> None:
  """Raises `ValueError` if a window cannot be divided into hops."""
  if window < 2 * _OVERLAP or window % _OVERLAP:
    checks.fail(
      f"window to be a multiple of {_OVERLAP}, at least {2 * _OVERLAP}",
      "Take about 50 ms.",
      window=window,
    )


def stretch(waveform: np.ndarray, *, rate: float, window: int) -> np.ndarray:
  """Plays a recording `rate` times as fast, at its own pitch.

  Args:
    waveform: float [samples], one or more, finite.
    rate: above 1 is faster and shorter.
    window: samples of a frame, a multiple of 4. Partials that are closer than
      about four bins (4 / window of the sample rate) are treated as one.

  Returns:
    float32 [max(1, round(samples / rate))].

  Raises:
    ValueError: `rate` is not positive, or the window is none.
  """
  checks.positive(rate=rate)
  check_window(window)
  waveform = np.asarray(waveform, np.float32)
  hop, half = window // _OVERLAP, window // 2
  size = max(1, round(len(waveform) / rate))
  num_frames = -(-size // hop) + 1
  # Which sample each frame of the result has in its middle.
  middles = np.rint(np.arange(num_frames) * (hop * rate)).astype(np.int64)
  after = max(0, int(middles[-1]) + half - len(waveform))
  padded = np.pad(waveform, (half + hop, after))
  windows = np.lib.stride_tricks.sliding_window_view(padded, window)
  hann = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)).astype(
    np.float32
  )
  now = scipy.fft.rfft(windows[middles + hop] * hann)  # complex64 [T, bins]
  before = scipy.fft.rfft(windows[middles] * hann)  # One hop earlier.
  frames = scipy.fft.irfft(now * _turns(now, before), n=window) * hann

  blocks = np.zeros((num_frames + _OVERLAP - 1, hop), np.float32)
  weights = np.zeros_like(blocks)
  for i in range(_OVERLAP):
    part = slice(i * hop, (i + 1) * hop)
    blocks[i : i + num_frames] += frames[:, part]
    weights[i : i + num_frames] += np.square(hann[part])
  result = blocks.ravel()[half : half + size]
  return result / weights.ravel()[half : half + size]


def _turns(now: np.ndarray, before: np.ndarray) -> np.ndarray:
  """Returns by how much each bin of each frame is turned, of magnitude 1.

  Args:
    now: complex64 [T, bins], the frames.
    before: the recording one hop before each of them.

  Returns:
    complex64 [T, bins]. Frame t of the result, now[t] * turns[t], has at every
    peak the phase of its frame t - 1 plus what the recording's phase moves in
    one hop.
  """
  step = now[:-1] * before[1:].conj()  # [T - 1, bins]
  size = np.abs(step)
  has_phase = size > _QUIET
  step = np.where(has_phase, step / np.where(has_phase, size, 1), 1)
  peaks = _nearest_peaks(now)[1:]
  step = np.take_along_axis(step, peaks, axis=1).astype(np.complex64)
  turns = np.ones_like(now)
  for t in range(len(step)):  # Each frame needs the one before: no other way.
    turns[t + 1] = step[t] * turns[t, peaks[t]]
  return turns


def _nearest_peaks(values: np.ndarray) -> np.ndarray:
  """Returns for each bin of each frame the bin of its nearest peak, i64.

  A peak is larger than the two bins on either side of it. In a frame without
  any (silence), every bin is its own.
  """
  num_bins = values.shape[1]
  power = np.pad(values.real**2 + values.imag**2, ((0, 0), (2, 2)))
  middle = power[:, 2:-2]
  is_peak = (
    (middle > power[:, 1:-3])
    & (middle >= power[:, 3:-1])
    & (middle > power[:, :-4])
    & (middle >= power[:, 4:])
  )
  bins = np.arange(num_bins)
  left = np.maximum.accumulate(np.where(is_peak, bins, -num_bins), axis=1)
  right = np.where(is_peak, bins, 2 * num_bins)[:, ::-1]
  right = np.minimum.accumulate(right, axis=1)[:, ::-1]
  nearest = np.where(bins - left <= right - bins, left, right)
  return np.where(is_peak.any(axis=1, keepdims=True), nearest, bins)


def shift_pitch(
  waveform: np.ndarray, *, semitones: float, window: int
) -> np.ndarray:
  """Moves every frequency by the factor 2 ** (semitones / 12).

  What would pass half the sample rate is lost.

  Args:
    waveform: float [samples], one or more, finite.
    semitones: up, if positive.
    window: of `stretch`.

  Returns:
    float32 [samples], as many as before.

  Raises:
    ValueError: as `stretch`.
  """
  factor = 2 ** (semitones / 12)
  longer = stretch(waveform, rate=1 / factor, window=window)
  shifted = soxr.resample(longer, factor, 1.0)[: len(waveform)]
  missing = len(waveform) - len(shifted)  # One sample, by rounding.
  return np.pad(shifted, (0, missing)).astype(np.float32)
