"""Spectra, mel bands and MFCC of ppnet.data.audio against librosa.

The default tests read what librosa gave (tests/goldens); those marked `peers`
call it. The other tests of the module are in audio_test.py.
"""

import importlib
import io

import hypothesis
import numpy as np
import pytest
import soundfile
from hypothesis import strategies as st

from ppnet.data import audio, sources
from tests.goldens import make_features

_GOLDENS = np.load(make_features.PATH)
_NOISE = np.random.default_rng(5).normal(0, 0.2, 900).astype(np.float32)


def _log_mel(name, **options) -> audio.LogMel:
  rate_hz, _, window, hop, num_mels, corners_hz, _, center = (
    make_features.AUDIO[name]
  )
  settings = {"center": center, "decibels": True, "top_db": 80.0, **options}
  return audio.LogMel(
    sample_rate_hz=rate_hz,
    window=window,
    hop=hop,
    num_mels=num_mels,
    min_hz=corners_hz[0],
    max_hz=corners_hz[1],
    **settings,
  )


def _apply(transform, waveform) -> np.ndarray:
  return transform.map({"id": "r8", "audio": waveform})["audio"]


@pytest.mark.parametrize("name", make_features.AUDIO)
def test_spectrogram_matches_librosa(name):
  _, _, window, hop, *_, center = make_features.AUDIO[name]
  clip = make_features.waveform(name)
  outputs = {
    output: _apply(
      audio.Spectrogram(window=window, hop=hop, output=output, center=center),
      clip,
    )
    for output in ("complex", "magnitude", "power", "db")
  }
  expected = _GOLDENS[f"{name}/power"]
  scale = expected.max()
  np.testing.assert_allclose(
    outputs["power"][::7, ::5], expected, rtol=1e-5, atol=1e-9 * scale
  )
  power = outputs["power"].astype(np.float64)
  assert {o: v.dtype.name for o, v in outputs.items()} == {
    "complex": "complex64",
    "magnitude": "float32",
    "power": "float32",
    "db": "float32",
  }
  np.testing.assert_allclose(outputs["magnitude"] ** 2, power, rtol=1e-5)
  np.testing.assert_allclose(
    np.abs(outputs["complex"]) ** 2, power, rtol=1e-4, atol=1e-12 * scale
  )
  np.testing.assert_allclose(
    outputs["db"], 10 * np.log10(np.maximum(power, 1e-10)), atol=1e-4
  )


@pytest.mark.parametrize("name", make_features.AUDIO)
def test_log_mel_and_every_mfcc_match_librosa(name):
  log_mel = _apply(_log_mel(name), make_features.waveform(name))
  mfcc = _apply(audio.Mfcc(num_mfcc=make_features.AUDIO[name][6]), log_mel)
  np.testing.assert_allclose(
    log_mel, _GOLDENS[f"{name}/log_mel"], rtol=0, atol=1e-4
  )
  np.testing.assert_allclose(mfcc, _GOLDENS[f"{name}/mfcc"], rtol=0, atol=1e-3)
  # Fails if: the mel scale is HTK's, or the cosine transform is unscaled.


def test_nats_are_decibels_in_another_unit():
  clip = make_features.waveform("speech")
  decibels = _apply(_log_mel("speech", top_db=None), clip)
  nats = _apply(_log_mel("speech", top_db=None, decibels=False), clip)
  np.testing.assert_allclose(nats * 10 / np.log(10), decibels, atol=1e-4)


def test_top_db_cuts_below_the_loudest_value():
  clip = np.concatenate([np.sin(np.arange(800)), np.zeros(800)])
  values = _apply(
    audio.Spectrogram(window=64, hop=64, output="db", top_db=30.0), clip
  )
  assert values.max() - values.min() == pytest.approx(30)
  assert (values[-1] == values.min()).all()


