"""Do its authors recommend a piece of clothing? 22,641 reviews, privately.

  bash launch/local.sh --config=configs/clothing_reviews.py:/data/reviews.csv

The argument is the CSV of Women's E-Commerce Clothing Reviews, plain or .gz. To
predict the rating instead: --config.data.review_label=rating.

Tokens are bytes, so that nothing is learnt from a review before training; what
is longer than the decoder reads is cut at its end.

Claim: example-level (8, 1e-5)-differential privacy, add-or-remove-one. The unit
is a review: the table does not say who wrote which.
"""

import dataclasses

from ppnet import config


def get_config(path: str = "/data/reviews.csv") -> config.ExperimentConfig:
  """A small private classifier of the reviews in `path`."""
  return config.ExperimentConfig(
    name="clothing_reviews",
    data=config.DataConfig(
      source=config.Source.CLOTHING_REVIEWS,
      path=path,
      prompt="",
      tokenizer=config.TokenizerKind.BYTES,
      vocab_size=272,
    ),
    model=config.ModelConfig(
      decoder=dataclasses.replace(
        config.llama_tiny(vocab_size=272), max_seq_len=256
      ),
      image=None,
      audio=None,
    ),
    privacy=config.PrivacyConfig(epsilon=8.0, delta=1e-5, l2_clip_norm=1.0),
    optimizer=config.OptimizerConfig(learning_rate=5e-3),
    train=config.TrainConfig(
      num_steps=100,
      expected_batch_size=1024,
      eval_every_steps=50,
      checkpoint_every_steps=25,
    ),
    perf=config.PerfConfig(microbatch_size=64),
  )
