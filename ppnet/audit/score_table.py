"""What attacks are made of: scores of every record under every model.

The table crosses a border: whatever trains and scores models fills it in, and
whatever attacks, bounds and reports needs no model any more. NumPy only.

>>> table = ScoreTable(
...   scores={"loss": np.array([[0.1, 0.9], [0.8, 0.2]])},
...   membership=np.array([[False, True], [True, False]]),
...   record_ids=("a", "b"),
...   groups={"class": np.array(["cat", "dog"])},
...   partner=np.array([1, 0]),
... )
>>> table.others(0)
array([], dtype=int64)
"""

import dataclasses
import io
import pathlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ppnet.core import checks, records

_PREFIXES = {"scores": "score/", "groups": "group/"}
_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreTable:
  """Scores and memberships of n records under M models.

  | edge case | result |
  | --- | --- |
  | a score that is not finite | `ValueError`: no attack can rank it |
  | two models that are partners and share a record | `ValueError` |
  | a model without a partner (a finished run) | `partner` is -1 |
  | one record named twice | `ValueError` |
  | no scores, no models or no records | `ValueError` |

  Attributes:
    scores: f64[M, n] by name, all oriented so that a higher one says "member":
      "loss" is minus the loss. `ppnet.audit.scores` has the names.
    membership: whether record i was trained on by model m, bool[M, n].
    record_ids: one name per record, n distinct ones.
    groups: str[n] by name ("class", "modality", "user", "canary"), "" where a
      record belongs to no such group.
    partner: the model trained on exactly the other records, i64[M]; -1 for one
      without. An attack on model m that looked at its partner would be told the
      membership, so nobody may: see `others`.
  """

  scores: Mapping[str, np.ndarray]
  membership: np.ndarray
  record_ids: Sequence[str]
  groups: Mapping[str, np.ndarray]
  partner: np.ndarray

  def __post_init__(self) -> None:
    """Checks shapes, values and that partners complement each other."""
    membership = self.membership
    if membership.ndim != 2 or membership.dtype != np.bool_:
      checks.fail(
        "membership bool[models, records]",
        shape=membership.shape,
        dtype=str(membership.dtype),
      )
    num_models, num_records = membership.shape
    checks.positive(num_models=num_models, num_records=num_records)
    if not self.scores:
      checks.fail("at least one score", scores=list(self.scores))
    for name, scores in self.scores.items():
      _check_shape(f"scores[{name!r}]", scores, membership.shape)
      if not np.isfinite(scores).all():
        checks.fail(
          f"only finite scores {name!r}",
          "A model that diverged has none: lower optimizer.learning_rate.",
          models=np.flatnonzero(~np.isfinite(scores).all(axis=1)).tolist(),
        )
    for name, group in self.groups.items():
      _check_shape(f"groups[{name!r}]", group, (num_records,))
    if len(self.record_ids) != num_records:
      checks.fail(f"{num_records} record_ids", got=len(self.record_ids))
    if len(set(self.record_ids)) != num_records:
      checks.fail(
        "record_ids that tell records apart",
        num_records=num_records,
        distinct=len(set(self.record_ids)),
      )
    _check_partners(self.partner, membership)

  @property
  def num_models(self) -> int:
    """Of the table's M."""
    return self.membership.shape[0]

  @property
  def num_records(self) -> int:
    """Of the table's n."""
    return self.membership.shape[1]

  def others(self, model: int) -> np.ndarray:
    """The models that an attack on `model` may look at, i64[<= M - 1].

    All but itself and its partner, whose members are the records that `model`
    was not trained on.
    """
    numbers = np.arange(self.num_models)
    return numbers[(numbers != model) & (numbers != self.partner[model])]

  def save(self, path: pathlib.Path) -> None:
    """Writes `path` (.npz), and a description for people beside it (.json).

    The .npz holds everything and is replaced in one rename, so a kill leaves
    the old table or the new one. The JSON is never read back.
    """
    path = _checked_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {
      f"{_PREFIXES['scores']}{name}": np.asarray(scores, np.float64)
      for name, scores in self.scores.items()
    } | {
      f"{_PREFIXES['groups']}{name}": np.asarray(group, np.str_)
      for name, group in self.groups.items()
    }
    content = io.BytesIO()
    # Savez takes names as keywords; "score/loss" is one all the same.
    np.savez_compressed(
      content,
      allow_pickle=False,
      version=np.int64(_VERSION),
      membership=self.membership,
      partner=np.asarray(self.partner, np.int64),
      record_ids=np.asarray(self.record_ids, np.str_),
      **arrays,
    )
    records.write_bytes(path, content.getvalue())
    records.write_json(path.with_suffix(".json"), self._description())

  def _description(self) -> dict[str, object]:
    """What the .npz holds, in words and counts."""
    return {
      "version": _VERSION,
      "num_models": self.num_models,
      "num_records": self.num_records,
      "scores": sorted(self.scores),
      "orientation": "a higher score says that the record is a member",
      "members_of_each_model": self.membership.sum(axis=1).tolist(),
      "partner": np.asarray(self.partner).tolist(),
      "groups": {
        name: {
          str(value): int(count)
          for value, count in zip(
            *np.unique(np.asarray(group, np.str_), return_counts=True),
            strict=True,
          )
        }
        for name, group in self.groups.items()
      },
    }


