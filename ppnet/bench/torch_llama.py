"""A PyTorch Llama equal to `models.llama`, and Opacus' clipped sums of it.

The same shapes, RMSNorm, rotary positions in the half-split layout, SwiGLU and
causal attention; every query head has its own key head, and the head is not
tied. Parameters are copied from ours, so that losses and sums can be compared:
ratios of two different models would say nothing about the engines.

Neither torch nor opacus is needed by the package: they are imported when a
function here is called, and the `peers` extra brings them.
"""

import json
import math
import os
import pathlib
import tempfile
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from ppnet import config as config_lib
from ppnet.bench import measure
from ppnet.core import checks

PyTree = Any

# Our path within a layer → the PyTorch module's name; both hold a "weight",
# PyTorch's transposed.
_LAYER_MODULES = {
  ("attention_norm", "scale"): "attention_norm",
  ("attention", "q_proj", "kernel"): "q_proj",
  ("attention", "k_proj", "kernel"): "k_proj",
  ("attention", "v_proj", "kernel"): "v_proj",
  ("attention", "o_proj", "kernel"): "o_proj",
  ("mlp_norm", "scale"): "mlp_norm",
  ("mlp", "gate_proj", "kernel"): "gate_proj",
  ("mlp", "up_proj", "kernel"): "up_proj",
  ("mlp", "down_proj", "kernel"): "down_proj",
}
_OTHER_MODULES = {
  ("token_embed", "table"): "token_embed",
  ("final_norm", "scale"): "final_norm",
  ("lm_head", "kernel"): "lm_head",
}


def _torch() -> Any:
  """The package; told before its import to keep its profiler quiet."""
  os.environ.setdefault("KINETO_LOG_LEVEL", "99")
  os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
  import torch

  return torch


def why_not(config: config_lib.LlamaConfig | None) -> str:
  """Why a model has no equal here; nothing if it has."""
  if config is None:
    return "not a plain Llama: no equal PyTorch model"
  if config.num_kv_heads != config.num_heads or config.tie_embeddings:
    return "grouped keys or tied embeddings: no equal PyTorch model"
  if config.remat:
    return "remat: Opacus' hooks do not go through checkpointing"
  if config.compute_dtype is not config_lib.ComputeDtype.FLOAT32:
    return "the PyTorch model is float32"
  return ""


def build(config: config_lib.LlamaConfig, params: PyTree) -> Any:
  """The PyTorch model with our parameters.

  Args:
    config: shape of the decoder.
    params: of `models.llama.Llama(config)`.

  Returns:
    A `torch.nn.Module` from tokens i64[B, T] to logits f32[B, T, V].

  Raises:
    ValueError: a shape that the PyTorch model does not have.
  """
  if reason := why_not(config):
    checks.fail("a model with an equal in PyTorch", reason, config=config)
  torch = _torch()

  width = config.num_heads * config.head_dim
  linear = lambda i, o: torch.nn.Linear(i, o, bias=False)
  norm = lambda: torch.nn.RMSNorm(config.embed_dim, eps=config.rms_norm_eps)

  class Layer(torch.nn.Module):
    """One decoder block."""

    def __init__(self):
      super().__init__()
      self.attention_norm = norm()
      self.q_proj = linear(config.embed_dim, width)
      self.k_proj = linear(config.embed_dim, width)
      self.v_proj = linear(config.embed_dim, width)
      self.o_proj = linear(width, config.embed_dim)
      self.mlp_norm = norm()
      self.gate_proj = linear(config.embed_dim, config.mlp_dim)
      self.up_proj = linear(config.embed_dim, config.mlp_dim)
      self.down_proj = linear(config.mlp_dim, config.embed_dim)

    def heads(self, x):  # [B, T, D] -> [B, N, T, H]
      return x.unflatten(-1, (config.num_heads, -1)).transpose(1, 2)

    def forward(self, x, sin, cos):
      normed = self.attention_norm(x)
      q, k, v = (
        self.heads(project(normed))
        for project in (self.q_proj, self.k_proj, self.v_proj)
      )
      out = torch.nn.functional.scaled_dot_product_attention(
        _rotate(torch, q, sin, cos),
        _rotate(torch, k, sin, cos),
        v,
        is_causal=True,
      )
      x = x + self.o_proj(out.transpose(1, 2).flatten(2))
      normed = self.mlp_norm(x)
      gate = torch.nn.functional.silu(self.gate_proj(normed))
      return x + self.down_proj(gate * self.up_proj(normed))

  class Llama(torch.nn.Module):
    """Tokens to logits."""

    def __init__(self):
      super().__init__()
      self.token_embed = torch.nn.Embedding(config.vocab_size, config.embed_dim)
      self.layers = torch.nn.ModuleList(
        Layer() for _ in range(config.num_layers)
      )
      self.final_norm = norm()
      self.lm_head = linear(config.embed_dim, config.vocab_size)

    def forward(self, tokens):
      # Not a buffer: Opacus refuses modules with buffers.
      half = config.head_dim // 2
      frequency = config.rope_theta ** (-torch.arange(half) / half)
      angle = torch.arange(tokens.shape[1])[:, None] * frequency
      x = self.token_embed(tokens)
      for layer in self.layers:
        x = layer(x, angle.sin(), angle.cos())
      return self.lm_head(self.final_norm(x))

  model = Llama()
  with torch.no_grad():
    for name, weight in _from_ours(config, params).items():
      model.get_parameter(name).copy_(torch.from_numpy(weight))
  return model


