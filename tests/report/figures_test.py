"""The training figure draws what the records say."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from ppnet.report import figures

_LOSS = "nonprivate/loss/total"


def _train_row(step, *, loss=1.0, epsilon=1.0, **more):
  """A training row; five steps make an epoch."""
  return {
    "split": "train",
    "step": step,
    "epoch": step / 5,
    "epsilon": epsilon,
    _LOSS: loss,
    "nonprivate/loss/task": loss,
    "nonprivate/loss/attention_consistency": 0.1,
    "nonprivate/loss/dp_perturbation": 0.01 * (-1) ** step,
    "nonprivate/clipped_fraction": 0.5,
    "nonprivate/grad_norm/p10": 0.5,
    "nonprivate/grad_norm/p50": 1.5,
    "nonprivate/grad_norm/p90": 2.5,
    **more,
  }


def _test_row(step, *, accuracy):
  """An evaluation's row."""
  return {
    "split": "test",
    "step": step,
    "epoch": step / 5,
    "loss": 1.2,
    "accuracy": accuracy,
    "f1": accuracy - 0.1,
    "auc_roc": 0.9,
    "epsilon": 1.0,
  }


def _write(workdir, rows, *, tail="", **files):
  """Writes metrics.jsonl, and each of `files` as <name>.json."""
  lines = "".join(json.dumps(row) + "\n" for row in rows)
  (workdir / "metrics.jsonl").write_text(lines + tail)
  for name, value in files.items():
    (workdir / f"{name}.json").write_text(json.dumps(value))


_CONFIG = {
  "name": "a run",
  "privacy": {
    "epsilon": 8.0,
    "delta": 1e-5,
    "l2_clip_norm": 1.0,
    "neighboring_relation": "ADD_OR_REMOVE_ONE",
    "unit": "EXAMPLE",
  },
}


def _texts(fig) -> str:
  """Everything that is written in a figure."""
  texts = []
  for ax in fig.axes:
    texts += [
      ax.get_title(),
      ax.get_ylabel(),
      *(t.get_text() for t in ax.texts),
    ]
    if ax.get_legend():
      texts += [text.get_text() for text in ax.get_legend().get_texts()]
  return "\n".join(texts)


def _panel(fig, title):
  """The panel whose title starts with `title`."""
  (ax,) = [ax for ax in fig.axes if ax.get_title().startswith(title)]
  return ax


def _curve(ax, label):
  """The values of the curve whose legend starts with `label`."""
  (line,) = [x for x in ax.lines if str(x.get_label()).startswith(label)]
  return line.get_ydata()


def test_last_row_of_a_step_wins(tmp_path):
  rows = [_train_row(step, loss=float(step)) for step in (1, 2, 3)]
  rows += [_test_row(3, accuracy=0.3)]
  rows += [_train_row(step, loss=10.0 * step) for step in (2, 3, 4)]
  rows += [_test_row(3, accuracy=0.7)]
  _write(tmp_path, rows)
  data = figures.read(tmp_path)
  np.testing.assert_array_equal(data.train[_LOSS].steps, [1, 2, 3, 4])
  np.testing.assert_array_equal(data.train[_LOSS].values, [1, 20, 30, 40])
  np.testing.assert_array_equal(data.test["accuracy"].values, [0.7])
  # Fails if: the first row is kept, or both are.


def test_epoch_means_cover_exactly_their_steps(tmp_path):
  _write(tmp_path, [_train_row(step, loss=step) for step in range(1, 13)])
  means = figures.read(tmp_path).epoch_means[_LOSS]
  np.testing.assert_array_equal(means.steps, [3, 8, 11.5])
  np.testing.assert_allclose(means.values, [3.0, 8.0, 11.5], rtol=1e-12)
  # Fails if: the step that completes an epoch is counted to the next.


def test_empty_batch_is_a_gap_and_not_a_zero(tmp_path):
  rows = [_train_row(step, loss=2.0) for step in range(1, 6)]
  rows[2][_LOSS] = None
  del rows[3][_LOSS]
  rows[4][_LOSS] = "nan"
  _write(tmp_path, rows)
  data = figures.read(tmp_path)
  np.testing.assert_array_equal(
    np.isnan(data.train[_LOSS].values), [False, False, True, True, True]
  )
  np.testing.assert_array_equal(data.epoch_means[_LOSS].values, [2.0])
  figures.draw(data)


def test_truncated_last_line_is_left_out(tmp_path):
  _write(tmp_path, [_train_row(1)], tail='{"split": "train", "st')
  assert figures.read(tmp_path).train["epoch"].steps.tolist() == [1]


@pytest.mark.parametrize("content", [None, "", '{"split": "train", "st'])
def test_no_metrics_is_an_error_that_names_the_file(tmp_path, content):
  path = tmp_path / "metrics.jsonl"
  if content is not None:
    path.write_text(content)
  with pytest.raises(ValueError, match="row of metrics") as error:
    figures.training_figure(tmp_path)
  assert str(path) in str(error.value)
  assert not (tmp_path / "figures").exists()


