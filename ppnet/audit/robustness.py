"""How finished models bear noise and missing modalities, measured on the test.

Nothing is trained and nothing is attacked here: the models of an audit answer
the test records again, with something wrong about the records or the network.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ppnet import config as config_lib
from ppnet.audit import pool as pool_lib
from ppnet.audit import shadows as shadows_lib
from ppnet.audit import side_by_side
from ppnet.models import lora
from ppnet.train import step as step_lib

# Of media that were normalised to about unit variance.
INPUT_STDDEVS = (0.0, 0.25, 0.5, 1.0, 2.0)
# Share of a text's tokens that are replaced.
TOKEN_RATES = (0.0, 0.05, 0.1, 0.2, 0.4)
ATTENTION_STDDEVS = (0.0, 0.5, 1.0, 2.0, 4.0)
_MAX_RECORDS = 1000  # Of the test: the error is then 1.6 points at most.
_STDDEV_KEY = "attention_stddev"  # A row's, the same in all of them.
_SEED = 0  # Of the disturbance: the same for all models and rows of a table.


def measure(
  config: config_lib.ExperimentConfig,
  shadows: shadows_lib.Shadows,
  test: pool_lib.Pool,
  *,
  answer_ids: np.ndarray,
  devices: Sequence[jax.Device] | None = None,
) -> dict[str, Any]:
  """Accuracies of every model under disturbances of several strengths.

  | key | levels |
  | --- | --- |
  | input_noise | standard deviations of Gaussian noise on all media, or |
  | | where a record is text alone, shares of tokens replaced by others |
  | attention_noise | standard deviations, at test time |
  | left_out | modalities that no record has any more |

  All levels share their draws, so a curve is not bent by luck.

  Args:
    config: the experiment.
    shadows: trained models.
    test: records with labels; the first thousand are asked.
    answer_ids: token of each class.
    devices: all of this process when None.

  Returns:
    For each key "levels", and "accuracy", one list of numbers per level, a
    number per model; "kind" of input noise is "stddev" or "token_rate".
  """
  test = _first(test, _MAX_RECORDS)
  asked = Asked(config, shadows, devices=devices)

  def accuracy(records: pool_lib.Pool, **disturbance: Any) -> list[float]:
    # Over the whole vocabulary, as `train.metrics` has it.
    right = answer_ids[records.rows["label"]]
    found = (
      (logits.argmax(axis=-1) == right).mean(axis=1).tolist()
      for logits in asked(records, **disturbance)
    )
    return list(itertools.chain.from_iterable(found))

  media = [name for name in config_lib.MODALITIES if name in test.rows]
  levels = INPUT_STDDEVS if media else TOKEN_RATES
  found: dict[str, Any] = {
    "input_noise": {
      "kind": "stddev" if media else "token_rate",
      "levels": levels,
      "accuracy": [accuracy(disturbed(test, level)) for level in levels],
    },
    "attention_noise": {
      "levels": ATTENTION_STDDEVS,
      "accuracy": [
        accuracy(test, attention_stddev=level) for level in ATTENTION_STDDEVS
      ],
    },
  }
  if len(media) > 1:
    found["left_out"] = {
      "levels": ["nothing", *media],
      "accuracy": [
        accuracy(test),
        *(accuracy(test, left_out=name) for name in media),
      ],
    }
  return found


def _first(pool: pool_lib.Pool, count: int) -> pool_lib.Pool:
  """The first records of a pool."""
  return pool_lib.Pool(
    rows={name: array[:count] for name, array in pool.rows.items()},
    record_ids=tuple(pool.record_ids[:count]),
    groups={name: group[:count] for name, group in pool.groups.items()},
  )


def disturbed(pool: pool_lib.Pool, level: float) -> pool_lib.Pool:
  """The pool with noisy media, or where it has none, with replaced tokens.

  A token is replaced by one that some record of the pool has in the same place
  or another; the first token, which begins every record, stays.

  Args:
    pool: of records.
    level: standard deviation, or share of tokens in [0, 1].
  """
  if level == 0:
    return pool
  random = np.random.default_rng(_SEED)
  rows = dict(pool.rows)
  media = [name for name in config_lib.MODALITIES if name in rows]
  for name in media:
    noise = random.standard_normal(rows[name].shape, dtype=np.float32)
    rows[name] = (rows[name] + level * noise).astype(rows[name].dtype)
  if not media:
    tokens = rows["tokens"]
    others = random.choice(tokens[:, 1:].ravel(), tokens.shape)
    hit = random.random(tokens.shape) < level
    hit[:, 0] = False
    rows["tokens"] = np.where(hit, others, tokens)
  return dataclasses.replace(pool, rows=rows)


class Asked:
  """Models that answer again and again, compiled once for each way of asking.

  How strong a noise is makes no other program: the standard deviation of
  attention noise goes in beside the records.
  """

  def __init__(
    self,
    config: config_lib.ExperimentConfig,
    shadows: shadows_lib.Shadows,
    *,
    devices: Sequence[jax.Device] | None,
  ):
    """Compiles nothing yet; see `measure`."""
    self._config = config
    self._shadows = shadows
    self._devices = devices
    self._beside: dict[int, side_by_side.SideBySide] = {}  # By size.
    self._ways: dict[tuple[bool | None, str], Callable[..., Any]] = {}

  def __call__(
    self,
    test: pool_lib.Pool,
    *,
    attention_stddev: float | None = None,
    left_out: str = "",
  ) -> Iterator[np.ndarray]:
    """Logits of each group, f32[G, n, V].

    Args:
      test: n records with labels.
      attention_stddev: of attention noise; None is as configured.
      left_out: a modality that no record has.
    """
    has_noise = None if attention_stddev is None else attention_stddev > 0
    if has_noise is False and not self._config.attention_noise.at_evaluation:
      has_noise = None  # The same thing.
    if has_noise:
      stddev = np.full(len(test), attention_stddev, np.float32)
      test = dataclasses.replace(test, rows={**test.rows, _STDDEV_KEY: stddev})
    way = has_noise, left_out
    answers = self._ways.setdefault(way, self._answers(*way))
    size = self._config.perf.microbatch_size
    for group in self._shadows.groups():
      count = len(group.models)
      if count not in self._beside:
        self._beside[count] = side_by_side.SideBySide(
          self._shadows.program,
          num_models=count,
          microbatch_size=size,
          devices=self._devices,
        )
      yield self._beside[count].over_records(
        answers,
        group.params,
        group.init_roots,
        test,
        batch_size=min(size, len(test)),
      )

  def _answers(
    self, has_noise: bool | None, left_out: str
  ) -> Callable[..., Any]:
    """A function for `SideBySide.over_records`."""
    model, configured = (
      self._shadows.program.model,
      self._config.attention_noise,
    )

    def answers(
      params: Any, batch: Mapping[str, jax.Array], key: jax.Array, frozen: Any
    ) -> jax.Array | None:
      noise_config = configured
      if has_noise is not None:
        stddev: Any = batch[_STDDEV_KEY][0] if has_noise else 0.0
        noise_config = dataclasses.replace(
          configured,
          stddev=stddev,
          at_evaluation=has_noise,
        )
      kept = {
        name: array
        for name, array in batch.items()
        if name not in (left_out, _STDDEV_KEY)
      }
      return step_lib.evaluate(
        lora.combine(params, frozen),
        kept,
        key,
        model=model,
        noise_config=noise_config,
      )[1]

    return answers
