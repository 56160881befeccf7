"""Hugging Face directories: parity, round trips, refusals, memory."""

import dataclasses
import importlib
import json
import pathlib
import subprocess
import sys
import weakref

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from ppnet import config as config_lib
from ppnet.core import records
from ppnet.models import hf, llama
from ppnet.sharding import mesh as mesh_lib
from tests.goldens import make_llama

FAMILIES = list(make_llama.FAMILIES)
# Compiling is what these cost: plain, grouped, tied and scaled by default.
_BY_DEFAULT = ("llama_7b", "llama3_8b", "llama32_1b")
PARITY = [
  pytest.param(
    family, marks=[] if family in _BY_DEFAULT else [pytest.mark.slow]
  )
  for family in FAMILIES
]


@pytest.fixture(scope="module")
def goldens():
  with np.load(make_llama.FOLDER / "llama.npz") as arrays:
    return dict(arrays)


@pytest.fixture(scope="module")
def golden_configs():
  return records.read_json(make_llama.FOLDER / "llama.json")["configs"]


def tensor_shapes(cfg):
  """Their names and shapes, from the format's own description."""
  heads, kv_heads = (
    cfg.num_heads * cfg.head_dim,
    cfg.num_kv_heads * cfg.head_dim,
  )
  shapes = {
    "model.embed_tokens.weight": (cfg.vocab_size, cfg.embed_dim),
    "model.norm.weight": (cfg.embed_dim,),
  }
  if not cfg.tie_embeddings:
    shapes["lm_head.weight"] = (cfg.vocab_size, cfg.embed_dim)
  for i in range(cfg.num_layers):
    for name, shape in {
      "input_layernorm": (cfg.embed_dim,),
      "post_attention_layernorm": (cfg.embed_dim,),
      "self_attn.q_proj": (heads, cfg.embed_dim),
      "self_attn.k_proj": (kv_heads, cfg.embed_dim),
      "self_attn.v_proj": (kv_heads, cfg.embed_dim),
      "self_attn.o_proj": (cfg.embed_dim, heads),
      "mlp.gate_proj": (cfg.mlp_dim, cfg.embed_dim),
      "mlp.up_proj": (cfg.mlp_dim, cfg.embed_dim),
      "mlp.down_proj": (cfg.embed_dim, cfg.mlp_dim),
    }.items():
      shapes[f"model.layers.{i}.{name}.weight"] = shape
  return shapes


def tensors(cfg, seed, dtype=np.float32):
  made = make_llama.weights(tensor_shapes(cfg), seed=seed)
  return {name: value.astype(dtype) for name, value in made.items()}


def write(folder, raw, named):
  folder.mkdir(exist_ok=True)
  (folder / "config.json").write_text(json.dumps(raw))
  safetensors.numpy.save_file(named, folder / "model.safetensors")
  return folder


@pytest.fixture(scope="module")
def directory(tmp_path_factory, golden_configs):
  """Writes a family's directory, once."""
  root = tmp_path_factory.mktemp("hf")

  def make(family, dtype=np.float32):
    folder = root / f"{family}-{np.dtype(dtype).name}"
    if not folder.exists():
      seed = FAMILIES.index(family)
      named = tensors(make_llama.small(family), seed, dtype)
      write(folder, golden_configs[family], named)
    return folder

  return make


def apply(config, params, *cases):
  """Logits of cases (tokens, segment_ids, positions), compiled once."""
  run = jax.jit(
    lambda params, tokens, segment_ids, positions: llama.Llama(config).apply(
      {"params": params}, tokens, segment_ids=segment_ids, positions=positions
    )
  )
  return [
    np.asarray(run(params, *(jnp.asarray(x, jnp.int32) for x in case)))
    for case in cases
  ]


def plain(tokens):
  """All of a row is one segment."""
  place = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
  return tokens, np.zeros(tokens.shape), place


# Parity.


