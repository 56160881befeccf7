"""Disturbed test records: what is changed, by how much, and what stays."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppnet.audit import pool, robustness, side_by_side
from ppnet.train import step as step_lib
from tests.audit import shadows_test


def records(count=400, **media):
  rng = np.random.default_rng(1)
  rows = {
    "index": np.arange(count, dtype=np.int32),
    "is_padding_example": np.zeros(count, bool),
    "tokens": np.concatenate(
      [np.ones((count, 1)), rng.integers(5, 50, (count, 9))], axis=1
    ).astype(np.int32),
    "label": rng.integers(0, 3, count),
  }
  return pool.Pool(
    rows={**rows, **media},
    record_ids=tuple(map(str, range(count))),
    groups={"class": np.array(["a", "b"] * (count // 2))},
  )


def test_media_get_noise_of_the_strength_and_nothing_else_changes():
  image = np.random.default_rng(2).normal(size=(400, 4, 4, 1))
  before = records(image=image.astype(np.float32))
  half, whole = (robustness.disturbed(before, level) for level in (0.5, 1.0))
  noise = half.rows["image"] - before.rows["image"]
  assert noise.std() == pytest.approx(0.5, rel=0.05)
  assert abs(noise.mean()) < 0.02
  # One draw at two strengths: a curve is not bent by luck.
  np.testing.assert_allclose(
    whole.rows["image"] - before.rows["image"], 2 * noise, atol=1e-5
  )
  assert half.rows["image"].dtype == np.float32
  for name in ("tokens", "label", "index"):
    np.testing.assert_array_equal(half.rows[name], before.rows[name])


def test_texts_get_other_tokens_but_never_another_first_one():
  before = records()
  after = robustness.disturbed(before, 0.2)
  changed = after.rows["tokens"] != before.rows["tokens"]
  assert not changed[:, 0].any()
  # A replacement may be the same token by chance, one time in 45.
  assert changed[:, 1:].mean() == pytest.approx(0.2 * 44 / 45, abs=0.02)
  # Nobody reads what no record ever held, the first token included.
  assert after.rows["tokens"][:, 1:].min() >= 5
  more = robustness.disturbed(before, 0.4).rows["tokens"]
  assert ((more != before.rows["tokens"]) | ~changed).all()


def test_no_disturbance_is_none_at_all():
  before = records()
  assert robustness.disturbed(before, 0.0) is before


def test_the_first_records_are_taken_whole():
  some = robustness._first(records(), 10)
  assert len(some) == 10
  assert all(len(array) == 10 for array in some.rows.values())
  assert len(some.groups["class"]) == 10


def test_every_level_is_one_program_and_answers_as_its_own_would():
  config = shadows_test.plain_experiment()
  config.perf.microbatch_size = 8
  records = robustness._first(shadows_test.the_pool(), 12)
  program = shadows_test.shadows.build_program(
    config,
    records,
    num_members=37,
    placeholder_ids=shadows_test.placeholder_ids(),
  )
  roots = side_by_side.key_words([3, 4])
  keys = [jax.random.wrap_key_data(words) for words in roots]
  params = [
    jax.device_get(jax.jit(program.pure.init)(key).params) for key in keys
  ]
  group = types.SimpleNamespace(
    models=np.arange(2),
    params=jax.tree.map(lambda *leaves: np.stack(leaves), *params),
    init_roots=roots,
  )
  asked = robustness.Asked(
    config,
    types.SimpleNamespace(program=program, groups=lambda: iter([group])),
    devices=jax.devices()[:1],
  )
  found = {
    level: next(asked(records, attention_stddev=level))
    for level in (0.0, 0.5, 4.0)
  }
  np.testing.assert_array_equal(found[0.0], next(asked(records)))
  compiled = asked._beside[2]._over.values()
  assert [one._cache_size() for one in compiled] == [1, 1]  # Clean and noisy.
  for level in (0.5, 4.0):
    # The level as a constant of the program.
    _, expected = step_lib.evaluate(
      jax.tree.map(jnp.asarray, params[1]),
      jax.tree.map(jnp.asarray, records.rows),
      keys[1],
      model=program.model,
      noise_config=dataclasses.replace(
        config.attention_noise, stddev=level, at_evaluation=True
      ),
    )
    np.testing.assert_allclose(found[level][1], expected, atol=1e-4)
  assert np.abs(found[0.5] - found[4.0]).max() > 1e-2
  assert np.abs(found[0.5] - found[0.0]).max() > 1e-2
  # Fails if: a level is that of another one, or the noise is drawn anew.
