"""What a shadow model costs: 64 side by side against 64 runs of their own.

  python -m ppnet.main --config=configs/bench/shadows.py --workdir=DIR

The quickstart's model, data and number of steps. Another number of models after
a colon. A round takes some minutes on two cores.
"""

import pathlib
import runpy

from ppnet import config

_QUICKSTART = pathlib.Path(__file__).parents[1] / "quickstart.py"


def get_config(num_models: str = "64") -> config.ExperimentConfig:
  """The benchmark of `num_models` models of the quickstart."""
  experiment = runpy.run_path(str(_QUICKSTART))["get_config"]()
  experiment.name = "bench-shadows"
  experiment.job = config.Job.BENCHMARK
  experiment.audit = config.AuditConfig(
    num_models=int(num_models), models_at_once=int(num_models)
  )
  experiment.bench = config.BenchConfig(
    subject=config.BenchSubject.SHADOWS, cases="own", rounds=2
  )
  return experiment
