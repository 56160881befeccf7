"""Numbers on the host: what is computed from a step, and where it is written.

A number computed exactly from private examples is named `nonprivate/<name>`:
the guarantee does not cover it. That includes every training loss.
"""

import math
import pathlib
import threading
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import sklearn.metrics
import tensorboardX

from ppnet.core import records


def step_metrics(
  parts: Sequence[Any],
  scalars: Mapping[str, Any],
  *,
  l2_clip_norm: float | None,
  consistency_weight: float,
) -> dict[str, float | None]:
  """Means over one step's real rows, and over its privacy units.

  Args:
    parts: one `step.PerExample` of NumPy arrays per microbatch; none for an
      empty draw.
    scalars: from `step.update`.
    l2_clip_norm: the clip bound, or None where nothing is clipped.
    consistency_weight: weight of the consistency term in the loss.

  Returns:
    Flat dict; losses are None for an empty draw. A mean leaves out units that
    are not finite, and says how many there were. Batch size, norms and what is
    clipped are of units, losses of rows.
  """
  rows = _concatenate([part.counted for part in parts], bool)
  nonfinite = _concatenate([part.is_nonfinite for part in parts], bool)
  per_unit = max(rows.size // max(nonfinite.size, 1), 1)
  counted = rows.reshape(-1, per_unit).any(axis=1)
  use_unit = counted & ~nonfinite
  use = rows & np.repeat(~nonfinite, per_unit)
  loss = _concatenate([part.loss for part in parts], np.float32)
  task = _concatenate([part.terms["task"] for part in parts], np.float32)
  divergence = _concatenate(
    [part.terms["attention_consistency"] for part in parts], np.float32
  )
  row: dict[str, float | None] = {
    "nonprivate/loss/total": _mean(loss[use]),
    "nonprivate/loss/task": _mean(task[use]),
    "nonprivate/loss/attention_consistency": _mean(
      consistency_weight * divergence[use]
    ),
    "nonprivate/loss/dp_perturbation": float(scalars["dp_perturbation"]),
    "nonprivate/batch_size": int(counted.sum()),
    "nonprivate/nonfinite_examples": int((counted & nonfinite).sum()),
  }
  if parts and parts[0].grad_norm is not None:
    norms = _concatenate([part.grad_norm for part in parts], np.float32)
    norms = norms[use_unit]
    for percent in (10, 50, 90):
      row[f"nonprivate/grad_norm/p{percent}"] = (
        float(np.percentile(norms, percent)) if norms.size else None
      )
    if l2_clip_norm is not None:
      row["nonprivate/clipped_fraction"] = _mean(norms > l2_clip_norm)
      row["nonprivate/clip_excess"] = _mean(np.maximum(norms - l2_clip_norm, 0))
  return row


class NonFiniteError(RuntimeError):
  """Training produced infinities or NaNs and cannot go on."""


def check_finite(
  row: Mapping[str, Any],
  scalars: Mapping[str, Any],
  *,
  step: int,
  tolerated: bool,
  learning_rate: float,
  saved: int | None,
) -> None:
  """Raises unless training can go on after a step.

  Args:
    row: of `step_metrics`.
    scalars: from `step.update`.
    step: its number, for people.
    tolerated: a bad example counts as zero, as long as there is a good one.
    learning_rate: of the configuration, for people.
    saved: the newest checkpoint's step.

  Raises:
    NonFiniteError: the parameters are not finite, or examples that count.
  """
  bad, size = row["nonprivate/nonfinite_examples"], row["nonprivate/batch_size"]
  tolerated = tolerated and bad < max(size, 1)
  if bool(scalars["params_finite"]) and (bad == 0 or tolerated):
    return
  what = (
    f"{bad} of {size} examples have a non-finite loss or gradient"
    if bad
    else "the parameters are not finite"
  )
  raise NonFiniteError(
    f"Step {step}: {what}. Lower optimizer.learning_rate={learning_rate} or"
    " look at the data. The newest checkpoint is"
    f" {'none' if saved is None else f'step {saved}'}; nothing was saved from"
    " this step."
  )


def totals(workdir: pathlib.Path) -> dict[str, float | int | None]:
  """Sums over a whole run, from its `metrics.jsonl`, resumes included.

  Returns:
    The share of examples that were clipped (None where nothing is) and how
    many were not finite.
  """
  rows = records.latest_rows(workdir / "metrics.jsonl", split="train")
  clipped = [
    (row["nonprivate/batch_size"], row["nonprivate/clipped_fraction"])
    for row in rows
    if row.get("nonprivate/clipped_fraction") is not None
  ]
  counted = sum(size for size, _ in clipped)
  return {
    "nonprivate/clipped_fraction": (
      sum(size * fraction for size, fraction in clipped) / counted
      if counted
      else None
    ),
    "nonprivate/nonfinite_examples": sum(
      row["nonprivate/nonfinite_examples"] for row in rows
    ),
  }


def classification(
  labels: np.ndarray,
  logits: np.ndarray,
  *,
  answer_ids: np.ndarray,
) -> dict[str, float]:
  """Accuracy, macro F1 and one-vs-rest AUC, by scikit-learn's definitions.

  The predicted token is the argmax over the whole vocabulary, so an answer that
  is no answer token counts as wrong. AUC ranks by the softmax over the answer
  tokens alone; it is NaN where a class is absent.

  Args:
    labels: int[n] in 0..num_classes - 1.
    logits: float[n, V] at the answer position.
    answer_ids: token of each class, int[num_classes].
  """
  classes = np.arange(len(answer_ids))
  to_class = np.full(logits.shape[1], -1)
  to_class[answer_ids] = classes
  predicted = to_class[logits.argmax(axis=1)]
  scores = logits[:, answer_ids].astype(np.float64)
  scores = np.exp(scores - scores.max(axis=1, keepdims=True))
  scores /= scores.sum(axis=1, keepdims=True)
  with warnings.catch_warnings():
    # A class without test examples makes AUC undefined: NaN says so.
    warnings.simplefilter("ignore", sklearn.exceptions.UndefinedMetricWarning)
    if len(classes) == 2:
      auc = sklearn.metrics.roc_auc_score(labels, scores[:, 1])
    else:
      auc = sklearn.metrics.roc_auc_score(
        labels, scores, multi_class="ovr", labels=classes
      )
    f1 = sklearn.metrics.f1_score(
      labels, predicted, labels=classes, average="macro", zero_division=0
    )
  return {
    "accuracy": float(sklearn.metrics.accuracy_score(labels, predicted)),
    "f1": float(f1),
    "auc_roc": float(auc),
  }


def language(
  losses: np.ndarray, *, num_targets: np.ndarray, num_bytes: np.ndarray
) -> dict[str, float]:
  """Bits per byte and perplexity over all tokens together.

  Bits per byte do not depend on how text is cut into tokens.

  Args:
    losses: mean over each record's tokens, nats, f32[n].
    num_targets: tokens of each record, i64[n].
    num_bytes: of each record's text, i32[n].
  """
  nats = float(np.sum(losses.astype(np.float64) * num_targets))
  return {
    "bits_per_byte": nats / math.log(2) / float(num_bytes.sum()),
    "perplexity": math.exp(min(nats / float(num_targets.sum()), 700.0)),
  }


class NoWriter:
  """Writes nothing: of the processes of a job, one writes."""

  def write(self, row: Mapping[str, Any]) -> None:
    """Forgets the row."""

  def write_durably(self, row: Mapping[str, Any]) -> None:
    """Forgets the row."""

  def flush(self) -> None:
    """Nothing was written."""

  def close(self) -> None:
    """Nothing is open."""


def writer(
  workdir: pathlib.Path | None, *, start_step: int
) -> "Writer | NoWriter":
  """Writes rows to a folder, or nowhere."""
  if workdir is None:
    return NoWriter()
  return Writer(workdir, start_step=start_step)


class Writer:
  """Appends rows to `metrics.jsonl` and to TensorBoard; for several threads."""

  def __init__(self, workdir: pathlib.Path, *, start_step: int):
    """Opens both; after a resume, steps from `start_step` are written again."""
    self._lock = threading.RLock()
    self._log = records.JsonLinesLog(workdir / "metrics.jsonl")
    self._board = tensorboardX.SummaryWriter(
      str(workdir / "tensorboard"), purge_step=start_step or None
    )

  def write(self, row: Mapping[str, Any]) -> None:
    """One row with "split" and "step"; numbers also go to TensorBoard."""
    with self._lock:
      self._log.append(row)
      for name, value in row.items():
        # TensorBoard knows no infinity, and warns of each.
        if (
          isinstance(value, int | float)
          and name != "step"
          and math.isfinite(value)
        ):
          self._board.add_scalar(f"{row['split']}/{name}", value, row["step"])

  def write_durably(self, row: Mapping[str, Any]) -> None:
    """Writes a row that is on disk when this returns."""
    with self._lock:
      self.write(row)
      self.flush()

  def flush(self) -> None:
    """Makes what was written durable."""
    with self._lock:
      self._log.flush()
      self._board.flush()

  def close(self) -> None:
    """Flushes and closes."""
    with self._lock:
      self._log.close()
      self._board.close()


def _concatenate(arrays: Sequence[Any], dtype: Any) -> np.ndarray:
  """All microbatches in one array; empty for an empty draw."""
  if not arrays:
    return np.zeros((0,), dtype)
  return np.concatenate([np.asarray(array) for array in arrays])


def _mean(values: np.ndarray) -> float | None:
  """The mean, or None of nothing."""
  return float(np.mean(values)) if values.size else None
