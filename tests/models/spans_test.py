"""Any number of pictures and sounds, anywhere; and going without them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppnet import config as config_lib
from ppnet.models import multimodal, vision
from tests import tiny

PLACEHOLDERS = {"image": 4, "audio": 5}
# A picture is 4 tokens, a sound 2; the second picture of row 0 stands apart
# from the first, row 1 has one picture, and one sound that is cut in two.
TOKENS = jnp.array(
  [
    [1, 4, 4, 4, 4, 9, 5, 5, 8, 4, 4, 4, 4, 5, 5, 7],
    [1, 8, 5, 9, 9, 5, 4, 4, 4, 4, 9, 9, 9, 8, 7, 6],
  ],
  jnp.int32,
)
PATCHES = config_lib.PatchStemConfig(
  patch_size=4, embed_dim=6, num_layers=2, num_heads=2, mlp_dim=10
)
jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


def model_of(*, patches=PATCHES, dropout=0.0):
  shape = dataclasses.replace(
    tiny.experiment().model,
    image=config_lib.ImageStemConfig(
      channels=(4,), strides=(4,), patches=patches
    ),
    modality_dropout=dropout,
  )
  return multimodal.PPNet(shape, PLACEHOLDERS)


def media():
  rng = np.random.default_rng(0)
  image = rng.normal(size=(2, 2, 8, 8, 3))
  audio = rng.normal(size=(2, 2, 24, 7))
  image[1, 1] = audio[1, 1] = 0  # Absent ones are last, and zero.
  return {
    "image": jnp.asarray(image, jnp.float32),
    "audio": jnp.asarray(audio, jnp.float32),
  }


def init(model):
  """Parameters of unit gain, drawn without compiling."""
  shapes = jax.eval_shape(
    lambda: model.init(jax.random.key(0), TOKENS, media=media())
  )["params"]
  rng = np.random.default_rng(1)

  def draw(leaf):
    leaf = getattr(leaf, "value", leaf)
    gain = leaf.shape[-2] ** -0.5 if len(leaf.shape) > 1 else 1.0
    return jnp.asarray(gain * rng.normal(size=leaf.shape), jnp.float32)

  boxed = lambda leaf: hasattr(leaf, "names")
  return jax.tree.map(draw, shapes, is_leaf=boxed)


@pytest.fixture(scope="module")
def network():
  model = model_of(patches=None, dropout=0.5)
  params = init(model)
  embed = jit(
    lambda params, tokens, media, keys=None: model.apply(
      {"params": params}, tokens, media, dropout_keys=keys, method="embed"
    )
  )
  return model, params, embed


@pytest.mark.parametrize("patches", [None, PATCHES], ids=["cnn", "patches"])
def test_each_picture_is_read_by_itself_and_stands_where_it_should(patches):
  model = model_of(patches=patches)
  params, given = init(model), media()
  out = np.asarray(
    jit(lambda p: model.apply({"params": p}, TOKENS, given, method="embed"))(
      params
    )
  )
  stem = lambda name, values: np.asarray(
    jit(
      lambda p: model.apply(
        {"params": p}, values, method=lambda m, v: m.stems[name](v)
      )
    )(params)
  )
  for name, places in {
    "image": [(0, 0, slice(1, 5)), (0, 1, slice(9, 13)), (1, 0, slice(6, 10))],
    "audio": [(0, 0, slice(6, 8)), (0, 1, slice(13, 15)), (1, 0, [2, 5])],
  }.items():
    for row, number, where in places:
      alone = stem(name, given[name][row, number][None])[0]
      np.testing.assert_allclose(out[row, where], alone, atol=1e-6)
  words = (np.asarray(TOKENS) != 4) & (np.asarray(TOKENS) != 5)
  table = np.asarray(params["decoder"]["token_embed"]["table"])
  np.testing.assert_array_equal(out[words], table[np.asarray(TOKENS)[words]])
  # Fails if: pictures of a record see each other, or change places.


def test_one_item_needs_no_axis_of_its_own(network):
  _, params, embed = network
  given = {"image": media()["image"][:, 0]}
  with_axis = {"image": media()["image"][:, :1]}
  np.testing.assert_array_equal(
    embed(params, TOKENS, given), embed(params, TOKENS, with_axis)
  )


def test_what_is_absent_changes_nothing(network):
  model, params, embed = network
  one_row = TOKENS[1:]
  given = {name: values[1:] for name, values in media().items()}
  fewer = {name: values[:, :1] for name, values in given.items()}
  np.testing.assert_allclose(  # Products of other shapes round otherwise.
    embed(params, one_row, given), embed(params, one_row, fewer), atol=1e-6
  )

  def loss(given):
    out = model.apply({"params": params}, one_row, given, method="embed")
    return jnp.square(out).sum()

  grads = jit(jax.grad(loss))(given)
  for grad in grads.values():
    assert (np.asarray(grad[:, 0]) != 0).any()
    np.testing.assert_array_equal(grad[:, 1], 0)


def test_every_patch_sees_all_of_its_picture():
  stem = vision.PatchStem(PATCHES, 5)
  rng = np.random.default_rng(0)
  pixels = rng.normal(size=(2, 2, 8, 12, 3)).astype(np.float32)
  pixels[1] = pixels[0]
  pixels[1, 0, 4:, 8:] += 1  # The last patch of the first picture.
  out, params = jit(stem.init_with_output)(jax.random.key(0), pixels)
  assert out.shape == (2, 2, 6, 5)
  changed = np.abs(out[1] - out[0]).max(axis=-1)  # [N, P]
  assert (changed[0] > 1e-4).all()
  np.testing.assert_allclose(changed[1], 0, atol=1e-6)
  # Places are told apart: equal patches have different embeddings.
  equal = jit(stem.apply)(params, jnp.ones_like(pixels))[0, 0]
  assert not np.allclose(equal[0], equal[5], atol=1e-3)
  # Fails if: attention is causal, or has no positions.


def keys(count):
  return jax.random.split(jax.random.key(7), count)


def test_a_dropped_modality_leaves_its_placeholders_own_embedding(network):
  _, params, embed = network
  count = 64
  tokens = jnp.broadcast_to(TOKENS[:1], (count, 16))
  given = jax.tree.map(
    lambda x: jnp.broadcast_to(x[:1], (count, *x.shape[1:])), media()
  )
  out = np.asarray(embed(params, tokens, given, keys(count)))
  whole = np.asarray(embed(params, tokens, given))
  words = np.asarray(embed(params, tokens, {}))
  dropped = {}
  for name, number in PLACEHOLDERS.items():
    here = np.asarray(tokens[0]) == number
    is_own = (out[:, here] == words[:, here]).all(axis=(1, 2))
    is_read = (out[:, here] == whole[:, here]).all(axis=(1, 2))
    assert (is_own ^ is_read).all()
    assert 20 < is_own.sum() < 44  # Of 64 with probability 1/2.
    dropped[name] = is_own
    np.testing.assert_array_equal(
      out[:, ~here & (tokens[0] > 5)], words[:, ~here & (tokens[0] > 5)]
    )
  # Each modality is drawn for itself: all four cases occur.
  cases = set(zip(dropped["image"], dropped["audio"], strict=True))
  assert len(cases) == 4
  # An example's draw is its own key's, wherever it stands in the batch.
  np.testing.assert_array_equal(
    embed(params, tokens, given, keys(count)[::-1]), out[::-1]
  )


def test_a_dropped_modality_trains_its_placeholder_and_not_its_stem(network):
  model, params, _ = network

  def loss(params, key):
    out = model.apply(
      {"params": params},
      TOKENS[:1],
      {"image": media()["image"][:1]},
      dropout_keys=key,
      method="embed",
    )
    return jnp.square(out).sum()

  grad_fn = jit(jax.grad(loss))
  seen = set()
  for number in range(8):
    grad = grad_fn(params, keys(8)[number][None])
    has_stem = any(
      bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(grad["stems_image"])
    )
    has_row = bool(
      jnp.any(grad["decoder"]["token_embed"]["table"][PLACEHOLDERS["image"]])
    )
    assert has_stem != has_row
    seen.add(has_stem)
  assert seen == {True, False}
  # Fails if: a dropped picture's stem is trained.


def test_stems_are_not_in_the_program_of_a_record_of_text_alone():
  model = model_of(dropout=0.5)
  plain = multimodal.PPNet(
    dataclasses.replace(model.config, image=None, audio=None), PLACEHOLDERS
  )
  params, tokens = init(model), TOKENS[:, -3:]

  def program(model, params):
    call = lambda p, t: model.apply({"params": p}, t, media={})
    return jax.jit(call).lower(params, tokens)

  with_stems = program(model, params)
  without = program(plain, {"decoder": params["decoder"]})
  # Equal letter for letter, so its results are equal bit for bit: no parameter
  # of a stem is even an argument.
  assert with_stems.as_text() == without.as_text()


def test_media_that_do_not_fit_are_refused(network):
  model, params, _ = network
  plain = multimodal.PPNet(
    dataclasses.replace(model.config, audio=None), PLACEHOLDERS
  )
  for net, given, message in (
    (plain, media(), r"Set model\.audio"),
    (model, {"image": jnp.zeros((2, 8, 8))}, r"media\['image'\] of 3 axes"),
    (model, {"audio": jnp.zeros((2, 1, 2, 24, 7))}, "of 2 axes"),
  ):
    with pytest.raises(ValueError, match=message):
      jax.eval_shape(
        lambda n=net, g=given: n.apply(
          {"params": params}, TOKENS, g, method="embed"
        )
      )


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"patch_size": 3}, r"data\.image_size to be a multiple"),
    ({"num_heads": 4}, r"embed_dim to be a multiple"),
    ({"mlp_dim": 0}, r"patches\.mlp_dim > 0"),
  ],
)
def test_stems_that_cannot_be_are_refused(change, message):
  config = tiny.experiment()
  config.model.image.patches = dataclasses.replace(PATCHES, **change)
  with pytest.raises(ValueError, match=message):
    config_lib.validate(config)


def test_dropout_of_every_example_is_refused():
  config = tiny.experiment()
  config.model.modality_dropout = 1.0
  with pytest.raises(ValueError, match=r"modality_dropout < 1"):
    config_lib.validate(config)
