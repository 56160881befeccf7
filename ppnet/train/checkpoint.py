"""Checkpoints: everything a run needs to go on, saved and restored as one.

Orbax writes one folder per step and makes it visible only when all of it is on
disk, so a kill during a save leaves the previous checkpoint. Parameters,
optimizer state, the data iterator's position, the sampler's and noise's public
description and the ledger's count travel together: they are restored together
or not at all.
"""

import pathlib
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
    self._manager = ocp.CheckpointManager(
      pathlib.Path(folder).absolute(),
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
      position: what else a resumed run must agree on, as plain JSON.
    """
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(_as_dict(state)),
        position=ocp.args.JsonSave(position),
      ),
    )

  def restore(
    self, abstract_state: state_lib.TrainState, *, step: int
  ) -> tuple[state_lib.TrainState, dict[str, Any]]:
    """Restores a checkpoint onto the shardings of `abstract_state`.

    Raises:
      ValueError: the checkpoint's own step disagrees with its folder.
    """
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(_as_dict(abstract_state)),
        position=ocp.args.JsonRestore(),
      ),
    )
    state = state_lib.TrainState(**restored["state"])
    found = int(jax.device_get(state.step))
    if found != step:
      checks.fail(
        "a checkpoint whose state is at its folder's step",
        "Delete this checkpoint; the one before it will be used.",
        folder_step=step,
        state_step=found,
      )
    return state, restored["position"]

  def wait(self) -> None:
    """Blocks until every started save is on disk; raises if one failed."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits, then frees the threads."""
    self._manager.close()


def _as_dict(state: state_lib.TrainState) -> dict[str, Any]:
  """Plain names on disk, independent of the Python class."""
  plain = {
    "step": state.step,
    "params": state.params,
    "opt_state": state.opt_state,
  }
  if state.clip_norm is not None:
    plain["clip_norm"] = state.clip_norm
  return plain
