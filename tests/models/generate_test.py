"""Generation: transformers' greedy tokens, one program, every way to choose."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppnet.core import prng
from ppnet.models import generate, hf, multimodal
from tests import tiny
from tests.goldens import make_llama
from tests.models import hf_test

FAMILIES = list(make_llama.FAMILIES)
GREEDY = generate.Sampling()
KEY = jax.random.key(0)


def build(family):
  """A family's decoder with the goldens' weights."""
  config, seed = make_llama.small(family), FAMILIES.index(family)
  named = hf_test.tensors(config, seed)
  params = {}
  for entry in hf._entries(config):
    values = [named[name] for name in entry.names(config.num_layers)]
    values = [value.T if entry.transposed else value for value in values]
    leaf = np.stack(values) if entry.is_stacked else values[0]
    hf._put(params, entry.path, jnp.asarray(leaf))
  return generate.text_only(config, params)


@pytest.fixture(scope="module")
def llama3():
  """One generator, so that every test of it shares its program."""
  model, params = build("llama3_8b")
  generator = generate.Generator(
    model, params, batch_size=2, max_prompt_len=12, max_new_tokens=9
  )
  given = make_llama.inputs(FAMILIES.index("llama3_8b"))
  prompts = [
    row[padding:].tolist()
    for row, padding in zip(given["tokens"], given["num_padding"], strict=True)
  ]
  return generator, prompts, model, params


def greedy_golden(family):
  with np.load(make_llama.FOLDER / "llama.npz") as arrays:
    return arrays[f"{family}/greedy"].tolist()


def test_greedy_tokens_are_transformers_own(llama3):
  generator, prompts, _, _ = llama3
  got = generator(
    prompts, sampling=GREEDY, stop_ids=[], key=KEY, num_new_tokens=7
  )
  assert got == greedy_golden("llama3_8b")
  # Fails if: a position, a slot or the mask of a decoding step is off.


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_of_every_family_are_transformers_own(family):
  model, params = build(family)
  given = make_llama.inputs(FAMILIES.index(family))
  prompts = [
    row[padding:].tolist()
    for row, padding in zip(given["tokens"], given["num_padding"], strict=True)
  ]
  generator = generate.Generator(
    model, params, batch_size=2, max_prompt_len=11, max_new_tokens=7
  )
  got = generator(prompts, sampling=GREEDY, stop_ids=[], key=KEY)
  assert got == greedy_golden(family)


def test_any_length_number_and_sampling_is_one_program(llama3):
  generator, prompts, _, _ = llama3
  alone = generator(prompts[:1], sampling=GREEDY, stop_ids=[], key=KEY)
  assert len(alone[0]) == 9
  for prompt, options, number in (
    ([4] * 12, GREEDY, 1),
    ([5], generate.Sampling(temperature=0.7, top_k=3, top_p=0.9), 9),
    (prompts[1], generate.Sampling(temperature=2.0), 4),
  ):
    (out,) = generator(
      [prompt], sampling=options, stop_ids=[], key=KEY, num_new_tokens=number
    )
    assert len(out) == number
  assert generator.num_compiled == 1
  # Fails if: a length or an option is static.


def test_a_prompt_s_continuation_does_not_depend_on_the_others(llama3):
  generator, prompts, _, _ = llama3
  three = [*prompts, [7, 8, 9, 10]]  # Two batches, the second one padded.
  both = generator(three, sampling=GREEDY, stop_ids=[], key=KEY)
  for prompt, expected in zip(three, both, strict=True):
    (alone,) = generator([prompt], sampling=GREEDY, stop_ids=[], key=KEY)
    assert alone == expected


def test_a_stop_token_ends_its_row_alone(llama3):
  generator, prompts, _, _ = llama3
  first, second = generator(prompts, sampling=GREEDY, stop_ids=[], key=KEY)
  stop = next(t for t in first[1:] if t not in second)
  cut = generator(prompts, sampling=GREEDY, stop_ids=[36, stop], key=KEY)
  assert cut[0] == first[: first.index(stop) + 1]
  end = second.index(36) + 1 if 36 in second else len(second)
  assert cut[1] == second[:end]


def test_drawn_tokens_repeat_with_their_key_and_differ_without(llama3):
  generator, prompts, _, _ = llama3
  hot = generate.Sampling(temperature=3.0)

  def draw(seed):
    key = jax.random.key(seed)
    rows = [prompts[0], prompts[0]]
    return generator(rows, sampling=hot, stop_ids=[], key=key)

  one, again, other = draw(1), draw(1), draw(2)
  assert one == again
  assert one != other
  assert one[0] != one[1]  # Each row has a key of its own.


# One step's choice.


def frequencies(logits, num_draws=4000, **options):
  """How often each token is drawn."""
  sampling = generate.Sampling(**options)
  drawn = jax.jit(generate.choose)(
    jnp.broadcast_to(jnp.asarray(logits), (num_draws, len(logits))),
    jax.random.split(jax.random.key(5), num_draws),
    temperature=jnp.float32(sampling.temperature),
    top_k=jnp.int32(sampling.top_k),
    top_p=jnp.float32(sampling.top_p),
  )
  return np.bincount(drawn, minlength=len(logits)) / num_draws


LOGITS = np.log(np.array([0.1, 0.4, 0.05, 0.3, 0.15], np.float32))


@pytest.mark.parametrize(
  ("options", "expected"),
  [
    ({}, [0, 1, 0, 0, 0]),
    ({"temperature": 1.0}, [0.1, 0.4, 0.05, 0.3, 0.15]),
    ({"temperature": 0.5}, [0.0351, 0.5614, 0.0088, 0.3158, 0.0789]),
    ({"temperature": 1.0, "top_k": 2}, [0, 4 / 7, 0, 3 / 7, 0]),
    ({"temperature": 1.0, "top_k": 99}, [0.1, 0.4, 0.05, 0.3, 0.15]),
    ({"temperature": 1.0, "top_p": 0.35}, [0, 1, 0, 0, 0]),
    ({"temperature": 1.0, "top_p": 0.6}, [0, 4 / 7, 0, 3 / 7, 0]),
    # Of the three that top_k leaves, two have 0.7 / 0.85 = 0.82.
    ({"temperature": 1.0, "top_k": 3, "top_p": 0.8}, [0, 4 / 7, 0, 3 / 7, 0]),
  ],
)
def test_tokens_are_drawn_with_their_probability(options, expected):
  got = frequencies(LOGITS, **options)
  # Four standard deviations of a share of 4000 draws.
  np.testing.assert_allclose(got, expected, atol=4 * 0.5 / 4000**0.5)
  np.testing.assert_array_equal(got == 0, np.array(expected) == 0)


# Pictures and sounds.


def test_prompts_with_pictures_and_sounds_give_the_network_s_own_tokens():
  """Each new token is the most likely one of a whole forward pass."""
  config = tiny.experiment().model
  model = multimodal.PPNet(config, {"image": 4, "audio": 5})
  rng = np.random.default_rng(0)
  media = {
    "image": rng.normal(size=(2, 8, 8, 1)).astype(np.float32),
    "audio": rng.normal(size=(2, 24, 7)).astype(np.float32),
  }
  prompts = [[1, 4, 4, 4, 4, 5, 5, 20, 21], [1, 4, 4, 4, 4, 5, 5, 30]]
  start = jnp.zeros((2, 12), jnp.int32)
  arrays = {name: jnp.asarray(value) for name, value in media.items()}
  shapes = jax.eval_shape(
    lambda: model.init(prng.root(0), start, media=arrays)["params"]
  )
  params = jax.tree.map(
    lambda leaf: jnp.asarray(0.5 * rng.normal(size=leaf.shape), jnp.float32),
    nn.meta.unbox(shapes),
  )
  got = generate.Generator(
    model, params, batch_size=2, max_prompt_len=9, max_new_tokens=3
  )(prompts, sampling=GREEDY, stop_ids=[], key=KEY, media=media)
  apply = jax.jit(
    lambda tokens: model.apply({"params": params}, tokens, media=arrays)
  )
  tokens = np.zeros((2, 12), np.int32)
  for row, prompt in enumerate(prompts):
    tokens[row, : len(prompt)] = prompt
  expected = [[], []]
  for _ in range(3):
    logits = np.asarray(apply(jnp.asarray(tokens)))
    for row, prompt in enumerate(prompts):
      end = len(prompt) + len(expected[row])
      expected[row].append(int(logits[row, end - 1].argmax()))
      tokens[row, end] = expected[row][-1]
  assert got == expected


# What is refused.


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"prompts": [[]]}, r"1 to 12 tokens, got prompt=0, num_tokens=0"),
    ({"prompts": [[3] * 13]}, "num_tokens=13"),
    ({"sampling": generate.Sampling(temperature=-1.0)}, "temperature >= 0"),
    ({"sampling": generate.Sampling(top_p=0.0)}, "0 < top_p <= 1"),
    ({"num_new_tokens": 10}, "num_new_tokens <= 9"),
    ({"stop_ids": [0] * 9}, "num_stop_ids <= 8"),
    ({"media": {"image": np.zeros((3, 1))}}, r"one image per prompt \(1\)"),
  ],
)
def test_what_does_not_fit_is_named(change, message, llama3):
  generator, _, _, _ = llama3
  options = {
    "prompts": [[3]],
    "sampling": GREEDY,
    "stop_ids": [],
    "key": KEY,
  } | change
  with pytest.raises(ValueError, match=message):
    generator(options.pop("prompts"), **options)


def test_a_decoder_that_is_too_short_is_named(llama3):
  _, _, model, params = llama3
  with pytest.raises(ValueError, match="max_prompt_len_and_new_tokens <= 64"):
    generate.Generator(
      model, params, batch_size=1, max_prompt_len=60, max_new_tokens=5
    )
