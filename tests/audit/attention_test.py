"""Attention of an audit's first model, from the parameters that it left.

The maps themselves: tests/models/llama_test.py.
"""

import numpy as np
import pytest

from ppnet.audit import attention, shadows
from tests import tiny


def test_the_maps_are_those_of_the_first_model(tmp_path, monkeypatch):
  params = {"a": {"kernel": np.arange(12.0).reshape(2, 3, 2)}}
  folder = tmp_path / "audit" / "shadows"
  folder.mkdir(parents=True)
  shadows._save(
    folder / "group-000.npz",
    shadows.Group(
      models=np.arange(2),
      params=params,
      init_roots=np.zeros((2, 2), np.uint32),
      metrics={},
      test_losses=None,
      test_logits=None,
    ),
  )
  opened = []
  monkeypatch.setattr(
    attention.loop, "open_experiment", lambda *given: opened.append(given)
  )
  monkeypatch.setattr(
    attention.attention_maps,
    "attention_maps",
    lambda experiment, params: {"params": params},
  )
  config = tiny.experiment()
  found = attention.first_models_maps(config, tmp_path)["params"]
  np.testing.assert_array_equal(found["a"]["kernel"], params["a"]["kernel"][0])
  assert opened == [(config, tmp_path)]
  # Fails if: it is another model's.


def test_a_folder_without_models_says_so(tmp_path):
  with pytest.raises(ValueError, match=r"group-000\.npz"):
    attention.first_models_maps(tiny.experiment(), tmp_path)
