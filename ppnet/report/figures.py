"""The training figure of a run, drawn from its workdir's records alone.

`read` gathers what is to be seen, `training_figure` draws it, so that a test
can look at the numbers. Losses, gradient norms and clipped fractions of the
training set are exact diagnostics computed from private data: the guarantee
does not cover them, and the figure says so.
"""

import dataclasses
import math
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import axes, figure, layout_engine, ticker

from ppnet.core import records
from ppnet.report import saving, tables

# Okabe and Ito 2008 (https://jfly.uni-koeln.de/color/): told apart by people
# with any colour vision. Line styles differ as well, for print in grey.
BLACK = "#000000"
BLUE = "#0072B2"
ORANGE = "#D55E00"
_GREEN = "#009E73"
_SKY = "#56B4E9"
_GREY = "#666666"
# Colour, line and marker of several models in one panel; the ablation has
# eight.
STYLES = (
  (BLACK, "-", "o"),
  (BLUE, "--", "s"),
  (ORANGE, "-.", "^"),
  (_GREEN, ":", "D"),
  (_SKY, (0, (6, 1)), "v"),
  ("#CC79A7", (0, (3, 1, 1, 1, 1, 1)), "P"),
  ("#E69F00", (0, (1, 1)), "X"),
  (_GREY, (0, (4, 2, 1, 2)), "*"),
)

_LOSS = "nonprivate/loss/"
_QUANTILE = "nonprivate/grad_norm/"
_MARK = "†"
_NOTE = (
  f"{_MARK} Exact diagnostics computed from private training data. {{}} Share"
  " them only with people who may see the data."
)
_NOT_COVERED = (
  "The privacy guarantee covers the trained model; it does not cover these"
  " curves."
)
_NO_GUARANTEE = "This run has no privacy guarantee."
_MAX_MARKERS = 40  # More would merge into a thick line.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Series:
  """One quantity over training: `values[i]` was measured after `steps[i]`."""

  steps: np.ndarray  # i64[T]; f64[T] where steps were averaged.
  values: np.ndarray  # f64[T], NaN where the record has no value.

  @property
  def is_empty(self) -> bool:
    """Whether no value was ever recorded (infinite values count)."""
    return bool(np.all(np.isnan(self.values)))

  @property
  def final(self) -> float:
    """The last recorded value, NaN if there is none."""
    known = self.values[~np.isnan(self.values)]
    return float(known[-1]) if known.size else math.nan


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingData:
  """What the training figure shows.

  Attributes:
    name: the run's name.
    last_step: the last step of which there is a record.
    train: metric name → one value per training step.
    epoch_means: metric name → mean over the steps of each epoch that have a
      value, placed at the middle of its steps: at their end it would seem
      to lag behind the curve that it is the mean of.
    test: metric name → one value per evaluation.
    privacy: the `privacy` section of config.json, {} if there is none.
    summary: summary.json, {} while the run is not finished.
  """

  name: str
  last_step: int
  train: Mapping[str, Series]
  epoch_means: Mapping[str, Series]
  test: Mapping[str, Series]
  privacy: Mapping[str, Any]
  summary: Mapping[str, Any]

  def get(self, name: str) -> Series:
    """The training series `name`, empty if the run did not record it."""
    return self.train.get(name, _EMPTY)

  @property
  def epsilon(self) -> float:
    """Epsilon at the end: infinite without a guarantee, NaN if unrecorded."""
    final = self.get("epsilon").final
    if math.isnan(final):
      final = tables.to_float(self.summary.get("epsilon"))
    return final

  @property
  def delta(self) -> float:
    """Delta of the guarantee, NaN if unrecorded."""
    recorded = self.summary.get("delta", self.privacy.get("delta"))
    return tables.to_float(recorded)

  @property
  def relation(self) -> str:
    """The neighbouring relation in words."""
    return tables.format_relation(
      self.summary.get("neighboring_relation")
      or self.privacy.get("neighboring_relation")
    )


