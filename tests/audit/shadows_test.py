"""Shadow models: who is trained on what, and that each is the trainer's own."""

import dataclasses
import functools
import io
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppnet import config as config_lib
from ppnet.audit import pool as pool_lib
from ppnet.audit import shadows, side_by_side
from ppnet.core import prng
from ppnet.data import pipeline
from ppnet.train import loop
from tests import tiny

NUM_RECORDS = 75
FOLDER = tempfile.TemporaryDirectory(prefix="ppnet-shadows-")


def experiment(**changes) -> config_lib.ExperimentConfig:
  own = {
    "num_steps": 4,
    "expected_batch_size": 20,
    # Given, so that no test waits for a calibration.
    "epsilon": None,
    "noise_multiplier": 0.5,
  }
  config = tiny.experiment(**(own | changes))
  # One application of the network: compiling is what these tests cost.
  config.attention_noise.consistency_weight = 0.0
  config.audit = config_lib.AuditConfig(
    num_models=4, models_at_once=2, num_records=NUM_RECORDS
  )
  config.data.prepared_dir = str(pathlib.Path(FOLDER.name) / "prepared")
  return config


@functools.cache
def opened() -> loop.Experiment:
  config = experiment()
  config.mesh = config_lib.MeshConfig(data=1)
  return loop.open_experiment(
    config, pathlib.Path(FOLDER.name) / "run", devices=jax.devices()[:1]
  )


@functools.cache
def the_pool(split: str = "train") -> pool_lib.Pool:
  return pool_lib.of_split(opened(), split=split, num_records=NUM_RECORDS)


def placeholder_ids():
  return opened().tokenizer.placeholder_ids


def design_of(config) -> shadows.Design:
  return shadows.paired(
    num_models=config.audit.num_models,
    num_records=NUM_RECORDS,
    seed=shadows.design_seed(config),
  )


# Who is trained on what.


def test_partners_are_complements_and_each_record_is_in_half():
  design = shadows.paired(num_models=8, num_records=99, seed=3)
  for model, partner in enumerate(design.partner):
    assert partner == model ^ 1
    np.testing.assert_array_equal(
      design.membership[model], ~design.membership[partner]
    )
  assert (design.membership.sum(axis=0) == 4).all()
  assert design.num_members == 49


def test_memberships_of_one_model_are_independent_fair_coins():
  membership = shadows.paired(
    num_models=400, num_records=200, seed=5
  ).membership[::2]
  rate = membership.mean(axis=0)
  assert abs(membership.mean() - 0.5) < 4 * 0.5 / membership.size**0.5
  # Of each record over the pairs; a fixed half would have no variance at all.
  assert np.isclose(rate.var(), 0.25 / 200, rtol=0.5)
  size = membership.sum(axis=1)
  assert np.isclose(size.var(), 0.25 * 200, rtol=0.4)
  correlation = np.corrcoef(membership.T) - np.eye(200)
  assert np.abs(correlation).max() < 6 / 200**0.5
  # Fails if: exactly half of the pool is drawn, or coins are shared.


def test_a_design_follows_from_its_seed_and_pairs_do_not_move():
  make = functools.partial(shadows.paired, num_records=40)
  few, many = make(num_models=4, seed=9), make(num_models=10, seed=9)
  np.testing.assert_array_equal(few.membership, many.membership[:4])
  other = make(num_models=4, seed=10)
  assert (few.membership != other.membership).any(axis=1).all()
  assert shadows.design_seed(experiment()) == shadows.design_seed(experiment())
  assert shadows.design_seed(experiment(seed=1)) != shadows.design_seed(
    experiment()
  )


def test_everyone_is_trained_on_the_whole_pool():
  design = shadows.everyone(num_models=3, num_records=9)
  assert design.membership.shape == (3, 9)
  assert design.membership.all()
  assert design.num_members == 9
  assert (design.partner == -1).all()


def test_a_design_that_cannot_be_is_refused():
  with pytest.raises(ValueError, match="even number of models"):
    shadows.paired(num_models=3, num_records=9, seed=0)
  with pytest.raises(ValueError, match="at least 2 records"):
    shadows.paired(num_models=2, num_records=1, seed=0)


def test_every_model_has_roots_of_its_own():
  seeded = [shadows.secrets_of(experiment(), model) for model in range(20)]
  assert seeded == [shadows.secrets_of(experiment(), m) for m in range(20)]
  fresh = experiment(noise_seed=None, sampler_seed=None)
  first, second = (shadows.secrets_of(fresh, 0) for _ in range(2))
  assert first.init == second.init
  assert first.noise != second.noise
  assert first.sampler != second.sampler
  for name in ("init", "sampler", "noise"):
    assert len({getattr(one, name) for one in seeded}) == 20
  assert "noise" not in repr(seeded[0])
  # Fails if: two models share their noise, so that a difference of the two
  # would show a gradient.


