"""Records per second of the data pipelines, with 0, 1 and 2 workers.

  python -m ppnet.main --config=configs/bench/pipeline.py:/data --workdir=DIR

The argument is a folder that holds fashion-mnist/ (IDX files), fsdd/ (the
recordings or a zip of them) and womens-clothing-reviews/ (the CSV). Some of the
cases alone: --config.bench.cases=fashion_mnist,fsdd; the others are
fashion_mnist/augmented and reviews.
"""

from ppnet import config


def get_config(path: str = "/data") -> config.ExperimentConfig:
  """The pipelines' benchmark on the data sets in `path`."""
  return config.ExperimentConfig(
    name="bench-pipeline",
    job=config.Job.BENCHMARK,
    data=config.DataConfig(path=path),
    bench=config.BenchConfig(
      subject=config.BenchSubject.PIPELINE, cases="default", rounds=5
    ),
  )
