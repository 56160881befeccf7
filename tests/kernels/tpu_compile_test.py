"""The TPU compiler takes the kernels; what the noise costs in its schedule.

Needs libtpu from PyPI (`pip install libtpu`) and no TPU. It runs in processes
of its own: libtpu reads its settings once, and the dump of the schedule is one
of them.
"""

import importlib.util
import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="libtpu is not installed; pip install libtpu (no TPU is needed)",
)

_TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


def compile_for_tpu(generation, **case):
  """Bundles of each kernel in the final schedule, and temporary bytes."""
  done = subprocess.run(
    [sys.executable, "-m", "tests.kernels.tpu_compile"],
    input=json.dumps({"topology": _TOPOLOGIES[generation], **case}),
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-4000:]
  return json.loads(done.stdout.splitlines()[-1])


def total(result):
  """Of forward, dQ and dK with dV."""
  assert len(result["bundles"]) >= 3
  return sum(result["bundles"].values())


def test_one_small_case_compiles():
  result = compile_for_tpu(
    "v5e", mode="scores", num_tokens=256, head_dim=64, blocks=[128, 128]
  )
  assert sorted(result["bundles"]) == [
    "noisy_attention_backward_kv",
    "noisy_attention_backward_q",
    "noisy_attention_forward",
  ]


def test_a_mesh_splits_examples_and_heads():
  """Two examples and two of eight heads per device: nothing is gathered."""
  result = compile_for_tpu(
    "v5e",
    mode="scores",
    num_tokens=256,
    head_dim=128,
    blocks=[128, 128],
    batch=4,
    num_heads=8,
    mesh={"data": 2, "fsdp": 1, "tensor": 4},
    topology="v5e:2x4",
  )
  assert len(result["bundles"]) == 3
  assert not result["collectives"]
  # Fails if: the mesh does not reach the kernels.


@pytest.mark.slow
@pytest.mark.parametrize("num_kv_heads", [8, 2])
@pytest.mark.parametrize("mode", ["scores", "weights"])
def test_a_pod_s_mesh_gathers_no_activation(mode, num_kv_heads):
  result = compile_for_tpu(
    "v5e",
    mode=mode,
    num_tokens=2048,
    head_dim=128,
    blocks=None,
    batch=8,
    num_heads=16,
    num_kv_heads=num_kv_heads,
    learn_stddev=True,
    mesh={"data": 2, "fsdp": 2, "tensor": 4},
    topology="v5e:4x4",
  )
  names = {name for _, name in result["collectives"]}
  # A learned stddev's gradient is summed; so are dK and dV of two key heads,
  # each of which is at two devices.
  assert names <= {"all-reduce"}
  sums = [shape for shape, _ in result["collectives"] if "2048" in shape]
  assert bool(sums) == (num_kv_heads == 2)


@pytest.mark.slow
@pytest.mark.parametrize("generation", list(_TOPOLOGIES))
@pytest.mark.parametrize("head_dim", [64, 128])
def test_noise_costs_at_most_twice(generation, head_dim):
  case = {"num_tokens": 8192, "head_dim": head_dim, "blocks": None}
  plain = compile_for_tpu(generation, mode=None, **case)
  portable = compile_for_tpu(generation, mode="scores", **case)
  assert total(portable) <= 2.0 * total(plain)
  # Of the size of q (2 heads, bfloat16) are q, k, v, their gradients, the
  # output and its cotangent; an array of T x S would be 64 times that.
  assert portable["temp_bytes"] <= 12 * 2 * 8192 * head_dim * 2


@pytest.mark.slow
@pytest.mark.parametrize(
  ("generation", "most"),
  # v6e misses the goal of 1.3; see BUILD_NOTES.md.
  [("v5e", 1.3), ("v5p", 1.3), ("v6e", 1.55)],
)
def test_noise_by_hardware_costs_less(generation, most):
  case = {"num_tokens": 2048, "head_dim": 128, "blocks": None}
  plain = compile_for_tpu(generation, mode=None, **case)
  drawn = compile_for_tpu(generation, mode="scores", hardware=True, **case)
  assert total(drawn) <= most * total(plain)


@pytest.mark.slow
@pytest.mark.parametrize("generation", list(_TOPOLOGIES))
def test_every_mode_compiles(generation):
  for changes in (
    {"mode": "weights"},
    {"mode": "scores", "segments": True, "num_kv_heads": 1},
    {"mode": "weights", "causal": False, "learn_stddev": True},
  ):
    compile_for_tpu(
      generation, num_tokens=1000, head_dim=128, blocks=None, **changes
    )
