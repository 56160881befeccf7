"""Other libraries on a record's features, by their own recipes."""

import dataclasses
import pathlib
import runpy

import jax.numpy as jnp
import numpy as np
import pytest

from ppnet import config as config_lib
from ppnet import main
from ppnet.bench import recipes, record_peers
from ppnet.core import records
from ppnet.data import pipeline, prepare, tokenizers
from ppnet.models import linear
from ppnet.privacy import accounting
from ppnet.report import record_peers as report
from ppnet.train import losses
from tests import tiny

_CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
_LIBRARIES = [
  recipes.Library.JAX_PRIVACY,
  pytest.param(recipes.Library.OPACUS, marks=pytest.mark.peers),
]
# JAX-Privacy calls what optax has renamed.
pytestmark = pytest.mark.filterwarnings(
  "ignore:optax.global_norm:DeprecationWarning"
)


def _config(**linear_options):
  config = tiny.experiment()
  config.job = config_lib.Job.BENCHMARK
  config.model.audio = None
  config.model.linear = config_lib.LinearConfig(**linear_options)
  config.attention_noise = config_lib.AttentionNoiseConfig()
  config.optimizer = config_lib.OptimizerConfig(
    name=config_lib.OptimizerName.SGD,
    learning_rate=0.5,
    schedule=config_lib.Schedule.CONSTANT,
  )
  config.bench = config_lib.BenchConfig(
    subject=config_lib.BenchSubject.RECORD_PEERS, cases="default", rounds=2
  )
  return config


def _recipe(library, **changes):
  options = {
    "name": "a recipe",
    "learning_rate": 1.0,
    "batch_size": 8,
    "num_epochs": 1.0,
  }
  return recipes.Recipe(library=library, source="here", **options | changes)


def _data(*, scale, num_features=40, num_classes=10):
  """Eight equal records; each test record tells a row of the matrix."""
  features = np.full((8, num_features), scale, np.float32)
  return recipes.Data(
    train_features=features,
    train_labels=np.full(8, 3),
    test_features=np.eye(num_features, dtype=np.float32),
    test_labels=np.zeros(num_features, np.int64),
    num_classes=num_classes,
  )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  folder = tmp_path_factory.mktemp("record_peers") / "prepared"
  prepare.prepare(_config().data, folder)
  return folder


def test_features_are_what_the_model_multiplies(prepared):
  config = _config(feature_norm=7.0)
  found = record_peers.features(config, prepared)
  card = prepare.read_card(prepared)
  assert found.train_features.shape[0] == card.num_train
  assert found.test_features.shape[0] == card.num_test
  assert found.num_classes == 10
  tokenizer = tokenizers.load(
    config.data, prepared, class_names=card.class_names
  )
  answer_ids = tokenizer.answer_ids
  model = linear.LinearClassifier(
    config.model.linear,
    config.model.decoder.vocab_size,
    tuple(answer_ids.tolist()),
  )
  num_features = found.train_features.shape[1]
  kernel = np.random.default_rng(0).normal(size=(num_features + 1, 10))
  batch = next(
    pipeline.eval_batches(
      pipeline.examples(config, prepared, split="test"), batch_size=16
    )
  )
  logits = losses.predict(
    model,
    {"head": {"kernel": jnp.asarray(kernel, jnp.float32)}},
    {name: jnp.asarray(value) for name, value in batch.items()},
    noise=None,
  )
  scaled = record_peers._scaled(found, 7.0)
  np.testing.assert_allclose(
    np.linalg.norm(scaled.train_features, axis=1), 7.0, rtol=1e-5
  )
  np.testing.assert_allclose(
    logits[:, 0, answer_ids],
    scaled.test_features[:16] @ kernel[:-1] + kernel[-1],
    atol=1e-4,
  )
  np.testing.assert_array_equal(batch["label"], found.test_labels[:16])
  # Fails if: a split, an order or a scale is another one.


