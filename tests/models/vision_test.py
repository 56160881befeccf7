"""The options of the convolutional stem: what they compute, and for whom."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppnet import config as config_lib
from ppnet.core import param_ops, prng, trees
from ppnet.models import layers, vision
from ppnet.privacy import clipping, taps

Activation = config_lib.Activation
ALL = {
  "activation": Activation.TANH,
  "num_groups": 2,
  "weight_standardisation": True,
}
OPTIONS = {
  "plain": {},
  "tanh": {"activation": Activation.TANH},
  "tempered": {
    "activation": Activation.TEMPERED_SIGMOID,
    "tempered_sigmoid": config_lib.TemperedSigmoidConfig(
      scale=1.6, temperature=3.0, offset=0.7
    ),
  },
  "groups": {"num_groups": 2},
  "standardised": {"weight_standardisation": True},
  "all": ALL,
}
# AUTO is one of them; see below.
ENGINES = [
  config_lib.Engine.VMAP,
  config_lib.Engine.GHOST,
  config_lib.Engine.BOOKKEEPING,
]
jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


def stem(**changes):
  return vision.image_stem(
    config_lib.ImageStemConfig(channels=(4, 6), strides=(1, 2), **changes),
    embed_dim=5,
  )


def pictures(*shape, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=(*shape, 6, 7, 3)), jnp.float32)


def params_of(module):
  """Parameters whose kernels are far from standardised, and biases not 0."""
  shapes = jax.eval_shape(module.init, prng.root(0), pictures(1))["params"]
  leaves, structure = jax.tree.flatten(
    shapes, is_leaf=lambda leaf: hasattr(leaf, "names")
  )
  rng = np.random.default_rng(1)
  return structure.unflatten(
    jnp.asarray(0.3 * rng.normal(size=leaf.value.shape) + 0.1, jnp.float32)
    for leaf in leaves
  )


@pytest.mark.parametrize(
  ("name", "function"),
  [
    ("plain", lambda x: x / (1 + np.exp(-x))),
    ("tanh", np.tanh),
    ("tempered", lambda x: 1.6 / (1 + np.exp(-3 * x)) - 0.7),
  ],
)
@pytest.mark.parametrize("num_groups", [0, 2])
def test_it_is_convolutions_groups_and_an_activation(
  name, function, num_groups
):
  module, images = stem(num_groups=num_groups, **OPTIONS[name]), pictures(2)
  params = params_of(module)
  x = images
  for layer, stride in ((0, 1), (1, 2)):
    own = params[f"conv_{layer}"]
    x = param_ops.PLAIN.conv("", own["kernel"], x, stride) + own[
      "bias"
    ].reshape(1, 1, 1, -1)
    x = function(np.array(layers.group_norm(x, num_groups=num_groups)))
    x = jnp.asarray(x, jnp.float32)
  expected = x.reshape(2, -1, 6) @ params["projector"]["kernel"]
  found = module.apply({"params": params}, images)
  np.testing.assert_allclose(found, expected, atol=2e-5)
  # Fails if: the activation comes before the groups, or is another one.


def test_the_default_tempered_sigmoid_is_tanh():
  images = pictures(2)
  tanh, tempered = (
    stem(activation=activation)
    for activation in (Activation.TANH, Activation.TEMPERED_SIGMOID)
  )
  params = params_of(tanh)
  np.testing.assert_allclose(
    tempered.apply({"params": params}, images),
    tanh.apply({"params": params}, images),
    atol=1e-6,
  )


def test_no_option_changes_a_parameter_s_shape():
  shapes = [
    jax.eval_shape(stem(**changes).init, prng.root(0), pictures(1))
    for changes in OPTIONS.values()
  ]
  assert all(found == shapes[0] for found in shapes[1:])


@pytest.mark.parametrize("leading", [(3,), (2, 2)], ids=["one", "several"])
def test_pictures_stay_apart(leading):
  module, images = stem(**ALL), pictures(*leading)
  # Another picture has a scale and a mean of its own.
  last = tuple(size - 1 for size in leading)
  images = images.at[last].multiply(50.0).at[last].add(20.0)
  params = params_of(module)
  first = (0,) * len(leading)
  apply = jit(lambda x: module.apply({"params": params}, x))
  alone = apply(images[first][None])[0]
  np.testing.assert_allclose(apply(images)[first], alone, rtol=1e-5)
  probe = jit(
    jax.grad(lambda x: module.apply({"params": params}, x)[first].sum() ** 2)
  )(images)
  assert probe[first].any()
  assert not probe.at[first].set(0.0).any()
  # Fails if: statistics run over the batch, or a record's pictures.


def loss_of(module):
  def loss_fn(params, batch, ops=param_ops.PLAIN):
    out = module.clone(ops=ops).apply({"params": params}, batch["image"])
    return jnp.sum(jnp.sin(out) * batch["target"], axis=(1, 2, 3))

  return loss_fn


@pytest.mark.parametrize(
  "name",
  [
    name
    if name in ("standardised", "all")
    else pytest.param(name, marks=pytest.mark.slow)
    for name in OPTIONS
  ],
)
def test_every_engine_clips_the_gradient_of_the_stored_kernel(name):
  """Against each example alone, by automatic differentiation."""
  module = stem(**OPTIONS[name])
  loss_fn, params = loss_of(module), params_of(module)
  rng = np.random.default_rng(2)
  batch = {
    "image": pictures(4, 2),  # Two pictures of each of four examples.
    "target": jnp.asarray(rng.normal(size=(4, 2, 12, 5)), jnp.float32),
  }
  grad_fn = jit(jax.grad(lambda params, one: loss_fn(params, one)[0]))
  grads = [
    grad_fn(params, jax.tree.map(lambda x, i=i: x[i : i + 1], batch))
    for i in range(4)
  ]
  norms = np.array([np.sqrt(float(trees.vdot(g, g))) for g in grads])
  clip = float(np.median(norms))
  expected = jax.tree.map(
    lambda *leaves: sum(
      leaf * min(1.0, clip / norm)
      for leaf, norm in zip(leaves, norms, strict=True)
    ),
    *grads,
  )
  for engine in ENGINES:
    result = jit(
      clipping.clipped_grad(loss_fn, l2_clip_norm=clip, engine=engine)
    )(params, batch)
    np.testing.assert_allclose(
      result.grad_norms, norms, rtol=2e-5, err_msg=engine.name
    )
    jax.tree.map(
      lambda found, want, name=engine.name: np.testing.assert_allclose(
        found, want, atol=3e-5 * clip, err_msg=name
      ),
      result.grad_sum,
      expected,
    )
  # Fails if: the norm, the sum or both are of the standardised kernel's
  # gradient.


def test_a_standardised_kernel_s_gradient_has_no_mean_and_no_length():
  module = stem(weight_standardisation=True)
  loss_fn, params = loss_of(module), params_of(module)
  batch = {"image": pictures(3, 1), "target": jnp.ones((3, 1, 12, 5))}
  grads = jit(
    clipping.clipped_grad(
      loss_fn, l2_clip_norm=1e3, engine=config_lib.Engine.BOOKKEEPING
    )
  )(params, batch).grad_sum
  for layer in ("conv_0", "conv_1"):
    grad, kernel = (
      np.array(tree[layer]["kernel"]).reshape(-1, tree[layer]["bias"].size)
      for tree in (grads, params)
    )
    size = np.linalg.norm(grad)
    assert size > 1e-3
    np.testing.assert_allclose(grad.sum(axis=0), 0, atol=1e-4 * size)
    along = ((kernel - kernel.mean(axis=0)) * grad).sum(axis=0)
    np.testing.assert_allclose(along, 0, atol=1e-4 * size)


def test_auto_has_a_rule_for_every_option():
  module = stem(**ALL)
  params = params_of(module)
  batch = {"image": pictures(2, 1), "target": jnp.ones((2, 1, 12, 5))}
  fn = clipping.clipped_grad(
    loss_of(module), l2_clip_norm=1.0, engine=config_lib.Engine.AUTO
  )
  choice = fn.engine_choice(params, batch)
  assert choice.engine is config_lib.Engine.BOOKKEEPING
  call = functools.partial(loss_of(module), ops=taps.MARKING)
  kinds = [site.kind for site in taps.trace(call, params, batch).sites]
  assert kinds.count("standardised_dense") == 2
  # Fails if: the standardisation is done where no rule sees it.