_EMPTY = Series(steps=np.zeros(0, np.int64), values=np.zeros(0))


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, Series]:
  """Rows sorted by step → one series per key that holds numbers."""
  steps = np.array([int(row["step"]) for row in rows], np.int64)
  names = {name for row in rows for name in row} - {"split", "step"}
  return {
    name: Series(
      steps=steps,
      values=np.array([tables.to_float(row.get(name)) for row in rows]),
    )
    for name in sorted(names)
  }


def _epoch_means(train: Mapping[str, Series]) -> dict[str, Series]:
  """Means over the steps of each epoch; {} if epochs were not recorded."""
  if "epoch" not in train or np.isnan(train["epoch"].values).any():
    return {}
  # The row of the step that completes epoch 1 has epoch = 1.0, up to rounding.
  epochs = np.ceil(train["epoch"].values - 1e-6)
  means = {}
  for name, series in train.items():
    steps, values = [], []
    for epoch in np.unique(epochs):
      inside = epochs == epoch
      known = series.values[inside]
      known = known[np.isfinite(known)]
      steps.append(series.steps[inside].mean())
      values.append(known.mean() if known.size else math.nan)
    means[name] = Series(steps=np.array(steps), values=np.array(values))
  return means


def _read_if_present(path: pathlib.Path) -> dict[str, Any]:
  """A JSON record, {} if the file is not there."""
  return records.read_json(path) if path.exists() else {}


def read(workdir: pathlib.Path) -> TrainingData:
  """Gathers the numbers of the training figure.

  A run that was resumed has executed some steps twice: the last row of a step
  wins. A last line that was cut by a kill is left out.

  Args:
    workdir: folder with metrics.jsonl and, if they were written, config.json
      and summary.json.

  Returns:
    The data; series are sorted by step.

  Raises:
    ValueError: if there is no metric to draw.
  """
  workdir = pathlib.Path(workdir)
  path = workdir / "metrics.jsonl"
  rows = {
    split: records.latest_rows(path, split=split) for split in ("train", "test")
  }
  steps = [int(row["step"]) for of_split in rows.values() for row in of_split]
  if not steps:
    raise ValueError(
      f"Expected {path} to hold a row of metrics, but it"
      f" {'is empty' if path.exists() else 'does not exist'}. Run a TRAIN job"
      " with this --workdir first."
    )
  train = _columns(rows["train"])
  config = _read_if_present(workdir / "config.json")
  config = config.get("config", config)  # Beside commit and versions, or bare.
  return TrainingData(
    name=str(config.get("name") or workdir.resolve().name),
    last_step=max(steps),
    train=train,
    epoch_means=_epoch_means(train),
    test=_columns(rows["test"]),
    privacy=config.get("privacy") or {},
    summary=_read_if_present(workdir / "summary.json"),
  )


def headline(data: TrainingData) -> str:
  """The final numbers of a run in one line.

  Args:
    data: what `read` returned.

  Returns:
    Scores on the test split, steps, and the guarantee or its absence.
  """
  parts = []
  for name, label in (
    ("accuracy", "accuracy"),
    ("f1", "macro F1"),
    ("auc_roc", "AUC-ROC"),
    ("bits_per_byte", "bits per byte"),
  ):
    value = tables.to_float(data.summary.get(name))
    if math.isnan(value):
      value = data.test.get(name, _EMPTY).final
    if not math.isnan(value):
      parts.append(f"test {label} {value:.3f}")
  if data.last_step > 0:
    parts.append(f"{data.last_step:,} step{'s' if data.last_step > 1 else ''}")
  if math.isinf(data.epsilon):
    parts.append("no guarantee (ε = ∞)")
  elif not math.isnan(data.epsilon):
    seeded = tables.SEEDED_MARK if data.summary.get("seeded") else ""
    parts.append(
      f"ε = {tables.format_epsilon(data.epsilon)}{seeded}"
      f" at δ = {tables.format_delta(data.delta)}"
    )
  return " · ".join(parts)


