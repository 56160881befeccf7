"""The table of scores: what it refuses, and that it survives a kill."""

import os
import pathlib
import subprocess
import sys
import textwrap
import zipfile

import numpy as np
import pytest

from ppnet.audit import score_table
from ppnet.core import records


def make(**changes) -> score_table.ScoreTable:
  rng = np.random.default_rng(0)
  half = rng.integers(2, size=(2, 5)).astype(bool)
  membership = np.stack([half[0], ~half[0], half[1], ~half[1], half[0]])
  fields = {
    "scores": {
      "loss": rng.normal(size=(5, 5)),
      "min_k": rng.normal(size=(5, 5)).astype(np.float32),
    },
    "membership": membership,
    "record_ids": tuple("zażółć"[:5]),
    "groups": {"class": np.array(["cat", "dog", "cat", "", "ćma"])},
    "partner": np.array([1, 0, 3, 2, -1]),
  }
  return score_table.ScoreTable(**(fields | changes))


def test_what_is_saved_is_loaded(tmp_path):
  table = make()
  path = tmp_path / "audit" / "scores.npz"
  table.save(path)
  found = score_table.load(path)
  assert found.scores.keys() == table.scores.keys()
  for name, scores in table.scores.items():
    np.testing.assert_array_equal(found.scores[name], scores)
    assert found.scores[name].dtype == np.float64
  np.testing.assert_array_equal(found.membership, table.membership)
  np.testing.assert_array_equal(found.partner, table.partner)
  assert found.record_ids == table.record_ids
  np.testing.assert_array_equal(found.groups["class"], table.groups["class"])
  described = records.read_json(path.with_suffix(".json"))
  assert described["scores"] == ["loss", "min_k"]
  assert described["groups"]["class"] == {"": 1, "cat": 2, "dog": 1, "ćma": 1}
  assert described["members_of_each_model"][0] == int(table.membership[0].sum())


def test_a_partner_is_never_among_the_others():
  table = make()
  assert table.others(0).tolist() == [2, 3, 4]
  assert table.others(3).tolist() == [0, 1, 4]
  assert table.others(4).tolist() == [0, 1, 2, 3]
  alone = make(partner=np.full(5, -1))
  assert alone.others(0).tolist() == [1, 2, 3, 4]
  # Fails if: the complement, which gives the membership away, is left in.


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"scores": {}}, "at least one score"),
    ({"scores": {"loss": np.zeros((5, 4))}}, r"scores\['loss'\] of shape"),
    (
      {"scores": {"loss": np.where(np.eye(5) > 0, np.nan, 0.0)}},
      "only finite scores 'loss'",
    ),
    ({"membership": np.zeros((5, 5))}, "membership bool"),
    ({"membership": np.zeros((0, 5), bool)}, "num_models > 0"),
    ({"record_ids": tuple("aabcd")}, "record_ids that tell records apart"),
    ({"record_ids": tuple("abcd")}, "5 record_ids"),
    ({"groups": {"user": np.array(["u"])}}, r"groups\['user'\] of shape"),
    ({"partner": np.array([1, 0, 3, 2])}, "partner of shape"),
    ({"partner": np.array([1, 2, 3, 2, -1])}, "partner to name each other"),
    ({"partner": np.array([0, 1, 3, 2, -1])}, "partner to name each other"),
    ({"partner": np.array([9, 0, 3, 2, -1])}, "partner to name each other"),
    ({"partner": np.array([4, -1, 3, 2, 0])}, "complementary records"),
  ],
)
def test_a_table_that_does_not_fit_is_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    make(**changes)


def test_another_file_is_refused(tmp_path):
  with pytest.raises(ValueError, match="a saved score table"):
    score_table.load(tmp_path / "scores.npz")
  with pytest.raises(ValueError, match=r"ends in \.npz"):
    make().save(tmp_path / "scores.csv")
  np.savez(tmp_path / "other.npz", version=np.int64(7))
  with pytest.raises(ValueError, match="version=7"):
    score_table.load(tmp_path / "other.npz")


def test_a_killed_save_leaves_the_old_table(tmp_path):
  """A process that dies where the new file would take the old one's place."""
  path = tmp_path / "scores.npz"
  old = make()
  old.save(path)
  code = f"""
    import os, pathlib
    from tests.audit import score_table_test as t
    os.replace = lambda *paths: os._exit(9)
    t.make(record_ids=tuple("vwxyz")).save(pathlib.Path({str(path)!r}))
    """
  done = subprocess.run(
    [sys.executable, "-c", textwrap.dedent(code)],
    cwd=pathlib.Path(__file__).resolve().parents[2],
    env={**os.environ, "PYTHONPATH": "."},
    check=False,
  )
  assert done.returncode == 9
  assert zipfile.is_zipfile(path)
  assert score_table.load(path).record_ids == old.record_ids
  # Fails if: the table is written in place.


def test_a_kept_table_is_read_as_long_as_it_is_of_the_same_things(tmp_path):
  path = tmp_path / "scores.npz"
  made = []

  def get(made_from, table):
    def compute():
      made.append(table)
      return table

    return score_table.kept(path, made_from=made_from, make=compute)

  first, second = make(), make(record_ids=tuple("vwxyz"))
  get({"models": ["a"]}, first)
  assert get({"models": ["a"]}, second).record_ids == first.record_ids
  assert get({"models": ["b"]}, second).record_ids == second.record_ids
  assert get({"models": ["b"]}, first).record_ids == second.record_ids
  assert made == [first, second]


def test_a_kill_while_a_kept_table_is_replaced_mixes_nothing(
  tmp_path, monkeypatch
):
  path = tmp_path / "scores.npz"
  old, new = make(), make(record_ids=tuple("vwxyz"))
  kept = score_table.kept
  kept(path, made_from={"models": "old"}, make=lambda: old)
  write_json = records.write_json

  def killed(where, value):
    if where.name.endswith(".made-from.json"):
      raise KeyboardInterrupt
    write_json(where, value)

  monkeypatch.setattr(records, "write_json", killed)
  with pytest.raises(KeyboardInterrupt):
    kept(path, made_from={"models": "new"}, make=lambda: new)
  monkeypatch.undo()
  # The new scores are there, and nobody takes them for the old models'.
  assert score_table.load(path).record_ids == new.record_ids
  found = kept(path, made_from={"models": "old"}, make=lambda: old)
  assert found.record_ids == old.record_ids
