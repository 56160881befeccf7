"""One record through every stage of a data pipeline, as a picture.

`draw` applies the transforms in use to one record and shows what comes out of
each, then several augmented views. The record is shown as it is, so the figure
is as private as the record; it says so.
"""

import dataclasses
import math
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import axes, figure, font_manager, layout_engine, ticker

from ppnet.core import checks
from ppnet.data import audio, image, text
from ppnet.data import stages as stages_lib
from ppnet.report import figures, saving, tables

_GREY = "#666666"
_NOTE = (
  "Shows one record of the data set as it is. No privacy guarantee covers this"
  " figure: share it only with people who may see the record."
)
_MAX_COLUMNS = 6
_PIXEL_KINDS = ("decode", "augmentation")
_NUM_MAPS = 81  # Of a picture with many channels; more would be too small.
_DIVERGING = "RdBu_r"
_SHOWN_SHARE = 0.95  # Of coefficients; the others have the colour of the end.
_TO_DB = 10 / math.log(10)  # Nats of power to decibels.


def draw(
  transforms: Sequence[stages_lib.Transform],
  element: Mapping[str, Any],
  *,
  modality: str,
  seed: int,
  num_views: int = 4,
) -> figure.Figure:
  """Draws one record through the transforms.

  Args:
    transforms: of the pipeline, in order.
    element: holds "id" and the encoded item under the modality's name.
    modality: "image", "audio" or "text".
    seed: of the augmentations; the stages show view 0.
    num_views: augmented views beside them; none are drawn if no transform is
      random.

  Returns:
    A figure that belongs to no window; the caller saves it.

  Raises:
    ValueError: another modality, or no transform.
    sources.BadRecordError: the record cannot be used.
  """
  drawings = {"image": _draw_image, "audio": _draw_audio, "text": _draw_text}
  if modality not in drawings or not transforms:
    checks.fail(
      f"transforms, and modality to be one of {[*drawings]}",
      modality=modality,
      num_transforms=len(transforms),
    )
  views = [
    stages_lib.trace(transforms, element, modality, seed=seed, view=view)
    for view in range(max(1, num_views))
  ]
  if not any(map(stages_lib.is_random, transforms)):
    views = views[:1]
  return drawings[modality](element, views)


def write(
  path_stem: str | pathlib.Path,
  transforms: Sequence[stages_lib.Transform],
  element: Mapping[str, Any],
  *,
  modality: str,
  seed: int,
  num_views: int = 4,
) -> pathlib.Path:
  """Draws and writes `<path_stem>.png` and `.pdf`.

  Args:
    path_stem: such as `<workdir>/figures/pipeline_image`; its folder is made.
    transforms: as for `draw`, like what follows.
    element: one record.
    modality: its modality.
    seed: of the augmentations.
    num_views: augmented views.

  Returns:
    The path of the PNG file.

  Raises:
    ValueError: as `draw`.
    sources.BadRecordError: as `draw`.
  """
  fig = draw(
    transforms, element, modality=modality, seed=seed, num_views=num_views
  )
  return saving.save(fig, pathlib.Path(path_stem))


def _new_figure(width: float, height: float) -> figure.Figure:
  """An empty figure in the style of `report.figures`."""
  layout = layout_engine.ConstrainedLayoutEngine(
    w_pad=0.1, h_pad=0.08, hspace=0.03
  )
  return figure.Figure(figsize=(width, height), layout=layout)


def _heading(fig: figure.Figure, part: Any, lines: Sequence[str]) -> None:
  """A bold line and grey ones under it, in a part of a grid."""
  ax = fig.add_subplot(part)
  ax.axis("off")
  for index, line in enumerate(lines):
    style: dict[str, Any] = (
      {"fontsize": 14, "fontweight": "bold"}
      if index == 0
      else {"fontsize": 9, "color": _GREY}
    )
    ax.text(
      0,
      1 - (index + 0.5) / len(lines),
      line,
      transform=ax.transAxes,
      va="center",
      in_layout=False,
      **style,
    )


def _title(ax: axes.Axes, name: str, detail: str, *, width: int = 30) -> None:
  """A title, and what the transform says of itself in a smaller line."""
  words = textwrap.fill(detail, width)
  ax.set_title(f"{name}\n{words}" if words else name, fontsize=9, loc="left")


def _facts(value: np.ndarray) -> str:
  """Shape, type and range in a line."""
  shape = " × ".join(map(str, value.shape))
  low, high = value.min(), value.max()
  span = (
    f"{low:.3g} to {high:.3g}"
    if value.dtype.kind == "f"
    else (f"{low} to {high}")
  )
  return f"{shape}, {value.dtype.name}\n{span}"


