"""Does the trainer's own step keep its promise? A white-box audit in one run.

Canaries are added to the training set as privacy units of their own, each of
which is in it or not by an independent fair coin. A canary's loss is
<a u_j, params>, so its gradient is a u_j whatever the parameters: longer than
the clip norm and of known direction. It goes through what every record goes
through: the sampler, microbatches with padding, clipping, the sum, the noise,
the division, the optimizer (`train.step`). The observer sees every noisy sum,
which is what the guarantee is about, and says of each canary whether it was in
(Steinke et al. 2023, https://arxiv.org/abs/2305.08846; its gradients are those
of Nasr et al. 2023, https://arxiv.org/abs/2302.07956).

*Directions.* The m canaries share the d parameters among them: each has
floor(d / m) coordinates of its own, drawn at random over all parameters, with
random signs. Disjoint directions are exactly orthogonal, so canaries do not
hide each other, as m > sqrt(d) random normal ones would; and many coordinates
each, because a single one may be one that all records move. All projections
together cost one pass over the gradient.

*Microbatches of records alone go through the configured engine*, those with a
canary through VMAP, which takes any loss and gives the same sum
(`tests/privacy`, `tests/train/engines_test.py`). What follows the sum is the
same code.

*Canaries count.* They are units among the N, and the expected batch grows with
N, so that q, the noise multiplier and the number of steps are those of the
configuration: what is audited is the configured mechanism and no weaker one.
Microbatches of canaries alone do without the network, so that most of what they
cost is one pass over the parameters each.

What the scores prove is `audit.bounds`' and `audit.assess`' to say.
"""

import dataclasses
import enum
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from jaxtyping import Array, Float, Int

from ppnet import config as config_lib
from ppnet.core import checks, prng
from ppnet.data import batching, pipeline
from ppnet.data import examples as examples_lib
from ppnet.models import lora
from ppnet.privacy import mechanism as mechanism_lib
from ppnet.privacy import sampling
from ppnet.sharding import layout
from ppnet.train import initial, loop, losses, optimizer
from ppnet.train import state as state_lib
from ppnet.train import step as step_lib

CANARY_KEY = "canary"
# Gradients are so many clip norms long: enough to be clipped even where the
# clip norm follows a quantile upwards, and little enough that a run without
# clipping stays finite.
_LENGTH = 10.0
# Of the four streams of randomness that a seeded audit derives.
_COINS, _DIRECTIONS, _SAMPLER, _NOISE = range(100, 104)


class _Rows(enum.Enum):
  """What there is in a microbatch, beside padding."""

  RECORDS = enum.auto()
  CANARIES = enum.auto()
  BOTH = enum.auto()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
  """A training run to be audited: the parts of the trainer it goes through.

  Attributes:
    mechanism: of the records and the canaries together.
    num_canaries: m, the last units of the mechanism's N.
    loss_fn: of the records, as `train.losses.make_loss_fn` returns it; of
      trained and frozen parameters together.
    frozen: parameters that are not trained; {} if all are.
    init: () -> the state before the first step.
    tx: the optimizer.
    learning_rate_fn: the schedule inside it.
    dataset: the records.
    users: whose they are; None where the unit is an example.
    num_views: rows of each record.
    microbatch_size: units per compiled call.
    put_batch: places a batch.
    root_key: of attention noise and modality dropout.
    num_stacked_axes: see `Mechanism.clipped_grad_fn`.
    on_mesh: wraps what is compiled.
  """

  mechanism: mechanism_lib.Mechanism
  num_canaries: int
  loss_fn: losses.LossFn
  frozen: Any
  init: Callable[[], state_lib.TrainState]
  tx: optax.GradientTransformation
  learning_rate_fn: optax.Schedule
  dataset: pipeline.AnyExamples
  users: pipeline.Users | None
  num_views: int
  microbatch_size: int
  put_batch: Callable[[Mapping[str, np.ndarray]], Mapping[str, Any]]
  root_key: Array
  num_stacked_axes: Any = None
  on_mesh: Callable[[Any], Any] = lambda fn: fn


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scored:
  """What an observer of every noisy sum says of the canaries.

  Attributes:
    is_in: whether each was in the training set, bool[m].
    scores: of each, higher says "in", f64[m]; see `scores_of`.
    score: name of the score.
  """

  is_in: np.ndarray
  scores: np.ndarray
  score: str


