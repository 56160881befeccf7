"""The kernels on a mesh: each device its examples and heads, the same bits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ppnet import config as config_lib
from ppnet.kernels import noisy_attention, partition
from ppnet.sharding import mesh as mesh_lib
from ppnet.sharding import rules as rules_lib

B, T, S, N, H = 8, 6, 7, 8, 4
SCORES, WEIGHTS = config_lib.NoiseMode.SCORES, config_lib.NoiseMode.WEIGHTS
MESHES = ((1, 1, 8), (4, 1, 2), (2, 2, 2))
# Compiling is what these tests cost.
FAST = {"xla_backend_optimization_level": 0}


AXES = ("data", "fsdp", "tensor", "sequence")


def on_mesh(axes):
  return mesh_lib.build(
    config_lib.MeshConfig(**dict(zip(AXES, axes, strict=False)))
  )


def inputs(num_kv_heads):
  """Queries, key tokens, values, stddev per head, keys per example."""
  keys = jax.random.split(jax.random.key(0), 3)
  return (
    jax.random.normal(keys[0], (B, T, N, H)),
    jax.random.normal(keys[1], (B, S, num_kv_heads, H)),
    jax.random.normal(keys[2], (B, S, num_kv_heads, H)),
    jnp.linspace(0.2, 0.8, N),
    jax.random.split(jax.random.key(7), B),
  )


def placed(args, mesh):
  """Examples and heads where the trainer has them."""
  rules = rules_lib.Rules()

  def put(x):
    axes = [rules.batch]
    if x.ndim == 4 and x.shape[2] % mesh.shape["tensor"] == 0:
      is_split = x.shape[1] % mesh.shape["sequence"] == 0
      axes += [rules.sequence if is_split else None, rules.q_heads]
    return jax.device_put(x, NamedSharding(mesh, P(*axes)))

  q, k, v, stddev, keys = args
  stddev = jax.device_put(stddev, NamedSharding(mesh, P()))
  return put(q), put(k), put(v), stddev, put(keys)


def program(implementation, mode, *, vmapped=False):
  """Output and gradients of all but the keys."""

  def attend(q, k, v, stddev, keys):
    return noisy_attention.noisy_attention(
      q,
      k,
      v,
      noise=noisy_attention.AttentionNoise(key=keys, stddev=stddev, mode=mode),
      implementation=implementation,
      block_sizes=(4, 4),
    )

  def loss(q, k, v, stddev, keys):
    if vmapped:
      one = lambda q, k, v, key: attend(
        q[None], k[None], v[None], stddev, key[None]
      )[0]
      out = jax.vmap(one)(q, k, v, keys)
    else:
      out = attend(q, k, v, stddev, keys)
    return (out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)).sum(), out

  return jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)


@functools.cache
def on_one_device(implementation, mode, num_kv_heads):
  fn = jax.jit(program(implementation, mode), compiler_options=FAST)
  return fn(*inputs(num_kv_heads))


def assert_same_on_mesh(implementation, mode, axes, num_kv_heads, vmapped):
  mesh = on_mesh(axes)
  args = placed(inputs(num_kv_heads), mesh)
  compiled = (
    jax.jit(
      mesh_lib.within(mesh, program(implementation, mode, vmapped=vmapped)),
      compiler_options=FAST,
    )
    .lower(*args)
    .compile()
  )
  grads, out = compiled(*args)
  expected_grads, expected = on_one_device(implementation, mode, num_kv_heads)
  np.testing.assert_array_equal(out, expected)
  # Key heads at several devices, and the stddev's gradient, are summed in
  # another order.
  for got, want in zip(grads, expected_grads, strict=True):
    atol = 1e-6 * max(1, np.abs(want).max())
    np.testing.assert_allclose(got, want, atol=atol, rtol=0)
  assert "all-gather" not in compiled.as_text() or axes[3:] > (1,)
  assert "all-to-all" not in compiled.as_text() or axes[3:] > (1,)


@pytest.mark.parametrize(
  ("implementation", "mode", "axes", "num_kv_heads", "vmapped"),
  [
    ("tpu", SCORES, (1, 1, 8), 2, False),  # Four devices at one key head.
    ("gpu", SCORES, (4, 1, 2), 2, False),  # Key heads are split, too.
    ("gpu", WEIGHTS, (2, 2, 2), 8, True),
    ("gpu", SCORES, (2, 1, 2, 2), 2, False),  # Tokens come in two parts.
  ],
)
def test_kernels_on_a_mesh_equal_one_device(
  implementation, mode, axes, num_kv_heads, vmapped
):
  assert_same_on_mesh(implementation, mode, axes, num_kv_heads, vmapped)
  # Fails if: a device takes the key head of its own number; dK of one device
  # stands for all; vmap's axis stays in front of the batch; positions are
  # counted from the first token of a device.


@pytest.mark.slow
@pytest.mark.parametrize("vmapped", [False, True])
@pytest.mark.parametrize("num_kv_heads", [8, 2])
@pytest.mark.parametrize("axes", MESHES)
@pytest.mark.parametrize("mode", [SCORES, WEIGHTS])
@pytest.mark.parametrize("implementation", ["tpu", "gpu"])
def test_kernels_on_every_mesh_equal_one_device(
  implementation, mode, axes, num_kv_heads, vmapped
):
  assert_same_on_mesh(implementation, mode, axes, num_kv_heads, vmapped)


def test_axes_are_those_of_the_trainer_s_rules():
  rules = rules_lib.STRATEGIES[config_lib.Strategy.SLICES]
  assert rules.batch == partition.BATCH_AXES
  assert rules.q_heads == rules.kv_heads
  assert (rules.q_heads, rules.sequence) == partition.HEAD_AXES
  assert {*partition.BATCH_AXES, *partition.HEAD_AXES} == set(mesh_lib.AXES)


def layout(batch, num_heads, num_kv_heads, axes):
  query = jax.ShapeDtypeStruct((batch, num_heads, T, H), jnp.float32)
  key = jax.ShapeDtypeStruct((batch, num_kv_heads, S, H), jnp.float32)
  leading = (partition.Leading.QUERY_HEADS, partition.Leading.KEY_HEADS)
  mesh = on_mesh(axes).abstract_mesh
  return partition._layout((query, key), leading, mesh)


@pytest.mark.parametrize(
  ("sizes", "axes", "batch_axes", "head_axes", "splits_key_heads"),
  [
    ((8, 8, 2), (2, 2, 2), ("data", "fsdp"), ("tensor",), True),
    ((2, 8, 2), (2, 2, 2), ("data",), ("tensor",), True),
    ((1, 8, 1), (2, 2, 2), (), ("tensor",), False),
    ((8, 6, 3), (2, 2, 2), ("data", "fsdp"), (), True),  # Half a key head.
    ((8, 3, 1), (4, 1, 2), ("data", "fsdp"), (), True),
    ((8, 8, 2), (2, 1, 2, 2), ("data", "fsdp"), ("tensor", "sequence"), False),
    ((8, 12, 6), (2, 1, 2, 2), ("data", "fsdp"), ("tensor",), True),
  ],
)
def test_what_does_not_divide_is_not_split(
  sizes, axes, batch_axes, head_axes, splits_key_heads
):
  got = layout(*sizes, axes)
  split = lambda names: tuple(n for n in names if on_mesh(axes).shape[n] > 1)
  assert split(got.batch) == split(batch_axes)
  assert split(got.heads) == head_axes
  assert got.splits_key_heads is splits_key_heads


def test_inside_a_shard_map_the_kernels_are_not_split_again():
  mesh = on_mesh((4, 1, 2))
  args = inputs(2)
  fn = program("gpu", SCORES)
  specs = (P("data"), P("data"), P("data"), P(), P("data"))

  def outputs(*args):
    return fn(*args)[1]

  with jax.set_mesh(mesh):
    got = jax.jit(
      jax.shard_map(
        outputs, in_specs=specs, out_specs=P("data"), check_vma=False
      ),
      compiler_options=FAST,
    )(*args)
  np.testing.assert_array_equal(got, on_one_device("gpu", SCORES, 2)[1])


@pytest.mark.parametrize(
  ("platform", "has_mesh", "devices", "expected"),
  [
    ("cpu", False, 1, "REFERENCE"),
    ("tpu", False, 1, "TPU"),
    ("gpu", False, 1, "GPU"),
    ("tpu", False, 8, "REFERENCE"),
    ("cpu", True, 8, "REFERENCE"),
    ("tpu", True, 8, "TPU"),
    ("gpu", True, 8, "GPU"),
  ],
)
def test_platform_chooses_the_implementation(
  monkeypatch, platform, has_mesh, devices, expected
):
  monkeypatch.setattr(jax, "device_count", lambda: devices)
  if not has_mesh:
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    assert noisy_attention._resolve(None).name == expected
    assert noisy_attention._resolve("gpu").name == "GPU"
    return
  # This machine's backend is the CPU: the mesh's own platform decides.
  device = jax.sharding.AbstractDevice(
    device_kind="any", num_cores=None, platform=platform
  )
  mesh = on_mesh((4, 1, 2)).abstract_mesh
  mesh = mesh.update(abstract_device=device)
  with jax.sharding.use_abstract_mesh(mesh):
    assert noisy_attention._resolve(None).name == expected
