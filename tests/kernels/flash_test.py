"""The kernels, interpreted, against the reference: values and gradients."""

import dataclasses
import functools

import jax
import jax.export
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ppnet import config as config_lib
from ppnet.kernels import noisy_attention

B, N, K, H = 2, 4, 2, 6
SCORES, WEIGHTS = config_lib.NoiseMode.SCORES, config_lib.NoiseMode.WEIGHTS
MODES = [SCORES, WEIGHTS]
KERNELS = ["tpu", "gpu"]
# Compiling is what these tests cost.
FAST = {"xla_backend_optimization_level": 0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """One call of the op."""

  num_queries: int
  num_keys: int
  blocks: tuple[int, int] | None
  causal: bool = True
  segments: bool = False


def inputs(case, *, batch=B, dtype=jnp.float32):
  """Queries, key tokens, values, stddev per head, scale per key token."""
  keys = jax.random.split(jax.random.key(case.num_queries), 3)
  normal = lambda key, *shape: jax.random.normal(key, shape, dtype)
  return (
    normal(keys[0], batch, case.num_queries, N, H),
    normal(keys[1], batch, case.num_keys, K, H),
    normal(keys[2], batch, case.num_keys, K, H),
    jnp.linspace(0.2, 0.8, N, dtype=jnp.float32),
    jnp.linspace(0.5, 2, batch * case.num_keys).reshape(batch, case.num_keys),
  )


def attend(case, mode, implementation, q, k, v, stddev, scale):
  batch = q.shape[0]
  segment_ids = None
  if case.segments:
    segment_ids = (
      jnp.arange(case.num_queries)[None] // 3 + jnp.arange(batch)[:, None]
    )
  noise = None
  if mode is not None:
    noise = noisy_attention.AttentionNoise(
      key=jax.random.split(jax.random.key(7), batch),
      stddev=stddev,
      mode=mode,
      key_token_scale=scale,
    )
  return noisy_attention.noisy_attention(
    q,
    k,
    v,
    noise=noise,
    causal=case.causal,
    segment_ids=segment_ids,
    implementation=implementation,
    block_sizes=None if implementation == "reference" else case.blocks,
  )


def output_and_grads(case, mode, implementation, *args):
  """Output and gradients to all five arguments."""

  def loss(*args):
    out = attend(case, mode, implementation, *args)
    wide = out.astype(jnp.promote_types(out.dtype, jnp.float32))
    weights = jnp.cos(jnp.arange(out.size)).reshape(out.shape)
    return (wide * weights).sum(), out

  grad = jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4), has_aux=True)
  (_, out), grads = jax.jit(grad, compiler_options=FAST)(*args)
  return out, *grads


def assert_matches_reference(case, mode, implementation):
  args = inputs(case)
  expected = output_and_grads(case, mode, "reference", *args)
  got = output_and_grads(case, mode, implementation, *args)
  names = ("output", "dq", "dk", "dv", "dstddev", "dscale")
  for name, one, other in zip(names, got, expected, strict=True):
    # Of the largest: a stddev's gradient is a sum of terms that cancel.
    atol = 1e-5 * max(1, np.abs(other).max())
    np.testing.assert_allclose(one, other, atol=atol, rtol=0, err_msg=name)


# Ragged, T != S, several blocks on both sides, some of them invisible; rows
# that see nothing where there are more queries than key tokens.
LONGER_KEYS = Case(num_queries=7, num_keys=19, blocks=(4, 8))
SEGMENTS = Case(num_queries=13, num_keys=13, blocks=(8, 4), segments=True)


@pytest.mark.parametrize("implementation", KERNELS)
def test_kernels_match_reference(implementation):
  assert_matches_reference(LONGER_KEYS, SCORES, implementation)
  # Fails if: dK keeps the noise of the first query head of its group; the
  # transposed blocks swap the words of queries and key tokens.


@pytest.mark.parametrize(
  "implementation", [pytest.param("tpu", marks=pytest.mark.slow), "gpu"]
)
def test_kernels_match_reference_with_noise_on_weights(implementation):
  assert_matches_reference(SEGMENTS, WEIGHTS, implementation)
  # Fails if: P.G is left out of dQ or dK.


@pytest.mark.slow
@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("mode", [None, *MODES])
@pytest.mark.parametrize(
  "case",
  [
    LONGER_KEYS,
    SEGMENTS,
    Case(num_queries=8, num_keys=8, blocks=(4, 4)),
    Case(num_queries=8, num_keys=8, blocks=(8, 8)),
    Case(num_queries=19, num_keys=7, blocks=(4, 4)),
    Case(num_queries=11, num_keys=17, blocks=(16, 8), causal=False),
    Case(num_queries=1, num_keys=9, blocks=(4, 4)),
    Case(num_queries=5, num_keys=5, blocks=None),
  ],
  ids=str,
)
def test_kernels_match_reference_everywhere(case, mode, implementation):
  assert_matches_reference(case, mode, implementation)


