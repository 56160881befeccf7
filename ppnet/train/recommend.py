"""What else a COMPILE job compiles, and what it recommends of it.

Two answers are of use: the shortest step that fits, and the least memory, where
something else has to fit beside it. Both come from the compiler's own figures.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from ppnet import config as config_lib
from ppnet.train import estimate as estimate_lib
from ppnet.train import microbatch


class Compiled(microbatch.Sized, Protocol):
  """See `compile_only.Compiled`."""

  @property
  def least(self) -> estimate_lib.Estimate | None:
    """What one execution takes."""
    ...

  @property
  def message(self) -> str:
    """The compiler's own words where it refused."""
    ...


# The programs of a step, compiled one after the other as they are asked for.
Programs = Iterator[Compiled]


def recommend(
  config: config_lib.ExperimentConfig,
  own: list[Any],
  *,
  unit: int,
  available_bytes: int,
  programs_of: Callable[[config_lib.ExperimentConfig], Programs],
) -> dict[str, Any]:
  """Compiles what `compile_search` asks for.

  Args:
    config: as it is.
    own: its programs, compiled: what runs per microbatch, then what runs once.
    unit: so many devices share a microbatch.
    available_bytes: of a device.
    programs_of: compiles another configuration's, in that order.

  Returns:
    All that was "tried": its "engine", "microbatch_size", other "flags",
    whether it "fits", "total_bytes", the compiler's "message" and
    `estimate.step`. Of what fits, "best" has the shortest step and "leanest"
    takes the least memory; both None where nothing fits.
  """
  tried: list[dict[str, Any]] = []
  for flags in _variants(config, unit):
    variant = _with(config, flags)
    if not flags:
      programs = own
    elif "perf.engine" in flags:  # What runs once does not know of it.
      programs = [next(programs_of(variant)), *own[1:]]
    else:
      try:
        programs = list(programs_of(variant))
      except ValueError as error:  # Of a mesh that does not suit the model.
        tried.append(_row(variant, flags, fits=False, message=str(error)))
        continue
    tried += _sizes(
      variant, programs, flags, unit, available_bytes, programs_of
    )
  fitting = [each for each in tried if each["fits"]]
  return {
    "tried": tried,
    "best": min(fitting, key=_shortest, default=None),
    "leanest": min(
      fitting,
      key=lambda each: (each["total_bytes"], *_shortest(each)),
      default=None,
    ),
  }


def _sizes(
  variant: config_lib.ExperimentConfig,
  programs: list[Any],
  flags: Mapping[str, Any],
  unit: int,
  available_bytes: int,
  programs_of: Callable[[config_lib.ExperimentConfig], Programs],
) -> list[dict[str, Any]]:
  """One variant with a few microbatches."""
  accumulate, *once = programs
  start = variant.perf.microbatch_size

  def compiled(size):
    if size == start:
      return accumulate
    return next(programs_of(_with(variant, {"perf.microbatch_size": size})))

  found = microbatch.search(
    compiled,
    start=start,
    unit=math.gcd(unit, start),  # Half of it on twice the tensor ways.
    largest=variant.train.expected_batch_size,
    available_bytes=available_bytes,
  )
  return [
    _row(
      _with(variant, {"perf.microbatch_size": size}),
      flags,
      fits=each.fits and all(other.fits for other in once),
      total_bytes=each.total_bytes,
      message=each.message,
      step=step(variant, size, each, *once),
    )
    for size, each in found.items()
  ]


def _row(
  variant: config_lib.ExperimentConfig, flags: Mapping[str, Any], **more: Any
) -> dict[str, Any]:
  """What is said of one."""
  return {
    "engine": variant.perf.engine,
    "microbatch_size": variant.perf.microbatch_size,
    "flags": {
      name: value
      for name, value in flags.items()
      if name not in ("perf.engine", "perf.microbatch_size")
    },
    "total_bytes": None,
    "step": None,
    **more,
  }


def step(
  config: config_lib.ExperimentConfig,
  microbatch_size: int,
  accumulate: Compiled,
  *once: Compiled,
) -> dict[str, Any] | None:
  """Time of a whole step, where all programs tell theirs."""
  times = [each.least for each in (accumulate, *once) if each.least is not None]
  if len(times) <= len(once):
    return None
  return estimate_lib.step(
    *times,
    expected_batch_size=config.train.expected_batch_size,
    microbatch_size=microbatch_size,
  )


def _shortest(tried: Mapping[str, Any]) -> tuple[float, int]:
  """Shortest step first; where no time is known, the largest microbatch."""
  found = tried["step"]
  secs = found["most_secs"] if found else math.inf
  return secs, -tried["microbatch_size"]


def _variants(
  config: config_lib.ExperimentConfig, unit: int
) -> list[dict[str, Any]]:
  """Flags of what to try; first the configuration's own, which has none."""
  variants: list[dict[str, Any]] = [{}]
  match config.compile_search:
    case config_lib.CompileSearch.ENGINE:
      variants += [{"perf.engine": each} for each in _other_engines(config)]
    case config_lib.CompileSearch.LAYOUT if unit > 1:
      is_gathered = config.perf.gather_weights
      variants.append({"perf.gather_weights": not is_gathered})
      is_free = -1 in (config.mesh.data, config.mesh.fsdp)
      if is_free and unit % 2 == 0:
        variants.append(
          {
            "mesh.tensor": 2 * config.mesh.tensor,
            "perf.gather_weights": False,
            "perf.microbatch_size": unit // 2,
          }
        )
  return variants


def _other_engines(
  config: config_lib.ExperimentConfig,
) -> list[config_lib.Engine]:
  """Engines that could take the place of the configuration's own."""
  if (
    not config.privacy.enabled
    or config.privacy.clipping is not config_lib.Clipping.PER_EXAMPLE
  ):
    return []
  others = [config_lib.Engine.BOOKKEEPING, config_lib.Engine.VMAP]
  dtype = config.model.decoder.compute_dtype
  if dtype is config_lib.ComputeDtype.FLOAT32:  # It refuses other dtypes.
    others.append(config_lib.Engine.GHOST)
  return [engine for engine in others if engine is not config.perf.engine]


def _with(
  config: config_lib.ExperimentConfig, flags: Mapping[str, Any]
) -> config_lib.ExperimentConfig:
  """A copy with other values."""
  config = copy.deepcopy(config)
  for name, value in flags.items():
    group, field = name.split(".")
    setattr(getattr(config, group), field, value)
  return config
