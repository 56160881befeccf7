"""From a prepared folder to the fixed-shape arrays that a step consumes.

    source -> decode, normalise, tokenise -> example -> microbatches of a step

`examples` gives one example per record. `train_steps` asks a sampler for the
positions of each step and cuts exactly those examples, all of them, into
microbatches of one shape, or of a few where records have texts of their own;
`eval_batches` goes once through everything.

Guarantees. Step t is a function of t alone, so a resumed run sees what an
uninterrupted one would have seen, whatever the number of threads, workers and
hosts. Nothing is truncated and nothing is drawn here: the sampler that the
accountant knows decides alone. A record that cannot be decoded either stops the
run by name or becomes an example that contributes exactly zero, so it never
changes which others are drawn.

>>> dataset = examples(config, "/tmp/digits", split="train")  # doctest: +SKIP
>>> dataset[0]["image"].shape, dataset[0]["audio"].shape  # doctest: +SKIP
((8, 8, 1), (24, 40))
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import grain
import numpy as np
from absl import flags

from ppnet import config as config_lib
from ppnet.core import checks
from ppnet.data import (
  audio,
  batching,
  image,
  packing,
  prepare,
  sources,
  text_transforms,
  tokenizers,
)
from ppnet.data import examples as examples_lib
from ppnet.data import layout as layout_lib

T = TypeVar("T")


def open_source(
  config: config_lib.DataConfig,
  prepared_dir: str | os.PathLike[str],
  *,
  split: str,
) -> sources.Source:
  """Opens one split of a prepared data set, still encoded.

  Raises:
    ValueError: the folder is not prepared, was prepared from another config,
      or does not hold as many records as its card says.
  """
  if split not in sources.SPLITS:
    checks.fail(f"split to be one of {sources.SPLITS}", split=split)
  prepared_dir = pathlib.Path(prepared_dir)
  card = prepare.read_card(prepared_dir)
  prepare.check_same_config(card, config, prepared_dir=prepared_dir)
  source = prepare.open_split(config, card, prepared_dir, split=split)
  if len(source) != card.num_records(split):
    checks.fail(
      f"{card.num_records(split)} records in {source.description}",
      "They changed since PREPARE. The accountant needs the true number:"
      " prepare again into another config.data.prepared_dir.",
      num_records=len(source),
    )
  return source


def records_by_user(
  config: config_lib.ExperimentConfig, prepared_dir: str | os.PathLike[str]
) -> tuple[np.ndarray, ...]:
  """Groups the train split by user.

  The number of users is public, like the number of records where the unit is a
  record; who has how many records is not.

  Returns:
    For each user, in the order of their names, the positions of their records,
    i64[records], increasing.

  Raises:
    ValueError: the source does not know whose a record is.
  """
  source = open_source(config.data, prepared_dir, split="train")
  positions: dict[str, list[int]] = {}
  for position in range(len(source)):
    user = source.user(position)
    if user is None:
      checks.fail(
        "every training record to belong to a user, for privacy.unit=USER",
        "Set config.data.user_pattern, or privacy.unit=EXAMPLE.",
        record=position,
        source=source.description,
      )
    positions.setdefault(user, []).append(position)
  return tuple(
    np.array(positions[user], np.int64) for user in sorted(positions)
  )


# No vocabulary has longer pieces in any number; more text cannot be used.
_MAX_CHARS_PER_TOKEN = 32
AnyExamples = examples_lib.Examples | packing.PackedExamples


@dataclasses.dataclass(frozen=True, kw_only=True)
class Users:
  """How the records of a sampled user become rows.

  Attributes:
    records: of `records_by_user`.
    max_records: rows of one user.
    choose: (step, user, number of records) -> at most `max_records` places
      among the user's records, increasing; depends on its arguments alone.
  """

  records: Sequence[np.ndarray]
  max_records: int
  choose: Callable[[int, int, int], np.ndarray]

  def positions(self, step: int, user: int) -> np.ndarray:
    """The records that stand for `user` in `step`."""
    records = self.records[user]
    return records[self.choose(step, user, len(records))]


def examples(
  config: config_lib.ExperimentConfig,
  prepared_dir: str | os.PathLike[str],
  *,
  split: str,
  augmented: bool = False,
) -> examples_lib.Examples:
  """Opens one split as a random-access data set of fixed-shape examples.

  Args:
    config: the experiment.
    prepared_dir: what PREPARE wrote.
    split: "train" or "test".
    augmented: whether random transformations take part.

  Returns:
    One example per record, in the source's order; see `examples.Examples`.

  Raises:
    ValueError: see `open_source` and `layout.Layout`.
    sources.BadRecordError: on reading a bad record, under RAISE.
  """
  source = open_source(config.data, prepared_dir, split=split)
  card = prepare.read_card(prepared_dir)
  stems = config_lib.num_media_tokens(config)
  counts = {name: card.media[name] for name in card.media if name in stems}
  data = prepare.with_statistics(config.data, card)
  chains = {name: _CHAINS[name](data) for name in counts}
  if not augmented:
    chains = {
      name: chain.without_augmentation() for name, chain in chains.items()
    }
  made = examples_lib.Examples(
    source,
    layout=layout_lib.Layout(
      config,
      counts=counts,
      has_text=card.has_text,
      tokenizer=tokenizers.load(
        config.data, prepared_dir, class_names=card.class_names
      ),
      text_transforms=text_chain(config),
    ),
    chains=chains,
    skip=config.data.on_bad_record is config_lib.BadRecord.SKIP,
    cache=config.data.cache,
    seed=config.data.augmentation_seed,
  )
  if config.data.store_fixed:
    made.store_fixed(
      pathlib.Path(prepared_dir),
      split=split,
      hashes=[card.sha256, card.raw_sha256, card.data],
    )
  return made


def training_examples(
  config: config_lib.ExperimentConfig, prepared_dir: str | os.PathLike[str]
) -> AnyExamples:
  """The train split as it is trained on: augmented, or in packed rows."""
  if config.privacy.unit is config_lib.PrivacyUnit.PACKED_ROW:
    return packing.PackedExamples(
      examples(config, prepared_dir, split="train"), unit=config.privacy.unit
    )
  return examples(config, prepared_dir, split="train", augmented=True)


def text_chain(config: config_lib.ExperimentConfig) -> tuple[Any, ...]:
  """What a record's own text goes through before it becomes tokens."""
  if config.data.text_transforms:
    return tuple(config.data.text_transforms)
  longest = config.data.lengths[-1:] or (config.model.decoder.max_seq_len,)
  return (
    text_transforms.Decode(max_chars=_MAX_CHARS_PER_TOKEN * longest[0]),
    text_transforms.Nfkc(),
  )


