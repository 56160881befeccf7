"""What the guarantee costs: every clipping engine against a plain gradient.

  python -m ppnet.main --config=configs/bench/engines.py --workdir=DIR

Two Llama decoders, the whole batch at once and in microbatches of 4, ten
rounds. Other choices after a colon: the group `all`, or cases with commas
between them, such as `d256`, `d256/mb4`, `d256/remat`, `d512`, `own` (the
quickstart's model and data), `1b` (on a GPU) or `tiny` (to try it in seconds).
"""

import pathlib
import runpy

from ppnet import config

_QUICKSTART = pathlib.Path(__file__).parents[1] / "quickstart.py"


def get_config(cases: str = "default") -> config.ExperimentConfig:
  """The engines' benchmark of `cases`."""
  experiment = runpy.run_path(str(_QUICKSTART))["get_config"]()
  experiment.name = "bench-engines"
  experiment.job = config.Job.BENCHMARK
  experiment.bench = config.BenchConfig(
    subject=config.BenchSubject.ENGINES, cases=cases, rounds=10
  )
  return experiment
