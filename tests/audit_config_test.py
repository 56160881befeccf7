"""Tests for the checks of `ppnet.audit_config`."""

import pytest

from ppnet import config as config_lib


@pytest.mark.parametrize(
  ("field", "value", "says"),
  [
    ("num_models", 7, "audit.num_models=7"),
    ("num_models", -2, "audit.num_models=-2"),
    ("models_at_once", 0, "audit.models_at_once=0"),
    ("num_records", 0, "audit.num_records=0"),
    ("num_canaries", -1, "audit.num_canaries=-1"),
    ("num_gradient_canaries", -1, "audit.num_gradient_canaries=-1"),
    ("confidence", 1.0, "audit.confidence=1.0"),
  ],
)
def test_what_makes_no_audit_is_refused_by_name(field, value, says):
  config = config_lib.ExperimentConfig()
  setattr(config.audit, field, value)
  with pytest.raises(ValueError, match=says):
    config_lib.validate(config)


@pytest.mark.parametrize(
  ("field", "value"),
  [("num_gradient_canaries", 0), ("num_canaries", 4), ("robustness", True)],
)
def test_without_models_only_planted_gradients_can_be_audited(field, value):
  config = config_lib.ExperimentConfig()
  config.audit.num_models = 0
  config_lib.validate(config)
  setattr(config.audit, field, value)
  with pytest.raises(ValueError, match=f"audit.{field}={value}"):
    config_lib.validate(config)


def test_a_table_needs_models():
  config = config_lib.ExperimentConfig()
  config.job = config_lib.Job.TABLE
  config.table.tasks, config.table.rows = "digits", "ppnet"
  config.table.cell_config, config.table.size = "cell.py", "cpu"
  config_lib.validate(config)
  config.audit.num_models = 0
  with pytest.raises(ValueError, match="audit.num_models=0.*repeated runs"):
    config_lib.validate(config)
