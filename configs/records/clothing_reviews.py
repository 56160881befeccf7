r"""Recommended or not, of a clothing review, at a given epsilon.

  bash launch/local.sh --config=configs/records/clothing_reviews.py:3 \
    --config.data.path=/data/reviews.csv --sweep="seed=0,1,2,3,4"
"""

from ppnet import config

_NUM_STEPS = 60
_NUM_TOKENS = 576  # No review of the training split is longer.


def get_config(epsilon: str = "3") -> config.ExperimentConfig:
  """The record's run at `epsilon`."""
  return config.ExperimentConfig(
    name=f"clothing_reviews-epsilon_{epsilon}",
    data=config.DataConfig(
      source=config.Source.CLOTHING_REVIEWS,
      path="/data/reviews.csv",
      prompt="",
      tokenizer=config.TokenizerKind.BYTES,
      vocab_size=272,
    ),
    model=config.ModelConfig(
      decoder=config.LlamaConfig(vocab_size=272, max_seq_len=_NUM_TOKENS),
      image=None,
      audio=None,
      linear=config.LinearConfig(
        words=config.WordsConfig(
          num_buckets=8192, num_stem_bytes=6, heading_weight=2.0
        ),
        feature_norm=3.0,
        rarity_power=0.5,
        rarity_floor=2e-3,
      ),
    ),
    privacy=config.PrivacyConfig(
      epsilon=float(epsilon), delta=1e-5, l2_clip_norm=1.0
    ),
    optimizer=config.OptimizerConfig(
      name=config.OptimizerName.SGD,
      learning_rate=3.0,
      schedule=config.Schedule.CONSTANT,
      beta1=0.9,
    ),
    train=config.TrainConfig(
      num_steps=_NUM_STEPS,
      expected_batch_size=4096,
      eval_every_steps=_NUM_STEPS,
      checkpoint_every_steps=_NUM_STEPS,
    ),
    perf=config.PerfConfig(microbatch_size=256),
  )
