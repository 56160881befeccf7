"""What one step reveals: a picture drawn from one clipped noisy gradient.

A demonstration, not a measurement of a run: a batch of one record, without
amplification by sampling, at the first step of training, and an attacker who
knows the parameters, the record's class and texts, its recording, its keys, and
everything else but its picture. The picture is what makes the gradient match
(Geiping et al. 2020, "Inverting Gradients", https://arxiv.org/abs/2003.14053):
Adam on one minus the cosine between both gradients, plus total variation. Here
each array has a cosine of its own, which counts by how little of it is noise:
by one cosine of all of them, pictures that look like nothing match to 0.99.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key

from ppnet import config as config_lib
from ppnet.core import checks, trees
from ppnet.data import examples as examples_lib
from ppnet.models import lora
from ppnet.privacy import accounting, clipping, noise
from ppnet.sharding import rules as rules_lib
from ppnet.train import loop, losses
from ppnet.train import step as step_lib

# Noise multipliers from nothing to what trains. The noise has C sigma in each
# of d coordinates and the gradient has C in all of them together, so pictures
# are lost near 1 / sqrt(d).
NOISE_MULTIPLIERS = (0.0, 1e-3, 3e-3, 1e-2, 1e-1, 1.0)
_NUM_PUBLIC = 64
# Weight of total variation without noise, and what a noise multiplier adds to
# it: 1e-4 was better than 1e-3 without noise, and worse at 1e-2.
_SMOOTH = 1e-4
_SMOOTH_PER_NOISE = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inversion:
  """One picture and what was drawn of it at each level of noise.

  Attributes:
    original: as the network sees it, f32[S, S, C].
    reconstructions: f32[levels, S, S, C].
    noise_multipliers: noise standard deviation over the clip norm, [levels].
    epsilons: of one such step, add-or-remove-one; inf without noise, [levels].
    delta: of all of them.
    psnr: peak signal-to-noise ratio, dB, [levels]; see `peak_to_noise`.
    guess_psnr: that of the mean of other pictures, which needs no gradient: an
      attacker below it would do better to guess.
    matches: cosine between the gradients of both, the observed one noisy,
      [levels].
    value_range: least and largest value of other pictures; the peak is their
      difference.
    num_parameters: d.
    record_id: number of the record in its split.
  """

  original: np.ndarray
  reconstructions: np.ndarray
  noise_multipliers: Sequence[float]
  epsilons: Sequence[float]
  delta: float
  psnr: Sequence[float]
  guess_psnr: float
  matches: Sequence[float]
  value_range: tuple[float, float]
  num_parameters: int
  record_id: int

  def record(self) -> dict[str, Any]:
    """Plain values for `audit/inversion.json`."""
    fields = dataclasses.asdict(self)
    return {
      name: value.tolist() if isinstance(value, np.ndarray) else value
      for name, value in fields.items()
    }


def invert_gradient(
  experiment: loop.Experiment,
  *,
  key: Key[Array, ""],
  position: int = 0,
  noise_multipliers: Sequence[float] = NOISE_MULTIPLIERS,
  num_steps: int = 1500,
  num_starts: int = 4,
  learning_rate: float = 0.1,
) -> Inversion:
  """Draws a training picture from its clipped gradient at several noises.

  Args:
    experiment: from `train.loop.open_experiment`; its records have pictures.
    key: a stem, of the noise and of the attacker's first guesses.
    position: of the record in the train split.
    noise_multipliers: levels, 0 for no noise.
    num_steps: of the attacker's optimizer.
    num_starts: random first guesses; the one that ends best is taken.
    learning_rate: of the attacker's Adam, in units of the value range; it
      falls to 0 as a cosine.

  Raises:
    ValueError: records without one picture each, or sizes that are not
      positive.
  """
  checks.positive(num_steps=num_steps, num_starts=num_starts)
  config, program = experiment.config, experiment.program
  batch, public = _batch_and_public(experiment, position)
  value_range = float(public.min()), float(public.max())
  loss_fn = lora.with_frozen(
    losses.make_loss_fn(program.model, config.attention_noise),
    program.frozen(),
  )
  params = program.init().params
  l2_clip_norm = config.privacy.l2_clip_norm
  clipped = jax.jit(
    clipping.clipped_grad(
      loss_fn,
      l2_clip_norm=l2_clip_norm,
      engine=config_lib.Engine.VMAP,
      has_aux=True,
    )
  )(params, batch).grad_sum
  observed = [
    _noisy(
      clipped,
      noise_stddev=multiplier * l2_clip_norm,
      key=jax.random.fold_in(jax.random.fold_in(key, 0), level),
    )
    for level, multiplier in enumerate(noise_multipliers)
  ]
  starts = jax.random.uniform(
    jax.random.fold_in(key, 1),
    (num_starts, *batch["image"].shape),
    minval=value_range[0],
    maxval=value_range[1],
  )
  attack = jax.jit(
    functools.partial(
      reconstruct,
      loss_fn=loss_fn,
      num_steps=num_steps,
      learning_rate=learning_rate,
      value_range=value_range,
    )
  )
  found = [
    # The attacker knows how noisy it is, and trusts the gradient accordingly.
    jax.device_get(
      attack(
        params,
        batch,
        target,
        starts,
        noise_stddev=multiplier * l2_clip_norm,
        total_variation=_SMOOTH + _SMOOTH_PER_NOISE * multiplier,
      )
    )
    for target, multiplier in zip(observed, noise_multipliers, strict=True)
  ]
  original = np.asarray(batch["image"])[0]
  pictures = np.stack([picture[0] for picture, _ in found])
  peak = value_range[1] - value_range[0]
  return Inversion(
    original=original,
    reconstructions=pictures,
    noise_multipliers=tuple(map(float, noise_multipliers)),
    epsilons=tuple(
      accounting.epsilon(
        noise_multiplier=multiplier,
        sampling_prob=1.0,
        num_steps=1,
        delta=config.privacy.delta,
      )
      for multiplier in noise_multipliers
    ),
    delta=config.privacy.delta,
    psnr=tuple(
      peak_to_noise(picture, original, peak=peak) for picture in pictures
    ),
    guess_psnr=peak_to_noise(public.mean(axis=0), original, peak=peak),
    matches=tuple(float(match) for _, match in found),
    value_range=value_range,
    num_parameters=trees.num_parameters(params),
    record_id=position,
  )


def check_pictures(experiment: loop.Experiment) -> None:
  """Raises `ValueError` unless each record has one picture."""
  counts = experiment.datasets["train"].layout.counts
  if counts.get("image") != 1:
    checks.fail(
      "records with one picture each",
      "There is nothing else that gradient inversion draws: set"
      " --config.audit.inversion=False.",
      counts=counts,
    )


def peak_to_noise(
  picture: np.ndarray, original: np.ndarray, *, peak: float
) -> float:
  """10 log10(peak^2 / mean squared error), dB; inf where they are equal."""
  error = float(np.mean(np.square(picture - original, dtype=np.float64)))
  return float("inf") if error == 0 else 10 * float(np.log10(peak**2 / error))


def reconstruct(
  params: Any,
  batch: Mapping[str, Array],
  observed: Any,
  starts: Float[Array, "S 1 H W C"],
  *,
  loss_fn: losses.LossFn,
  num_steps: int,
  learning_rate: float,
  noise_stddev: float | Float[Array, ""],
  total_variation: float | Float[Array, ""],
  value_range: tuple[float, float],
) -> tuple[Float[Array, "1 H W C"], Float[Array, ""]]:
  """The picture whose gradient points where the observed one does. Pure.

  Args:
    params: at which the gradient was taken.
    batch: one record, as the loss sees it; its "image" is not read.
    observed: the noisy gradient.
    starts: first guesses.
    loss_fn: `(params, batch) -> (losses f32[1], terms)`.
    num_steps: of Adam.
    learning_rate: its first, in units of the value range.
    noise_stddev: of each coordinate of `observed`.
    total_variation: weight of the difference between neighbours.
    value_range: what pixels are kept within.

  Returns:
    The best of the pictures, and the cosine that all of its gradient reaches.
  """
  low, high = value_range
  size = high - low
  tx = optax.adam(optax.cosine_decay_schedule(learning_rate * size, num_steps))

  shares = _shares(observed, noise_stddev)

  def gradient(picture):
    def loss(params):
      keys = {  # One draw, used as often as pictures are tried: meant.
        name: jax.random.clone(batch[name])
        for name in ("key", "dropout_key", "cut_key")
        if name in batch
      }
      return loss_fn(params, {**batch, **keys, "image": picture})[0].sum()

    return jax.grad(loss)(params)

  def objective(picture):
    rough = sum(
      jnp.abs(jnp.diff(picture, axis=axis)).mean() for axis in (-3, -2)
    )
    each = jax.tree.map(_cosine, gradient(picture), observed)
    return 1 - trees.vdot(shares, each) + total_variation * rough / size

  def from_start(start):
    def one_step(carry, _):
      picture, state = carry
      updates, state = tx.update(jax.grad(objective)(picture), state)
      picture = jnp.clip(picture + updates, low, high)
      return (picture, state), None

    (picture, _), _ = jax.lax.scan(
      one_step, (start, tx.init(start)), length=num_steps
    )
    return picture, objective(picture)

  pictures, objectives = jax.vmap(from_start)(starts)
  best = pictures[jnp.argmin(objectives)]
  return best, _cosine(gradient(best), observed)


def _cosine(left: Any, right: Any) -> Float[Array, ""]:
  """Between two trees; 0 where one of them is."""
  norm = jnp.sqrt(trees.vdot(left, left) * trees.vdot(right, right))
  return trees.vdot(left, right) / jnp.maximum(norm, 1e-20)


def _shares(observed: Any, noise_stddev: float | Float[Array, ""]) -> Any:
  """How much each array's cosine counts: signal / (square + all of the noise).

  Without noise all count the same. In noise they count by their squares, as in
  one cosine of all of them, which is what is likeliest then; an array that is
  nothing but noise does not count.
  """
  noise_square = jnp.square(noise_stddev)
  all_noise = trees.num_parameters(observed) * noise_square

  def share(leaf):
    square = trees.vdot(leaf, leaf)
    signal = jnp.maximum(square - leaf.size * noise_square, 0.0)
    return signal / jnp.maximum(square + all_noise, 1e-20)

  shares = jax.tree.map(share, observed)
  total = jnp.maximum(sum(jax.tree.leaves(shares)), 1e-20)
  return jax.tree.map(lambda x: x / total, shares)


def _batch_and_public(
  experiment: loop.Experiment, position: int
) -> tuple[Mapping[str, Any], np.ndarray]:
  """One record as the loss sees it, and other pictures f32[n, S, S, C].

  The others are test records: what an attacker may know of pictures like it.
  """
  check_pictures(experiment)
  dataset = experiment.datasets["train"]
  program = experiment.program
  # As many rows as the devices share, of which one is a record.
  num_rows = rules_lib.num_parts(program.mesh, program.rules.batch)
  rows = dataset.batch([examples_lib.Row(position)], size=num_rows)
  row = jax.tree.map(lambda x: x[:1], program.put_batch(rows))
  batch = step_lib.grad_batch(row, program.root_key, jnp.int32(0))
  others = experiment.datasets["test"]
  count = min(_NUM_PUBLIC, len(others))
  public = others.batch(
    [examples_lib.Row(place) for place in range(count)], size=count
  )
  return batch, public["image"]


def _noisy(clipped: Any, *, noise_stddev: float, key: Key[Array, ""]) -> Any:
  """The clipped gradient with the mechanism's own noise on it."""
  tx = noise.gaussian_privatizer(noise_stddev=noise_stddev)
  noisy, _ = tx.update(clipped, tx.init(clipped), noise_key=key)
  return noisy