def _say(ax: axes.Axes, sentence: str) -> None:
  """A panel that has a sentence instead of curves."""
  ax.set_xticks([])
  ax.set_yticks([])
  ax.spines[:].set_visible(False)
  ax.text(
    0.5,
    0.5,
    textwrap.fill(sentence, 44),
    transform=ax.transAxes,
    ha="center",
    va="center",
    color=_GREY,
    linespacing=1.5,
  )


def _line(ax: axes.Axes, series: Series, **style: Any) -> None:
  """Draws a series' known values, with a dot where a line would vanish."""
  known = np.isfinite(series.values)
  count = int(known.sum())
  if count == 0:
    return
  style.setdefault("linewidth", 1.8)
  if count == 1:
    style["marker"] = style.get("marker", "o")
  elif count > _MAX_MARKERS:
    style["marker"] = None
  ax.plot(series.steps[known], series.values[known], **style)


def _legend_above(ax: axes.Axes, share: float) -> None:
  """Puts the legend into `share` of new room above the curves."""
  to_axis = ax.yaxis.get_transform()
  low, high = to_axis.transform(np.array(ax.get_ylim()))
  top = high + share / (1 - share) * (high - low)
  ax.set_ylim(top=float(to_axis.inverted().transform(np.array([top]))[0]))
  ax.legend(loc="upper right")


def _draw_loss(ax: axes.Axes, data: TrainingData) -> None:
  """Total and task loss per step and epoch, and the loss on the test split."""
  ax.set_title(f"Loss {_MARK}")
  total, task = data.get(_LOSS + "total"), data.get(_LOSS + "task")
  test = data.test.get("loss", _EMPTY)
  if total.is_empty and task.is_empty and test.is_empty:
    _say(ax, "No loss was recorded.")
    return
  _line(
    ax, total, color=_GREY, alpha=0.35, linewidth=0.8, label="train, each step"
  )
  means = data.epoch_means
  _line(
    ax,
    means.get(_LOSS + "total", _EMPTY),
    color=BLACK,
    linewidth=2.2,
    label="train, epoch mean",
  )
  _line(
    ax,
    means.get(_LOSS + "task", _EMPTY),
    color=_SKY,
    linestyle=(0, (4, 2)),
    label="train, task term, epoch mean",
  )
  _line(
    ax,
    test,
    color=ORANGE,
    linestyle="-.",
    marker="o",
    markersize=4,
    label="test",
  )
  ax.set_ylabel("loss (nats)")
  ax.legend(loc="best")


def _draw_terms(ax: axes.Axes, data: TrainingData) -> None:
  """The loss terms of the mechanisms, which have a scale of their own."""
  ax.set_title(f"Terms of the mechanisms {_MARK}")
  terms = (
    ("dp_perturbation", "DP noise ⟨z, θ⟩", BLUE, "-"),
    ("attention_consistency", "attention consistency (KL)", ORANGE, "--"),
  )
  # A mechanism that is off is recorded as exactly zero.
  present = [
    term
    for term in terms
    if np.nan_to_num(data.get(_LOSS + term[0]).values).any()
  ]
  if not present:
    _say(ax, "No DP noise and no attention consistency in this loss.")
    return
  for name, label, color, style in present:
    _line(ax, data.get(_LOSS + name), color=color, alpha=0.25, linewidth=0.8)
    mean = data.epoch_means.get(_LOSS + name, _EMPTY)
    _line(
      ax,
      mean,
      color=color,
      linestyle=style,
      # One term may be too small to be seen beside the other.
      label=f"{label}, epoch mean, last {mean.final:.2g}",
    )
  ax.axhline(0, color=_GREY, linewidth=0.6)
  ax.set_ylabel("loss (nats)")
  if ax.get_legend_handles_labels()[0]:
    _legend_above(ax, 0.24)


