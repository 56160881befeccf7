"""The train step, compiled for pods that are not here.

What calls the compiler needs libtpu from PyPI (`pip install libtpu`) and no
TPU. It runs in processes of its own: libtpu reads its settings once.
"""

import dataclasses
import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from ppnet import config as config_lib
from ppnet import main
from ppnet.core import records
from ppnet.report import compiled
from ppnet.train import compile_only, estimate
from tests import tiny

needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="libtpu is not installed; pip install libtpu (no TPU is needed)",
)
CHIP = estimate.CHIPS["TPU v5 lite"]
# Known noise instead of a known budget: its calibration takes longer.
_QUICK = (
  "--config.job=COMPILE",
  "--config.privacy.epsilon=none",
  "--config.privacy.noise_multiplier=1",
)


def compile_job(workdir, *flags):
  """What `main` printed, its exit status and `compile.json`."""
  done = subprocess.run(
    [
      sys.executable,
      "-m",
      "ppnet.main",
      *flags,
      *_QUICK,
      f"--workdir={workdir}",
    ],
    capture_output=True,
    text=True,
    check=False,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
  )
  path = workdir / "compile.json"
  assert path.exists(), done.stderr[-4000:]
  return done, records.read_json(path)


@needs_libtpu
@pytest.mark.parametrize("attention", ["reference", "tpu"])
def test_a_two_layer_model_compiles_for_four_chips(tmp_path, attention):
  done, found = compile_job(
    tmp_path,
    "--config=tests/tiny.py",
    "--config.topology=v5e:2x2",
    "--config.mesh.data=1",
    "--config.mesh.fsdp=2",
    "--config.mesh.tensor=2",
    "--config.perf.engine=vmap",
    f"--config.model.decoder.attention={attention}",
    *(
      ("--config.compile_search=none", "--config.perf.gather_weights=true")
      if attention == "tpu"
      else ()
    ),
  )
  assert done.returncode == 0, done.stderr[-2000:]
  assert found["fits"]
  split = {axis: size for axis, size in found["mesh"].items() if size > 1}
  assert split == {"fsdp": 2, "tensor": 2}
  assert found["num_devices"] == 4
  assert found["device_kind"] == "TPU v5 lite"
  accumulate, update, *others = found["programs"]
  assert [accumulate["name"], update["name"]] == ["accumulate", "update"]
  # Adam's moments wait while gradients are accumulated: of each parameter two,
  # most of them in quarters.
  share = accumulate["resident_bytes"] / (8 * found["num_parameters"])
  assert 0.25 <= share < (0.75 if others else 0.5)
  assert update["resident_bytes"] == 0
  least, most = accumulate["matmul_flops"]
  # VMAP has no conditionals; 6 per parameter and token is the model's own part,
  # and a second prediction makes the consistency term.
  own = 6 * found["num_parameters"] * 16 * 64
  if attention == "reference":
    assert least == most > own
  else:  # A kernel leaves out the blocks that the causal mask hides.
    assert least < most > own
  assert compiled.compile_table(found) in done.stdout
  check_estimate(found, accumulate)
  if attention == "tpu":
    (weights,) = others
    sent = {
      each["kind"]: each["bytes"] for each in weights["least"]["sent_bytes"]
    }
    # XLA brings a vector of a few numbers together by a sum.
    assert sent.pop("all-gather") > 100 * sum(sent.values())
    assert set(accumulate["least"]["kernels"]) >= {"noisy_attention_forward"}
    assert accumulate["least"]["kernel_secs"] > 0
    assert "recommended" not in found
    return
  # A whole batch, of an expected size of 24, is the most that is of use.
  assert [
    each["microbatch_size"] for each in found["recommended"]["tried"]
  ] == [
    16,
    24,
  ]
  assert found["recommended"]["best"]["microbatch_size"] == 24
  assert "Recommended: --config.perf.microbatch_size=24" in done.stdout


def check_estimate(found, accumulate):
  """Gradients are summed over what splits the batch, and steps are sums."""
  least, step = accumulate["least"], found["step"]
  sent = {(each["kind"], each["axes"]) for each in least["sent_bytes"]}
  assert any(
    "fsdp" in axes and kind in ("all-reduce", "reduce-scatter")
    for kind, axes in sent
  )
  assert all(set(axes.split("+")) <= {"fsdp", "tensor"} for _, axes in sent)
  # What the compiler multiplies is what the program says, kernels aside; it
  # leaves out what it can tell to be zero.
  own = accumulate["matmul_flops"][1]
  assert 0 < least["matmul_flops"] * found["num_devices"] < 1.5 * own
  assert least["compute_secs"] > 0
  assert step["num_microbatches"] == 2
  once = sum(each["least"]["most_secs"] for each in found["programs"][1:])
  assert step["most_secs"] == pytest.approx(2 * least["most_secs"] + once)