def subject(experiment: loop.Experiment, *, num_canaries: int) -> Subject:
  """The configured training with canaries among its units.

  Trains a model of its own, which nothing is written of.

  Args:
    experiment: from `train.loop.open_experiment`.
    num_canaries: m; `config.audit.num_gradient_canaries`.

  Raises:
    ValueError: a mechanism that cannot be built for records and canaries.
  """
  config, program = experiment.config, experiment.program
  num_units = (
    len(experiment.training)
    if experiment.users is None
    else len(experiment.users.records)
  )
  is_trained = lora.trained_names(config)
  num_stacked_axes = initial.num_stacked_axes(
    program.model, experiment.training[0]
  )
  if is_trained is not None:
    num_stacked_axes, _ = lora.partition(num_stacked_axes, is_trained)
  return Subject(
    mechanism=mechanism_lib.build(
      enlarged(config, num_units=num_units, num_canaries=num_canaries),
      num_units + num_canaries,
    ),
    num_canaries=num_canaries,
    loss_fn=losses.make_loss_fn(program.model, config.attention_noise),
    frozen=program.frozen(),
    init=program.init,
    tx=optimizer.build(config.optimizer, config.train.num_steps),
    learning_rate_fn=optimizer.schedule(
      config.optimizer, config.train.num_steps
    ),
    dataset=experiment.training,
    users=experiment.users,
    num_views=config.train.views_per_example,
    microbatch_size=config.perf.microbatch_size,
    put_batch=program.put_batch,
    root_key=program.root_key,
    num_stacked_axes=num_stacked_axes,
    on_mesh=functools.partial(layout.within, program.mesh, program.rules),
  )


def enlarged(
  config: config_lib.ExperimentConfig, *, num_units: int, num_canaries: int
) -> config_lib.ExperimentConfig:
  """The configuration for more units at the same sampling probability.

  Were the batch left as it is, more canaries would make each of them rarer and
  the noise smaller, and 10,000 of them prove less than 4,000 (BUILD_NOTES.md).

  Args:
    config: for `num_units`.
    num_units: N of the data.
    num_canaries: m, to be added.
  """

  def grown(size: int) -> int:
    whole = num_units + num_canaries
    return max(1, min(whole, round(size * whole / num_units)))

  size, most = config.train.expected_batch_size, config.privacy.max_batch_size
  return dataclasses.replace(
    config,
    train=dataclasses.replace(config.train, expected_batch_size=grown(size)),
    privacy=dataclasses.replace(
      config.privacy, max_batch_size=most and grown(most)
    ),
  )


class WithCanaries:
  """A data set whose last rows are canaries.

  They look like its first record and carry the number of their canary, which
  is -1 for records. Can be pickled.
  """

  def __init__(self, dataset: pipeline.AnyExamples, num_canaries: int):
    """Adds `num_canaries` positions behind the last of `dataset`."""
    self._dataset = dataset
    self._num_canaries = num_canaries
    self.layout = dataset.layout

  @property
  def bad_records(self) -> examples_lib.BadRecords:
    """Those of the records."""
    return self._dataset.bad_records

  def __len__(self) -> int:
    return len(self._dataset) + self._num_canaries

  def padded_length(self, position: int) -> int:
    """That of the record whose arrays are taken."""
    return self._dataset.padded_length(self._own(position))

  def batch(
    self,
    rows: Sequence[examples_lib.Row | None],
    *,
    size: int,
    length: int | None = None,
  ) -> batching.Batch:
    """See `data.examples.Examples.batch`; with "canary", int32 [size]."""
    own = [
      row and row._replace(position=self._own(row.position)) for row in rows
    ]
    batch = dict(self._dataset.batch(own, size=size, length=length))
    canary = np.full(size, -1, np.int32)
    for place, row in enumerate(rows):
      if row is not None and row.position >= len(self._dataset):
        canary[place] = row.position - len(self._dataset)
        batch[batching.INDEX_KEY][place] = row.position
        batch[batching.PADDING_KEY][place] = False
    return batch | {CANARY_KEY: canary}

  def _own(self, position: int) -> int:
    """The record whose arrays stand at a position."""
    return position if position < len(self._dataset) else 0


