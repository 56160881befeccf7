"""validate() names the field, the value and the remedy."""

import pytest

from ppnet import config as config_lib
from tests import tiny


def test_defaults_of_the_tests_are_valid():
  config_lib.validate(tiny.experiment())


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("privacy.epsilon", 0.0, "privacy.epsilon > 0"),
    ("privacy.epsilon", -3.0, "privacy.epsilon > 0"),
    ("privacy.epsilon", None, "exactly one of"),
    ("privacy.noise_multiplier", 1.0, "exactly one of"),
    ("privacy.delta", 0.0, "0 < privacy.delta < 1"),
    ("privacy.delta", 1.0, "0 < privacy.delta < 1"),
    ("privacy.l2_clip_norm", 0.0, "privacy.l2_clip_norm > 0"),
    ("privacy.max_batch_size", 9, "privacy.max_batch_size with"),
    (
      "privacy.sampler",
      config_lib.Sampler.TRUNCATED_POISSON,
      "privacy.max_batch_size=None",
    ),
    (
      "privacy.unit",
      config_lib.PrivacyUnit.USER,
      "records that belong to somebody",
    ),
    ("privacy.max_records_per_user", 3, "unit=USER with"),
    ("privacy.clip_quantile", 1.0, "privacy.clip_quantile < 1"),
    ("privacy.clip_count_stddev", 0.0, "clip_count_stddev > 0"),
    ("privacy.normalize_stabilizer", 0.0, "normalize_stabilizer > 0"),
    ("train.views_per_example", 0, "views_per_example > 0"),
    ("data.user_pattern", "(.*)/.*", "IMAGE_FOLDER or AUDIO_FOLDER alone"),
    ("privacy.num_bands", 3, "privacy.num_bands with"),
    (
      "privacy.noise_mechanism",
      config_lib.NoiseMechanism.BANDED,
      "privacy.num_bands=None",
    ),
    ("data.image_channels", 2, r"1 \(grey\) or 3"),
    ("data.pixel_std", 0.0, "data.pixel_std > 0"),
    ("data.test_fraction", 1.0, "data.test_fraction < 1"),
    ("data.source", config_lib.Source.IMAGE_FOLDER, "data.path"),
    ("data.vocab_size", 97, "model.decoder.vocab_size >= data.vocab_size"),
    ("data.audio.max_hz", 5000.0, "sample_rate_hz / 2"),
    ("data.audio.num_mfcc", 41, "num_mfcc <= data.audio.num_mels"),
    ("data.audio.first_mfcc", 21, "num_mfcc <= data.audio.num_mels"),
    ("data.audio.first_mfcc", -1, "first_mfcc >= 0"),
    ("data.audio.max_secs", 0.01, "at least one window"),
    ("model.decoder.num_kv_heads", 4, "a multiple of num_kv_heads"),
    ("model.decoder.head_dim", 5, "even"),
    (
      "model.decoder.rope_scaling",
      config_lib.RopeScalingConfig(factor=0.0),
      "rope_scaling.factor > 0",
    ),
    (
      "model.decoder.rope_scaling",
      config_lib.RopeScalingConfig(high_freq_factor=1.0),
      "high_freq_factor > low_freq_factor",
    ),
    (
      "model.decoder.lora",
      config_lib.LoraConfig(targets=("q_prj",)),
      r"lora.targets among .*q_prj",
    ),
    ("model.decoder.lora", config_lib.LoraConfig(rank=0), "lora.rank > 0"),
    ("model.image.strides", (1, 2), "as many model.image.channels"),
    ("model.image.num_groups", 3, "to divide all of model.image.channels"),
    ("model.image.num_groups", -1, "num_groups to be 0, or"),
    ("model.image.tempered_sigmoid.scale", 0.0, "tempered_sigmoid.scale > 0"),
    (
      "model.image.tempered_sigmoid.temperature",
      float("inf"),
      "tempered_sigmoid.temperature > 0",
    ),
    (
      "model.image.tempered_sigmoid.offset",
      float("nan"),
      "tempered_sigmoid.offset to be finite",
    ),
    (
      "model.image.tempered_sigmoid.offset",
      0.5,
      "activation=tempered_sigmoid with a shape",
    ),
    ("model.audio.frames_per_token", 0, "frames_per_token > 0"),
    ("attention_noise.stddev", -0.1, "attention_noise.stddev >= 0"),
    ("train.num_steps", 0, "train.num_steps > 0"),
    ("perf.microbatch_size", 0, "perf.microbatch_size > 0"),
    ("optimizer.learning_rate", float("nan"), "learning_rate > 0"),
    ("optimizer.beta2", 1.0, "optimizer.beta2 < 1"),
    ("mesh.data", 0, "mesh sizes"),
    ("mesh.fsdp", -1, "mesh sizes"),
    ("mesh.sequence", 0, "mesh sizes"),
    ("mesh.slice", 2, "mesh.slice=1 unless"),
  ],
)
def test_an_invalid_field_is_named(field, value, message):
  config = tiny.experiment()
  *parents, last = field.split(".")
  holder = config
  for parent in parents:
    holder = getattr(holder, parent)
  assert hasattr(holder, last)
  setattr(holder, last, value)
  with pytest.raises(ValueError, match=message):
    config_lib.validate(config)


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("activation", config_lib.Activation.TANH),
    ("num_groups", 2),
    ("weight_standardisation", True),
  ],
)
def test_options_of_convolutions_stand_beside_no_patches(name, value):
  config = tiny.experiment()
  setattr(config.model.image, name, value)
  config_lib.validate(config)
  config.model.image.patches = config_lib.PatchStemConfig(patch_size=4)
  with pytest.raises(ValueError, match=f"no model.image.{name} beside"):
    config_lib.validate(config)


