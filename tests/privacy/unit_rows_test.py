"""Units of several rows, every rule and scope, in every engine.

The loss is linear, so that the gradient of each unit and each slice has a
closed form; what is expected is computed from it in float64.
"""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppnet import config
from ppnet.core import param_ops
from ppnet.privacy import clip_rules, clipping

PLAIN = param_ops.PLAIN
CLIP, NORMALIZE = config.ClipRule.CLIP, config.ClipRule.NORMALIZE
FLAT, PER_LAYER = config.ClipScope.FLAT, config.ClipScope.PER_LAYER
SUM, MEAN = config.UnitReduction.SUM, config.UnitReduction.MEAN
ADD = config.NeighboringRelation.ADD_OR_REMOVE_ONE
REPLACE = config.NeighboringRelation.REPLACE_ONE
ENGINES = list(config.Engine)

U, R, T, L, M, N, K = 5, 3, 2, 4, 31, 23, 7
PARAMS = {"b": jnp.zeros(K), "w": jnp.zeros((L, M, N))}
GAMMA = 0.3

# Bounds of every slice of w and of b, all different.
LAYERS = {"b": 0.5, "w": np.array([0.3, 0.7, 0.1, 1.1])}
CASES = {
  "clip": dict(l2_clip_norm=2.0, unit_reduction=SUM),
  "mean": dict(l2_clip_norm=2.0, unit_reduction=MEAN, microbatch_size=2),
  "normalize": dict(
    l2_clip_norm=2.0, clip_rule=NORMALIZE, stabilizer=GAMMA, microbatch_size=3
  ),
  "layers": dict(l2_clip_norm=LAYERS, clip_scope=PER_LAYER),
  "leaves": dict(
    l2_clip_norm=2.0,
    clip_scope=PER_LAYER,
    clip_rule=NORMALIZE,
    stabilizer=GAMMA,
    unit_reduction=MEAN,
  ),
}


def loss_fn(params, batch, ops=PLAIN):
  """The gradient of slice l of w is sum_t x_t g_tl', that of b is h."""

  def layer(total, slices):
    weight, g = slices
    out = ops.dense("w", weight, batch["x"])
    return total + jnp.sum(out * g, axis=(1, 2)), None

  total = jnp.sum(ops.bias("b", params["b"], batch["y"]) * batch["h"], axis=1)
  by_layer = jnp.moveaxis(batch["g"], 2, 0)
  total, _ = jax.lax.scan(layer, total, (params["w"], by_layer))
  return total


@functools.cache
def jitted(case, engine):
  fn = clipping.clipped_grad(
    loss_fn, engine=engine, rows_per_unit=R, **CASES[case]
  )
  # Compiling is what these tests cost.
  options = {"xla_backend_optimization_level": 0}
  return fn, jax.jit(fn, compiler_options=options)


def draw_batch(rng, *, sizes):
  """Rows of units, whose gradients have about the given sizes, f32[U * R]."""
  root = np.sqrt(np.repeat(sizes, R))
  normal = lambda *shape: rng.normal(size=(len(root), *shape))
  tall = root[:, None, None]
  return {
    "x": np.float32(normal(T, M) * tall / M),
    "g": np.float32(normal(T, L, N) * tall[..., None] / N),
    "y": np.float32(normal(K)),
    "h": np.float32(normal(K) * np.repeat(sizes, R)[:, None] / 9),
  }


