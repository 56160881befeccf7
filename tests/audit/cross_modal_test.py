"""Secrets that a picture or a recording leads to, in a model that was trained.

The prompt is the same for all records: whoever knows a secret has it from the
picture, or the sound, that it was planted beside.
"""

import dataclasses

import jax
import numpy as np
import pytest

from ppnet import config as config_lib
from ppnet.audit import canaries as canaries_lib
from ppnet.train import loop
from tests import tiny
from tests.audit import memorising

NUM_POOL, NUM_PLANTED, NUM_CONTROLS = 16, 6, 10


def cross_modal(folder, modality):
  """Digits with one modality, whose answers are texts."""
  config = tiny.experiment(expected_batch_size=8)
  config.privacy.accountant = config_lib.Accountant.RDP
  config.privacy.allow_large_delta = True
  config.attention_noise.stddev = 0.0
  config.data.task = config_lib.Task.ANSWER
  config.data.prompt = "?"
  config.data.tokenizer = config_lib.TokenizerKind.BYTES
  config.data.vocab_size, config.data.lengths = 272, (24,)
  decoder = config.model.decoder
  decoder.vocab_size = 272
  decoder.embed_dim, decoder.head_dim, decoder.mlp_dim = 32, 16, 64
  if modality == "image":
    config.model.audio = None
  else:
    config.model.image = None
  experiment = loop.open_experiment(config, folder, devices=jax.devices()[:1])
  # Digits have classes and no words; here a class's name is its word.
  dataset = experiment.datasets["train"]
  records = [dataset._source[place] for place in range(NUM_POOL)]
  dataset._source = canaries_lib.Held(
    [
      dataclasses.replace(record, answer=f"000{record.label}")
      for record in records
    ]
  )
  return experiment


@pytest.mark.slow
@pytest.mark.parametrize("modality", ["image", "audio"])
def test_the_words_beside_a_planted_picture_or_sound_are_exposed(
  tmp_path, modality
):
  experiment = cross_modal(tmp_path, modality)
  canaries = memorising.make_canaries(
    experiment, range(NUM_PLANTED + NUM_CONTROLS)
  )
  assert {canary.template for canary in canaries} == {"{secret}"}
  planted, controls = canaries[:NUM_PLANTED], canaries[NUM_PLANTED:]
  pool = memorising.pool_of(experiment, NUM_POOL)
  assert modality in pool
  with_secrets = canaries_lib.plant(
    pool, planted, dataset=experiment.datasets["train"]
  )
  params, clean = memorising.memorise(
    experiment, [with_secrets, pool], num_steps=400, learning_rate=1e-2
  )
  audit = lambda params, some: canaries_lib.audit_exposure(
    experiment, params, some
  )
  found = audit(params, planted)
  np.testing.assert_allclose(found.exposures, 6.0)  # The first of 64.
  for unseen in (audit(params, controls), audit(clean, planted)):
    assert unseen.exposures.mean() < 3.0  # Chance is 1.4.
  # It is the picture, or the sound, that leads there: of all planted secrets
  # each brings its own, and with another one's beside it, another one's.
  secrets = tuple(canary.secret for canary in planted)
  among = [dataclasses.replace(each, candidates=secrets) for each in planted]
  swapped = [
    dataclasses.replace(
      canary,
      record=dataclasses.replace(canary.record, media=other.record.media),
    )
    for canary, other in zip(among, [*among[1:], among[0]], strict=True)
  ]
  most = np.log2(NUM_PLANTED)
  np.testing.assert_allclose(audit(params, among).exposures, most)
  assert (audit(params, swapped).exposures <= most - 1 + 1e-6).all()