def _draw_scores(ax: axes.Axes, data: TrainingData) -> None:
  """Accuracy and macro F1 on the test split."""
  ax.set_title("Scores on the test split")
  drawn = False
  for name, label, color, style, marker in (
    ("accuracy", "accuracy", BLUE, "-", "o"),
    ("f1", "macro F1", ORANGE, "--", "s"),
  ):
    series = data.test.get(name, _EMPTY)
    if series.is_empty:
      continue
    drawn = True
    _line(
      ax,
      series,
      color=color,
      linestyle=style,
      marker=marker,
      markersize=4,
      # In the legend: two scores that agree would write over each other.
      label=f"{label}, final {series.final:.3f}",
    )
  bits = data.test.get("bits_per_byte", _EMPTY)
  if not drawn and not bits.is_empty:
    _line(
      ax,
      bits,
      color=BLUE,
      marker="o",
      markersize=4,
      label=f"bits per byte, final {bits.final:.3f}",
    )
    ax.set_ylabel("bits per byte")
    ax.legend(loc="best")
    return
  if not drawn:
    _say(ax, "No evaluation was recorded.")
    return
  ax.set_ylim(-0.02, 1.04)
  ax.set_ylabel("score (0 to 1)")
  ax.legend(loc="best")


def _draw_privacy(ax: axes.Axes, data: TrainingData) -> None:
  """Epsilon over steps against its budget, or that there is no guarantee."""
  ax.set_title("Privacy spent")
  spent = data.get("epsilon")
  if math.isinf(data.epsilon):
    _say(ax, "No guarantee: ε = ∞")
    return
  if spent.is_empty:
    _say(ax, "No privacy loss was recorded.")
    return
  unit = str(data.privacy.get("unit") or "example").lower()
  relation = f", {data.relation} {unit}" if data.relation else ""
  ax.set_title(
    f"Privacy spent (δ = {tables.format_delta(data.delta)}{relation})"
  )
  _line(
    ax,
    spent,
    color=_GREEN,
    label=f"ε spent, final {tables.format_epsilon(spent.final)}",
  )
  budget = tables.to_float(data.privacy.get("epsilon"))
  top = float(np.nanmax(spent.values))
  if math.isfinite(budget):
    ax.axhline(
      budget,
      color=BLACK,
      linestyle="--",
      linewidth=1.2,
      label=f"budget ε = {tables.format_epsilon(budget)}",
    )
    top = max(top, budget)
  ax.set_ylim(0, 1.12 * top if top > 0 else 1)
  ax.set_ylabel("ε")
  ax.legend(loc="lower right")


def _draw_norms(ax: axes.Axes, data: TrainingData) -> None:
  """Quantiles of the per-example gradient norms, and where they are cut."""
  ax.set_title(f"Per-example gradient norms {_MARK}")
  low, middle, high = (data.get(_QUANTILE + q) for q in ("p10", "p50", "p90"))
  if middle.is_empty:
    _say(ax, "No per-example gradient norm was recorded.")
    return
  if not (low.is_empty or high.is_empty):
    known = np.isfinite(low.values) & np.isfinite(high.values)
    steps, bottom = low.steps[known], low.values[known]
    top = high.values[known]
    style = {"color": _SKY, "alpha": 0.4, "label": "10th to 90th percentile"}
    if steps.size == 1:  # A band needs two steps.
      ax.vlines(steps, bottom, top, linewidth=8, **style)
    else:
      ax.fill_between(steps, bottom, top, linewidth=0, **style)
  _line(ax, middle, color=BLUE, linewidth=1.4, label="median")
  clip = tables.to_float(data.privacy.get("l2_clip_norm"))
  is_clipped = not data.get("nonprivate/clipped_fraction").is_empty
  if is_clipped and clip > 0:
    ax.axhline(
      clip,
      color=BLACK,
      linestyle="--",
      linewidth=1.2,
      label=f"clip norm C = {clip:g}",
    )
  if np.nanmax(middle.values) > 0:
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(ticker.FuncFormatter(lambda y, _: f"{y:g}"))
    ax.yaxis.set_minor_formatter(ticker.NullFormatter())
  ax.set_ylabel("L2 norm")
  _legend_above(ax, 0.32)


