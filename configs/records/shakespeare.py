r"""Tiny Shakespeare, byte by byte, at a given epsilon: bits per byte.

  bash launch/local.sh --config=configs/records/shakespeare.py:8 \
    --config.data.path=/data/input.txt --sweep="seed=0,1,2,3,4"

The argument is epsilon, under PLD, at delta = 1e-5, add-or-remove-one, Poisson
sampling; `8,64` has another expected batch size, whose noise is calibrated
anew for the same number of steps; `none` is the same model without privacy.
Neither the noise nor the sampler is seeded, so that no two runs are the same;
`seed` names them, and draws the first weights.

The unit is a window of 256 bytes. The last fifth of the text is the test split,
872 windows of the 4358. Every byte of a window counts, its first one too, which
is told from `<s>` alone.

- one layer of 64 features, 54,464 parameters; a token is a byte
- the head and the end of the feed-forward branch begin at zero; two heads begin
  by looking at the byte before and the one before that, whatever they are
- 160 steps of 512 expected windows, 23 epochs; AdamW at 0.03, cosine to 0; clip
  norm 0.3, below every window's gradient

The text is public (`data/tinyshakespeare` of
https://github.com/karpathy/char-rnn), and nothing was trained elsewhere.
Learning rate, width, heads, first weights and steps were chosen on the last
15 % of its training windows, which is not accounted for; the batch by what two
cores do in some minutes. That a small model and a large batch go together with
privacy is from McKenna et al. 2025 (https://arxiv.org/abs/2501.18914).
RECORDS.md has what came of it.

What each is worth there, bits per byte at epsilon 8, one run each:

  as here, with batches of 350                 3.02
  batches of 64 / 128 / 256 / 512 / 1024,
    on the test split    3.29 / 3.14 / 3.06 / 3.02 / 2.99
  rate 0.015                                   3.05
  40 steps                                     3.38
  40 steps, rate 0.04                          3.39
  40 steps, moving average of decay 0.8        3.39
  40 steps, rate 0.04, width 32 / 128          3.48 / 3.44
  40 steps, rate 0.02, rotary base 6           3.45
  40 steps, rate 0.02, four heads              3.49
  the same, two heads, both branches end at
    zero, none looks back, rotary base 10,000  3.70
"""

from ppnet import config

_WINDOW_BYTES = 256
_NUM_STEPS = 160


def get_config(argument: str = "8") -> config.ExperimentConfig:
  """The record's run at `EPSILON`, `EPSILON,BATCH` or `none`."""
  epsilon, _, batch_size = argument.partition(",")
  is_private = epsilon != "none"
  return config.ExperimentConfig(
    name="shakespeare-epsilon_" + argument.replace(",", "-batch_"),
    tuning=config.Tuning.PRIVATE,
    data=config.DataConfig(
      source=config.Source.TEXT_FILE,
      path="/data/input.txt",
      task=config.Task.CAUSAL,
      prompt="",
      tokenizer=config.TokenizerKind.BYTES,
      vocab_size=264,
      window_bytes=_WINDOW_BYTES,
    ),
    model=config.ModelConfig(
      decoder=config.LlamaConfig(
        vocab_size=264,
        embed_dim=64,
        num_layers=1,
        num_heads=2,
        num_kv_heads=2,
        head_dim=16,
        mlp_dim=64,
        max_seq_len=_WINDOW_BYTES,
        rope_theta=2.0,
        zero_init=("lm_head", "down_proj"),
        look_back=80.0,
      ),
      image=None,
      audio=None,
    ),
    privacy=config.PrivacyConfig(
      enabled=is_private,
      epsilon=float(epsilon) if is_private else 8.0,
      delta=1e-5,
      l2_clip_norm=0.3,
    ),
    optimizer=config.OptimizerConfig(learning_rate=0.03),
    train=config.TrainConfig(
      num_steps=_NUM_STEPS,
      expected_batch_size=int(batch_size or 512),
      eval_every_steps=_NUM_STEPS,
      checkpoint_every_steps=_NUM_STEPS,
    ),
    perf=config.PerfConfig(microbatch_size=16),
  )
