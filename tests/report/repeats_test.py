"""Runs that differ in their seed alone: means, and curves of them."""

import math

import pytest

from ppnet.report import comparison, repeats

BATCH, EPSILON = "train.expected_batch_size", "privacy.epsilon"


def runs(score="bits_per_byte", **changes):
  """Two seeds at each of three batches and two epsilons; one is not done."""
  rows = []
  for batch in ("64", "256", "1024"):
    for epsilon in ("8", "3"):
      for seed in ("0", "1"):
        number = len(rows)
        rows.append(
          {
            "state": "finished",
            BATCH: batch,
            EPSILON: epsilon,
            "seed": seed,
            score: 3 + number / 10,
          }
          | changes
        )
  rows[-1]["state"] = "begun"
  return rows


FIELDS = [BATCH, EPSILON, "seed"]


def test_runs_that_differ_in_their_seed_alone_are_one():
  found = repeats.means(runs(), FIELDS)
  assert [(g[BATCH], g[EPSILON], g["runs"]) for g in found] == [
    ("64", "8", 2),
    ("64", "3", 2),
    ("256", "8", 2),
    ("256", "3", 2),
    ("1024", "8", 2),
    ("1024", "3", 1),
  ]
  mean, half = comparison.interval([3.2, 3.3])
  assert found[1]["bits_per_byte"] == {"mean": mean, "half_width": half}
  assert math.isnan(found[-1]["bits_per_byte"]["half_width"])
  # Fails if: runs of two settings are one mean, or one that is not done counts.


def test_a_score_that_a_run_lacks_has_no_mean():
  rows = runs()
  rows[0]["bits_per_byte"] = "nan"
  rows[2]["bits_per_byte"] = None
  found = repeats.means(rows, FIELDS)
  assert ["bits_per_byte" in group for group in found[:3]] == [
    False,
    False,
    True,
  ]
  # Fails if: the mean is of those runs alone that went well.


def test_the_table_has_means_and_intervals():
  found = repeats.means(runs(), FIELDS)
  lines = repeats.table(found, FIELDS).splitlines()
  assert lines[0].split("  ")[-1].strip() == "bits per byte"
  assert "3.2500 ± 0.6353" in lines[3]
  assert "±" not in lines[-1]  # One run.
  assert "seed" not in lines[0]


def test_without_repeats_there_is_no_table():
  rows = [row for row in runs() if row["seed"] == "0"]
  assert repeats.table(repeats.means(rows, FIELDS), FIELDS) == ""
  assert repeats.table([], FIELDS) == ""


def curves(ax):
  """Label -> points of a panel."""
  return {
    container.get_label(): [
      tuple(map(float, point)) for point in container.lines[0].get_xydata()
    ]
    for container in ax.containers
  }


def test_a_curve_is_over_the_first_field_of_numbers():
  fig = repeats.draw(repeats.means(runs(), FIELDS), FIELDS)
  (ax,) = fig.axes
  found = curves(ax)
  assert set(found) == {"ε 8", "ε 3"}
  assert found["ε 8"] == [
    (64, pytest.approx(3.05)),
    (256, pytest.approx(3.45)),
    (1024, pytest.approx(3.85)),
  ]
  assert ax.get_xscale() == "log"
  assert ax.get_xlabel() == "expected batch size"
  assert ax.get_ylabel() == "bits per byte"
  # The other way round, the other field.
  fields = [EPSILON, BATCH, "seed"]
  (ax,) = repeats.draw(repeats.means(runs(), fields), fields).axes
  assert ax.get_xlabel() == "ε"
  assert ax.get_xscale() == "linear"
  assert list(curves(ax)) == [
    f"expected batch size {batch}" for batch in (64, 256, 1024)
  ]


def test_each_score_has_a_panel_and_zero_a_place():
  rows = runs("accuracy", leakage=0.1)
  for row in rows:
    row[EPSILON] = {"8": "0", "3": "1"}[row[EPSILON]]
  fields = [EPSILON, BATCH, "seed"]
  fig = repeats.draw(repeats.means(rows, fields), fields)
  assert [ax.get_ylabel() for ax in fig.axes] == [
    "accuracy",
    "leakage (membership advantage) †",
  ]
  assert all(ax.get_xscale() == "linear" for ax in fig.axes)
  assert "not covered by the guarantee" in fig.get_supxlabel()
  assert "95 % intervals" in fig.get_supxlabel()


@pytest.mark.parametrize(
  ("rows", "fields"),
  [
    ([], FIELDS),
    ([row for row in runs() if row["state"] == "begun"], FIELDS),
    ([{"state": "finished", "seed": "0", "accuracy": 0.5}], ["seed"]),
    (
      [
        {"state": "finished", "privacy.enabled": text, "accuracy": 0.5}
        for text in ("true", "false")
      ],
      ["privacy.enabled"],
    ),
    (
      [
        {"state": "finished", BATCH: batch, "accuracy": None}
        for batch in ("1", "2")
      ],
      [BATCH],
    ),
  ],
)
def test_where_there_is_no_curve_nothing_is_written(rows, fields, tmp_path):
  assert repeats.write(repeats.means(rows, fields), fields, tmp_path) is None
  assert not list(tmp_path.iterdir())
