"""Compiles the train step for a TPU pod that this machine does not have.

The programs are those of `train.program`, lowered with shapes in the place of
arrays and compiled by libtpu (`pip install libtpu`; no TPU is needed). Nothing
is computed, and nothing is as large as the model.

Reads as: does one microbatch, and the update behind it, fit a chip's memory,
how long would a step take, and which microbatch would be better?

*What is left out.* Memory of the data that wait for the next microbatch, of the
program itself beside what the compiler says, and of checkpoints on their way to
the host. Of time see `train.estimate`.
"""

import dataclasses
import math
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.extend.core as jex_core
import numpy as np
from jax.experimental import topologies

from ppnet import config as config_lib
from ppnet.core import checks, hlo, prng
from ppnet.privacy import mechanism as mechanism_lib
from ppnet.sharding import rules as rules_lib
from ppnet.train import estimate as estimate_lib
from ppnet.train import program as program_lib
from ppnet.train import recommend

_EXAMPLES = ("v4:4x4x4", "v5e:8x8", "v5p:4x4x4", "v6e:8x8")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
  """One program, compiled or refused. Bytes are of one device.

  Attributes:
    name: of the field of `program.Program`.
    fits: whether arguments, temporaries, outputs that are no argument's memory,
      and what else lives on the device during it are within its memory.
    argument_bytes: of its inputs.
    temp_bytes: of what it computes on the way.
    output_bytes: of its outputs, those in arguments' memory included.
    alias_bytes: of outputs that take a donated argument's place.
    resident_bytes: of train state that is no argument, but waits on the device:
      the optimizer's while gradients are accumulated.
    total_bytes: what a device must hold at once: all of these but outputs in
      arguments' memory, which count once. None where the compiler gave up.
    code_bytes: of the program.
    matmul_flops: of all matrix products on all devices together, as the program
      says before the compiler sees it; the fewest and the most, where
      conditionals have branches of different cost. None if a loop's length is
      not known.
    least: what one execution takes, conditionals by their cheapest branches;
      None where the program was refused or its text cannot be read.
    most: the same by their dearest branches.
    compile_secs: seconds.
    message: the compiler's own words where it refused, or why there is no
      `least`.
  """

  name: str
  fits: bool
  argument_bytes: int | None = None
  temp_bytes: int | None = None
  output_bytes: int | None = None
  alias_bytes: int | None = None
  resident_bytes: int
  total_bytes: int | None = None
  code_bytes: int | None = None
  matmul_flops: tuple[int, int] | None
  least: estimate_lib.Estimate | None = None
  most: estimate_lib.Estimate | None = None
  compile_secs: float
  message: str = ""


def compile_for(config: config_lib.ExperimentConfig) -> dict[str, Any]:
  """Compiles what a step runs, for `config.topology`.

  Every sequence is taken to have the largest of `data.lengths`, or else
  `model.decoder.max_seq_len` tokens, and one picture and one sound where there
  are stems: the data need not be here to say what they have. The number of
  training examples enters the program as a constant of the noise; where
  `account.num_examples` does not give it, it is a hundred batches.

  Args:
    config: a valid configuration.

  Returns:
    The content of `compile.json`: "topology", "num_devices", "device_kind",
    "available_bytes" of one device, "mesh", "num_parameters", "num_frozen",
    "num_tokens", "expected_batch_size", "microbatch_size",
    "tried_engine" (as configured), "engine" (what AUTO is, and why),
    "attention", "fits", "programs", a list of `Compiled`, "step", see
    `estimate.step`, and, where `compile_search` asks for it, "recommended",
    see `recommend.recommend`.

  Raises:
    ValueError: no such topology, no libtpu, or a mesh, microbatch or model that
      does not fit it.
  """
  devices = topology_devices(config.topology)
  kind = devices[0].device_kind
  chip = estimate_lib.CHIPS.get(kind)
  if chip is None:
    checks.fail(
      f"a kind of device in {sorted(estimate_lib.CHIPS)}", device_kind=kind
    )
  program = _program(config, devices)
  programs = [
    _compile(call, chip, dict(program.mesh.shape))
    for call in _calls(config, program)
  ]
  record = {
    "topology": config.topology,
    "num_devices": len(devices),
    "device_kind": kind,
    "available_bytes": chip.available_bytes,
    "chip": chip,
    "mesh": dict(program.mesh.shape),
    "num_parameters": program.num_parameters,
    "num_frozen": sum(
      math.prod(leaf.shape) for leaf in jax.tree.leaves(program.abstract_frozen)
    ),
    "num_tokens": _num_tokens(config),
    "expected_batch_size": config.train.expected_batch_size,
    "microbatch_size": config.perf.microbatch_size,
    "tried_engine": config.perf.engine,
    "engine": program.engine,
    "attention": config.model.decoder.attention,
    "fits": all(each.fits for each in programs),
    "programs": programs,
    "step": recommend.step(config, config.perf.microbatch_size, *programs),
  }
  if config.compile_search is not config_lib.CompileSearch.NONE:
    record["recommended"] = recommend.recommend(
      config,
      programs,
      unit=rules_lib.num_parts(program.mesh, program.rules.batch),
      available_bytes=chip.available_bytes,
      programs_of=lambda other: _programs(other, devices, chip),
    )
  return record


