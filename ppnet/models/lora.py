"""What is trained and what is frozen: adapters and partial fine-tuning.

A decoder whose configuration has `lora` has two small matrices beside each
chosen projection (Hu et al. 2021, https://arxiv.org/abs/2106.09685).
`partition`
splits any parameters by name into what is trained and what is frozen. The
trained part alone is what a gradient, a clip norm and an optimizer see; the
frozen part is a constant of the loss, in whatever dtype it is kept:

>>> trained, frozen = partition(
...   {"mlp": {"kernel": jnp.ones(2), "lora_a": jnp.zeros(1)}}, is_adapter)
>>> trained
{'mlp': {'lora_a': Array([0.], dtype=float32)}}
>>> combine(trained, frozen)["mlp"].keys()
dict_keys(['kernel', 'lora_a'])

*Privacy.* Clipping the trained part's gradient bounds what an example can move,
since nothing else moves. The frozen part must not have been computed from the
private records, or must have a guarantee of its own.
"""

import dataclasses
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Array, Key

from ppnet import config as config_lib
from ppnet.core import checks, param_ops, records
from ppnet.models import hf, layers

PyTree = Any
LossFn = Callable[..., Any]

_CONFIG_NAME = "adapter_config.json"
_WEIGHTS_NAME = "adapter_model.safetensors"
_THEIRS = {"lora_a": "lora_A", "lora_b": "lora_B"}
# What peft can do beside plain adapters, and the values that mean "not this".
_PLAIN = {
  "peft_type": ("LORA",),
  "bias": ("none", None),
  "fan_in_fan_out": (False, None),
  "use_rslora": (False, None),
  "use_dora": (False, None),
  "modules_to_save": (None, []),
  "rank_pattern": (None, {}),
  "alpha_pattern": (None, {}),
  "layers_to_transform": (None, []),
  "exclude_modules": (None, []),
  "target_parameters": (None, []),
}


def is_adapter(name: str) -> bool:
  """Whether a parameter, named by its path, is part of an adapter."""
  return name.rpartition("/")[2] in _THEIRS


def matches(patterns: Sequence[str]) -> Callable[[str], bool]:
  """A predicate for `partition`: any pattern matches the whole name.

  >>> matches([".*norm/scale"])("layers/mlp_norm/scale")
  True
  """
  compiled = [re.compile(pattern) for pattern in patterns]
  return lambda name: any(pattern.fullmatch(name) for pattern in compiled)


def trained_names(
  config: config_lib.ExperimentConfig,
) -> Callable[[str], bool] | None:
  """Which of the network's parameters are trained; None is all of them.

  See `config.TrainConfig.trained`.
  """
  if config.train.trained:
    return matches(config.train.trained)
  if config.model.decoder.lora is not None:
    return lambda name: is_adapter(name) or not name.startswith("decoder/")
  return None


def partition(
  params: PyTree,
  is_trained: Callable[[str], bool],
  *,
  frozen_dtype: Any = None,
) -> tuple[PyTree, PyTree]:
  """Splits parameters into (trained, frozen), both nested dicts.

  Args:
    params: nested dicts of arrays.
    is_trained: of a parameter's path, as in "layers/mlp/up_proj/kernel".
    frozen_dtype: what the frozen ones are cast to; None leaves them.

  Raises:
    ValueError: nothing would be trained.
  """
  trained: dict[str, Any] = {}
  frozen: dict[str, Any] = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    names = [entry.key for entry in path]
    if is_trained("/".join(names)):
      _put(trained, names, leaf)
    else:
      _put(
        frozen,
        names,
        leaf if frozen_dtype is None else _cast(leaf, frozen_dtype),
      )
  if not trained:
    checks.fail(
      "at least one parameter to be trained",
      "Give the decoder adapters, or patterns that match.",
      trained=[],
    )
  return trained, frozen


def combine(trained: PyTree, frozen: PyTree) -> PyTree:
  """The parameters whose parts `partition` returned.

  Raises:
    ValueError: a parameter is in both.
  """
  if not (isinstance(trained, dict) and isinstance(frozen, dict)):
    checks.fail("a parameter to be trained or frozen, not both")
  return {
    name: combine(trained[name], frozen[name])
    if name in trained and name in frozen
    else trained.get(name, frozen.get(name))
    for name in sorted(trained.keys() | frozen.keys())
  }


