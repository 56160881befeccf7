"""Pictures and sounds take their placeholders' places, and nothing else."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppnet import config as config_lib
from ppnet.models import audio, multimodal, vision
from tests import tiny

PLACEHOLDERS = {"image": 4, "audio": 5}
# <s>, 4 image, 2 audio, 3 prompt tokens.
TOKENS = jnp.array([[1, 4, 4, 4, 4, 5, 5, 20, 21, 22]] * 2, jnp.int32)


@pytest.fixture(scope="module")
def network():
  config = tiny.experiment().model
  model = multimodal.PPNet(config, PLACEHOLDERS)
  rng = np.random.default_rng(0)
  image = jnp.asarray(rng.normal(size=(2, 8, 8, 1)), jnp.float32)
  frames = jnp.asarray(rng.normal(size=(2, 24, 7)), jnp.float32)
  init = jax.jit(
    lambda key: model.init(key, TOKENS, media={"image": image, "audio": frames})
  )
  params = nn.meta.unbox(init(jax.random.key(0))["params"])
  apply = jax.jit(
    lambda tokens, **kwargs: model.apply({"params": params}, tokens, **kwargs)
  )
  return model, params, apply, image, frames


def test_merge_span_puts_the_nth_embedding_at_the_nth_placeholder():
  embeddings = jnp.zeros((2, 6, 3))
  tokens = jnp.array([[7, 9, 7, 1, 7, 2], [1, 1, 7, 7, 7, 9]])
  span = jnp.arange(18.0).reshape(2, 3, 3) + 1
  merged = multimodal.merge_span(embeddings, tokens, placeholder=7, span=span)
  expected = np.zeros((2, 6, 3))
  expected[0, [0, 2, 4]] = span[0]
  expected[1, [2, 3, 4]] = span[1]
  np.testing.assert_array_equal(merged, expected)


def test_logits_depend_on_every_pixel_and_every_frame(network):
  model, params, _, image, frames = network

  def answer(image, frames):
    out = model.apply(
      {"params": params}, TOKENS, media={"image": image, "audio": frames}
    )
    return jnp.square(out[:, -1]).sum()

  by_image, by_audio = jax.jit(jax.grad(answer, (0, 1)))(image, frames)
  # The 3x3 convolution has stride 4: it sees rows 0-2 and 4-6 (SAME padding
  # puts the rest at the end), so those pixels must matter.
  seen = np.abs(np.asarray(by_image)).max(axis=(0, 3))
  assert (seen[:3, :3] > 0).all()
  assert (np.abs(np.asarray(by_audio)) > 0).all()


def test_a_modality_s_embeddings_do_not_leak_without_placeholders(network):
  _, _, apply, image, frames = network
  text_only = jnp.array([[1, 20, 21, 22]] * 2)
  np.testing.assert_array_equal(
    apply(text_only, media={"image": image, "audio": frames}),
    apply(text_only, media={}),
  )
  # Fails if: a stem writes beyond its span.


def test_swapping_pictures_swaps_answers(network):
  _, _, apply, image, frames = network
  out = apply(TOKENS, media={"image": image, "audio": frames})
  swapped = apply(TOKENS, media={"image": image[::-1], "audio": frames[::-1]})
  np.testing.assert_allclose(swapped[::-1], out, atol=1e-6)
  assert not np.allclose(out[0], out[1])


def test_stems_make_as_many_tokens_as_the_config_says():
  config = tiny.experiment()
  config.data.image_size = 9
  config.model.image = config_lib.ImageStemConfig(
    channels=(2, 3), strides=(2, 3)
  )
  image_tokens = jax.eval_shape(
    lambda key: vision.image_stem(config.model.image, 5).init_with_output(
      key, jnp.zeros((1, 9, 9, 1))
    )[0],
    jax.eval_shape(jax.random.key, 0),
  )
  assert image_tokens.shape == (
    1,
    config_lib.num_media_tokens(config)["image"],
    5,
  )
  config.model.audio = config_lib.AudioStemConfig(frames_per_token=5)
  num_frames = config_lib.num_audio_frames(config.data.audio)
  audio_tokens = jax.eval_shape(
    lambda key: audio.AudioStem(config.model.audio, 6).init_with_output(
      key, jnp.zeros((1, num_frames, 7))
    )[0],
    jax.eval_shape(jax.random.key, 0),
  )
  assert audio_tokens.shape == (
    1,
    config_lib.num_media_tokens(config)["audio"],
    6,
  )
  assert num_frames % 5  # The last group is a padded one.


def test_a_model_without_stems_is_the_plain_decoder():
  config = dataclasses.replace(tiny.experiment().model, image=None, audio=None)
  model = multimodal.PPNet(config, PLACEHOLDERS)
  shapes = jax.eval_shape(
    lambda key: model.init(key, TOKENS, media={}),
    jax.eval_shape(jax.random.key, 0),
  )
  assert set(shapes["params"]) == {"decoder"}


def test_stems_change_nothing_for_a_record_of_text_alone(network):
  model, params, _, _, _ = network
  plain = multimodal.PPNet(
    dataclasses.replace(model.config, image=None, audio=None), PLACEHOLDERS
  )
  tokens = TOKENS[:, -4:]
  with_stems, without = (
    jax.jit(lambda p, m=m: m.apply({"params": p}, tokens, media={}))(p)
    for m, p in ((model, params), (plain, {"decoder": params["decoder"]}))
  )
  np.testing.assert_array_equal(with_stems, without)
  # Fails if: a stem that has nothing to read adds something.
