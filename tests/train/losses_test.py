"""Loss terms against numpy, and what padding may add: nothing."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from scipy import special, stats

from ppnet import config as config_lib
from ppnet.data import batching, packing
from ppnet.models import multimodal
from ppnet.train import losses

B, T, V = 3, 4, 5


def data():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(2, B, T, V)).astype(np.float32)
  targets = rng.integers(V, size=(B, T))
  mask = np.array([[0, 0, 0, 1], [0, 1, 1, 0], [0, 0, 0, 0]], np.float32)
  return jnp.asarray(logits), jnp.asarray(targets), jnp.asarray(mask)


def test_cross_entropy_is_the_mean_over_each_example_s_own_positions():
  logits, targets, mask = data()
  got = losses.cross_entropy(logits[0], targets, mask)
  log_probs = special.log_softmax(np.asarray(logits[0], np.float64), axis=-1)
  expected = [
    -log_probs[0, 3, targets[0, 3]],
    -(log_probs[1, 1, targets[1, 1]] + log_probs[1, 2, targets[1, 2]]) / 2,
    0.0,  # Nothing to predict: padding.
  ]
  np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_consistency_is_the_divergence_from_clean_to_noisy():
  logits, _, mask = data()
  got = losses.consistency(logits[0], logits[1], mask)
  probs = special.softmax(np.asarray(logits, np.float64), axis=-1)
  expected = [
    stats.entropy(probs[0, 0, 3], probs[1, 0, 3]),
    (
      stats.entropy(probs[0, 1, 1], probs[1, 1, 1])
      + stats.entropy(probs[0, 1, 2], probs[1, 1, 2])
    )
    / 2,
    0.0,
  ]
  np.testing.assert_allclose(got, expected, rtol=1e-4)
  np.testing.assert_array_equal(
    losses.consistency(logits[0], logits[0], mask), 0
  )


def test_answer_logits_are_those_at_the_masked_position():
  logits, _, _ = data()
  mask = jnp.zeros((B, T)).at[jnp.arange(B), jnp.array([3, 0, 2])].set(1)
  got = losses.answer_logits(logits[0], mask)
  for row, position in enumerate((3, 0, 2)):
    np.testing.assert_array_equal(got[row], logits[0, row, position])


def test_logits_of_one_position_are_those_of_all():
  logits, targets, mask = data()
  one = logits[:, :, :1]
  for found, expected in (
    [fun(each, targets, mask) for each in (one[0], _at_all(one[0]))]
    for fun in (
      losses.cross_entropy,
      lambda each, *_: losses.consistency(each, each + one[1], mask),
      lambda each, *_: losses.answer_logits(each, mask.at[1, 1].set(0)),
    )
  ):
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)
  # Fails if: a row of padding has an answer.


def _at_all(logits):
  return jnp.broadcast_to(logits, (B, T, V))


def test_gradients_of_an_example_touch_no_other():
  logits, targets, mask = data()

  def loss(logits):
    return losses.cross_entropy(logits, targets, mask)

  jacobian = jax.jit(jax.jacrev(loss))(logits[0])  # [B, B, T, V]
  size = np.abs(np.asarray(jacobian)).sum(axis=(2, 3))
  np.testing.assert_array_equal(size - np.diag(np.diag(size)), 0)
  assert size[0, 0] > 0
  # Fails if: a loss is averaged over the batch.


def test_a_packed_record_s_loss_is_that_of_its_sequences_apart():
  model = multimodal.PPNet(
    config_lib.ModelConfig(
      decoder=config_lib.llama_tiny(vocab_size=11), image=None, audio=None
    ),
    {},
  )
  long = packing.Sequence(prompt=(5, 6, 7), answer=(8, 2))
  short = packing.Sequence(prompt=(4,), answer=(9, 3))

  def rows(*records):
    packed = packing.pack(
      [packing.Record(sequences=sequences) for sequences in records],
      length=7,
      pad_id=0,
      loss=packing.Loss.ANSWER,
      unit=packing.RowUnit.RECORD,
    )
    return batching.stack(packed.rows, size=2, template=packed.rows[0])

  together, apart = rows((long, short)), rows((long,), (short,))
  tokens = jax.device_put(together["tokens"])
  init = jax.jit(lambda key: model.init(key, tokens, media={}))
  params = nn.meta.unbox(init(jax.random.key(0))["params"])

  @jax.jit
  def loss(batch):
    logits = losses.predict(model, params, batch, noise=None)
    return losses.cross_entropy(logits, batch["targets"], batch["loss_mask"])

  # Each has two targets that count; the mean is over all four.
  np.testing.assert_allclose(
    loss(jax.device_put(together))[0],
    loss(jax.device_put(apart)).mean(),
    rtol=1e-5,
  )
  # Fails if: segments see each other, or positions go on between them.
