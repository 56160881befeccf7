"""Table 3: PrivacyPreserveNet without each mechanism, and without each two.

  python -m ppnet.main --config=configs/paper/table3.py:cpu \
      --config.data.path=/data --workdir=DIR

Trains what is missing, attacks it, and writes the table; run again, it only
reads. The cells are those of configs/paper/cell.py, which says what the rows
are, and where the data lie. Tables that are given the same
--config.table.cells_dir share their cells. With :full a pod trains Llama-7B.
"""

from ppnet import config


def get_config(size: str = "cpu") -> config.ExperimentConfig:
  """Seven ablations and the whole, on four tasks."""
  return config.ExperimentConfig(
    name="table3",
    job=config.Job.TABLE,
    data=config.DataConfig(path="/data"),
    table=config.TableConfig(
      subject=config.TableSubject.RESULTS,
      title="Table 3: ablation",
      cell_config="configs/paper/cell.py",
      tasks="fashion_mnist,fsdd,reviews,digits",
      rows="ppnet,no_dp_noise,no_clipping,no_attention_noise,"
      "no_dp_noise_no_clipping,no_dp_noise_no_attention_noise,"
      "no_clipping_no_attention_noise,non_private",
      baseline="ppnet",
      size=size,
      cells_at_once=2 if size == "cpu" else 1,
    ),
    audit=config.AuditConfig(num_models=6),
  )
