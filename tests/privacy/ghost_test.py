"""Engines with rules against VMAP, and against the truth where float32 lies."""

import functools
import re

import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppnet import config
from ppnet.core import param_ops
from ppnet.kernels import noisy_attention
from ppnet.models import llama
from ppnet.privacy import clipping, ghost, outer_products, taps

VMAP = config.Engine.VMAP
GHOST = config.Engine.GHOST
BOOKKEEPING = config.Engine.BOOKKEEPING
ENGINES = (GHOST, BOOKKEEPING)
PLAIN = param_ops.PLAIN


def run(
  loss_fn, params, batch, *, engine, is_padding=None, clip=1.0, **options
):
  batch = jax.tree.map(
    lambda leaf: (
      jax.random.clone(leaf)
      if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
      else leaf
    ),
    batch,
  )
  fn = clipping.clipped_grad(
    loss_fn, l2_clip_norm=clip, engine=engine, **options
  )
  # Compiling is what these tests cost.
  compiler_options = {"xla_backend_optimization_level": 0}
  return jax.jit(fn, compiler_options=compiler_options)(
    params, batch, is_padding
  )


def flat(tree):
  return np.concatenate(
    [np.ravel(leaf).astype(np.float64) for leaf in jax.tree.leaves(tree)]
  )


def assert_same(result, expected):
  """Sum to 1e-5 of its norm, norms to 1e-5 each."""
  one, other = flat(result.grad_sum), flat(expected.grad_sum)
  assert np.linalg.norm(one - other) <= 1e-5 * np.linalg.norm(other)
  np.testing.assert_allclose(
    result.grad_norms, expected.grad_norms, rtol=1e-5, atol=1e-12
  )
  np.testing.assert_allclose(result.losses, expected.losses, rtol=1e-5)
  np.testing.assert_array_equal(result.is_nonfinite, expected.is_nonfinite)


# A network with every operation, each parameter's uses counted beside it.


def network_loss(params, batch, ops=PLAIN):
  x = ops.embed("table", params["table"], batch["ids"])  # [B, T, D]

  def layer(x, weights):
    normed = ops.scale("gain", weights["gain"], jnp.tanh(x))
    hidden = ops.dense("up", weights["up"], normed)
    hidden = ops.bias("offset", params["offset"], jnp.sin(hidden))
    hidden += ops.standardised_dense("standard", weights["standard"], hidden)
    # One matrix for all layers: a constant of the scan.
    return x + ops.dense("down", params["down"], hidden), None

  x, _ = jax.lax.scan(jax.checkpoint(layer), x, params["layers"])
  seen = ops.conv("kernel", params["kernel"], batch["image"], 2)
  seen = jnp.tanh(seen).reshape(seen.shape[0], -1, seen.shape[-1])
  shared = functools.partial(ops.dense, "shared", params["shared"])
  x = jnp.concatenate([x, shared(seen), 0.5 * shared(jnp.cos(seen))], axis=1)
  logits = ops.dense("table", params["table"].T, x)  # Tied.
  return jnp.sum(jax.nn.log_softmax(logits)[..., 0] * batch["mask"], axis=1)


