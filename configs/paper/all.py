"""All tables and figures of results, from cells that they share, and one page.

  python -m ppnet.main --config=configs/paper/all.py:cpu \
      --config.data.path=/data --workdir=DIR

Trains what is missing, attacks it, and writes each table into a folder of its
own and all of them into `table.html`; run again, it only reads. Table 1 is
about data alone: configs/paper/table1.py. With :full a pod trains Llama-7B.
"""

from ppnet import config

_PARTS = (
  "table2",
  "table3",
  "leakage",
  "epsilon",
  "attention_noise",
  "training",
)


def get_config(size: str = "cpu") -> config.ExperimentConfig:
  """Every table that has cells."""
  return config.ExperimentConfig(
    name="all",
    job=config.Job.TABLE,
    data=config.DataConfig(path="/data"),
    table=config.TableConfig(
      subject=config.TableSubject.COLLECTION,
      title="PrivacyPreserveNet, reproduced",
      parts=",".join(f"configs/paper/{part}.py" for part in _PARTS),
      size=size,
      cells_at_once=2 if size == "cpu" else 1,
    ),
    audit=config.AuditConfig(num_models=6),
  )