def test_block_sizes_do_not_change_the_noise():
  """Scores far apart: an output shows which key token the noise chose."""
  case = Case(num_queries=12, num_keys=12, blocks=None)
  q, k, v, stddev, scale = inputs(case)
  zero = jnp.zeros_like
  outs = [
    jax.jit(
      functools.partial(
        attend,
        dataclasses.replace(case, blocks=blocks),
        SCORES,
        "tpu",
      ),
      compiler_options=FAST,
    )(zero(q), zero(k), v, 1000 * stddev, scale)
    for blocks in ((4, 4), (12, 6))
  ]
  np.testing.assert_allclose(outs[0], outs[1], atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("implementation", ["reference", *KERNELS])
def test_gradients_match_finite_differences_in_float64(implementation, mode):
  case = Case(num_queries=5, num_keys=6, blocks=(4, 4))
  with jax.enable_x64(True):
    args = tuple(np.asarray(x, np.float64) for x in inputs(case, batch=1))

    @jax.jit
    def loss(q, k, v):
      out = attend(case, mode, implementation, q, k, v, *small)
      return (out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)).sum()

    # Weights of 0.05: WEIGHTS has kinks where P + scale N is 0.
    small = (jnp.float32(0.05), jnp.asarray(args[4], jnp.float32))
    jax.test_util.check_grads(
      loss, args[:3], order=1, modes=["rev"], atol=1e-6, rtol=1e-6, eps=1e-6
    )


@pytest.mark.slow
def test_programs_and_meshes_agree():
  case = Case(num_queries=6, num_keys=6, blocks=(4, 4))
  batch = 8
  q, k, v, stddev, _ = inputs(case, batch=batch)
  keys = jax.random.split(jax.random.key(7), batch)

  def attend_all(q, k, v, keys):
    return noisy_attention.noisy_attention(
      q,
      k,
      v,
      noise=noisy_attention.AttentionNoise(key=keys, stddev=stddev),
      implementation="tpu",
      block_sizes=case.blocks,
    )

  def one(q, k, v, key):
    return attend_all(q[None], k[None], v[None], key[None])[0]

  expected = jax.jit(attend_all)(q, k, v, keys)
  programs = {
    "vmap": jax.jit(jax.vmap(one)),
    "scan": jax.jit(
      lambda *args: jax.lax.scan(lambda _, row: (None, one(*row)), None, args)[
        1
      ]
    ),
    "remat": jax.jit(jax.checkpoint(attend_all)),
  }
  for shape in ((1, 8), (4, 2)):
    mesh = Mesh(np.array(jax.devices()).reshape(shape), ("data", "tensor"))
    programs[shape] = jax.jit(
      attend_all, in_shardings=NamedSharding(mesh, P("data"))
    )
  for name, program in programs.items():
    np.testing.assert_allclose(
      program(q, k, v, keys), expected, atol=1e-6, err_msg=str(name)
    )


@pytest.mark.parametrize("implementation", KERNELS)
def test_no_array_of_queries_by_keys(implementation):
  """Memory is O(T): nothing of T x S stands outside the kernels' blocks."""
  case = Case(num_queries=640, num_keys=768, blocks=(128, 128))
  args = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs(case)]

  def sizes(jaxpr):
    for eqn in jaxpr.eqns:
      yield from (var.aval.size for var in eqn.outvars)
      for param in jax.tree.leaves(
        tuple(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
      ):
        inner = getattr(param, "jaxpr", param)
        if hasattr(inner, "eqns"):
          yield from sizes(inner)

  for mode in MODES:
    grads = jax.grad(
      lambda *args, mode=mode: attend(case, mode, implementation, *args).sum(),
      argnums=(0, 1, 2, 3, 4),
    )
    biggest = max(sizes(jax.make_jaxpr(grads)(*args).jaxpr))
    assert biggest <= B * N * 768 * 16  # Heads are padded to 16 features.


@pytest.mark.parametrize("mode", [None, *MODES])
def test_gpu_kernels_lower_for_cuda_on_a_machine_without_one(mode):
  """As far as Triton's own language; what follows needs the device."""
  case = Case(num_queries=96, num_keys=100, blocks=None)
  args = [
    jax.ShapeDtypeStruct(x.shape, x.dtype)
    for x in inputs(case, dtype=jnp.bfloat16)
  ]

  def loss(*args):
    out = attend(case, mode, "gpu", *args)
    return out.astype(jnp.float32).sum()

  exported = jax.export.export(
    jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))),
    platforms=["cuda"],
    disabled_checks=[
      jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")
    ],
  )(*args)
  module = exported.mlir_module()
  kernels = {None: 3, SCORES: 4, WEIGHTS: 5}[mode]
  assert module.count("@__gpu$xla.gpu.triton(") == kernels
  for name in ("forward", "backward_q", "backward_kv"):
    assert f"noisy_attention_{name}" in module
