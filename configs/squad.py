"""Answers questions about passages (SQuAD), privately.

  bash launch/local.sh --config=configs/squad.py:/data/squad

The argument is a folder with train-v1.1.json and dev-v1.1.json, or one such
file, which is then split by article. Tokens are bytes; the question stands
first, and a passage that is longer than the decoder reads is cut.

Claim: example-level (8, 1e-5)-differential privacy, add-or-remove-one. The unit
is a question with its passage. A passage has several questions, so somebody who
is in the passage is protected for each question alone; with
--config.privacy.unit=user the article is the unit.
"""

import dataclasses

from ppnet import config


def get_config(path: str = "/data/squad") -> config.ExperimentConfig:
  """A small private model that answers questions."""
  return config.ExperimentConfig(
    name="squad",
    data=config.DataConfig(
      source=config.Source.SQUAD,
      path=path,
      task=config.Task.ANSWER,
      prompt="",
      tokenizer=config.TokenizerKind.BYTES,
      vocab_size=264,
    ),
    model=config.ModelConfig(
      decoder=dataclasses.replace(
        config.llama_tiny(vocab_size=264), max_seq_len=512
      ),
      image=None,
      audio=None,
    ),
    privacy=config.PrivacyConfig(epsilon=8.0, delta=1e-5, l2_clip_norm=1.0),
    optimizer=config.OptimizerConfig(learning_rate=5e-3),
    train=config.TrainConfig(
      num_steps=60,
      expected_batch_size=512,
      eval_every_steps=30,
      checkpoint_every_steps=15,
    ),
    perf=config.PerfConfig(microbatch_size=32),
  )
