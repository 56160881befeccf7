"""From a prepared folder to the fixed-shape arrays that a step consumes.

    source -> decode, normalise, tokenise -> example -> microbatches of a step

`examples` gives one example per record. `train_steps` asks a sampler for the
positions of each step and cuts exactly those examples, all of them, into
microbatches of one shape; `eval_batches` goes once through everything.

Guarantees. Element t of `train_steps` is a function of t alone, so resuming at
t gives what an uninterrupted run would have had. Nothing is truncated and
nothing is drawn here: the sampler that the accountant knows decides alone. A
record that cannot be decoded either stops the run by name or becomes an example
that contributes exactly zero, so it never changes which others are drawn.

>>> dataset = examples(config, "/tmp/digits", split="train")  # doctest: +SKIP
>>> dataset[0]["image"].shape, dataset[0]["audio"].shape  # doctest: +SKIP
((8, 8, 1), (24, 40))
"""

import dataclasses
import os
import pathlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, SupportsIndex

import grain
import numpy as np

from ppnet import config as config_lib
from ppnet.core import checks
from ppnet.data import audio, batching, image, prepare, sources, text


class BadRecords:
  """Counts records that could not be decoded, each once. Thread-safe."""

  def __init__(self):
    self._lock = threading.Lock()
    self._causes: dict[str, str] = {}

  def add(self, error: sources.BadRecordError) -> None:
    """Notes a bad record; the first cause stays."""
    with self._lock:
      self._causes.setdefault(error.record_id, error.cause)

  @property
  def count(self) -> int:
    """Number of distinct bad records met so far."""
    return len(self.ids)

  @property
  def ids(self) -> tuple[str, ...]:
    """Their ids, sorted."""
    return tuple(sorted(self.causes))

  @property
  def causes(self) -> dict[str, str]:
    """Their ids and what was wrong."""
    with self._lock:
      return dict(self._causes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
  """The tokens of every example; only the answer differs between examples.

      <s> <image>... <audio>... prompt [answer]

  Attributes:
    tokens: int32 [T], everything but the answer.
    answer_ids: int32 [num_classes], the piece of each class.
  """

  tokens: np.ndarray
  answer_ids: np.ndarray

  def arrays(self, label: int) -> batching.Batch:
    """Returns tokens, targets int32 [T] and loss_mask float32 [T].

    The targets are the tokens one position later, so the answer is the target
    at the last position, and only that position counts.
    """
    loss_mask = np.zeros(self.tokens.shape, np.float32)
    loss_mask[-1] = 1
    return {
      "tokens": self.tokens,
      "targets": np.append(self.tokens[1:], self.answer_ids[label]),
      "loss_mask": loss_mask,
    }


def layout(
  config: config_lib.ExperimentConfig,
  card: prepare.Card,
  *,
  tokenizer: text.Tokenizer,
) -> Layout:
  """Lays out the tokens of an example.

  Args:
    config: decides how many tokens a picture and a recording take.
    card: a modality that the source lacks takes none.
    tokenizer: of the same prepared folder.

  Returns:
    The layout. Its length is exactly what is needed; nothing is padded.

  Raises:
    ValueError: the sequence is longer than the decoder's, or the tokenizer has
      more pieces than the vocabulary.
  """
  counts = {
    name: count
    for name, count in config_lib.num_media_tokens(config).items()
    if name in card.modalities
  }
  prompt = tokenizer.encode(config.data.prompt)
  tokens = np.array(
    [
      tokenizer.bos_id,
      *(
        tokenizer.placeholder_ids[name]
        for name, count in counts.items()
        for _ in range(count)
      ),
      *prompt,
    ],
    np.int32,
  )
  max_seq_len = config.model.decoder.max_seq_len
  if len(tokens) > max_seq_len:
    checks.fail(
      f"a sequence of at most model.decoder.max_seq_len={max_seq_len} tokens",
      "Raise max_seq_len, shorten config.data.prompt, or let the stems make"
      " fewer tokens.",
      bos=1,
      **counts,
      prompt=len(prompt),
      total=len(tokens),
    )
  checks.at_most(
    config.data.vocab_size,
    "Set config.data.vocab_size to what the tokenizer was trained with.",
    tokenizer_vocab_size=tokenizer.vocab_size,
  )
  return Layout(tokens=tokens, answer_ids=tokenizer.answer_ids)


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
  source: sources.Source
  if config.source is config_lib.Source.IMAGE_FOLDER:
    folder = sources.ImageFolderSource(
      config.path,
      split=split,
      # Nobody's privacy depends on the test pictures.
      user_pattern=config.user_pattern if split == "train" else "",
    )
    if folder.class_names != card.class_names:
      checks.fail(
        f"{config.path} to have the classes it was prepared with,"
        f" {card.class_names}",
        "Prepare it again into another config.data.prepared_dir.",
        class_names=folder.class_names,
      )
    source = folder
  else:
    names = [name for name in card.sha256 if name.startswith(f"{split}-")]
    source = sources.ArrayRecordSource(
      [prepared_dir / name for name in sorted(names)]
    )
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
  bad_records: BadRecords | None = None,
) -> grain.MapDataset:
  """Opens one split as a random-access data set of fixed-shape examples.

  Args:
    config: the experiment.
    prepared_dir: what PREPARE wrote.
    split: "train" or "test".
    bad_records: where bad records are noted if they are skipped.

  Returns:
    One example per record, in the source's order: a dict of

    - index: int32, position in the split
    - tokens, targets: int32 [T]
    - loss_mask: float32 [T], 1 at the last position only
    - label: int32
    - is_padding_example: bool, True for a skipped bad record, whose other
      arrays are then zero (its index is kept)
    - image: float32 [S, S, C], if the model and the source have pictures
    - audio: float32 [A, M], if the model and the source have recordings

    Arrays may be shared between visits and are read-only.

  Raises:
    ValueError: see `open_source` and `layout`.
    sources.BadRecordError: on reading a bad record, under RAISE.
  """
  source = open_source(config.data, prepared_dir, split=split)
  card = prepare.read_card(prepared_dir)
  tokenizer = text.Tokenizer.load(
    pathlib.Path(prepared_dir) / prepare.TOKENIZER_NAME,
    class_names=card.class_names,
  )
  media = _media(config.data)
  wanted = [
    name
    for name in card.modalities
    if name in config_lib.num_media_tokens(config)
  ]
  return grain.MapDataset.source(
    _Examples(
      source,
      layout=layout(config, card, tokenizer=tokenizer),
      transforms={name: media[name].transforms for name in wanted},
      blank={name: np.zeros(media[name].shape, np.float32) for name in wanted},
      skip=config.data.on_bad_record is config_lib.BadRecord.SKIP,
      bad_records=BadRecords() if bad_records is None else bad_records,
      cache=config.data.cache,
    )
  )


