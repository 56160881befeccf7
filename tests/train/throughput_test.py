"""The FLOPs of a model, counted from its own program, and rates by hand."""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from ppnet import config as config_lib
from ppnet.models import llama, lora
from ppnet.train import compile_only, throughput
from tests import tiny

ROWS, LENGTH = 3, 7


def _decoder(**changes):
  return config_lib.LlamaConfig(
    vocab_size=13,
    embed_dim=8,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    mlp_dim=10,
    max_seq_len=LENGTH,
    attention=config_lib.AttentionImplementation.REFERENCE,
    **changes,
  )


def _work(decoder, params, frozen=None, *, devices=1, units=2.0, rows=1):
  config = tiny.experiment()
  config.model.decoder = decoder
  mesh = jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices])
  program = types.SimpleNamespace(
    mesh=mesh,
    mechanism=types.SimpleNamespace(
      expected_batch_size=units, rows_per_unit=rows
    ),
    abstract_state=types.SimpleNamespace(params={"decoder": params}),
    abstract_frozen={} if frozen is None else {"decoder": frozen},
  )
  return throughput.work(config, program)


def _program_flops(decoder, is_trained=None):
  """(parameters, FLOPs of matrix products) of a loss and its gradient."""
  model = llama.Llama(decoder)
  tokens = jnp.zeros((ROWS, LENGTH), jnp.int32)
  # Shapes are all that counts, and nothing is compiled.
  params = nn.meta.unbox(
    jax.eval_shape(lambda: model.init(jax.random.key(0), tokens)["params"])
  )
  trained, frozen = params, {}
  if is_trained is not None:
    trained, frozen = lora.partition(params, is_trained)

  def loss(trained, frozen):
    both = lora.combine(trained, frozen)
    return model.apply({"params": both}, tokens).sum()

  jaxpr = jax.make_jaxpr(jax.grad(loss))(trained, frozen)
  least, most = compile_only.matmul_flops(jaxpr.jaxpr)
  assert least == most
  return trained, frozen, most


def _norms(params):
  """Their scales multiply and are no matrices."""
  return sum(
    leaf.size
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    if path[-1].key == "scale"
  )


@pytest.mark.parametrize("tied", [False, True])
def test_a_step_has_the_products_of_its_program(tied):
  decoder = _decoder(tie_embeddings=tied)
  params, _, flops = _program_flops(decoder)
  work = _work(decoder, params, units=ROWS)
  extra = 6 * _norms(params) * ROWS * LENGTH
  assert work.flops(LENGTH) == flops + extra
  assert work.tokens(LENGTH) == ROWS * LENGTH
  # Fails if: a table that is looked up counts, or the scores do not.


def test_what_is_frozen_has_no_gradient_of_its_own():
  decoder = _decoder(lora=config_lib.LoraConfig(rank=2))
  # The table is trained as well: else nothing goes back below the first layer.
  trained, frozen, flops = _program_flops(
    decoder, lambda name: lora.is_adapter(name) or "token_embed" in name
  )
  work = _work(decoder, trained, frozen, units=ROWS)
  positions = ROWS * LENGTH
  extra = (6 * _norms(trained) + 4 * _norms(frozen)) * positions
  assert work.flops(LENGTH) == flops + extra


def test_rates_are_of_the_expected_batch(monkeypatch):
  monkeypatch.setitem(throughput._PEAK_FLOPS_PER_SEC, "cpu", 1e6)
  decoder = _decoder()
  params, _, flops = _program_flops(decoder)
  work = _work(decoder, params, devices=4, units=10.0, rows=3)
  rates = work.rates(0.5, LENGTH)
  assert rates["examples_per_sec"] == 20
  assert rates["tokens_per_sec"] == 20 * 3 * LENGTH
  extra = 6 * _norms(params) * ROWS * LENGTH
  per_row = (flops + extra) / ROWS
  assert rates["mfu"] == pytest.approx(per_row * 30 / 0.5 / 4e6)
  assert work.no_mfu_because is None
  unknown = work.rates(None, LENGTH)
  assert set(unknown) == set(rates)
  assert set(unknown.values()) == {None}


def test_without_a_published_peak_there_is_no_mfu_and_a_reason():
  decoder = _decoder()
  work = _work(decoder, {})
  assert "mfu" not in work.rates(0.5, LENGTH)
  assert "devices of kind 'cpu'" in work.no_mfu_because
