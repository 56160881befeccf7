"""Tests of the mechanism: that its parts agree with each other."""

import json
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppnet import config as config_lib
from ppnet.core import records
from ppnet.privacy import accounting, ledger, mechanism

_NUM_EXAMPLES = 900


def _config(*, num_steps=40, expected_batch_size=90, **privacy):
  """RDP, because it is quick; what is tested does not depend on it."""
  settings = {"accountant": config_lib.Accountant.RDP, **privacy}
  return config_lib.ExperimentConfig(
    privacy=config_lib.PrivacyConfig(**settings),
    train=config_lib.TrainConfig(
      num_steps=num_steps, expected_batch_size=expected_batch_size
    ),
  )


def _build(**kwargs):
  return mechanism.build(_config(**kwargs), _NUM_EXAMPLES)


@pytest.mark.parametrize("accountant", list(config_lib.Accountant))
def test_accountant_is_told_what_the_sampler_and_the_noise_do(accountant):
  built = _build(epsilon=4.0, accountant=accountant, l2_clip_norm=0.7)
  assert built.sampler.sampling_prob == built.sampling_prob == 0.1
  assert built.sampler.num_examples == _NUM_EXAMPLES
  sensitivity = built.clipped_grad_fn(_loss_fn).sensitivity(
    built.neighboring_relation
  )
  assert built.sensitivity == sensitivity == 0.7
  np.testing.assert_allclose(
    built.noise_stddev, built.noise_multiplier * sensitivity, rtol=1e-12
  )
  from_parts = accounting.epsilon(
    noise_multiplier=built.noise_stddev / sensitivity,
    sampling_prob=built.sampler.sampling_prob,
    num_steps=built.num_steps,
    delta=built.delta,
    accountant=accountant,
  )
  np.testing.assert_allclose(built.epsilon(built.num_steps), from_parts)
  assert 0.995 * 4.0 <= from_parts <= 4.0
  # Fails if: the noise scale is taken from anything but the sensitivity.


def test_realised_sampling_matches_the_accounted_probability():
  built = _build(noise_multiplier=1.0, epsilon=None, sampler_seed=3)
  sizes = [len(built.sampler.draw(step)) for step in range(300)]
  expected = _NUM_EXAMPLES * built.sampling_prob
  spread = math.sqrt(expected * (1 - built.sampling_prob) / len(sizes))
  assert abs(np.mean(sizes) - expected) < 4 * spread
  # Fails if: the sampler and the accountant divide by different sizes.


def test_replace_one_doubles_sensitivity_and_noise():
  relation = config_lib.NeighboringRelation.REPLACE_ONE
  built = _build(
    noise_multiplier=1.5,
    epsilon=None,
    l2_clip_norm=2.0,
    accountant=config_lib.Accountant.PLD,
    neighboring_relation=relation,
  )
  assert built.sensitivity == 4.0
  assert built.noise_stddev == 6.0
  assert "replacing one" in built.claim()["guarantee"]
  # Fails if: the noise is scaled by the clip norm under replace-one.


def _loss_fn(params, batch):
  return batch @ params


def test_released_sum_has_the_noise_that_is_accounted_for():
  built = _build(noise_multiplier=2.0, epsilon=None, l2_clip_norm=0.5)
  params = jnp.zeros(6000)
  batch = jax.random.normal(jax.random.key(0), (3, 6000))
  result = built.clipped_grad_fn(_loss_fn, microbatch_size=2)(params, batch)
  assert np.linalg.norm(result.grad_sum) <= 3 * 0.5
  tx = built.privatizer()
  released, _ = tx.update(
    result.grad_sum, tx.init(params), noise_key=jax.random.key(1)
  )
  drawn = np.asarray(released - result.grad_sum)
  assert abs(np.std(drawn) / (2.0 * 0.5) - 1) < 0.04
  # Fails if: the noise multiplier is used as the standard deviation.