def truth(case, batch, padding, *, scale=1.0):
  """Contribution of every unit, f64[U, leaves joined], and its norm before."""
  options = CASES[case]
  wide = {name: np.float64(value) for name, value in batch.items()}
  with np.errstate(invalid="ignore"):
    w = np.einsum("btm,btln->blmn", wide["x"], wide["g"])
  norms, contributions = [], []
  for unit in np.arange(len(padding)).reshape(-1, R):
    real = unit[~padding[unit]]
    count = 1
    if options.get("unit_reduction", SUM) is MEAN:
      count = max(len(real), 1)
    parts = [wide["h"][real].sum(axis=0) / count / scale]
    parts += list(w[real].sum(axis=0) / count / scale)
    total = np.sqrt(sum(np.sum(part**2) for part in parts)) * scale
    bad = not np.isfinite(total)
    norms.append(0.0 if bad else total)
    if bad:
      contributions.append(np.zeros(K + L * M * N))
      continue
    bounds = options["l2_clip_norm"]
    if options.get("clip_scope") is not PER_LAYER:
      groups, bounds = [range(5)], [bounds]
    elif isinstance(bounds, dict):
      groups, bounds = [[i] for i in range(5)], [bounds["b"], *bounds["w"]]
    else:
      groups, bounds = [[0], range(1, 5)], [bounds / np.sqrt(2)] * 2
    for group, bound in zip(groups, bounds, strict=True):
      norm = np.sqrt(sum(np.sum(parts[i] ** 2) for i in group))
      factor = min(1, bound / max(norm, 1e-300))
      if options.get("clip_rule") is NORMALIZE:
        factor = bound / (norm + options["stabilizer"])
      for i in group:
        parts[i] = parts[i] * factor
    contributions.append(np.concatenate([np.ravel(part) for part in parts]))
  return np.array(contributions), np.array(norms)


def flat(tree):
  leaves = [np.ravel(np.float64(leaf)) for leaf in jax.tree.leaves(tree)]
  return np.concatenate(leaves)


def padding_of(*real):
  """Rows after the first `real[u]` of unit u are padding."""
  return np.concatenate([np.arange(R) >= count for count in real])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", CASES)
def test_units_match_their_closed_form(case, engine):
  rng = np.random.default_rng(0)
  batch = draw_batch(rng, sizes=[0.5, 30.0, 8.0, 60.0, 4.0])
  padding = padding_of(3, 1, 2, 0, 3)
  padding[[4, 3]] = padding[[3, 4]]  # A padding row may come first.
  expected, norms = truth(case, batch, padding)
  assert np.linalg.norm(expected, axis=1)[[0, 1, 2, 4]].min() > 0.1
  junk = {name: value.copy() for name, value in batch.items()}
  contents = [np.nan, np.inf, 1e30, np.nan, 3e38, -np.inf]
  for row, content in zip(np.flatnonzero(padding), contents, strict=True):
    for value in junk.values():
      value[row] = content
  result = jitted(case, engine)[1](PARAMS, junk, padding)
  got, want = flat(result.grad_sum), expected.sum(axis=0)
  assert np.linalg.norm(got - want) <= 2.1e-5 * np.linalg.norm(want)
  np.testing.assert_allclose(result.grad_norms, norms, rtol=1e-5)
  assert not result.is_nonfinite.any()
  assert result.losses.shape == (U * R,)
  assert not result.losses[padding].any()
  # Fails if: rows are clipped and not units; the cross terms between a unit's
  # rows are dropped; a padding row counts in a mean, or its NaN in a sum.


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", ["clip", "layers"])
@pytest.mark.parametrize("name", ["x", "g"])
def test_a_bad_row_drops_its_unit_and_no_other(name, case, engine):
  rng = np.random.default_rng(1)
  batch = draw_batch(rng, sizes=[1.0, 20.0, 5.0, 7.0, 9.0])
  padding = padding_of(3, 3, 2, 3, 0)
  batch[name][4, 1, 2] = np.nan  # Unit 1.
  batch[name][6, 0] = np.inf  # Unit 2, whose last row is padding.
  expected, norms = truth(case, batch, padding)
  result = jitted(case, engine)[1](PARAMS, batch, padding)
  got, want = flat(result.grad_sum), expected.sum(axis=0)
  assert np.linalg.norm(got - want) <= 2.1e-5 * np.linalg.norm(want)
  assert norms[1] == norms[2] == 0
  np.testing.assert_allclose(result.grad_norms, norms, rtol=1e-5)
  assert result.is_nonfinite.tolist() == [False, True, True, False, False]
  # Fails if: a unit's good rows stay without its bad one, or a NaN leaks.


