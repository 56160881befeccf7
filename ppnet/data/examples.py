"""From stored records to arrays of a fixed shape, fast.

`Examples` gives one record's arrays by position, and stacks any rows into a
batch. Each modality has a list of transformations, applied in three parts:

    fixed     up to the first random one: once per record, then cached
    random    up to the last one that is not elementwise: once per row
    stacked   the elementwise ones at the end: once per batch

What a random transformation draws is a function of (seed, step, record, view)
and of its place, and of nothing else: not of the batch, the thread or the
process that happens to do the work.
"""

import dataclasses
import pathlib
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, SupportsIndex

import numpy as np

from ppnet import config as config_lib
from ppnet.core import checks
from ppnet.data import batching, randomness, sources, stages, stored
from ppnet.data import layout as layout_lib


class BadRecords:
  """Counts records that could not be decoded, each once. Thread-safe."""

  def __init__(self):
    self._lock = threading.Lock()
    self._causes: dict[str, str] = {}

  def add(self, record_id: str, cause: str) -> None:
    """Notes a bad record; the first cause stays."""
    with self._lock:
      self._causes.setdefault(record_id, cause)

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


class Row(NamedTuple):
  """One row of a batch: a view of a record at a step."""

  position: int
  step: int = 0
  view: int = 0


class Chain:
  """The transformations of one modality. Can be pickled.

  Attributes:
    shape: of one item's float32 array at the end.
  """

  def __init__(self, transforms: Sequence[Any], *, shape: tuple[int, ...]):
    """Cuts the list into its three parts."""
    self.shape = shape
    last = len(transforms)
    while last and getattr(transforms[last - 1], "elementwise", False):
      last -= 1
    first = next(
      (i for i in range(last) if _is_random(transforms[i])),
      last,
    )
    self.fixed = tuple(transforms[:first])
    self.random = tuple(transforms[first:last])
    self.stacked = tuple(transforms[last:])
    for transform in self.stacked:
      # A random one must know its row.
      assert not _is_random(transform), transform

  def without_augmentation(self) -> "Chain":
    """The same chain for evaluation: what is random is left out."""
    everything = (*self.fixed, *self.random, *self.stacked)
    return Chain(
      [t for t in everything if getattr(t, "kind", "") != "augmentation"],
      shape=self.shape,
    )


def _is_random(transform: Any) -> bool:
  return hasattr(transform, "random_map")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Decoded:
  """What is kept of a record: tokens, and each modality's fixed part."""

  id: str
  tokens: layout_lib.Tokens
  label: int
  items: Mapping[str, tuple[np.ndarray, ...]]


