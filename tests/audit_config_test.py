"""Tests for the checks of `ppnet.audit_config`."""

import pytest

from ppnet import config as config_lib


@pytest.mark.parametrize(
  ("field", "value", "says"),
  [
    ("num_models", 7, "audit.num_models=7"),
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