def _image_chain(config: config_lib.DataConfig) -> examples_lib.Chain:
  """From an encoded picture to [S, S, C], or what features make of that."""
  size = config.image_size
  shape: tuple[int, ...] = (size, size, config.image_channels)
  transforms = config.image_transforms or image.transforms(config)
  for transform in transforms:
    if hasattr(transform, "shape_after"):
      shape = transform.shape_after(shape)
  return examples_lib.Chain(transforms, shape=shape)


def _audio_chain(config: config_lib.DataConfig) -> examples_lib.Chain:
  """From an encoded recording to [frames, features]."""
  return examples_lib.Chain(
    config.audio_transforms or audio.transforms(config.audio),
    shape=(audio.num_frames(config.audio), audio.num_features(config.audio)),
  )


# The modalities. A new one needs an entry here.
_CHAINS = {"image": _image_chain, "audio": _audio_chain}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Host:
  """Which part of every batch a host reads.

  Hosts that split a network between them read the same part.

  Attributes:
    own: this host's parts, from 0, in ascending order; not always side by
      side, since the order of rows follows the links of a pod.
    of: equal parts that a batch has.
  """

  own: tuple[int, ...] = (0,)
  of: int = 1

  def rows(self, batch: Sequence[T]) -> list[T]:
    """This host's rows of a batch that all hosts know."""
    share = len(batch) // self.of
    return [
      row
      for part in self.own
      for row in batch[part * share : (part + 1) * share]
    ]