def load(path: pathlib.Path) -> ScoreTable:
  """Reads what `ScoreTable.save` wrote.

  Raises:
    ValueError: there is no such file, or another version wrote it.
  """
  path = _checked_path(path)
  if not path.exists():
    checks.fail("a saved score table", "Run job=AUDIT first.", path=str(path))
  with np.load(path, allow_pickle=False) as saved:
    version = int(saved["version"]) if "version" in saved.files else None
    if version != _VERSION:
      checks.fail(
        f"a score table of version {_VERSION}",
        "Delete it and score again.",
        path=str(path),
        version=version,
      )
    named = {
      which: {
        name.removeprefix(prefix): saved[name]
        for name in saved.files
        if name.startswith(prefix)
      }
      for which, prefix in _PREFIXES.items()
    }
    return ScoreTable(
      scores=named["scores"],
      membership=saved["membership"],
      record_ids=tuple(saved["record_ids"].tolist()),
      groups=named["groups"],
      partner=saved["partner"],
    )


def kept(
  path: pathlib.Path,
  *,
  made_from: Mapping[str, object],
  make: Callable[[], ScoreTable],
) -> ScoreTable:
  """The table in a file, or where it is of something else, a new one in it.

  What it was made from stands in `path` with the suffix .made-from.json, which
  is removed before the table is replaced and written after it: a kill in
  between costs a table and mixes none.

  Args:
    path: of the table (.npz).
    made_from: plain values that all scores follow from.
    make: computes the table.
  """
  path = _checked_path(path)
  beside = path.with_suffix(".made-from.json")
  plain = records.to_plain(dict(made_from))
  if path.exists() and beside.exists() and records.read_json(beside) == plain:
    return load(path)
  table = make()
  beside.unlink(missing_ok=True)
  table.save(path)
  records.write_json(beside, plain)
  return table


def _checked_path(path: pathlib.Path) -> pathlib.Path:
  """The path, which must end as what is written does."""
  path = pathlib.Path(path)
  if path.suffix != ".npz":
    checks.fail("a path that ends in .npz", path=str(path))
  return path


def _check_shape(name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
  """Raises unless the array has the shape."""
  if np.shape(array) != shape:
    checks.fail(f"{name} of shape {shape}", shape=np.shape(array))


def _check_partners(partner: np.ndarray, membership: np.ndarray) -> None:
  """Raises unless partners name each other and share no record."""
  num_models = len(membership)
  _check_shape("partner", partner, (num_models,))
  for model, other in enumerate(np.asarray(partner).tolist()):
    if other == -1:
      continue
    if not (
      0 <= other < num_models and other != model and partner[other] == model
    ):
      checks.fail(
        "partner to name each other's index, or -1",
        model=model,
        partner=other,
      )
    if (membership[model] == membership[other]).any():
      checks.fail(
        "partners trained on complementary records",
        "Give -1 to models that are no pair.",
        models=(model, other),
        shared=int((membership[model] == membership[other]).sum()),
      )
