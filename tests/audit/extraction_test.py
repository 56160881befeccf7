"""What was learnt by heart comes out; what was not, does not."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppnet.audit import extraction
from ppnet.core import prng
from ppnet.models import generate
from tests.audit import memorising

memorised = memorising.memorised_fixture


def test_a_model_gives_up_what_was_planted_in_it(memorised):
  found = extraction.audit_extraction(
    memorised.experiment, memorised.params, memorised.planted, beam_size=4
  )
  assert found.secrets == tuple(c.secret for c in memorised.planted)
  for rates in (found.greedy, found.beam, found.best_of_beam):
    assert rates.verbatim == 1.0
    assert rates.near_verbatim == 1.0
    assert rates.completions == found.secrets


def test_a_model_without_them_does_not(memorised):
  found = extraction.audit_extraction(
    memorised.experiment, memorised.clean, memorised.planted, beam_size=4
  )
  for rates in (found.greedy, found.beam, found.best_of_beam):
    assert rates.verbatim == 0.0
    assert rates.distances.min() > 0
  controls = extraction.audit_extraction(
    memorised.experiment, memorised.params, memorised.controls, beam_size=4
  )
  assert controls.greedy.verbatim == 0.0
  # Fails if: the secret is a part of the prompt.


@pytest.mark.parametrize(
  ("left", "right", "expected"),
  [
    ("", "", 0.0),
    ("abc", "abc", 0.0),
    ("", "abcd", 1.0),
    ("4839", "4830", 0.25),
    ("4839", "839", 0.25),
    ("kitten", "sitting", 3 / 7),
  ],
)
def test_distance_is_levenshteins_over_the_longer_length(left, right, expected):
  assert extraction.distance(left, right) == pytest.approx(expected)
  assert extraction.distance(right, left) == pytest.approx(expected)


@pytest.fixture(scope="module")
def prompts(memorised):
  encode = memorised.experiment.tokenizer.encode
  return [[1, *encode("au and")], [1, *encode("b")]]


@pytest.mark.slow
def test_a_beam_of_one_is_greedy(memorised, prompts):
  model = memorised.experiment.program.model
  beams = extraction.beam_completions(
    model,
    memorised.params,
    prompts,
    media={},
    beam_size=1,
    num_new_tokens=5,
  )
  greedy = generate.Generator(
    model, memorised.params, batch_size=2, max_prompt_len=7, max_new_tokens=5
  )(
    prompts,
    sampling=generate.Sampling(),
    stop_ids=[],
    key=prng.root(0),
  )
  assert beams[:, 0].tolist() == greedy


@pytest.mark.slow
def test_a_beam_finds_the_likeliest_sequences_there_are(memorised, prompts):
  """As wide as it must be for two tokens: against all pairs, one by one."""
  model = memorised.experiment.program.model
  params = jax.tree.map(lambda leaf: 0.5 * leaf, memorised.params)
  width = 264
  tokens = np.zeros((2, 7), np.int32)
  for row, prompt in enumerate(prompts):
    tokens[row, : len(prompt)] = prompt
  lengths = np.array([7, 2], np.int32)
  found, scores = jax.jit(
    lambda p: extraction.beam_search(
      p,
      jnp.asarray(tokens),
      jnp.asarray(lengths),
      {},
      model=model,
      beam_size=width,
      num_new_tokens=2,
    )
  )(params)
  forward = jax.jit(
    lambda p, t: jax.nn.log_softmax(model.apply({"params": p}, t, media={}))
  )
  for row, prompt in enumerate(prompts):
    firsts = [[*prompt, token] for token in range(width)]
    log_probs = np.asarray(forward(params, jnp.array(firsts)))
    first = log_probs[0, len(prompt) - 1]
    total = first[:, None] + log_probs[:, len(prompt)]
    best = np.sort(total.ravel())[::-1][:width]
    np.testing.assert_allclose(scores[row], best, atol=1e-4)
    for rank in range(5):
      a, b = np.asarray(found)[row, rank]
      assert total[a, b] == pytest.approx(best[rank], abs=1e-4)
  assert len(set(itertools.chain(*prompts))) > 3  # Two different prompts.


def test_a_beam_s_scores_are_those_of_its_sequences(memorised, prompts):
  """Over several steps, in which sequences change their places."""
  model = memorised.experiment.program.model
  params = jax.tree.map(lambda leaf: 0.5 * leaf, memorised.params)
  prompt = prompts[0]
  found, scores = jax.jit(
    lambda p: extraction.beam_search(
      p,
      jnp.array([prompt], jnp.int32),
      jnp.array([len(prompt)], jnp.int32),
      {},
      model=model,
      beam_size=12,
      num_new_tokens=5,
    )
  )(params)
  whole = np.array([[*prompt, *row] for row in np.asarray(found)[0].tolist()])
  log_probs = jax.nn.log_softmax(
    model.apply({"params": params}, jnp.asarray(whole), media={})
  )
  new = np.take_along_axis(
    np.asarray(log_probs)[:, len(prompt) - 1 : -1],
    whole[:, len(prompt) :, None],
    axis=2,
  )
  np.testing.assert_allclose(scores[0], new.sum(axis=(1, 2)), atol=1e-4)
  assert (np.diff(np.asarray(scores)[0]) <= 0).all()
  assert len(np.unique(whole, axis=0)) == 12
  # Fails if: a sequence goes on with another one's keys and values.
