"""Records per second of the data pipelines, beside what others do.

In each case every row reads the same records of one prepared data set and does
the same work on them. The baseline is a plain Grain loop that reads and decodes
and does nothing else: no normalising, no tokens, no batches. Iterators and
workers stay alive between rounds, and what they had ready when a round began is
not counted.
"""

import dataclasses
import importlib.util
import itertools
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
import tqdm

from ppnet import config as config_lib
from ppnet.bench import measure
from ppnet.core import checks, records
from ppnet.data import augment_image, image, pipeline, prepare
from ppnet.data import examples as examples_lib

_RECORD = "bench.json"
_BATCH = 512
_PREFETCH = 2  # Steps kept ready.
_STEPS = 8  # Per round, counted.
_MANY_STEPS = 1 << 20  # More than are ever drawn.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """One data set and what is done to its records.

  Attributes:
    name: of the case.
    title: in words.
    configure: changes an experiment's data and model to it.
    folder: below `data.path`, where its raw data are.
    goal: records per second that one of our rows should reach.
  """

  name: str
  title: str
  configure: Callable[[config_lib.ExperimentConfig], None]
  folder: str
  goal: float


def _fashion_mnist(
  config: config_lib.ExperimentConfig, *, augmented: bool = False
) -> None:
  """Pictures of 28 x 28 as bytes, scaled when they are stacked."""
  augmentations = (
    augment_image.Rotate(max_degrees=10.0),
    augment_image.Flip(),
  )
  config.data.source = config_lib.Source.IDX
  config.data.class_names = tuple("0123456789")
  config.data.image_size = 28
  config.data.image_transforms = (
    image.Decode(image_size=28, image_channels=1, as_uint8=True),
    *(augmentations if augmented else ()),
    image.MinMax(),
    # Those of the data set: a benchmark claims nothing.
    image.ZScore(mean=0.2860, std=0.3530),
  )
  config.model.image = config_lib.ImageStemConfig(
    channels=(16, 32), strides=(4, 2)
  )


def _fsdd(config: config_lib.ExperimentConfig) -> None:
  """Spoken digits of at most a second, log-mel, z-score of each clip."""
  config.data.source = config_lib.Source.FSDD
  config.data.audio = config_lib.AudioConfig(max_secs=1.0)
  config.model.audio = config_lib.AudioStemConfig(frames_per_token=4)


def _reviews(config: config_lib.ExperimentConfig) -> None:
  """Reviews as bytes, rows of three lengths."""
  config.data.source = config_lib.Source.CLOTHING_REVIEWS
  config.data.tokenizer = config_lib.TokenizerKind.BYTES
  config.data.vocab_size = config.model.decoder.vocab_size = 300
  config.data.lengths = (128, 256, 512)
  config.model.decoder.max_seq_len = 512


_CASES = {
  case.name: case
  for case in (
    Case(
      name="fashion_mnist",
      title="Fashion-MNIST: decode, min–max, z-score",
      configure=_fashion_mnist,
      folder="fashion-mnist",
      goal=50_000,
    ),
    Case(
      name="fashion_mnist/augmented",
      title="Fashion-MNIST: decode, rotate, flip, min–max, z-score",
      configure=lambda config: _fashion_mnist(config, augmented=True),
      folder="fashion-mnist",
      goal=10_000,
    ),
    Case(
      name="fsdd",
      title="FSDD: decode, cut or pad to 1 s, log-mel, z-score",
      configure=_fsdd,
      folder="fsdd",
      goal=2_000,
    ),
    Case(
      name="reviews",
      title="Clothing reviews: NFKC, bytes, rows of 128, 256 or 512 tokens",
      configure=_reviews,
      folder="womens-clothing-reviews",
      goal=20_000,
    ),
  )
}


def parse_cases(names: str) -> list[Case]:
  """Cases by name; "own" and "default" are all of them.

  Raises:
    ValueError: unknown names.
  """
  if names in ("own", "default"):
    return list(_CASES.values())
  return measure.named(names, _CASES)


def run(
  config: config_lib.ExperimentConfig,
  workdir: pathlib.Path,
  *,
  log: Any = sys.stderr,
) -> dict[str, Any]:
  """Measures the cases of `config.bench`; writes `bench.json`.

  Args:
    config: `data.path` is the folder that holds the data sets' folders.
    workdir: its folder; data are prepared below it.
    log: where progress goes.

  Returns:
    The record that `bench.json` holds: for each row its `examples_per_sec` and
    `time_ratio` (medians over the rounds), the case's goal, and what was
    measured against what.

  Raises:
    ValueError: unknown cases, or no data where they should be.
  """
  record: dict[str, Any] = {
    "subject": config.bench.subject,
    "machine": measure.machine(),
    "rounds": config.bench.rounds,
    "is_complete": False,
    "cases": {},
    "rows": [],
  }
  for case in parse_cases(config.bench.cases):
    rows, facts = _measure(case, config, workdir, log)
    record["rows"] += rows
    record["cases"][case.name] = facts
    records.write_json(workdir / _RECORD, record)
  record["is_complete"] = True
  records.write_json(workdir / _RECORD, record)
  return records.to_plain(record)


def _measure(
  case: Case,
  config: config_lib.ExperimentConfig,
  workdir: pathlib.Path,
  log: Any,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
  """The rows of one case, and what there is to know about it."""
  own = config_lib.ExperimentConfig()
  own.model.image = own.model.audio = None
  own.model.decoder.max_seq_len = 64
  own.data.prompt = ""
  own.data.path = _raw_path(config.data.path, case)
  case.configure(own)
  config_lib.validate(own)
  folder = workdir / "prepared" / case.folder
  prepare.prepare(own.data, folder)
  readers = {
    name: make(own, folder)
    for name, make in _contenders().items()
    if make is not None
  }
  names = list(readers)
  secs: dict[str, list[float]] = {name: [] for name in names}
  load = measure.Load()
  with tqdm.tqdm(
    total=len(names) * config.bench.rounds, desc=case.name, file=log
  ) as bar:
    for reader in readers.values():
      reader()  # Starts threads and workers, and fills caches.
    for round_number in range(config.bench.rounds):
      for name in measure.order(names, round_number):
        secs[name].append(readers[name]())
        bar.update()
  busy = load.record()
  share = busy["others_cpu_share"]
  rows = [
    _row(name, case, secs=secs.get(name), baseline=secs[names[0]])
    for name in _contenders()
  ]
  return rows, {
    "title": case.title,
    "goal_examples_per_sec": case.goal,
    "examples_per_round": _BATCH * _STEPS,
    **busy,
    "is_quiet": share is None or share <= measure.QUIET_SHARE,
  }


def _raw_path(path: str, case: Case) -> str:
  """Where the raw data of a case are."""
  folder = pathlib.Path(path) / case.folder
  if not folder.is_dir():
    checks.fail(
      f"a folder {case.folder} below config.data.path",
      "Give the folder that holds the data sets after the config's colon.",
      **{"data.path": path},
    )
  # A folder of one file stands for that file.
  single = [
    found
    for found in sorted(folder.iterdir())
    if found.name.endswith((".zip", ".csv", ".csv.gz"))
  ]
  return str(single[0] if len(single) == 1 else folder)


def _row(
  name: str,
  case: Case,
  *,
  secs: Sequence[float] | None,
  baseline: Sequence[float],
) -> dict[str, Any]:
  """One row; without seconds it says why."""
  is_baseline = name == _BASELINE
  row: dict[str, Any] = {
    "name": name,
    "case": case.name,
    "framework": "torch" if "torch" in name else "grain",
    "is_peer": "torch" in name,
    "is_baseline": is_baseline,
    "time_ratio": None,
    "time_ratio_quartiles": None,
    "memory_ratio": None,
    "examples_per_sec": None,
    "meets_goal": None,
    "note": "" if secs else "PyTorch is not installed",
  }
  if not secs:
    return row
  rate = _BATCH * _STEPS / float(np.median(secs))
  ratios = np.array(secs) / np.array(baseline)
  return row | {
    "time_ratio": float(np.median(secs) / np.median(baseline)),
    "time_ratio_quartiles": np.quantile(ratios, (0.25, 0.75)).tolist(),
    "examples_per_sec": rate,
    "meets_goal": None if is_baseline else rate >= case.goal,
  }


_BASELINE = "Grain, decode only"
_Reader = Callable[[], float]
_Make = Callable[[config_lib.ExperimentConfig, pathlib.Path], _Reader]


def _contenders() -> dict[str, _Make | None]:
  """Name -> what makes a reader; None for what is not installed."""
  has_torch = importlib.util.find_spec("torch") is not None
  rows: dict[str, _Make | None] = {_BASELINE: _decode_only}
  for workers in (0, 1, 2):
    rows[f"ppnet, {workers} workers"] = _ours(workers, cache=False)
  rows["ppnet, 0 workers, decoded before"] = _ours(0, cache=True)
  for workers in (0, 2):
    rows[f"torch DataLoader, {workers} workers"] = (
      _torch(workers) if has_torch else None
    )
  return rows


def _timed(batches: Iterator[Any], *, ready: int) -> _Reader:
  """Reads `_STEPS` batches and tells how long that took.

  Args:
    batches: never ends.
    ready: batches that may be waiting when a round begins.
  """

  def read() -> float:
    for _ in range(ready):
      next(batches)
    began = time.perf_counter()
    for _ in range(_STEPS):
      next(batches)
    return time.perf_counter() - began

  return read


def _examples(
  config: config_lib.ExperimentConfig, folder: pathlib.Path, *, cache: bool
) -> examples_lib.Examples:
  """The training examples, random transformations included."""
  own = dataclasses.replace(
    config, data=dataclasses.replace(config.data, cache=cache)
  )
  return pipeline.examples(own, folder, split="train", augmented=True)


class _InTurn:
  """Draws the records in turn; can be pickled."""

  def __init__(self, size: int):
    self._size = size

  def __call__(self, step: int) -> np.ndarray:
    first = step * _BATCH % max(self._size - _BATCH, 1)
    return np.arange(first, first + min(_BATCH, self._size))


def _ours(workers: int, *, cache: bool) -> _Make:
  """`pipeline.train_steps`, as training reads."""

  def make(
    config: config_lib.ExperimentConfig, folder: pathlib.Path
  ) -> _Reader:
    dataset = _examples(config, folder, cache=cache)
    if cache:
      for position in range(len(dataset)):
        dataset[position]
    steps = pipeline.train_steps(
      dataset,
      draw=_InTurn(len(dataset)),
      num_steps=_MANY_STEPS,
      microbatch_size=_BATCH,
      num_threads=1,
      prefetch_steps=_PREFETCH,
      num_workers=workers,
    )
    # A worker keeps steps ready, and so does its thread.
    return _timed(iter(steps), ready=_PREFETCH * (1 + 2 * workers))

  return make


def _decode_only(
  config: config_lib.ExperimentConfig, folder: pathlib.Path
) -> _Reader:
  """Reads records and decodes them, one by one."""
  source = pipeline.open_source(config.data, folder, split="train")
  decoders = {
    name: chain.fixed[0] if chain.fixed else None
    for name, chain in _examples(config, folder, cache=False).chains.items()
  }

  def decode(position: int) -> Mapping[str, Any]:
    record = source[position]
    return {
      name: [
        decoder.map({"id": record.id, name: item})[name] if decoder else item
        for item in record.media.get(name, ())
      ]
      for name, decoder in decoders.items()
    } | {"text": record.text, "label": record.label}

  dataset = grain.MapDataset.range(len(source)).map(decode).repeat(None)
  elements = iter(
    dataset.to_iter_dataset(
      grain.ReadOptions(num_threads=1, prefetch_buffer_size=_BATCH)
    )
  )

  def batches() -> Iterator[None]:
    while True:
      for _ in itertools.islice(elements, _BATCH):
        pass
      yield None

  return _timed(batches(), ready=1)


def _torch(workers: int) -> _Make:
  """PyTorch's DataLoader over the same transformations, record by record."""

  def make(
    config: config_lib.ExperimentConfig, folder: pathlib.Path
  ) -> _Reader:
    import torch.utils.data

    loader = torch.utils.data.DataLoader(
      _TorchDataset(_examples(config, folder, cache=False)),
      batch_size=_BATCH,
      sampler=_Forever(config, folder),
      num_workers=workers,
      prefetch_factor=_PREFETCH if workers else None,
    )
    return _timed(iter(loader), ready=_PREFETCH * workers)

  return make


class _TorchDataset:
  """One example by its position, as PyTorch asks for it."""

  def __init__(self, examples: examples_lib.Examples):
    self._examples = examples

  def __len__(self) -> int:
    return len(self._examples)

  def __getitem__(self, position: int) -> dict[str, np.ndarray]:
    return self._examples[position]


class _Forever:
  """The positions of a split, again and again."""

  def __init__(self, config: config_lib.ExperimentConfig, folder: pathlib.Path):
    self._size = len(pipeline.open_source(config.data, folder, split="train"))

  def __iter__(self) -> Iterator[int]:
    return itertools.cycle(range(self._size))

  def __len__(self) -> int:
    return _MANY_STEPS
