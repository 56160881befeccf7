"""The records that an audit asks about, as arrays.

A pool is decoded once and kept in memory: shadow models are trained on parts of
it, and every model is asked about all of it. Anybody may change its rows (a
mislabelled record, a planted secret) with `with_rows`.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ppnet import config as config_lib
from ppnet.core import checks
from ppnet.data import batching, pipeline, sources
from ppnet.data import examples as examples_lib
from ppnet.train import loop


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pool:
  """n records, decoded, all padded to one length.

  Attributes:
    rows: what `data.examples.Examples.batch` gives, leaves [n, ...]; "index" is
      the place in the pool, and no row is padding.
    record_ids: one per record.
    groups: str[n] by name, "" where a record belongs to no such group.
  """

  rows: Mapping[str, np.ndarray]
  record_ids: Sequence[str]
  groups: Mapping[str, np.ndarray]

  def __post_init__(self) -> None:
    """Checks that rows, ids and groups are of the same n records."""
    size = len(self.record_ids)
    checks.positive(num_records=size)
    for name, array in {**self.rows, **self.groups}.items():
      if len(array) != size:
        checks.fail(f"{size} rows of {name!r}, one per record", got=len(array))
    if not np.array_equal(self.rows[batching.INDEX_KEY], np.arange(size)):
      checks.fail(
        "index 0, 1, 2, ... in a pool",
        "It is the place in the pool, which each record's noise is drawn from.",
        index=self.rows[batching.INDEX_KEY],
      )
    padding = self.rows[batching.PADDING_KEY]
    if padding.any():
      checks.fail(
        "a pool without padding", places=np.flatnonzero(padding).tolist()
      )

  def __len__(self) -> int:
    return len(self.record_ids)

  def with_rows(
    self,
    places: Sequence[int],
    rows: Mapping[str, np.ndarray],
    *,
    groups: Mapping[str, Sequence[str]] | None = None,
  ) -> "Pool":
    """A pool in which some records are others.

    Args:
      places: which, k of them.
      rows: arrays [k, ...] of the keys that change.
      groups: of the records at `places`, by name; a new name is "" elsewhere.

    Raises:
      ValueError: a key that the pool does not have, or another shape.
    """
    at = np.asarray(places)
    changed = {name: np.array(array) for name, array in self.rows.items()}
    for name, array in rows.items():
      if name not in changed or name == batching.INDEX_KEY:
        checks.fail(
          f"rows among {sorted(set(changed) - {batching.INDEX_KEY})}",
          checks.did_you_mean(name, changed).strip(),
          name=name,
        )
      shape = (len(places), *changed[name].shape[1:])
      if np.shape(array) != shape:
        checks.fail(f"{name} of shape {shape}", shape=np.shape(array))
      changed[name][at] = array
    labelled = {name: np.array(group) for name, group in self.groups.items()}
    for name, values in (groups or {}).items():
      group = labelled.get(name, np.full(len(self), "")).astype(object)
      group[at] = list(values)
      labelled[name] = group.astype(np.str_)
    return dataclasses.replace(self, rows=changed, groups=labelled)

  def fingerprint(self) -> str:
    """Of ids and contents: two pools that differ have two of them."""
    digest = hashlib.sha256()
    for name, array in sorted(self.rows.items()):
      digest.update(f"{name}{array.dtype}{array.shape}".encode())
      digest.update(np.ascontiguousarray(array).tobytes())
    for record_id in self.record_ids:
      digest.update(f"{len(record_id)}:{record_id}".encode())
    return digest.hexdigest()


def of_split(
  experiment: loop.Experiment, *, split: str, num_records: int | None = None
) -> Pool:
  """The first readable records of a split, without random transformations.

  A record that cannot be decoded is left out, where the config skips it.

  Args:
    experiment: from `train.loop.open_experiment`.
    split: "train" or "test".
    num_records: None takes all.

  Raises:
    ValueError: there are fewer.
    data.sources.BadRecordError: under RAISE.
  """
  dataset = experiment.datasets[split]
  size = len(dataset) if num_records is None else num_records
  checks.positive(num_records=size)
  checks.at_most(
    len(dataset),
    f"The {split} split has no more: lower audit.num_records.",
    num_records=size,
  )
  rows = dataset.batch(
    [examples_lib.Row(position) for position in range(size)],
    size=size,
    length=dataset.layout.longest,
  )
  experiment.note_bad_records(dataset.bad_records.causes)
  kept = np.flatnonzero(~rows[batching.PADDING_KEY])
  if not kept.size:
    checks.fail("a record that can be decoded", split=split)
  source = pipeline.open_source(
    experiment.config.data,
    loop.prepared_dir(experiment.config, experiment.workdir),
    split=split,
  )
  found = [source[position] for position in kept.tolist()]
  return Pool(
    rows=_renumbered({name: array[kept] for name, array in rows.items()}),
    record_ids=tuple(record.id for record in found),
    groups=_groups(found, experiment),
  )


def joined(first: Pool, second: Pool) -> Pool:
  """Two pools in one: members and non-members of a finished run, say.

  An id that both have gets its pool's number before it.

  Raises:
    ValueError: their rows have different keys or shapes.
  """
  both = set(first.record_ids) & set(second.record_ids)
  ids = [
    f"{number}:{record_id}" if record_id in both else record_id
    for number, pool in enumerate((first, second))
    for record_id in pool.record_ids
  ]
  if first.rows.keys() != second.rows.keys():
    checks.fail(
      "pools of the same arrays",
      first=sorted(first.rows),
      second=sorted(second.rows),
    )
  names = [name for name in first.groups if name in second.groups]
  return Pool(
    rows=_renumbered(
      {
        name: np.concatenate([array, second.rows[name]])
        for name, array in first.rows.items()
      }
    ),
    record_ids=tuple(ids),
    groups={
      name: np.concatenate([first.groups[name], second.groups[name]])
      for name in names
    },
  )


def check_trainable(config: config_lib.ExperimentConfig) -> None:
  """Raises where a unit is not one row of the pool, always the same.

  Shadow models see each record as one fixed row. What else a run may do with a
  record would make them other models than the ones that are asked about.
  """
  if config.privacy.unit is not config_lib.PrivacyUnit.EXAMPLE:
    checks.fail(
      "privacy.unit EXAMPLE, where shadow models are trained",
      "Their members are drawn record by record.",
      **{"privacy.unit": config.privacy.unit.name},
    )
  if config.train.views_per_example > 1 or config_lib.is_augmented(config.data):
    checks.fail(
      "one fixed view of each record, where shadow models are trained",
      "Leave out augmentations, and set --config.train.views_per_example=1.",
      views_per_example=config.train.views_per_example,
      augmented=config_lib.is_augmented(config.data),
    )
  if config.model.private_cut.layer is not None:
    checks.fail(
      "no private cut, where shadow models are trained",
      "Set --config.model.private_cut.layer=none.",
      **{"model.private_cut.layer": config.model.private_cut.layer},
    )


def _renumbered(rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The rows with their own places as "index"."""
  size = len(rows[batching.PADDING_KEY])
  return {**rows, batching.INDEX_KEY: np.arange(size, dtype=np.int32)}


def _groups(
  found: Sequence[sources.Record], experiment: loop.Experiment
) -> dict[str, np.ndarray]:
  """What is known of each record."""
  groups: dict[str, list[str]] = {
    "modality": [
      "+".join(
        [name for name in config_lib.MODALITIES if record.media.get(name)]
        + (["text"] if record.text else [])
      )
      for record in found
    ]
  }
  names = experiment.card.class_names
  if names and all(record.label is not None for record in found):
    groups["class"] = [str(names[_label(record)]) for record in found]
  if any(record.user is not None for record in found):
    groups["user"] = [record.user or "" for record in found]
  return {
    name: np.array(values, dtype=np.str_) for name, values in groups.items()
  }


def _label(record: Any) -> int:
  """The number of the record's class."""
  return int(record.label or 0)