def network_case(*, num_rows, tokens, dim, wide, vocab, channels, layers, seed):
  rng = np.random.default_rng(seed)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  pixels = 2 * ((3 + 1) // 2)  # [4, 3] at stride 2, twice.
  params = {
    "table": normal(vocab, dim),
    "layers": {
      "gain": normal(layers, dim),
      "up": normal(layers, dim, wide),
      "standard": normal(layers, wide, wide),
    },
    "offset": normal(wide),
    "down": normal(wide, dim),
    "kernel": normal(3, 2, channels, dim + 1),
    "shared": normal(dim + 1, dim),
  }
  batch = {
    # Few ids and many tokens: they repeat. One counts from the end.
    "ids": jnp.asarray(rng.integers(-1, 2, size=(num_rows, tokens))),
    "image": normal(num_rows, 4, 3, channels),
    "mask": normal(num_rows, tokens + 2 * pixels),
  }
  return params, batch


@hypothesis.given(
  sizes=st.permutations([2, 3, 5, 7, 11, 13]),
  layers=st.integers(1, 3),
  seed=st.integers(0, 99),
  rows_per_unit=st.integers(1, 3),
  engine=st.sampled_from(ENGINES),
)
@hypothesis.example(
  sizes=[3, 2, 31, 29, 37, 5],
  layers=2,
  seed=1,
  rows_per_unit=2,
  engine=GHOST,
)
@hypothesis.settings(derandomize=True, deadline=None, max_examples=1)
def test_every_operation_matches_vmap(
  sizes, layers, seed, rows_per_unit, engine
):
  check_every_operation(sizes, layers, seed, rows_per_unit, engine)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@hypothesis.given(
  sizes=st.permutations([2, 3, 5, 7, 11, 13]),
  layers=st.integers(1, 3),
  seed=st.integers(0, 99),
  rows_per_unit=st.integers(1, 3),
)
@hypothesis.settings(derandomize=True, deadline=None, max_examples=8)
def test_every_operation_matches_vmap_in_many_shapes(
  sizes, layers, seed, rows_per_unit, engine
):
  check_every_operation(sizes, layers, seed, rows_per_unit, engine)


def check_every_operation(sizes, layers, seed, rows_per_unit, engine):
  num_units, tokens, dim, wide, vocab, channels = sizes
  params, batch = network_case(
    num_rows=num_units * rows_per_unit,
    tokens=tokens,
    dim=dim,
    wide=wide,
    vocab=vocab,
    channels=channels,
    layers=layers,
    seed=seed,
  )
  options = {"rows_per_unit": rows_per_unit}
  expected = run(network_loss, params, batch, engine=VMAP, **options)
  result = run(network_loss, params, batch, engine=engine, **options)
  assert_same(result, expected)
  assert result.grad_norms.shape == (num_units,)
  # Fails if: the cross term of the tied table, or of a unit's rows, is dropped;
  # repeated tokens are summed as if they were different; a layer of the scan is
  # left out; a standardised weight's gradient is that of what multiplies.


def llama_case(**changes):
  model = llama.Llama(
    config.LlamaConfig(
      **{
        "vocab_size": 23,
        "embed_dim": 20,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 6,
        "mlp_dim": 28,
        "max_seq_len": 16,
      }
      | changes
    )
  )
  tokens = jax.random.randint(jax.random.key(1), (5, 6), 0, 9)
  params = nn.meta.unbox(model.init(jax.random.key(0), tokens)["params"])
  batch = {
    "tokens": tokens,
    "key": jax.random.split(jax.random.key(2), 5),
    "factor": jnp.array([1.0, np.nan, 1.0, np.nan, 0.7]),
  }
  return model, params, batch


def llama_loss(model, *, is_twice):
  def loss_fn(params, batch, ops=PLAIN):
    own = model.clone(ops=ops)
    noise = noisy_attention.AttentionNoise(
      key=batch["key"], stddev=jnp.float32(0.3)
    )
    noisy = jax.nn.log_softmax(
      own.apply({"params": params}, batch["tokens"], noise=noise)
    )
    targets = batch["tokens"][:, 1:, None]
    loss = -jnp.take_along_axis(noisy[:, :-1], targets, axis=2).mean((1, 2))
    if is_twice:
      clean = jax.nn.log_softmax(own.apply({"params": params}, batch["tokens"]))
      loss += 0.3 * (jnp.exp(clean) * (clean - noisy)).sum((1, 2))
    return loss * batch["factor"]

  return loss_fn


@pytest.mark.parametrize(
  ("changes", "is_twice", "engine"),
  [
    ({"remat": True}, False, GHOST),
    # Every parameter is used by two applications: GHOST has nothing to probe.
    ({"tie_embeddings": True}, True, BOOKKEEPING),
    # Gradients of zero, and of what only one row feeds.
    ({"zero_init": ("o_proj",), "look_back": 9.0}, False, BOOKKEEPING),
    *(
      pytest.param(*case, marks=pytest.mark.slow)
      for case in (
        ({"remat": True}, False, BOOKKEEPING),
        ({"remat": True, "tie_embeddings": True}, True, GHOST),
        ({"tie_embeddings": True}, False, GHOST),
        ({"zero_init": ("lm_head",), "look_back": 9.0}, False, GHOST),
        ({"num_layers": 3, "num_kv_heads": 4}, True, BOOKKEEPING),
      )
    ),
  ],
)
def test_llama_matches_vmap(changes, is_twice, engine):
  model, params, batch = llama_case(**changes)
  loss_fn = llama_loss(model, is_twice=is_twice)
  is_padding = jnp.array([False, True, False, False, False])
  expected = run(loss_fn, params, batch, engine=VMAP, is_padding=is_padding)
  assert (expected.grad_norms > 0).tolist() == [True, False, True, False, True]
  assert expected.is_nonfinite.tolist() == [False] * 3 + [True, False]
  result = run(loss_fn, params, batch, engine=engine, is_padding=is_padding)
  assert_same(result, expected)
  # Fails if: padding is counted; a NaN cotangent is multiplied by zero; the two
  # applications' cross term is dropped, or a layer of either.


# A weight whose per-example gradient is sum_t x_t g_t', whatever x and g are.


def linear_loss(params, batch, ops=PLAIN):
  out = ops.dense("w", params["w"], batch["x"])
  return jnp.sum(out * batch["g"], axis=(1, 2))


def twice_loss(params, batch, ops=PLAIN):
  """The same, its tokens spread over two uses: recorded by both engines."""
  half = batch["x"].shape[1] // 2
  first = ops.dense("w", params["w"], batch["x"][:, :half])
  second = ops.dense("w", params["w"], batch["x"][:, half:])
  out = jnp.concatenate([first, second], axis=1)
  return jnp.sum(out * batch["g"], axis=(1, 2))


@functools.cache
def linear_fn(loss_fn, engine, clip=1.0):
  return jax.jit(
    clipping.clipped_grad(loss_fn, l2_clip_norm=clip, engine=engine)
  )


T, M, N = 6, 29, 23  # T (M + N) < M N: the Gram form is the cheaper one.
WEIGHT = {"w": jnp.zeros((M, N))}
FORMS = [
  (linear_loss, GHOST),
  (linear_loss, BOOKKEEPING),
  (twice_loss, BOOKKEEPING),
]


def cancelling(*, scale, gap, seed):
  """Tokens in two halves that cancel up to `gap`, x and g of size `scale`."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=M) * scale * np.ones((T, 1))
  x[T // 2 :] += rng.normal(size=M) * scale * gap
  g = rng.normal(size=N) * np.repeat([1.0, -1.0], T // 2)[:, None] * scale
  return np.float32(x), np.float32(g)


@pytest.mark.parametrize(("loss_fn", "engine"), FORMS)
def test_a_gram_norm_is_not_below_the_true_one(loss_fn, engine):
  """Where no example falls back, its error bound is what lifts it."""
  cases = [
    cancelling(scale=1.0, gap=10.0**power, seed=seed)
    for power in np.linspace(-1.0, 0.5, 10)
    for seed in range(30)
  ]
  cases = [
    case for case in cases if gram_error(*case) <= 9e-6 * true_norm(*case) ** 2
  ]
  assert len(cases) > 100
  x, g = map(np.stack, zip(*cases, strict=True))
  norms = linear_fn(loss_fn, engine)(WEIGHT, {"x": x, "g": g}).grad_norms
  off = np.float64(norms) / [true_norm(*case) for case in cases] - 1
  # The root of float32, and the sum with the bound, round once each.
  assert off.min() >= -2 * 2.0**-24
  assert off.max() <= 1e-5
  # Fails if: the error of the Gram form is computed and not added.


def gram_error(x, g):
  """E of `privacy.outer_products`."""
  x, g = np.float64(x), np.float64(g)
  scales = [np.linalg.norm(v, axis=1) for v in (x, g)]
  pairs = [np.outer(s, s) for s in scales]
  return outer_products.ROUNDING * np.sum(
    pairs[0] * abs(g @ g.T) + pairs[1] * abs(x @ x.T)
  )


def true_norm(x, g):
  return np.linalg.norm(x.astype(np.float64).T @ g.astype(np.float64))


@pytest.mark.parametrize(("loss_fn", "engine"), FORMS)
@hypothesis.given(
  scale=st.sampled_from([1e-3, 1.0, 30.0, 1e6]),
  gap=st.floats(-9, 1).map(lambda power: 10.0**power),
  seed=st.integers(0, 2**32 - 1),
)
@hypothesis.example(scale=30.0, gap=1e-6, seed=0)
@hypothesis.example(scale=30.0, gap=3e-4, seed=1)
@hypothesis.settings(derandomize=True, deadline=None, max_examples=60)
def test_cancelling_tokens_are_not_clipped_too_little(
  loss_fn, engine, scale, gap, seed
):
  x, g = cancelling(scale=scale, gap=gap, seed=seed)
  truth = true_norm(x, g)
  clip = 1.0
  result = linear_fn(loss_fn, engine)(WEIGHT, {"x": x[None], "g": g[None]})
  contribution = np.linalg.norm(flat(result.grad_sum))
  assert contribution <= clip
  # Clipped by its true norm, up to the rounding of numbers as large as these.
  spread = np.sum(np.linalg.norm(x, axis=1) * np.linalg.norm(g, axis=1))
  slack = 3e-5 + 10 * outer_products.ROUNDING * spread / max(truth, 1e-30)
  assert float(result.grad_norms[0]) >= truth * (1 - slack)
  assert contribution >= min(truth, clip) * (1 - 2 * slack)
  # Fails if: the Gram form has no guard (norm 0 or NaN of a gradient that is
  # not), or the sum's own rounding is left out of the norm.


@pytest.mark.parametrize(("loss_fn", "engine"), FORMS)
@pytest.mark.parametrize(
  ("x_scale", "g_scale"),
  [(1e15, 1e15), (1e25, 1e-25), (1e-25, 1e25), (1e-16, 1e-2), (0.0, 1.0)],
)
def test_extreme_sizes_match_vmap(loss_fn, engine, x_scale, g_scale):
  rng = np.random.default_rng(3)
  batch = {
    "x": np.float32(rng.normal(size=(2, T, M)) * x_scale),
    "g": np.float32(rng.normal(size=(2, T, N)) * g_scale),
  }
  expected = linear_fn(linear_loss, VMAP)(WEIGHT, batch)
  result = linear_fn(loss_fn, engine)(WEIGHT, batch)
  np.testing.assert_allclose(
    flat(result.grad_sum), flat(expected.grad_sum), rtol=3e-5, atol=1e-6
  )
  np.testing.assert_allclose(
    result.grad_norms, expected.grad_norms, rtol=1e-5, atol=1e-13
  )
  # Fails if: squares that overflow or vanish decide about a norm.


@pytest.mark.parametrize(("loss_fn", "engine"), FORMS)
def test_tokens_whose_squares_vanish_are_clipped(loss_fn, engine):
  rng = np.random.default_rng(5)
  x, g = rng.normal(size=(2, T, M)), rng.normal(size=(2, T, N))
  # The first token hides, by its size, that the others' squares are 0.
  x_scale = np.array([1e-14] + [1e-20] * (T - 1))[:, None]
  g_scale = np.array([0.0] + [1e14] * (T - 1))[:, None]
  batch = {"x": np.float32(x * x_scale), "g": np.float32(g * g_scale)}
  result = linear_fn(loss_fn, engine, 1e-8)(WEIGHT, batch)
  true_norms = list(map(true_norm, batch["x"], batch["g"]))
  np.testing.assert_allclose(result.grad_norms, true_norms, rtol=1e-5)
  assert np.linalg.norm(flat(result.grad_sum)) <= 2e-8
  # Fails if: only the largest entry decides whether a Gram form will do.


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
@pytest.mark.parametrize("name", ["x", "g"])
@pytest.mark.parametrize("loss_fn", [linear_loss, twice_loss])
def test_bad_examples_touch_no_other(loss_fn, engine, bad, name):
  rng = np.random.default_rng(4)
  batch = {
    "x": np.float32(rng.normal(size=(4, T, M))),
    "g": np.float32(rng.normal(size=(4, T, N))),
  }
  alone = linear_fn(loss_fn, engine)(
    WEIGHT, batch, jnp.array([False, True, False, True])
  )
  for row in (1, 3):
    batch[name][row, 2:, 5:] = bad
  result = linear_fn(loss_fn, engine)(
    WEIGHT, batch, jnp.array([False, True, False, False])
  )
  expected = linear_fn(linear_loss, VMAP)(
    WEIGHT, batch, jnp.array([False, True, False, False])
  )
  assert_same(result, expected)
  if bad != 3e38:
    np.testing.assert_array_equal(result.is_nonfinite, [False] * 3 + [True])
    np.testing.assert_allclose(
      flat(result.grad_sum), flat(alone.grad_sum), rtol=1e-6, atol=1e-7
    )
  # Fails if: a NaN is multiplied by zero instead of selected away, or padding
  # is counted.


def uses_outside(params, batch, ops=PLAIN):
  return linear_loss(params, batch, ops) + jnp.sum(params["w"] ** 2)


def uses_in_cond(params, batch, ops=PLAIN):
  return jax.lax.cond(
    jnp.sum(batch["x"]) > 0,
    lambda: linear_loss(params, batch, ops),
    lambda: jnp.sum(batch["g"], axis=(1, 2)),
  )


def uses_product(params, batch, ops=PLAIN):
  return linear_loss({"w": params["w"] * 2}, batch, ops)


def uses_as_input(params, batch, ops=PLAIN):
  taken = ops.scale("one", jnp.ones(N), params["w"])
  return linear_loss(params, batch, ops) + jnp.sum(taken)


def carries(params, batch, ops=PLAIN):
  swap = lambda pair, _: (pair[::-1], None)
  (w, _), _ = jax.lax.scan(swap, (params["w"], jnp.ones((M, N))), None, 2)
  return linear_loss({"w": w}, batch, ops)


@pytest.mark.parametrize(
  "loss_fn", [uses_outside, uses_in_cond, uses_product, uses_as_input, carries]
)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_parameter_used_outside_the_rules_is_named(loss_fn, engine):
  batch = {"x": jnp.ones((2, T, M)), "g": jnp.ones((2, T, N))}
  fn = clipping.clipped_grad(loss_fn, l2_clip_norm=1.0, engine=engine)
  with pytest.raises(ValueError, match=r"'w'|\['w'\]"):
    jax.eval_shape(fn, WEIGHT, batch)
  # Fails if: the rest of its gradient is dropped in silence.


def test_an_input_without_the_batch_axis_is_named():
  def loss_fn(params, batch, ops=PLAIN):
    # T = B: the shape alone looks right.
    places = ops.embed("places", params["w"], jnp.arange(2))
    return jnp.einsum("btm,tm->b", batch["x"], places)

  fn = clipping.clipped_grad(loss_fn, l2_clip_norm=1.0, engine=BOOKKEEPING)
  with pytest.raises(ValueError, match="embed on 'places'"):
    jax.eval_shape(fn, WEIGHT, {"x": jnp.ones((2, 2, N))})
  # Fails if: two positions pass for two examples.


@pytest.mark.parametrize("rows_per_unit", [1, 2])
def test_frozen_weights_need_no_rule_and_unused_ones_get_zero(rows_per_unit):
  base = jnp.ones((M, N))

  def loss_fn(params, batch, ops=PLAIN):
    frozen = ops.dense("frozen", jax.lax.stop_gradient(params["f"]), batch["x"])
    out = ops.dense("base", base, batch["x"]) * frozen
    low = ops.dense("down", params["down"], batch["x"])  # LoRA.
    out = out + ops.dense("up", params["up"], low)
    return jnp.sum(out * batch["g"], axis=(1, 2))

  rng = np.random.default_rng(5)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  params = {
    "f": normal(M, N),
    "unused": normal(3),
    "down": normal(M, 2),
    "up": normal(2, N),
  }
  batch = {"x": normal(6, T, M), "g": normal(6, T, N)}
  options = {"rows_per_unit": rows_per_unit}
  expected = run(loss_fn, params, batch, engine=VMAP, **options)
  for engine in ENGINES:
    result = run(loss_fn, params, batch, engine=engine, **options)
    assert_same(result, expected)
    assert not result.grad_sum["f"].any()
    assert not result.grad_sum["unused"].any()


def test_ghost_refuses_bfloat16_and_bookkeeping_sums_it_in_float32():
  rng = np.random.default_rng(6)
  batch = {
    "x": jnp.asarray(rng.normal(size=(3, T, M)), jnp.bfloat16),
    "g": jnp.asarray(rng.normal(size=(3, T, N)), jnp.bfloat16),
  }

  def loss_fn(params, batch, ops=PLAIN):
    return linear_loss({"w": params["w"].astype(jnp.bfloat16)}, batch, ops)

  with pytest.raises(ValueError, match="GHOST to compute 'w' in float32"):
    run(loss_fn, WEIGHT, batch, engine=GHOST)
  wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), batch)
  expected = run(linear_loss, WEIGHT, wide, engine=VMAP)
  result = run(loss_fn, WEIGHT, batch, engine=BOOKKEEPING)
  np.testing.assert_allclose(
    flat(result.grad_sum), flat(expected.grad_sum), rtol=2e-5, atol=1e-6
  )
  # Fails if: a Gram or a sum is accumulated in the compute dtype.


@pytest.mark.parametrize("engine", [VMAP, BOOKKEEPING])
def test_devices_add_up_in_float32_whatever_the_compute_dtype(engine):
  def loss_fn(params, batch, ops=PLAIN):
    low = params["w"].astype(jnp.bfloat16)
    out = ops.dense("w", low, batch.astype(jnp.bfloat16))
    return jnp.sum(jnp.tanh(out).astype(jnp.float32), axis=(1, 2))

  mesh = jax.make_mesh((8,), ("data",))
  spread = jax.sharding.NamedSharding(mesh, jax.P("data"))
  whole = jax.sharding.NamedSharding(mesh, jax.P())
  fn = clipping.clipped_grad(loss_fn, l2_clip_norm=1.0, engine=engine)
  lowered = jax.jit(
    fn, in_shardings=(whole, spread), out_shardings=whole
  ).lower(WEIGHT, jax.ShapeDtypeStruct((16, T, M), jnp.float32))
  # Sums over examples, as they are before the compiler promotes any of them.
  sums = re.findall(
    rf"(dot_general|reduce|add)\b.*-> tensor<{M}x{N}x(\w+)>", lowered.as_text()
  )
  assert {dtype for _, dtype in sums} == {"f32"}
  assert f"<{M}x{N}xbf16>) -> tensor<{M}x{N}xf32>" not in lowered.as_text()
  reduced = re.findall(
    r"= \(?(\w+)\[[^=]* (?:all-reduce|reduce-scatter)",
    lowered.compile().as_text(),
  )
  assert "f32" in reduced
  assert set(reduced) <= {"f32", "pred"}  # A flag for all, besides.
  # Fails if: gradients are cast to the compute dtype before they are added up.


def test_loss_functions_without_ops_are_refused():
  with pytest.raises(ValueError, match="`ops`"):
    clipping.clipped_grad(
      lambda params, batch: batch, l2_clip_norm=1.0, engine=GHOST
    )


def test_batch_statistics_are_found():
  rng = np.random.default_rng(7)
  batch = {
    "x": jnp.asarray(rng.normal(size=(3, T, M)), jnp.float32),
    "g": jnp.asarray(rng.normal(size=(3, T, N)), jnp.float32),
  }

  def couples(params, batch, ops=PLAIN):
    x = batch["x"] - batch["x"].mean(axis=0, keepdims=True)
    return linear_loss(params, batch | {"x": x}, ops)

  params = {"w": jnp.ones((M, N))}
  clipping.check_examples_are_apart(linear_loss, params, batch)
  with pytest.raises(ValueError, match="not to depend on the others"):
    clipping.check_examples_are_apart(couples, params, batch)
  # Fails if: batch normalisation goes unnoticed.


def test_ways_follow_the_shapes():
  """Every way is taken somewhere above; this pins where."""

  def ways(loss_fn, tokens, *, may_probe):
    batch = {"x": jnp.ones((2, tokens, M)), "g": jnp.ones((2, tokens, N))}
    call = functools.partial(loss_fn, ops=taps.MARKING)
    sites = taps.trace(call, WEIGHT, batch).sites
    return ghost.choose_way(sites, may_probe=may_probe)

  assert ways(linear_loss, T, may_probe=True) is ghost.Way.PROBE
  assert ways(linear_loss, T, may_probe=False) is ghost.Way.RECORD
  assert ways(twice_loss, T, may_probe=True) is ghost.Way.RECORD
  assert ways(twice_loss, 60, may_probe=True) is ghost.Way.KEEP