@pytest.mark.parametrize(
  ("changes", "why", "has_noise"),
  [
    ({"enabled": False}, "privacy is off", False),
    ({"clipping": config_lib.Clipping.NONE}, "not clipped", True),
    ({"clipping": config_lib.Clipping.BATCH}, "batch gradient", True),
    ({"noise": False}, "no noise", False),
    ({"noise_multiplier": 0.0, "epsilon": None}, "multiplier is 0", False),
  ],
)
def test_ablations_claim_no_guarantee(changes, why, has_noise):
  built = _build(**changes)
  assert not built.has_guarantee
  assert built.epsilon(1) == built.epsilon_after(1) == math.inf
  assert built.epsilon_budget is None
  claim = built.claim()
  assert claim["guarantee"].startswith("No guarantee (epsilon = inf)")
  assert why in claim["guarantee"]
  assert (built.noise_stddev > 0) == has_noise
  assert (built.noise_multiplier > 0) == has_noise
  assert built.sampling_prob == 0.1
  unbounded = changes.get("clipping") or not changes.get("enabled", True)
  assert (built.sensitivity == math.inf) == bool(unbounded)
  assert (
    built.clipped_grad_fn(_loss_fn).sensitivity(built.neighboring_relation)
    == built.sensitivity
  )
  # Fails if: an ablation reports the epsilon of the run it is compared with.


def test_clipping_ablation_has_the_noise_of_the_full_run():
  full = _build(epsilon=2.0, l2_clip_norm=0.3)
  for clipping in (config_lib.Clipping.NONE, config_lib.Clipping.BATCH):
    ablated = _build(epsilon=2.0, l2_clip_norm=0.3, clipping=clipping)
    assert ablated.noise_stddev == full.noise_stddev


def test_ablation_draws_the_same_batches():
  full = _build(sampler_seed=5)
  off = _build(sampler_seed=5, enabled=False)
  np.testing.assert_array_equal(full.sampler.draw(7), off.sampler.draw(7))


def test_batch_clipping_applies_to_the_whole_batch():
  built = _build(
    clipping=config_lib.Clipping.BATCH,
    noise_multiplier=1.0,
    epsilon=None,
    l2_clip_norm=0.5,
  )
  grad_fn = built.clipped_grad_fn(_loss_fn)
  batch = jnp.array([[3.0, 0.0], [3.0, 4.0], [0.0, 8.0]])
  parts = [grad_fn(jnp.zeros(2), batch[:2]), grad_fn(jnp.zeros(2), batch[2:])]
  total = parts[0].grad_sum + parts[1].grad_sum
  finished = built.finish_sum(total, num_examples=jnp.array(3))
  mean = np.mean(batch, axis=0)
  np.testing.assert_allclose(
    finished, 3 * 0.5 * mean / np.linalg.norm(mean), rtol=1e-6
  )
  full = _build(noise_multiplier=1.0, epsilon=None)
  chex.assert_trees_all_equal(
    full.finish_sum(total, num_examples=jnp.array(3)), total
  )


def test_full_batch_sampler_needs_the_whole_set():
  full_batch = config_lib.Sampler.FULL_BATCH
  built = _build(
    sampler=full_batch, expected_batch_size=_NUM_EXAMPLES, epsilon=1.0
  )
  assert built.sampling_prob == 1.0
  assert len(built.sampler.draw(0)) == _NUM_EXAMPLES
  with pytest.raises(ValueError, match=r"batch_size=90, num_examples=900.*900"):
    _build(sampler=full_batch)
  # Fails if: a full batch is accounted for as if it were sampled.


_OTHER_SAMPLERS = [
  ({"sampler": config_lib.Sampler.TRUNCATED_POISSON, "max_batch_size": 99}, 1),
  ({"sampler": config_lib.Sampler.BALLS_IN_BINS}, 10),
  ({"sampler": config_lib.Sampler.SHUFFLE}, 10),
]


@pytest.mark.parametrize(("changes", "cycle"), _OTHER_SAMPLERS)
def test_every_sampler_is_accounted_for_as_what_it_is(changes, cycle):
  built = _build(epsilon=4.0, accountant=config_lib.Accountant.PLD, **changes)
  assert built.participation == built.sampler.participation
  assert built.epsilon_curve.participation == built.sampler.participation
  spent = accounting.epsilon(
    noise_multiplier=built.noise_stddev / built.sensitivity,
    participation=built.sampler.participation,
    num_steps=40,
    delta=1e-5,
  )
  assert built.epsilon(40) == built.epsilon_after(40) == spent
  assert 0.995 * 4.0 <= spent <= 4.0
  poisson = accounting.epsilon(
    noise_multiplier=built.noise_multiplier,
    sampling_prob=0.1,
    num_steps=40,
    delta=1e-5,
  )
  assert abs(poisson / spent - 1) > 0.01
  claim = built.claim()
  assert claim["sampler"] == changes["sampler"].name
  assert claim["steps_per_release"] == cycle
  assert f"({claim['sampler']} sampling" in claim["guarantee"]
  sizes = [len(built.sampler.draw(step)) for step in range(30)]
  assert 75 < np.mean(sizes) < 105
  assert max(sizes) <= changes.get("max_batch_size", 900)
  # Fails if: one sampler draws and another one is accounted for.