def test_a_clip_is_centred_only_if_asked():
  click = np.zeros(1000, np.float32)
  click[640] = 1
  for center, frames in [
    (False, 1 + (1000 - 128) // 64),
    (True, 1 + 1000 // 64),
  ]:
    power = _apply(
      audio.Spectrogram(window=128, hop=64, output="power", center=center),
      click,
    )
    assert power.shape == (frames, 65)
    loudest = int(power.sum(axis=1).argmax())
    assert loudest * 64 + (0 if center else 64) == 640


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"output": "phase"}, "output to be one of"),
    ({"window": 0}, "window > 0"),
    ({"hop": 0}, "hop > 0"),
    ({"top_db": -1.0}, "top_db > 0"),
    ({"top_db": 80.0, "output": "power"}, "output='db'"),
  ],
)
def test_impossible_spectrogram_is_named(options, message):
  with pytest.raises(ValueError, match=message):
    audio.Spectrogram(**{"window": 8, "hop": 4, **options})


def test_impossible_mel_and_mfcc_are_named():
  with pytest.raises(ValueError, match="decibels=True"):
    _log_mel("speech", decibels=False)
  with pytest.raises(ValueError, match="num_mfcc <= 64"):
    _apply(audio.Mfcc(num_mfcc=65), np.zeros((3, 64), np.float32))


# Loudness and length.


@pytest.mark.parametrize("target", [-20.0, -3.0, 0.0])
@pytest.mark.parametrize("gain", [1e-4, 0.3, 2.0])
def test_loudness_is_the_rms_asked_for(target, gain):
  clip = np.concatenate([gain * _NOISE, np.zeros(700, np.float32)])
  result = _apply(audio.Loudness(target_dbfs=target), clip)
  level = 10 * np.log10(np.mean(np.square(result[:900], dtype=np.float64)))
  assert level == pytest.approx(target, abs=1e-4)
  assert result.dtype == np.float32
  np.testing.assert_array_equal(result[900:], 0)
  np.testing.assert_allclose(
    result[:900] / result[0], _NOISE / _NOISE[0], rtol=1e-5
  )
  # Fails if: the padding counts as part of the recording.


def test_a_full_scale_sine_has_minus_three_dbfs():
  sine = np.sin(2 * np.pi * np.arange(8000) / 80).astype(np.float32)
  result = _apply(audio.Loudness(target_dbfs=-3.0103), sine)
  np.testing.assert_allclose(result, sine, atol=1e-5)


def test_silence_has_no_loudness_and_no_deviation():
  for clip in (np.zeros(50, np.float32), np.full(50, 0.1, np.float32)):
    np.testing.assert_array_equal(
      _apply(audio.ZScoreClip(), clip), np.zeros(50)
    )
  result = _apply(audio.Loudness(target_dbfs=-9.0), np.zeros(50, np.float32))
  np.testing.assert_array_equal(result, np.zeros(50))


def test_fixed_length_cuts_or_pads_at_the_end():
  clip = np.arange(1, 6, dtype=np.float32)
  cut = _apply(audio.FixLength(num_samples=3), clip)
  padded = _apply(audio.FixLength(num_samples=7), clip)
  np.testing.assert_array_equal(cut, [1, 2, 3])
  np.testing.assert_array_equal(padded, [1, 2, 3, 4, 5, 0, 0])


# Bad input.

_FEATURES = (
  audio.FixLength(num_samples=300),
  audio.Loudness(target_dbfs=-20.0),
  audio.Spectrogram(window=64, hop=32),
  audio.LogMel(
    sample_rate_hz=8000, window=64, hop=32, num_mels=5, min_hz=300.0,
    max_hz=4000.0,
  ),
)  # fmt: skip


