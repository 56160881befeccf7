"""Checkpoints: everything a run needs to go on, saved and restored as one.

Orbax writes one folder per step and makes it visible only when all of it is on
disk, so a kill during a save leaves the previous checkpoint. What was saved is
known by its fingerprint, so that a damaged file is noticed. Parameters,
optimizer state, the data iterator's position, the sampler's and noise's public
description and the ledger's count travel together: they are restored together
or not at all.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp

from ppnet.core import checks
from ppnet.train import state as state_lib


class Checkpoints:
  """The `checkpoints/` folder of a run, saved in the background."""

  def __init__(self, folder: pathlib.Path, *, keep: int):
    """Opens (or creates) the folder.

    Args:
      folder: where to write.
      keep: newest checkpoints kept; older ones are deleted.
    """
    self._folder = pathlib.Path(folder).absolute()
    self._manager = ocp.CheckpointManager(
      self._folder,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep, enable_async_checkpointing=True
      ),
      item_names=("state", "position"),
    )

  def latest_step(self) -> int | None:
    """The newest complete checkpoint's step, or None."""
    return self._manager.latest_step()

  def save(
    self, state: state_lib.TrainState, *, step: int, position: dict[str, Any]
  ) -> None:
    """Starts a save; the state's buffers are copied before it returns.

    Args:
      state: after `step` steps.
      step: the checkpoint's name.
      position: what else a resumed run must agree on, as plain JSON; its
        "fingerprint" is that of the state.
    """
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(_as_dict(state)),
        position=ocp.args.JsonSave(position),
      ),
    )

  def restore_newest(
    self,
    abstract_state: state_lib.TrainState,
    *,
    fingerprint: Callable[[Any], Any],
    warn: Callable[[str], Any],
  ) -> tuple[state_lib.TrainState, dict[str, Any]] | None:
    """Restores the newest checkpoint that is whole.

    A damaged one is named, put aside as `damaged-<step>`, and the one before
    it is used: the ledger has charged the steps in between, so the guarantee
    does not change.

    Args:
      abstract_state: shapes, dtypes and shardings to restore onto.
      fingerprint: `core.trees.fingerprint`, compiled.
      warn: told of each damaged checkpoint.

    Returns:
      The state and what was saved with it; None where there is no checkpoint.

    Raises:
      ValueError: there are checkpoints and none can be restored; nothing was
        put aside then.
    """
    damaged: dict[int, str] = {}
    for step in sorted(self._manager.all_steps(), reverse=True):
      try:
        found = self._restore(abstract_state, step=step)
        _check_whole(*found, step=step, fingerprint=fingerprint)
      except Exception as error:
        # Whatever Orbax and its storage raise on damaged files.
        damaged[step] = f"{type(error).__name__}: {str(error).strip()[:300]}"
        continue
      for bad, cause in damaged.items():
        aside = self._put_aside(bad)
        warn(
          f"The checkpoint of step {bad} is damaged ({cause}) and was put aside"
          f" as {aside}; going on from step {step}."
        )
      return found
    if damaged:
      checks.fail(
        f"a checkpoint in {self._folder} that can be restored",
        "Restore a copy of the folder, or start again with another --workdir.",
        **{f"step {step}": cause for step, cause in damaged.items()},
      )
    return None

  def _restore(
    self, abstract_state: state_lib.TrainState, *, step: int
  ) -> tuple[state_lib.TrainState, dict[str, Any]]:
    """Reads one checkpoint onto the shardings of `abstract_state`."""
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(_as_dict(abstract_state)),
        position=ocp.args.JsonRestore(),
      ),
    )
    return state_lib.TrainState(**restored["state"]), restored["position"]

  def _put_aside(self, step: int) -> pathlib.Path:
    """Takes a damaged checkpoint out of the way of the next save."""
    number = 0
    while (aside := self._folder / f"damaged-{step}.{number}").exists():
      number += 1
    if jax.process_index() == 0:
      (self._folder / str(step)).rename(aside)
    self._manager.reload()
    return aside

  def wait(self) -> None:
    """Blocks until every started save is on disk; raises if one failed."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits, then frees the threads."""
    self._manager.close()


def _check_whole(
  state: state_lib.TrainState,
  position: dict[str, Any],
  *,
  step: int,
  fingerprint: Callable[[Any], Any],
) -> None:
  """Raises `ValueError` unless the state is what was saved at `step`."""
  found = int(jax.device_get(state.step))
  if found != step:
    checks.fail(
      "a state of its folder's step", folder_step=step, state_step=found
    )
  words = jax.device_get(fingerprint(state)).tolist()
  if words != position["fingerprint"]:
    wrong = sum(
      one != other
      for one, other in zip(words, position["fingerprint"], strict=False)
    )
    checks.fail(
      "the numbers that were saved",
      arrays_that_differ=wrong,
      arrays=len(words),
    )


def _as_dict(state: state_lib.TrainState) -> dict[str, Any]:
  """Plain names on disk, independent of the Python class."""
  plain = {
    "step": state.step,
    "params": state.params,
    "opt_state": state.opt_state,
  }
  if state.clip_norm is not None:
    plain["clip_norm"] = state.clip_norm
  if state.average is not None:
    plain["average"] = state.average
  return plain
