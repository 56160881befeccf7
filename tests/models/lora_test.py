"""Adapters: what is trained, what is not, and what others can load."""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy

from ppnet import config as config_lib
from ppnet.core import param_ops, records, trees
from ppnet.models import hf, llama, lora
from ppnet.privacy import clipping
from ppnet.train import losses
from tests.goldens import make_llama

BASE = config_lib.LlamaConfig(
  vocab_size=13,
  embed_dim=16,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=6,
  mlp_dim=20,
  max_seq_len=8,
)
SHAPE = config_lib.LoraConfig(
  rank=3, alpha=6.0, targets=("q_proj", "down_proj")
)
TOKENS = jnp.array([[1, 5, 5, 2, 9], [3, 4, 0, 12, 7]], jnp.int32)
# Compiling is what these tests cost.
jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


def init(config, seed=0):
  """Kernels [in, out] of unit gain and scales of 2, drawn without compiling."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    if path[-1].key == "scale":
      return jnp.full(leaf.shape, 2.0)
    normal = rng.normal(size=leaf.shape) / leaf.shape[-2] ** 0.5
    return jnp.asarray(normal, jnp.float32)

  return jax.tree_util.tree_map_with_path(draw, hf.abstract_shapes(config))


@pytest.fixture(scope="module")
def adapted():
  """A decoder, adapters that do something, and both without them."""
  base = init(BASE)
  config, params = lora.add(BASE, base, SHAPE, key=jax.random.key(1))
  adapters, frozen = lora.partition(params, lora.is_adapter)
  rng = np.random.default_rng(2)
  adapters = jax.tree.map(
    lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32),
    adapters,
  )
  return config, lora.combine(adapters, frozen), base


def logits(config, params, tokens=TOKENS):
  model = llama.Llama(config)
  return np.asarray(jit(lambda p: model.apply({"params": p}, tokens))(params))


def test_fresh_adapters_change_nothing():
  base = init(BASE)
  config, params = lora.add(BASE, base, SHAPE, key=jax.random.key(1))
  np.testing.assert_array_equal(logits(config, params), logits(BASE, base))
  a = params["layers"]["attention"]["q_proj"]["lora_a"]
  assert a.shape == (2, 16, 3)
  assert not np.array_equal(a[0], a[1])  # Each layer draws its own.
  assert float(jnp.std(a)) == pytest.approx(1 / 4, rel=0.3)
  hf.check_params(config, params)


@pytest.mark.parametrize(
  "targets", [("v_proj",), ("k_proj", "gate_proj"), config_lib.PROJECTIONS]
)
def test_any_subset_of_projections_has_adapters(targets):
  config = dataclasses.replace(
    BASE, lora=config_lib.LoraConfig(targets=targets)
  )
  trained, _ = lora.partition(hf.abstract_shapes(config), lora.is_adapter)
  names = {
    path[-2].key for path, _ in jax.tree_util.tree_leaves_with_path(trained)
  }
  assert names == set(targets)


def test_merged_adapters_compute_the_same(adapted):
  config, params, base = adapted
  with_adapters = logits(config, params)
  merged_config, merged = lora.merge(config, params)
  assert merged_config == BASE
  hf.check_params(BASE, merged)
  np.testing.assert_allclose(logits(BASE, merged), with_adapters, atol=2e-5)
  assert np.abs(logits(BASE, base) - with_adapters).max() > 1e-2


def test_parts_are_put_together_again():
  params = {"a": {"x": 1, "y": 2}, "b": {"x": 3}}
  trained, frozen = lora.partition(params, lora.matches(["a/x", ".*b/.*"]))
  assert trained == {"a": {"x": 1}, "b": {"x": 3}}
  assert frozen == {"a": {"y": 2}}
  assert lora.combine(trained, frozen) == params
  with pytest.raises(ValueError, match="not both"):
    lora.combine(trained, {"a": {"x": 1}})
  with pytest.raises(ValueError, match="at least one parameter"):
    lora.partition(params, lora.matches(["c"]))


# Private training of a part.


def loss_fn(params, batch, ops=param_ops.PLAIN, *, config):
  model = llama.Llama(config, ops)
  out = model.apply({"params": params}, batch["tokens"])
  return losses.cross_entropy(out, batch["targets"], batch["loss_mask"])


def batch_of(tokens, targets):
  mask = jnp.ones(tokens.shape).at[:, 0].set(0)
  return {"tokens": tokens, "targets": targets, "loss_mask": mask}


@pytest.mark.parametrize(
  "is_trained",
  [
    pytest.param(lora.is_adapter, id="adapters"),
    pytest.param(
      lora.matches([".*norm/scale", "lm_head/.*"]),
      id="norms and head",
      marks=pytest.mark.slow,
    ),
  ],
)
def test_engines_clip_the_trained_part_alone(is_trained, adapted):
  config, params, _ = adapted
  trained, frozen = lora.partition(
    params, is_trained, frozen_dtype=jnp.bfloat16
  )
  batch = batch_of(
    jnp.concatenate([TOKENS, TOKENS[:, ::-1]]), jnp.roll(TOKENS, 1).repeat(2, 0)
  )
  clip = 0.3

  def run(engine):
    def call(trained, frozen, batch):
      loss = lora.with_frozen(functools.partial(loss_fn, config=config), frozen)
      fn = clipping.clipped_grad(loss, l2_clip_norm=clip, engine=engine)
      return fn(trained, batch)

    return jit(call)(trained, frozen, batch)

  engines = set(config_lib.Engine) - {config_lib.Engine.AUTO}  # One of them.
  results = {engine: run(engine) for engine in engines}
  # By hand: each example's gradient with respect to the trained part.
  grad_fn = jit(
    jax.grad(
      lambda trained, one: loss_fn(
        lora.combine(trained, frozen), one, config=config
      )[0]
    )
  )
  expected = jax.tree.map(jnp.zeros_like, trained)
  norms = []
  for row in range(4):
    grad = grad_fn(trained, jax.tree.map(lambda x, r=row: x[r : r + 1], batch))
    norms.append(float(jnp.sqrt(trees.vdot(grad, grad))))
    scale = min(1.0, clip / norms[-1])
    expected = jax.tree.map(lambda s, g, c=scale: s + c * g, expected, grad)
  assert min(norms) > clip  # Something is clipped.
  for engine, result in results.items():
    np.testing.assert_allclose(
      result.grad_norms, norms, rtol=1e-4, err_msg=engine.name
    )
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-4),
      result.grad_sum,
      expected,
    )
  # Fails if: a frozen parameter's gradient enters the norm.


def test_adapters_learn_to_copy_and_the_base_does_not_move():
  """Each token's target is the one before it; the base is frozen in bf16."""
  wide = dataclasses.replace(
    BASE, vocab_size=7, embed_dim=32, num_layers=1, head_dim=8, mlp_dim=64
  )
  shape = config_lib.LoraConfig(rank=8, targets=config_lib.PROJECTIONS)
  config, params = lora.add(wide, init(wide), shape, key=jax.random.key(3))
  trained, frozen = lora.partition(
    params, lora.is_adapter, frozen_dtype=jnp.bfloat16
  )
  before = jax.tree.map(np.array, frozen)
  tx = optax.adam(1e-2)
  opt_state = tx.init(trained)
  sizes = [leaf.size for leaf in jax.tree.leaves(opt_state) if leaf.ndim]
  assert sum(sizes) == 2 * trees.num_parameters(trained)

  @jit
  def step(trained, opt_state, frozen, tokens):
    batch = batch_of(tokens, jnp.roll(tokens, 1, axis=1))
    loss = lora.with_frozen(functools.partial(loss_fn, config=config), frozen)
    fn = clipping.clipped_grad(
      loss, l2_clip_norm=1.0, engine=config_lib.Engine.BOOKKEEPING
    )
    result = fn(trained, batch)
    mean = jax.tree.map(lambda g: g / len(tokens), result.grad_sum)
    updates, opt_state = tx.update(mean, opt_state)
    return optax.apply_updates(trained, updates), opt_state, result.losses

  rng = np.random.default_rng(4)
  history = []
  for _ in range(130):
    tokens = jnp.asarray(rng.integers(0, 7, (16, 5)), jnp.int32)
    trained, opt_state, loss = step(trained, opt_state, frozen, tokens)
    history.append(float(loss.mean()))
  assert history[0] > 1.9  # log 7, or worse.
  assert np.mean(history[-10:]) < 0.1
  jax.tree.map(np.testing.assert_array_equal, frozen, before)
  dtypes = {leaf.dtype for leaf in jax.tree.leaves(frozen)}
  assert dtypes == {jnp.dtype("bfloat16")}


