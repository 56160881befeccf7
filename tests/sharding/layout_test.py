"""What is said about arrays inside a step, and that it changes no value."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ppnet import config as config_lib
from ppnet.core import hlo, param_ops
from ppnet.models import llama
from ppnet.privacy import clipping, ghost, taps
from ppnet.sharding import layout
from ppnet.sharding import mesh as mesh_lib
from ppnet.sharding import rules as rules_lib

RULES = rules_lib.Rules()
OPTIONS = {"xla_backend_optimization_level": 0}  # Compiling is what this costs.
NUM_ROWS, NUM_TOKENS = 8, 6
DECODER = config_lib.LlamaConfig(
  vocab_size=32,
  embed_dim=16,
  num_layers=3,
  num_heads=4,
  num_kv_heads=2,
  head_dim=4,
  mlp_dim=24,
  max_seq_len=NUM_TOKENS,
  remat=True,
  attention=config_lib.AttentionImplementation.REFERENCE,
  compute_dtype=config_lib.ComputeDtype.BFLOAT16,
)
pytestmark = pytest.mark.skipif(
  jax.device_count() < 8, reason="needs eight devices"
)


def mesh_of(data, fsdp, tensor):
  return mesh_lib.build(
    config_lib.MeshConfig(data=data, fsdp=fsdp, tensor=tensor)
  )


def loss_fn(params, batch, ops=param_ops.PLAIN):
  logits = llama.Llama(DECODER, ops).apply({"params": params}, batch)
  return jax.nn.logsumexp(logits, axis=-1).mean(axis=-1)


@functools.cache
def network():
  tokens = jnp.asarray(
    np.random.default_rng(0).integers(0, 32, (NUM_ROWS, NUM_TOKENS))
  )
  model = llama.Llama(DECODER)
  boxed = jax.jit(model.init, compiler_options=OPTIONS)(
    jax.random.key(0), tokens[:1]
  )["params"]
  return boxed, nn.meta.unbox(boxed), tokens


def compiled(mesh, fn):
  """The program of a clipped sum with the parameters' layout."""
  boxed, params, tokens = network()
  shardings = RULES.param_shardings(mesh, boxed)
  args = (
    jax.device_put(params, shardings),
    jax.device_put(tokens, RULES.batch_sharding(mesh)),
  )
  out = layout.within(mesh, RULES, fn, param_shardings=shardings)
  program = jax.jit(
    lambda params, rows: out(params, rows).grad_sum,
    out_shardings=shardings,
    compiler_options=OPTIONS,
  )
  return program.lower(*args).compile(), args


@pytest.mark.parametrize(
  "engine", [config_lib.Engine.VMAP, config_lib.Engine.BOOKKEEPING]
)
def test_a_clipped_sum_in_bfloat16_is_that_of_one_device(engine):
  _, params, tokens = network()
  fn = clipping.clipped_grad(loss_fn, l2_clip_norm=0.5, engine=engine)
  expected = jax.jit(fn, compiler_options=OPTIONS)(params, tokens).grad_sum
  program, args = compiled(mesh_of(2, 2, 2), fn)
  for one, other in zip(
    jax.tree.leaves(program(*args)), jax.tree.leaves(expected), strict=True
  ):
    # Products are cut elsewhere, and rounded to bfloat16 there.
    scale = np.abs(other).max()
    np.testing.assert_allclose(one, other, atol=0.03 * scale)
  # Fails if: a norm is of a part of the gradient, or a part is counted twice.


def test_weights_are_gathered_and_activations_are_not():
  fn = clipping.unprotected_grad(
    loss_fn,
    clipping=config_lib.Clipping.NONE,
    l2_clip_norm=1.0,
  )
  program, _ = compiled(mesh_of(1, 4, 2), fn)
  least, _ = hlo.cost(program.as_text())
  sizes = [
    each.operand_bytes * len(each.groups[0])
    for each in least.collectives
    if each.kind == "all-gather"
  ]
  # The largest weight a device holds whole, in float32 at most: the CPU
  # compiler widens bfloat16.
  assert max(sizes) <= 4 * 16 * 32
  # Fails if: the residual stream is gathered along an axis that splits it.


def test_kept_gradients_are_chosen_by_what_one_device_holds():
  boxed, params, tokens = network()
  call = lambda params, rows: (loss_fn(params, rows, taps.MARKING), None)
  mesh = mesh_of(1, 4, 2)
  shardings = RULES.param_shardings(mesh, boxed)
  sites = taps.trace(call, params, tokens).sites
  gate = [site for site in sites if "gate_proj" in site.name]
  # 16 x 24 numbers against 6 (16 + 24) of a record: 1.6, and on one of two
  # devices 192 against 6 (16 + 12): 1.14. The limit is 1.4.
  assert ghost.kept_dtype(gate) == jnp.bfloat16
  assert ghost.choose_way(gate, may_probe=False) is ghost.Way.RECORD
  with layout.using(mesh, RULES, param_shardings=shardings):
    assert layout.ways(gate[0].view.leaf, 2) == (1, 2)
    assert ghost.choose_way(gate, may_probe=False) is ghost.Way.KEEP
  # Fails if: the way is chosen by the shapes of all devices together.


def test_units_of_each_device_are_taken_without_asking_another():
  mesh = mesh_of(2, 2, 2)
  value = jnp.arange(3.0 * 8 * 5).reshape(3, 8, 5)
  sharding = NamedSharding(mesh, P(None, ("data", "fsdp"), None))

  def second_of_each(value):
    with layout.using(mesh, RULES):
      return jnp.take(layout.by_device(value, 1), 1, axis=2)

  program = jax.jit(second_of_each, in_shardings=sharding)
  got = program(jax.device_put(value, sharding))
  np.testing.assert_array_equal(got, value[:, 1::2])
  least, _ = hlo.cost(program.lower(value).compile().as_text())
  assert not least.collectives
  with layout.using(mesh, RULES):  # Six among four devices: one by one.
    assert layout.by_device(value[:, :6], 1).shape == (3, 6, 1, 5)
  assert layout.by_device(value, 1).shape == (3, 1, 8, 5)
  # Fails if: units are split as no device holds them.


def test_nothing_is_said_on_one_device_or_outside_a_step():
  x = jnp.ones((8, 4))
  alone = mesh_lib.build(config_lib.MeshConfig(), jax.devices()[:1])
  with layout.using(alone, RULES):
    assert layout.activation(x) is x
    assert layout.weight(x, ("embed", "mlp")) is x
    assert not layout.is_spread()
    assert layout.batch_axes() is None
  assert layout.grad(x, 0) is x
  assert layout.ways(0, 2) == (1, 1)
  with layout.using(mesh_of(2, 2, 2), RULES):
    assert layout.is_spread()
    assert layout.batch_axes() == ("data", "fsdp")
  assert not layout.is_spread()