def test_what_the_model_measures_privately_is_left_out(prepared):
  plain = record_peers.features(_config(feature_norm=7.0), prepared)
  other = record_peers.features(
    _config(feature_norm=9.0, centre=True, num_directions=2, num_power_steps=1),
    prepared,
  )
  np.testing.assert_array_equal(plain.test_features, other.test_features)


@pytest.mark.parametrize("library", _LIBRARIES)
@pytest.mark.parametrize("is_rescaled", [False, True])
def test_noise_is_that_of_the_plan(library, is_rescaled):
  if library is recipes.Library.OPACUS and is_rescaled:
    pytest.skip("Opacus divides by no clip norm.")
  recipe = _recipe(
    library, l2_clip_norm=0.5, is_rescaled=is_rescaled, begins_at_zero=True
  )
  plan = recipes.Plan(4.0, sampling_prob=1.0, num_steps=1, epsilon=1.0)
  # Without features the matrix has no gradient, only the bias has.
  data = _data(scale=0.0, num_features=400)
  first, second, again = recipes.train(recipe, plan, data, seeds=[0, 1, 0])
  np.testing.assert_array_equal(first, again)
  assert not np.array_equal(first, second)
  noise = first - first.mean(axis=0)
  expected = 4.0 * (1.0 if is_rescaled else 0.5) / 8
  np.testing.assert_allclose(noise.std(), expected, rtol=0.05)
  # Fails if: the noise forgets the clip norm, or the batch size.


@pytest.mark.parametrize("library", _LIBRARIES)
def test_gradients_are_clipped(library):
  recipe = _recipe(library, l2_clip_norm=0.5, begins_at_zero=True)
  plan = recipes.Plan(1e-6, sampling_prob=1.0, num_steps=1, epsilon=1.0)
  (logits,) = recipes.train(recipe, plan, _data(scale=1e4), seeds=[0])
  # Eight equal gradients of norm 0.5 over the expected batch; the bias has a
  # ten-thousandth of each entry.
  np.testing.assert_allclose(np.linalg.norm(logits), 0.5, rtol=1e-3)
  assert (logits.argmax(axis=1) == 3).all()


def test_a_user_s_mean_gradient_is_clipped():
  rng = np.random.default_rng(0)
  features = rng.normal(size=(3, 5, 4)).astype(np.float32)
  features[0] *= 1e-3  # This user's gradient is short enough.
  labels = rng.integers(0, 3, (3, 5))
  data = recipes.Data(
    features, labels, np.eye(4, dtype=np.float32), np.zeros(4, np.int64), 3
  )
  recipe = _recipe(
    recipes.Library.JAX_PRIVACY, l2_clip_norm=0.25, is_of_users=True
  )
  plan = recipes.Plan(1e-7, sampling_prob=1.0, num_steps=1, epsilon=1.0)
  (logits,) = recipes.train(recipe, plan, data, seeds=[0])
  expected = np.zeros((5, 3))
  for own, classes in zip(features, labels, strict=True):
    with_bias = np.concatenate([own, np.ones((5, 1))], axis=1)
    gradient = with_bias.T @ (1 / 3 - np.eye(3)[classes]) / 5
    norm = np.linalg.norm(gradient)
    expected -= gradient * min(1, 0.25 / norm) / 3
  np.testing.assert_allclose(logits, expected[:-1] + expected[-1], atol=1e-5)
  # Fails if: each record is clipped, or a user counts by their records.


def test_users_are_units_of_all_their_records(prepared, monkeypatch):
  config = _config()
  flat = record_peers.features(config, prepared)
  groups = np.array([[4, 9], [0, 7], [2, 3]])
  monkeypatch.setattr(record_peers.loop, "records_by_user", lambda *_: groups)
  found = record_peers.features(config, prepared)
  np.testing.assert_array_equal(
    found.train_features, flat.train_features[groups]
  )
  np.testing.assert_array_equal(found.train_labels, flat.train_labels[groups])
  np.testing.assert_array_equal(found.test_features, flat.test_features)
  scaled = record_peers._scaled(found, 2.0).train_features
  np.testing.assert_allclose(np.linalg.norm(scaled, axis=-1), 2.0, rtol=1e-5)
  uneven = [np.array([4, 9]), np.array([0])]
  monkeypatch.setattr(record_peers.loop, "records_by_user", lambda *_: uneven)
  with pytest.raises(ValueError, match=r"records=\[1, 2\]"):
    record_peers.features(config, prepared)


