"""One record's attention weights, with noise and without, to look at."""

import dataclasses
from typing import Any

import jax
import numpy as np

from ppnet import config as config_lib
from ppnet.core import checks, prng
from ppnet.models import llama, lora
from ppnet.train import loop, losses

_MAX_HEADS = 4
_MAX_TOKENS = 64


def attention_maps(experiment: loop.Experiment, params: Any) -> dict[str, Any]:
  """Weights of one layer for one test record, its first readable one.

  The layer is the first with noise.

  Args:
    experiment: from `loop.open_experiment`, with attention noise.
    params: trained parameters.

  Returns:
    A record: "layer", "heads", "tokens" (what each is, of at most 64, padding
    left out), and "clean" and "noisy" [heads, T, T], rows are queries; beside
    them the noise's "mode" and "stddev".

  Raises:
    ValueError: there is no attention noise, or no record that can be read.
  """
  config = experiment.config
  noise_config = config.attention_noise
  checks.positive(**{"attention_noise.stddev": noise_config.stddev})
  dataset, tokenizer = experiment.datasets["test"], experiment.tokenizer
  rows = ((i, dataset[i]) for i in range(len(dataset)))
  rows = (pair for pair in rows if not pair[1]["is_padding_example"])
  index, row = next(rows, (-1, None))
  if row is None:
    checks.fail("a test record that can be read", num_records=len(dataset))
  batch = _first_tokens(
    {name: np.asarray(value)[None] for name, value in row.items()},
    placeholders=list(tokenizer.placeholder_ids.values()),
  )
  program = experiment.program
  placed = jax.device_put(batch)
  cut_keys = None
  if program.cut_keys is not None:
    cut_keys = program.cut_keys(placed["index"], None)
  # The draw of an evaluation with noise.
  stem = prng.stream(program.root_key, prng.Stream.EVAL_ATTENTION_NOISE, 0)
  noise = losses.attention_noise(
    # The hardware's cannot be looked at; this is as wide.
    dataclasses.replace(
      noise_config, generator=config_lib.NoiseGenerator.PORTABLE
    ),
    prng.per_record(stem, placed["index"]),
  )
  layer = min(config.model.decoder.noise_layers or (0,))
  params = lora.combine(params, program.frozen())
  num_tokens = _num_tokens(row["tokens"], tokenizer.pad_id)

  def weights(noise):
    found = program.model.apply(
      {"params": params},
      placed["tokens"],
      media=losses.media(placed),
      noise=noise,
      # Both share the cut's draw: it is one noisy state.
      cut_keys=None if cut_keys is None else jax.random.clone(cut_keys),
      positions=placed.get("positions"),
      segment_ids=placed.get("segment_ids"),
      mutable=[llama.MAPS],
    )[1]
    (every,) = jax.tree.leaves(found)  # [L, 1, N, T, T]
    own = np.asarray(every)[layer, 0, :_MAX_HEADS]
    return own[:, :num_tokens, :num_tokens]

  clean = weights(None)
  return {
    "record": index,
    "layer": layer,
    "heads": list(range(len(clean))),
    "mode": noise_config.mode,
    "stddev": noise_config.stddev,
    "tokens": _spelling(row["tokens"][:num_tokens], tokenizer),
    "clean": clean.tolist(),
    "noisy": weights(noise).tolist(),
  }


def _first_tokens(
  batch: dict[str, np.ndarray], *, placeholders: list[int]
) -> dict[str, np.ndarray]:
  """Without the tokens that nobody will see: maps of all would be O(T^2).

  Attention is causal, so that earlier tokens do not notice. Places of pictures
  and sounds stay together.
  """
  (places,) = np.nonzero(np.isin(batch["tokens"][0], placeholders))
  most = max(_MAX_TOKENS, *(places + 1)) if places.size else _MAX_TOKENS
  short = {
    name: batch[name][:, :most]
    for name in ("tokens", "positions", "segment_ids")
    if name in batch
  }
  return batch | short


def _num_tokens(tokens: np.ndarray, pad_id: int) -> int:
  """Tokens to show: all that are no padding, but not too many."""
  return min(int(np.sum(tokens != pad_id)), _MAX_TOKENS)


def _spelling(tokens: np.ndarray, tokenizer: Any) -> list[str]:
  """What each token is: its text, or the modality whose place it is."""
  names = {number: name for name, number in tokenizer.placeholder_ids.items()}
  names[tokenizer.bos_id] = "<s>"
  return [names.get(int(t)) or tokenizer.decode([int(t)]) for t in tokens]