@pytest.mark.parametrize(
  "name", ["POISSON", "BALLS_IN_BINS", "SHUFFLE", "FULL_BATCH"]
)
def test_members_are_drawn_as_the_claim_has_it(name):
  config = experiment(
    sampler=config_lib.Sampler[name],
    expected_batch_size=37 if name == "FULL_BATCH" else 12,
  )
  program = shadows.build_program(
    config, the_pool(), num_members=37, placeholder_ids=placeholder_ids()
  )
  assert program.mechanism.claim()["num_examples"] == 37
  sampler = shadows.sampler_over_pool(
    program.mechanism, num_records=NUM_RECORDS, root=77
  )
  counts = np.zeros(NUM_RECORDS)
  for step in range(300):
    np.add.at(counts, sampler.draw(step), 1)
  expected = program.mechanism.sampling_prob
  assert abs(counts.mean() / 300 - expected) < 0.06 * expected
  assert counts.max() <= 300


def test_a_cut_that_members_and_others_share_is_refused():
  config = experiment(
    sampler=config_lib.Sampler.TRUNCATED_POISSON, max_batch_size=30
  )
  program = shadows.build_program(
    config, the_pool(), num_members=37, placeholder_ids=placeholder_ids()
  )
  with pytest.raises(ValueError, match="sampler=POISSON"):
    shadows.sampler_over_pool(program.mechanism, num_records=75, root=1)


# A killed audit goes on.


def plain_experiment(**changes) -> config_lib.ExperimentConfig:
  """Without privacy and noise: what is quickest to compile."""
  config = experiment(num_steps=2, enabled=False, **changes)
  config.attention_noise = config_lib.AttentionNoiseConfig()
  return config


def train(folder, **options) -> shadows.Shadows:
  config = plain_experiment()
  return shadows.train(
    config,
    the_pool(),
    design=design_of(config),
    folder=folder,
    placeholder_ids=placeholder_ids(),
    test=the_pool("test"),
    devices=jax.devices()[:1],
    log=io.StringIO(),
    **options,
  )


def test_a_killed_audit_goes_on_with_the_next_group(tmp_path):
  calls = []

  def on_steps(count):
    calls.append(count)
    if len(calls) == 3:  # In the second of two groups.
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    train(tmp_path, steps_at_once=1, on_steps=on_steps)
  files = sorted(path.name for path in tmp_path.iterdir())
  assert files == ["design.json", "group-000.npz"]
  before = (tmp_path / "group-000.npz").read_bytes()
  calls.clear()
  found = train(tmp_path, steps_at_once=1, on_steps=calls.append)
  assert len(calls) == 2
  assert (tmp_path / "group-000.npz").read_bytes() == before
  first, second = found.groups()
  assert first.models.tolist() == [0, 1]
  assert second.models.tolist() == [2, 3]
  # Of every model: predictions of the test records, and the trainer's metrics.
  assert second.test_losses.shape == (2, NUM_RECORDS)
  assert second.test_logits.shape == (2, NUM_RECORDS, 96)
  assert np.abs(second.test_logits[0] - second.test_logits[1]).max() > 0
  for name in (
    "nonprivate/loss/total",
    "nonprivate/loss/task",
    "nonprivate/batch_size",
    "learning_rate",
  ):
    assert second.metrics[name].shape == (2, 2)
    assert np.isfinite(second.metrics[name]).all()
  assert np.isinf(second.metrics["epsilon"]).all()
  for leaf, shape in zip(
    jax.tree.leaves(second.params),
    jax.tree.leaves(found.program.abstract_state.params),
    strict=True,
  ):
    assert leaf.shape == (2, *shape.shape)
  with pytest.raises(ValueError, match="seed"):
    shadows.train(
      plain_experiment(seed=5),
      the_pool(),
      design=design_of(plain_experiment(seed=5)),
      folder=tmp_path,
      placeholder_ids=placeholder_ids(),
      log=io.StringIO(),
    )
  # Fails if: a group is written before it is whole, or a finished one is
  # trained again; or two audits are put together from one folder.


# Each of the models is what the trainer makes of its members.


@functools.cache
def trained_beside(
  *,
  num_models: int,
  num_devices: int,
  width: int,
  engine=config_lib.Engine.AUTO,
  **changes,
):
  """The models' parameters and metrics after all steps."""
  config = experiment(**changes)
  config.perf.engine = engine
  design = dataclasses.replace(
    design_of(config),
    membership=shadows.paired(
      num_models=8, num_records=NUM_RECORDS, seed=1
    ).membership[:num_models],
  )
  program = shadows.build_program(
    config, the_pool(), num_members=37, placeholder_ids=placeholder_ids()
  )
  beside = side_by_side.SideBySide(
    program,
    num_models=num_models,
    microbatch_size=config.perf.microbatch_size,
    devices=jax.devices()[:num_devices],
    width=width,
  )
  assert beside.mesh.size == num_devices
  group = shadows._Group(
    config,
    program,
    the_pool(),
    design,
    models=np.arange(num_models),
    beside=beside,
  )
  steps: list[int] = []
  return (
    config,
    program,
    design,
    group.train(steps.append, None, steps_at_once=3),
  )


