"""Disturbed test records: what is changed, by how much, and what stays."""

import numpy as np
import pytest

from ppnet.audit import pool, robustness


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
