"""Scores against their formulas in NumPy and float64, and under real models."""

import functools
import pathlib
import tempfile
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppnet import config as config_lib
from ppnet.audit import pool as pool_lib
from ppnet.audit import scores, shadows, side_by_side
from ppnet.train import loop, losses
from tests import tiny

NUM_TOKENS, VOCAB = 11, 7
FOLDER = tempfile.TemporaryDirectory(prefix="ppnet-scores-")


def made_up(*, scale: float, seed: int = 0):
  """Logits, targets and a mask; row r counts r + 1 positions, row 0 last."""
  rng = np.random.default_rng(seed)
  size = NUM_TOKENS
  logits = scale * rng.normal(size=(size, NUM_TOKENS, VOCAB))
  targets = rng.integers(VOCAB, size=(size, NUM_TOKENS))
  mask = np.arange(NUM_TOKENS)[None] <= np.arange(size)[:, None]
  return np.float32(logits), targets.astype(np.int32), np.float32(mask)


def by_hand(logits, targets, mask) -> dict[str, np.ndarray]:
  """The formulas of the papers, record by record, in float64."""
  found: dict[str, list[float]] = {}
  for own, right, counted in zip(
    logits.astype(np.float64), targets, mask, strict=True
  ):
    own, right = own[counted > 0], right[counted > 0]
    all_log = (
      own
      - np.log(np.exp(own - own.max(1, keepdims=True)).sum(1))[:, None]
      - own.max(1, keepdims=True)
    )
    token_log = all_log[np.arange(len(right)), right]
    margin = [
      log[y] - np.log(np.sum(np.exp(np.delete(log, y))))
      for log, y in zip(all_log, right, strict=True)
    ]
    mean = (np.exp(all_log) * all_log).sum(1)
    variance = (np.exp(all_log) * all_log**2).sum(1) - mean**2
    k = max(1, int(0.2 * len(right)))
    z = (token_log - mean) / np.sqrt(variance)
    for name, value in (
      ("loss", token_log.mean()),
      ("margin", np.mean(margin)),
      ("min_k", np.sort(token_log)[:k].mean()),
      ("min_k_plus_plus", np.sort(z)[:k].mean()),
    ):
      found.setdefault(name, []).append(value)
  return {name: np.array(values) for name, values in found.items()}


@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_scores_are_their_formulas(scale):
  logits, targets, mask = made_up(scale=scale)
  found = scores.of_logits(
    jnp.asarray(logits), jnp.asarray(targets), jnp.asarray(mask), is_text=True
  )
  expected = by_hand(logits, targets, mask)
  assert found.keys() == expected.keys()
  for name, values in expected.items():
    np.testing.assert_allclose(found[name], values, rtol=2e-4, atol=2e-5)
  # Rows of 1, 5 and 10 tokens keep 1, 1 and 2 of them.
  # Fails if: positions that do not count enter, or k is a share of T.


def test_what_is_memorised_is_still_told_apart():
  """Where p(y) is 1 to all digits of float32, and where it is almost 0."""
  logits = np.zeros((3, 1, VOCAB), np.float32)
  logits[0, 0, 2], logits[1, 0, 2], logits[2, 0, 2] = 30, 40, -60
  found = scores.of_logits(
    jnp.asarray(logits),
    jnp.full((3, 1), 2),
    jnp.ones((3, 1)),
    is_text=False,
  )
  others = np.log(VOCAB - 1)
  np.testing.assert_allclose(
    found["margin"], np.array([30, 40, -60]) - others, rtol=1e-6
  )
  np.testing.assert_allclose(
    found["loss"],
    [-(6 * np.exp(-30.0)), -(6 * np.exp(-40.0)), -60 - others],
    rtol=1e-5,
  )
  # Fails if: the loss is a difference of two numbers near 1, or of a logarithm
  # and the normaliser: both are 0 then for the first two.


def test_a_sure_prediction_has_a_finite_min_k_plus_plus():
  logits = np.full((1, 2, VOCAB), -1e4, np.float32)
  logits[:, :, 1] = 1e4
  found = scores.of_logits(
    jnp.asarray(logits), jnp.ones((1, 2), int), jnp.ones((1, 2)), is_text=True
  )
  assert all(np.isfinite(value).all() for value in found.values())


def test_nothing_that_counts_is_zero():
  logits, targets, _ = made_up(scale=1.0)
  found = scores.of_logits(
    jnp.asarray(logits),
    jnp.asarray(targets),
    jnp.zeros(targets.shape),
    is_text=True,
  )
  for values in found.values():
    np.testing.assert_array_equal(values, 0.0)


def experiment(kind: str) -> config_lib.ExperimentConfig:
  config = tiny.experiment(
    epsilon=None, noise_multiplier=0.5, expected_batch_size=8, num_steps=1
  )
  config.attention_noise.consistency_weight = 0.0
  config.perf.microbatch_size = 8
  if kind == "text":
    folder = pathlib.Path(FOLDER.name)
    words = "".join(f"{w} and {w} again; " for w in "abcdefghijklmnop" * 3)
    (folder / "text.txt").write_text(words)
    config.data = config_lib.DataConfig(
      source=config_lib.Source.TEXT_FILE,
      path=str(folder / "text.txt"),
      task=config_lib.Task.CAUSAL,
      prompt="",
      tokenizer=config_lib.TokenizerKind.BYTES,
      vocab_size=264,
      window_bytes=24,
    )
    config.model.decoder.vocab_size = 264
    config.model.image = config.model.audio = None
  config.data.prepared_dir = str(pathlib.Path(FOLDER.name) / kind)
  return config


