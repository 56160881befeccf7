"""Does the model give up what was planted, when it is shown how it begins?

The attacker knows everything of a canary but its secret, has the model continue
it, greedily and with a beam, and compares (Carlini et al. 2021,
https://arxiv.org/abs/2012.07805; near-verbatim as in Ippolito et al. 2023,
https://arxiv.org/abs/2210.17546).
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ppnet.audit import canaries as canaries_lib
from ppnet.core import checks, prng
from ppnet.models import generate, llama, lora, multimodal
from ppnet.train import loop

# Of tokens that all candidates of a secret begin with: enough of them that they
# have no digit of it in common by accident.
_COMPARED = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
  """How many secrets one way of continuing brings out.

  Attributes:
    verbatim: share of secrets whose tokens come out one for one.
    near_verbatim: share whose text comes out within `max_distance`.
    distances: edit distance over the longer text's length, in [0, 1], f64[n].
    completions: what came out, n texts.
  """

  verbatim: float
  near_verbatim: float
  distances: np.ndarray
  completions: Sequence[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtractionAudit:
  """What was extracted.

  Attributes:
    greedy: the likeliest token at each place.
    beam: the likeliest of the sequences that a beam found.
    best_of_beam: whichever of them is nearest to the secret: what an attacker
      has who may try all of them.
    beam_size: how many those are.
    max_distance: up to which a text counts as near-verbatim.
    num_canaries: n.
    secrets: what should have come out, n texts.
  """

  greedy: Rates
  beam: Rates
  best_of_beam: Rates
  beam_size: int
  max_distance: float
  num_canaries: int
  secrets: Sequence[str]


def audit_extraction(
  experiment: loop.Experiment,
  params: Any,
  canaries: Sequence[canaries_lib.Canary],
  *,
  beam_size: int = 8,
  max_distance: float = 0.2,
) -> ExtractionAudit:
  """Shows the model how each canary begins, and compares what follows.

  The attacker knows the longest secret's number of tokens; what comes behind a
  secret's own length is not compared.

  Args:
    experiment: from `train.loop.open_experiment`.
    params: trained parameters on the program's mesh.
    canaries: from `canaries.make`, at least one.
    beam_size: sequences that the beam keeps.
    max_distance: see `ExtractionAudit`.

  Raises:
    ValueError: no canaries, or sizes that are not positive.
  """
  checks.positive(num_canaries=len(canaries), beam_size=beam_size)
  tokenizer = experiment.tokenizer
  cut = [_prompt_and_secret(experiment, canary) for canary in canaries]
  prompts = [prompt for prompt, _ in cut]
  secrets = [secret for _, secret in cut]
  media = _media(experiment, canaries)
  num_new_tokens = max(map(len, secrets))
  whole = lora.combine(params, experiment.program.frozen())
  greedy = generate.Generator(
    experiment.program.model,
    whole,
    batch_size=min(len(prompts), 16),
    max_prompt_len=max(map(len, prompts)),
    max_new_tokens=num_new_tokens,
  )(
    prompts,
    sampling=generate.Sampling(),
    stop_ids=[],
    key=prng.root(0),  # Greedy: not used.
    media=media,
  )
  beams = beam_completions(
    experiment.program.model,
    whole,
    prompts,
    media=media,
    beam_size=beam_size,
    num_new_tokens=num_new_tokens,
  )

  def rates(completions: Sequence[Sequence[int]]) -> Rates:
    short = [
      list(tokens)[: len(secret)]
      for tokens, secret in zip(completions, secrets, strict=True)
    ]
    texts = [tokenizer.decode(tokens) for tokens in short]
    distances = np.array(
      [
        distance(text, tokenizer.decode(secret))
        for text, secret in zip(texts, secrets, strict=True)
      ]
    )
    return Rates(
      verbatim=float(
        np.mean([a == b for a, b in zip(short, secrets, strict=True)])
      ),
      near_verbatim=float(np.mean(distances <= max_distance)),
      distances=distances,
      completions=tuple(texts),
    )

  def nearest(found: np.ndarray, secret: list[int]) -> list[int]:
    wanted = tokenizer.decode(secret)
    return min(
      found.tolist(),
      key=lambda row: distance(tokenizer.decode(row[: len(secret)]), wanted),
    )

  return ExtractionAudit(
    greedy=rates(greedy),
    beam=rates([found[0].tolist() for found in beams]),
    best_of_beam=rates(
      [nearest(*pair) for pair in zip(beams, secrets, strict=True)]
    ),
    beam_size=beam_size,
    max_distance=max_distance,
    num_canaries=len(canaries),
    secrets=tuple(tokenizer.decode(secret) for secret in secrets),
  )


def distance(left: str, right: str) -> float:
  """Edit distance (Levenshtein 1966) over the longer length; 0 of nothing.

  >>> distance("kitten", "sitting")
  0.42857142857142855
  """
  row = list(range(len(right) + 1))
  for place, letter in enumerate(left, 1):
    above, row[0] = row[0], place
    for column, other in enumerate(right, 1):
      above, row[column] = (
        row[column],
        min(row[column] + 1, row[column - 1] + 1, above + (letter != other)),
      )
  return row[-1] / max(len(left), len(right), 1)


def _prompt_and_secret(
  experiment: loop.Experiment, canary: canaries_lib.Canary
) -> tuple[list[int], list[int]]:
  """A canary's tokens, cut where its candidates begin to differ."""
  layout = experiment.datasets["train"].layout

  def tokens(record):
    laid_out = layout.tokens(record)
    return [*laid_out.tokens.tolist(), int(laid_out.targets[-1])]

  whole = tokens(canary.record)
  end = len(whole)
  for secret in canary.candidates[:_COMPARED]:
    other = tokens(canary.with_secret(secret))
    if other != whole:
      end = min(end, _num_common(whole, other))
  return whole[:end], whole[end:]


