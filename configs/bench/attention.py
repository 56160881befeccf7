"""What noise inside attention costs: kernels and reference, forward + backward.

  python -m ppnet.main --config=configs/bench/attention.py --workdir=DIR

On an accelerator 7B's shape (B 4, N 32, T 4096, H 128), on a CPU a tiny one,
where the kernels are interpreted. Other cases after a colon: `7b`, `short`,
`tiny`.
"""

from ppnet import config


def get_config(cases: str = "default") -> config.ExperimentConfig:
  """The attention benchmark of `cases`."""
  return config.ExperimentConfig(
    name="bench-attention",
    job=config.Job.BENCHMARK,
    bench=config.BenchConfig(
      subject=config.BenchSubject.ATTENTION, cases=cases, rounds=10
    ),
  )