def with_frozen(loss_fn: LossFn, frozen: PyTree) -> LossFn:
  """A loss of the trained part alone, for `privacy.clipping.clipped_grad`.

  Under `jit`, `frozen` is an argument of the compiled function and this is
  called inside it: a constant of seven billion entries would be compiled in.

  Args:
    loss_fn: `loss_fn(params, batch, ops)` of all the parameters.
    frozen: from `partition`.

  Returns:
    `loss_fn(trained, batch, ops=PLAIN)`.
  """

  def loss(trained, batch, ops: param_ops.ParamOps = param_ops.PLAIN):
    return loss_fn(combine(trained, frozen), batch, ops=ops)

  return loss


def add(
  config: config_lib.LlamaConfig,
  params: PyTree,
  lora: config_lib.LoraConfig,
  *,
  key: Key[Array, ""],
) -> tuple[config_lib.LlamaConfig, PyTree]:
  """Puts fresh adapters beside a decoder's projections.

  They change nothing yet: A is random, B is zero.

  Args:
    config: of a decoder without adapters.
    params: its parameters; shared with the result, not copied.
    lora: shape and places of the adapters.
    key: a leaf.
  """
  config = dataclasses.replace(config, lora=lora)
  shapes, _ = partition(hf.abstract_shapes(config), is_adapter)
  leaves, structure = jax.tree_util.tree_flatten_with_path(shapes)
  keys = jax.random.split(key, len(leaves))
  fresh = []
  for (path, leaf), own in zip(leaves, keys, strict=True):
    num_layers, *shape = leaf.shape
    if path[-1].key == "lora_a":
      each = jax.random.split(own, num_layers)
      fresh.append(jax.vmap(lambda k, s=shape: layers.LORA_A_INIT(k, s))(each))
    else:
      fresh.append(jnp.zeros(leaf.shape, jnp.float32))
  return config, combine(jax.tree.unflatten(structure, fresh), params)


def merge(
  config: config_lib.LlamaConfig, params: PyTree
) -> tuple[config_lib.LlamaConfig, PyTree]:
  """Adds each adapter to its projection: the same function, no adapters left.

  kernel + (alpha / rank) A B, in float32, rounded to the kernel's dtype.

  Raises:
    ValueError: the decoder has no adapters.
  """
  lora = _lora_of(config)

  def merged(tree):
    if "lora_a" not in tree:
      return {
        name: merged(node) if isinstance(node, dict) else node
        for name, node in tree.items()
      }
    product = jnp.einsum(
      "lir,lro->lio",
      tree["lora_a"].astype(jnp.float32),
      tree["lora_b"].astype(jnp.float32),
      precision=jax.lax.Precision.HIGHEST,
    )
    kernel = tree["kernel"]
    wide = kernel.astype(jnp.float32) + (lora.alpha / lora.rank) * product
    return {"kernel": wide.astype(kernel.dtype)}

  return dataclasses.replace(config, lora=None), merged(params)


def save(
  path: hf.Path,
  config: config_lib.LlamaConfig,
  params: PyTree,
  *,
  base_model: str = "",
) -> None:
  """Writes the adapters alone, in the layout of `peft`.

  Args:
    path: the directory, made if it is missing.
    config: of the decoder, with `lora`.
    params: its parameters; those that are no adapters are passed over.
    base_model: name or directory of the frozen model, for whoever loads them.

  Raises:
    ValueError: the decoder has no adapters, or one is missing or misshapen.
  """
  lora = _lora_of(config)
  path = pathlib.Path(path)
  adapters, _ = partition(params, is_adapter)
  tensors = {}
  for (name, shape), leaf in zip(
    _leaves(config), jax.tree.leaves(adapters), strict=True
  ):
    if leaf.shape != shape:
      checks.fail(f"adapter {name!r} of shape {shape}", shape=leaf.shape)
    for layer, value in enumerate(np.asarray(leaf)):
      tensors[_their_name(name, layer)] = np.ascontiguousarray(value.T)
  path.mkdir(parents=True, exist_ok=True)
  content = safetensors.numpy.save(tensors, metadata={"format": "pt"})
  records.write_bytes(path / _WEIGHTS_NAME, content)
  records.write_json(
    path / _CONFIG_NAME,
    {
      "peft_type": "LORA",
      "task_type": "CAUSAL_LM",
      "base_model_name_or_path": base_model,
      "r": lora.rank,
      "lora_alpha": lora.alpha,
      "lora_dropout": 0.0,
      "target_modules": list(lora.targets),
      "bias": "none",
      "fan_in_fan_out": False,
      "inference_mode": True,
    },
  )


