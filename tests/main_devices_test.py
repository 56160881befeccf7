"""Which devices an audit on a CPU asks for, before JAX has started any."""

import os

import jax
import pytest
from absl import flags
from absl.testing import flagsaver

from ppnet import config as config_lib
from ppnet import main
from tests import tiny


@pytest.fixture
def asked(monkeypatch):
  """What is asked of JAX on a machine of six cores where nobody chose."""
  found = {}
  monkeypatch.setattr(jax.config, "update", found.__setitem__)
  monkeypatch.setattr(os, "cpu_count", lambda: 6)
  monkeypatch.delenv("XLA_FLAGS", raising=False)
  monkeypatch.delenv("JAX_NUM_CPU_DEVICES", raising=False)
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
  return found


def audit(**perf):
  config = tiny.experiment(job=config_lib.Job.AUDIT)
  config.mesh = config_lib.MeshConfig()
  for name, value in perf.items():
    setattr(config.perf, name, value)
  return config


@pytest.mark.parametrize(
  ("rows", "expected"), [(32, 4), (6, 6), (25, 5), (7, 1)]
)
def test_an_audit_takes_the_cores_that_share_its_rows(asked, rows, expected):
  main._share_cores(audit(microbatch_size=rows))
  assert asked == {"jax_num_cpu_devices": expected}


def test_what_somebody_chose_stays(asked, monkeypatch):
  chosen = audit()
  chosen.mesh.data = 2
  main._share_cores(chosen)
  main._share_cores(tiny.experiment(job=config_lib.Job.TRAIN))
  monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "3")
  main._share_cores(audit())
  monkeypatch.delenv("JAX_NUM_CPU_DEVICES")
  monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
  main._share_cores(audit())
  monkeypatch.delenv("XLA_FLAGS")
  with flagsaver.flagsaver(sweep="seed=0,1"):
    main._share_cores(audit())
  assert asked == {}


@pytest.mark.parametrize(
  ("job", "has_accelerator", "platforms", "keeps"),
  [
    ("TRAIN", False, "", True),
    ("TRAIN", True, "", False),
    ("TRAIN", True, "cpu", True),
    ("ACCOUNT", False, "", False),
  ],
)
def test_only_what_steps_on_a_cpu_keeps_its_freed_memory(
  monkeypatch, tmp_path, job, has_accelerator, platforms, keeps
):
  order = []
  config = tiny.experiment(job=config_lib.Job[job])
  monkeypatch.setenv("JAX_PLATFORMS", platforms)
  monkeypatch.setattr(
    main.allocator, "has_accelerator", lambda: has_accelerator
  )
  monkeypatch.setattr(
    main.allocator, "keep_freed", lambda: order.append("keep")
  )
  monkeypatch.setattr(
    main.jax, "process_count", lambda: order.append("backend") or 1
  )
  monkeypatch.setitem(main._JOBS, config.job, lambda *_: order.append("job"))
  main.run_job(config, tmp_path)
  assert order[-1] == "job"
  assert order.count("keep") == keeps
  # The backend's threads would have pools of their own by then.
  assert not keeps or order[0] == "keep"
  # Fails if: a host of an accelerator never gives a checkpoint's memory back.