def test_a_group_of_one_number_is_refused():
  config = tiny.experiment()
  config.model.image.num_groups = 4
  config_lib.validate(config)
  config.model.image.strides = (8,)  # One place of an 8 x 8 picture is left.
  with pytest.raises(ValueError, match="groups of more than one number"):
    config_lib.validate(config)


def test_a_misspelt_field_cannot_be_set():
  with pytest.raises(AttributeError):
    tiny.experiment().privacy.epsilo = 3.0


def test_token_counts_follow_the_stems():
  config = tiny.experiment()
  config.data.image_size = 9
  config.model.image = config_lib.ImageStemConfig(
    channels=(4, 4), strides=(2, 2)
  )
  config.data.audio = config_lib.AudioConfig(
    sample_rate_hz=100, max_secs=1.0, window_secs=0.2, hop_secs=0.1
  )
  assert config_lib.num_audio_frames(config.data.audio) == 9
  config.model.audio = config_lib.AudioStemConfig(frames_per_token=4)
  counts = config_lib.num_media_tokens(config)
  assert counts == {"image": 9, "audio": 3}  # 9 -> 5 -> 3 pixels a side.
  assert tuple(counts) == config_lib.MODALITIES  # Their order in the stream.
  config.model.image = None
  assert config_lib.num_media_tokens(config) == {"audio": 3}


def test_views_that_nothing_tells_apart_are_refused():
  config = tiny.experiment(views_per_example=2)
  config_lib.validate(config)
  config.attention_noise.stddev = 0.0
  with pytest.raises(ValueError, match="Equal views cost their number"):
    config_lib.validate(config)


@pytest.mark.parametrize("pattern", ["[^/]*/.*", "(a)(b)", "("])
def test_a_user_pattern_has_one_group(pattern):
  config = tiny.experiment()
  config.data.source = config_lib.Source.IMAGE_FOLDER
  config.data.path = "folder"
  config.data.user_pattern = pattern
  with pytest.raises(ValueError, match="regular expression with one group"):
    config_lib.validate(config)


def test_packed_rows_are_of_texts_and_seen_once():
  config = tiny.experiment(
    unit=config_lib.PrivacyUnit.PACKED_ROW, views_per_example=1
  )
  with pytest.raises(ValueError, match="PACKED_ROW.*task='CLASSIFY'"):
    config_lib.validate(config)
  config.data.task = config_lib.Task.CAUSAL
  config_lib.validate(config)
  config.train.views_per_example = 2
  with pytest.raises(ValueError, match="PACKED_ROW.*views_per_example=2"):
    config_lib.validate(config)


def test_a_limit_of_stalls_is_positive():
  config = tiny.experiment(stall_secs=0.0)
  with pytest.raises(ValueError, match=r"perf\.stall_secs > 0"):
    config_lib.validate(config)
