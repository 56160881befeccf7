"""Other libraries on the features of a record of `configs/records`.

A record without a published number is compared with the best of what Opacus
and JAX-Privacy recommend themselves: they train a linear classifier on the very
features that the record's model multiplies by its matrix, at the same epsilon
and delta, on the same training split, and are scored on the same test split.

The best recipe of a library is chosen by these scores, on the test split, and
its choice is not accounted for: both favour the library. Beside the recipes
each library trains with the record's own settings, which tells a difference of
settings from one of engines.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from ppnet import config as config_lib
from ppnet.bench import measure, peers, recipes
from ppnet.core import allocator, checks, records
from ppnet.data import pipeline, prepare, tokenizers
from ppnet.models import centring, linear
from ppnet.privacy import accounting
from ppnet.train import loop, losses, metrics

_RECORD = "bench.json"
_HEAD = "head"  # The layer whose input the features are.
OWN = "the record's settings"


def run(
  config: config_lib.ExperimentConfig,
  workdir: pathlib.Path,
  *,
  log: Any = sys.stderr,
) -> dict[str, Any]:
  """Trains by each recipe with `bench.rounds` seeds; writes `bench.json`.

  It is written after each recipe; interrupted, the same command goes on.

  Args:
    config: a record's; `bench.cases` names libraries, "default" is all.
    workdir: its folder; data are prepared below it, or in `data.prepared_dir`.
    log: where progress goes.

  Returns:
    The record that `bench.json` holds. For each row its settings, its noise,
    epsilon by the library's accountant and by ours, and a number per seed of
    `accuracy`, `f1` and `auc_roc`.

  Raises:
    ValueError: the configuration is no linear classifier's, or protects neither
      single examples nor users with as many records each, or names an unknown
      library.
  """
  _check(config)
  known = {library.value: library for library in recipes.Library}
  wanted = measure.named(
    ",".join(known)
    if config.bench.cases in ("own", "default")
    else config.bench.cases,
    known,
    also=["default"],
  )
  if jax.default_backend() == "cpu":
    allocator.keep_freed()  # A gradient for each example, in every step.
  folder = loop.prepared_dir(config, workdir)
  prepare.prepare(config.data, folder)
  data = features(config, folder)
  is_of_users = config.privacy.unit is config_lib.PrivacyUnit.USER
  chosen = [
    recipe
    for library in wanted
    for recipe in (
      *(
        recipe
        for recipe in recipes.STOCK
        if recipe.library is library and recipe.is_of_users == is_of_users
      ),
      *of_record(config, library, num_examples=len(data.train_labels)),
    )
  ]
  record = {
    "subject": config.bench.subject,
    "machine": measure.machine(packages=("torch", "opacus", "jax-privacy")),
    "rounds": config.bench.rounds,
    "is_complete": False,
    "name": config.name,
    "epsilon": config.privacy.epsilon,
    "delta": config.privacy.delta,
    "num_train": data.train_labels.size,
    "num_users": len(data.train_labels) if is_of_users else None,
    "num_test": len(data.test_labels),
    "num_features": data.train_features.shape[-1],
    "num_classes": data.num_classes,
    "rows": [],
  }
  finished = _finished(workdir / _RECORD)
  with tqdm.tqdm(total=len(chosen) * config.bench.rounds, file=log) as bar:
    for recipe in chosen:
      bar.set_postfix_str(f"{recipe.library.value}, {recipe.name}")
      row = next((r for r in finished if _is_of(r, recipe)), None)
      if row is None:
        row = _row(recipe, data, config, on_run=bar.update)
      else:
        bar.update(len(row["scores"]))
      record["rows"].append(row)
      records.write_json(workdir / _RECORD, record)
  _mark_best(record["rows"], num_classes=data.num_classes)
  record["is_complete"] = True
  records.write_json(workdir / _RECORD, record)
  return records.to_plain(record)


def _finished(file: pathlib.Path) -> list[dict[str, Any]]:
  """Rows of a run of this very configuration that was interrupted."""
  if not file.exists():
    return []
  record = records.read_json(file)
  return [] if record["is_complete"] else record["rows"]


def _is_of(row: Mapping[str, Any], recipe: recipes.Recipe) -> bool:
  """Whether a row on disk has the scores of this recipe."""
  return bool(row["scores"]) and row["recipe"] == records.to_plain(recipe)


def features(
  config: config_lib.ExperimentConfig, folder: pathlib.Path
) -> recipes.Data:
  """What the record's model multiplies by its matrix, of every record.

  The model itself runs, up to its last layer, so that whatever it makes of
  pictures, sounds or tokens is in here. Two things are not: the factor that
  gives each record's features one norm, which is a setting beside rate and clip
  norm, and what the model measures privately as it is trained (mean,
  covariance and directions), which no other library could.

  Args:
    config: the record's.
    folder: its prepared data.

  Raises:
    ValueError: units are users, and some have more records than others.
  """
  card = prepare.read_card(folder)
  tokenizer = tokenizers.load(config.data, folder, class_names=card.class_names)
  assert config.model.linear is not None, "checked"
  model = linear.LinearClassifier(
    dataclasses.replace(
      config.model.linear,
      feature_norm=0.0,
      centre=False,
      num_leading=0,
      num_directions=0,
      rarity_power=0.0,
    ),
    config.model.decoder.vocab_size,
    tuple(tokenizer.answer_ids.tolist()),
  )
  split_arrays: list[np.ndarray] = []
  for split in ("train", "test"):
    inputs, labels = [], []
    for batch in pipeline.eval_batches(
      pipeline.examples(config, folder, split=split),
      batch_size=config.perf.microbatch_size,
    ):
      real = ~batch["is_padding_example"]
      inputs.append(_head_inputs(model, batch)[real])
      labels.append(batch["label"][real])
    split_arrays += [
      np.concatenate(inputs),
      np.concatenate(labels).astype(np.int64),
    ]
  data = recipes.Data(*split_arrays, num_classes=len(tokenizer.answer_ids))
  by_user = loop.records_by_user(config, folder)
  if by_user is None:
    return data
  counts = {len(positions) for positions in by_user}
  if len(counts) > 1:
    checks.fail(
      "as many training records of each user",
      "The libraries' clipped gradients take units of one size.",
      records=sorted(counts),
    )
  order = np.stack(by_user)
  return data._replace(
    train_features=data.train_features[order],
    train_labels=data.train_labels[order],
  )


def _head_inputs(model: Any, batch: Mapping[str, np.ndarray]) -> np.ndarray:
  """Features f32[B, D] of a batch, without the one whose weight is the bias."""
  found = []

  def keep(next_fun, args, kwargs, context):
    is_head = context.module.name == _HEAD
    if not is_head or context.method_name != "__call__":
      return next_fun(*args, **kwargs)
    found.append(args[0])
    return jnp.zeros((*args[0].shape[:-1], context.module.features))

  arrays = {name: jnp.asarray(value) for name, value in batch.items()}
  with nn.intercept_methods(keep):
    losses.predict(model, {}, arrays, noise=None)
  (inputs,) = found
  assert bool((inputs[..., -1] == 1).all()), "the bias is another one"
  return np.asarray(inputs[:, 0, :-1], np.float32)


def of_record(
  config: config_lib.ExperimentConfig,
  library: recipes.Library,
  *,
  num_examples: int,
) -> tuple[recipes.Recipe, ...]:
  """The record's own settings as a recipe; none where there is no equal.

  Equals are made of SGD at a constant rate, with momentum or without, and flat
  clipping of whole gradients.
  """
  optimizer, train, privacy = config.optimizer, config.train, config.privacy
  is_of_users = privacy.unit is config_lib.PrivacyUnit.USER
  has_equal = (
    not (is_of_users and library is recipes.Library.OPACUS)
    and optimizer.name is config_lib.OptimizerName.SGD
    and optimizer.schedule is config_lib.Schedule.CONSTANT
    and not optimizer.warmup_steps
    and not optimizer.weight_decay
    and optimizer.ema_decay is None
    and privacy.clip_rule is config_lib.ClipRule.CLIP
    and privacy.clip_scope is config_lib.ClipScope.FLAT
    and privacy.clip_quantile is None
  )
  if not has_equal:
    return ()
  assert config.model.linear is not None, "checked"
  return (
    recipes.Recipe(
      name=OWN,
      library=library,
      source=config.name,
      learning_rate=optimizer.learning_rate,
      momentum=optimizer.beta1,
      batch_size=train.expected_batch_size,
      num_epochs=train.num_steps * train.expected_batch_size / num_examples,
      l2_clip_norm=privacy.l2_clip_norm,
      begins_at_zero=True,
      feature_norm=config.model.linear.feature_norm,
      is_of_users=is_of_users,
    ),
  )


def _check(config: config_lib.ExperimentConfig) -> None:
  """Raises `ValueError` where there is nothing to compare with."""
  if config.model.linear is None:
    checks.fail(
      "a linear model",
      "Take a config of configs/records.",
      **{"model.linear": config.model.linear},
    )
  if (
    config.privacy.epsilon is None
    or config.privacy.unit is config_lib.PrivacyUnit.PACKED_ROW
  ):
    checks.fail(
      "privacy.epsilon, for single examples or users",
      "The libraries calibrate their own noise, and protect these.",
      **{
        "privacy.epsilon": config.privacy.epsilon,
        "privacy.unit": config.privacy.unit.name,
      },
    )


def _scaled(data: recipes.Data, norm: float) -> recipes.Data:
  """The features of each record at one norm."""

  def scale(x: np.ndarray) -> np.ndarray:
    flat = jnp.asarray(x.reshape(-1, x.shape[-1]))
    return np.array(centring.scaled(flat, norm=norm)).reshape(x.shape)

  return data._replace(
    train_features=scale(data.train_features),
    test_features=scale(data.test_features),
  )


def _row(
  recipe: recipes.Recipe,
  data: recipes.Data,
  config: config_lib.ExperimentConfig,
  *,
  on_run: Any,
) -> dict[str, Any]:
  """One recipe, all seeds; a hole where its library is missing."""
  row: dict[str, Any] = {
    "name": recipe.name,
    "case": f"epsilon {config.privacy.epsilon:g}",
    "framework": recipe.library.value,
    "is_peer": True,
    "is_baseline": False,
    "is_stock": recipe.name != OWN,
    "is_best": False,
    "time_ratio": None,
    "memory_ratio": None,
    "recipe": recipe,
    "note": peers.missing(*recipes.PACKAGES[recipe.library]),
    "scores": [],
  }
  if row["note"]:
    return row
  epsilon, delta = config.privacy.epsilon, config.privacy.delta
  assert epsilon is not None, "checked"
  plan = recipes.plan(
    recipe, num_examples=len(data.train_labels), epsilon=epsilon, delta=delta
  )
  row |= plan._asdict() | {
    "epsilon_pld": accounting.epsilon(
      noise_multiplier=plan.noise_multiplier,
      sampling_prob=plan.sampling_prob,
      num_steps=plan.num_steps,
      delta=delta,
    )
  }
  seeds = range(config.seed, config.seed + config.bench.rounds)
  trained = recipes.train(
    recipe, plan, _scaled(data, recipe.feature_norm), seeds=seeds
  )
  for seed, logits in zip(seeds, trained, strict=True):
    scores = metrics.classification(
      data.test_labels, logits, answer_ids=np.arange(data.num_classes)
    )
    row["scores"].append(scores | {"seed": seed})
    on_run()
  return row


def _mark_best(rows: list[dict[str, Any]], *, num_classes: int) -> None:
  """Marks each library's best stock recipe: accuracy, AUC of two classes."""
  by = "auc_roc" if num_classes == 2 else "accuracy"
  for library in {row["framework"] for row in rows}:
    able = [
      row
      for row in rows
      if row["framework"] == library and row["is_stock"] and row["scores"]
    ]
    if able:
      best = max(
        able, key=lambda row: np.mean([score[by] for score in row["scores"]])
      )
      best["is_best"] = True
