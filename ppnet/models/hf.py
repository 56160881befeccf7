"""Hugging Face directories of Llama models: weights in, weights out.

A directory holds `config.json` and safetensors files, one or many with an
index. What `load` accepts means the same here as in
`transformers.LlamaForCausalLM`; everything else is refused by name. Nothing is
ever unpickled: a pickle runs code.

*Memory.* `load` fills each parameter shard by shard from slices of the files,
so a process holds its own shards and, on the host, one parameter's shard at a
time. `save` holds one tensor.

>>> config, params = load("Llama-3.2-1B")  # doctest: +SKIP
>>> save("exported", config, params)  # doctest: +SKIP
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from ppnet import config as config_lib
from ppnet.core import checks, prng, records
from ppnet.models import llama
from ppnet.sharding import rules as rules_lib

PyTree = Any
Path = str | os.PathLike[str]

_INDEX_NAME = "model.safetensors.index.json"
_SINGLE_NAME = "model.safetensors"
_CONFIG_NAME = "config.json"
_ARCHITECTURE = "LlamaForCausalLM"
# What weights that run code on loading are called.
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
# What `save` takes along from the directory that a model came from.
_COMPANIONS = (
  "tokenizer*",
  "special_tokens_map.json",
  "generation_config.json",
)
_KEPT_KEYS = (
  "bos_token_id",
  "eos_token_id",
  "pad_token_id",
  "initializer_range",
)
_DTYPES = {
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(jnp.bfloat16),
}
# Old conversions stored this constant; transformers ignores it as well.
_IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Entry:
  """One parameter, or one per layer.

  Attributes:
    name: of the tensor; "{}" stands for the layer's number.
    path: of the parameter in the tree.
    transposed: theirs is [out, in], ours [in, out].
  """

  name: str
  path: tuple[str, ...]
  transposed: bool

  @property
  def is_stacked(self) -> bool:
    """Whether each layer has one."""
    return "{}" in self.name

  def names(self, num_layers: int) -> list[str]:
    """Of all its tensors."""
    count = num_layers if self.is_stacked else 1
    return [self.name.format(layer) for layer in range(count)]


def _entries(config: config_lib.LlamaConfig) -> list[_Entry]:
  """Every parameter of a model without adapters, in the order of use."""
  projections = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
  }
  theirs = {"attention": "self_attn", "mlp": "mlp"}

  def entry(name, *path, transposed=False):
    return _Entry(name=f"{name}.weight", path=path, transposed=transposed)

  entries = [entry("model.embed_tokens", "token_embed", "table")]
  for ours, name in (
    ("attention_norm", "input_layernorm"),
    ("mlp_norm", "post_attention_layernorm"),
  ):
    entries.append(entry(f"model.layers.{{}}.{name}", "layers", ours, "scale"))
  entries += [
    entry(
      f"model.layers.{{}}.{theirs[block]}.{name}",
      "layers",
      block,
      name,
      "kernel",
      transposed=True,
    )
    for block, names in projections.items()
    for name in names
  ]
  entries.append(entry("model.norm", "final_norm", "scale"))
  if not config.tie_embeddings:
    entries.append(entry("lm_head", "lm_head", "kernel", transposed=True))
  return entries


def load(
  path: Path,
  *,
  dtype: Any = None,
  mesh: Mesh | None = None,
  rules: rules_lib.Rules | None = None,
  is_wanted: Callable[[str], bool] | None = None,
) -> tuple[config_lib.LlamaConfig, PyTree]:
  """Reads a model.

  Args:
    path: the directory.
    dtype: of the parameters; None keeps what is stored (float32, bfloat16 or
      float16), bit for bit.
    mesh: where the parameters go; None is the first device.
    rules: how they are split over the mesh; None is the default strategy.
    is_wanted: of a parameter's path, as in "layers/mlp/up_proj/kernel"; the
      others are checked, not read. None is all.

  Returns:
    The decoder's shape, and its parameters as `Llama(config).apply` takes them.
    `compute_dtype` is BFLOAT16 if the embedding is stored so, else FLOAT32;
    change it with `dataclasses.replace`.

  Raises:
    ValueError: no safetensors in the directory, weights that are pickled only,
      a configuration that is not implemented, or a tensor that is missing,
      unexpected, misshapen or of another dtype: named.
  """
  path = pathlib.Path(path)
  config = read_config(path)
  with _opened(path) as shards:
    entries = _entries(config)
    boxed = abstract_params(config)
    shapes = nn.meta.unbox(boxed)
    _check_tensors(shards, entries, config, shapes)
    if shards.dtype(entries[0].name) == jnp.bfloat16:
      config.compute_dtype = config_lib.ComputeDtype.BFLOAT16
    shardings = _shardings(boxed, mesh, rules)
    params: dict[str, Any] = {}
    for entry in entries:
      if is_wanted is not None and not is_wanted("/".join(entry.path)):
        continue
      stored = shards.dtype(entry.names(config.num_layers)[0])
      shape = _at(shapes, entry.path).shape
      leaf = jax.make_array_from_callback(
        shape,
        _at(shardings, entry.path),
        functools.partial(
          _read_shard,
          shards,
          entry,
          shape,
          np.dtype(stored if dtype is None else dtype),
        ),
      )
      # Until a transfer is done it holds its buffer on the host.
      _put(params, entry.path, jax.block_until_ready(leaf))
  return config, params


def save(
  path: Path,
  config: config_lib.LlamaConfig,
  params: PyTree,
  *,
  like: Path | None = None,
  max_shard_bytes: int = 5 * 10**9,
) -> None:
  """Writes a model that `transformers` loads; each tensor in its own dtype.

  Each file appears in one rename, and `config.json` last.

  Args:
    path: the directory, made if it is missing.
    config: shape of the decoder.
    params: its parameters, arrays of JAX or NumPy, all within this process's
      reach.
    like: the directory that the model was loaded from: its tokenizer and the
      ids of its special tokens come along.
    max_shard_bytes: bound on a file, unless one tensor is larger.

  Raises:
    ValueError: `path` has weights already, the model has adapters (merge them
      first), or a parameter is missing, unexpected or misshapen: named.
  """
  path = pathlib.Path(path)
  if config.lora is not None:
    checks.fail(
      "a model without adapters",
      "Merge them first, or save them alone, with models.lora.",
      lora=config.lora,
    )
  path.mkdir(parents=True, exist_ok=True)
  there = sorted(file.name for file in path.glob("*.safetensors"))
  if there:
    checks.fail(
      "a directory without weights",
      "Name another one.",
      path=str(path),
      files=there,
    )
  check_params(config, params)
  files = _plan(config, params, max_shard_bytes=max_shard_bytes)
  for name, tensors in files.items():
    _write_file(path / name, params, tensors)
  if len(files) > 1:
    records.write_json(
      path / _INDEX_NAME,
      {
        "metadata": {
          "total_size": sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        },
        "weight_map": {
          tensor: name for name, tensors in files.items() for tensor in tensors
        },
      },
    )
  if like is not None:
    for pattern in _COMPANIONS:
      for file in sorted(pathlib.Path(like).glob(pattern)):
        shutil.copyfile(file, path / file.name)
  records.write_json(path / _CONFIG_NAME, _to_json(config, params, like=like))


def extend_vocab(
  config: config_lib.LlamaConfig, params: PyTree, *, vocab_size: int
) -> tuple[config_lib.LlamaConfig, PyTree]:
  """Adds rows to the embedding and columns to the head for new tokens.

  A new row is the mean of all old ones, so a new token begins as an average
  one. Old ids keep their rows.

  Raises:
    ValueError: `vocab_size` is below the one there is.
  """
  extra = vocab_size - config.vocab_size
  if extra < 0:
    checks.fail(f"vocab_size >= {config.vocab_size}", vocab_size=vocab_size)

  def extended(leaf, axis):
    mean = jnp.mean(leaf, axis=axis, keepdims=True, dtype=jnp.float32)
    new = jnp.repeat(mean.astype(leaf.dtype), extra, axis=axis)
    return jnp.concatenate([leaf, new], axis=axis)

  params = dict(params)
  params["token_embed"] = {"table": extended(params["token_embed"]["table"], 0)}
  if not config.tie_embeddings:
    params["lm_head"] = {"kernel": extended(params["lm_head"]["kernel"], 1)}
  return dataclasses.replace(config, vocab_size=vocab_size), params


def abstract_params(config: config_lib.LlamaConfig) -> PyTree:
  """Shapes of the parameters, boxed with their logical axes."""
  model = llama.Llama(config)
  return jax.eval_shape(
    lambda key: model.init(key, jnp.zeros((1, 1), jnp.int32)),
    jax.eval_shape(lambda: prng.root(0)),
  )["params"]


def abstract_shapes(config: config_lib.LlamaConfig) -> PyTree:
  """Shapes of the parameters, as `load` returns and `save` takes them."""
  return nn.meta.unbox(abstract_params(config))


def check_params(config: config_lib.LlamaConfig, params: PyTree) -> None:
  """Raises `ValueError`, naming the parameter, unless the shapes agree."""
  shapes = abstract_shapes(config)
  expected, found = (
    {
      jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
      for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    for tree in (shapes, params)
  )
  check_names(found, expected, what="parameter")
  for name, shape in expected.items():
    if found[name] != shape:
      checks.fail(f"parameter {name!r} of shape {shape}", shape=found[name])


def read_config(path: Path) -> config_lib.LlamaConfig:
  """Reads `config.json`, of transformers 4 or 5, with their defaults.

  As in transformers, a key that a Llama does not know changes nothing.

  Raises:
    ValueError: no such file, or something that is not implemented: named.
  """
  file = pathlib.Path(path) / _CONFIG_NAME
  if not file.is_file():
    checks.fail(f"a directory with {_CONFIG_NAME}", path=str(path))
  raw = records.read_json(file)

  def only(name, *allowed, default=None):
    if raw.get(name, default) not in allowed:
      _not_implemented(file, **{name: raw.get(name)})

  only("model_type", "llama")
  if (raw.get("architectures") or [_ARCHITECTURE]) != [_ARCHITECTURE]:
    _not_implemented(file, architectures=raw["architectures"])
  only("hidden_act", "silu", default="silu")
  only("attention_bias", False, None)
  only("mlp_bias", False, None)
  only("attention_dropout", 0, 0.0, None)
  only("quantization_config", None)
  for name in (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
  ):
    if not isinstance(raw.get(name), int) or raw[name] < 1:
      checks.fail(
        f"{file} to have a positive integer {name}", **{name: raw.get(name)}
      )
  num_heads = raw["num_attention_heads"]
  max_seq_len = raw.get("max_position_embeddings", 2048)
  theta, scaling = _read_rope(file, raw, max_seq_len=max_seq_len)
  return config_lib.LlamaConfig(
    vocab_size=raw["vocab_size"],
    embed_dim=raw["hidden_size"],
    num_layers=raw["num_hidden_layers"],
    num_heads=num_heads,
    num_kv_heads=raw.get("num_key_value_heads") or num_heads,
    head_dim=raw.get("head_dim") or raw["hidden_size"] // num_heads,
    mlp_dim=raw["intermediate_size"],
    max_seq_len=max_seq_len,
    rope_theta=float(theta),
    rope_scaling=scaling,
    rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
    tie_embeddings=raw.get("tie_word_embeddings", False),
  )


def _read_rope(
  file: pathlib.Path, raw: Mapping[str, Any], *, max_seq_len: int
) -> tuple[float, config_lib.RopeScalingConfig | None]:
  """Base and scaling of the rotary frequencies."""
  rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
  theta = rope.get("rope_theta", raw.get("rope_theta", 10000.0))
  if rope.get("partial_rotary_factor", 1.0) != 1.0:
    _not_implemented(file, partial_rotary_factor=rope["partial_rotary_factor"])
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind == "default":
    return theta, None
  if kind != "llama3":
    _not_implemented(file, rope_scaling=dict(rope))
  names = ("factor", "low_freq_factor", "high_freq_factor")
  for name in names:
    if name not in rope:
      checks.fail(
        f"{file} to give rope_scaling.{name}", rope_scaling=dict(rope)
      )
  return theta, config_lib.RopeScalingConfig(
    **{name: float(rope[name]) for name in names},
    original_max_seq_len=rope.get(
      "original_max_position_embeddings", max_seq_len
    ),
  )


def _not_implemented(file: pathlib.Path, **values: Any) -> NoReturn:
  """Raises: the model is more, or other, than a Llama."""
  checks.fail(
    f"{file} to describe a plain LlamaForCausalLM",
    "This model is not implemented.",
    **values,
  )


def _to_json(
  config: config_lib.LlamaConfig, params: PyTree, *, like: Path | None
) -> dict[str, Any]:
  """`config.json`, in the words of transformers 4, which 5 reads as well."""
  raw: dict[str, Any] = {}
  if like is not None:
    theirs = records.read_json(pathlib.Path(like) / _CONFIG_NAME)
    raw = {name: theirs[name] for name in _KEPT_KEYS if name in theirs}
  scaling = config.rope_scaling
  return raw | {
    "architectures": [_ARCHITECTURE],
    "model_type": "llama",
    "vocab_size": config.vocab_size,
    "hidden_size": config.embed_dim,
    "intermediate_size": config.mlp_dim,
    "num_hidden_layers": config.num_layers,
    "num_attention_heads": config.num_heads,
    "num_key_value_heads": config.num_kv_heads,
    "head_dim": config.head_dim,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "max_position_embeddings": config.max_seq_len,
    "rms_norm_eps": config.rms_norm_eps,
    "rope_theta": config.rope_theta,
    "rope_scaling": None
    if scaling is None
    else {
      "rope_type": "llama3",
      "factor": scaling.factor,
      "low_freq_factor": scaling.low_freq_factor,
      "high_freq_factor": scaling.high_freq_factor,
      "original_max_position_embeddings": scaling.original_max_seq_len,
    },
    "tie_word_embeddings": config.tie_embeddings,
    "torch_dtype": str(params["token_embed"]["table"].dtype),
  }


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Shards:
  """The open files of a directory.

  Attributes:
    tensors: tensor's name to the file that holds it.
  """

  tensors: Mapping[str, Any]

  def slice(self, name: str) -> Any:
    """A tensor, not read yet."""
    return self.tensors[name].get_slice(name)

  def dtype(self, name: str) -> np.dtype:
    """As which it is stored.

    Raises:
      ValueError: it is no plain number (quantised, say).
    """
    stored = self.slice(name).get_dtype()
    if stored not in _DTYPES:
      checks.fail(f"tensor {name!r} as one of {list(_DTYPES)}", dtype=stored)
    return _DTYPES[stored]


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[_Shards]:
  """Opens the files of a directory, and checks them against its index."""
  index = path / _INDEX_NAME
  weight_map: dict[str, str] = {}
  if index.is_file():
    weight_map = records.read_json(index)["weight_map"]
    names = sorted(set(weight_map.values()))
  elif (path / _SINGLE_NAME).is_file():
    names = [_SINGLE_NAME]
  else:
    pickled = sorted(
      file.name for pattern in _PICKLED for file in path.glob(pattern)
    )
    checks.fail(
      f"{path} to hold {_SINGLE_NAME} or {_INDEX_NAME}",
      "Pickled weights run code on loading and are not read: convert them to"
      " safetensors where you trust them."
      if pickled
      else "",
      pickled=pickled,
    )
  tensors = {}
  with contextlib.ExitStack() as stack:
    for name in names:
      # An index from elsewhere must not lead out of its directory.
      if pathlib.Path(name).name != name or not (path / name).is_file():
        checks.fail(f"{index} to name files beside it", file=name)
      # Read, not mapped: pages of a map would count as this process's memory.
      file = stack.enter_context(
        safetensors.safe_open(path / name, framework="numpy", backend="pread")
      )
      tensors |= dict.fromkeys(file.keys(), file)
    if weight_map:
      check_names(tensors, weight_map, what="tensor")
    yield _Shards(tensors=tensors)


def check_names(
  found: Mapping[str, Any], expected: Mapping[str, Any], *, what: str
) -> None:
  """Raises `ValueError` with the names that are missing or too many."""
  missing = sorted(expected.keys() - found.keys())
  extra = sorted(found.keys() - expected.keys())
  if missing or extra:
    checks.fail(
      f"every {what} of this configuration and no other",
      **{
        f"{kind} ({len(names)})": names[:8]
        for kind, names in (("missing", missing), ("unexpected", extra))
        if names
      },
    )


def _check_tensors(
  shards: _Shards,
  entries: Sequence[_Entry],
  config: config_lib.LlamaConfig,
  shapes: PyTree,
) -> None:
  """Raises for a tensor that is missing, unexpected, misshapen or mixed."""
  expected = {
    name: entry for entry in entries for name in entry.names(config.num_layers)
  }
  found = {n: f for n, f in shards.tensors.items() if not _IGNORED.fullmatch(n)}
  check_names(found, expected, what="tensor")
  for name, entry in expected.items():
    shape = _at(shapes, entry.path).shape[1 if entry.is_stacked else 0 :]
    shape = shape[::-1] if entry.transposed else shape
    stored = tuple(shards.slice(name).get_shape())
    if stored != shape:
      checks.fail(f"tensor {name!r} of shape {shape}", shape=stored)
    first = entry.names(config.num_layers)[0]
    if shards.dtype(name) != shards.dtype(first):
      checks.fail(
        f"tensor {name!r} in the dtype of {first!r}",
        dtype=str(shards.dtype(name)),
      )


def _shardings(
  boxed: PyTree, mesh: Mesh | None, rules: rules_lib.Rules | None
) -> PyTree:
  """Where each parameter goes."""
  if mesh is not None:
    return (rules or rules_lib.Rules()).param_shardings(mesh, boxed)
  one: Sharding = SingleDeviceSharding(jax.local_devices()[0])
  return jax.tree.map(lambda _: one, nn.meta.unbox(boxed))


def _read_shard(
  shards: _Shards,
  entry: _Entry,
  shape: tuple[int, ...],
  dtype: np.dtype,
  index: tuple[slice, ...],
) -> np.ndarray:
  """Reads one device's part of a parameter, a layer at a time."""
  ranges = [
    range(*part.indices(size)) for part, size in zip(index, shape, strict=True)
  ]
  out = np.empty([len(part) for part in ranges], dtype)

  def read(name, part):
    part = [slice(r.start, r.stop) for r in part]
    if entry.transposed:
      return shards.slice(name)[part[1], part[0]].T
    return shards.slice(name)[tuple(part)]

  if entry.is_stacked:
    for row, layer in enumerate(ranges[0]):
      out[row] = read(entry.name.format(layer), ranges[1:])
  else:
    out[...] = read(entry.name, ranges)
  return out