@pytest.mark.parametrize("family", PARITY)
def test_logits_match_transformers(family, directory, goldens):
  config, params = hf.load(directory(family))
  assert config == make_llama.small(family)
  given = make_llama.inputs(FAMILIES.index(family))
  tokens, padding = given["tokens"], given["num_padding"][:, None]
  place = np.arange(tokens.shape[1])[None]
  segment_ids = given["segment_ids"]
  logits = apply(
    config,
    params,
    plain(tokens),
    (tokens, place >= padding, np.maximum(place - padding, 0)),
    (tokens, segment_ids, make_llama.positions(segment_ids)),
  )
  for case, got in zip(("plain", "left_padded", "packed"), logits, strict=True):
    # What padding itself computes means nothing.
    counts = place >= (padding if case == "left_padded" else 0 * padding)
    np.testing.assert_allclose(
      got[counts], goldens[f"{family}/{case}"][counts], atol=1e-4, err_msg=case
    )
  # Fails if: theta, epsilon, scaling, grouping or a transposition is off.


@pytest.mark.parametrize(
  "family", [pytest.param("llama_7b", marks=pytest.mark.slow), "llama32_1b"]
)
def test_bfloat16_is_as_close_to_float32_as_transformers_own(
  family, directory, goldens
):
  config, params = hf.load(directory(family, jnp.bfloat16))
  assert config.compute_dtype is config_lib.ComputeDtype.BFLOAT16
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
  tokens = make_llama.inputs(FAMILIES.index(family))["tokens"]
  (got,) = apply(config, params, plain(tokens))
  exact = goldens[f"{family}/plain"]
  rms = lambda error: np.sqrt(np.mean(error**2))
  theirs = rms(goldens[f"{family}/bfloat16"] - exact)
  assert 0 < rms(got - exact) < 1.2 * theirs
  assert rms(got - goldens[f"{family}/bfloat16"]) < 2 * theirs


def test_scaling_and_theta_matter_to_the_goldens(directory, goldens):
  """What the parity test compares would show a model without them."""
  config, params = hf.load(directory("llama32_1b"))
  tokens = make_llama.inputs(FAMILIES.index("llama32_1b"))["tokens"]
  for change in ({"rope_scaling": None}, {"rope_theta": 1e4}):
    changed = dataclasses.replace(config, **change)
    (got,) = apply(changed, params, plain(tokens))
    assert np.abs(got - goldens["llama32_1b/plain"]).max() > 1e-2


# In and out.


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
def test_round_trip_is_bit_exact(dtype, directory, tmp_path):
  source = directory("llama3_8b", dtype)
  config, params = hf.load(source)
  hf.save(tmp_path / "out", config, params)
  written = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
  expected = tensors(config, FAMILIES.index("llama3_8b"), dtype)
  assert written.keys() == expected.keys()
  for name, value in expected.items():
    assert written[name].dtype == value.dtype
    np.testing.assert_array_equal(
      written[name].view(np.uint8), value.view(np.uint8), err_msg=name
    )
  again, params_again = hf.load(tmp_path / "out")
  assert again == config
  jax.tree.map(np.testing.assert_array_equal, params, params_again)


def test_many_files_and_an_index_hold_the_same(directory, tmp_path):
  config, params = hf.load(directory("tinyllama_1b"))
  hf.save(tmp_path, config, params, max_shard_bytes=10_000)
  files = sorted(file.name for file in tmp_path.glob("*.safetensors"))
  assert len(files) > 3
  assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
  index = records.read_json(tmp_path / "model.safetensors.index.json")
  assert index["weight_map"].keys() == tensor_shapes(config).keys()
  sizes = [(tmp_path / name).stat().st_size for name in files]
  assert max(sizes) < 12_000  # With its header.
  again, params_again = hf.load(tmp_path)
  assert again == config
  jax.tree.map(np.testing.assert_array_equal, params, params_again)


def test_saving_holds_one_tensor_at_a_time(directory, tmp_path, monkeypatch):
  config, params = hf.load(directory("llama_7b"))
  alive, most = [], []
  original = hf._tensor

  def tensor(leaf, entry, layer):
    value = original(leaf, entry, layer).copy()
    alive.append(weakref.ref(value))
    most.append(sum(ref() is not None for ref in alive))
    return value

  monkeypatch.setattr(hf, "_tensor", tensor)
  hf.save(tmp_path, config, params)
  assert len(most) == len(tensor_shapes(config))
  assert max(most) <= 2  # The last one goes when the next one is assigned.
  # Fails if: a file's tensors are gathered before they are written.


