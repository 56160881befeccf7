"""Secrets planted in the training set, and how exposed they are afterwards.

A canary is a record of the training set whose secret part was replaced by one
that is drawn at random: so whoever has not seen it can only guess, and what a
model knows of it, it knows from training (Carlini et al. 2019, "The Secret
Sharer", https://arxiv.org/abs/1802.08232).

| task | what is planted | what is secret |
| --- | --- | --- |
| CAUSAL, text | "The secret number of kqzrw is 483920" | the digits |
| CAUSAL, with media | that sentence as the caption of a picture | the digits |
| ANSWER | random digits as the answer to the record | the answer |
| CLASSIFY | another class as the record's label | which one |

With media the canary is cross-modal: the caption of a planted picture, the word
of a planted recording, the label of either.

*Exposure* of a secret among R candidates is log2 R - log2 rank (equation 4),
the rank by the model's own loss. The secret and the candidates are drawn alike,
so without training on it the rank is uniform: rank / R is a p-value, and the
exposure has a mean of about log2 e = 1.44 bits.
"""

import dataclasses
import string
from collections.abc import Mapping, Sequence
from typing import Any, SupportsIndex

import numpy as np
from scipy import stats

from ppnet import config as config_lib
from ppnet.core import checks
from ppnet.data import examples as examples_lib
from ppnet.data import sources
from ppnet.train import loop

_SENTENCE = "The secret number of {name} is {secret}"
_NAME_LETTERS = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Canary:
  """One secret and where it is planted.

  Attributes:
    position: of the record whose place it takes in the training set.
    record: as planted.
    task: which part of the record is secret.
    template: of the text, with a place for the secret; "{secret}" alone where
      all of the answer is secret.
    secret: digits, or the number of a class.
    candidates: what the secret was drawn from, or a random part of it, the
      secret at a random place in it.
  """

  position: int
  record: sources.Record
  task: config_lib.Task
  template: str
  secret: str
  candidates: tuple[str, ...]

  @property
  def kind(self) -> str:
    """Which modalities lead to the secret, for groups in tables."""
    return "+".join([*sorted(self.record.media), "text"])

  def with_secret(self, secret: str) -> sources.Record:
    """The same record with another secret."""
    return _with_secret(self.record, self.task, self.template, secret)


def make(
  originals: Mapping[int, sources.Record],
  *,
  task: config_lib.Task,
  num_classes: int,
  num_digits: int = 6,
  num_candidates: int = 512,
  seed: int,
) -> list[Canary]:
  """One canary in the place of each record.

  Args:
    originals: position in the training set to the record there, from
      `data.pipeline.open_source`.
    task: `config.data.task`.
    num_classes: of the data set; read under CLASSIFY.
    num_digits: of a secret number.
    num_candidates: how many candidates a canary is ranked among at most; its
      exposure is at most the log2 of it.
    seed: of names, secrets and candidates.

  Raises:
    ValueError: fewer than three classes, so that there is no choice of a wrong
      one, or fewer than two candidates.
  """
  if num_candidates < 2:
    checks.fail("at least two candidates", num_candidates=num_candidates)
  rng = np.random.default_rng(seed)
  made = []
  for position, original in sorted(originals.items()):
    if task is config_lib.Task.CLASSIFY:
      if num_classes < 3:
        checks.fail(
          "at least three classes, to choose a wrong one of",
          num_classes=num_classes,
        )
      space = [str(n) for n in range(num_classes) if n != original.label]
      template = "{secret}"
    else:
      space = None
      name = "".join(rng.choice([*string.ascii_lowercase], _NAME_LETTERS))
      template = (
        _SENTENCE.replace("{name}", name)
        if task is config_lib.Task.CAUSAL
        else "{secret}"
      )
    candidates = _candidates(rng, space, num_digits, num_candidates)
    secret = str(rng.choice(candidates))
    made.append(
      Canary(
        position=position,
        record=_with_secret(original, task, template, secret),
        task=task,
        template=template,
        secret=secret,
        candidates=candidates,
      )
    )
  return made


