"""Attention with noise and without: time and memory of forward and backward.

The baseline is attention without noise as the platform does it best: cuDNN's
flash attention on a GPU, XLA's elsewhere. On a CPU the kernels are interpreted,
so there their rows say nothing but that they run.
"""

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from ppnet import config as config_lib
from ppnet.bench import measure
from ppnet.core import prng, records
from ppnet.kernels import noisy_attention

_RECORD = "bench.json"
_GOAL = measure.Goal(time_ratio=2.0, memory_ratio=2.0)
_KERNELS = {
  "gpu": noisy_attention.Implementation.GPU,
  "tpu": noisy_attention.Implementation.TPU,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """One shape: as many queries [B, T, N, H] as key tokens, causal, bfloat16."""

  name: str
  batch_size: int
  num_heads: int
  num_tokens: int
  head_dim: int

  @property
  def title(self) -> str:
    """The shape, in one line."""
    return (
      f"{self.name}: B {self.batch_size}, N {self.num_heads},"
      f" T {self.num_tokens}, H {self.head_dim}, causal, bfloat16,"
      " forward and backward"
    )


_CASES = {
  case.name: case
  for case in (
    Case(name="7b", batch_size=4, num_heads=32, num_tokens=4096, head_dim=128),
    Case(
      name="short", batch_size=16, num_heads=32, num_tokens=512, head_dim=64
    ),
    Case(name="tiny", batch_size=1, num_heads=2, num_tokens=128, head_dim=16),
  )
}


def parse_cases(names: str) -> list[Case]:
  """Cases by name; "default" is `7b` on an accelerator and `tiny` on a CPU.

  Raises:
    ValueError: unknown names.
  """
  if names == "default":
    names = "tiny" if jax.default_backend() == "cpu" else "7b"
  return measure.named(names, _CASES, also=["default"])


def run(
  config: config_lib.ExperimentConfig,
  workdir: pathlib.Path,
  *,
  log: Any = sys.stderr,
) -> dict[str, Any]:
  """Measures the cases of `config.bench`; writes `bench.json`.

  Args:
    config: its seed gives inputs and noise.
    workdir: its folder.
    log: where progress goes.

  Returns:
    The record that `bench.json` holds.

  Raises:
    ValueError: unknown cases.
  """
  record: dict[str, Any] = {
    "subject": config.bench.subject,
    "machine": measure.machine(),
    "rounds": config.bench.rounds,
    "is_complete": False,
    "cases": {},
    "rows": [],
  }
  for case in parse_cases(config.bench.cases):
    rows, facts = _measure(case, config, log)
    record["rows"] += rows
    record["cases"][case.name] = facts
    records.write_json(workdir / _RECORD, record)
  record["is_complete"] = True
  records.write_json(workdir / _RECORD, record)
  return records.to_plain(record)


def _measure(
  case: Case, config: config_lib.ExperimentConfig, log: Any
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
  """The rows of one case, and what there is to know about it."""
  inputs = _inputs(case, config.seed)
  with tqdm.tqdm(desc=case.name, unit="run", file=log) as bar:
    contenders = _contenders(inputs, bar.set_postfix_str)
    ran = sum(contender.program is not None for contender in contenders)
    bar.reset(total=ran * config.bench.rounds)
    bar.set_postfix_str("")
    load = measure.Load()
    rows = measure.rows(
      contenders,
      case=case.name,
      rounds=config.bench.rounds,
      goal=_GOAL,
      on_run=bar.update,
    )
  busy = load.record()
  share = busy["others_cpu_share"]
  return rows, {
    "title": case.title,
    **dataclasses.asdict(case),
    "goal": _GOAL,
    **busy,
    "is_quiet": share is None or share <= measure.QUIET_SHARE,
  }


def _inputs(case: Case, seed: int) -> tuple[jax.Array, ...]:
  """q, k, v and the output's cotangent, bfloat16, and keys' words."""
  keys = jax.random.split(prng.root(seed), 5)
  shape = (case.batch_size, case.num_tokens, case.num_heads, case.head_dim)
  arrays = [jax.random.normal(key, shape, jnp.bfloat16) for key in keys[:4]]
  words = jax.random.key_data(jax.random.split(keys[4], case.batch_size))
  return (*arrays, words)


def _contenders(
  inputs: tuple[jax.Array, ...], on_next: Callable[[str], Any]
) -> list[measure.Contender]:
  """The baseline and what is held against it, compiled and run once."""
  kernel = _KERNELS.get(jax.default_backend())
  note = ""
  if kernel is None:
    kernel, note = noisy_attention.Implementation.TPU, "interpreted"
  reference = noisy_attention.Implementation.REFERENCE
  modes = noisy_attention.NoiseMode
  contenders, outputs = [], {}

  def add(name: str, attend: Callable[..., Any], like: str, note: str = ""):
    on_next(f"compiling {name}")
    program, facts = None, {}
    try:
      program = measure.compile_program(_forward_and_backward(attend), *inputs)
      outputs[name] = jax.device_get(program.run())
    except jax.errors.JaxRuntimeError as error:
      # A row that the device cannot run is a hole with its reason.
      program, note = None, str(error).splitlines()[0][:120]
    else:
      if like in outputs:
        facts = {"errors": _errors(outputs[name], outputs[like])}
    contenders.append(
      measure.Contender(
        name=name, framework="jax", program=program, note=note, facts=facts
      )
    )

  has_cudnn = jax.default_backend() == "gpu"
  add(
    "cuDNN, no noise" if has_cudnn else "XLA, no noise",
    lambda q, k, v, words: jax.nn.dot_product_attention(
      q, k, v, is_causal=True, implementation="cudnn" if has_cudnn else "xla"
    ),
    "",
  )
  # The reference first: the kernels' errors are to it.
  rows = [
    (reference, None),
    (reference, modes.SCORES),
    (reference, modes.WEIGHTS),
  ]
  rows += [(kernel, mode) for _, mode in rows]
  for code, mode in rows:
    kind = "no noise" if mode is None else mode.name
    add(
      f"{code.value}, {kind}",
      functools.partial(_attend, code, mode),
      f"{reference.value}, {kind}",
      note if code is kernel else "",
    )
  return contenders


def _attend(code: Any, mode: Any, q: Any, k: Any, v: Any, words: Any) -> Any:
  """Our op, with noise of standard deviation 0.3 where there is some."""
  noise = None
  if mode is not None:
    noise = noisy_attention.AttentionNoise(
      key=jax.random.wrap_key_data(words), stddev=jnp.float32(0.3), mode=mode
    )
  return noisy_attention.noisy_attention(
    q, k, v, noise=noise, implementation=code
  )


def _forward_and_backward(attend: Callable[..., Any]) -> Callable[..., Any]:
  """A function of the inputs that gives the output and dq, dk, dv."""

  def step(q, k, v, d_out, words):
    out, pullback = jax.vjp(lambda q, k, v: attend(q, k, v, words), q, k, v)
    return out, *pullback(d_out)

  return step


def _errors(got: Any, expected: Any) -> dict[str, float]:
  """Largest difference of each result over the expected one's largest value."""
  errors = {}
  for name, one, other in zip(
    ("out", "dq", "dk", "dv"), got, expected, strict=True
  ):
    one, other = np.float32(one), np.float32(other)
    most = max(float(np.abs(other).max()), 1e-30)
    errors[name] = float(np.abs(one - other).max()) / most
  return errors
