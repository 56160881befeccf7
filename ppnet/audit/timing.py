"""Shadow models that are trained to see how long it takes."""

import json
import pathlib
import time

import jax

from ppnet import config as config_lib
from ppnet.audit import pool as pool_lib
from ppnet.audit import shadows
from ppnet.train import loop


def train(
  config: config_lib.ExperimentConfig,
  workdir: pathlib.Path,
  *,
  steps_at_once: int,
) -> None:
  """Trains as an audit does; writes `times.json` when all are trained.

  It holds, for each call of the compiled program, when its results were there:
  seconds on the clock, and processor seconds.

  Args:
    config: the experiment.
    workdir: an empty folder.
    steps_at_once: steps of a call.
  """
  # Models are cut over the devices; what opens the data needs one of them.
  experiment = loop.open_experiment(
    config, workdir, devices=jax.local_devices()[:1]
  )
  pool = pool_lib.of_split(
    experiment, split="train", num_records=config.audit.num_records
  )
  times: list[tuple[float, float]] = []
  now = lambda: (time.perf_counter(), time.process_time())
  shadows.train(
    config,
    pool,
    design=shadows.paired(
      num_models=config.audit.num_models,
      num_records=len(pool),
      seed=shadows.design_seed(config),
    ),
    folder=workdir / "shadows",
    placeholder_ids=experiment.tokenizer.placeholder_ids,
    steps_at_once=steps_at_once,
    on_steps=lambda _: times.append(now()),
  )
  (workdir / "times.json").write_text(json.dumps(times))