# In the layout of peft.


def test_saved_adapters_come_back_bit_for_bit(adapted, tmp_path):
  config, params, base = adapted
  lora.save(tmp_path, config, params, base_model="some/base")
  tensors = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
  name = "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"
  np.testing.assert_array_equal(
    tensors[name], params["layers"]["mlp"]["down_proj"]["lora_a"][1].T
  )
  assert tensors[name].shape == (3, 20)
  assert len(tensors) == 2 * 2 * 2  # Layers, targets, matrices.
  raw = records.read_json(tmp_path / "adapter_config.json")
  assert raw["base_model_name_or_path"] == "some/base"
  same, adapters = lora.load(tmp_path, BASE)
  assert same == config
  jax.tree.map(
    np.testing.assert_array_equal, lora.combine(adapters, base), params
  )


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"peft_type": "IA3"}, "peft_type='IA3'"),
    ({"use_dora": True}, "use_dora=True"),
    ({"use_rslora": True}, "use_rslora=True"),
    ({"bias": "all"}, "bias='all'"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
    ({"target_modules": "all-linear"}, "target_modules='all-linear'"),
    ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
    ({"target_modules": ["q_proj"]}, r"unexpected \(4\).*down_proj"),
    ({"r": 2}, r"lora_A.weight' of shape \(2, 16\).*\(3, 16\)"),
  ],
)
def test_other_adapters_are_refused_by_name(change, message, adapted, tmp_path):
  config, params, _ = adapted
  lora.save(tmp_path, config, params)
  raw = records.read_json(tmp_path / "adapter_config.json")
  records.write_json(tmp_path / "adapter_config.json", raw | change)
  with pytest.raises(ValueError, match=message):
    lora.load(tmp_path, BASE)