def train_steps(
  dataset: AnyExamples,
  *,
  draw: Callable[[int], np.ndarray],
  num_steps: int,
  microbatch_size: int,
  num_threads: int,
  prefetch_steps: int,
  start_step: int = 0,
  num_workers: int = 0,
  users: Users | None = None,
  num_views: int = 1,
  host: Host = Host(),
) -> grain.IterDataset:
  """Turns drawn positions into the microbatches of each step.

  A drawn unit takes the same number of rows whatever it is, r, side by side:
  one for an example, `num_views` for as many views of it, `users.max_records`
  for a user, of which those without a record are padding.

  Args:
    dataset: of `training_examples`.
    draw: step -> the positions of its units, integers in strictly increasing
      order, possibly none. Called from several threads or processes and ahead
      of time, and again after a resume, so it must depend on the step alone.
    num_steps: number of steps.
    microbatch_size: units of one microbatch, over all hosts.
    num_threads: threads that make steps; 0 works in the caller's thread.
    prefetch_steps: steps kept ready.
    start_step: the first step, after a resume.
    num_workers: processes that make steps; 0 is this one. `dataset` and `draw`
      are pickled into them.
    users: whose records units are; None: a unit is an example.
    num_views: views of each record; above 1, rows have a "view", int32 from 0,
      that tells them apart.
    host: which rows of every microbatch are read here.

  Returns:
    Steps in order. Element t is a dict of

    - step: start_step + t
    - num_examples: n, the number of units drawn (a skipped bad record counts)
    - microbatches: a list of batches (see `examples.Examples.batch`) of
      microbatch_size * r rows, of which this host has its part; units of one
      padded length in drawn order, then padding, the shortest length first;
      empty when none was drawn
    - bad_records: id -> cause of those met so far by whoever made this step

  Raises:
    ValueError: a size is not positive, or hosts cannot share a microbatch
      evenly; while iterating, `draw` returned something else than a set of
      positions.
    sources.BadRecordError: while iterating, under RAISE.
  """
  checks.positive(
    num_examples=len(dataset),
    num_steps=num_steps,
    microbatch_size=microbatch_size,
    num_views=num_views,
  )
  if microbatch_size % host.of:
    checks.fail(
      "perf.microbatch_size to divide evenly among the hosts",
      microbatch_size=microbatch_size,
      parts=host.of,
    )
  steps = _Steps(
    dataset,
    draw=draw,
    microbatch_size=microbatch_size,
    users=users,
    num_views=num_views,
    host=host,
  )
  made = (
    grain.MapDataset.range(start_step, num_steps)
    .map(steps)
    .to_iter_dataset(
      grain.ReadOptions(
        num_threads=num_threads, prefetch_buffer_size=prefetch_steps
      )
    )
  )
  if not num_workers:
    return made
  if not flags.FLAGS.is_parsed():  # Grain reads flags of its own.
    flags.FLAGS.mark_as_parsed()
  return made.mp_prefetch(
    grain.MultiprocessingOptions(
      num_workers=num_workers,
      per_worker_buffer_size=max(1, prefetch_steps // num_workers),
    )
  )


class _Steps:
  """Makes one step; what `train_steps` maps over their numbers."""

  def __init__(
    self,
    dataset: AnyExamples,
    *,
    draw: Callable[[int], np.ndarray],
    microbatch_size: int,
    users: Users | None,
    num_views: int,
    host: Host,
  ):
    self._dataset = dataset
    self._draw = draw
    self._microbatch_size = microbatch_size
    self._users = users
    self._num_views = num_views
    self._host = host
    self._rows_per_unit = num_views * (users.max_records if users else 1)

  def __call__(self, step: int) -> dict[str, Any]:
    drawn = self._checked(self._draw(step), step=step)
    by_length: dict[int, list[list[examples_lib.Row | None]]] = {}
    for unit in drawn:
      rows = self._rows(step, unit)
      by_length.setdefault(self._length(rows), []).append(rows)
    return {
      "step": step,
      "num_examples": len(drawn),
      "microbatches": [
        self._batch(units[start : start + self._microbatch_size], length=length)
        for length, units in sorted(by_length.items())
        for start in range(0, len(units), self._microbatch_size)
      ],
      "bad_records": self._dataset.bad_records.causes,
    }

  def _length(self, rows: Sequence[examples_lib.Row | None]) -> int:
    """What all rows of a unit are padded to."""
    lengths = self._dataset.layout.lengths
    if len(lengths) == 1:
      return lengths[0]
    return max(
      (self._dataset.padded_length(row.position) for row in rows if row),
      default=lengths[0],
    )

  def _batch(
    self, units: Sequence[list[examples_lib.Row | None]], *, length: int
  ) -> batching.Batch:
    """One microbatch: whole units, and padding up to its size."""
    size = self._microbatch_size * self._rows_per_unit
    rows = [row for unit in units for row in unit]
    rows = self._host.rows(rows + [None] * (size - len(rows)))
    batch = self._dataset.batch(rows, size=len(rows), length=length)
    if self._num_views > 1:
      batch[batching.VIEW_KEY] = np.array(
        [0 if row is None else row.view for row in rows], np.int32
      )
    return batch

  def _rows(self, step: int, unit: int) -> list[examples_lib.Row | None]:
    """The rows of a unit, padding last."""
    positions: Sequence[int] = [unit]
    if self._users is not None:
      positions = self._users.positions(step, unit).tolist()
      if len(positions) > self._users.max_records:
        checks.fail(
          f"at most {self._users.max_records} records of a user",
          step=step,
          records=len(positions),
        )
    rows: list[examples_lib.Row | None] = [
      examples_lib.Row(position, step, view)
      for position in positions
      for view in range(self._num_views)
    ]
    return rows + [None] * (self._rows_per_unit - len(rows))

  def _checked(self, positions: np.ndarray, *, step: int) -> list[int]:
    """Returns the positions, which must be a set among the units."""
    positions = np.asarray(positions)
    size = len(self._users.records if self._users else self._dataset)
    # A position beyond the end would wrap around, and one drawn twice would
    # count twice: both would break the guarantee without a sign.
    if positions.ndim != 1 or (
      positions.size
      and not (
        np.issubdtype(positions.dtype, np.integer)
        and positions[0] >= 0
        and positions[-1] < size
        and (np.diff(positions) > 0).all()
      )
    ):
      checks.fail(
        f"draw(step) to give increasing integers in [0, {size})",
        "Return the sorted positions of this step's units, each once.",
        step=step,
        positions=positions,
      )
    return positions.tolist()


def eval_batches(
  dataset: examples_lib.Examples, *, batch_size: int, host: Host = Host()
) -> Iterator[batching.Batch]:
  """Goes once through a data set in order.

  Args:
    dataset: of `examples`.
    batch_size: rows of every batch, over all hosts.
    host: which rows of every batch are read here.

  Yields:
    Batches of batch_size rows, of which this host has its part; over all
    hosts every record is in exactly one batch, and the tail of the last batch
    is padding. A batch is padded to the smallest length that holds its rows.

  Raises:
    ValueError: `batch_size` is not positive.
    sources.BadRecordError: under RAISE.
  """
  checks.positive(batch_size=batch_size)
  for start in range(0, len(dataset), batch_size):
    stop = min(start + batch_size, len(dataset))
    rows: list[examples_lib.Row | None] = [
      examples_lib.Row(position) for position in range(start, stop)
    ]
    rows += [None] * (batch_size - len(rows))
    # Every host must use the same length, whatever its own rows need.
    length = max(
      dataset.padded_length(position) for position in range(start, stop)
    )
    own = host.rows(rows)
    yield dataset.batch(own, size=len(own), length=length)
