"""The published Llama models, by name: numbers alone, one decoder for all.

Shapes are those of the cited tables and of the published `config.json` files.
Numbers of parameters are computed from the shapes (and tested), not quoted;
papers and model cards give them rounded: 6.7B, 13.0B, 8B, 1.23B, 1.1B.

>>> llama3_8b().num_kv_heads
8
"""

from ppnet import config


def llama_7b() -> config.LlamaConfig:
  """Llama-7B: 6,738,415,616 parameters.

  Touvron et al. 2023, table 2, https://arxiv.org/abs/2302.13971.
  """
  return config.LlamaConfig()


def llama2_7b() -> config.LlamaConfig:
  """Llama-2-7B: Llama-7B's shape, twice its length.

  Touvron et al. 2023, table 1, https://arxiv.org/abs/2307.09288.
  """
  return config.LlamaConfig(max_seq_len=4096, rms_norm_eps=1e-5)


def llama2_13b() -> config.LlamaConfig:
  """Llama-2-13B: 13,015,864,320 parameters.

  Touvron et al. 2023, table 1, https://arxiv.org/abs/2307.09288.
  """
  return config.LlamaConfig(
    embed_dim=5120,
    num_layers=40,
    num_heads=40,
    num_kv_heads=40,
    mlp_dim=13824,
    max_seq_len=4096,
    rms_norm_eps=1e-5,
  )


def llama3_8b() -> config.LlamaConfig:
  """Llama-3-8B: 8,030,261,248 parameters; eight key heads, theta 500,000.

  Llama Team 2024, table 3, https://arxiv.org/abs/2407.21783.
  """
  return config.LlamaConfig(
    vocab_size=128256,
    num_kv_heads=8,
    mlp_dim=14336,
    max_seq_len=8192,
    rope_theta=500000.0,
    rms_norm_eps=1e-5,
  )


def llama32_1b() -> config.LlamaConfig:
  """Llama-3.2-1B: 1,235,814,400 parameters; tied, scaled rotary positions.

  Its model card, https://huggingface.co/meta-llama/Llama-3.2-1B.
  """
  return config.LlamaConfig(
    vocab_size=128256,
    embed_dim=2048,
    num_layers=16,
    num_kv_heads=8,
    head_dim=64,
    mlp_dim=8192,
    max_seq_len=131072,
    rope_theta=500000.0,
    rope_scaling=config.RopeScalingConfig(factor=32.0),
    rms_norm_eps=1e-5,
    tie_embeddings=True,
  )


def tinyllama_1b() -> config.LlamaConfig:
  """TinyLlama-1.1B: 1,100,048,384 parameters; four key heads.

  Zhang et al. 2024, table 1, https://arxiv.org/abs/2401.02385.
  """
  return config.LlamaConfig(
    embed_dim=2048,
    num_layers=22,
    num_kv_heads=4,
    head_dim=64,
    mlp_dim=5632,
    rms_norm_eps=1e-5,
  )
