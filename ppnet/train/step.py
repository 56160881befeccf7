"""One DP-SGD step, as two pure functions.

Abadi et al. 2016, Algorithm 1, https://arxiv.org/abs/1607.00133.

A Poisson batch has a different size every step and XLA wants fixed shapes, so a
step is `accumulate` over as many fixed-shape microbatches as the draw needs
(none for an empty draw), then one `update`. Nothing is truncated and nothing is
compiled twice. Both are jitted in `train.program`, and nowhere else.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from ppnet.core import prng, trees
from ppnet.privacy import adaptive
from ppnet.privacy import mechanism as mechanism_lib
from ppnet.train import averaging, measured
from ppnet.train import losses as losses_lib
from ppnet.train import state as state_lib

Leaf = Any

# What tells rows apart and is no input of the network.
NOT_FOR_THE_LOSS = (
  "index",
  "is_padding_example",
  "label",
  "num_bytes",
  "view",
)


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["loss", "terms", "grad_norm", "counted", "is_nonfinite"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class PerExample:
  """Exact values of a microbatch: diagnostics, never released.

  B rows make U privacy units of B / U rows each, side by side.

  Attributes:
    loss: total loss, f32[B].
    terms: its parts, f32[B] each.
    grad_norm: norm before clipping, f32[U]; None where it is not computed.
    counted: True for real rows, False for padding, bool[B].
    is_nonfinite: the gradient or a loss was not finite, bool[U].
  """

  loss: Leaf
  terms: Leaf
  grad_norm: Leaf
  counted: Leaf
  is_nonfinite: Leaf


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["total", "num_units", "count"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class GradSum:
  """The clipped sum over the part of a batch seen so far. Private.

  Attributes:
    total: float32, in the structure of the parameters.
    num_units: units in it, i32[]; private, and read by the batch-clipping
      ablation alone.
    count: of units within the clip norm, centred, f32[]; private until there is
      noise on it (`privacy.adaptive`). 0 where the clip norm is fixed.
  """

  total: Leaf
  num_units: Leaf
  count: Leaf


def init_grad_sum(params: Any) -> GradSum:
  """The sum over no examples."""
  return GradSum(
    total=jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params),
    num_units=jnp.int32(0),
    count=jnp.float32(0),
  )


def accumulate(
  grad_sum: GradSum,
  params: Any,
  microbatch: losses_lib.Batch,
  root_key: Key[Array, ""],
  step: Int[Array, ""],
  clip_norm: Float[Array, ""] | None = None,
  *,
  clipped_grad_fn: Any,
) -> tuple[GradSum, PerExample]:
  """Adds one microbatch's clipped gradients to the running sum.

  Args:
    grad_sum: sum over the step's earlier microbatches.
    params: parameters, the same for all microbatches of a step.
    microbatch: arrays [B, ...] from `data.pipeline`, with "index" and
      "is_padding_example", and with "view" where a record has several.
    root_key: root of the attention noise and of modality dropout; the step, the
      record's number and the view's are folded in, so neither depends on how a
      batch is cut.
    step: number of the step.
    clip_norm: where it follows a quantile; gradients are summed in its units.
    clipped_grad_fn: from `privacy.mechanism`.

  Returns:
    The new sum and the examples' diagnostics.
  """
  out = clipped_grad_fn(
    params,
    grad_batch(microbatch, root_key, step),
    is_padding_example=microbatch["is_padding_example"],
    scale=clip_norm,
  )
  counted = ~microbatch["is_padding_example"]
  units = counted.reshape(out.is_nonfinite.shape[0], -1).any(axis=1)
  count = grad_sum.count
  if clip_norm is not None:
    count += adaptive.centred_count(
      out.grad_norms, units & ~out.is_nonfinite, clip_norm=clip_norm
    )
  grad_sum = GradSum(
    total=jax.tree.map(jnp.add, grad_sum.total, out.grad_sum),
    num_units=grad_sum.num_units + units.sum(),
    count=count,
  )
  return grad_sum, PerExample(
    loss=out.losses,
    terms=out.aux,
    grad_norm=out.grad_norms,
    counted=counted,
    is_nonfinite=out.is_nonfinite,
  )


def grad_batch(
  microbatch: losses_lib.Batch,
  root_key: Key[Array, ""],
  step: Int[Array, ""],
) -> losses_lib.Batch:
  """What the loss sees of a microbatch, with the keys of its randomness.

  Args are those of `accumulate`. "key" is of the attention noise, "dropout_key"
  of the modalities that are dropped.
  """

  def keys(purpose):
    stem = prng.stream(root_key, purpose, step)
    of_records = prng.per_record(stem, microbatch["index"])
    if "view" not in microbatch:
      return of_records
    return prng.per_view(of_records, microbatch["view"])

  batch = {
    name: microbatch[name]
    for name in microbatch
    if name not in NOT_FOR_THE_LOSS
  }
  return batch | {
    "key": keys(prng.Stream.ATTENTION_NOISE),
    "dropout_key": keys(prng.Stream.MODALITY_DROPOUT),
  }


def update(
  state: state_lib.TrainState,
  grad_sum: GradSum,
  noise_key: Key[Array, ""],
  noise_state: Any,
  *,
  mechanism: mechanism_lib.Mechanism,
  tx: optax.GradientTransformation,
  learning_rate_fn: optax.Schedule,
  ema_decay: float | None = None,
) -> tuple[state_lib.TrainState, Any, dict[str, Float[Array, ""]]]:
  """Adds the noise and takes the optimizer's step.

  Args:
    state: before the step.
    grad_sum: clipped sum over the whole batch.
    noise_key: root of the DP noise; the step is folded in.
    noise_state: of the mechanism's privatizer; secret, and not a part of the
      train state, so that it is in no checkpoint.
    mechanism: its privatizer adds the noise; its `expected_batch_size` is the
      public divisor, since the realised size is private.
    tx: the optimizer.
    learning_rate_fn: the schedule inside `tx`, for the record.
    ema_decay: of the average, where the state has one.

  Returns:
    The state after the step; the noise state; and scalars: "learning_rate";
    "params_finite"; "clip_norm", that of this step, where it follows a quantile
    (public); and "dp_perturbation", the linear term
    <z, params> / expected_batch_size whose gradient is the noise (an exact
    diagnostic: whoever has it knows one direction of the noise).
  """
  clipped_sum = mechanism.finish_sum(
    grad_sum.total, num_examples=grad_sum.num_units
  )
  privatizer = mechanism.privatizer()
  noisy_sum, noise_state = privatizer.update(
    clipped_sum,
    noise_state,
    state.params,
    noise_key=prng.stream(noise_key, prng.Stream.DP_NOISE, state.step),
  )
  clip_norm = state.clip_norm
  if clip_norm is not None:
    clip_norm = mechanism.next_clip_norm(
      clip_norm,
      grad_sum.count,
      noise_key=prng.stream(
        noise_key, prng.Stream.CLIP_COUNT_NOISE, state.step
      ),
    )
  perturbation = trees.vdot(noisy_sum, state.params) - trees.vdot(
    clipped_sum, state.params
  )
  del grad_sum, clipped_sum  # Private. Nothing below may see them.
  size = mechanism.expected_batch_size
  if state.clip_norm is not None:  # The sum is in its units.
    size = size / state.clip_norm
  mean_grad = jax.tree.map(lambda g: g / size, noisy_sum)
  updates, opt_state = tx.update(
    measured.task_grad(mean_grad, state.params), state.opt_state, state.params
  )
  updates = measured.of_updates(updates, mean_grad, state.params)
  params = optax.apply_updates(state.params, updates)
  average = state.average
  if average is not None:
    assert ema_decay is not None, "a state with an average has a decay"
    average = averaging.update(average, params, state.step, decay=ema_decay)
  scalars = {
    "learning_rate": jnp.asarray(learning_rate_fn(state.step), jnp.float32),
    "dp_perturbation": perturbation / size,
    "params_finite": trees.all_finite(params),
  }
  if state.clip_norm is not None:
    scalars["clip_norm"] = state.clip_norm
  return (
    state_lib.TrainState(
      step=state.step + 1,
      params=params,
      opt_state=opt_state,
      clip_norm=clip_norm,
      average=average,
    ),
    noise_state,
    scalars,
  )


def replay_noise(
  params: Any,
  noise_key: Key[Array, ""],
  noise_state: Any,
  step: Int[Array, ""],
  *,
  mechanism: mechanism_lib.Mechanism,
) -> Any:
  """The noise state after `step`, of which the sum is not at hand any more.

  Args:
    params: parameters, for their shapes.
    noise_key: root of the DP noise, the same as when the step was taken.
    noise_state: before the step.
    step: number of the step.
    mechanism: its privatizer drew the noise.

  Returns:
    The noise state that `update` returned at that step.
  """
  _, noise_state = mechanism.privatizer().update(
    jax.tree.map(jnp.zeros_like, params),
    noise_state,
    params,
    noise_key=prng.stream(noise_key, prng.Stream.DP_NOISE, step),
  )
  return noise_state


def predict(
  params: Any,
  batch: losses_lib.Batch,
  root_key: Key[Array, ""],
  *,
  model: Any,
  noise_config: Any,
) -> Float[Array, "B _ V"]:
  """Logits of one batch as evaluations see them; see `evaluate`."""
  noise = None
  if noise_config.at_evaluation:
    stem = prng.stream(root_key, prng.Stream.EVAL_ATTENTION_NOISE, 0)
    noise = losses_lib.attention_noise(
      noise_config, prng.per_record(stem, batch["index"])
    )
  return losses_lib.predict(model, params, batch, noise=noise)


def evaluate(
  params: Any,
  batch: losses_lib.Batch,
  root_key: Key[Array, ""],
  *,
  model: Any,
  noise_config: Any,
) -> tuple[Float[Array, " B"], Float[Array, "B V"] | None]:
  """Losses and answer logits of one batch.

  Args:
    params: parameters.
    batch: arrays [B, ...] from `data.pipeline.eval_batches`.
    root_key: root of the attention noise, used where the configuration keeps
      it on at evaluation; all evaluations share one draw per record.
    model: the network.
    noise_config: attention noise.

  Returns:
    Task loss per example, and logits at the answer position where there is one
    (a batch with "label").
  """
  logits = predict(
    params, batch, root_key, model=model, noise_config=noise_config
  )
  loss = losses_lib.cross_entropy(logits, batch["targets"], batch["loss_mask"])
  if "label" not in batch:
    return loss, None
  return loss, losses_lib.answer_logits(logits, batch["loss_mask"])