def test_pickled_adapters_are_refused(tmp_path):
  (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04.")
  with pytest.raises(ValueError, match="Pickled.*|adapter_model.bin"):
    lora.load(tmp_path, BASE)


def test_a_decoder_without_adapters_has_none_to_merge_or_save(tmp_path):
  with pytest.raises(ValueError, match="with adapters"):
    lora.merge(BASE, {})
  with pytest.raises(ValueError, match="with adapters"):
    lora.save(tmp_path, BASE, {})


# The other library itself.


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")  # Theirs.
def test_peft_loads_what_is_saved_and_is_loaded(tmp_path):
  peft = importlib.import_module("peft")
  torch = importlib.import_module("torch")
  base = make_llama.hf_model(make_llama.small("llama3_8b"), 7)
  base.save_pretrained(tmp_path / "base")
  config, params = hf.load(tmp_path / "base")
  shape = config_lib.LoraConfig(
    rank=3, alpha=5.0, targets=config_lib.PROJECTIONS
  )
  config, params = lora.add(config, params, shape, key=jax.random.key(1))
  params = jax.tree.map(lambda leaf: leaf + 0.05, params)
  _, frozen = lora.partition(params, lora.is_adapter)
  stripped = dataclasses.replace(config, lora=None)
  hf.save(tmp_path / "shifted", stripped, frozen)
  lora.save(tmp_path / "ours", config, params)
  theirs = peft.PeftModel.from_pretrained(
    importlib.import_module(
      "transformers"
    ).AutoModelForCausalLM.from_pretrained(
      tmp_path / "shifted", attn_implementation="eager"
    ),
    tmp_path / "ours",
  ).eval()
  tokens = make_llama.inputs(3)["tokens"]
  with torch.no_grad():
    expected = theirs(torch.from_numpy(tokens).long()).logits.numpy()
  got = logits(config, params, jnp.asarray(tokens))
  np.testing.assert_allclose(got, expected, atol=1e-4)
  assert np.abs(got - logits(stripped, frozen, jnp.asarray(tokens))).max() > 0.1
  theirs.save_pretrained(tmp_path / "theirs")
  same, adapters = lora.load(tmp_path / "theirs", stripped)
  assert same == config
  jax.tree.map(
    np.testing.assert_array_equal, lora.combine(adapters, frozen), params
  )