def load(
  path: hf.Path, config: config_lib.LlamaConfig
) -> tuple[config_lib.LlamaConfig, PyTree]:
  """Reads adapters that `save` or `peft` wrote.

  Args:
    path: the directory.
    config: of the decoder that they stand beside.

  Returns:
    The configuration with `lora`, and the adapters, which `combine` puts into
    the decoder's parameters.

  Raises:
    ValueError: something beside plain adapters, pickled weights, or a tensor
      that is missing, unexpected or misshapen: named.
  """
  path = pathlib.Path(path)
  file = path / _WEIGHTS_NAME
  if not file.is_file():
    checks.fail(
      f"{path} to hold {_WEIGHTS_NAME}",
      "Pickled weights (.bin) run code on loading and are not read.",
      files=sorted(other.name for other in path.glob("*")),
    )
  config = dataclasses.replace(config, lora=_read_config(path / _CONFIG_NAME))
  adapters: dict[str, Any] = {}
  with safetensors.safe_open(file, framework="numpy") as tensors:
    expected = {
      _their_name(name, layer)
      for name, shape in _leaves(config)
      for layer in range(shape[0])
    }
    hf.check_names(
      dict.fromkeys(tensors.keys()), dict.fromkeys(expected), what="adapter"
    )
    for name, (num_layers, *shape) in _leaves(config):
      each = []
      for layer in range(num_layers):
        theirs = _their_name(name, layer)
        value = tensors.get_tensor(theirs)
        if value.shape != tuple(shape[::-1]):
          checks.fail(
            f"adapter {theirs!r} of shape {tuple(shape[::-1])}",
            shape=value.shape,
          )
        each.append(value.T)
      _put(adapters, name.split("/"), jnp.asarray(np.stack(each)))
  return config, adapters


def _read_config(file: pathlib.Path) -> config_lib.LoraConfig:
  """Reads peft's description; refuses what is not implemented."""
  raw = records.read_json(file)
  for name, allowed in _PLAIN.items():
    if raw.get(name) not in allowed and name in raw:
      checks.fail(
        f"{file} to describe plain LoRA adapters",
        "This is not implemented.",
        **{name: raw[name]},
      )
  targets = raw.get("target_modules")
  if not isinstance(targets, list) or set(targets) - set(
    config_lib.PROJECTIONS
  ):
    checks.fail(
      f"{file} to list target_modules of {config_lib.PROJECTIONS}",
      target_modules=targets,
    )
  return config_lib.LoraConfig(
    rank=raw["r"],
    alpha=float(raw["lora_alpha"]),
    # One order, whatever order they were written in.
    targets=tuple(name for name in config_lib.PROJECTIONS if name in targets),
  )


def _leaves(
  config: config_lib.LlamaConfig,
) -> list[tuple[str, tuple[int, ...]]]:
  """(path, shape) of every adapter leaf, in the tree's order."""
  shapes, _ = partition(hf.abstract_shapes(config), is_adapter)
  return [
    (jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape)
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
  ]


def _their_name(name: str, layer: int) -> str:
  """peft's name: "layers/mlp/up_proj/lora_a" of one layer."""
  _, block, projection, part = name.split("/")
  block = {"attention": "self_attn"}.get(block, block)
  return (
    f"base_model.model.model.layers.{layer}.{block}.{projection}"
    f".{_THEIRS[part]}.weight"
  )


def _lora_of(config: config_lib.LlamaConfig) -> config_lib.LoraConfig:
  """The adapters' shape; raises if there are none."""
  if config.lora is None:
    checks.fail("a decoder with adapters", "Give it some with add.", lora=None)
  return config.lora


def _cast(leaf: Any, dtype: Any) -> Any:
  """An array, or the shape of one, in another dtype."""
  if isinstance(leaf, jax.ShapeDtypeStruct):
    return leaf.update(dtype=dtype)
  return leaf.astype(dtype)


def _put(tree: dict[str, Any], names: Sequence[str], leaf: Any) -> None:
  """Puts a leaf at a path of a tree under construction."""
  for name in names[:-1]:
    tree = tree.setdefault(name, {})
  tree[names[-1]] = leaf
