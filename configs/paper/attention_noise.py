"""Does attention noise protect anything by itself? Leakage over its strength.

  python -m ppnet.main --config=configs/paper/attention_noise.py:cpu \
      --config.data.path=/data --workdir=DIR

Trains what is missing, attacks it, and writes the table; run again, it only
reads. The cells are those of configs/paper/cell.py, which says what the rows
are, and where the data lie. Tables that are given the same
--config.table.cells_dir share their cells. With :full a pod trains Llama-7B.
"""

from ppnet import config


def get_config(size: str = "cpu") -> config.ExperimentConfig:
  """One mechanism at several strengths; on one task where time is short."""
  return config.ExperimentConfig(
    name="attention_noise",
    job=config.Job.TABLE,
    data=config.DataConfig(path="/data"),
    table=config.TableConfig(
      subject=config.TableSubject.RESULTS,
      title="Attention noise alone",
      cell_config="configs/paper/cell.py",
      # Two hours on two cores are enough for one.
      tasks="fashion_mnist" if size == "cpu" else "fashion_mnist,reviews",
      # The cell of 0.5 is Table 3's.
      rows="non_private,attention_noise_0.25,"
      "attention_noise_0.5=no_dp_noise_no_clipping,"
      "attention_noise_1,attention_noise_2,attention_noise_4",
      baseline="non_private",
      size=size,
      cells_at_once=2 if size == "cpu" else 1,
      knob="attention_noise.stddev",
    ),
    audit=config.AuditConfig(num_models=6),
  )