class _Media(NamedTuple):
  """How the encoded bytes of one modality become one array."""

  transforms: tuple[grain.transforms.Map, ...]
  shape: tuple[int, ...]  # Of the float32 array that comes out.


def _media(config: config_lib.DataConfig) -> dict[str, _Media]:
  """The modalities. A new one needs an entry here."""
  size = config.image_size
  return {
    "image": _Media(
      image.transforms(config), (size, size, config.image_channels)
    ),
    "audio": _Media(
      audio.transforms(config.audio),
      (audio.num_frames(config.audio), audio.num_features(config.audio)),
    ),
  }


class _Examples:
  """Random access to examples; what `examples` wraps.

  The cache is a plain dict: two threads that decode one record at the same
  time write the same value, and dict operations are atomic.
  """

  def __init__(
    self,
    source: sources.Source,
    *,
    layout: Layout,
    transforms: Mapping[str, Sequence[grain.transforms.Map]],
    blank: batching.Batch,
    skip: bool,
    bad_records: BadRecords,
    cache: bool,
  ):
    self._source = source
    self._layout = layout
    self._transforms = transforms
    self._blank = blank
    self._skip = skip
    self._bad_records = bad_records
    self._cache: dict[int, batching.Example] | None = {} if cache else None

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: SupportsIndex) -> batching.Example:
    position = index.__index__()
    if self._cache is None:
      return self._read(position)
    if position not in self._cache:
      self._cache[position] = self._read(position)
    return dict(self._cache[position])

  def _read(self, position: int) -> batching.Example:
    """Reads and decodes one record, or stands in for a bad one."""
    try:
      record = self._source[position]
      label = self._checked_label(record)
      media = {
        name: _apply(record, transforms)[name]
        for name, transforms in self._transforms.items()
      }
    except sources.BadRecordError as error:
      if not self._skip:
        raise
      self._bad_records.add(error)
      return self._padding(position)
    return self._example(position, label=label, media=media)

  def _example(
    self, position: int, *, label: int, media: Mapping[str, np.ndarray]
  ) -> batching.Batch:
    """Returns the example of a good record."""
    example = {
      "index": np.array(position, np.int32),
      **self._layout.arrays(label),
      "label": np.array(label, np.int32),
      batching.PADDING_KEY: np.array(False),
      **media,
    }
    return _read_only(example)

  def _padding(self, position: int) -> batching.Example:
    """Returns zeros, but for the position, which stays known."""
    good = self._example(position, label=0, media=self._blank)
    padding = batching.padding_like(good)
    return _read_only({**padding, "index": good["index"]})

  def _checked_label(self, record: sources.Record) -> int:
    """Returns the label, which must be a class."""
    label = record["label"]
    num_classes = len(self._layout.answer_ids)
    if not isinstance(label, int) or not 0 <= label < num_classes:
      raise sources.BadRecordError(
        record["id"], f"its label {label!r} is none of {num_classes} classes."
      )
    return label


def _apply(
  record: sources.Record, transforms: Sequence[grain.transforms.Map]
) -> Mapping[str, Any]:
  """Applies transformations one after the other."""
  element: Mapping[str, Any] = record
  for transform in transforms:
    element = transform.map(element)
  return element