_size = st.sampled_from([0.0, 1e-9, 0.1, 1.0, 3.0, 40.0, 1e8])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", CASES)
@hypothesis.given(
  sizes=st.lists(_size, min_size=U, max_size=U),
  real=st.lists(st.integers(0, R), min_size=U, max_size=U),
  other=st.tuples(_size, st.integers(0, R)),
  is_aligned=st.booleans(),
  seed=st.integers(0, 2**32 - 1),
)
@hypothesis.example(  # Records of one user that all say the same.
  sizes=[40.0] * U, real=[R] * U, other=(40.0, R), is_aligned=True, seed=0
)
@hypothesis.settings(derandomize=True, deadline=None, max_examples=10)
def test_neighbours_differ_by_at_most_the_sensitivity(
  case, engine, sizes, real, other, is_aligned, seed
):
  """One unit leaves, or another with other rows takes its place."""
  rng = np.random.default_rng(seed)
  batch = draw_batch(rng, sizes=sizes)
  stranger = draw_batch(rng, sizes=[other[0]] * U)
  unit = slice(R, 2 * R)
  if is_aligned:
    for name, value in batch.items():
      value[unit] = value[R]
      stranger[name][unit] = -value[R] if name in "gh" else value[R]
  padding = padding_of(*real)
  gone, replaced = padding.copy(), padding.copy()
  gone[unit] = True
  replaced[unit] = np.arange(R) >= other[1]
  changed = {name: value.copy() for name, value in batch.items()}
  for name, value in changed.items():
    value[unit] = stranger[name][unit]
  bare, fn = jitted(case, engine)
  whole = flat(fn(PARAMS, batch, padding).grad_sum)
  without = flat(fn(PARAMS, batch, gone).grad_sum)
  instead = flat(fn(PARAMS, changed, replaced).grad_sum)
  rounding = 1e-6 * U * bare.sensitivity(ADD)  # Of the sum over units.
  assert np.linalg.norm(whole - without) <= bare.sensitivity(ADD) + rounding
  assert np.linalg.norm(whole - instead) <= bare.sensitivity(REPLACE) + rounding
  # Fails if: rows are clipped one by one, so that a user of three records
  # counts three times; a layer has a bound that the sensitivity leaves out.


def test_sensitivity_is_the_root_of_the_sum_of_squares_over_layers():
  fn, _ = jitted("layers", config.Engine.VMAP)
  whole = np.sqrt(0.5**2 + 0.3**2 + 0.7**2 + 0.1**2 + 1.1**2)
  assert fn.sensitivity(ADD) == pytest.approx(whole, rel=1e-12)
  assert fn.sensitivity(REPLACE) == pytest.approx(2 * whole, rel=1e-12)
  even = clip_rules.equal_layer_norms(
    PARAMS, l2_clip_norm=3.0, num_stacked_axes={"b": 0, "w": 1}
  )
  assert even["w"].shape == (L,)
  assert even["b"] == even["w"][0] == pytest.approx(3 / np.sqrt(L + 1))
  fn = clipping.clipped_grad(loss_fn, l2_clip_norm=even, clip_scope=PER_LAYER)
  assert fn.sensitivity(ADD) == pytest.approx(3.0, rel=1e-12)
  # Fails if: the largest bound, or their sum, is taken for the whole.