@pytest.mark.parametrize("transform", _FEATURES, ids=lambda t: type(t).__name__)
@pytest.mark.parametrize(
  ("clip", "cause"),
  [
    (np.zeros(0, np.float32), "no sample"),
    (np.array([0, np.nan] * 99, np.float32), "NaN or infinite"),
    (np.array([0, -np.inf] * 99, np.float32), "NaN or infinite"),
  ],
  ids=["empty", "nan", "infinite"],
)
def test_unusable_waveform_names_the_record(transform, clip, cause):
  with pytest.raises(sources.BadRecordError, match=f"'r8'.*{cause}"):
    _apply(transform, clip)


@pytest.mark.parametrize("transform", _FEATURES[2:])
def test_clip_shorter_than_a_window_names_the_record(transform):
  with pytest.raises(sources.BadRecordError, match="'r8'.*do not fill"):
    _apply(transform, _NOISE[:63])
  assert _apply(transform, _NOISE[:64]).shape[0] == 1


@pytest.mark.parametrize("transform", _FEATURES)
def test_transform_before_decode_is_named(transform):
  for wrong in (b"RIFF", np.zeros((3, 4), np.float32)):
    with pytest.raises(ValueError, match="Put Decode before"):
      _apply(transform, wrong)


_KINDS = [("WAV", "PCM_16"), ("WAV", "FLOAT"), ("FLAC", "PCM_16")]
_KINDS += [("FLAC", "PCM_24"), ("OGG", "VORBIS")]


def _encode(samples, rate_hz, kind) -> bytes:
  buffer = io.BytesIO()
  soundfile.write(buffer, samples, rate_hz, format=kind[0], subtype=kind[1])
  return buffer.getvalue()


@pytest.mark.parametrize("kind", _KINDS, ids="-".join)
def test_every_format_decodes_to_the_same_clip(kind):
  clip = make_features.waveform("telephone")
  decode = audio.Decode(sample_rate_hz=8000, max_secs=0.3)
  result = _apply(decode, _encode(clip, 8000, kind))
  # Vorbis loses some; the others round to 16 bits or less.
  error = np.sqrt(np.mean(np.square(result - clip[:2400])))
  assert error < (0.05 if kind[0] == "OGG" else 1 / 32768)


def _chain() -> list:
  return [
    audio.Decode(sample_rate_hz=8000, max_secs=0.1),
    audio.Loudness(target_dbfs=-20.0),
    _FEATURES[3],
    audio.Mfcc(num_mfcc=4),
    audio.ZScoreClip(),
  ]


def _refused(error: sources.BadRecordError) -> None:
  assert error.record_id == "r8"


def _through_chain(content) -> np.ndarray | None:
  """Features; None where the record was refused by name."""
  element = {"id": "r8", "audio": content}
  try:
    for transform in _chain():
      element = transform.map(element)
  except sources.BadRecordError as error:
    return _refused(error)
  features = element["audio"]
  assert features.shape == (24, 4)
  assert features.dtype == np.float32
  assert np.isfinite(features).all()
  return features


@hypothesis.settings(max_examples=60)
@hypothesis.given(data=st.data())
def test_damaged_recordings_are_refused_or_give_finite_features(data):
  kind = data.draw(st.sampled_from(_KINDS))
  channels = data.draw(st.integers(1, 3))
  size = data.draw(st.sampled_from([1, 2, 63, 500, 1100]))
  rate_hz = data.draw(st.sampled_from([8000, 11025, 44100]))
  samples = np.random.default_rng(size).normal(0, 0.2, (size, channels))
  content = bytearray(_encode(samples, rate_hz, kind))
  damage = data.draw(st.sampled_from(["none", "cut", "flip", "head", "tail"]))
  if damage == "cut":
    del content[data.draw(st.integers(0, len(content))) :]
  elif damage == "flip":
    for _ in range(data.draw(st.integers(1, 8))):
      place = data.draw(st.integers(0, len(content) - 1))
      content[place] ^= 1 << data.draw(st.integers(0, 7))
  elif damage == "head":
    del content[: data.draw(st.integers(1, 60))]
  elif damage == "tail":
    content += data.draw(st.binary(max_size=200))
  features = _through_chain(bytes(content))
  if damage == "none":
    assert features is not None  # One sample is a clip, with silence after it.