def _programs(
  config: config_lib.ExperimentConfig,
  devices: list[jax.Device],
  chip: estimate_lib.Chip,
) -> Iterator[Compiled]:
  """Compiles what a step runs, as it is asked for."""
  program = _program(config, devices)
  for call in _calls(config, program):
    yield _compile(call, chip, dict(program.mesh.shape))


def topology_devices(name: str) -> list[jax.Device]:
  """The devices of a pod that is not here, as "v5e:8x8".

  Raises:
    ValueError: libtpu is missing, or does not know the name.
  """
  # libtpu asks the cloud's metadata server unless told not to; and another
  # process may be compiling.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  # The two cores of a v4 chip are one device, as JAX has them on a pod.
  options = {"chip_config_name": "megacore"} if name.startswith("v4:") else {}
  try:
    return list(
      topologies.get_topology_desc(name, platform="tpu", **options).devices
    )
  except Exception as error:  # RuntimeError, XLA's own, or ValueError.
    raise ValueError(
      f"Expected topology to be one that libtpu knows, such as {_EXAMPLES},"
      f" got topology={name!r}: {error} Where libtpu is missing: pip install"
      " libtpu; no TPU is needed."
    ) from error


def abstract_example(
  config: config_lib.ExperimentConfig,
) -> dict[str, Any]:
  """One example of the longest sequence, all zeros, as the pipeline makes it.

  A modality whose stem is configured has one array; see `data.pipeline`.
  """
  num_tokens, data = _num_tokens(config), config.data
  example: dict[str, Any] = {
    "tokens": np.zeros(num_tokens, np.int32),
    "targets": np.zeros(num_tokens, np.int32),
    "loss_mask": np.zeros(num_tokens, np.float32),
    "index": np.int32(0),
    "is_padding_example": np.False_,
  }
  if config.privacy.unit is config_lib.PrivacyUnit.PACKED_ROW:
    for name in ("positions", "segment_ids"):
      example[name] = np.zeros(num_tokens, np.int32)
  if config.model.image is not None:
    size = data.image_size
    example["image"] = np.zeros((size, size, data.image_channels), np.float32)
  if config.model.audio is not None:
    is_mfcc = data.audio.feature is config_lib.AudioFeature.MFCC
    num_features = data.audio.num_mfcc if is_mfcc else data.audio.num_mels
    num_frames = config_lib.num_audio_frames(data.audio)
    example["audio"] = np.zeros((num_frames, num_features), np.float32)
  return example


def _num_tokens(config: config_lib.ExperimentConfig) -> int:
  """Tokens of the longest sequence."""
  return (config.data.lengths or (config.model.decoder.max_seq_len,))[-1]