def _read_only(example: batching.Batch) -> batching.Batch:
  """Returns the example with arrays that cannot be written to."""
  for array in example.values():
    array.flags.writeable = False
  return example


def train_steps(
  dataset: grain.MapDataset,
  *,
  draw: Callable[[int], np.ndarray],
  num_steps: int,
  microbatch_size: int,
  num_threads: int,
  prefetch_steps: int,
  users: Users | None = None,
  num_views: int = 1,
) -> grain.IterDataset:
  """Turns drawn positions into the microbatches of each step.

  A drawn unit takes the same number of rows whatever it is, r, side by side:
  one for an example, `num_views` for as many views of it, `users.max_records`
  for a user, of which those without a record are padding.

  Args:
    dataset: of `examples`.
    draw: step -> the positions of its units, integers in strictly increasing
      order, possibly none. Called from several threads and ahead of time, and
      again after a resume, so it must depend on the step alone.
    num_steps: number of steps.
    microbatch_size: units of one microbatch.
    num_threads: threads that make steps; 0 works in the caller's thread.
    prefetch_steps: steps kept ready.
    users: whose records units are; None: a unit is an example.
    num_views: times that each record is repeated; above 1, rows have a "view",
      int32 from 0, that tells them apart.

  Returns:
    Steps in order. Element t is a dict of

    - step: t
    - num_examples: n, the number of units drawn (a skipped bad record counts)
    - microbatches: arrays [M, microbatch_size * r, ...], M = ceil(n /
      microbatch_size), the units in drawn order and then padding; M is 0 when
      none was drawn

    Its iterator has `get_state` and `set_state`, which resume exactly.

  Raises:
    ValueError: a size is not positive; while iterating, `draw` returned
      something else than a set of positions.
    sources.BadRecordError: while iterating, under RAISE.
  """
  checks.positive(
    num_examples=len(dataset),
    num_steps=num_steps,
    microbatch_size=microbatch_size,
    num_views=num_views,
  )
  steps = _Steps(
    dataset,
    draw=draw,
    num_steps=num_steps,
    microbatch_size=microbatch_size,
    users=users,
    num_views=num_views,
  )
  return grain.MapDataset.source(steps).to_iter_dataset(
    grain.ReadOptions(
      num_threads=num_threads, prefetch_buffer_size=prefetch_steps
    )
  )


class _Steps:
  """Random access to steps; what `train_steps` wraps."""

  def __init__(
    self,
    dataset: grain.MapDataset,
    *,
    draw: Callable[[int], np.ndarray],
    num_steps: int,
    microbatch_size: int,
    users: Users | None,
    num_views: int,
  ):
    self._dataset = dataset
    self._draw = draw
    self._num_steps = num_steps
    self._microbatch_size = microbatch_size
    self._users = users
    self._num_views = num_views
    self._rows_per_unit = num_views * (users.max_records if users else 1)

  def __len__(self) -> int:
    return self._num_steps

  def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
    step = index.__index__()
    drawn = self._checked(self._draw(step), step=step)
    rows = [row for unit in drawn for row in self._rows(step, unit)]
    return {
      "step": step,
      "num_examples": len(drawn),
      "microbatches": batching.microbatches(
        rows,
        microbatch_size=self._microbatch_size * self._rows_per_unit,
        # An empty draw still has to know the shapes.
        template=rows[0] if rows else self._views(0)[0],
      ),
    }

  def _rows(self, step: int, unit: int) -> list[batching.Example]:
    """The rows of a unit, padding last."""
    if self._users is None:
      return self._views(unit)
    positions = self._users.positions(step, unit)
    rows = [row for position in positions for row in self._views(position)]
    missing = self._rows_per_unit - len(rows)
    if missing < 0:
      checks.fail(
        f"at most {self._users.max_records} records of a user",
        step=step,
        records=len(positions),
      )
    return rows + [batching.padding_like(self._views(0)[0])] * missing

  def _views(self, position: int) -> list[batching.Example]:
    """The views of one record."""
    example = self._dataset[int(position)]
    if self._num_views == 1:
      return [example]
    return [
      {**example, batching.VIEW_KEY: np.array(view, np.int32)}
      for view in range(self._num_views)
    ]

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
  dataset: grain.MapDataset, *, batch_size: int
) -> Iterator[batching.Batch]:
  """Goes once through a data set in order.

  Args:
    dataset: of `examples`.
    batch_size: rows of every batch.

  Yields:
    Arrays [batch_size, ...]; every record is in exactly one batch, and the tail
    of the last batch is padding.

  Raises:
    ValueError: `batch_size` is not positive.
    sources.BadRecordError: under RAISE.
  """
  checks.positive(batch_size=batch_size)
  for start in range(0, len(dataset), batch_size):
    stop = min(start + batch_size, len(dataset))
    rows = [dataset[position] for position in range(start, stop)]
    yield batching.stack(rows, size=batch_size, template=rows[0])
