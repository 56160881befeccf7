"""Makes `features.npz`: what librosa and Kymatio compute from made signals.

  python -m tests.goldens.make_features      (with librosa and kymatio at hand)

Every signal is made by this file, so that only results are stored. Made again
only when a case is added: the numbers are another library's.
"""

import pathlib
import types

import numpy as np

PATH = pathlib.Path(__file__).parent / "features.npz"

# name: sample rate, samples, window, hop, bands, corners in Hz, MFCCs, center.
# Every size differs from every other one, so that no two axes can be swapped.
AUDIO = {
  "telephone": (8000, 3217, 256, 128, 40, (300.0, 4000.0), 20, False),
  "speech": (16000, 6001, 400, 160, 64, (20.0, 7600.0), 13, True),
  "defaults": (22050, 7000, 2048, 512, 128, (0.0, 11025.0), 20, True),
}
# name: pictures, height, width, scales, angles.
SCATTERING = {"fashion": (1, 28, 28, 2, 8), "oblong": (2, 13, 22, 2, 3)}


def waveform(name: str) -> np.ndarray:
  """A chirp, two tones and noise that comes and goes: float32 [samples]."""
  rate_hz, size = AUDIO[name][:2]
  rng = np.random.Generator(np.random.PCG64(len(name)))
  time = np.arange(size) / rate_hz
  end_hz = 0.45 * rate_hz
  chirp = np.sin(np.pi * end_hz / time[-1] * time**2)
  tones = np.sin(2 * np.pi * 441 * time) + np.sin(2 * np.pi * 1234 * time)
  noise = 2 * rng.random(size) - 1
  swell = np.sin(7 * np.pi * time / time[-1]) ** 2
  return (0.3 * chirp + 0.1 * tones + 0.05 * swell * noise).astype(np.float32)


def pictures(name: str) -> np.ndarray:
  """Random pixels over a ramp: float32 [B, H, W] in [0, 1]."""
  shape = SCATTERING[name][:3]
  rng = np.random.Generator(np.random.PCG64(100 + len(name)))
  ramp = np.linspace(0, 1, shape[2])
  return (0.5 * rng.random(shape) + 0.5 * ramp).astype(np.float32)


def librosa_features(
  clip: np.ndarray,
  *,
  rate_hz: int,
  window: int,
  hop: int,
  num_mels: int,
  corners_hz: tuple[float, float],
  num_mfcc: int,
  center: bool,
) -> dict[str, np.ndarray]:
  """Power, log-mel in dB and MFCC by librosa, frames first, from float64."""
  import librosa

  framing = {"n_fft": window, "hop_length": hop, "center": center}
  clip = clip.astype(np.float64)  # In float32 librosa rounds quiet bands.
  power = np.abs(librosa.stft(clip, **framing)) ** 2
  mel = librosa.feature.melspectrogram(
    y=clip,
    sr=rate_hz,
    n_mels=num_mels,
    fmin=corners_hz[0],
    fmax=corners_hz[1],
    **framing,
  )
  log_mel = librosa.power_to_db(mel)
  mfcc = librosa.feature.mfcc(S=log_mel, n_mfcc=num_mfcc)
  return {"power": power.T, "log_mel": log_mel.T, "mfcc": mfcc.T}


def audio_results(name: str) -> dict[str, np.ndarray]:
  """Of one case of `AUDIO`."""
  rate_hz, _, window, hop, num_mels, corners_hz, num_mfcc, center = AUDIO[name]
  results = librosa_features(
    waveform(name),
    rate_hz=rate_hz,
    window=window,
    hop=hop,
    num_mels=num_mels,
    corners_hz=corners_hz,
    num_mfcc=num_mfcc,
    center=center,
  )
  results["power"] = results["power"][::7, ::5]  # A sample: it is large.
  return results


def kymatio_features(
  images: np.ndarray, *, num_scales: int, num_angles: int
) -> np.ndarray:
  """Scattering by Kymatio: float32 [B, K, H', W']."""
  import scipy.special

  # Kymatio 0.3 imports this name, which SciPy has removed, for 3-D alone.
  scipy.special.sph_harm = types.SimpleNamespace()
  from kymatio.numpy import Scattering2D

  transform = Scattering2D(
    J=num_scales, shape=images.shape[1:], L=num_angles, max_order=2
  )
  return transform(images)


def _main() -> None:
  arrays = {}
  for name in AUDIO:
    for kind, value in audio_results(name).items():
      arrays[f"{name}/{kind}"] = value.astype(np.float32)
  for name, (*_, num_scales, num_angles) in SCATTERING.items():
    arrays[f"{name}/scattering"] = kymatio_features(
      pictures(name), num_scales=num_scales, num_angles=num_angles
    )
  np.savez_compressed(PATH, **arrays)


if __name__ == "__main__":
  _main()
