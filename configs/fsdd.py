"""Spoken digits of six people (FSDD), privately.

  bash launch/local.sh --config=configs/fsdd.py:/data/fsdd

The argument is the folder `recordings/` of
https://github.com/Jakobovski/free-spoken-digit-dataset, or a zip of it. The
test split is the official one. To hear nobody twice, hold speakers out:
--config.data.held_out_users='("theo",)'.

Claim: example-level (8, 1e-5)-differential privacy, add-or-remove-one. The unit
is a recording; `--config.privacy.unit=user` would protect a speaker, of whom
there are too few to learn from.
"""

from ppnet import config


def get_config(path: str = "/data/fsdd") -> config.ExperimentConfig:
  """A small private classifier of the recordings in `path`."""
  return config.ExperimentConfig(
    name="fsdd",
    data=config.DataConfig(
      source=config.Source.FSDD,
      path=path,
      prompt="Which digit is spoken?",
      vocab_size=96,
      audio=config.AudioConfig(sample_rate_hz=8000, max_secs=0.6),
    ),
    model=config.ModelConfig(
      decoder=config.llama_tiny(vocab_size=96),
      image=None,
      audio=config.AudioStemConfig(frames_per_token=4),
    ),
    privacy=config.PrivacyConfig(epsilon=8.0, delta=1e-5, l2_clip_norm=1.0),
    optimizer=config.OptimizerConfig(learning_rate=1e-2),
    train=config.TrainConfig(
      num_steps=150,
      expected_batch_size=1024,
      eval_every_steps=25,
      checkpoint_every_steps=25,
    ),
    perf=config.PerfConfig(microbatch_size=128),
  )
