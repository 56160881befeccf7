"""Figures 3 and 4: terms of the loss, and indicators of training, by epoch.

  python -m ppnet.main --config=configs/paper/training.py:cpu \
      --config.data.path=/data --workdir=DIR

Trains what is missing, once each, on all records of the two small tasks, and
draws `figures/losses.png` and `figures/indicators.png`; run again, it only
reads. The cells are those of configs/paper/cell.py, which says what the rows
are, and where the data lie. Tables that are given the same
--config.table.cells_dir share their cells. With :full a pod trains Llama-7B.
"""

from ppnet import config


def get_config(size: str = "cpu") -> config.ExperimentConfig:
  """One run of each model on each task."""
  return config.ExperimentConfig(
    name="training",
    job=config.Job.TABLE,
    data=config.DataConfig(path="/data"),
    table=config.TableConfig(
      subject=config.TableSubject.TRAINING,
      title="Training",
      cell_config="configs/paper/cell.py",
      tasks="fsdd,digits",
      rows="llama,non_private,ppnet",
      size=size,
      cells_at_once=2 if size == "cpu" else 1,
    ),
  )