@pytest.mark.slow
@needs_libtpu
def test_what_does_not_fit_is_said_in_the_compiler_s_words(tmp_path):
  done, found = compile_job(
    tmp_path,
    "--config=tests/tiny.py",
    "--config.topology=v5e:2x2",
    "--config.perf.engine=vmap",
    "--config.model.decoder.max_seq_len=32768",
    "--config.model.decoder.attention=reference",
  )
  assert done.returncode == 1
  assert "does not fit v5e:2x2" in done.stderr
  assert "RESOURCE_EXHAUSTED" in done.stdout
  assert not found["fits"]
  assert "RESOURCE_EXHAUSTED" in found["programs"][0]["message"]
  assert found["programs"][1]["fits"]


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize(
  ("config", "topology"),
  [
    ("llama_7b_pretrain.py", "v5e:8x8"),
    ("llama_7b_lora.py", "v5e:4x4"),
    ("ppnet_7b_multimodal.py", "v5e:8x8"),
    ("ppnet_7b_multimodal.py:full", "v5e:8x8"),
  ],
)
def test_seven_billion_parameters_fit_a_pod(config, topology, tmp_path):
  done, found = compile_job(
    tmp_path,
    f"--config=configs/{config}",
    f"--config.topology={topology}",
    "--config.model.decoder.attention=reference",
  )
  assert done.returncode == 0, done.stderr
  assert found["fits"]
  total = found["num_parameters"] + found["num_frozen"]
  assert total > 6.7e9


@needs_libtpu
def test_an_unknown_topology_is_refused():
  with pytest.raises(ValueError, match=r"v5e:8x8.*got topology='v5e:3x77'"):
    compile_only.topology_devices("v5e:3x77")


@needs_libtpu
@pytest.mark.parametrize(
  ("name", "count"), [("v4:2x2x1", 4), ("v5p:2x2x1", 4), ("v6e:2x2", 4)]
)
def test_a_device_is_a_chip_whose_memory_is_known(name, count):
  devices = compile_only.topology_devices(name)
  assert len(devices) == count
  assert devices[0].device_kind in estimate.CHIPS


def test_a_job_without_a_topology_is_refused(tmp_path):
  config = tiny.experiment()
  config.job = config_lib.Job.COMPILE
  with pytest.raises(ValueError, match="--config.topology=v5e:8x8"):
    main.run_job(config, tmp_path)


def test_what_waits_on_the_device_counts():
  square = jax.jit(lambda x: x @ x)
  x = jax.ShapeDtypeStruct((64, 64), jnp.float32)

  def fits(available, resident):
    return compile_only._compile(
      compile_only._Call(
        name="square", function=square, args=(x,), resident_bytes=resident
      ),
      dataclasses.replace(CHIP, available_bytes=available),
      {"data": 1},
    )

  own = fits(2**30, 0)
  assert own.fits
  assert own.matmul_flops == (2 * 64**3,) * 2
  assert own.total_bytes == 2 * 64 * 64 * 4 + own.temp_bytes
  assert fits(own.total_bytes, 0).fits
  assert not fits(own.total_bytes, 1).fits
  # Fails if: the optimizer's state is forgotten while gradients are summed.


def test_a_program_that_is_refused_is_a_result():
  class Refused:
    def trace(self, x):
      self.jaxpr = jax.make_jaxpr(jnp.sin)(x)
      return self

    def lower(self):
      return self

    def compile(self):
      raise jax.errors.JaxRuntimeError(self.message)

  function = Refused()
  function.message = "RESOURCE_EXHAUSTED: 28.5G of 15.75G"
  call = compile_only._Call(
    name="large", function=function, args=(1.0,), resident_bytes=5
  )
  found = compile_only._compile(call, CHIP, {"data": 1})
  assert (found.fits, found.total_bytes) == (False, None)
  assert "28.5G" in found.message
  function.message = "INTERNAL: a bug"
  with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
    compile_only._compile(call, CHIP, {"data": 1})