def _rotate(torch: Any, x: Any, sin: Any, cos: Any) -> Any:
  """Rotary positions: pairs (i, i + H/2) of [B, N, T, H]."""
  first, second = x.chunk(2, dim=-1)
  return torch.cat(
    (first * cos - second * sin, second * cos + first * sin), dim=-1
  )


def _from_ours(
  config: config_lib.LlamaConfig, params: PyTree
) -> dict[str, np.ndarray]:
  """Our tree as PyTorch's flat names; kernels are transposed, layers apart."""
  flat = {}

  def turned(path: tuple[str, ...], value: np.ndarray) -> np.ndarray:
    return np.array(value.T if path[-1] == "kernel" else value)

  for path, module in _OTHER_MODULES.items():
    flat[f"{module}.weight"] = turned(path, np.asarray(_at(params, path)))
  for path, module in _LAYER_MODULES.items():
    stacked = np.asarray(_at(params["layers"], path))
    for layer in range(config.num_layers):
      flat[f"layers.{layer}.{module}.weight"] = turned(path, stacked[layer])
  return flat


def to_ours(
  config: config_lib.LlamaConfig, weights: Mapping[str, np.ndarray]
) -> PyTree:
  """PyTorch's flat names as our tree: the inverse of the copy in `build`.

  Args:
    config: shape of the decoder.
    weights: arrays in the shapes of the model's parameters, by their names.
  """
  tree: dict[str, Any] = {"layers": {}}

  def put(root: dict[str, Any], path: tuple[str, ...], value: np.ndarray):
    for name in path[:-1]:
      root = root.setdefault(name, {})
    root[path[-1]] = value

  def turned(path: tuple[str, ...], name: str) -> np.ndarray:
    value = weights[f"{name}.weight"]
    return value.T if path[-1] == "kernel" else value

  for path, module in _OTHER_MODULES.items():
    put(tree, path, turned(path, module))
  for path, module in _LAYER_MODULES.items():
    put(
      tree["layers"],
      path,
      np.stack(
        [
          turned(path, f"layers.{layer}.{module}")
          for layer in range(config.num_layers)
        ]
      ),
    )
  return tree


def _at(tree: PyTree, path: tuple[str, ...]) -> Any:
  """The leaf of nested mappings at `path`."""
  for name in path:
    tree = tree[name]
  return tree


def example_losses(model: Any, batch: Mapping[str, Any]) -> Any:
  """Mean cross-entropy of each example's tokens, f32[B]."""
  torch = _torch()

  logits = model(batch["tokens"])  # [B, T, V]
  losses = torch.nn.functional.cross_entropy(
    logits.flatten(0, 1), batch["targets"].flatten(), reduction="none"
  )
  return losses.view(batch["targets"].shape).mean(dim=1)


Step = Callable[[], tuple[dict[str, Any], Any]]


def plain_step(model: Any, microbatches: list[Any]) -> Step:
  """The sum of gradients and the losses, without privacy."""
  torch = _torch()

  def step():
    model.zero_grad(set_to_none=True)
    losses = []
    for batch in microbatches:
      loss = example_losses(model, batch)
      loss.sum().backward()
      losses.append(loss.detach())
    grads = {name: p.grad for name, p in model.named_parameters()}
    return grads, torch.cat(losses)

  return step


def hooks_step(
  model: Any, microbatches: list[Any], *, l2_clip_norm: float
) -> Step:
  """The clipped sum from Opacus' hooks: per-example gradients of each layer."""
  _torch()
  import opacus

  wrapped = opacus.GradSampleModule(model, loss_reduction="sum")
  optimizer = opacus.optimizers.DPOptimizer(
    **_optimizer_arguments(model, l2_clip_norm)
  )
  return _opacus_step(
    wrapped, optimizer, microbatches, lambda loss: loss.sum().backward()
  )


