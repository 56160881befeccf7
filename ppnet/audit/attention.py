"""Attention of an audit's first model, without its noise and with it.

An audit keeps the final parameters of its models; nothing is trained here.
"""

import pathlib
from typing import Any

import jax

from ppnet import config as config_lib
from ppnet.audit import shadows
from ppnet.core import checks
from ppnet.train import attention_maps, loop


def first_models_maps(
  config: config_lib.ExperimentConfig, workdir: pathlib.Path
) -> dict[str, Any]:
  """The maps of the first model that an audit trained.

  Computed from private data, as all of an audit is: the model was trained for
  the audit, and no ledger covers it.

  Args:
    config: of the audit, with attention noise.
    workdir: of the finished audit.

  Returns:
    See `attention_maps.attention_maps`.

  Raises:
    ValueError: the audit's models are not there, there is no attention noise,
      or the data do not fit the configuration.
  """
  path = workdir / "audit" / "shadows" / "group-000.npz"
  if not path.exists():
    checks.fail(
      f"the parameters of an audit's models in {path}",
      "Delete the cell's folder and make it anew.",
      workdir=workdir,
    )
  params = jax.tree.map(lambda leaf: leaf[0], shadows.load(path).params)
  experiment = loop.open_experiment(config, workdir)
  return attention_maps.attention_maps(experiment, jax.device_put(params))
