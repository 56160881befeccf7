"""What leaks, and which mechanism stops it: attacks on six ways of training.

  python -m ppnet.main --config=configs/paper/leakage.py:cpu \
      --config.data.path=/data --workdir=DIR

Trains what is missing, attacks it, and writes the table; run again, it only
reads. The cells are those of configs/paper/cell.py, which says what the rows
are, and where the data lie. With :full a pod trains Llama-7B.
"""

from ppnet import config


def get_config(size: str = "cpu") -> config.ExperimentConfig:
  """Six ways of training on two tasks."""
  return config.ExperimentConfig(
    name="leakage",
    job=config.Job.TABLE,
    data=config.DataConfig(path="/data"),
    table=config.TableConfig(
      subject=config.TableSubject.RESULTS,
      title="Leakage by mechanism",
      cell_config="configs/paper/cell.py",
      tasks="fashion_mnist,reviews",
      rows="non_private,attention_noise_0.5,clipping,dp_8,dp_2,ppnet",
      baseline="non_private",
      size=size,
    ),
    audit=config.AuditConfig(num_models=6),
  )