def test_private_figure_shows_guarantee_and_warning(tmp_path):
  rows = [_train_row(step, epsilon=step / 10) for step in range(1, 21)]
  rows += [_test_row(step, accuracy=step / 40) for step in (10, 20)]
  _write(tmp_path, rows, config={"config": _CONFIG, "commit": "0"})
  fig = figures.draw(figures.read(tmp_path))
  text = _texts(fig)
  assert "a run" in text
  assert "test accuracy 0.500 · test macro F1 0.400" in text
  assert "20 steps · ε = 2.00 at δ = 1e-5" in text
  assert "Privacy spent (δ = 1e-5, add or remove one example)" in text
  assert "budget ε = 8.00" in text
  assert "accuracy, final 0.500" in text
  assert "does not cover these" in text
  assert "clip norm C = 1" in text
  panel = _panel(fig, "Privacy")
  np.testing.assert_allclose(
    _curve(panel, "ε spent"), np.arange(1, 21) / 10, rtol=1e-12
  )
  np.testing.assert_allclose(
    _curve(_panel(fig, "Scores"), "accuracy"), [0.25, 0.5], rtol=1e-12
  )
  assert len(_curve(_panel(fig, "Loss"), "train, each")) == 20
  assert len(_curve(_panel(fig, "Loss"), "train, epoch")) == 4


def test_panels_from_private_data_are_marked(tmp_path):
  _write(tmp_path, [_train_row(1)], config=_CONFIG)
  fig = figures.draw(figures.read(tmp_path))
  for title in ("Loss", "Terms", "Per-example", "Clipped"):
    assert _panel(fig, title).get_title().endswith("†")
  for title in ("Scores", "Privacy"):
    assert "†" not in _panel(fig, title).get_title()


def test_figure_without_guarantee_says_so(tmp_path):
  rows = [_train_row(step, epsilon="inf") for step in (1, 2)]
  for row in rows:
    del row["nonprivate/clipped_fraction"]
    row["nonprivate/loss/dp_perturbation"] = 0.0
  _write(tmp_path, rows, config=_CONFIG)
  data = figures.read(tmp_path)
  text = _texts(figures.draw(data))
  assert math.isinf(data.epsilon)
  assert "No guarantee: ε = ∞" in text
  assert "Nothing is clipped in this run." in text
  assert "This run has no privacy guarantee." in text.replace("\n", " ")
  assert "does not cover" not in text
  assert "budget" not in text
  assert "clip norm" not in text
  assert "DP noise" not in text
  # Fails if: a run without noise is drawn with the config's epsilon.


def test_summary_wins_over_the_last_evaluation(tmp_path):
  rows = [_train_row(1), _test_row(1, accuracy=0.25)]
  summary = {"accuracy": 0.75, "delta": 1e-6, "seeded": True, "leakage": None}
  _write(tmp_path, rows, summary=summary, config=_CONFIG)
  data = figures.read(tmp_path)
  assert "test accuracy 0.750 · test macro F1 0.150" in figures.headline(data)
  assert "1 step · ε = 1.00* at δ = 1e-6" in figures.headline(data)
  assert "knows the seed" in _texts(figures.draw(data)).replace("\n", " ")


@pytest.mark.parametrize(
  "rows",
  [
    [_train_row(1)],
    [_train_row(step) for step in range(1, 300)],
    [{"split": "train", "step": 1}],
    [{"split": "test", "step": 1, "accuracy": 0.5}],
    [_train_row(1, loss=None, **{"nonprivate/grad_norm/p50": 0.0})],
  ],
  ids=["one_step", "many_steps", "bare_train", "only_test", "nulls"],
)
def test_training_figure_writes_png_and_pdf(tmp_path, rows):
  _write(tmp_path, rows)
  path = figures.training_figure(tmp_path)
  assert path == tmp_path / "figures" / "training.png"
  with Image.open(path) as image:
    image.load()
    assert image.width > 1000
    assert image.height > 1000
    assert len(image.convert("L").histogram()) == 256
    assert len(set(image.convert("L").resize((64, 64)).tobytes())) > 10
  assert path.with_suffix(".pdf").read_bytes().startswith(b"%PDF")
  assert sorted(x.name for x in path.parent.iterdir()) == [
    "training.pdf",
    "training.png",
  ]


def test_texts_do_not_overlap_their_panels(tmp_path):
  rows = [_train_row(step, epsilon=step / 10) for step in range(1, 41)]
  rows += [_test_row(step, accuracy=0.9) for step in (20, 40)]
  _write(tmp_path, rows, config=_CONFIG | {"name": "long name " * 30})
  fig = figures.draw(figures.read(tmp_path))
  fig.draw_without_rendering()
  boxes = [ax.get_tightbbox() for ax in fig.axes]
  boxes = [box for box in boxes if box is not None]
  edge = fig.bbox
  for index, box in enumerate(boxes):
    assert box.x0 >= edge.x0
    assert box.x1 <= edge.x1
    assert not any(box.overlaps(other) for other in boxes[index + 1 :])