def _name(transform: stages_lib.Transform) -> str:
  """The class of a transform, and whether it draws."""
  random = " (random)" if stages_lib.is_random(transform) else ""
  return f"{type(transform).__name__}{random}"


# Pictures.


def _draw_image(
  element: Mapping[str, Any], views: Sequence[Sequence[stages_lib.Stage]]
) -> figure.Figure:
  """The picture as it is stored, each stage, and views."""
  stored = image.Decode(image_size=None, image_channels=3, as_uint8=True)
  original = stored.map(element)["image"]
  if (original == original[:, :, :1]).all():
    original = original[:, :, :1]
  stages = views[0]
  num_panels = 1 + len(stages)
  rows = -(-num_panels // _MAX_COLUMNS)
  columns = max(-(-num_panels // rows), min(len(views), _MAX_COLUMNS))
  view_rows = -(-len(views) // columns) if len(views) > 1 else 0
  side = 2.2
  heights = [0.6, *[side + 0.9] * rows, *[side + 0.1] * view_rows]
  fig = _new_figure(max((side + 0.15) * columns, 8.2), sum(heights) + 0.3)
  grid = fig.add_gridspec(len(heights), columns, height_ratios=heights)
  _heading(fig, grid[0, :], [f"Picture {element['id']}, stage by stage", _NOTE])
  ax = fig.add_subplot(grid[1, 0])
  _show(ax, original)
  _title(ax, "As stored", f"{len(element['image']):,} bytes")
  _below(ax, _facts(original))
  for index, stage in enumerate(stages, start=1):
    ax = fig.add_subplot(grid[1 + index // columns, index % columns])
    how = _show(ax, stage.value)
    also = getattr(stage.transform, "normalisation_label", "")
    label = ", ".join(filter(None, (stage.transform.label, also)))
    _title(ax, _name(stage.transform), label)
    _below(ax, _facts(stage.value) + how)
  for view, trace in enumerate(views if view_rows else ()):
    row, column = divmod(view, columns)
    ax = fig.add_subplot(grid[1 + rows + row, column])
    # After a z-score each view would be shown in another range.
    pixels = [s.value for s in trace if s.transform.kind in _PIXEL_KINDS][-1]
    _show(ax, pixels)
    ax.set_title(f"View {view} (augmented)", fontsize=9, loc="left")
  return fig


def _below(ax: axes.Axes, words: str) -> None:
  """Grey words under a picture."""
  ax.set_xlabel(words, fontsize=8, color=_GREY)


def _show(ax: axes.Axes, pixels: np.ndarray) -> str:
  """Shows [H, W, C]; returns how, if not as it is."""
  ax.set_anchor("N")  # Titles in a row stand at one height.
  ax.set_xticks([])
  ax.set_yticks([])
  ax.spines[:].set_color("#BBBBBB")
  values = pixels.astype(np.float64)
  how = ""
  if pixels.dtype == np.uint8:
    values /= 255
  if pixels.shape[2] not in (1, 3):
    values = _montage(values)
    how = ", each map rescaled"
  elif values.min() < 0 or values.max() > 1:
    low, high = values.min(), values.max()
    values = (values - low) / (high - low)
    how = ", shown rescaled"
  if values.shape[2] == 1:
    ax.imshow(values[:, :, 0], cmap="gray", vmin=0, vmax=1)
  else:
    ax.imshow(values)
  return how


def _montage(maps: np.ndarray) -> np.ndarray:
  """Maps [H, W, K] side by side, each in its own range: [H', W', 1]."""
  maps = maps[:, :, :_NUM_MAPS]
  height, width, count = maps.shape
  side = math.isqrt(count - 1) + 1
  low = maps.min(axis=(0, 1))
  span = maps.max(axis=(0, 1)) - low
  unit = (maps - low) / np.where(span > 0, span, 1)
  wall = np.ones((side * (height + 1) - 1, side * (width + 1) - 1, 1))
  for index in range(count):
    top = index // side * (height + 1)
    left = index % side * (width + 1)
    wall[top : top + height, left : left + width, 0] = unit[:, :, index]
  return wall


# Recordings.


def _draw_audio(
  element: Mapping[str, Any], views: Sequence[Sequence[stages_lib.Stage]]
) -> figure.Figure:
  """Waveform, spectrogram, mel, MFCC, what the model sees, and views."""
  stages = views[0]
  waveforms = [_last_waveform(trace) for trace in views]
  framing = _framing(stages)
  has_views = len(views) > 1
  rows = 5 if has_views else 3
  fig = _new_figure(11, 9.5 if not has_views else 13.5)
  heights = [0.3, 0.8, 1.1, 1.1] + [0.8, 1.0] * has_views
  grid = fig.add_gridspec(rows + 1, 1, height_ratios=heights)
  used = " → ".join(_name(stage.transform) for stage in stages)
  _heading(
    fig,
    grid[0],
    [f"Recording {element['id']}, stage by stage", f"In use: {used}", _NOTE],
  )
  ax = fig.add_subplot(grid[1])
  clean = stages[0].value
  _draw_waveform(ax, clean, rate_hz=framing.rate_hz)
  _title(
    ax,
    "Waveform",
    f"{_name(stages[0].transform)}: {stages[0].transform.label}",
    width=90,
  )
  upper = grid[2].subgridspec(1, 2)
  lower = grid[3].subgridspec(1, 2)
  _draw_spectrogram(fig.add_subplot(upper[0]), clean, framing)
  if framing.log_mel is not None:
    _draw_mel(fig.add_subplot(upper[1]), clean, framing, framing.log_mel)
    _draw_mfcc(fig.add_subplot(lower[0]), clean, framing, framing.log_mel)
  _draw_input(fig.add_subplot(lower[1]), stages, framing)
  if has_views:
    count = len(views)
    tops, bottoms = (grid[row].subgridspec(1, count) for row in (4, 5))
    limit = max(float(np.abs(waveform).max()) for waveform in waveforms)
    for view, trace in enumerate(views):
      ax = fig.add_subplot(tops[view])
      _draw_waveform(ax, waveforms[view], rate_hz=framing.rate_hz, limit=limit)
      ax.set_title(f"View {view}, waveform", fontsize=9, loc="left")
      ax = fig.add_subplot(bottoms[view])
      _draw_input(ax, trace, framing, title=f"View {view}, what the model gets")
      if view:
        ax.set_ylabel("")
  return fig


def _last_waveform(trace: Sequence[stages_lib.Stage]) -> np.ndarray:
  """The last stage that is still a waveform."""
  return [stage.value for stage in trace if np.ndim(stage.value) == 1][-1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Framing:
  """How the pipeline cuts recordings into frames, and where they lie."""

  rate_hz: int
  window: int
  hop: int
  center: bool
  log_mel: audio.LogMel | None
  mfcc: audio.Mfcc | None

  def seconds(self, num_frames: int) -> tuple[float, float]:
    """Where the first frame's share of time begins and the last one's ends."""
    first = 0 if self.center else self.window / 2
    begin = (first - self.hop / 2) / self.rate_hz
    return begin, begin + num_frames * self.hop / self.rate_hz


def _framing(stages: Sequence[stages_lib.Stage]) -> _Framing:
  """Reads it from the transforms.

  Raises:
    ValueError: none of them decodes a recording.
  """
  used = [stage.transform for stage in stages]
  decode = next((t for t in used if isinstance(t, audio.Decode)), None)
  if decode is None:
    checks.fail(
      "an audio.Decode among the transforms", transforms=[*map(_name, used)]
    )
  rate_hz = decode.sample_rate_hz
  log_mel = next((t for t in used if isinstance(t, audio.LogMel)), None)
  mfcc = next((t for t in used if isinstance(t, audio.Mfcc)), None)
  spectrogram = next(
    (t for t in used if isinstance(t, audio.Spectrogram)), None
  )
  framed = log_mel or spectrogram
  if framed is None:  # Waveforms go in: frames are for this figure alone.
    window = max(4, round(0.032 * rate_hz))
    framed = audio.Spectrogram(window=window, hop=window // 2, center=True)
  return _Framing(
    rate_hz=rate_hz,
    window=framed.window,
    hop=framed.hop,
    center=framed.center,
    log_mel=log_mel,
    mfcc=mfcc,
  )


def _draw_waveform(
  ax: axes.Axes,
  waveform: np.ndarray,
  *,
  rate_hz: int,
  limit: float | None = None,
) -> None:
  """Samples over seconds."""
  seconds = np.arange(len(waveform)) / rate_hz
  ax.plot(seconds, waveform, color=figures.BLUE, linewidth=0.6)
  limit = float(np.abs(waveform).max()) if limit is None else limit
  ax.set_ylim(-1.05 * limit or -1, 1.05 * limit or 1)
  ax.set_xlim(0, len(waveform) / rate_hz)
  ax.set_xlabel("time (s)")
  ax.set_ylabel("amplitude")
  ax.spines[["top", "right"]].set_visible(False)
  ax.tick_params(labelsize=8)


def _draw_frames(
  ax: axes.Axes,
  frames: np.ndarray,
  framing: _Framing,
  *,
  bottom: float,
  top: float,
  colour_label: str,
  cmap: str = "magma",
) -> None:
  """Frames [A, M] as an image over seconds."""
  begin, end = framing.seconds(len(frames))
  low, high = float(frames.min()), float(frames.max())
  extend = "neither"
  if cmap == _DIVERGING:  # The largest few would leave the others pale.
    high = float(np.quantile(np.abs(frames), _SHOWN_SHARE))
    low = -high
    extend = "both"
  drawn = ax.imshow(
    frames.T,
    origin="lower",
    aspect="auto",
    extent=(begin, end, bottom, top),
    cmap=cmap,
    vmin=low,
    vmax=high if high > low else low + 1,
    interpolation="nearest",
  )
  ax.set_xlabel("time (s)")
  ax.tick_params(labelsize=8)
  bar = ax.figure.colorbar(drawn, ax=ax, pad=0.02, fraction=0.05, extend=extend)
  bar.set_label(colour_label, fontsize=8)
  bar.ax.tick_params(labelsize=7)


def _draw_spectrogram(
  ax: axes.Axes, waveform: np.ndarray, framing: _Framing
) -> None:
  """STFT power in dB, 80 dB deep."""
  spectrogram = audio.Spectrogram(
    window=framing.window,
    hop=framing.hop,
    center=framing.center,
    output="db",
    top_db=80.0,
  )
  frames = spectrogram.map({"id": "", "audio": waveform})["audio"]
  _draw_frames(
    ax,
    frames,
    framing,
    bottom=0,
    top=framing.rate_hz / 2,
    colour_label="power (dB)",
  )
  ax.set_ylabel("frequency (Hz)")
  _title(
    ax,
    "Spectrogram",
    f"window {1000 * framing.window / framing.rate_hz:g} ms, hop"
    f" {1000 * framing.hop / framing.rate_hz:g} ms, 80 dB deep",
    width=60,
  )


def _mel_axis(ax: axes.Axes, log_mel: audio.LogMel) -> None:
  """Labels rows of bands in Hz: band m is centred at m + 0.5."""
  low, high = audio.hz_to_mel(np.array([log_mel.min_hz, log_mel.max_hz]))
  nice = np.array([100, 200, 500, 1000, 2000, 4000, 8000, 16000], np.float64)
  # Corner i lies i of num_mels + 1 even steps up; corner m + 1 is the centre of
  # band m, whose row has its middle at m + 0.5.
  rows = (audio.hz_to_mel(nice) - low) / (high - low) * (log_mel.num_mels + 1)
  rows -= 0.5
  inside = (rows >= 0) & (rows <= log_mel.num_mels)
  ax.set_yticks(rows[inside], [f"{hz:g}" for hz in nice[inside]])
  ax.set_ylabel("frequency (Hz, mel scale)")


def _draw_mel(
  ax: axes.Axes,
  waveform: np.ndarray,
  framing: _Framing,
  log_mel: audio.LogMel,
) -> None:
  """Log-mel, in dB whatever the unit in use, 80 dB deep."""
  frames = log_mel.map({"id": "", "audio": waveform})["audio"]
  decibels = frames if log_mel.decibels else frames * _TO_DB
  decibels = np.maximum(decibels, decibels.max() - 80)
  _draw_frames(
    ax,
    decibels,
    framing,
    bottom=0,
    top=log_mel.num_mels,
    colour_label="power (dB)",
  )
  _mel_axis(ax, log_mel)
  _title(
    ax, "Mel spectrogram", f"{log_mel.num_mels} bands, 80 dB deep", width=60
  )


def _draw_mfcc(
  ax: axes.Axes,
  waveform: np.ndarray,
  framing: _Framing,
  log_mel: audio.LogMel,
) -> None:
  """Cepstral coefficients without number 0, which is the loudness."""
  mfcc = framing.mfcc
  if mfcc is None:
    mfcc = audio.Mfcc(num_mfcc=min(13, log_mel.num_mels))
  element = log_mel.map({"id": "", "audio": waveform})
  frames = mfcc.map(element)["audio"]
  unit = "dB" if log_mel.decibels else "nats"
  # A loudness alone is better than nothing.
  shown_from = 1 if mfcc.first == 0 and frames.shape[1] > 1 else mfcc.first
  _draw_frames(
    ax,
    frames[:, shown_from - mfcc.first :],
    framing,
    bottom=shown_from - 0.5,
    top=mfcc.first + frames.shape[1] - 0.5,
    colour_label=f"coefficient ({unit})",
    cmap=_DIVERGING,
  )
  ax.yaxis.set_major_locator(ticker.MaxNLocator(8, integer=True))
  ax.set_ylabel("coefficient number")
  note = "" if framing.mfcc else "; not used by this pipeline"
  _title(ax, "MFCC", f"without number 0, the loudness{note}", width=70)


def _draw_input(
  ax: axes.Axes,
  stages: Sequence[stages_lib.Stage],
  framing: _Framing,
  *,
  title: str = "",
) -> None:
  """The last stage, as the model gets it."""
  last = stages[-1]
  value = np.abs(last.value) if np.iscomplexobj(last.value) else last.value
  if value.ndim == 1:
    _draw_waveform(ax, value, rate_hz=framing.rate_hz)
  else:
    is_mel = framing.log_mel is not None and framing.mfcc is None
    _draw_frames(
      ax,
      value,
      framing,
      bottom=0,
      top=value.shape[1],
      colour_label="value",
      cmap=_DIVERGING if framing.mfcc else "magma",
    )
    if is_mel:
      _mel_axis(ax, framing.log_mel)
    else:
      ax.set_ylabel("feature number")
      ax.yaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
  if title:
    ax.set_title(title, fontsize=9, loc="left")
    return
  shape = " × ".join(map(str, last.value.shape))
  _title(
    ax,
    "What the model gets",
    f"{last.transform.label}; {shape}, {last.value.dtype.name}",
    width=60,
  )


# Texts.

_LINE_CHARS = 125
_MAX_LINES = 6
_SPACE = "\u2581"  # As SentencePiece writes it.


def _draw_text(
  element: Mapping[str, Any], views: Sequence[Sequence[stages_lib.Stage]]
) -> figure.Figure:
  """The beginning of what comes out of each stage."""
  stages = views[0]
  blocks = []
  for stage in stages:
    if isinstance(stage.value, str):
      content = stage.value
      size = f"{len(content):,} characters"
    else:
      content = _tokens(stage)
      size = f"{len(stage.value):,} tokens"
    content = _drawable(content[: 2 * _LINE_CHARS * _MAX_LINES])
    lines = textwrap.wrap(content, _LINE_CHARS, max_lines=_MAX_LINES) or [""]
    name = f"{_name(stage.transform)}: {stage.transform.label} → {size}"
    blocks.append((name, lines))
  heights = [0.7, *(0.45 + 0.2 * len(lines) for _, lines in blocks)]
  fig = _new_figure(11, sum(heights) + 0.4)
  grid = fig.add_gridspec(len(heights), 1, height_ratios=heights)
  _heading(fig, grid[0], [f"Text {element['id']}, stage by stage", _NOTE])
  for index, (name, lines) in enumerate(blocks, start=1):
    ax = fig.add_subplot(grid[index])
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_color("#DDDDDD")
    ax.set_title(name, fontsize=9, loc="left")
    ax.text(
      0.01,
      0.5,
      "\n".join(lines).replace("$", r"\$"),
      transform=ax.transAxes,
      va="center",
      family="monospace",
      fontsize=9,
      linespacing=1.4,
      in_layout=False,
    )
  return fig


def _tokens(stage: stages_lib.Stage) -> str:
  """Each token as it is spelt, and its id."""
  ids = stage.value.tolist()
  tokenizer = getattr(stage.transform, "tokenizer", None)
  if tokenizer is None:
    return " ".join(map(str, ids))
  spelling = {tokenizer.bos_id: text.BOS, tokenizer.eos_id: text.EOS}
  for token in {*ids} - {*spelling}:
    spelling[token] = tokenizer.decode([token]).strip() or _SPACE
  return " ".join(f"{spelling[token]}/{token}" for token in ids)


def _drawable(content: str) -> str:
  """The text; characters that the font lacks by their number."""
  properties = font_manager.FontProperties(family="monospace")
  font = font_manager.get_font(font_manager.findfont(properties))
  known = {
    letter: letter
    if letter.isspace() or font.get_char_index(ord(letter))
    else f"<U+{ord(letter):04X}>"
    for letter in set(content)
  }
  return "".join(known[letter] for letter in content)


def caption(transforms: Sequence[stages_lib.Transform]) -> str:
  """The transforms in words, in order, for the text around a figure."""
  return (
    " → ".join(
      f"{_name(transform)} ({transform.label})" for transform in transforms
    )
    or tables.HOLE
  )