def _program(
  config: config_lib.ExperimentConfig, devices: list[jax.Device]
) -> program_lib.Program:
  """The experiment's program on devices that are not here."""
  num_examples = config.account.num_examples
  if num_examples is None:
    num_examples = 100 * config.train.expected_batch_size
  return program_lib.build(
    config,
    mechanism_lib.build(config, num_examples),
    abstract_example(config),
    placeholder_ids={
      name: number for number, name in enumerate(config_lib.MODALITIES)
    },
    devices=devices,
    is_at_hand=False,
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Call:
  """Something to compile.

  Attributes:
    name: of the field of `program.Program`.
    function: jitted.
    args: shapes of its arguments.
    kwargs: of those by name.
    resident_bytes: of what else lives on the device.
  """

  name: str
  function: Any
  args: tuple[Any, ...]
  kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  resident_bytes: int


def _calls(
  config: config_lib.ExperimentConfig, program: program_lib.Program
) -> Iterator[_Call]:
  """What a step runs: `accumulate` first, then what runs once."""
  state, mesh = program.abstract_state, program.mesh
  replicated = rules_lib.replicated(mesh)
  key = _placed(jax.eval_shape(lambda: prng.root(0)), replicated)
  grad_sum = program.init_grad_sum.trace(state.params).out_info
  noise_state = program.init_noise_state.trace(state.params).out_info
  num_rows = config.perf.microbatch_size * program.mechanism.rows_per_unit
  batch = {
    name: jax.ShapeDtypeStruct(
      (num_rows, *value.shape),
      value.dtype,
      sharding=program.sharding_of(name),
    )
    for name, value in abstract_example(config).items()
  }
  if program.model.cut is not None:
    keys = jax.eval_shape(lambda: jax.random.split(prng.root(0), num_rows))
    batch["cut_key"] = _placed(keys, program.rules.batch_sharding(mesh))
  frozen, weights = program.abstract_frozen, program.abstract_weights
  is_gathered = weights is not state.params
  waits = (state.opt_state, noise_state, state.params if is_gathered else ())
  yield _Call(
    name="accumulate",
    function=program.accumulate,
    args=(grad_sum, weights, batch, key, state.step, state.clip_norm),
    kwargs={"frozen": frozen} if frozen else {},
    resident_bytes=_bytes(waits),
  )
  yield _Call(
    name="update",
    function=program.update,
    args=(state, grad_sum, key, noise_state),
    resident_bytes=_bytes(frozen),
  )
  if is_gathered:
    yield _Call(
      name="weights",
      function=program.weights,
      args=(state.params,),
      resident_bytes=_bytes((frozen, state.opt_state, grad_sum, noise_state)),
    )


def _placed(tree: Any, sharding: jax.sharding.Sharding) -> Any:
  """Shapes, all with one sharding."""
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=sharding
    ),
    tree,
  )