def _draw_clipping(ax: axes.Axes, data: TrainingData) -> None:
  """How many gradients were cut."""
  ax.set_title(f"Clipped examples {_MARK}")
  name = "nonprivate/clipped_fraction"
  series = data.get(name)
  if series.is_empty:
    _say(ax, "Nothing is clipped in this run.")
    return
  _line(ax, series, color=_GREY, alpha=0.35, linewidth=0.8, label="each step")
  _line(
    ax,
    data.epoch_means.get(name, _EMPTY),
    color=BLACK,
    linewidth=2.2,
    label="epoch mean",
  )
  ax.set_ylim(-0.02, 1.04)
  ax.yaxis.set_major_formatter(ticker.PercentFormatter(xmax=1, decimals=0))
  ax.set_ylabel("share of the batch")
  ax.legend(loc="best")


def _write(ax: axes.Axes, lines: Sequence[tuple[str, Any]]) -> None:
  """Lines of text in a panel without a frame."""
  ax.axis("off")
  for index, (text, style) in enumerate(lines):
    ax.text(
      0,
      1 - (index + 0.5) / len(lines),
      text,
      transform=ax.transAxes,
      va="center",
      in_layout=False,
      **style,
    )


def draw(data: TrainingData) -> figure.Figure:
  """Draws the training figure.

  Args:
    data: what `read` returned.

  Returns:
    A figure that belongs to no window; the caller saves it.
  """
  layout = layout_engine.ConstrainedLayoutEngine(
    w_pad=0.12, h_pad=0.08, hspace=0.02
  )
  fig = figure.Figure(figsize=(11, 10.5), layout=layout)
  grid = fig.add_gridspec(5, 2, height_ratios=[0.2, 1, 1, 1, 0.16])
  title = textwrap.shorten(data.name, 90, placeholder=" …")
  _write(
    fig.add_subplot(grid[0, :]),
    [
      (title, {"fontsize": 15, "fontweight": "bold"}),
      (headline(data), {"fontsize": 11}),
    ],
  )
  panels = (
    (_draw_loss, _draw_scores),
    (_draw_terms, _draw_privacy),
    (_draw_norms, _draw_clipping),
  )
  for row, pair in enumerate(panels):
    for column, draw_panel in enumerate(pair):
      ax = fig.add_subplot(grid[row + 1, column])
      ax.spines[["top", "right"]].set_visible(False)
      draw_panel(ax, data)
      ax.title.set_fontsize(11)
      if ax.lines:
        ax.grid(True, color="#DDDDDD", linewidth=0.6)
        ax.set_axisbelow(True)
        # The same steps in every panel, so that they can be read together.
        locator = ticker.MaxNLocator(8, integer=True, steps=[1, 2, 2.5, 5, 10])
        ax.set_xlim(0, data.last_step * 1.02 + 0.5)
        ax.xaxis.set_major_locator(locator)
        ax.set_xlabel("training step")
      if legend := ax.get_legend():
        legend.set_frame_on(True)
        legend.get_frame().set(edgecolor="none", alpha=0.85)
        for text in legend.get_texts():
          text.set_fontsize(9)
  has_guarantee = math.isfinite(data.epsilon)
  note = _NOTE.format(_NOT_COVERED if has_guarantee else _NO_GUARANTEE)
  if data.summary.get("seeded"):
    note += f" {tables.SEEDED_NOTE}"
  _write(
    fig.add_subplot(grid[4, :]),
    [(textwrap.fill(note, 130), {"fontsize": 9, "color": _GREY})],
  )
  return fig


def training_figure(workdir: pathlib.Path) -> pathlib.Path:
  """Draws `figures/training.png` and `.pdf` from the records in `workdir`.

  Args:
    workdir: a run's folder; see `read`.

  Returns:
    The path of the PNG file.

  Raises:
    ValueError: if there is no metric to draw.
  """
  workdir = pathlib.Path(workdir)
  fig = draw(read(workdir))
  return saving.save(fig, workdir / "figures" / "training")