class Examples:
  """Random access to the examples of one split. Can be pickled.

  The cache is a plain dict: two threads that decode one record at the same
  time write the same value, and dict operations are atomic.

  Attributes:
    layout: the tokens' places.
    bad_records: what could not be decoded, if that is skipped.
  """

  def __init__(
    self,
    source: sources.Source,
    *,
    layout: layout_lib.Layout,
    chains: Mapping[str, Chain],
    skip: bool,
    cache: bool,
    seed: int,
  ):
    """Opens nothing and decodes nothing yet.

    Args:
      source: encoded records.
      layout: of their tokens.
      chains: of the modalities that the layout has.
      skip: whether a bad record becomes padding.
      cache: whether what was decoded is kept.
      seed: of random transformations.
    """
    assert chains.keys() == layout.counts.keys()
    self._source = source
    self.layout = layout
    self._chains = dict(chains)
    self._skip = skip
    self._seed = seed
    self._cache: dict[int, _Decoded | None] | None = {} if cache else None
    self._lengths: dict[int, int] = {}
    self._stored: dict[str, np.ndarray] = {}
    self.bad_records = BadRecords()

  @property
  def chains(self) -> dict[str, Chain]:
    """The transformations of each modality."""
    return dict(self._chains)

  def store_fixed(
    self, folder: pathlib.Path, *, split: str, hashes: Sequence[Any]
  ) -> None:
    """Makes the fixed part of all records, unless it is stored, and uses that.

    Args:
      folder: the prepared folder.
      split: "train" or "test".
      hashes: of the records; see `stored.path`.

    Raises:
      ValueError: a record may have several items of a modality.
      sources.BadRecordError: a bad record, or one without an item.
    """
    for name, chain in self._chains.items():
      if self.layout.counts[name] != 1:
        checks.fail(
          f"one {name} in each record with data.store_fixed",
          "Set --config.data.store_fixed=false.",
          most=self.layout.counts[name],
        )
      file = stored.path(
        folder,
        split=split,
        modality=name,
        transforms=chain.fixed,
        hashes=hashes,
      )

      def make(
        positions: Sequence[int], name: str = name
      ) -> Sequence[np.ndarray]:
        encoded = [self._only_item(name, position) for position in positions]
        return self._fixed(self._chains[name], name, encoded)

      self._stored[name] = stored.open_or_make(
        file,
        make,
        count=len(self),
        shape=None if chain.random else chain.shape,
      )

  def _only_item(self, name: str, position: int) -> tuple[str, bytes]:
    """The id of a record and its one item of a modality, encoded."""
    record = self._source[position]
    items = record.media.get(name, ())
    if len(items) != 1:
      cause = f"{len(items)} items of {name}, where one is to be stored."
      raise sources.BadRecordError(record.id, cause)
    return record.id, items[0]

  def __getstate__(self):
    # Another process fills its own cache and meets its own bad records.
    state = dict(self.__dict__)
    state["_cache"] = None if self._cache is None else {}
    del state["bad_records"]
    return state

  def __setstate__(self, state):
    self.__dict__.update(state)
    self.bad_records = BadRecords()

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: SupportsIndex) -> batching.Batch:
    """The arrays of the record at `index`, padded to the longest length.

    Its random transformations draw as in step 0. See `batch` for the keys.
    """
    row = Row(index.__index__())
    batch = self.batch([row], size=1, length=self.layout.longest)
    return {name: array[0] for name, array in batch.items()}

  def padded_length(self, position: int) -> int:
    """The length that the record needs; the shortest one for a bad record.

    Reads its text and decodes none of its media.
    """
    lengths = self.layout.lengths
    if len(lengths) == 1:
      return lengths[0]
    if position not in self._lengths:
      tokens = self.tokens(position)
      self._lengths[position] = (
        lengths[0]
        if tokens is None
        else self.layout.padded_length(len(tokens.tokens))
      )
    return self._lengths[position]

  def tokens(self, position: int) -> layout_lib.Tokens | None:
    """The record's tokens, its media not decoded; None for a bad record.

    Raises:
      sources.BadRecordError: a bad record, where they are not skipped.
    """
    try:
      return self.layout.tokens(self._source[position])
    except sources.BadRecordError as error:
      self._note(error)
      return None

  def batch(
    self, rows: Sequence[Row | None], *, size: int, length: int | None = None
  ) -> batching.Batch:
    """Decodes and stacks rows.

    Args:
      rows: at most `size`; None is a row of padding.
      size: rows of the batch.
      length: T; None takes the smallest that holds all of them.

    Returns:
      Arrays of `size` rows:

      - index: int32, position in the split, -1 for padding
      - tokens, targets: int32 [size, T]
      - loss_mask: float32 [size, T]
      - label: int32, under CLASSIFY
      - num_bytes: int32, of the text that counts, under the other tasks
      - is_padding_example: bool, True for padding and for a skipped bad
        record, whose other arrays are zero (its index is kept)
      - each modality: float32 [size, *shape], or [size, N, *shape] where a
        record may have N > 1 items; absent ones are zero and come last

    Raises:
      sources.BadRecordError: a bad record, where they are not skipped.
    """
    if len(rows) > size:
      checks.fail("at most as many rows as size", rows=len(rows), size=size)
    decoded = [
      None if row is None else self._decoded(row.position) for row in rows
    ]
    if length is None:
      length = max(
        [
          self.layout.padded_length(len(one.tokens.tokens))
          for one in decoded
          if one is not None
        ],
        default=self.layout.lengths[0],
      )
    media = self._media(rows, decoded, size=size)
    good = [
      (place, one) for place, one in enumerate(decoded) if one is not None
    ]
    batch = self._tokens(good, size=size, length=length)
    index = np.full(size, batching.NO_INDEX, np.int32)
    for place, row in enumerate(rows):
      if row is not None:
        index[place] = row.position
    padding = np.ones(size, np.bool_)
    padding[[place for place, _ in good]] = False
    return {
      batching.INDEX_KEY: index,
      **batch,
      batching.PADDING_KEY: padding,
      **media,
    }

  def _tokens(
    self, good: Sequence[tuple[int, _Decoded]], *, size: int, length: int
  ) -> batching.Batch:
    """The arrays of the token stream; zero where there is no record."""
    tokens = np.zeros((size, length), np.int32)
    targets = np.zeros((size, length), np.int32)
    loss_mask = np.zeros((size, length), np.float32)
    number = np.zeros(size, np.int32)
    is_class = self.layout.task is config_lib.Task.CLASSIFY
    pad_id = self.layout.pad_id
    for place, one in good:
      own = one.tokens
      count = len(own.tokens)
      tokens[place, :count] = own.tokens
      targets[place, :count] = own.targets
      loss_mask[place, :count] = own.loss_mask
      if pad_id:
        tokens[place, count:] = pad_id
        targets[place, count:] = pad_id
      number[place] = one.label if is_class else own.num_bytes
    return {
      "tokens": tokens,
      "targets": targets,
      "loss_mask": loss_mask,
      "label" if is_class else "num_bytes": number,
    }

  def _media(
    self,
    rows: Sequence[Row | None],
    decoded: list[_Decoded | None],
    *,
    size: int,
  ) -> batching.Batch:
    """The modalities' arrays; a row whose random part fails becomes bad."""
    items: dict[str, list[np.ndarray]] = {name: [] for name in self._chains}
    places: dict[str, list[tuple[int, int]]] = {
      name: [] for name in self._chains
    }
    for place, (row, one) in enumerate(zip(rows, decoded, strict=True)):
      if row is None or one is None:
        continue
      try:
        own = {name: self._varied(name, one, row) for name in self._chains}
      except sources.BadRecordError as error:
        self._note(error)
        decoded[place] = None
        continue
      for name, arrays in own.items():
        items[name] += arrays
        places[name] += [(place, n) for n in range(len(arrays))]
    media = {}
    for name, chain in self._chains.items():
      most = self.layout.counts[name]
      out = np.zeros((size, most, *chain.shape), np.float32)
      if items[name]:
        where = np.array(places[name])
        element: Mapping[str, Any] = {"id": "", name: np.stack(items[name])}
        for transform in chain.stacked:
          element = transform.map(element)
        out[where[:, 0], where[:, 1]] = element[name]
      media[name] = out[:, 0] if most == 1 else out
    return media

  def _varied(self, name: str, one: _Decoded, row: Row) -> Sequence[np.ndarray]:
    """The items of a modality after the random part."""
    items = one.items[name]
    transforms = self._chains[name].random
    if not transforms:
      return items
    out = []
    for number, item in enumerate(items):
      element: Mapping[str, Any] = {"id": one.id, name: item}
      for place, transform in enumerate(transforms):
        if not _is_random(transform):
          element = transform.map(element)
          continue
        rng = randomness.generator(
          self._seed,
          visit=row.step,
          record=row.position,
          view=row.view,
          stream=_stream(name, number, place),
        )
        element = transform.random_map(element, rng)
      out.append(self._checked_shape(name, one.id, element[name]))
    return out

  def _checked_shape(
    self, name: str, record_id: str, array: np.ndarray
  ) -> np.ndarray:
    """Raises where the transformations made another shape than declared."""
    shape = self._chains[name].shape
    if np.shape(array) != shape:
      checks.fail(
        f"config.data's transformations to give {name} arrays {list(shape)}",
        "End with what brings every item to that shape, or set image_size,"
        " image_channels and audio to what they give.",
        record=record_id,
        got=list(np.shape(array)),
      )
    return array

  def _decoded(self, position: int) -> _Decoded | None:
    """The fixed part of a record, from the cache if it is there."""
    if self._cache is None:
      return self._decode(position)
    if position not in self._cache:
      self._cache[position] = self._decode(position)
    return self._cache[position]

  def _decode(self, position: int) -> _Decoded | None:
    """Reads and decodes one record; None for a bad one that is skipped."""
    try:
      record = self._source[position]
      tokens = self.layout.tokens(record)
      items = {
        name: (self._stored[name][position],)
        if name in self._stored
        else tuple(
          self._fixed(chain, name, [(record.id, item)])[0]
          for item in record.media.get(name, ())
        )
        for name, chain in self._chains.items()
      }
    except sources.BadRecordError as error:
      self._note(error)
      return None
    return _Decoded(
      id=record.id, tokens=tokens, label=record.label or 0, items=items
    )

  def _fixed(
    self, chain: Chain, name: str, encoded: Sequence[tuple[str, bytes]]
  ) -> list[np.ndarray]:
    """Items, each with its record's id, after the fixed part."""
    elements: Sequence[Mapping[str, Any]] = [
      {"id": record_id, name: item} for record_id, item in encoded
    ]
    for transform in chain.fixed:
      elements = stages.map_many(transform, elements)
    arrays = [element[name] for element in elements]
    if not chain.random:
      for (record_id, _), array in zip(encoded, arrays, strict=True):
        self._checked_shape(name, record_id, array)
    return arrays

  def _note(self, error: sources.BadRecordError) -> None:
    """Counts a bad record, or raises."""
    if not self._skip:
      raise error
    self.bad_records.add(error.record_id, error.cause)


def _stream(name: str, number: int, place: int) -> int:
  """A number for each random transformation of each item of a record."""
  return (config_lib.MODALITIES.index(name) << 32) | (number << 16) | place