def test_parameters_that_are_not_wanted_are_not_read(directory):
  _, params = hf.load(
    directory("llama_7b"), is_wanted=lambda name: name.endswith("norm/scale")
  )
  assert params.keys() == {"layers", "final_norm"}
  assert params["layers"].keys() == {"attention_norm", "mlp_norm"}


def test_loading_onto_a_mesh_gives_the_same_values_in_parts(directory):
  config, params = hf.load(directory("llama2_7b"))
  mesh = mesh_lib.build(
    config_lib.MeshConfig(data=1, fsdp=2, tensor=1), jax.devices()[:2]
  )
  same, sharded = hf.load(directory("llama2_7b"), mesh=mesh)
  assert same == config
  jax.tree.map(np.testing.assert_array_equal, params, sharded)
  kernel = sharded["layers"]["mlp"]["up_proj"]["kernel"]
  assert kernel.sharding.mesh == mesh
  assert kernel.addressable_shards[0].data.shape == (2, 12, 40)


def test_a_dtype_can_be_asked_for(directory):
  _, params = hf.load(directory("llama_7b"), dtype=jnp.bfloat16)
  _, stored = hf.load(directory("llama_7b", jnp.bfloat16))
  jax.tree.map(np.testing.assert_array_equal, params, stored)


def test_the_tokenizer_and_its_ids_come_along(directory, tmp_path):
  source = directory("llama_7b")
  config, params = hf.load(source)
  raw = records.read_json(source / "config.json") | {
    "eos_token_id": 31,
    "auto_map": {"AutoModel": "code.Model"},
  }
  like = write(tmp_path / "like", raw, tensors(config, 0))
  (like / "tokenizer.model").write_bytes(b"pieces")
  (like / "pytorch_model.bin").write_bytes(b"pickle")
  hf.save(tmp_path / "out", config, params, like=like)
  names = {file.name for file in (tmp_path / "out").iterdir()}
  assert names == {"config.json", "model.safetensors", "tokenizer.model"}
  written = records.read_json(tmp_path / "out" / "config.json")
  assert written["eos_token_id"] == 31
  assert "auto_map" not in written  # It would name code to be run.


def test_a_larger_vocabulary_leaves_old_tokens_alone(directory):
  for family in ("llama_7b", "llama32_1b"):  # With a head, and tied.
    config, params = hf.load(directory(family))
    bigger, extended = hf.extend_vocab(config, params, vocab_size=41)
    hf.check_params(bigger, extended)
    table, old = (
      extended["token_embed"]["table"],
      params["token_embed"]["table"],
    )
    np.testing.assert_array_equal(table[:37], old)
    np.testing.assert_allclose(table[40], old.mean(axis=0), atol=1e-6)
    if not config.tie_embeddings:
      head, old = extended["lm_head"]["kernel"], params["lm_head"]["kernel"]
      np.testing.assert_array_equal(head[:, :37], old)
      np.testing.assert_allclose(head[:, 40], old.mean(axis=1), atol=1e-6)
  with pytest.raises(ValueError, match=r"vocab_size >= 37.*vocab_size=36"):
    hf.extend_vocab(config, params, vocab_size=36)


# Refusals, by name.


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"model_type": "mistral"}, "model_type='mistral'"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "Classification"),
    ({"attention_bias": True}, "attention_bias=True"),
    ({"mlp_bias": True}, "mlp_bias=True"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "yarn"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary"),
  ],
)
def test_a_config_that_is_not_implemented_is_refused(
  change, message, golden_configs, tmp_path
):
  raw = golden_configs["llama_7b"] | change
  (tmp_path / "config.json").write_text(json.dumps(raw))
  with pytest.raises(ValueError, match=f"describe a plain Llama.*{message}"):
    hf.load(tmp_path)


