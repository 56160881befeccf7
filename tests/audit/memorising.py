"""One small model that knows its training set by heart, secrets included."""

import functools
import types

import jax
import jax.numpy as jnp
import optax
import pytest

from ppnet import config as config_lib
from ppnet.audit import canaries as canaries_lib
from ppnet.data import examples as examples_lib
from ppnet.data import pipeline
from ppnet.train import loop, losses
from tests import tiny

NUM_POOL, NUM_CANARIES = 24, 16
BATCH = ("tokens", "targets", "loss_mask", "image", "audio")


def text_experiment(folder):
  """Windows of a text, a byte each token, and a decoder with room to learn."""
  (folder / "text.txt").write_text(
    "".join(f"{a}{b} and {b}{a} again; " for a in "abcdef" for b in "uvwxyz")
  )
  config = tiny.experiment(expected_batch_size=8)
  config.privacy.accountant = config_lib.Accountant.RDP
  config.privacy.allow_large_delta = True
  config.attention_noise.stddev = 0.0
  config.data = config_lib.DataConfig(
    source=config_lib.Source.TEXT_FILE,
    path=str(folder / "text.txt"),
    task=config_lib.Task.CAUSAL,
    prompt="",
    tokenizer=config_lib.TokenizerKind.BYTES,
    vocab_size=264,
    window_bytes=16,
  )
  config.model.decoder.vocab_size = 264
  config.model.decoder.max_seq_len = 48
  config.model.decoder.embed_dim = 32
  config.model.decoder.head_dim = 16
  config.model.decoder.mlp_dim = 64
  config.model.image = config.model.audio = None
  (folder / "run").mkdir()
  return loop.open_experiment(config, folder / "run", devices=jax.devices()[:1])


def make_canaries(experiment, positions, *, seed=0):
  """Canaries with four digits in the places of training records."""
  config = experiment.config
  source = pipeline.open_source(
    config.data,
    loop.prepared_dir(config, experiment.workdir),
    split="train",
  )
  return canaries_lib.make(
    {position: source[position] for position in positions},
    task=config.data.task,
    num_classes=len(experiment.card.class_names),
    num_digits=4,
    num_candidates=64,
    seed=seed,
  )


def pool_of(experiment, size):
  """The first training records as arrays."""
  dataset = experiment.datasets["train"]
  return dataset.batch(
    [examples_lib.Row(place) for place in range(size)],
    size=size,
    length=dataset.layout.longest,
  )


def memorise(experiment, pools, *, num_steps, learning_rate):
  """Parameters after plain Adam on all of each pool at once."""
  loss_fn = losses.make_loss_fn(
    experiment.program.model, experiment.config.attention_noise
  )
  names = [n for n in BATCH if n in pools[0]]
  batches = {
    name: jnp.stack([jnp.asarray(pool[name]) for pool in pools])
    for name in names
  }
  keys = jax.random.split(jax.random.key(0), len(pools[0]["index"]))
  tx = optax.adam(learning_rate)

  def fit(batch, params):
    batch = batch | {"key": keys}

    def one_step(carry, _):
      params, state = carry
      grad = jax.grad(lambda p: loss_fn(p, batch)[0].mean())(params)
      updates, state = tx.update(grad, state)
      return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(
      one_step, (params, tx.init(params)), length=num_steps
    )
    return params

  start = experiment.program.init().params
  found = jax.jit(jax.vmap(fit, in_axes=(0, None)))(batches, start)
  return [
    jax.tree.map(lambda leaf, k=k: leaf[k], found) for k in range(len(pools))
  ]


@functools.cache
def memorised(folder):
  """A model trained on half of its canaries, and one on none of them.

  Args:
    folder: an empty one, the same for all tests that share the models.
  """
  experiment = text_experiment(folder)
  canaries = make_canaries(experiment, range(NUM_CANARIES))
  planted = canaries[: NUM_CANARIES // 2]
  pool = pool_of(experiment, NUM_POOL)
  with_secrets = canaries_lib.plant(
    pool, planted, dataset=experiment.datasets["train"]
  )
  params, clean = memorise(
    experiment, [with_secrets, pool], num_steps=300, learning_rate=1e-2
  )
  return types.SimpleNamespace(
    experiment=experiment,
    planted=planted,
    controls=canaries[NUM_CANARIES // 2 :],
    pool=pool,
    with_secrets=with_secrets,
    params=params,
    clean=clean,
  )


@pytest.fixture(scope="session")
def memorised_fixture(tmp_path_factory):
  """For test files to import under the name `memorised`."""
  folder = tmp_path_factory.getbasetemp() / "memorised"
  folder.mkdir(exist_ok=True)
  return memorised(folder)
