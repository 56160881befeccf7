"""Rows of a batch on real processes whose devices are mixed in the mesh."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np

from ppnet.privacy import mechanism as mechanism_lib
from ppnet.train import compile_only, program
from tests import tiny

ROOT = pathlib.Path(__file__).parents[2]
NUM_ROWS = 8


def mixed_devices():
  """Two processes' devices in turn, as links of a pod may order them."""
  first, second = (
    [each for each in jax.devices() if each.process_index == i] for i in (0, 1)
  )
  return [each for pair in zip(first, second, strict=True) for each in pair]


def main():
  coordinator, process_id = sys.argv[1:]
  jax.distributed.initialize(coordinator, 2, int(process_id))
  config = tiny.experiment()
  config.mesh.data, config.mesh.fsdp = 2, 2
  built = program.build(
    config,
    mechanism_lib.build(config, 64),
    compile_only.abstract_example(config),
    placeholder_ids={"image": 4, "audio": 5},
    devices=mixed_devices(),
  )
  whole = np.arange(NUM_ROWS, dtype=np.int32)
  placed = built.put_batch({"index": np.array(built.host.rows(whole))})["index"]
  for shard in placed.addressable_shards:
    np.testing.assert_array_equal(shard.data, whole[shard.index])
  print(f"own={built.host.own} of={built.host.of}")


def test_rows_reach_their_devices_where_processes_are_mixed():
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    coordinator = f"localhost:{probe.getsockname()[1]}"
  processes = [
    subprocess.Popen(
      [sys.executable, "-m", "tests.train.hosts_rows_test"]
      + [coordinator, str(process_id)],
      cwd=ROOT,
      env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for process_id in (0, 1)
  ]
  outputs = [process.communicate(timeout=300)[0] for process in processes]
  assert [process.returncode for process in processes] == [0, 0], outputs
  assert "own=(0, 2) of=4" in outputs[0]
  assert "own=(1, 3) of=4" in outputs[1]
  # Fails if: a process's rows are taken to lie side by side.


if __name__ == "__main__":
  main()