def trained_alone(config, program, design, model: int):
  """The trainer's steps on the members of one model, by its own functions."""
  secrets = shadows.secrets_of(config, model)
  sampler = shadows.sampler_over_pool(
    program.mechanism, num_records=NUM_RECORDS, root=secrets.sampler
  )
  members = np.flatnonzero(design.membership[model])
  root_key = program.put(prng.root(secrets.init))
  noise_key = program.put(prng.root(secrets.noise))
  state = jax.jit(program.pure.init)(root_key)
  noise_state = program.init_noise_state(state.params)
  norms = []
  for data in pipeline.train_steps(
    opened().training,
    draw=lambda step: np.intersect1d(sampler.draw(step), members),
    num_steps=config.train.num_steps,
    microbatch_size=config.perf.microbatch_size,
    num_threads=0,
    prefetch_steps=0,
  ):
    grad_sum = program.init_grad_sum(state.params)
    for microbatch in data["microbatches"]:
      grad_sum, part = program.accumulate(
        grad_sum,
        state.params,
        program.put_batch(microbatch),
        root_key,
        state.step,
        state.clip_norm,
      )
      norms.append((len(norms), int(part.counted.sum())))
    state, noise_state, _ = program.update(
      state, grad_sum, noise_key, noise_state
    )
  return jax.device_get(state.params), sum(count for _, count in norms)


def assert_close(left, right, *, atol=1e-5):
  for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=atol)


def check_against_alone(**options):
  config, program, design, group = trained_beside(**options)
  assert config.attention_noise.stddev > 0
  assert program.mechanism.noise_stddev > 0
  for model in (0, len(group.models) - 1):
    alone, num_rows = trained_alone(config, program, design, model)
    own = jax.tree.map(lambda leaf, m=model: leaf[m], group.params)
    assert_close(own, alone)
    counted = group.metrics["nonprivate/batch_size"][model].sum()
    assert counted == num_rows
  for name in ("nonprivate/clipped_fraction", "nonprivate/grad_norm/p50"):
    assert np.isfinite(group.metrics[name]).all()
  # A record takes part once in so many steps, and is charged for it then.
  bands = config.privacy.num_bands or 1
  epsilon = group.metrics["epsilon"]
  assert (np.diff(epsilon, axis=1) >= 0).all()
  assert (epsilon[:, bands:] > epsilon[:, :-bands]).all()
  first, second = (
    jax.tree.leaves(jax.tree.map(lambda x, m=m: x[m], group.params))
    for m in (0, 1)
  )
  assert np.abs(first[0] - second[0]).max() > 1e-2
  # Fails if: a non-member is trained on, two models share a root, padding
  # counts, or a step's rounds are those of another model.


@pytest.mark.parametrize(
  ("num_models", "num_devices"),
  [(2, 1), pytest.param(8, 4, marks=pytest.mark.slow)],
)
def test_one_of_many_models_is_the_one_trained_alone(num_models, num_devices):
  """Two of them at once on each device."""
  check_against_alone(num_models=num_models, num_devices=num_devices, width=2)


@pytest.mark.slow
@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("engine", ["VMAP", "GHOST", "BOOKKEEPING"])
def test_with_every_engine(engine, width):
  check_against_alone(
    num_models=4,
    num_devices=1,
    width=width,
    engine=config_lib.Engine[engine],
  )


@pytest.mark.slow
def test_with_a_clip_norm_that_follows_a_quantile_and_with_banded_noise():
  check_against_alone(num_models=2, num_devices=1, width=2, clip_quantile=0.5)
  check_against_alone(
    num_models=2,
    num_devices=1,
    width=2,
    noise_mechanism=config_lib.NoiseMechanism.BANDED,
    num_bands=2,
    expected_batch_size=12,
  )


@pytest.mark.slow
def test_the_devices_make_no_difference():
  many = trained_beside(num_models=8, num_devices=8, width=1)[-1]
  few = trained_beside(num_models=4, num_devices=2, width=2)[-1]
  own = jax.tree.map(lambda leaf: leaf[:4], many.params)
  assert_close(own, few.params)  # Sums of two widths round differently.


def test_the_noise_is_bit_for_bit_that_of_one_model():
  """A step of noise alone: no record, so the parameters are the noise."""
  config = experiment(num_steps=1)
  config.optimizer = config_lib.OptimizerConfig(
    name=config_lib.OptimizerName.SGD, learning_rate=1.0, beta1=0.0
  )
  program = shadows.build_program(
    config, the_pool(), num_members=37, placeholder_ids=placeholder_ids()
  )
  words = side_by_side.key_words([5, 6])
  shapes = program.abstract_state.params
  zeros = jax.tree.map(lambda p: jnp.zeros(p.shape), shapes)

  def draw(words):
    key = jax.random.wrap_key_data(words, impl="threefry2x32")
    tx = program.mechanism.privatizer()
    return tx.update(zeros, tx.init(zeros), zeros, noise_key=key)[0]

  together = jax.jit(jax.vmap(draw))(words)
  for model in range(2):
    alone = jax.jit(draw)(words[model])
    for a, b in zip(
      jax.tree.leaves(together), jax.tree.leaves(alone), strict=True
    ):
      np.testing.assert_array_equal(a[model], b)
      assert np.asarray(b).std() > 0