@pytest.mark.parametrize("engine", ENGINES)
def test_a_traced_scale_moves_the_bound_and_not_the_sensitivity(engine):
  rng = np.random.default_rng(2)
  batch = draw_batch(rng, sizes=[0.5, 30.0, 8.0, 60.0, 4.0])
  padding = jnp.asarray(padding_of(3, 1, 2, 0, 3))
  fn, _ = jitted("clip", engine)
  wide = jax.tree.map(jnp.asarray, batch)
  scaled = jax.jit(lambda scale: fn(PARAMS, wide, padding, scale=scale))
  for scale in (1e-3, 0.7, 50.0):
    expected, norms = truth("clip", batch, padding, scale=scale)
    result = scaled(scale)
    got, want = flat(result.grad_sum), expected.sum(axis=0)
    assert np.linalg.norm(got - want) <= 2.1e-5 * np.linalg.norm(want)
    np.testing.assert_allclose(result.grad_norms, norms, rtol=1e-5)
  assert scaled._cache_size() == 1
  for scale in (0.0, 1e-30, 1e30, np.inf):  # Taken as the nearer end.
    result = flat(scaled(scale).grad_sum)
    assert np.linalg.norm(result) <= 4 * fn.sensitivity(ADD) * (1 + 1e-6)
  # Fails if: the sum is not in units of the scale, or a scale of 0 divides.


def test_batches_and_bounds_that_do_not_fit_are_named():
  rng = np.random.default_rng(3)
  batch = draw_batch(rng, sizes=[1.0] * U)
  fn = lambda **options: clipping.clipped_grad(
    loss_fn, **({"l2_clip_norm": 1.0} | options)
  )
  with pytest.raises(ValueError, match="whole units of 4 rows"):
    fn(rows_per_unit=4)(PARAMS, batch)
  with pytest.raises(ValueError, match="rows_per_unit"):
    fn(rows_per_unit=0)
  with pytest.raises(ValueError, match="one number under clip_scope FLAT"):
    fn(l2_clip_norm=LAYERS)
  with pytest.raises(ValueError, match="leading axes"):
    fn(l2_clip_norm=LAYERS | {"w": np.ones(3)}, clip_scope=PER_LAYER)(
      PARAMS, batch
    )
  with pytest.raises(ValueError, match="like the parameters"):
    fn(l2_clip_norm={"w": 1.0}, clip_scope=PER_LAYER)(PARAMS, batch)
  by_row = {"b": np.ones(K), "w": np.ones((L, M))}
  with pytest.raises(ValueError, match="slices that a scan takes"):
    fn(
      l2_clip_norm=by_row,
      clip_scope=PER_LAYER,
      engine=config.Engine.BOOKKEEPING,
    )(PARAMS, jax.tree.map(jnp.asarray, batch))
  with pytest.raises(ValueError, match="l2_clip_norm >= 1e-10"):
    fn(l2_clip_norm=1e-10, clip_scope=PER_LAYER)(PARAMS, batch)
  with pytest.raises(ValueError, match="l2_clip_norm > 0"):
    fn(l2_clip_norm=LAYERS | {"b": 0.0}, clip_scope=PER_LAYER)
  for bad in (0.0, 1e-10, np.nan, 1e16):
    with pytest.raises(ValueError, match="stabilizer"):
      fn(clip_rule=NORMALIZE, stabilizer=bad)
  with pytest.raises(ValueError, match="no scale unless"):
    fn(clip_rule=NORMALIZE)(PARAMS, batch, scale=jnp.float32(1))


def test_the_ablation_without_clipping_reduces_units_alike():
  rng = np.random.default_rng(4)
  batch = draw_batch(rng, sizes=[1.0, 2.0, 3.0, 4.0, 5.0])
  padding = padding_of(3, 1, 2, 0, 3)
  for value in batch.values():
    value[padding] = np.nan
  fn = clipping.unprotected_grad(
    loss_fn,
    clipping=config.Clipping.NONE,
    l2_clip_norm=1.0,
    rows_per_unit=R,
    unit_reduction=MEAN,
  )
  result = jax.jit(fn)(PARAMS, batch, padding)
  h = batch["h"].reshape(U, R, K)
  expected = sum(
    h[unit, :count].mean(axis=0)
    for unit, count in enumerate((3, 1, 2, 0, 3))
    if count
  )
  np.testing.assert_allclose(result.grad_sum["b"], expected, rtol=1e-5)
  assert result.is_nonfinite.shape == (U,)
  assert not result.is_nonfinite.any()
