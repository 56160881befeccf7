"""What privacy costs, and what it buys: accuracy and leakage over epsilon.

  python -m ppnet.main --config=configs/paper/epsilon.py:cpu \
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
    name="epsilon",
    job=config.Job.TABLE,
    data=config.DataConfig(path="/data"),
    table=config.TableConfig(
      subject=config.TableSubject.RESULTS,
      title="Utility and leakage by epsilon",
      cell_config="configs/paper/cell.py",
      # Two hours on two cores are enough for one.
      tasks="fashion_mnist" if size == "cpu" else "fashion_mnist,reviews",
      # The cell of epsilon 8 is Table 3's.
      rows="dp_0.5,dp_1,dp_2,dp_4,dp_8=no_attention_noise,non_private",
      baseline="non_private",
      size=size,
      cells_at_once=2 if size == "cpu" else 1,
      knob="epsilon",
    ),
    audit=config.AuditConfig(num_models=6),
  )