def test_flops_count_loops_branches_and_devices():
  x = jnp.ones((3, 3))  # One product is 54.
  once = lambda x: x @ x
  looped = lambda x: jax.lax.scan(lambda c, _: (c @ c, None), x, length=5)[0]
  either = lambda x: jax.lax.cond(x[0, 0] > 0, looped, once, x)
  unknown = lambda x: jax.lax.while_loop(lambda c: c.sum() < 9, once, x)
  harmless = lambda x: jax.lax.while_loop(lambda c: c.sum() < 9, jnp.cos, x)
  mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])
  spread = jax.shard_map(
    jax.checkpoint(once),
    mesh=mesh,
    in_specs=jax.sharding.PartitionSpec(),
    out_specs=jax.sharding.PartitionSpec(),
    check_vma=False,
  )
  count = lambda f: compile_only.matmul_flops(jax.make_jaxpr(f)(x).jaxpr)
  assert count(looped) == (270, 270)
  assert count(either) == (54, 270)
  assert count(unknown) is None
  assert count(harmless) == (0, 0)
  assert count(spread) == (216, 216)


def compiled_by_a_line(monkeypatch, search, bytes_of):
  """`compile_only.compile_for` on eight devices of 1000 bytes."""
  config = tiny.experiment(expected_batch_size=500)
  config.topology = "of this test"
  config.compile_search = search
  config.mesh = config_lib.MeshConfig(data=1, fsdp=-1)
  config.perf = config_lib.PerfConfig(
    microbatch_size=8, engine=config_lib.Engine.BOOKKEEPING
  )
  device = jax.devices()[0].device_kind
  monkeypatch.setitem(
    estimate.CHIPS, device, dataclasses.replace(CHIP, available_bytes=1000)
  )
  monkeypatch.setattr(compile_only, "topology_devices", lambda _: jax.devices())

  def compile_one(call, chip, mesh):
    total = 500
    if call.name == "accumulate":
      total = bytes_of(call.args[2]["tokens"].shape[0], mesh)
    return compile_only.Compiled(
      name=call.name,
      fits=total <= chip.available_bytes,
      resident_bytes=0,
      total_bytes=total,
      matmul_flops=None,
      compile_secs=0.0,
    )

  monkeypatch.setattr(compile_only, "_compile", compile_one)
  return compile_only.compile_for(config)


def test_every_microbatch_that_is_tried_is_shared_evenly(monkeypatch):
  record = compiled_by_a_line(
    monkeypatch,
    config_lib.CompileSearch.ENGINE,
    lambda num_rows, mesh: 10 * num_rows + 303,
  )
  found = record["recommended"]
  sizes = {each["microbatch_size"] for each in found["tried"]}
  assert {8, 64} <= sizes
  assert all(size % 8 == 0 for size in sizes)
  engines = {each["engine"] for each in found["tried"]}
  assert engines == set(config_lib.Engine) - {config_lib.Engine.AUTO}
  assert found["best"]["microbatch_size"] == 64
  # Fails if: devices along fsdp are forgotten; 69 would be tried.


def test_layouts_that_are_tried_and_the_one_of_least_memory(monkeypatch):
  record = compiled_by_a_line(
    monkeypatch,
    config_lib.CompileSearch.LAYOUT,
    lambda num_rows, mesh: 10 * num_rows + 600 // mesh["tensor"],
  )
  found = record["recommended"]
  smallest = {
    tuple(each["flags"].items()): each["microbatch_size"]
    for each in reversed(found["tried"])
  }
  twice = (("mesh.tensor", 2), ("perf.gather_weights", False))
  assert smallest == {(): 8, (("perf.gather_weights", True),): 8, twice: 4}
  leanest = found["leanest"]
  assert (leanest["microbatch_size"], leanest["total_bytes"]) == (4, 340)
  # Times are not known; 68 rows fit beside 300 bytes, 40 beside 600.
  assert found["best"]["microbatch_size"] == 68
  lines = compiled.compile_table(records.to_plain(record)).splitlines()
  assert "BOOKKEEPING mesh.tensor=2 perf.gather_weights=false" in "".join(lines)
  assert lines[-1] == (
    "Least memory: --config.perf.microbatch_size=4 --config.mesh.tensor=2"
    " --config.perf.gather_weights=false"
  )
  # Fails if: a layout is compiled on the configuration's mesh, or its smallest
  # microbatch is that of another.
