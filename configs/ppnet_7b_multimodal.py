"""PPNet at full size: Llama-7B that reads pictures and sounds, on a pod.

A patch transformer of 24 layers (ViT-L/14's shape) reads pictures of 224
pixels, 256 tokens each; ten seconds of sound are 125 groups of log-mel frames.
All three mechanisms are on: DP noise, clipping, and noise in attention. One
example in ten goes without its picture, one in ten without its sound.

  FILE           adapters beside a frozen Llama, and the stems, are trained
  FILE:full      everything is trained

Claim: example-level (8, 1e-7)-differential privacy, add-or-remove-one, Poisson
sampling, for 2,000 steps of 2,048 out of a million records. It has not been
trained here; that it compiles for a pod is tested:

  python -m ppnet.main --config=configs/ppnet_7b_multimodal.py \
      --config.job=COMPILE --config.topology=v5e:8x8

The data are yours to name: --config.data.source and --config.data.path. The
vocabulary has 64 rows more than Llama's, for placeholders and answers:
published weights get them from `models.hf.extend_vocab`, and the directory that
`models.hf.save` then writes is what --config.model.decoder_weights takes.
"""

from ppnet import config, presets

_VARIANTS = ("lora", "full")


def get_config(variant: str = "lora") -> config.ExperimentConfig:
  """Adapters and stems trained ("lora"), or everything ("full")."""
  if variant not in _VARIANTS:
    raise ValueError(f"Expected a variant in {_VARIANTS}, got {variant!r}.")
  decoder = presets.llama_7b()
  decoder.vocab_size += 64
  decoder.compute_dtype = config.ComputeDtype.BFLOAT16
  decoder.remat = True
  if variant == "lora":
    decoder.lora = config.LoraConfig(
      rank=16, alpha=32.0, targets=config.PROJECTIONS
    )
  return config.ExperimentConfig(
    name=f"ppnet_7b_multimodal_{variant}",
    data=config.DataConfig(
      task=config.Task.ANSWER,
      prompt="",
      vocab_size=decoder.vocab_size,
      image_size=224,
      image_channels=3,
      audio=config.AudioConfig(
        sample_rate_hz=16000,
        max_secs=10.015,  # 1,000 whole windows.
        window_secs=0.025,
        hop_secs=0.010,
        num_mels=80,
        min_hz=0.0,
        max_hz=8000.0,
      ),
    ),
    model=config.ModelConfig(
      decoder=decoder,
      image=config.ImageStemConfig(patches=config.PatchStemConfig(remat=True)),
      audio=config.AudioStemConfig(frames_per_token=8),
      modality_dropout=0.1,
    ),
    attention_noise=config.AttentionNoiseConfig(stddev=0.1),
    privacy=config.PrivacyConfig(epsilon=8.0, delta=1e-7),
    optimizer=config.OptimizerConfig(learning_rate=1e-4, warmup_steps=50),
    train=config.TrainConfig(
      num_steps=2000,
      expected_batch_size=2048,
      eval_every_steps=200,
      checkpoint_every_steps=100,
    ),
    mesh=config.MeshConfig(data=1, fsdp=-1, tensor=4),
    perf=config.PerfConfig(microbatch_size=16),
    account=config.AccountConfig(num_examples=1_000_000),
  )
