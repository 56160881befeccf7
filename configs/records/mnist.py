r"""MNIST at a given epsilon: a linear model on scattering features.

  bash launch/local.sh --config=configs/records/mnist.py:3 \
    --config.data.path=/data/mnist --sweep="seed=0,1,2,3,4"

The argument is epsilon, as in `fashion_mnist.py` beside this file, which says
what is trained and how. Learning rate, number of steps, groups and norm were
chosen on the training records of MNIST itself, the last 10,000 of them held
out; that choice is not accounted for, since MNIST is public. The test split is
evaluated once, after the last step. Results are in RECORDS.md.
"""

import dataclasses
import importlib.util
import pathlib
import sys

from ppnet import config


def _fashion_mnist():
  """The configuration beside this one; a flag loads files, not packages."""
  path = pathlib.Path(__file__).with_name("fashion_mnist.py")
  spec = importlib.util.spec_from_file_location("records_fashion_mnist", path)
  assert spec is not None and spec.loader is not None, path
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module
  spec.loader.exec_module(module)
  return module


def get_config(epsilon: str = "3") -> config.ExperimentConfig:
  """The record's run at `epsilon`."""
  experiment = _fashion_mnist().get_config(epsilon)
  data = dataclasses.replace(
    experiment.data,
    path="/data/mnist",
    class_names=tuple(str(digit) for digit in range(10)),
  )
  return dataclasses.replace(
    experiment, name=f"mnist-epsilon_{epsilon}", data=data
  )