def test_fixed_batches_say_what_adding_and_removing_means():
  for relation, words in (
    (
      config_lib.NeighboringRelation.ADD_OR_REMOVE_ONE,
      "adding or removing one training example whose place in the order of"
      " examples stays empty (SHUFFLE",
    ),
    (
      config_lib.NeighboringRelation.REPLACE_ONE,
      "replacing one training example (SHUFFLE",
    ),
  ):
    built = _build(
      sampler=config_lib.Sampler.SHUFFLE, neighboring_relation=relation
    )
    assert words in built.claim()["guarantee"]
  assert "stays empty" not in _build().claim()["guarantee"]
  # Fails if: a fixed batch size is claimed to hide how many there are.


@pytest.mark.parametrize(
  "sampler",
  [config_lib.Sampler.TRUNCATED_POISSON, config_lib.Sampler.BALLS_IN_BINS],
)
def test_sampler_without_an_accountant_is_refused(sampler):
  size = 99 if sampler is config_lib.Sampler.TRUNCATED_POISSON else None
  for changes in (
    {},
    {"epsilon": None, "noise_multiplier": 1.0},
  ):  # RDP covers neither.
    with pytest.raises(ValueError, match="by RDP.*Use the PLD accountant"):
      _build(sampler=sampler, max_batch_size=size, **changes)
  # Fails if: the accountant of Poisson sampling stands in.


def test_roots_come_from_entropy_unless_seeded():
  assert _build().sampler.root != _build().sampler.root
  one, other = _build(sampler_seed=4), _build(sampler_seed=4)
  assert one.sampler.root == other.sampler.root
  assert one.claim()["sampler_seeded"]
  assert not one.claim()["noise_seeded"]
  assert "whoever knows the seed of the sampler" in one.claim()["guarantee"]
  given = mechanism.build(_config(), _NUM_EXAMPLES, sampler_root=12345)
  assert given.sampler.root == 12345
  # Fails if: an unseeded run can be repeated by anyone.


def test_noise_root_is_fresh_unless_seeded_and_unlike_the_sampler_root():
  fresh = {mechanism.noise_root_entropy(_config()) for _ in range(5)}
  assert len(fresh) == 5
  seeded = _config(noise_seed=4, sampler_seed=4)
  root = mechanism.noise_root_entropy(seeded)
  assert root == mechanism.noise_root_entropy(seeded)
  assert root != mechanism.build(seeded, _NUM_EXAMPLES).sampler.root
  assert 0 <= root < 2**128
  # Fails if: one seed gives the batches and the noise the same root.


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"expected_batch_size": 901},
      "expected_batch_size=901, num_examples=900.*batch_size=900",
    ),
    ({"delta": 1 / 900}, "delta < 1/num_examples.*allow_large_delta"),
    ({"delta": 1.0}, "0 < delta < 1"),
    (
      {"clip_quantile": 0.5, "clip_rule": config_lib.ClipRule.NORMALIZE},
      "budget of the count.*clip_quantile=none",
    ),
    (
      {"clip_quantile": 0.5, "clip_scope": config_lib.ClipScope.PER_LAYER},
      "clip_scope FLAT.*PER_LAYER",
    ),
    (
      {"clip_quantile": 0.5, "clipping": config_lib.Clipping.BATCH},
      "clipping PER_EXAMPLE.*BATCH",
    ),
    (
      {"clip_quantile": 0.5, "clip_count_stddev": 1e-3},
      "clip_count_stddev > .*costs more than the whole step",
    ),
    ({"epsilon": None}, "exactly one of"),
    ({"noise_multiplier": 1.0}, "exactly one of"),
    ({"epsilon": None, "noise_multiplier": -1.0}, "noise_multiplier >= 0"),
    ({"epsilon": -1.0}, "epsilon > 0"),
    ({"l2_clip_norm": 0.0}, "l2_clip_norm > 0"),
    ({"num_steps": 0}, "num_steps > 0"),
    ({"expected_batch_size": 0}, "expected_batch_size > 0"),
    (
      {"neighboring_relation": config_lib.NeighboringRelation.REPLACE_ONE},
      "REPLACE_ONE.*Use the PLD accountant",
    ),
    ({"sampler_seed": -1}, "seed >= 0"),
    ({"sampler": "shuffle"}, "a sampler that an accountant covers"),
  ],
)
def test_bad_settings_are_named(changes, message):
  with pytest.raises(ValueError, match=message):
    _build(**changes)


