"""Every engine's clipped sum of the multimodal model, on one device and many.

Eight devices are forced on the CPU (conftest.py). Parameters are laid out by
the rules that the trainer uses, and the batch is spread over the mesh.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppnet import config as config_lib
from ppnet.models import multimodal
from ppnet.privacy import clipping, noise
from ppnet.sharding import mesh as mesh_lib
from ppnet.sharding import rules as rules_lib
from ppnet.train import losses
from tests import tiny

PLACEHOLDERS = {"image": 4, "audio": 5}
NUM_ROWS = 16
PER_TOKEN = ("tokens", "targets", "loss_mask")
OPTIONS = {"xla_backend_optimization_level": 0}  # Compiling is what this costs.


@functools.cache
def network(dtype=config_lib.ComputeDtype.FLOAT32):
  """Attention noise, tied embeddings, all options of convolutions; a batch."""
  config = tiny.experiment()
  config.model.image = config_lib.ImageStemConfig(
    channels=(4,),
    strides=(4,),
    activation=config_lib.Activation.TANH,
    num_groups=2,
    weight_standardisation=True,
  )
  config.attention_noise.consistency_weight = 0.0  # One application.
  decoder = config.model.decoder
  decoder.tie_embeddings = True
  decoder.compute_dtype = dtype
  model = multimodal.PPNet(config.model, PLACEHOLDERS)
  rng = np.random.default_rng(0)
  tokens = np.array([1, 4, 4, 4, 4, 5, 5, 20, 21, 22], np.int32)
  batch = {
    "tokens": np.tile(tokens, (NUM_ROWS, 1)),
    "targets": rng.integers(0, 96, (NUM_ROWS, 10)).astype(np.int32),
    "loss_mask": np.tile(np.float32([0] * 6 + [1] * 4), (NUM_ROWS, 1)),
    "image": np.float32(rng.normal(size=(NUM_ROWS, 8, 8, 1))),
    "audio": np.float32(rng.normal(size=(NUM_ROWS, 24, 40))),
  }
  batch["image"][3] = np.nan
  one = {name: jnp.asarray(value[:1]) for name, value in batch.items()}
  init = lambda key: model.init(key, one["tokens"], media=losses.media(one))[
    "params"
  ]
  boxed = jax.jit(init, compiler_options=OPTIONS)(jax.random.key(0))
  loss_fn = losses.make_loss_fn(model, config.attention_noise)
  return loss_fn, boxed, batch


def clipped(engine, *, on=None, dtype=config_lib.ComputeDtype.FLOAT32, **kw):
  """The clipped sum; on a mesh of `tiny.MESHES` if one is named."""
  loss_fn, boxed, batch = network(dtype)
  params = nn.meta.unbox(boxed)
  keys = jax.random.split(jax.random.key(1), NUM_ROWS)
  padding = np.arange(NUM_ROWS) % 5 == 4
  fn = jax.jit(
    clipping.clipped_grad(
      loss_fn, l2_clip_norm=0.5, engine=engine, has_aux=True, **kw
    ),
    compiler_options=OPTIONS,
  )
  if on is None:
    return fn(params, {**batch, "key": keys}, jnp.asarray(padding))
  mesh = mesh_lib.build(tiny.MESHES[on])
  rules = rules_lib.STRATEGIES[tiny.MESHES[on].strategy]
  params = jax.device_put(params, rules.param_shardings(mesh, boxed))
  rows = {**batch, "key": keys, "padding": padding}
  rows = {
    name: jax.device_put(
      value, rules.batch_sharding(mesh, has_tokens=name in PER_TOKEN)
    )
    for name, value in rows.items()
  }
  return fn(params, rows, rows.pop("padding"))


def flat(tree):
  leaves = [np.ravel(np.float64(leaf)) for leaf in jax.tree.leaves(tree)]
  return np.concatenate(leaves)


reference = functools.cache(lambda **kw: clipped(config_lib.Engine.VMAP, **kw))


@pytest.mark.parametrize(
  ("engine", "on", "rows_per_unit"),
  [
    (config_lib.Engine.BOOKKEEPING, "2x2x2", 2),
    *(
      pytest.param(engine, on, rows, marks=pytest.mark.slow)
      for engine in config_lib.Engine
      for on in tiny.MESHES
      for rows in ((1, 2) if on == "2x2x2" else (2,))
      if engine is not config_lib.Engine.AUTO  # It is one of the others.
    ),
  ],
)
def test_the_sum_does_not_depend_on_the_mesh(engine, on, rows_per_unit):
  expected = reference(rows_per_unit=rows_per_unit)
  result = clipped(engine, on=on, rows_per_unit=rows_per_unit)
  got, want = flat(result.grad_sum), flat(expected.grad_sum)
  assert np.linalg.norm(want) > 1
  assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)
  np.testing.assert_allclose(result.grad_norms, expected.grad_norms, rtol=1e-5)
  np.testing.assert_array_equal(result.is_nonfinite, expected.is_nonfinite)
  assert expected.is_nonfinite.sum() == 1
  # Fails if: a device clips its own part of a unit, or a NaN crosses devices.


@pytest.mark.slow
@pytest.mark.parametrize(
  "engine", [config_lib.Engine.BOOKKEEPING, config_lib.Engine.VMAP]
)
def test_long_inputs_take_a_part_of_memory_and_work_on_each_device(engine):
  """1,024 tokens of four examples, on one device and over four."""
  decoder = config_lib.LlamaConfig(
    vocab_size=256,
    embed_dim=64,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    mlp_dim=128,
    max_seq_len=1024,
    remat=True,
  )
  model = multimodal.PPNet(config_lib.ModelConfig(decoder=decoder), {})
  loss_fn = losses.make_loss_fn(
    model, config_lib.AttentionNoiseConfig(stddev=0.1)
  )
  init = lambda key: model.init(key, jnp.zeros((1, 8), jnp.int32), media={})
  boxed = jax.eval_shape(init, jax.eval_shape(jax.random.key, 0))["params"]
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 4))

  def compiled(num_devices):
    mesh = mesh_lib.build(
      config_lib.MeshConfig(data=1, sequence=num_devices),
      jax.devices()[:num_devices],
    )
    rules = rules_lib.Rules()
    shape = functools.partial(jax.ShapeDtypeStruct, (4, 1024))
    tokens = rules.batch_sharding(mesh, has_tokens=True)
    batch = {
      "tokens": shape(jnp.int32, sharding=tokens),
      "targets": shape(jnp.int32, sharding=tokens),
      "loss_mask": shape(jnp.float32, sharding=tokens),
      "key": keys.update(sharding=rules.batch_sharding(mesh)),
    }
    params = jax.tree.map(
      lambda leaf, sharding: leaf.update(sharding=sharding),
      nn.meta.unbox(boxed),
      rules.param_shardings(mesh, boxed),
    )
    fn = clipping.clipped_grad(
      loss_fn, l2_clip_norm=0.5, engine=engine, has_aux=True
    )
    fn = jax.jit(mesh_lib.within(mesh, fn))
    program = fn.lower(params, batch).compile()
    temporaries = program.memory_analysis().temp_size_in_bytes
    return temporaries, program.cost_analysis()["flops"]

  for whole, part in zip(compiled(1), compiled(4), strict=True):
    assert part < 0.4 * whole
  # Fails if: XLA gathers the tokens and every device computes all of them.


def test_bfloat16_is_as_far_from_float32_as_the_reference_is():
  """Weights, norms and sums are float32; only the network is not."""
  truth = flat(reference(rows_per_unit=2).grad_sum)
  options = {"dtype": config_lib.ComputeDtype.BFLOAT16, "rows_per_unit": 2}
  by_vmap = reference(**options)
  engine = clipped(config_lib.Engine.BOOKKEEPING, **options)
  for result in (by_vmap, engine):
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(result.grad_sum))
    assert result.grad_norms.dtype == jnp.float32
  own_error = np.linalg.norm(flat(by_vmap.grad_sum) - truth)
  assert own_error > 1e-4 * np.linalg.norm(truth)  # It is bfloat16.
  assert np.linalg.norm(flat(engine.grad_sum) - truth) <= 1.5 * own_error
  count = np.sum(np.asarray(engine.grad_norms) > 0)
  assert np.linalg.norm(flat(engine.grad_sum)) <= 0.5 * count
  # Fails if: norms or sums are accumulated in the compute dtype.


@pytest.mark.parametrize(
  "on",
  [
    name
    if name in ("2x2x2", "sequence", "zero3")
    else pytest.param(name, marks=pytest.mark.slow)
    for name in tiny.MESHES
  ],
)
def test_dp_noise_is_the_same_bits_under_every_strategy(on):
  _, boxed, _ = network()
  params = nn.meta.unbox(boxed)
  mesh = mesh_lib.build(tiny.MESHES[on])
  rules = rules_lib.STRATEGIES[tiny.MESHES[on].strategy]
  draw = functools.partial(noise.standard_normal, tree=params)
  spread = jax.jit(
    draw,
    out_shardings=rules.param_shardings(mesh, boxed),
    compiler_options=OPTIONS,
  )(jax.random.key(3))
  whole = jax.jit(draw, compiler_options=OPTIONS)(jax.random.key(3))
  jax.tree.map(np.testing.assert_array_equal, spread, whole)
  # Fails if: a device draws its part by itself.
