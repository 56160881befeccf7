"""Llama-7B's adapters, fine-tuned with differential privacy, on a pod.

Rank 16 beside every projection: 40 million trained parameters. The base is
frozen in bfloat16, out of gradient and optimizer. Sequences of 2,048 tokens.

Claim: example-level (8, 1e-7)-differential privacy, add-or-remove-one, Poisson
sampling, for 2,000 steps of 2,048 out of a million records. It has not been
trained here; that it compiles for a pod is tested:

  python -m ppnet.main --config=configs/llama_7b_lora.py \
      --config.job=COMPILE --config.topology=v5e:4x4

The data are yours to name: --config.data.source, --config.data.path and the
tokenizer. The published weights: --config=configs/llama_7b_lora.py:DIR.
"""

from ppnet import config, presets


def get_config(weights: str = "") -> config.ExperimentConfig:
  """Adapters beside `weights`, a Hugging Face directory, or random ones."""
  decoder = presets.llama_7b()
  decoder.compute_dtype = config.ComputeDtype.BFLOAT16
  decoder.remat = True
  decoder.lora = config.LoraConfig(
    rank=16, alpha=32.0, targets=config.PROJECTIONS
  )
  return config.ExperimentConfig(
    name="llama_7b_lora",
    data=config.DataConfig(
      task=config.Task.ANSWER, prompt="", vocab_size=decoder.vocab_size
    ),
    model=config.ModelConfig(
      decoder=decoder, decoder_weights=weights, image=None, audio=None
    ),
    attention_noise=config.AttentionNoiseConfig(stddev=0.1),
    privacy=config.PrivacyConfig(epsilon=8.0, delta=1e-7),
    optimizer=config.OptimizerConfig(learning_rate=3e-4, warmup_steps=50),
    train=config.TrainConfig(
      num_steps=2000,
      expected_batch_size=2048,
      eval_every_steps=200,
      checkpoint_every_steps=100,
    ),
    mesh=config.MeshConfig(data=1, fsdp=-1, tensor=4),
    perf=config.PerfConfig(microbatch_size=4),
    account=config.AccountConfig(num_examples=1_000_000),
  )
