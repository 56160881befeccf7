"""Llama-7B, all of it trained with differential privacy, on a pod.

Every parameter is float32 with AdamW's two moments, activations are bfloat16
and computed again in the backward pass, and a record is one sequence of 2,048
tokens. On 64 chips: 16 ways over parameters and batch, 4 over heads. Each
microbatch has one sequence per group of 4 chips.

Claim: example-level (8, 1e-9)-differential privacy, add-or-remove-one, Poisson
sampling, for 4,000 steps of 8,192 out of a hundred million sequences. It has
not been trained here; that it compiles for a pod is tested:

  python -m ppnet.main --config=configs/llama_7b_pretrain.py \
      --config.job=COMPILE --config.topology=v5e:8x8

Where 13 GiB of a chip are free, microbatches of 32 with weights gathered once a
step send half as much (BUILD_NOTES.md, "Seven billion parameters on a pod"):
--config.perf.microbatch_size=32 --config.perf.gather_weights=true. Where memory
is short: --config.mesh.tensor=8 --config.perf.microbatch_size=8.

The data are yours to name: --config.data.source, --config.data.path and the
tokenizer. Weights to begin with: --config=configs/llama_7b_pretrain.py:DIR.
"""

from ppnet import config, presets


def get_config(weights: str = "") -> config.ExperimentConfig:
  """Full training, from `weights` (a Hugging Face directory) if it is given."""
  decoder = presets.llama_7b()
  decoder.compute_dtype = config.ComputeDtype.BFLOAT16
  decoder.remat = True
  return config.ExperimentConfig(
    name="llama_7b_pretrain",
    data=config.DataConfig(
      task=config.Task.CAUSAL, prompt="", vocab_size=decoder.vocab_size
    ),
    model=config.ModelConfig(
      decoder=decoder, decoder_weights=weights, image=None, audio=None
    ),
    attention_noise=config.AttentionNoiseConfig(stddev=0.1),
    privacy=config.PrivacyConfig(epsilon=8.0, delta=1e-9),
    optimizer=config.OptimizerConfig(learning_rate=1e-4, warmup_steps=100),
    train=config.TrainConfig(
      num_steps=4000,
      expected_batch_size=8192,
      eval_every_steps=500,
      checkpoint_every_steps=100,
    ),
    mesh=config.MeshConfig(data=1, fsdp=-1, tensor=4),
    perf=config.PerfConfig(microbatch_size=16),
    account=config.AccountConfig(num_examples=100_000_000),
  )
