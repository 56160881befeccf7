"""The smallest experiment that goes through every room."""

import dataclasses

from ppnet import config

# Every strategy, on eight devices.
MESHES = {
  "8": config.MeshConfig(data=8),
  "4x2": config.MeshConfig(data=4, fsdp=2),
  "2x2x2": config.MeshConfig(data=2, fsdp=2, tensor=2),
  "sequence": config.MeshConfig(data=1, fsdp=2, sequence=2, tensor=2),
  "data_parallel": config.MeshConfig(
    strategy=config.Strategy.DATA_PARALLEL, data=2, fsdp=2, tensor=2
  ),
  "zero3": config.MeshConfig(
    strategy=config.Strategy.ZERO3, data=2, fsdp=2, tensor=2
  ),
  "tensor": config.MeshConfig(
    strategy=config.Strategy.TENSOR, data=2, tensor=4
  ),
  "slices": config.MeshConfig(
    strategy=config.Strategy.SLICES, slice=2, data=1, fsdp=2, tensor=2
  ),
}


def experiment(**changes) -> config.ExperimentConfig:
  """Digits, a one-layer decoder and a handful of seeded steps.

  Args:
    **changes: fields of `PrivacyConfig`, `TrainConfig` or `ExperimentConfig`.
  """
  cfg = config.ExperimentConfig(
    name="tiny",
    data=config.DataConfig(vocab_size=96),
    model=config.ModelConfig(
      decoder=config.LlamaConfig(
        vocab_size=96,
        embed_dim=8,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        mlp_dim=12,
        max_seq_len=64,
      ),
      image=config.ImageStemConfig(channels=(4,), strides=(4,)),
      audio=config.AudioStemConfig(frames_per_token=12),
    ),
    attention_noise=config.AttentionNoiseConfig(
      stddev=0.1, consistency_weight=0.1
    ),
    privacy=config.PrivacyConfig(epsilon=1.0, noise_seed=11, sampler_seed=12),
    optimizer=config.OptimizerConfig(learning_rate=1e-2),
    train=config.TrainConfig(
      num_steps=6,
      expected_batch_size=24,
      eval_every_steps=3,
      checkpoint_every_steps=2,
    ),
    perf=config.PerfConfig(microbatch_size=16),
  )
  for name, value in changes.items():
    holders = (cfg, cfg.privacy, cfg.train, cfg.perf)
    names = [{f.name for f in dataclasses.fields(h)} for h in holders]
    holder = next(
      h for h, known in zip(holders, names, strict=True) if name in known
    )
    setattr(holder, name, value)
  return cfg


def get_config() -> config.ExperimentConfig:
  """For `--config=tests/tiny.py`."""
  return experiment()