@hypothesis.settings(max_examples=60)
@hypothesis.given(content=st.binary(max_size=300))
def test_arbitrary_bytes_are_refused(content):
  assert _through_chain(content) is None


@pytest.mark.parametrize(
  "content",
  [
    None,
    "text",
    12,
    _encode(np.full(500, 3e38, np.float32), 8000, ("WAV", "FLOAT")),
    _encode(np.array([1e300] * 500), 8000, ("WAV", "DOUBLE")),
    _encode(np.zeros(500), 100, ("WAV", "PCM_16")),
    _encode(np.zeros(500), 2_000_000_000, ("WAV", "PCM_16")),
  ],
  ids=["none", "str", "int", "huge", "double", "slow", "fast"],
)
def test_impossible_recordings_are_refused(content):
  assert _through_chain(content) is None


def test_largest_amplitude_gives_finite_features():
  samples = np.full((900, 2), audio.MAX_AMPLITUDE, np.float32)
  samples[::2] *= -1
  content = _encode(samples, 8000, ("WAV", "FLOAT"))
  assert _through_chain(content) is not None


# The other library itself.


@pytest.mark.peers
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_random_settings_match_librosa(dtype):
  librosa = importlib.import_module("librosa")
  rng = np.random.default_rng(7)
  for trial in range(60):
    rate_hz = int(rng.choice([8000, 11025, 16000, 22050, 44100]))
    window = int(rng.integers(300, 2100))
    hop = int(rng.integers(window // 5, window))
    num_mels = int(rng.integers(4, 30))
    num_mfcc = int(rng.integers(1, num_mels + 1))
    corners_hz = (float(rng.uniform(0, 300)), float(rate_hz / 2))
    center = bool(rng.integers(2))
    size = int(rng.integers(window, 3 * rate_hz))
    time = np.arange(size) / rate_hz
    clip = rng.normal(0, 10 ** rng.uniform(-4, -0.5), size)
    for hz in rng.uniform(50, rate_hz / 2, 3):
      clip += rng.uniform(0, 0.3) * np.sin(2 * np.pi * hz * time)
    clip = clip.astype(np.float32)
    framing = {"n_fft": window, "hop_length": hop, "center": center}
    expected = librosa.feature.mfcc(
      y=clip.astype(dtype),
      sr=rate_hz,
      n_mfcc=num_mfcc,
      n_mels=num_mels,
      fmin=corners_hz[0],
      fmax=corners_hz[1],
      **framing,
    )
    log_mel = audio.LogMel(
      sample_rate_hz=rate_hz,
      window=window,
      hop=hop,
      num_mels=num_mels,
      min_hz=corners_hz[0],
      max_hz=corners_hz[1],
      center=center,
      decibels=True,
      top_db=80.0,
    )
    mfcc = _apply(audio.Mfcc(num_mfcc=num_mfcc), _apply(log_mel, clip))
    np.testing.assert_allclose(
      mfcc, expected.T, rtol=0, atol=1e-3, err_msg=f"{trial}"
    )
    db = _apply(
      audio.Spectrogram(
        window=window, hop=hop, output="db", center=center, top_db=80.0
      ),
      clip,
    )
    stft = librosa.stft(clip.astype(np.float64), **framing)
    np.testing.assert_allclose(
      db, librosa.power_to_db(np.abs(stft) ** 2).T, rtol=0, atol=1e-3
    )


@pytest.mark.peers
@pytest.mark.parametrize("name", make_features.AUDIO)
def test_stored_results_are_still_those_of_librosa(name):
  importlib.import_module("librosa")
  for kind, value in make_features.audio_results(name).items():
    stored = _GOLDENS[f"{name}/{kind}"]
    np.testing.assert_allclose(stored, value, rtol=1e-6, atol=1e-4)