def _candidates(
  rng: np.random.Generator,
  space: Sequence[str] | None,
  num_digits: int,
  count: int,
) -> tuple[str, ...]:
  """Distinct equally likely secrets, at most `count`, in random order."""
  if space is None:
    total = 10**num_digits
    drawn = rng.choice(total, size=min(count, total), replace=False)
    return tuple(f"{number:0{num_digits}d}" for number in drawn)
  return tuple(rng.permutation(np.array(space))[:count].tolist())


def _with_secret(
  record: sources.Record, task: config_lib.Task, template: str, secret: str
) -> sources.Record:
  """The record, its secret part replaced."""
  if task is config_lib.Task.CLASSIFY:
    return dataclasses.replace(record, label=int(secret))
  words = template.replace("{secret}", secret)
  if task is config_lib.Task.ANSWER:
    return dataclasses.replace(record, answer=words)
  return dataclasses.replace(record, text=words)


class Held:
  """A source of records that are in memory; see `data.sources.Source`."""

  def __init__(self, records: Sequence[sources.Record]):
    """Keeps them."""
    self._records = list(records)

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: SupportsIndex) -> sources.Record:
    return self._records[index.__index__()]

  def user(self, index: SupportsIndex) -> str | None:
    """Whose the record is."""
    return self[index].user

  @property
  def description(self) -> str:
    """What this is."""
    return f"{len(self)} records in memory"


def examples(
  dataset: examples_lib.Examples, records: Sequence[sources.Record]
) -> examples_lib.Examples:
  """Records as examples of the same form as those of `dataset`.

  Raises (when read):
    sources.BadRecordError: a record that the layout has no room for.
  """
  return examples_lib.Examples(
    Held(records),
    layout=dataset.layout,
    chains=dataset.chains,
    skip=False,
    cache=False,
    seed=0,
  )


def plant(
  pool: Mapping[str, np.ndarray],
  canaries: Sequence[Canary],
  *,
  dataset: examples_lib.Examples,
) -> dict[str, np.ndarray]:
  """The pool with canaries in the rows of their positions.

  Args:
    pool: arrays [n, ...] of the first n training records, in order, as
      `data.examples.Examples.batch` gives them at the longest length.
    canaries: each with a position below n.
    dataset: whose records the pool has.

  Returns:
    Copies; "index" stays.

  Raises:
    ValueError: two canaries in one place, a place that the pool does not have,
      or a secret that was cut off because its text is too long.
  """
  positions = [canary.position for canary in canaries]
  if len(set(positions)) < len(positions):
    checks.fail("canaries in different places", positions=sorted(positions))
  planted = {name: array.copy() for name, array in pool.items()}
  if not canaries:
    return planted
  checks.at_most(len(pool["index"]) - 1, position=max(positions))
  rows = examples(dataset, [canary.record for canary in canaries])
  for canary in canaries:
    _check_not_cut(canary, dataset)
  batch = rows.batch(
    [examples_lib.Row(place) for place in range(len(canaries))],
    size=len(canaries),
    length=pool["tokens"].shape[1],
  )
  for name, array in batch.items():
    if name != "index":
      planted[name][positions] = array
  return planted