def directions(
  params: Any, *, num_canaries: int, rng: np.random.Generator
) -> Any:
  """Which coordinate belongs to which canary, and with which sign.

  Args:
    params: arrays or their shapes, d entries.
    num_canaries: m.
    rng: draws coordinates and signs. Takes 8 bytes of this host per parameter.

  Returns:
    int32 in the structure of `params`: j + 1 or -(j + 1) where the entry of u_j
    is 1 / sqrt(floor(d / m)) or minus that, 0 where no canary has one.

  Raises:
    ValueError: fewer parameters than canaries.
  """
  leaves, structure = jax.tree.flatten(params)
  sizes = [math.prod(leaf.shape) for leaf in leaves]
  total = sum(sizes)
  checks.positive(num_gradient_canaries=num_canaries)
  checks.at_most(
    total,
    "Each canary needs a parameter of its own: use fewer of them.",
    num_gradient_canaries=num_canaries,
  )
  codes = np.zeros(total, np.int32)
  used = total // num_canaries * num_canaries
  codes[:used] = np.arange(used, dtype=np.int32) % num_canaries + 1
  codes *= rng.choice(np.array([-1, 1], np.int32), size=total)
  rng.shuffle(codes)
  parts = np.split(codes, np.cumsum(sizes)[:-1])
  return structure.unflatten(
    [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
  )


def project(tree: Any, codes: Any, *, num_canaries: int) -> Float[Array, " m"]:
  """The inner products <tree, u_j> with every direction, f32[m].

  Args:
    tree: in the structure of the parameters.
    codes: from `directions`.
    num_canaries: m.
  """

  def sums(leaf, code):
    return jax.ops.segment_sum(
      (leaf.astype(jnp.float32) * jnp.sign(code)).ravel(),
      jnp.abs(code).ravel(),
      num_segments=num_canaries + 1,
    )[1:]

  total = sum(jax.tree.leaves(jax.tree.map(sums, tree, codes)))
  assert isinstance(total, jax.Array)  # There is a parameter.
  size = sum(leaf.size for leaf in jax.tree.leaves(tree)) // num_canaries
  return total / math.sqrt(size)


def canary_loss(
  codes: Any, *, num_canaries: int, length: float
) -> losses.LossFn:
  """The loss of canaries alone.

  Args:
    codes: from `directions`.
    num_canaries: m.
    length: norm of a canary's gradient.

  Returns:
    `loss_fn(params, batch) -> (losses, {})` that reads "canary" i32[B] of the
    batch and nothing else; 0 where it is -1. It takes no `ops`: VMAP alone
    computes its gradients.
  """
  size = sum(leaf.size for leaf in jax.tree.leaves(codes)) // num_canaries

  def own_loss(params, number: Int[Array, ""]):
    products = jax.tree.map(
      lambda leaf, code: jnp.sum(
        jnp.where(jnp.abs(code) == number + 1, leaf * jnp.sign(code), 0.0)
      ),
      params,
      codes,
    )
    # Records (-1) match the coordinates of nobody, whose code is 0.
    total = sum(jax.tree.leaves(products))
    assert isinstance(total, jax.Array)  # There is a parameter.
    return length / math.sqrt(size) * total

  def loss_fn(params, batch):
    number = batch[CANARY_KEY]
    return jax.vmap(own_loss, in_axes=(None, 0))(params, number), {}

  return loss_fn


def with_canaries(
  loss_fn: losses.LossFn, codes: Any, *, num_canaries: int, length: float
) -> losses.LossFn:
  """The loss of records and canaries.

  Args:
    loss_fn: of the records, `(params, batch) -> (losses f32[B], terms)`.
    codes: from `directions`.
    num_canaries: m.
    length: norm of a canary's gradient.

  Returns:
    `loss_fn(params, batch) -> (losses, terms)`; see `canary_loss`.
  """
  of_canaries = canary_loss(codes, num_canaries=num_canaries, length=length)

  def both(params, batch):
    rest = {name: batch[name] for name in batch if name != CANARY_KEY}
    values, terms = loss_fn(params, rest)
    own, _ = of_canaries(params, batch)
    return jnp.where(batch[CANARY_KEY] >= 0, own, values), terms

  return both


def observing(codes: Any, *, num_canaries: int) -> optax.GradientTransformation:
  """Passes updates on and keeps their projections as its state, f32[m].

  At the head of the optimizer's chain it sees what the optimizer sees: the
  noisy sum over the expected batch size, and nothing that is not released.
  """

  def init_fn(params):
    del params  # Nothing was seen yet.
    return jnp.zeros(num_canaries, jnp.float32)

  def update_fn(updates, state, params=None):
    del state, params  # Each step is read by itself.
    return updates, project(updates, codes, num_canaries=num_canaries)

  return optax.GradientTransformation(init_fn, update_fn)


class Auditor:
  """A subject with its compiled step; each call is one audited run."""

  def __init__(self, subject: Subject):
    """Compiles nothing yet.

    Raises:
      ValueError: the mechanism is of fewer units than there are canaries.
    """
    mechanism = subject.mechanism
    self._num_others = mechanism.sampler.num_examples - subject.num_canaries
    checks.non_negative(num_records_or_users=self._num_others)
    self.subject = subject
    self._accumulate = {
      rows: jax.jit(
        subject.on_mesh(functools.partial(self._traced_accumulate, rows=rows)),
        donate_argnames="grad_sum",
      )
      for rows in _Rows
    }
    self._update = jax.jit(
      self._traced_update, donate_argnames=("state", "noise_state")
    )

  def __call__(self, *, seed: int | None) -> Scored:
    """Trains once and watches, from the first step to the last.

    Args:
      seed: of coins, directions, batches and noise; None takes each from the
        operating system's entropy.

    Raises:
      ValueError: fewer parameters than canaries, or the training diverged, so
        that nothing can be read off.
    """
    mechanism = self.subject.mechanism
    coins = np.random.default_rng(_root(seed, _COINS))
    is_in = coins.random(self.subject.num_canaries) < 0.5
    scores, score = scores_of(
      self.observe(is_in, seed=seed),
      sampling_prob=mechanism.sampling_prob,
      noise_multiplier=_noise_multiplier(mechanism),
    )
    return Scored(is_in=is_in, scores=scores, score=score)

  def observe(self, is_in: np.ndarray, *, seed: int | None) -> np.ndarray:
    """Trains once and returns <noisy sum, u_j> of every step.

    Args:
      is_in: which canaries are in the training set, bool[m].
      seed: of directions, batches and noise.

    Returns:
      float64 [T, m], in units of the clip norm: 1 is a canary's clipped
      gradient.
    """
    subject, mechanism = self.subject, self.subject.mechanism
    state = subject.init()
    codes = directions(
      state.params,
      num_canaries=subject.num_canaries,
      rng=np.random.default_rng(_root(seed, _DIRECTIONS)),
    )
    codes = jax.tree.map(
      lambda code, leaf: jax.device_put(code, leaf.sharding),
      codes,
      state.params,
    )
    state = dataclasses.replace(
      state,
      opt_state=(
        jnp.zeros(subject.num_canaries, jnp.float32),
        state.opt_state,
      ),
    )
    noise_state = mechanism.privatizer().init(state.params)
    noise_key = prng.root(_root(seed, _NOISE))
    projections, sizes = [], []
    steps = tqdm.tqdm(
      self._steps(is_in, seed=seed),
      total=mechanism.num_steps,
      desc=f"{subject.num_canaries:,} planted gradients",
      unit="step",
      delay=1,
    )
    for data in steps:
      grad_sum = step_lib.init_grad_sum(state.params)
      for microbatch in data["microbatches"]:
        grad_sum = self._accumulate[_rows(microbatch)](
          grad_sum,
          state.params,
          subject.put_batch(microbatch),
          subject.root_key,
          state.step,
          state.clip_norm,
          subject.frozen,
          codes,
        )
      state, noise_state, scalars = self._update(
        state, grad_sum, noise_key, noise_state, codes
      )
      # One step's worth waits on the device: the next one donates the state.
      projections.append(jax.device_get(state.opt_state[0]))
      clip_norm = scalars.get("clip_norm", mechanism.l2_clip_norm)
      sizes.append(mechanism.expected_batch_size / float(clip_norm))
    seen = np.asarray(projections, np.float64) * np.asarray(sizes)[:, None]
    if not np.isfinite(seen).all():
      checks.fail(
        "every noisy sum of the audited run to be finite",
        "Lower optimizer.learning_rate.",
        steps_that_are_not=int((~np.isfinite(seen).all(axis=1)).sum()),
      )
    return seen

  def _steps(self, is_in: np.ndarray, *, seed: int | None) -> Any:
    """The trainer's microbatches, canaries that are not in left out."""
    subject, mechanism = self.subject, self.subject.mechanism
    num_others = self._num_others
    sampler: Any = mechanism.sampler
    if hasattr(sampler, "root"):
      sampler = dataclasses.replace(sampler, root=_root(seed, _SAMPLER))

    def draw(step: int) -> np.ndarray:
      drawn = sampler.draw(step)
      present = np.concatenate([np.ones(num_others, bool), is_in])
      return drawn[present[drawn]]

    num_records = len(subject.dataset)
    users = subject.users
    if users is not None:  # A canary is a user with one record.
      own = np.arange(num_records, num_records + subject.num_canaries)
      users = dataclasses.replace(
        users, records=[*users.records, *own[:, None]]
      )
    dataset: Any = WithCanaries(subject.dataset, subject.num_canaries)
    return pipeline.train_steps(
      dataset,
      draw=draw,
      num_steps=mechanism.num_steps,
      microbatch_size=subject.microbatch_size,
      num_threads=0,
      prefetch_steps=0,
      users=users,
      num_views=subject.num_views,
    )

  def _traced_accumulate(
    self,
    grad_sum: step_lib.GradSum,
    params: Any,
    microbatch: losses.Batch,
    root_key: Array,
    step: Array,
    clip_norm: Array | None,
    frozen: Any,
    codes: Any,
    *,
    rows: _Rows,
  ) -> step_lib.GradSum:
    """`step.accumulate` with the loss of what there is in the microbatch."""
    subject, mechanism = self.subject, self.subject.mechanism
    options: Any = {
      "num_canaries": subject.num_canaries,
      "length": _LENGTH * mechanism.l2_clip_norm,
    }
    loss_fn = subject.loss_fn
    if frozen:
      loss_fn = lora.with_frozen(loss_fn, frozen)
    if rows is _Rows.RECORDS:
      microbatch = {
        name: microbatch[name] for name in microbatch if name != CANARY_KEY
      }
    else:
      mechanism = dataclasses.replace(mechanism, engine=config_lib.Engine.VMAP)
      if rows is _Rows.CANARIES:
        loss_fn = canary_loss(codes, **options)
      else:
        loss_fn = with_canaries(loss_fn, codes, **options)
    grad_sum, _ = step_lib.accumulate(
      grad_sum,
      params,
      microbatch,
      root_key,
      step,
      clip_norm,
      clipped_grad_fn=mechanism.clipped_grad_fn(
        loss_fn,
        has_aux=True,
        params=params,
        num_stacked_axes=subject.num_stacked_axes,
      ),
    )
    return grad_sum

  def _traced_update(
    self,
    state: state_lib.TrainState,
    grad_sum: step_lib.GradSum,
    noise_key: Array,
    noise_state: Any,
    codes: Any,
  ) -> tuple[state_lib.TrainState, Any, Mapping[str, Array]]:
    """`step.update`, its optimizer's input observed."""
    subject = self.subject
    observe = observing(codes, num_canaries=subject.num_canaries)
    return step_lib.update(
      state,
      grad_sum,
      noise_key,
      noise_state,
      mechanism=subject.mechanism,
      tx=optax.chain(observe, subject.tx),
      learning_rate_fn=subject.learning_rate_fn,
    )


def scores_of(
  seen: np.ndarray, *, sampling_prob: float, noise_multiplier: float
) -> tuple[np.ndarray, str]:
  """One number per canary, higher for "in", and the number's name.

  The sum over steps of <noisy sum, u_j>, or, where there is noise, the
  logarithm of the likelihood ratio

      sum_t log(1 - q + q exp((x_t - 1/2) / sigma_t^2)),

  of which no test is more powerful (Neyman and Pearson) where nothing but the
  canary and noise of deviation sigma_t moves x_t. Records move it as well:
  where their sum is large, as in the first steps, that is what the canaries'
  x_t spread by. So sigma_t is that spread, or sigma where it is larger. It
  knows what an attacker may know; where it is wrong the audit loses power,
  never validity.

  Args:
    seen: x, float64 [T, m]: 1 for a clipped gradient.
    sampling_prob: q.
    noise_multiplier: sigma of one step, in clip norms; 0: take the sum.
  """
  if noise_multiplier == 0:
    return seen.sum(axis=0), "sum"
  spread = np.maximum(seen.std(axis=1, keepdims=True), noise_multiplier)
  exponent = (seen - 0.5) / spread**2
  ratios = np.logaddexp(
    np.log1p(-sampling_prob) if sampling_prob < 1 else -np.inf,
    np.log(sampling_prob) + exponent,
  )
  return ratios.sum(axis=0), "log_likelihood_ratio"


def _noise_multiplier(mechanism: mechanism_lib.Mechanism) -> float:
  """Of one step, in clip norms; 0 where the sum is the better score.

  Noise that is correlated over steps cancels in the sum over them.
  """
  if mechanism.noise_mechanism is config_lib.NoiseMechanism.BANDED:
    return 0.0
  bound = 1.0 if mechanism.adaptive else mechanism.l2_clip_norm
  return mechanism.noise_stddev / bound


def _rows(microbatch: Mapping[str, np.ndarray]) -> _Rows:
  """What there is in it; padding counts as canaries, which cost less."""
  is_canary = microbatch[CANARY_KEY] >= 0
  if not (~is_canary & ~microbatch[batching.PADDING_KEY]).any():
    return _Rows.CANARIES
  return _Rows.BOTH if is_canary.any() else _Rows.RECORDS


def _root(seed: int | None, domain: int) -> int:
  """128 bits: of the seed, or of the operating system's entropy."""
  if seed is None:
    return sampling.root_from_entropy()
  return sampling.root_from_seed(seed, domain=domain)