def test_recipes_of_users_are_for_users():
  config = _config()
  config.privacy.unit = config_lib.PrivacyUnit.USER
  (own,) = record_peers.of_record(
    config, recipes.Library.JAX_PRIVACY, num_examples=6
  )
  assert own.is_of_users
  opacus = recipes.Library.OPACUS
  assert record_peers.of_record(config, opacus, num_examples=6) == ()
  assert not any(r.is_of_users for r in recipes.STOCK if r.library is opacus)


@pytest.mark.parametrize("library", _LIBRARIES)
@pytest.mark.parametrize("optimizer", list(recipes.Optimizer))
def test_every_optimizer_learns_what_can_be_learnt(library, optimizer):
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 4, 160)
  features = np.eye(4, dtype=np.float32)[labels] * 5
  features += rng.normal(size=features.shape).astype(np.float32)
  data = recipes.Data(
    features[:128], labels[:128], features[128:], labels[128:], 4
  )
  recipe = _recipe(
    library,
    optimizer=optimizer,
    learning_rate=0.1,
    momentum=0.9 if optimizer is recipes.Optimizer.SGD else 0.0,
    is_cosine=library is recipes.Library.OPACUS,
    batch_size=32,
    num_epochs=10,
  )
  plan = recipes.Plan(0.5, sampling_prob=0.25, num_steps=40, epsilon=50.0)
  (logits,) = recipes.train(recipe, plan, data, seeds=[0])
  assert (logits.argmax(axis=1) == labels[128:]).mean() > 0.9


@pytest.mark.parametrize("library", _LIBRARIES)
@pytest.mark.parametrize("batch_size", [200, 4000])
def test_plans_spend_what_is_asked_for(library, batch_size):
  recipe = _recipe(library, batch_size=batch_size, num_epochs=2)
  plan = recipes.plan(recipe, num_examples=1000, epsilon=2.0, delta=1e-5)
  assert plan.sampling_prob == min(1, batch_size / 1000)
  assert plan.num_steps == 2 / plan.sampling_prob
  assert 1.97 < plan.epsilon <= 2.0
  ours = accounting.epsilon(
    noise_multiplier=plan.noise_multiplier,
    sampling_prob=plan.sampling_prob,
    num_steps=plan.num_steps,
    delta=1e-5,
  )
  # Opacus's PRV adds its errors of at most 0.01 twice.
  assert abs(ours - plan.epsilon) < 0.03


def test_a_batch_that_draws_nobody_is_a_step_of_noise():
  recipe = _recipe(recipes.Library.JAX_PRIVACY)
  plan = recipes.Plan(1.0, sampling_prob=1e-9, num_steps=2, epsilon=1.0)
  (logits,) = recipes.train(recipe, plan, _data(scale=1.0), seeds=[0])
  assert np.isfinite(logits).all()
  assert logits.std() > 0


def test_every_recipe_says_where_it_comes_from():
  for recipe in recipes.STOCK:
    assert recipe.source.startswith(("examples/", "tutorials/"))
    assert not recipe.feature_norm  # The record's, and no library's.
  for library in recipes.Library:
    names = [r.name for r in recipes.STOCK if r.library is library]
    assert len(set(names)) == len(names) >= 4


def test_the_record_s_settings_become_a_recipe():
  config = runpy.run_path(str(_CONFIGS / "records" / "spoken_digits.py"))[
    "get_config"
  ]("3")
  (own,) = record_peers.of_record(
    config, recipes.Library.OPACUS, num_examples=2700
  )
  assert own.learning_rate == config.optimizer.learning_rate
  assert own.momentum == config.optimizer.beta1
  assert own.num_epochs * 2700 / own.batch_size == config.train.num_steps
  assert own.l2_clip_norm == config.privacy.l2_clip_norm
  assert own.feature_norm == config.model.linear.feature_norm
  for changes in (
    {"schedule": config_lib.Schedule.COSINE},
    {"name": config_lib.OptimizerName.ADAMW},
    {"ema_decay": 0.9},
  ):
    other = dataclasses.replace(
      config, optimizer=dataclasses.replace(config.optimizer, **changes)
    )
    assert not record_peers.of_record(
      other, recipes.Library.OPACUS, num_examples=2700
    )


