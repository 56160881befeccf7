"""A written digit, a spoken digit and a question about both, privately.

  bash launch/local.sh --config=configs/spoken_written_digits.py:/data

The argument is a folder that holds `mnist/` (four IDX files) and `fsdd/`
(recordings, or a zip of them). Which digit? What is their sum? Are they the
same? Which is larger? Every picture and every recording is in one record at
most.

Claim: example-level (8, 1e-5)-differential privacy, add-or-remove-one. The unit
is a record: its picture and its recording together.
"""

from ppnet import config


def get_config(path: str = "/data") -> config.ExperimentConfig:
  """A small private model of pictures, sounds and questions."""
  return config.ExperimentConfig(
    name="spoken_written_digits",
    data=config.DataConfig(
      source=config.Source.SPOKEN_WRITTEN_DIGITS,
      path=path,
      prompt="",
      vocab_size=160,
      image_size=28,
      image_channels=1,
      audio=config.AudioConfig(sample_rate_hz=8000, max_secs=0.6),
    ),
    model=config.ModelConfig(
      decoder=config.llama_tiny(vocab_size=160),
      image=config.ImageStemConfig(channels=(16, 32, 32), strides=(2, 2, 2)),
      audio=config.AudioStemConfig(frames_per_token=4),
    ),
    privacy=config.PrivacyConfig(epsilon=8.0, delta=1e-5, l2_clip_norm=1.0),
    optimizer=config.OptimizerConfig(learning_rate=5e-3),
    train=config.TrainConfig(
      num_steps=150,
      expected_batch_size=1024,
      eval_every_steps=25,
      checkpoint_every_steps=25,
    ),
    perf=config.PerfConfig(microbatch_size=64),
  )