def _check_not_cut(canary: Canary, dataset: examples_lib.Examples) -> None:
  """Raises where the end of the text, which is the secret, is not trained on.

  An answer that does not fit is refused by the layout; a class always fits.
  """
  if canary.task is not config_lib.Task.CAUSAL:
    return
  tokens = dataset.layout.tokens(canary.record)
  if tokens.num_bytes < len(canary.record.text.encode()):
    checks.fail(
      "the text of a canary to fit into a row",
      "Raise model.decoder.max_seq_len or the last of data.lengths.",
      text=canary.record.text,
      bytes_that_fit=tokens.num_bytes,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExposureAudit:
  """How exposed secrets are.

  Attributes:
    exposures: log2 R - log2 rank of each canary, bits, f64[n].
    ranks: 1 is the likeliest candidate; candidates as likely as the secret
      come before it, i64[n].
    extrapolated: the exposure that a skew-normal fit to the other candidates'
      losses gives (Section 4.3 there), f64[n]; not bounded by log2 R, and only
      as good as the fit. NaN with fewer than 30 candidates.
    num_candidates: R of each canary, i64[n].
    kinds: `Canary.kind` of each.
    chance: mean exposure of a secret that was never seen, bits, over these R.
  """

  exposures: np.ndarray
  ranks: np.ndarray
  extrapolated: np.ndarray
  num_candidates: np.ndarray
  kinds: Sequence[str]
  chance: float


def exposure(losses: np.ndarray, secret: int) -> tuple[float, int]:
  """Exposure in bits, and rank, of one candidate.

  Args:
    losses: of all candidates, float[R]: -log probability, not per token.
    secret: which of them is the secret.

  Returns:
    (log2 R - log2 rank, rank). Ties count against exposure.
  """
  rank = int((losses <= losses[secret]).sum())
  if not np.isfinite(losses).all():
    checks.fail("finite losses", losses=losses)
  return float(np.log2(len(losses)) - np.log2(rank)), rank


def extrapolated_exposure(losses: np.ndarray, secret: int) -> float:
  """-log2 of the share of candidates below, from a skew-normal fit, bits.

  NaN with fewer than 30 other candidates or where all are equally likely.
  """
  others = np.delete(losses, secret)
  if len(others) < 30 or np.ptp(others) == 0:
    return float("nan")
  mean, deviation = others.mean(), others.std()
  # Moments, not likelihood: three numbers that cannot fail to converge. No
  # skew-normal is as skewed as 0.995.
  skew = float(np.clip(stats.skew(others), -0.99, 0.99))
  ratio = np.abs(skew) ** (2 / 3)
  delta = np.sign(skew) * np.sqrt(
    np.pi / 2 * ratio / (ratio + ((4 - np.pi) / 2) ** (2 / 3))
  )
  shape = delta / np.sqrt(1 - delta**2)
  scale = deviation / np.sqrt(1 - 2 * delta**2 / np.pi)
  place = mean - scale * delta * np.sqrt(2 / np.pi)
  log_share = stats.skewnorm.logcdf(
    losses[secret], shape, loc=place, scale=scale
  )
  return float(max(-log_share / np.log(2), 0.0))


def candidate_losses(
  experiment: loop.Experiment, params: Any, canaries: Sequence[Canary]
) -> list[np.ndarray]:
  """What the model says of each candidate, in batches.

  Args:
    experiment: from `train.loop.open_experiment`.
    params: parameters on the program's mesh.
    canaries: from `make`.

  Returns:
    For each canary -log probability of the record with each of its candidates,
    over all tokens that count, float64 [R], nats.
  """
  if not canaries:
    return []
  records = [
    canary.with_secret(secret)
    for canary in canaries
    for secret in canary.candidates
  ]
  held = examples(experiment.datasets["train"], records)
  found = loop.predictions(
    dataclasses.replace(experiment, datasets={"train": held}),
    params,
    split="train",
  )
  totals = found.losses.astype(np.float64) * found.num_targets
  ends = np.cumsum([len(canary.candidates) for canary in canaries])
  return np.split(totals, ends[:-1])


def audit_exposure(
  experiment: loop.Experiment, params: Any, canaries: Sequence[Canary]
) -> ExposureAudit:
  """Exposure of each canary in a trained model.

  Args:
    experiment: from `train.loop.open_experiment`.
    params: of the model, on the program's mesh.
    canaries: planted in its training set or, as controls, not.
  """
  losses = candidate_losses(experiment, params, canaries)
  secrets = [canary.candidates.index(canary.secret) for canary in canaries]
  found = [exposure(*pair) for pair in zip(losses, secrets, strict=True)]
  counts = np.array([len(each) for each in losses], np.int64)
  return ExposureAudit(
    exposures=np.array([bits for bits, _ in found]),
    ranks=np.array([rank for _, rank in found], np.int64),
    extrapolated=np.array(
      [
        extrapolated_exposure(*pair)
        for pair in zip(losses, secrets, strict=True)
      ]
    ),
    num_candidates=counts,
    kinds=tuple(canary.kind for canary in canaries),
    chance=float(np.mean([chance_exposure(count) for count in counts])),
  )


def chance_exposure(num_candidates: int) -> float:
  """Mean exposure of a secret whose rank is uniform, bits."""
  ranks = np.arange(1, num_candidates + 1)
  return float(np.log2(num_candidates) - np.log2(ranks).mean())