def ghost_step(
  model: Any, microbatches: list[Any], *, l2_clip_norm: float
) -> Step:
  """The clipped sum from Opacus' ghost clipping: two backward passes."""
  _torch()
  from opacus import grad_sample, optimizers
  from opacus.utils import fast_gradient_clipping_utils as fast

  wrapped = grad_sample.GradSampleModuleFastGradientClipping(
    model,
    loss_reduction="sum",
    max_grad_norm=l2_clip_norm,
    use_ghost_clipping=True,
  )
  optimizer = optimizers.DPOptimizerFastGradientClipping(
    **_optimizer_arguments(model, l2_clip_norm)
  )
  return _opacus_step(
    wrapped,
    optimizer,
    microbatches,
    lambda loss: fast.DPTensorFastGradientClipping(
      wrapped, optimizer, loss, "sum"
    ).backward(),
  )


def _optimizer_arguments(model: Any, l2_clip_norm: float) -> dict[str, Any]:
  """What both of Opacus' optimizers are made of; no step of it is taken."""
  torch = _torch()

  return {
    "optimizer": torch.optim.SGD(model.parameters(), lr=0.0),
    "noise_multiplier": 0.0,
    "max_grad_norm": l2_clip_norm,
    "expected_batch_size": None,
    "loss_reduction": "sum",
  }


def _opacus_step(
  wrapped: Any,
  optimizer: Any,
  microbatches: list[Any],
  backward: Callable[[Any], None],
) -> Step:
  """Adds up microbatches as Opacus' own BatchMemoryManager does.

  Each optimizer step is announced as one to be skipped: it clips and adds to
  the sum, and neither noise nor update follows.
  """
  torch = _torch()

  def step():
    for p in optimizer.params:
      p.summed_grad = None
    losses = []
    for batch in microbatches:
      optimizer.zero_grad(set_to_none=True)
      loss = example_losses(wrapped, batch)
      with warnings.catch_warnings():
        # Token ids need no gradient; the hooks work without it.
        warnings.filterwarnings("ignore", message="Full backward hook")
        backward(loss)
      optimizer.signal_skip_step(do_skip=True)
      optimizer.step()
      losses.append(loss.detach())
    optimizer.zero_grad(set_to_none=True)  # Frees the examples' gradients.
    grads = {
      name.removeprefix("_module."): p.summed_grad
      for name, p in wrapped.named_parameters()
    }
    return grads, torch.cat(losses)

  return step


def program(step: Step) -> measure.Program:
  """Measures memory and FLOPs of one step, which also warms it up.

  Memory is the most that PyTorch's CPU allocator had handed out at one time
  during the step, as its profiler records, less the returned sum: what XLA
  calls temporary. FLOPs are those of `torch.utils.flop_counter`.
  """
  torch = _torch()
  from torch.utils import flop_counter

  step()  # Caches and lazily made buffers are not part of a step.
  with torch.profiler.profile(
    activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
  ) as profiler:
    grads, _ = step()
  peak = _peak_bytes(profiler)
  # PyTorch's own counter knows attention on other devices only.
  counter = flop_counter.FlopCounterMode(
    display=False,
    custom_mapping={
      torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        _attention_flops
      ),
      torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        _attention_backward_flops
      ),
    },
  )
  with counter:
    step()
  flops = int(counter.get_total_flops())
  result_bytes = sum(g.numel() * g.element_size() for g in grads.values())
  return measure.Program(
    run=step,
    memory_bytes=max(peak - result_bytes, 0),
    flops=(flops, flops),
  )


def _attention_flops(
  query: tuple[int, ...], key: tuple[int, ...], *_: Any, **__: Any
) -> int:
  """Two products of [T, H] and [H, S] per head; shapes are [B, N, T, H]."""
  return 4 * math.prod(query) * key[-2]


def _attention_backward_flops(
  grad_out: tuple[int, ...],
  query: tuple[int, ...],
  key: tuple[int, ...],
  *_: Any,
  **__: Any,
) -> int:
  """Four products, and the scores once more: they are not kept."""
  del grad_out  # Of the query's shape.
  return 10 * math.prod(query) * key[-2]


def _peak_bytes(profiler: Any) -> int:
  """The most bytes allocated since the profile began."""
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "trace.json"
    profiler.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
  changes = sorted(
    (event["ts"], event["args"]["Bytes"])
    for event in events
    if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0
  )
  peak = total = 0
  for _, change in changes:
    total += change
    peak = max(peak, total)
  return peak


def microbatches_of(
  batch: Mapping[str, jax.Array], size: int | None
) -> list[dict[str, Any]]:
  """Our batch as PyTorch's, in microbatches of `size` (all if None)."""
  torch = _torch()

  tokens, targets = (
    torch.from_numpy(np.array(batch[name], np.int64))
    for name in ("tokens", "targets")
  )
  size = size or len(tokens)
  # Contiguous copies: Opacus' ghost rule for embeddings views the ids.
  return [
    {
      "tokens": tokens[start : start + size].contiguous(),
      "targets": targets[start : start + size].contiguous(),
    }
    for start in range(0, len(tokens), size)
  ]