@functools.cache
def opened_pool(kind: str):
  config = experiment(kind)
  config.mesh = config_lib.MeshConfig(data=1)
  opened = loop.open_experiment(
    config, pathlib.Path(FOLDER.name) / "run", devices=jax.devices()[:1]
  )
  return (
    config,
    opened,
    pool_lib.of_split(opened, split="train", num_records=20),
  )


def scored(kind: str):
  """Two untrained models and the scores of 20 records under them."""
  config, opened, pool = opened_pool(kind)
  program = shadows.build_program(
    config,
    pool,
    num_members=10,
    placeholder_ids=opened.tokenizer.placeholder_ids,
  )
  roots = side_by_side.key_words([3, 4])
  params = jax.device_get(
    jax.jit(
      jax.vmap(
        lambda words: (
          program.pure.init(
            jax.random.wrap_key_data(words, impl="threefry2x32")
          ).params
        )
      )
    )(roots)
  )
  scorer = scores.Scorer(
    config,
    program,
    num_models=2,
    decode=opened.tokenizer.decode,
    devices=jax.devices()[:2],
  )
  found = scorer(params, roots, pool)
  return opened, program, params, pool, found


@pytest.mark.parametrize(
  "kind", [pytest.param("joint", marks=pytest.mark.slow), "text"]
)
def test_scores_of_models_are_those_of_each_model_alone(kind):
  opened, program, params, pool, found = scored(kind)
  names = {"loss", "margin", "gradient_norm"}
  if kind == "text":
    names |= {"min_k", "min_k_plus_plus", "zlib"}
  assert found.keys() == names
  rows = {name: jnp.asarray(array) for name, array in pool.rows.items()}
  for model in range(2):
    own = jax.tree.map(lambda leaf, m=model: jnp.asarray(leaf[m]), params)
    logits = losses.predict(program.model, own, rows, noise=None)
    expected = by_hand(
      np.asarray(logits), pool.rows["targets"], pool.rows["loss_mask"]
    )
    for name in names - {"gradient_norm", "zlib"}:
      np.testing.assert_allclose(
        found[name][model], expected[name], rtol=1e-3, atol=1e-4
      )

    def loss(own, place):
      row = {name: array[place][None] for name, array in rows.items()}
      logits = losses.predict(program.model, own, row, noise=None)
      return losses.cross_entropy(logits, row["targets"], row["loss_mask"])[0]

    grad = jax.jit(jax.grad(loss))(own, 17)
    norm = sum(float(jnp.vdot(g, g)) for g in jax.tree.leaves(grad)) ** 0.5
    np.testing.assert_allclose(
      found["gradient_norm"][model, 17], -norm, rtol=1e-4
    )
  assert np.abs(found["loss"][0] - found["loss"][1]).max() > 1e-3
  if kind == "text":
    text = "".join(
      chr(token - opened.tokenizer._first_byte)
      for token in pool.rows["targets"][2][pool.rows["loss_mask"][2] > 0]
      if token >= opened.tokenizer._first_byte
    )
    size = len(zlib.compress(text.encode()))
    np.testing.assert_allclose(
      found["zlib"][:, 2], found["loss"][:, 2] / size, rtol=1e-12
    )


def test_a_pool_knows_its_records_and_takes_others():
  *_, pool = opened_pool("joint")
  assert len(set(pool.record_ids)) == len(pool) == 20
  assert set(pool.groups["modality"]) <= {"image+audio", "image+audio+text"}
  labels = pool.rows["label"]
  changed = pool.with_rows(
    [3, 5],
    {"label": (labels[[3, 5]] + 1) % 10},
    groups={"canary": ["mislabelled", "mislabelled"]},
  )
  assert changed.groups["canary"].tolist().count("mislabelled") == 2
  assert changed.groups["canary"][4] == ""
  assert (changed.rows["label"] != labels).sum() == 2
  assert changed.fingerprint() != pool.fingerprint()
  assert pool.fingerprint() == pool.with_rows([], {}).fingerprint()
  for rows, message in (
    ({"lable": labels[[3]]}, "Did you mean 'label'"),
    ({"index": labels[[3]]}, "rows among"),
    ({"label": labels[[3, 4]]}, "label of shape"),
  ):
    with pytest.raises(ValueError, match=message):
      pool.with_rows([3], rows)
  both = pool_lib.joined(pool, changed)
  assert len(set(both.record_ids)) == len(both) == 40
  np.testing.assert_array_equal(both.rows["index"], np.arange(40))
  np.testing.assert_array_equal(both.rows["image"][20:], pool.rows["image"])


def test_what_is_not_one_fixed_row_is_refused():
  config = tiny.experiment(views_per_example=2)
  with pytest.raises(ValueError, match="one fixed view"):
    pool_lib.check_trainable(config)
  config = tiny.experiment(unit=config_lib.PrivacyUnit.PACKED_ROW)
  with pytest.raises(ValueError, match="privacy.unit EXAMPLE"):
    pool_lib.check_trainable(config)
  config = tiny.experiment()
  config.model.private_cut.layer = 1
  with pytest.raises(ValueError, match="no private cut"):
    pool_lib.check_trainable(config)