def test_the_best_is_a_stock_recipe_of_each_library():
  def row(library, name, accuracy, auc):
    scores = [{"accuracy": accuracy, "auc_roc": auc}]
    return {
      "framework": library,
      "name": name,
      "is_stock": name != record_peers.OWN,
      "is_best": False,
      "scores": scores if accuracy else [],
    }

  def best(num_classes):
    rows = [
      row("A", "one", 0.5, 0.9),
      row("A", "two", 0.6, 0.8),
      row("A", record_peers.OWN, 0.9, 0.95),
      row("B", "three", 0.1, 0.1),
      row("C", "missing", None, None),
    ]
    record_peers._mark_best(rows, num_classes=num_classes)
    return [r["name"] for r in rows if r["is_best"]]

  assert best(10) == ["two", "three"]
  assert best(2) == ["one", "three"]


def test_a_benchmark_trains_by_every_recipe_and_writes_its_table(
  prepared, tmp_path, monkeypatch, capsys
):
  short = _recipe(recipes.Library.JAX_PRIVACY, batch_size=2000, num_epochs=3)
  missing = _recipe(recipes.Library.OPACUS)
  monkeypatch.setattr(recipes, "STOCK", (short, missing))
  monkeypatch.setitem(
    recipes.PACKAGES, recipes.Library.OPACUS, ("no_such_package",)
  )
  config = _config(feature_norm=7.0)
  config.data.prepared_dir = str(prepared)
  config.train.expected_batch_size = 256
  main.run_job(config, tmp_path / "run")
  record = records.read_json(tmp_path / "run" / "bench.json")
  rows = {(row["framework"], row["name"]): row for row in record["rows"]}
  assert len(rows) == 4
  hole = rows["Opacus", "a recipe"]
  assert "no_such_package" in hole["note"]
  assert hole["scores"] == []
  trained = rows["JAX-Privacy", "a recipe"]
  assert trained["is_best"]
  assert [score["seed"] for score in trained["scores"]] == [0, 1]
  assert (trained["num_steps"], trained["sampling_prob"]) == (3, 1.0)
  assert trained["epsilon_pld"] == pytest.approx(1.0, abs=0.02)
  own = rows["JAX-Privacy", record_peers.OWN]
  assert not own["is_best"]
  assert own["num_steps"] == config.train.num_steps
  shown = (tmp_path / "run" / "bench.md").read_text()
  assert shown.strip() in capsys.readouterr().out
  assert "**a recipe**" in shown
  assert "features of norm 7" in shown
  assert "SGD 0.5, momentum 0.9" in shown
  assert "AUC" not in shown
  assert shown.count("no_such_package") == 1


def test_an_interrupted_benchmark_goes_on_where_it_was(
  prepared, tmp_path, monkeypatch
):
  stock = [
    _recipe(recipes.Library.JAX_PRIVACY, name=name, batch_size=2000)
    for name in ("one", "two")
  ]
  monkeypatch.setattr(recipes, "STOCK", tuple(stock))
  config = _config()
  config.data.prepared_dir = str(prepared)
  config.bench.cases, config.bench.rounds = "JAX-Privacy", 1
  train, begun = recipes.train, []

  def killed(recipe, *args, **options):
    begun.append(recipe.name)
    if begun == ["one", "two"]:
      raise KeyboardInterrupt
    return train(recipe, *args, **options)

  monkeypatch.setattr(recipes, "train", killed)
  with pytest.raises(KeyboardInterrupt):
    main.run_job(config, tmp_path)
  before = records.read_json(tmp_path / "bench.json")
  assert not before["is_complete"]
  main.run_job(config, tmp_path)
  after = records.read_json(tmp_path / "bench.json")
  assert begun == ["one", "two", "two", record_peers.OWN]
  assert after["is_complete"]
  assert after["rows"][0]["scores"] == before["rows"][0]["scores"]
  assert sum(row["is_best"] for row in after["rows"]) == 1
  assert record_peers._finished(tmp_path / "bench.json") == []
  # Fails if: what was finished is trained again, or counts in a later run.