def _bytes(tree: Any) -> int:
  """Bytes of arrays on one device."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def _compile(
  call: _Call, chip: estimate_lib.Chip, mesh: Mapping[str, int]
) -> Compiled:
  """Lowers and compiles; a program that is too large is a result."""
  start = time.monotonic()
  traced = call.function.trace(*call.args, **call.kwargs)
  flops = matmul_flops(traced.jaxpr.jaxpr)
  known = {
    "name": call.name,
    "resident_bytes": call.resident_bytes,
    "matmul_flops": flops,
  }
  try:
    compiled = traced.lower().compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return Compiled(
      **known,
      fits=False,
      compile_secs=time.monotonic() - start,
      message=str(error),
    )
  memory = compiled.memory_analysis()
  total = (
    memory.argument_size_in_bytes
    + memory.temp_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
    + call.resident_bytes  # Of which the compiler does not know.
  )
  compile_secs = time.monotonic() - start
  least, most, message = _costs(
    compiled,
    chip,
    mesh,
    kernel_flops(traced.jaxpr.jaxpr) / math.prod(mesh.values()),
  )
  return Compiled(
    **known,
    fits=total <= chip.available_bytes,
    argument_bytes=memory.argument_size_in_bytes,
    temp_bytes=memory.temp_size_in_bytes,
    output_bytes=memory.output_size_in_bytes,
    alias_bytes=memory.alias_size_in_bytes,
    total_bytes=total,
    code_bytes=memory.generated_code_size_in_bytes,
    least=least,
    most=most,
    compile_secs=compile_secs,
    message=message,
  )


def _costs(
  compiled: Any,
  chip: estimate_lib.Chip,
  mesh: Mapping[str, int],
  own_kernel_flops: float,
) -> tuple[estimate_lib.Estimate | None, estimate_lib.Estimate | None, str]:
  """The least and the most of one execution, or why they are not known."""
  try:
    # libtpu cannot hand out the text of every large program.
    costs = hlo.cost(compiled.as_text() or "")
  except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
    return None, None, f"No estimate: {error}"
  least, most = (
    estimate_lib.estimate(
      each, chip=chip, mesh=mesh, kernel_flops=own_kernel_flops
    )
    for each in costs
  )
  return least, most, ""


def kernel_flops(jaxpr: jex_core.Jaxpr) -> int:
  """The most FLOPs of matrix products inside kernels, on all devices.

  Loops of unknown length, as in `matmul_flops`, count nothing.
  """
  total = 0
  eqns: Any = jaxpr.eqns  # JAX types no shapes of their variables.
  for eqn in eqns:
    if eqn.primitive.name == "pallas_call":
      counts = [matmul_flops(body) or (0, 0) for body in _inner(eqn)]
      total += (_times(eqn) or 0) * sum(most for _, most in counts)
    else:
      inner = [kernel_flops(body) for body in _inner(eqn)]
      is_choice = eqn.primitive.name == "cond"
      most = max(inner, default=0) if is_choice else sum(inner)
      total += (_times(eqn) or 0) * most
  return total


def matmul_flops(jaxpr: jex_core.Jaxpr) -> tuple[int, int] | None:
  """FLOPs of all matrix products of a program, its loops multiplied out.

  | equation | counted |
  | --- | --- |
  | product of [m, k] and [k, n] | 2 m n k |
  | scan, kernel | length or grid x body |
  | conditional | the cheapest branch, and the dearest |
  | per-device program | devices x body |
  | loop of unknown length, with products in it | None for the whole |

  >>> square = lambda x: jax.lax.scan(lambda c, _: (c @ c, None), x, length=5)
  >>> matmul_flops(jax.make_jaxpr(square)(np.ones((3, 3))).jaxpr)
  (270, 270)

  Returns:
    The fewest and the most.
  """
  least = most = 0
  eqns: Any = jaxpr.eqns  # JAX types no shapes of their variables.
  for eqn in eqns:
    if eqn.primitive.name == "dot_general":
      (contracted, _), _ = eqn.params["dimension_numbers"]
      depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
      bodies, times = [], 1
      own = 2 * math.prod(eqn.outvars[0].aval.shape) * depth
      least, most = least + own, most + own
    else:
      bodies, times = list(_inner(eqn)), _times(eqn)
    counts = [matmul_flops(body) for body in bodies]
    if None in counts:
      return None
    if not any(count != (0, 0) for count in counts):
      continue
    if times is None:
      return None
    fewest, greatest = zip(*counts, strict=True)
    if eqn.primitive.name == "cond":
      least, most = least + min(fewest), most + max(greatest)
    else:
      least += times * sum(fewest)
      most += times * sum(greatest)
  return least, most


def _times(eqn: Any) -> int | None:
  """How often an equation's inner program runs; None if it is not known."""
  name = eqn.primitive.name
  if name == "scan":
    return eqn.params["length"]
  if name == "while":
    return None
  if name == "shard_map":
    return eqn.params["mesh"].size
  if name == "pallas_call":
    return math.prod(eqn.params["grid_mapping"].grid)
  return 1


def _inner(eqn: Any) -> Iterator[jex_core.Jaxpr]:
  """Every program among an equation's parameters."""
  for value in eqn.params.values():
    for item in value if isinstance(value, tuple | list) else (value,):
      if isinstance(item, jex_core.ClosedJaxpr):
        yield item.jaxpr
      elif isinstance(item, jex_core.Jaxpr):
        yield item
