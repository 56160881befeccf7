"""Weights by the mean that step 0 measures: its gradient, and what follows."""

import csv
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppnet import config as config_lib
from ppnet import main
from ppnet.core import prng, records
from ppnet.data import tokenizers
from ppnet.models import linear, measuring, words
from ppnet.privacy import clipping
from ppnet.train import losses
from tests import tiny

_TEXTS = ("the red dress", "the dress fits", "The end", "red\nand the blue")
_NUM_BUCKETS = 23
_NUM_PIXELS = 2 * 3 * 4
_NORM = 3.0
_POWER, _FLOOR = 0.5, 0.01
_STAGES = [measuring.stage(0), measuring.stage(1)]
_TOKENIZER = tokenizers.ByteTokenizer(class_names=["no", "yes"])


def batch():
  count = len(_TEXTS)
  rng = np.random.default_rng(0)
  tokens = np.full((count, 20), _TOKENIZER.pad_id, np.int32)
  targets, loss_mask = tokens.copy(), np.zeros((count, 20), np.float32)
  for row, text in enumerate(_TEXTS):
    ids = [_TOKENIZER.bos_id, *_TOKENIZER.encode(text)]
    tokens[row, : len(ids)] = ids
    targets[row, len(ids) - 1] = rng.choice(_TOKENIZER.answer_ids)
    loss_mask[row, len(ids) - 1] = 1
  return {
    "tokens": jnp.array(tokens),
    "targets": jnp.array(targets),
    "loss_mask": jnp.array(loss_mask),
    "image": jnp.array(rng.normal(1.0, 0.3, (count, 2, 3, 4)), jnp.float32),
    "key": jax.random.split(prng.root(0), count),
  }


def model(*, centre):
  return linear.LinearClassifier(
    config_lib.LinearConfig(
      words=config_lib.WordsConfig(
        num_buckets=_NUM_BUCKETS, heading_weight=2.0
      ),
      feature_norm=_NORM,
      rarity_power=_POWER,
      rarity_floor=_FLOOR,
      centre=centre,
    ),
    vocab_size=_TOKENIZER.vocab_size,
    answer_ids=tuple(_TOKENIZER.answer_ids.tolist()),
  )


def params_with(*shifts):
  size = _NUM_PIXELS + _NUM_BUCKETS
  kernel = 0.3 * jax.random.normal(prng.root(2), (size + 1, 2))
  return {
    "head": {"kernel": kernel},
    **{
      name: {"shift": jnp.array(shift, jnp.float32)}
      for name, shift in zip(_STAGES, shifts, strict=False)
    },
  }


def clipped(engine, params, *, clip=1.0):
  loss_fn = losses.make_loss_fn(
    model(centre=len(params) == 3), config_lib.AttentionNoiseConfig()
  )
  clipped_grad = clipping.clipped_grad(
    loss_fn, l2_clip_norm=clip, engine=engine, has_aux=True
  )
  # One program: much faster than operation by operation.
  return jax.jit(clipped_grad)(params, batch())


def units(features):
  return features / np.linalg.norm(features, axis=1, keepdims=True)


@functools.cache
def raw_features():
  """Pictures, then words, of norm 1 together: the media and words add up."""
  own = model(centre=False)
  found = jax.jit(
    lambda tokens: words.bag(
      tokens, own.config.words, answer_ids=own.answer_ids
    )
  )(batch()["tokens"])
  pictures = np.array(batch()["image"]).reshape(len(_TEXTS), -1)
  return units(np.concatenate([pictures, np.array(found)], axis=1))


def weighted(mean):
  return units(raw_features() * (np.maximum(mean, 0) + _FLOOR) ** -_POWER)