def test_a_table_of_two_classes_has_auc_and_one_seed_no_interval():
  row = {
    "name": "x",
    "framework": "A",
    "recipe": records.to_plain(
      _recipe(
        recipes.Library.JAX_PRIVACY,
        optimizer=recipes.Optimizer.RMSPROP,
        is_rescaled=True,
        l2_clip_norm=0.1,
      )
    ),
    "note": "",
    "is_best": False,
    "num_steps": 7,
    "noise_multiplier": 1.5,
    "epsilon": 2.99,
    "epsilon_pld": 3.0,
    "scores": [{"accuracy": 0.5, "f1": 0.4, "auc_roc": 0.625}],
  }
  shown = report.table(
    {
      "name": "a record",
      "num_classes": 2,
      "num_train": 1000,
      "num_test": 10,
      "num_features": 3,
      "epsilon": 3.0,
      "delta": 1e-5,
      "rounds": 1,
      "rows": [row],
    }
  )
  assert "AUC %" in shown
  assert "62.5" in shown
  assert "±" not in shown
  assert "RMSprop 1; batch 8; 1 epochs; C 0.1; gradients over C" in shown


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda c: setattr(c.model, "linear", None), "a linear model"),
    (lambda c: setattr(c.privacy, "epsilon", None), "privacy.epsilon"),
    (
      lambda c: setattr(c.privacy, "unit", config_lib.PrivacyUnit.PACKED_ROW),
      "single examples or users",
    ),
    (lambda c: setattr(c.bench, "cases", "fastDP"), "Opacus"),
  ],
)
def test_what_cannot_be_compared_is_refused(change, message, tmp_path):
  config = _config()
  change(config)
  with pytest.raises(ValueError, match=message):
    record_peers.run(config, tmp_path)


@pytest.mark.parametrize("argument", ["spoken_digits", "no_such,3"])
def test_a_config_without_record_or_epsilon_is_refused(argument):
  scope = runpy.run_path(str(_CONFIGS / "bench" / "record_peers.py"))
  with pytest.raises(ValueError, match="RECORD,EPSILON.*spoken_digits"):
    scope["get_config"](argument)
  assert scope["get_config"]("mnist,8").privacy.epsilon == 8.0


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore:Full backward hook:UserWarning")
def test_opacus_s_clipping_does_not_change_with_its_mode():
  # The benchmark takes ghost clipping, the examples hooks: one mechanism.
  import opacus
  import torch

  data = _data(scale=1.0)
  recipe = _recipe(recipes.Library.OPACUS, begins_at_zero=True)
  plan = recipes.Plan(1e-6, sampling_prob=1.0, num_steps=1, epsilon=1.0)
  (logits,) = recipes.train(recipe, plan, data, seeds=[0])
  model = torch.nn.Linear(40, 10)
  torch.nn.init.zeros_(model.weight)
  torch.nn.init.zeros_(model.bias)
  wrapped = opacus.GradSampleModule(model)
  optimizer = opacus.optimizers.DPOptimizer(
    torch.optim.SGD(wrapped.parameters(), lr=1.0),
    noise_multiplier=0.0,
    max_grad_norm=1.0,
    expected_batch_size=8,
  )
  features = torch.from_numpy(data.train_features)
  labels = torch.from_numpy(data.train_labels)
  torch.nn.functional.cross_entropy(wrapped(features), labels).backward()
  optimizer.step()
  with torch.no_grad():
    expected = model(torch.from_numpy(data.test_features)).numpy()
  np.testing.assert_allclose(logits, expected, atol=1e-5)
