r"""Opacus and JAX-Privacy by their own recipes, on a record's features.

  python -m ppnet.main --config=configs/bench/record_peers.py:spoken_digits,3 \
    --config.data.path=/data/fsdd --workdir=DIR

The argument is a record of `configs/records` and epsilon, or what else the
record takes: `spoken_digits,3,speaker`. Five seeds for each recipe of
`ppnet/bench/recipes.py`; needs `pip install 'ppnet[peers]'`. One library alone:
--config.bench.cases=Opacus or JAX-Privacy.
"""

import pathlib
import runpy

from ppnet import config
from ppnet.core import checks

_RECORDS = pathlib.Path(__file__).parents[1] / "records"


def get_config(argument: str = "spoken_digits,3") -> config.ExperimentConfig:
  """The peers of a record at an epsilon."""
  record, _, epsilon = argument.partition(",")
  known = sorted(path.stem for path in _RECORDS.glob("*.py"))
  if record not in known or not epsilon:
    checks.fail(
      "RECORD,EPSILON with a record among " + ", ".join(known),
      argument=argument,
    )
  experiment = runpy.run_path(str(_RECORDS / f"{record}.py"))["get_config"](
    epsilon
  )
  experiment.name = f"bench-record_peers-{record}-epsilon_{epsilon}"
  experiment.job = config.Job.BENCHMARK
  experiment.bench = config.BenchConfig(
    subject=config.BenchSubject.RECORD_PEERS, cases="default", rounds=5
  )
  return experiment
