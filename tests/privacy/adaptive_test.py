"""The adaptive clip norm: its budget, its neighbours, where it goes."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppnet import config as config_lib
from ppnet.privacy import accounting, adaptive, mechanism

ADD = config_lib.NeighboringRelation.ADD_OR_REMOVE_ONE
REPLACE = config_lib.NeighboringRelation.REPLACE_ONE


def build(relation=ADD, **privacy):
  return mechanism.build(
    config_lib.ExperimentConfig(
      privacy=config_lib.PrivacyConfig(
        **{
          "epsilon": None,
          "noise_multiplier": 1.25,
          "clip_quantile": 0.6,
          "clip_count_stddev": 2.0,
          "neighboring_relation": relation,
        }
        | privacy
      ),
      train=config_lib.TrainConfig(num_steps=7, expected_batch_size=30),
    ),
    900,
  )


@functools.cache
def releases(relation):
  """Both parts of a step's release, in units of their noise."""
  built = build(relation)
  fn = built.clipped_grad_fn(lambda params, batch: batch @ params)

  def release(rows, is_padding, clip_norm):
    out = fn(jnp.zeros(5), rows, is_padding, scale=clip_norm)
    count = adaptive.centred_count(
      out.grad_norms, ~is_padding & ~out.is_nonfinite, clip_norm=clip_norm
    )
    return jnp.append(
      out.grad_sum / built.noise_stddev, count / built.adaptive.count_stddev
    )

  return jax.jit(release)


_size = st.sampled_from([0.0, 1e-6, 0.3, 1.0, 5.0, 1e6, np.nan])


@pytest.mark.parametrize("relation", [ADD, REPLACE])
@hypothesis.given(
  sizes=st.lists(_size, min_size=5, max_size=5),
  clip_norm=st.sampled_from([1e-4, 0.3, 1.0, 40.0]),
  is_opposite=st.booleans(),
  seed=st.integers(0, 2**32 - 1),
)
@hypothesis.example(sizes=[5.0] * 5, clip_norm=1.0, is_opposite=False, seed=0)
@hypothesis.example(  # As far as two units can be: direction and count.
  sizes=[5.0] * 4 + [0.999], clip_norm=1.0, is_opposite=True, seed=0
)
@hypothesis.settings(derandomize=True, deadline=None, max_examples=40)
def test_both_releases_together_cost_what_is_accounted_for(
  relation, sizes, clip_norm, is_opposite, seed
):
  rows = np.random.default_rng(seed).normal(size=(5, 5))
  if is_opposite:
    rows[4] = -rows[1]
  rows *= np.array(sizes)[:, None] / np.linalg.norm(rows, axis=1, keepdims=True)
  rows = jnp.asarray(rows, jnp.float32)
  release = functools.partial(releases(relation), clip_norm=clip_norm)
  # One unit leaves; then another one, row 4, takes its place.
  whole = release(rows, jnp.array([False] * 4 + [True]))
  changed = rows.at[1].set(rows[4]) if relation is REPLACE else rows
  gone = jnp.array([False, relation is ADD, False, False, True])
  moved = np.linalg.norm(np.float64(whole) - release(changed, gone))
  assert moved <= 1 / build(relation).noise_multiplier * (1 + 1e-6)
  # Fails if: the count's part of the budget is not taken from the sum's, or the
  # count is not centred.


@pytest.mark.parametrize("relation", [ADD, REPLACE])
def test_the_budget_is_split_and_used_up(relation):
  built = build(relation)
  spread = {ADD: 0.5, REPLACE: 1.0}[relation]
  joint = (built.sensitivity / built.noise_stddev) ** 2 + (spread / 2.0) ** 2
  assert joint == pytest.approx(1.25**-2, rel=1e-12)
  assert built.sensitivity == {ADD: 1.0, REPLACE: 2.0}[relation]
  assert built.epsilon(7) == accounting.epsilon(
    noise_multiplier=1.25,
    sampling_prob=30 / 900,
    num_steps=7,
    delta=1e-5,
    neighboring_relation=relation,
  )
  assert built.claim()["clip_count_stddev"] == 2.0
  # Fails if: the accountant is told of the sum's noise alone.


def test_a_count_that_costs_everything_is_refused():
  with pytest.raises(ValueError, match="clip_count_stddev > 0.625"):
    build(clip_count_stddev=0.625)
  build(clip_count_stddev=0.63)
  with pytest.raises(ValueError, match="clip_count_stddev > 1.25"):
    build(REPLACE, clip_count_stddev=1.2)


def test_default_count_noise_is_a_twentieth_of_the_batch():
  assert build(clip_count_stddev=None).adaptive.count_stddev == 1.5


def test_without_noise_nothing_is_claimed_and_nothing_is_drawn():
  built = build(noise=False)
  assert not built.has_guarantee
  assert built.noise_stddev == built.adaptive.count_stddev == 0


def test_clip_norm_reaches_its_quantile_and_stays_in_range():
  follows = adaptive.AdaptiveClip(
    initial_clip_norm=1.0,
    quantile=0.8,
    learning_rate=0.2,
    expected_batch_size=50,
    count_stddev=0.0,
  )
  rng = np.random.default_rng(0)
  clip_norm = jnp.float32(follows.initial_clip_norm)
  for _ in range(150):
    norms = jnp.asarray(np.exp(3 + rng.normal(size=50)), jnp.float32)
    count = adaptive.centred_count(
      norms, jnp.ones(50, bool), clip_norm=clip_norm
    )
    clip_norm = follows.next_clip_norm(clip_norm, count)
  assert abs(np.log(clip_norm) - (3 + 0.8416)) < 0.2  # Normal quantile of 0.8.
  for count, end in ((-1e9, 1e15), (1e9, 1e-10)):
    moved = follows.next_clip_norm(clip_norm, jnp.float32(count))
    assert float(moved) == pytest.approx(end)
  # Fails if: the clip norm moves the wrong way, or leaves float32.