@pytest.mark.parametrize(
  ("epsilon", "text"),
  [(2.9961, "2.997"), (2.997, "2.997"), (0.00123401, "0.001235"), (0.0, "0")],
)
def test_epsilon_in_the_guarantee_is_rounded_up(epsilon, text):
  assert mechanism._rounded_up(epsilon) == text
  # Fails if: it is rounded to the nearest, so half the time to a stronger one.


def test_large_delta_is_accepted_when_asked_for():
  assert _build(delta=0.01, allow_large_delta=True).delta == 0.01


def test_claim_is_plain_and_the_secret_is_not_in_it():
  built = _build(epsilon=4.0)
  text = json.dumps(records.to_plain(built.claim()), allow_nan=False)
  assert str(built.sampler.root) not in text + repr(built)
  assert "adding or removing one training example" in text
  assert "1e-05" in text
  # Fails if: the sampler's root reaches the record or a log.


@pytest.mark.parametrize("accountant", list(config_lib.Accountant))
def test_calibrated_run_fits_its_ledger_to_the_last_step(tmp_path, accountant):
  built = _build(epsilon=2.0, num_steps=20, accountant=accountant)
  path = tmp_path / "privacy.json"
  book = ledger.Ledger.create(
    path, built.claim(), epsilon_after=built.epsilon_after
  )
  for step in range(20):
    book.charge(step)
  assert book.epsilon == built.epsilon(20) <= 2.0
  while not book.would_exceed(book.charged_steps):
    book.charge(book.charged_steps)
  assert book.charged_steps < 24
  again = mechanism.build(
    _config(epsilon=2.0, num_steps=20, accountant=accountant), _NUM_EXAMPLES
  )
  ledger.Ledger.load(
    path,
    again.claim(),
    epsilon_after=again.epsilon_after,
    resumed_at_step=17,
  )
  # Fails if: epsilon is rounded up past the budget before the last step.


def test_the_claim_names_the_unit_and_the_rule():
  def guarantee(*, views=1, **privacy):
    config = _config(**privacy)
    config.train.views_per_example = views
    return mechanism.build(config, _NUM_EXAMPLES).claim()["guarantee"]

  plain = guarantee()
  assert "training example (POISSON sampling, RDP accountant)" in plain
  assert "training user with all their records" in guarantee(
    unit=config_lib.PrivacyUnit.USER, max_records_per_user=4
  )
  assert "at most 4 records of a user in a step" in guarantee(
    unit=config_lib.PrivacyUnit.USER, max_records_per_user=4
  )
  packed = guarantee(unit=config_lib.PrivacyUnit.PACKED_ROW)
  assert "training packed row" in packed
  assert "which is no record" in packed
  assert "normalised" in guarantee(clip_rule=config_lib.ClipRule.NORMALIZE)
  assert "each layer" in guarantee(clip_scope=config_lib.ClipScope.PER_LAYER)
  assert "noisy counts included" in guarantee(clip_quantile=0.5)
  assert "mean gradient of 3 views" in guarantee(views=3)
  # Fails if: a reader of the sentence takes users for examples.


def test_user_units_scale_noise_and_sampling_by_users():
  built = _build(
    unit=config_lib.PrivacyUnit.USER, max_records_per_user=5, l2_clip_norm=0.7
  )
  alike = _build(l2_clip_norm=0.7)
  assert built.rows_per_unit == built.records.max_records == 5
  assert built.unit_reduction is config_lib.UnitReduction.SUM
  assert built.sampling_prob == alike.sampling_prob == 0.1
  assert built.noise_stddev == alike.noise_stddev
  assert built.clipped_grad_fn(_loss_fn).sensitivity(
    built.neighboring_relation
  ) == pytest.approx(0.7)


def test_users_and_views_do_not_mix():
  config = _config(unit=config_lib.PrivacyUnit.USER)
  config.train.views_per_example = 2
  with pytest.raises(ValueError, match="one view per example"):
    mechanism.build(config, _NUM_EXAMPLES)
