"""What leaks, and which mechanism stops it: attacks on six ways of training.

  python -m ppnet.main --config=configs/paper/leakage.py:cpu \
      --config.data.path=/data --workdir=DIR

Trains what is missing, attacks it, and writes the table; run again, it only
reads. The cells are those of configs/paper/cell.py, which says what the rows
are, and where the data lie. Tables that are given the same
--config.table.cells_dir share their cells. With :full a pod trains Llama-7B.
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
      # Those that Table 3 has as well, under its names: one cell for both.
      rows="non_private,attention_noise_only=no_dp_noise_no_clipping,"
      "clipping_only=no_dp_noise_no_attention_noise,dp_8=no_attention_noise,"
      "dp_2,ppnet",
      baseline="non_private",
      size=size,
      cells_at_once=2 if size == "cpu" else 1,
    ),
    audit=config.AuditConfig(num_models=6),
  )