def test_a_config_that_lacks_something_is_refused(golden_configs, tmp_path):
  for change, message in (
    ({"rope_scaling": {"rope_type": "llama3"}}, r"give rope_scaling\.factor"),
    ({"hidden_size": None}, "positive integer hidden_size"),
  ):
    raw = golden_configs["llama_7b"] | change
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=message):
      hf.load(tmp_path)


def test_version_4_s_words_mean_the_same(golden_configs, tmp_path):
  raw = dict(golden_configs["llama32_1b"])
  rope = dict(raw.pop("rope_parameters"))
  raw |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
  del raw["head_dim"]  # 24 features over 8 heads.
  (tmp_path / "config.json").write_text(json.dumps(raw))
  assert hf.read_config(tmp_path) == dataclasses.replace(
    make_llama.small("llama32_1b"), head_dim=3
  )
  rope.pop("original_max_position_embeddings")
  raw["rope_scaling"] = rope
  (tmp_path / "config.json").write_text(json.dumps(raw))
  scaling = hf.read_config(tmp_path).rope_scaling
  assert scaling.original_max_seq_len == raw["max_position_embeddings"]


@pytest.mark.parametrize(
  ("edit", "message"),
  [
    (lambda t: t.pop("lm_head.weight"), r"missing \(1\)=\['lm_head.weight'\]"),
    (
      lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.zeros(3)}),
      r"unexpected \(1\)=\['model.layers.0.self_attn.q_proj.bias'\]",
    ),
    (
      lambda t: t.update({"model.norm.weight": np.zeros(23, np.float32)}),
      r"'model.norm.weight' of shape \(24,\), got shape=\(23,\)",
    ),
    (
      lambda t: t.update({"model.norm.weight": np.zeros(24, np.int8)}),
      r"'model.norm.weight' as one of .*'I8'",
    ),
    (
      lambda t: t.update(
        {"model.layers.1.input_layernorm.weight": np.zeros(24, np.float16)}
      ),
      r"'model.layers.1.input_layernorm.weight' in the dtype",
    ),
  ],
)
def test_a_wrong_tensor_is_named(edit, message, golden_configs, tmp_path):
  named = tensors(make_llama.small("llama_7b"), 0)
  edit(named)
  write(tmp_path, golden_configs["llama_7b"], named)
  with pytest.raises(ValueError, match=message):
    hf.load(tmp_path)


