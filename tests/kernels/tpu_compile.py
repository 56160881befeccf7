"""Compiles the op for a TPU that is not there; see `tpu_compile_test`.

Reads a case as JSON from standard input and writes what the compiler said as
one line of JSON.
"""

import glob
import json
import os
import re
import sys
import tempfile

# Result and name of each collective in a compiled program's text.
_COLLECTIVE = re.compile(
  r"= (.+?) ((?:all|reduce|collective)-[a-z-]+?)(?:-start)?\("
)


def _prepare(folder):
  """libtpu reads these when it is loaded."""
  os.environ.update(
    JAX_PLATFORMS="cpu",
    TPU_SKIP_MDS_QUERY="1",
    TPU_WORKER_HOSTNAMES="localhost",
    # Another process may be compiling.
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    LIBTPU_INIT_ARGS=(f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"),
  )


def _bundles(folder):
  """Kernel to the instruction bundles of its final schedule."""
  counts = {}
  suffix = "-final_hlo-static-per-bundle-utilization.txt"
  for path in glob.glob(f"{folder}/*{suffix}"):
    name = re.search(r"noisy_attention_\w+", os.path.basename(path))
    if name is None:
      continue
    with open(path) as file:
      rows = file.read().split("UTILIZATION:")[1].split("\n")
    count = sum(bool(row.strip()) for row in rows)
    counts[name[0]] = counts.get(name[0], 0) + count
  return counts


def main(folder):
  """Compiles one case, forward and backward."""
  import jax
  import jax.numpy as jnp
  from jax.experimental import topologies
  from jax.sharding import NamedSharding
  from jax.sharding import PartitionSpec as P

  from ppnet import config
  from ppnet.kernels import noisy_attention
  from ppnet.sharding import mesh as mesh_lib

  case = json.load(sys.stdin)
  devices = topologies.get_topology_desc(
    case["topology"], platform="tpu"
  ).devices
  axes = config.MeshConfig(**case.get("mesh", {"data": 1}))
  num_devices = axes.data * axes.fsdp * axes.tensor
  mesh = mesh_lib.build(axes, devices[:num_devices])
  mode = case["mode"] and config.NoiseMode(case["mode"])
  batch, num_heads = case.get("batch", 1), case.get("num_heads", 2)
  num_tokens = case["num_tokens"]

  def loss(q, k, v, stddev, words):
    noise = None
    if mode is not None:
      noise = noisy_attention.AttentionNoise(
        key=jax.random.wrap_key_data(words),
        stddev=stddev,
        mode=mode,
        generator=config.NoiseGenerator(
          "hardware" if case.get("hardware") else "portable"
        ),
      )
    segment_ids = None
    if case.get("segments"):
      segment_ids = jnp.broadcast_to(
        jnp.arange(num_tokens) // 100, (batch, num_tokens)
      )
    out = noisy_attention.noisy_attention(
      q,
      k,
      v,
      noise=noise,
      causal=case.get("causal", True),
      segment_ids=segment_ids,
      block_sizes=case["blocks"] and tuple(case["blocks"]),
    )
    return out.astype(jnp.float32).sum()

  def abstract(shape, dtype, *spec):
    sharding = NamedSharding(mesh, P(*spec))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  def of_heads(heads):
    shape = (batch, num_tokens, heads, case["head_dim"])
    split = "tensor" if heads % axes.tensor == 0 else None
    return abstract(shape, jnp.bfloat16, ("data", "fsdp"), None, split)

  num_kv_heads = case.get("num_kv_heads", num_heads)
  grad = jax.grad(
    loss, argnums=(0, 1, 2, 3) if case.get("learn_stddev") else (0, 1, 2)
  )
  compiled = (
    jax.jit(mesh_lib.within(mesh, grad))
    .lower(
      of_heads(num_heads),
      of_heads(num_kv_heads),
      of_heads(num_kv_heads),
      abstract((), jnp.float32),
      abstract((batch, 2), jnp.uint32, ("data", "fsdp")),
    )
    .compile()
  )
  memory = compiled.memory_analysis()
  print(
    json.dumps(
      {
        "bundles": _bundles(folder),
        "temp_bytes": memory.temp_size_in_bytes,
        "collectives": _COLLECTIVE.findall(compiled.as_text()),
      }
    )
  )


if __name__ == "__main__":
  with tempfile.TemporaryDirectory() as dump:
    _prepare(dump)
    main(dump)
