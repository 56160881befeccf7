"""Continues Shakespeare, byte by byte, privately.

  bash launch/local.sh --config=configs/shakespeare.py:/data/input.txt

The argument is any UTF-8 text, such as tiny Shakespeare (`data/tinyshakespeare`
of https://github.com/karpathy/char-rnn). A record is a window of 256 bytes; the
last fifth of the text is the test split.

Claim: example-level (8, 1e-5)-differential privacy, add-or-remove-one. The unit
is a window: what an author says in many windows is protected in each alone. For
the same run without privacy, --config.privacy.enabled=false.
"""

from ppnet import config


def get_config(path: str = "/data/input.txt") -> config.ExperimentConfig:
  """A private language model of 1.3 million parameters."""
  return config.ExperimentConfig(
    name="shakespeare",
    data=config.DataConfig(
      source=config.Source.TEXT_FILE,
      path=path,
      task=config.Task.CAUSAL,
      prompt="",
      tokenizer=config.TokenizerKind.BYTES,
      vocab_size=264,
      window_bytes=256,
    ),
    model=config.ModelConfig(
      decoder=config.LlamaConfig(
        vocab_size=264,
        embed_dim=128,
        num_layers=6,
        num_heads=4,
        num_kv_heads=4,
        head_dim=32,
        mlp_dim=344,
        max_seq_len=256,
      ),
      image=None,
      audio=None,
    ),
    privacy=config.PrivacyConfig(epsilon=8.0, delta=1e-5, l2_clip_norm=1.0),
    optimizer=config.OptimizerConfig(learning_rate=2e-3, warmup_steps=10),
    train=config.TrainConfig(
      num_steps=100,
      expected_batch_size=256,
      eval_every_steps=50,
      checkpoint_every_steps=25,
    ),
    perf=config.PerfConfig(microbatch_size=16),
  )