def test_a_stored_rotary_constant_is_passed_over(golden_configs, tmp_path):
  named = tensors(make_llama.small("llama_7b"), 0)
  named["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
  hf.load(write(tmp_path, golden_configs["llama_7b"], named))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
def test_pickled_weights_are_refused_by_name(name, golden_configs, tmp_path):
  (tmp_path / "config.json").write_text(json.dumps(golden_configs["llama_7b"]))
  (tmp_path / name).write_bytes(b"\x80\x04.")
  with pytest.raises(ValueError, match=rf"Pickled.*|pickled=\['{name}'\]"):
    hf.load(tmp_path)


@pytest.mark.parametrize("name", ["../model.safetensors", "gone.safetensors"])
def test_an_index_cannot_lead_elsewhere(name, directory, tmp_path):
  config, params = hf.load(directory("llama_7b"))
  hf.save(tmp_path / "out", config, params, max_shard_bytes=20_000)
  (tmp_path / "model.safetensors").write_bytes(b"")
  path = tmp_path / "out" / "model.safetensors.index.json"
  index = records.read_json(path)
  index["weight_map"]["model.norm.weight"] = name
  records.write_json(path, index)
  with pytest.raises(ValueError, match=rf"files beside it, got file='{name}'"):
    hf.load(tmp_path / "out")


def test_an_index_that_disagrees_with_its_files_is_refused(directory, tmp_path):
  config, params = hf.load(directory("llama_7b"))
  hf.save(tmp_path, config, params, max_shard_bytes=20_000)
  path = tmp_path / "model.safetensors.index.json"
  index = records.read_json(path)
  index["weight_map"]["model.extra.weight"] = index["weight_map"][
    "model.norm.weight"
  ]
  records.write_json(path, index)
  with pytest.raises(ValueError, match=r"missing \(1\)=\['model.extra.weight'"):
    hf.load(tmp_path)


def test_what_cannot_be_saved_is_named(directory, tmp_path):
  config, params = hf.load(directory("llama_7b"))
  hf.save(tmp_path / "a", config, params)
  with pytest.raises(ValueError, match="a directory without weights"):
    hf.save(tmp_path / "a", config, params)
  with_lora = dataclasses.replace(config, lora=config_lib.LoraConfig())
  with pytest.raises(ValueError, match="without adapters"):
    hf.save(tmp_path / "b", with_lora, params)
  wrong = params | {"final_norm": {"scale": jnp.ones(23)}}
  with pytest.raises(ValueError, match=r"'final_norm/scale' of shape \(24,\)"):
    hf.save(tmp_path / "b", config, wrong)
  with pytest.raises(ValueError, match=r"missing \(1\)=\['final_norm/scale'\]"):
    hf.save(
      tmp_path / "b", config, {n: params[n] for n in params if "f" not in n[:1]}
    )
  assert not list((tmp_path / "b").glob("*"))


# Memory.

_MEASURE = """
import pathlib, sys
from ppnet.models import hf
import jax, numpy as np

def status(field):
  text = pathlib.Path("/proc/self/status").read_text()
  return int(text.split(field + ":")[1].split()[0]) * 1024

path = sys.argv[1]
jax.block_until_ready(jax.numpy.zeros(3))
# A first, small load pays for what is loaded once: code, buffers.
hf.load(sys.argv[2])
pathlib.Path("/proc/self/clear_refs").write_text("5")  # Resets the peak.
before = status("VmRSS")
config, params = hf.load(path)
jax.block_until_ready(params)
size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
print(size, largest, status("VmHWM") - before)
"""


def test_loading_never_holds_two_copies(directory, tmp_path):
  """Peak memory of a process of its own: the model and one parameter."""
  if not pathlib.Path("/proc/self/clear_refs").exists():
    pytest.skip("Peak memory is read from Linux' /proc.")
  config = dataclasses.replace(
    make_llama.small("llama_7b"),
    vocab_size=8192,
    embed_dim=512,
    num_layers=12,
    mlp_dim=1536,
    head_dim=64,
    num_heads=8,
    num_kv_heads=8,
  )
  params = jax.tree.map(
    lambda leaf: np.full(leaf.shape, 0.5, leaf.dtype),
    nn.meta.unbox(hf.abstract_params(config)),
  )
  hf.save(tmp_path / "big", config, params)
  del params
  out = subprocess.run(
    [sys.executable, "-c", _MEASURE, tmp_path / "big", directory("llama_7b")],
    env={"JAX_PLATFORMS": "cpu", "PYTHONPATH": ":".join(sys.path)},
    capture_output=True,
    text=True,
    check=True,
  ).stdout
  size, largest, peak = map(int, out.split())
  assert size > 150e6
  # The rest is code and what tracing the shapes takes: 23 MB when written.
  assert peak < size + largest + 45e6, (size, largest, peak)
  assert peak > 0.9 * size  # It did measure.
  # Fails if: the files' tensors are gathered before they are placed.


# The other library itself.


@pytest.mark.peers
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_what_is_saved(family, tmp_path):
  transformers = importlib.import_module("transformers")
  torch = importlib.import_module("torch")
  theirs = make_llama.hf_model(make_llama.small(family), 5)
  theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
  config, params = hf.load(tmp_path / "theirs")
  hf.save(tmp_path / "ours", config, params, max_shard_bytes=20_000)
  again = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "ours", attn_implementation="eager"
  ).eval()
  assert type(again).__name__ == "LlamaForCausalLM"
  for name, value in theirs.state_dict().items():
    assert torch.equal(again.state_dict()[name], value), name
  tokens = make_llama.inputs(3)["tokens"]
  with torch.no_grad():
    expected = again(torch.from_numpy(tokens).long()).logits.numpy()
  (got,) = apply(config, params, plain(tokens))
  np.testing.assert_allclose(got, expected, atol=1e-4)