@pytest.mark.parametrize(
  "engine",
  [
    "bookkeeping",
    pytest.param("vmap", marks=pytest.mark.slow),
    pytest.param("ghost", marks=pytest.mark.slow),
  ],
)
def test_the_first_sum_is_that_of_the_features_and_nothing_else(engine):
  zeros = np.zeros(_NUM_PIXELS + _NUM_BUCKETS)
  found = clipped(engine, params_with(zeros, zeros))
  first, second = (found.grad_sum[name]["shift"] for name in _STAGES)
  np.testing.assert_allclose(first, raw_features().sum(axis=0), rtol=1e-4)
  assert (np.array(second) == 0).all()
  assert (np.array(found.grad_sum["head"]["kernel"]) == 0).all()
  np.testing.assert_allclose(found.grad_norms, 1.0, rtol=1e-5)
  # Fails if: the stage is trained on with the task, or two stages at once.


@pytest.mark.parametrize("engine", ["vmap", "ghost", "bookkeeping"])
def test_later_gradients_are_those_of_the_weighted_features(engine):
  mean = raw_features().mean(axis=0) - 0.02  # Noise makes some negative.
  assert (mean < 0).any()
  params = params_with(-mean)
  found = clipped(engine, params, clip=1e6)
  ones = np.ones((len(_TEXTS), 1))
  features = np.concatenate([_NORM * weighted(mean), ones], axis=1)
  logits = features @ np.array(params["head"]["kernel"])
  likely = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
  answers = np.array((batch()["targets"] * batch()["loss_mask"]).sum(axis=1))
  error = likely - (answers[:, None] == _TOKENIZER.answer_ids)
  np.testing.assert_allclose(
    found.grad_sum["head"]["kernel"], features.T @ error, rtol=1e-3, atol=1e-5
  )
  norms = np.linalg.norm(features, axis=1) * np.linalg.norm(error, axis=1)
  np.testing.assert_allclose(found.grad_norms, norms, rtol=1e-4)
  assert (np.array(found.grad_sum[_STAGES[0]]["shift"]) == 0).all()


def test_the_mean_that_is_taken_away_is_that_of_the_weighted_features():
  mean = raw_features().mean(axis=0)
  found = clipped("bookkeeping", params_with(-mean, np.zeros_like(mean)))
  np.testing.assert_allclose(
    found.grad_sum[_STAGES[1]]["shift"],
    weighted(mean).sum(axis=0),
    rtol=1e-4,
    atol=1e-6,
  )
  assert (np.array(found.grad_sum[_STAGES[0]]["shift"]) == 0).all()


def write_reviews(path, *, count):
  """Two words in five decide; the others are of everything."""
  rng = np.random.default_rng(0)
  with path.open("w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(["", "Title", "Review Text", "Recommended IND"])
    for number in range(count):
      label = rng.integers(2)
      own = rng.choice([["awful", "itchy"], ["lovely", "soft"]][label], 2)
      others = rng.choice(["the", "a", "dress", "skirt", "size", "fit"], 3)
      text = " ".join(rng.permutation([*own, *others]))
      writer.writerow([number, "", text, label])
  return path


def test_a_run_learns_words_and_claims_as_any_other(tmp_path):
  config = tiny.experiment(
    num_steps=8,
    expected_batch_size=100,
    eval_every_steps=8,
    checkpoint_every_steps=8,
    epsilon=8.0,
  )
  config.attention_noise = config_lib.AttentionNoiseConfig()
  config.model.image = config.model.audio = None
  config.model.decoder.vocab_size = config.data.vocab_size = 272
  config.model.linear = config_lib.LinearConfig(
    words=config_lib.WordsConfig(num_buckets=64),
    feature_norm=2.0,
    rarity_power=0.5,
    rarity_floor=0.05,
  )
  config.data.source = config_lib.Source.CLOTHING_REVIEWS
  config.data.path = str(write_reviews(tmp_path / "r.csv", count=250))
  config.data.prompt = ""
  config.data.tokenizer = config_lib.TokenizerKind.BYTES
  config.optimizer = config_lib.OptimizerConfig(
    name=config_lib.OptimizerName.SGD, learning_rate=1.0, beta1=0.0
  )
  main.run_job(config, tmp_path / "run")
  summary = records.read_json(tmp_path / "run" / "summary.json")
  assert summary["auc_roc"] > 0.9
  assert summary["charged_steps"] == 8
  assert summary["engine"]["engine"] != "VMAP"  # Words have rules.
  assert 7.9 < summary["epsilon"] <= 8.0
