"""A private multimodal model in about a minute on two cores.

scikit-learn's handwritten digits, each with a noisy telephone key tone of the
same digit and a written question; PPNet-tiny answers with the digit's token.
Neither the picture nor the sound alone is enough.

Claim: example-level (3, 1e-5)-differential privacy, add-or-remove-one, Poisson
sampling, PLD accountant.

  bash launch/local.sh --config=configs/quickstart.py
"""

from ppnet import config


def get_config() -> config.ExperimentConfig:
  """The quickstart."""
  return config.ExperimentConfig(
    name="quickstart",
    data=config.DataConfig(source=config.Source.DIGITS, vocab_size=96),
    model=config.ModelConfig(
      decoder=config.llama_tiny(vocab_size=96),
      image=config.ImageStemConfig(channels=(16, 32), strides=(2, 2)),
      audio=config.AudioStemConfig(frames_per_token=6),
    ),
    attention_noise=config.AttentionNoiseConfig(
      stddev=0.5, consistency_weight=0.1
    ),
    privacy=config.PrivacyConfig(epsilon=3.0, delta=1e-5, l2_clip_norm=1.0),
    optimizer=config.OptimizerConfig(learning_rate=1e-2),
    train=config.TrainConfig(
      num_steps=100,
      expected_batch_size=512,
      eval_every_steps=10,
      checkpoint_every_steps=20,
    ),
    perf=config.PerfConfig(microbatch_size=64),
  )
