"""A decoder's stored weights in the places of random ones."""

import dataclasses
import functools
from typing import Any

import jax
from jax.sharding import Mesh

from ppnet import config as config_lib
from ppnet.core import checks
from ppnet.models import hf, lora
from ppnet.sharding import rules as rules_lib


def check_same_decoder(config: config_lib.ModelConfig) -> None:
  """Raises, naming the fields, unless the weights are of this decoder."""
  stored = hf.read_config(config.decoder_weights)
  free = ("lora", "remat", "compute_dtype", "max_seq_len")
  names = [field.name for field in dataclasses.fields(stored)]
  pairs = {
    name: (getattr(stored, name), getattr(config.decoder, name))
    for name in names
    if name not in free
  }
  wrong = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
  if wrong:
    checks.fail(
      f"model.decoder to be the one of {config.decoder_weights}",
      "Set these fields (stored, configured), or leave decoder_weights empty.",
      **wrong,
    )


def placed(
  config: config_lib.ModelConfig,
  params: Any,
  *,
  mesh: Mesh,
  rules: rules_lib.Rules,
  dtype: Any,
) -> Any:
  """Parameters with the decoder's stored ones in their places.

  The arrays they replace are deleted first: no device holds both.
  """
  if not config.decoder_weights:
    return params
  replaced = {
    "/".join(entry.key for entry in path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(
      params.get("decoder", {})
    )
    if not lora.is_adapter(path[-1].key)
  }
  if not replaced:
    return params
  for leaf in replaced.values():
    leaf.delete()
  _, stored = hf.load(
    config.decoder_weights,
    dtype=dtype,
    mesh=mesh,
    rules=rules,
    is_wanted=replaced.__contains__,
  )

  def value(path, leaf):
    names = [entry.key for entry in path]
    if "/".join(names) not in replaced:
      return leaf
    return functools.reduce(lambda node, name: node[name], names, stored)

  decoder = jax.tree_util.tree_map_with_path(value, params["decoder"])
  return {**params, "decoder": decoder}
