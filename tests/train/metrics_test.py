"""Numbers of a step and of a classifier, by hand and by scikit-learn."""

import numpy as np
import pytest

from ppnet.core import records
from ppnet.train import metrics
from ppnet.train import step as step_lib


def part(loss, norm, counted, nonfinite):
  loss = np.array(loss, np.float32)
  return step_lib.PerExample(
    loss=loss,
    terms={"task": loss - 1, "attention_consistency": np.ones_like(loss) * 4},
    grad_norm=None if norm is None else np.array(norm, np.float32),
    counted=np.array(counted),
    is_nonfinite=np.array(nonfinite),
  )


def test_means_leave_out_padding_and_bad_examples():
  parts = [
    part([2.0, np.nan, 99.0], [0.5, 0, 77], [1, 1, 0], [0, 1, 0]),
    part([4.0, 6.0, 0.0], [1.5, 4.0, 0], [1, 1, 0], [0, 0, 0]),
  ]
  parts = [
    step_lib.PerExample(
      loss=p.loss,
      terms=p.terms,
      grad_norm=p.grad_norm,
      counted=p.counted.astype(bool),
      is_nonfinite=p.is_nonfinite.astype(bool),
    )
    for p in parts
  ]
  row = metrics.step_metrics(
    parts, {"dp_perturbation": 0.25}, l2_clip_norm=1.0, consistency_weight=0.5
  )
  assert row["nonprivate/loss/total"] == 4.0
  assert row["nonprivate/loss/task"] == 3.0
  assert row["nonprivate/loss/attention_consistency"] == 2.0  # Weighted.
  assert row["nonprivate/loss/dp_perturbation"] == 0.25
  assert row["nonprivate/batch_size"] == 4
  assert row["nonprivate/nonfinite_examples"] == 1
  assert row["nonprivate/grad_norm/p50"] == 1.5
  assert row["nonprivate/clipped_fraction"] == pytest.approx(2 / 3)
  assert row["nonprivate/clip_excess"] == pytest.approx((0 + 0.5 + 3) / 3)


def test_an_empty_draw_has_no_loss():
  row = metrics.step_metrics(
    [], {"dp_perturbation": 0.0}, l2_clip_norm=1.0, consistency_weight=0.0
  )
  assert row["nonprivate/loss/total"] is None
  assert row["nonprivate/batch_size"] == 0


def test_runs_that_do_not_clip_report_no_clipping():
  row = metrics.step_metrics(
    [part([2.0], None, np.array([True]), np.array([False]))],
    {"dp_perturbation": 0.0},
    l2_clip_norm=None,
    consistency_weight=0.0,
  )
  assert not [name for name in row if "clip" in name or "norm" in name]


def test_everything_exact_is_marked_nonprivate():
  parts = [part([1.0], [2.0], np.array([True]), np.array([False]))]
  row = metrics.step_metrics(
    parts, {"dp_perturbation": 0.0}, l2_clip_norm=1.0, consistency_weight=0.0
  )
  assert all(name.startswith("nonprivate/") for name in row)
  # Fails if: a training loss is recorded as if it were released.


def test_classification_counts_other_tokens_as_wrong():
  answer_ids = np.array([5, 2, 7])
  labels = np.array([0, 1, 2, 2])
  logits = np.zeros((4, 9))
  logits[0, 5] = logits[1, 2] = logits[2, 7] = 3
  logits[3, 7], logits[3, 8] = 3, 4  # Token 8 is no answer.
  scores = metrics.classification(labels, logits, answer_ids=answer_ids)
  assert scores["accuracy"] == 0.75
  # Class 2: precision 1, recall 1/2.
  assert scores["f1"] == pytest.approx((1 + 1 + 2 / 3) / 3)
  assert scores["auc_roc"] == 1.0  # Ranked among the answers alone.


def test_classification_with_two_classes_and_with_an_absent_class():
  two = metrics.classification(
    np.array([0, 1, 1]),
    np.array([[1.0, 0], [0, 1], [2, 1]]),
    answer_ids=np.array([0, 1]),
  )
  # The third row ties with the first: one pair won, one drawn.
  assert two["auc_roc"] == pytest.approx((1 + 0.5) / 2)
  absent = metrics.classification(
    np.array([0, 1]), np.eye(3)[:2], answer_ids=np.arange(3)
  )
  assert np.isnan(absent["auc_roc"])
  assert absent["accuracy"] == 1.0


def test_totals_weigh_by_batch_size_and_count_a_repeated_step_once(tmp_path):
  log = records.JsonLinesLog(tmp_path / "metrics.jsonl")
  for step, size, fraction in ((1, 10, 0.5), (2, 30, 1.0), (2, 30, 0.0)):
    log.append(
      {
        "split": "train",
        "step": step,
        "nonprivate/batch_size": size,
        "nonprivate/clipped_fraction": fraction,
        "nonprivate/nonfinite_examples": step,
      }
    )
  log.close()
  assert metrics.totals(tmp_path) == {
    "nonprivate/clipped_fraction": 5 / 40,
    "nonprivate/nonfinite_examples": 3,
  }