def _plan(
  config: config_lib.LlamaConfig, params: PyTree, *, max_shard_bytes: int
) -> dict[str, dict[str, tuple[_Entry, int]]]:
  """File to its tensors; a tensor is a parameter's entry and layer."""
  files: list[dict[str, tuple[_Entry, int]]] = [{}]
  num_bytes = 0
  for entry in _entries(config):
    leaf = _at(params, entry.path)
    names = entry.names(config.num_layers)
    for layer, name in enumerate(names):
      size = leaf.nbytes // len(names)
      if files[-1] and num_bytes + size > max_shard_bytes:
        files.append({})
        num_bytes = 0
      files[-1][name] = (entry, layer)
      num_bytes += size
  if len(files) == 1:
    return {_SINGLE_NAME: files[0]}
  return {
    f"model-{number:05d}-of-{len(files):05d}.safetensors": tensors
    for number, tensors in enumerate(files, start=1)
  }


def _tensor(leaf: Any, entry: _Entry, layer: int) -> np.ndarray:
  """One tensor as it is stored, on the host."""
  value = np.asarray(leaf[layer] if entry.is_stacked else leaf)
  return np.ascontiguousarray(value.T if entry.transposed else value)


def _header(params: PyTree, tensors: Mapping[str, tuple[_Entry, int]]) -> bytes:
  """What a safetensors file begins with.

  The length of a JSON object, 8 bytes, and the object: of each tensor its
  dtype, its shape and where it begins and ends in what follows
  (https://huggingface.co/docs/safetensors, "Format").
  """
  # transformers refuses files that do not say this.
  described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
  names = {dtype: name for name, dtype in _DTYPES.items()}
  end = 0
  for name, (entry, _) in tensors.items():
    leaf = _at(params, entry.path)
    shape = leaf.shape[1:] if entry.is_stacked else leaf.shape
    begin, end = end, end + leaf.nbytes * math.prod(shape) // leaf.size
    described[name] = {
      "dtype": names[np.dtype(leaf.dtype)],
      "shape": shape[::-1] if entry.transposed else shape,
      "data_offsets": (begin, end),
    }
  content = json.dumps(described, separators=(",", ":")).encode()
  content += b" " * (-len(content) % 8)  # What follows is aligned.
  return len(content).to_bytes(8, "little") + content


def _write_file(
  path: pathlib.Path, params: PyTree, tensors: dict[str, tuple[_Entry, int]]
) -> None:
  """Writes a safetensors file, which appears whole or not at all."""
  temporary = path.with_name(f".unfinished-{path.name}")
  with temporary.open("wb") as file:
    file.write(_header(params, tensors))
    for entry, layer in tensors.values():
      value = _tensor(_at(params, entry.path), entry, layer)
      file.write(value.view(np.uint8).data)
    file.flush()
    os.fsync(file.fileno())
  temporary.replace(path)


def _at(tree: PyTree, path: Sequence[str]) -> Any:
  """The leaf at a path."""
  return functools.reduce(lambda node, name: node[name], path, tree)


def _put(tree: dict[str, Any], path: Sequence[str], leaf: Any) -> None:
  """Puts a leaf at a path of a tree under construction."""
  for name in path[:-1]:
    tree = tree.setdefault(name, {})
  tree[path[-1]] = leaf
