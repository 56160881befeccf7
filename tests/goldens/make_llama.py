"""Makes `llama.npz` and `llama.json`: what transformers computes.

  python -m tests.goldens.make_llama      (with torch and transformers at hand)

Each preset's family at a small size, with weights that this file makes, so that
only results are stored. Made again only when a case is added: the numbers are
another library's.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping

import numpy as np

from ppnet import config, presets

FOLDER = pathlib.Path(__file__).parent
_SMALL_ROPE = {"original_max_seq_len": 32}

# Every size differs from every other one, so that no two axes can be swapped.
FAMILIES = {
  "llama_7b": dict(num_heads=3, num_kv_heads=3, head_dim=8),
  "llama2_7b": dict(num_heads=4, num_kv_heads=4, head_dim=6),
  "llama2_13b": dict(num_heads=6, num_kv_heads=6, head_dim=4),
  "llama3_8b": dict(num_heads=4, num_kv_heads=1, head_dim=10),
  "llama32_1b": dict(num_heads=8, num_kv_heads=2, head_dim=12),
  "tinyllama_1b": dict(num_heads=8, num_kv_heads=4, head_dim=4),
}
_BATCH, _LENGTH, _NEW_TOKENS = 2, 9, 7


def small(family: str) -> config.LlamaConfig:
  """A preset's family at a size for tests."""
  cfg = dataclasses.replace(
    getattr(presets, family)(),
    vocab_size=37,
    embed_dim=24,
    num_layers=2,
    mlp_dim=40,
    max_seq_len=64,
    **FAMILIES[family],
  )
  if cfg.rope_scaling is not None:
    cfg.rope_scaling = dataclasses.replace(cfg.rope_scaling, **_SMALL_ROPE)
  return cfg


def weights(
  shapes: Mapping[str, tuple[int, ...]], *, seed: int
) -> dict[str, np.ndarray]:
  """Tensors [out, in] of unit gain and scales near 1, float32.

  Uniform numbers from PCG64 alone: a stream that NumPy promises to keep.
  """
  rng = np.random.Generator(np.random.PCG64(seed))
  made = {}
  for name in sorted(shapes):
    uniform = 2 * rng.random(shapes[name]) - 1
    if uniform.ndim == 1:
      value = 1 + 0.3 * uniform
    elif "embed" in name:
      value = uniform
    else:
      value = uniform * (3 / uniform.shape[-1]) ** 0.5
    made[name] = value.astype(np.float32)
  return made


def inputs(seed: int) -> dict[str, np.ndarray]:
  """Tokens, the number of padding tokens on the left, and packed segments."""
  rng = np.random.Generator(np.random.PCG64(1000 + seed))
  tokens = rng.integers(3, 37, (_BATCH, _LENGTH))
  return {
    "tokens": tokens.astype(np.int32),
    "num_padding": np.array([0, 4], np.int32),
    "segment_ids": np.array(
      [[1, 1, 1, 2, 2, 2, 2, 2, 2], [1, 2, 2, 3, 3, 3, 3, 0, 0]], np.int32
    ),
  }


def positions(segment_ids: np.ndarray) -> np.ndarray:
  """Each token's place in its own segment."""
  place = np.zeros_like(segment_ids)
  for t in range(1, segment_ids.shape[1]):
    same = segment_ids[:, t] == segment_ids[:, t - 1]
    place[:, t] = np.where(same, place[:, t - 1] + 1, 0)
  return place


def hf_model(cfg: config.LlamaConfig, seed: int):
  """A `LlamaForCausalLM` of this shape with the weights above."""
  import torch
  import transformers

  rope = {"rope_type": "default", "rope_theta": cfg.rope_theta}
  if cfg.rope_scaling is not None:
    scaling = cfg.rope_scaling
    rope |= {
      "rope_type": "llama3",
      "factor": scaling.factor,
      "low_freq_factor": scaling.low_freq_factor,
      "high_freq_factor": scaling.high_freq_factor,
      "original_max_position_embeddings": scaling.original_max_seq_len,
    }
  model = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
      vocab_size=cfg.vocab_size,
      hidden_size=cfg.embed_dim,
      intermediate_size=cfg.mlp_dim,
      num_hidden_layers=cfg.num_layers,
      num_attention_heads=cfg.num_heads,
      num_key_value_heads=cfg.num_kv_heads,
      head_dim=cfg.head_dim,
      max_position_embeddings=cfg.max_seq_len,
      rms_norm_eps=cfg.rms_norm_eps,
      tie_word_embeddings=cfg.tie_embeddings,
      rope_parameters=rope,
      attn_implementation="eager",
    )
  ).eval()
  named = dict(model.named_parameters())  # A tied head is not named twice.
  made = weights({n: tuple(p.shape) for n, p in named.items()}, seed=seed)
  with torch.no_grad():
    for name, parameter in named.items():
      parameter.copy_(torch.from_numpy(made[name]))
  return model


def results(cfg: config.LlamaConfig, seed: int) -> dict[str, np.ndarray]:
  """Logits and greedy tokens by transformers."""
  import torch

  model = hf_model(cfg, seed)
  given = {n: torch.from_numpy(v).long() for n, v in inputs(seed).items()}
  tokens, segments = given["tokens"], given["segment_ids"]
  is_token = (
    torch.arange(_LENGTH)[None] >= given["num_padding"][:, None]
  ).long()
  at = torch.from_numpy(positions(inputs(seed)["segment_ids"])).long()
  allowed = (segments[:, :, None] == segments[:, None]) & torch.ones(
    _LENGTH, _LENGTH, dtype=torch.bool
  ).tril()
  with torch.no_grad():
    out = {
      "plain": model(tokens).logits,
      "left_padded": model(
        tokens,
        attention_mask=is_token,
        position_ids=(is_token.cumsum(-1) - 1).clamp(min=0),
      ).logits,
      "packed": model(
        tokens,
        attention_mask=torch.where(allowed, 0.0, torch.finfo().min)[:, None],
        position_ids=at,
      ).logits,
      "greedy": model.generate(
        tokens,
        attention_mask=is_token,
        max_new_tokens=_NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
      )[:, _LENGTH:].int(),
      "bfloat16": model.to(torch.bfloat16)(tokens).logits.float(),
    }
  return {name: value.numpy() for name, value in out.items()}


def _main() -> None:
  import torch
  import transformers

  arrays, configs = {}, {}
  for seed, family in enumerate(FAMILIES):
    cfg = small(family)
    configs[family] = json.loads(hf_model(cfg, seed).config.to_json_string())
    for name, value in results(cfg, seed).items():
      arrays[f"{family}/{name}"] = value
  np.savez_compressed(FOLDER / "llama.npz", **arrays)
  made_by = {
    "torch": torch.__version__,
    "transformers": transformers.__version__,
  }
  text = json.dumps({"made_by": made_by, "configs": configs}, indent=1)
  (FOLDER / "llama.json").write_text(text + "\n")


if __name__ == "__main__":
  _main()
