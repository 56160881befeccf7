r"""MNIST at a given epsilon: a linear model on scattering features.

  bash launch/local.sh --config=configs/records/mnist.py:3 \
    --config.data.path=/data/mnist --sweep="seed=0,1,2,3,4"

The argument is epsilon, as in `fashion_mnist.py` beside this file, which says
what is trained and how. Learning rate, number of steps, groups and norm were
chosen on the training records of MNIST itself, the last 10,000 of them held
out; that choice is not accounted for, since MNIST is public. The test split is
evaluated once, after the last step. See RECORDS.md.
"""

import dataclasses
import pathlib
import runpy

from ppnet import config

_SAME = pathlib.Path(__file__).with_name("fashion_mnist.py")


def get_config(epsilon: str = "3") -> config.ExperimentConfig:
  """The record's run at `epsilon`."""
  experiment = runpy.run_path(str(_SAME))["get_config"](epsilon)
  data = dataclasses.replace(
    experiment.data,
    path="/data/mnist",
    class_names=tuple(str(digit) for digit in range(10)),
  )
  return dataclasses.replace(
    experiment, name=f"mnist-epsilon_{epsilon}", data=data
  )
