"""Tokens from a trained model: one prompt pass, then one token at a time.

Every request of one `Generator` runs the same two compiled loops, whatever its
prompts' lengths, its number of tokens and its sampling: shapes are those of the
longest prompt, and what differs is an argument. A prompt is padded on the
right; padding has slots in the cache that no token reads before one is written.

>>> model, params = text_only(config, params)  # doctest: +SKIP
>>> generator = Generator(  # doctest: +SKIP
...   model, params, batch_size=4, max_prompt_len=512, max_new_tokens=128)
>>> generator([[1, 15043]], sampling=Sampling(), stop_ids=[2],  # doctest: +SKIP
...           key=key)
[[29892, 3186, 2]]
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from ppnet import config as config_lib
from ppnet.core import checks, prng
from ppnet.models import llama, multimodal

PyTree = Any
Leaf = Any

_NO_TOKEN = -1
_MAX_STOP_IDS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
  """How a token is chosen, in this order; the default is greedy.

  Attributes:
    temperature: what logits are divided by; 0 takes the largest.
    top_k: only this many of the most likely tokens; 0 is all.
    top_p: of those, the fewest most likely ones that have this probability
      together (Holtzman et al. 2020, https://arxiv.org/abs/1904.09751).
  """

  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0

  def check(self) -> None:
    """Raises `ValueError` for a field out of range."""
    checks.non_negative(temperature=self.temperature, top_k=self.top_k)
    checks.probability(top_p=self.top_p)


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=[
    "tokens",
    "lengths",
    "media",
    "keys",
    "temperature",
    "top_k",
    "top_p",
    "stop_ids",
    "num_new_tokens",
  ],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
  """A batch of prompts, in arrays.

  Attributes:
    tokens: padded on the right, i32[B, P].
    lengths: of the prompts, at least 1, i32[B].
    media: modality to its arrays f32[B, ...].
    keys: one per prompt, [B].
    temperature: see `Sampling`, f32[].
    top_k: i32[].
    top_p: f32[].
    stop_ids: tokens that end a row, -1 for none, i32[any].
    num_new_tokens: when to stop at the latest, i32[].
  """

  tokens: Leaf
  lengths: Leaf
  media: Leaf
  keys: Leaf
  temperature: Leaf
  top_k: Leaf
  top_p: Leaf
  stop_ids: Leaf
  num_new_tokens: Leaf


def choose(
  logits: Float[Array, "B V"],
  keys: Key[Array, " B"],
  *,
  temperature: Float[Array, ""],
  top_k: Int[Array, ""],
  top_p: Float[Array, ""],
) -> Int[Array, " B"]:
  """One token per row; see `Sampling`.

  Tokens as likely as the last one that is kept are kept as well.

  Args:
    logits: of the next token.
    keys: a leaf per row.
    temperature: 0 is greedy.
    top_k: 0 is all.
    top_p: in (0, 1].
  """
  vocab_size = logits.shape[-1]
  greedy = jnp.argmax(logits, axis=-1)
  logits = logits / jnp.where(temperature > 0, temperature, 1.0)
  ordered = -jnp.sort(-logits, axis=-1)
  count = jnp.where(top_k > 0, jnp.minimum(top_k, vocab_size), vocab_size)
  rank = jnp.arange(vocab_size)[None]
  probs = jax.nn.softmax(jnp.where(rank < count, ordered, -jnp.inf), axis=-1)
  before = jnp.cumsum(probs, axis=-1) - probs
  # The first token is always kept: nothing comes before it.
  num_kept = jnp.sum((before < top_p) & (rank < count), axis=-1, keepdims=True)
  last = jnp.take_along_axis(ordered, num_kept - 1, axis=-1)
  allowed = jnp.where(logits >= last, logits, -jnp.inf)
  drawn = jax.vmap(jax.random.categorical)(keys, allowed)
  return jnp.where(temperature > 0, drawn, greedy).astype(jnp.int32)


def generate(
  params: PyTree,
  request: Request,
  *,
  model: multimodal.PPNet,
  max_new_tokens: int,
) -> Int[Array, "B N"]:
  """Continues a batch of prompts. Pure; `Generator` compiles it.

  Args:
    params: of the model.
    request: the prompts and how to go on from them.
    model: the network.
    max_new_tokens: N, size of the result.

  Returns:
    The new tokens, a stop token included; -1 after it, and after
    `request.num_new_tokens`.
  """
  decoder = model.config.decoder
  batch_size, max_prompt_len = request.tokens.shape

  def run(method: str, *args: Any, **kwargs: Any) -> Any:
    return model.apply({"params": params}, *args, method=method, **kwargs)

  def pick(hidden: Array, step: Any) -> Array:
    return choose(
      run("logits", hidden)[:, 0],
      jax.vmap(jax.random.fold_in, in_axes=(0, None))(request.keys, step),
      temperature=request.temperature,
      top_k=request.top_k,
      top_p=request.top_p,
    )

  hidden, fresh = run(
    "extend",
    run("embed", request.tokens, request.media),
    positions=jnp.arange(max_prompt_len)[None],
    cache=llama.empty_cache(decoder, batch_size=batch_size),
  )
  end = (request.lengths - 1)[:, None, None]
  token = pick(jnp.take_along_axis(hidden, end, axis=1), 0)
  room = ((0, 0), (0, 0), (0, max_new_tokens), (0, 0), (0, 0))
  cache = jax.tree.map(lambda leaf: jnp.pad(leaf, room), fresh)  # [L, B, S, ..]

  def is_stop(token):
    return (token[:, None] == request.stop_ids[None]).any(axis=1)

  def goes_on(carry):
    step, _, done, _, _ = carry
    return (step < request.num_new_tokens) & ~done.all()

  def one_step(carry):
    step, token, done, tokens, cache = carry
    at = (request.lengths + step - 1)[:, None]  # The last token's position.
    hidden, fresh = run(
      "extend",
      run("embed_tokens", token[:, None]),
      positions=at,
      cache=cache,
    )
    cache = jax.vmap(llama.KVCache.insert, in_axes=(0, 0, None))(
      cache, fresh, at
    )
    token = jnp.where(done, _NO_TOKEN, pick(hidden, step))
    tokens = tokens.at[:, step].set(token)
    done = done | is_stop(token)
    return step + 1, jnp.maximum(token, 0), done, tokens, cache

  tokens = jnp.full((batch_size, max_new_tokens), _NO_TOKEN, jnp.int32)
  tokens = tokens.at[:, 0].set(token)
  _, _, _, tokens, _ = jax.lax.while_loop(
    goes_on, one_step, (jnp.int32(1), token, is_stop(token), tokens, cache)
  )
  return tokens


class Generator:
  """A model ready to continue prompts.

  Attributes:
    num_compiled: programs compiled so far: one, unless the media's shapes vary.
  """

  def __init__(
    self,
    model: multimodal.PPNet,
    params: PyTree,
    *,
    batch_size: int,
    max_prompt_len: int,
    max_new_tokens: int,
  ):
    """Sizes the shapes; the first request compiles.

    Args:
      model: the network.
      params: its parameters, on the devices that are to compute.
      batch_size: prompts that are continued at once.
      max_prompt_len: longest prompt, media included.
      max_new_tokens: most new tokens of a request.

    Raises:
      ValueError: a size that is not positive, or both together exceed the
        decoder's `max_seq_len`.
    """
    checks.positive(
      batch_size=batch_size,
      max_prompt_len=max_prompt_len,
      max_new_tokens=max_new_tokens,
    )
    checks.at_most(
      model.config.decoder.max_seq_len,
      "Shorten the prompts, ask for fewer tokens, or raise max_seq_len.",
      max_prompt_len_and_new_tokens=max_prompt_len + max_new_tokens,
    )
    self._params = params
    self._batch_size = batch_size
    self._max_prompt_len = max_prompt_len
    self._max_new_tokens = max_new_tokens
    self.num_compiled = 0

    def traced(params, request):
      self.num_compiled += 1  # Runs when JAX traces, never after.
      return generate(
        params, request, model=model, max_new_tokens=max_new_tokens
      )

    self._generate = jax.jit(traced)

  def __call__(
    self,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling,
    stop_ids: Sequence[int],
    key: Key[Array, ""],
    media: Mapping[str, np.ndarray] | None = None,
    num_new_tokens: int | None = None,
  ) -> list[list[int]]:
    """Continues each prompt.

    What a prompt gives does not depend on the others, nor on their order but
    for the number that is folded into `key`.

    Args:
      prompts: token ids, at least one each.
      sampling: how tokens are chosen.
      stop_ids: tokens that end a continuation; at most 8.
      key: a stem; greedy sampling does not use it.
      media: modality to arrays [number of prompts, ...], for the placeholders.
      num_new_tokens: at most this many; None is `max_new_tokens`.

    Returns:
      The new tokens of each prompt, its stop token included.

    Raises:
      ValueError: a prompt that is empty or too long, media for another number
        of prompts, or an option out of range.
    """
    sampling.check()
    limit = num_new_tokens or self._max_new_tokens
    checks.at_most(self._max_new_tokens, num_new_tokens=limit)
    checks.at_most(_MAX_STOP_IDS, num_stop_ids=len(stop_ids))
    media = media or {}
    for name, values in media.items():
      if len(values) != len(prompts):
        checks.fail(
          f"one {name} per prompt ({len(prompts)})", found=len(values)
        )
    keys = prng.per_record(key, jnp.arange(len(prompts)))
    continued = []
    for start in range(0, len(prompts), self._batch_size):
      rows = slice(start, start + self._batch_size)
      request = self._request(
        prompts[rows],
        {name: values[rows] for name, values in media.items()},
        keys[rows],
        sampling=sampling,
        stop_ids=stop_ids,
        limit=limit,
      )
      tokens = jax.device_get(self._generate(self._params, request))
      continued += [
        [int(token) for token in row if token != _NO_TOKEN]
        for row in tokens[: len(prompts[rows])]
      ]
    return continued

  def _request(
    self,
    prompts: Sequence[Sequence[int]],
    media: Mapping[str, np.ndarray],
    keys: Array,
    *,
    sampling: Sampling,
    stop_ids: Sequence[int],
    limit: int,
  ) -> Request:
    """Pads prompts to one shape; rows that are missing repeat the first."""
    missing = self._batch_size - len(prompts)
    rows = [*prompts, *[prompts[0]] * missing]
    tokens = np.zeros((len(rows), self._max_prompt_len), np.int32)
    for row, prompt in enumerate(rows):
      if not 1 <= len(prompt) <= self._max_prompt_len:
        checks.fail(
          f"prompts of 1 to {self._max_prompt_len} tokens",
          prompt=row,
          num_tokens=len(prompt),
        )
      tokens[row, : len(prompt)] = prompt
    order = np.append(np.arange(len(prompts)), np.zeros(missing, int))
    stops = [*stop_ids, *[_NO_TOKEN - 1] * (_MAX_STOP_IDS - len(stop_ids))]
    return Request(
      tokens=jnp.asarray(tokens),
      lengths=jnp.asarray([len(prompt) for prompt in rows], jnp.int32),
      media={
        name: jnp.asarray(np.asarray(values)[order])
        for name, values in media.items()
      },
      keys=keys[order],
      temperature=jnp.float32(sampling.temperature),
      top_k=jnp.int32(sampling.top_k),
      top_p=jnp.float32(sampling.top_p),
      stop_ids=jnp.asarray(stops, jnp.int32),
      num_new_tokens=jnp.int32(limit),
    )


def text_only(
  config: config_lib.LlamaConfig, params: PyTree
) -> tuple[multimodal.PPNet, PyTree]:
  """A decoder (from `models.hf`, say) as the network that `Generator` takes."""
  model = multimodal.PPNet(
    config_lib.ModelConfig(decoder=config, image=None, audio=None), {}
  )
  return model, {"decoder": params}
