"""A linear model: logits of the answers alone, every example by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppnet import config as config_lib
from ppnet import main
from ppnet.core import prng, records
from ppnet.models import layers, linear
from ppnet.privacy import clipping
from ppnet.train import losses
from tests import tiny

_ANSWERS = (3, 5, 6)


def model(**changes):
  return linear.LinearClassifier(
    config_lib.LinearConfig(**changes), vocab_size=8, answer_ids=_ANSWERS
  )


def batch(count):
  rng = np.random.default_rng(0)
  return {
    "tokens": jnp.zeros((count, 2), jnp.int32),
    "targets": jnp.array(rng.choice(_ANSWERS, (count, 2)), jnp.int32),
    "loss_mask": jnp.tile(jnp.array([0.0, 1.0]), (count, 1)),
    "image": jnp.array(rng.normal(size=(count, 4, 4, 6)), jnp.float32),
    "key": jax.random.split(prng.root(0), count),
  }


def params_of(net, examples, *, scale):
  params = net.init(
    prng.root(1), examples["tokens"], media=losses.media(examples)
  )["params"]
  value = jax.random.normal(prng.root(2), params["head"]["kernel"].value.shape)
  return {"head": {"kernel": scale * value}}


def test_logits_are_a_product_and_a_bias():
  net, examples = model(), batch(3)
  params = params_of(net, examples, scale=1.0)
  logits = net.apply(
    {"params": params}, examples["tokens"], media=losses.media(examples)
  )
  features = np.array(examples["image"]).reshape(3, -1)
  kernel = np.array(params["head"]["kernel"])
  expected = features @ kernel[:-1] + kernel[-1]
  assert logits.shape == (3, 1, 8)  # The same at every position.
  np.testing.assert_allclose(
    logits[:, 0, jnp.array(_ANSWERS)], expected, rtol=1e-5, atol=1e-5
  )
  others = [i for i in range(8) if i not in _ANSWERS]
  assert (jax.nn.softmax(logits)[:, :, jnp.array(others)] == 0).all()


def test_it_begins_with_every_answer_equally_likely():
  net, examples = model(num_groups=2), batch(2)
  loss = losses.make_loss_fn(net, config_lib.AttentionNoiseConfig())(
    params_of(net, examples, scale=0.0), examples
  )[0]
  np.testing.assert_allclose(loss, np.log(3), rtol=1e-6)


def test_groups_have_mean_zero_and_variance_one_within_each_example():
  x = jnp.array(
    np.random.default_rng(0).normal(3.0, 2.0, (2, 5, 4, 6)), jnp.float32
  )
  x = x.at[1].multiply(100.0)  # Another example has a scale of its own.
  found = np.array(layers.group_norm(x, num_groups=3)).reshape(2, 5, 4, 3, 2)
  np.testing.assert_allclose(found.mean(axis=(1, 2, 4)), 0, atol=1e-5)
  np.testing.assert_allclose(found.var(axis=(1, 2, 4)), 1, rtol=1e-3)
  one = layers.group_norm(x[:1], num_groups=3)
  np.testing.assert_array_equal(layers.group_norm(x, num_groups=3)[:1], one)
  constant = layers.group_norm(jnp.full((1, 2, 2, 4), 7.0), num_groups=2)
  assert (constant == 0).all()


def test_groups_that_do_not_divide_the_maps_are_refused():
  with pytest.raises(ValueError, match="num_groups=4, maps=6"):
    layers.group_norm(jnp.zeros((1, 2, 2, 6)), num_groups=4)


@pytest.mark.parametrize(
  "engine", [config_lib.Engine.GHOST, config_lib.Engine.BOOKKEEPING]
)
def test_engines_clip_it_as_vmap_does(engine):
  net, examples = model(num_groups=3), batch(5)
  params = params_of(net, examples, scale=0.1)
  loss_fn = losses.make_loss_fn(net, config_lib.AttentionNoiseConfig())
  found = [
    clipping.clipped_grad(loss_fn, l2_clip_norm=1.5, engine=each, has_aux=True)(
      params, examples
    )
    for each in (config_lib.Engine.VMAP, engine)
  ]
  assert (found[0].grad_norms > 1.5).any()
  np.testing.assert_allclose(found[1].grad_norms, found[0].grad_norms, 1e-5)
  np.testing.assert_allclose(
    found[1].grad_sum["head"]["kernel"],
    found[0].grad_sum["head"]["kernel"],
    rtol=1e-4,
    atol=1e-5,
  )


def test_without_media_and_words_there_is_nothing_to_classify():
  with pytest.raises(ValueError, match=r"linear\.words=build"):
    model().init(prng.root(1), jnp.zeros((2, 3), jnp.int32), media={})


def experiment(**changes):
  config = tiny.experiment(**changes)
  config.model.linear = config_lib.LinearConfig()
  config.attention_noise = config_lib.AttentionNoiseConfig()
  return config


def test_a_run_learns_and_claims_as_any_other(tmp_path):
  config = experiment(
    num_steps=30, eval_every_steps=30, checkpoint_every_steps=30, epsilon=8.0
  )
  main.run_job(config, tmp_path)
  summary = records.read_json(tmp_path / "summary.json")
  assert summary["accuracy"] > 0.5  # Chance is 0.1.
  assert 7.9 < summary["epsilon"] <= 8.0


def _words(**changes):
  return config_lib.WordsConfig(**changes)


def _set_words(config, **changes):
  config.data.tokenizer = config_lib.TokenizerKind.BYTES
  config.model.linear.words = _words(**changes)


def _weigh(config, *, l2_clip_norm):
  config.model.linear.rarity_power = 0.5
  config.model.linear.feature_norm = 2.0
  config.privacy.l2_clip_norm = l2_clip_norm


@pytest.mark.parametrize(
  ("change", "says"),
  [
    (lambda c: setattr(c.model, "modality_dropout", 0.5), "modality_dropout"),
    (lambda c: setattr(c.model.linear, "num_groups", -1), "num_groups"),
    (
      lambda c: setattr(c.model.linear, "words", _words()),
      r"tokenizer=BYTES.*'PUBLIC'",
    ),
    (lambda c: _set_words(c, num_buckets=0), "num_buckets"),
    (lambda c: _set_words(c, num_stem_bytes=0), "num_stem_bytes"),
    (lambda c: _set_words(c, heading_weight=-1.0), "heading_weight"),
    (lambda c: setattr(c.model.linear, "rarity_power", -0.5), "rarity_power"),
    (lambda c: setattr(c.model.linear, "rarity_power", 0.5), "feature_norm"),
    (lambda c: setattr(c.model.linear, "rarity_floor", 0.0), "rarity_floor"),
    (lambda c: _weigh(c, l2_clip_norm=0.5), "l2_clip_norm"),
    (
      lambda c: setattr(c.model.decoder, "lora", config_lib.LoraConfig()),
      "decoder.lora",
    ),
  ],
)
def test_what_it_has_no_place_for_is_refused(change, says):
  config = experiment()
  change(config)
  with pytest.raises(ValueError, match=says):
    config_lib.validate(config)