def _num_common(left: Sequence[int], right: Sequence[int]) -> int:
  """How many tokens two sequences begin with in common."""
  count = 0
  for a, b in zip(left, right, strict=False):
    if a != b:
      break
    count += 1
  return count


def _media(
  experiment: loop.Experiment, canaries: Sequence[canaries_lib.Canary]
) -> dict[str, np.ndarray]:
  """The canaries' pictures and sounds, [n, ...]."""
  held = canaries_lib.examples(
    experiment.datasets["train"], [canary.record for canary in canaries]
  )
  rows = [held[place] for place in range(len(held))]
  return {name: np.stack([row[name] for row in rows]) for name in held.chains}


def beam_completions(
  model: multimodal.PPNet,
  params: Any,
  prompts: Sequence[Sequence[int]],
  *,
  media: Mapping[str, np.ndarray],
  beam_size: int,
  num_new_tokens: int,
) -> Int[np.ndarray, "n K N"]:
  """The likeliest continuations of each prompt that a beam finds, best first.

  Args:
    model: the network.
    params: its parameters.
    prompts: token ids, at least one each.
    media: modality to arrays [n, ...].
    beam_size: K.
    num_new_tokens: N; no token ends a sequence.
  """
  lengths = np.array([len(prompt) for prompt in prompts], np.int32)
  tokens = np.zeros((len(prompts), lengths.max()), np.int32)
  for row, prompt in enumerate(prompts):
    tokens[row, : len(prompt)] = prompt
  search = jax.jit(
    functools.partial(
      beam_search,
      model=model,
      beam_size=beam_size,
      num_new_tokens=num_new_tokens,
    )
  )
  found, _ = search(params, tokens, lengths, dict(media))
  return np.asarray(jax.device_get(found))


def beam_search(
  params: Any,
  tokens: Int[Array, "B P"],
  lengths: Int[Array, " B"],
  media: Mapping[str, Array],
  *,
  model: multimodal.PPNet,
  beam_size: int,
  num_new_tokens: int,
) -> tuple[Int[Array, "B K N"], Float[Array, "B K"]]:
  """Beam search without stop tokens or a length penalty. Pure.

  Args:
    params: of the model.
    tokens: prompts, padded on the right.
    lengths: of the prompts, at least 1.
    media: modality to its arrays [B, ...].
    model: the network.
    beam_size: K, at most the size of the vocabulary.
    num_new_tokens: N.

  Returns:
    The new tokens of K sequences, the likeliest first, and their logarithms of
    probability.
  """
  batch_size, prompt_len = tokens.shape
  checks.at_most(model.config.decoder.vocab_size, beam_size=beam_size)

  def run(method: str, *args: Any, **kwargs: Any) -> Any:
    return model.apply({"params": params}, *args, method=method, **kwargs)

  def log_probs(hidden: Array) -> Array:
    return jax.nn.log_softmax(run("logits", hidden)[:, 0], axis=-1)

  hidden, fresh = run(
    "extend",
    run("embed", tokens, media),
    positions=jnp.arange(prompt_len)[None],
    cache=llama.empty_cache(model.config.decoder, batch_size=batch_size),
  )
  end = (lengths - 1)[:, None, None]
  first = log_probs(jnp.take_along_axis(hidden, end, axis=1))
  scores, token = jax.lax.top_k(first, beam_size)  # [B, K]
  room = ((0, 0), (0, 0), (0, num_new_tokens), (0, 0), (0, 0))
  cache = jax.tree.map(  # [L, B K, S, ...]
    lambda leaf: jnp.repeat(jnp.pad(leaf, room), beam_size, axis=1), fresh
  )
  found = jnp.zeros((batch_size, beam_size, num_new_tokens), jnp.int32)
  found = found.at[:, :, 0].set(token)
  at = jnp.repeat(lengths, beam_size)[:, None]  # The last token's position.

  def one_step(step, carry):
    scores, found, cache = carry
    where = at + step - 1
    hidden, fresh = run(
      "extend",
      run("embed_tokens", found[:, :, step - 1].reshape(-1, 1)),
      positions=where,
      cache=cache,
    )
    cache = jax.vmap(llama.KVCache.insert, in_axes=(0, 0, None))(
      cache, fresh, where
    )
    total = scores[:, :, None] + log_probs(hidden).reshape(*scores.shape, -1)
    vocab_size = total.shape[-1]
    scores, place = jax.lax.top_k(
      total.reshape(batch_size, -1), beam_size
    )  # [B, K]
    parent, token = place // vocab_size, place % vocab_size
    found = jnp.take_along_axis(found, parent[:, :, None], axis=1)
    found = found.at[:, :, step].set(token)
    rows = (jnp.arange(batch_size)[:, None] * beam_size + parent).reshape(-1)
    return scores, found, jax.tree.map(lambda leaf: leaf[:, rows], cache)

  scores, found, _ = jax.lax.fori_loop(
    1, num_new_tokens, one_step, (scores, found, cache)
  )
  return found, scores
