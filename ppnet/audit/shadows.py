"""Shadow models: who is trained on what, and all of them trained side by side.

An attack learns how scores of members differ from those of others by looking at
models of which it knows the members. Each of them is trained by the trainer's
own functions under the mechanism that the claim is about: the same clipping,
noise multiplier, sampling probability and number of steps, for half of the
pool. They are never released and no ledger is charged for them: whoever runs an
audit has the data anyway. What the audit prints is computed from private data.

A killed audit goes on with the group of models that was being trained:

    <folder>/design.json      seed and sizes of the membership design
    <folder>/group-000.npz    final parameters, test predictions and metrics of
                              its models, written when all of it is there
"""

import dataclasses
import hashlib
import io
import json
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tqdm

from ppnet import config as config_lib
from ppnet.audit import pool as pool_lib
from ppnet.audit import side_by_side
from ppnet.core import checks, records, workdirs
from ppnet.privacy import mechanism as mechanism_lib
from ppnet.privacy import sampling
from ppnet.train import loop, metrics
from ppnet.train import program as program_lib
from ppnet.train import step as step_lib

# Domains of `sampling.root_from_seed` for the children of one seed; a model's
# number is added to the last. Append only.
_DESIGN_DOMAIN = 16
_MODEL_DOMAIN = 1 << 16

# Steps of one call of the compiled program. More save nothing, and diagnostics
# of every row stay on the devices until a call is over.
_STEPS_AT_ONCE = 5
# A Poisson batch above this many standard deviations compiles a second shape.
_ROOM_STDDEVS = 5.0
_NOT_PART = (
  "job",
  "topology",
  "generate",
  "account",
  "audit",
  "bench",
  "table",
  "tuning",
)
_MAY_CHANGE = ("perf", "mesh")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Design:
  """Which records of the pool each model is trained on.

  Attributes:
    membership: bool[M, n].
    partner: index of the model trained on exactly the other records, i64[M];
      -1 for a model without one.
    num_members: what the mechanism is built for: n // 2 where models come in
      pairs, n where each sees all.
    seed: of the coins; None where none were thrown.
  """

  membership: np.ndarray
  partner: np.ndarray
  num_members: int
  seed: int | None

  @property
  def num_models(self) -> int:
    """Of the design's M."""
    return len(self.membership)


def paired(*, num_models: int, num_records: int, seed: int) -> Design:
  """For each pair of models, one independent fair coin per record.

  Record i is a member of model 2k or else of 2k + 1: of exactly half of all
  models. Within one model the memberships are independent Bernoulli(1/2), as
  the bound of one run asks for (Steinke et al. 2023,
  https://arxiv.org/abs/2305.08846). Two partners are not independent, they are
  each other's complement: see `score_table.ScoreTable.others`.

  | edge case | result |
  | --- | --- |
  | more models of one seed | the first ones are as before |
  | an odd number of models | `ValueError` |

  Args:
    num_models: M, even.
    num_records: n of the pool, at least 2.
    seed: at most 128 bits; to be recorded.

  Raises:
    ValueError: a number is too small, or M is odd.
  """
  checks.positive(num_models=num_models)
  if num_models % 2:
    checks.fail("an even number of models", num_models=num_models)
  if num_records < 2:
    checks.fail("at least 2 records to divide", num_records=num_records)
  membership = np.empty((num_models, num_records), np.bool_)
  for pair in range(num_models // 2):
    generator = np.random.Generator(
      np.random.Philox(np.random.SeedSequence(seed, spawn_key=(pair,)))
    )
    coins = generator.integers(2, size=num_records).astype(np.bool_)
    membership[2 * pair], membership[2 * pair + 1] = coins, ~coins
  return Design(
    membership=membership,
    partner=np.arange(num_models) ^ 1,
    num_members=num_records // 2,
    seed=seed,
  )


def everyone(*, num_models: int, num_records: int) -> Design:
  """Every model is trained on the whole pool: seeds side by side."""
  checks.positive(num_models=num_models, num_records=num_records)
  return Design(
    membership=np.ones((num_models, num_records), np.bool_),
    partner=np.full(num_models, -1),
    num_members=num_records,
    seed=None,
  )


def design_seed(config: config_lib.ExperimentConfig) -> int:
  """The seed of the coins: a function of `config.seed`, used for nothing else.

  So the same command makes the same design, and nothing that trains a model
  depends on the coins but through its members.
  """
  return sampling.root_from_seed(config.seed, domain=_DESIGN_DOMAIN)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Secrets:
  """What one model's randomness comes from. Each is at most 128 bits.

  Attributes:
    init: of initial parameters and attention noise.
    sampler: of its batches.
    noise: of its DP noise.
  """

  init: int
  sampler: int = dataclasses.field(repr=False)
  noise: int = dataclasses.field(repr=False)


def secrets_of(config: config_lib.ExperimentConfig, model: int) -> Secrets:
  """The roots of one model: its own, unlike any other's.

  As in the trainer: the initial parameters follow from `config.seed`; batches
  and DP noise from the operating system's entropy, unless
  `privacy.sampler_seed` and `privacy.noise_seed` are set.
  """
  child = lambda root: sampling.root_from_seed(
    root, domain=_MODEL_DOMAIN + model
  )
  return Secrets(
    init=child(config.seed),
    sampler=child(mechanism_lib.sampler_root_entropy(config)),
    noise=child(mechanism_lib.noise_root_entropy(config)),
  )


def sampler_over_pool(
  mechanism: mechanism_lib.Mechanism, *, num_records: int, root: int
) -> sampling.Sampler:
  """A sampler of the whole pool, from whose draws non-members are dropped.

  What is left is a draw over the members as the mechanism's own sampler makes
  it, without the number of members being known.

  | sampler | what is left |
  | --- | --- |
  | Poisson, cyclic, balls in bins | each member independently, exactly so |
  | full batch | all members |
  | shuffle | each member once an epoch; batches vary in size |
  | truncated Poisson | `ValueError`: non-members would push members out |

  Raises:
    ValueError: see above.
  """
  sampler = mechanism.sampler
  match sampler:
    case sampling.FullBatchSampler():
      return dataclasses.replace(sampler, num_examples=num_records)
    case sampling.ShuffleSampler():
      whole = round(sampler.batch_size * num_records / sampler.num_examples)
      return dataclasses.replace(
        sampler,
        num_examples=num_records,
        batch_size=min(whole, num_records),
        root=root,
      )
    case (
      sampling.PoissonSampler()
      | sampling.CyclicPoissonSampler()
      | sampling.BallsInBinsSampler()
    ):
      return dataclasses.replace(sampler, num_examples=num_records, root=root)
  checks.fail(
    "a sampler whose draws over a pool are draws over any part of it",
    "Train shadow models with --config.privacy.sampler=POISSON.",
    sampler=mechanism.sampler_name,
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
  """Trained models of one group, G of them.

  Attributes:
    models: their numbers in the design, i64[G].
    params: what was trained, NumPy leaves [G, ...].
    init_roots: words of the roots of their attention noise, u32[G, 2].
    metrics: by name, f64[G, num_steps]; NaN where a step has none. The names
      are those of the trainer's `metrics.jsonl`, "epsilon" included.
    test_losses: task loss of each test record, f32[G, t]; None without a test
      pool.
    test_logits: at the answer's position, f32[G, t, V], under CLASSIFY.
  """

  models: np.ndarray
  params: Any
  init_roots: np.ndarray
  metrics: Mapping[str, np.ndarray]
  test_losses: np.ndarray | None
  test_logits: np.ndarray | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shadows:
  """All models of a design, on disk.

  Attributes:
    design: who was trained on what.
    mechanism: of each of them.
    program: of the experiment, for its network.
    paths: one file per group, in order.
  """

  design: Design
  mechanism: mechanism_lib.Mechanism
  program: program_lib.Program
  paths: Sequence[pathlib.Path]

  def groups(self) -> Iterator[Group]:
    """The groups, one in memory at a time."""
    for path in self.paths:
      yield load(path)


def build_program(
  config: config_lib.ExperimentConfig,
  pool: pool_lib.Pool,
  *,
  num_members: int,
  placeholder_ids: Mapping[str, int],
  answer_ids: Sequence[int] = (),
) -> program_lib.Program:
  """The program and the mechanism of one model, on one device.

  Args:
    config: the experiment.
    pool: for the shapes of a record.
    num_members: records that the mechanism is built for.
    placeholder_ids: of the tokenizer.
    answer_ids: likewise.

  Raises:
    ValueError: see `pool.check_trainable`, `mechanism.build` and
      `program.build`.
  """
  pool_lib.check_trainable(config)
  own = dataclasses.replace(config, mesh=config_lib.MeshConfig())
  mechanism = mechanism_lib.build(own, num_members)
  return program_lib.build(
    own,
    mechanism,
    {name: array[0] for name, array in pool.rows.items()},
    placeholder_ids=placeholder_ids,
    answer_ids=answer_ids,
    devices=jax.local_devices()[:1],
  )


def train(
  config: config_lib.ExperimentConfig,
  pool: pool_lib.Pool,
  *,
  design: Design,
  folder: pathlib.Path,
  placeholder_ids: Mapping[str, int],
  answer_ids: Sequence[int] = (),
  test: pool_lib.Pool | None = None,
  devices: Sequence[jax.Device] | None = None,
  steps_at_once: int = _STEPS_AT_ONCE,
  on_steps: Callable[[int], Any] = lambda count: None,
  log: Any = sys.stderr,
) -> Shadows:
  """Trains every model of a design, in groups of `audit.models_at_once`.

  Memory of a group, beside the pool: parameters, optimizer state and one sum of
  gradients for each of its models, and one microbatch for each that a device
  computes at once.

  Args:
    config: the experiment; its job and mesh do not matter.
    pool: of the records.
    design: of `paired` or `everyone`, or one's own.
    folder: where groups are saved, and looked for.
    placeholder_ids: of the tokenizer.
    answer_ids: likewise.
    test: records that every model predicts at its end.
    devices: all of this process when None; a group is cut over as many of them
      as divide it.
    steps_at_once: steps of one call of the compiled program; how often the bar
      moves.
    on_steps: hears of each call how many steps it was.
    log: where the progress bar goes.

  Raises:
    ValueError: the folder holds models of another experiment, pool or design,
      or the experiment cannot be trained on a part of a pool.
    train.loop.NonFiniteError: a model's parameters are not finite.
  """
  if design.membership.shape[1] != len(pool):
    checks.fail(
      "a design for the records of the pool",
      records=len(pool),
      designed_for=design.membership.shape[1],
    )
  checks.positive(steps_at_once=steps_at_once)
  program = build_program(
    config,
    pool,
    num_members=design.num_members,
    placeholder_ids=placeholder_ids,
    answer_ids=answer_ids,
  )
  folder.mkdir(parents=True, exist_ok=True)
  _check_folder(config, pool, design, folder)
  size = config.audit.models_at_once
  starts = range(0, design.num_models, size)
  paths = [folder / f"group-{n:03d}.npz" for n in range(len(starts))]
  beside: dict[int, side_by_side.SideBySide] = {}  # By size: compiled once.
  with tqdm.tqdm(
    total=len(paths) * config.train.num_steps,
    desc=f"{config.name}: {design.num_models} shadow models",
    unit="step",
    file=log,
    dynamic_ncols=True,
    mininterval=0.1 if log.isatty() else 10.0,
  ) as bar:
    for number, (path, start) in enumerate(zip(paths, starts, strict=True)):
      bar.set_postfix_str(f"group {number + 1} of {len(paths)}")
      if path.exists():
        bar.update(config.train.num_steps)
        continue
      models = np.arange(start, min(start + size, design.num_models))
      if len(models) not in beside:
        beside[len(models)] = side_by_side.SideBySide(
          program,
          num_models=len(models),
          microbatch_size=config.perf.microbatch_size,
          devices=devices,
        )
      group = _Group(
        config, program, pool, design, models=models, beside=beside[len(models)]
      ).train(
        lambda count: (bar.update(count), on_steps(count)),
        test,
        steps_at_once=steps_at_once,
      )
      _save(path, group)
  return Shadows(
    design=design, mechanism=program.mechanism, program=program, paths=paths
  )


class _Group:
  """One group while it is trained."""

  def __init__(
    self,
    config: config_lib.ExperimentConfig,
    program: program_lib.Program,
    pool: pool_lib.Pool,
    design: Design,
    *,
    models: np.ndarray,
    beside: side_by_side.SideBySide,
  ):
    self._config = config
    self._program = program
    self._pool = pool
    self._membership = design.membership[models]
    self._models = models
    self._beside = beside
    own = [secrets_of(config, model) for model in models.tolist()]
    self._roots = side_by_side.Roots(
      init=side_by_side.key_words([one.init for one in own]),
      noise=side_by_side.key_words([one.noise for one in own]),
    )
    self._samplers = [
      sampler_over_pool(
        program.mechanism, num_records=len(pool), root=one.sampler
      )
      for one in own
    ]

  def train(
    self,
    on_steps: Callable[[int], Any],
    test: pool_lib.Pool | None,
    *,
    steps_at_once: int,
  ) -> Group:
    """All steps of all models of the group; `on_steps` hears how many."""
    beside, num_steps = self._beside, self._config.train.num_steps
    carry = beside.start(self._roots)
    roots = beside.put_roots(self._roots)
    pool = beside.put_pool(self._pool)
    found: list[dict[str, np.ndarray]] = []
    pending = None
    for first in range(0, num_steps, steps_at_once):
      steps = range(first, min(first + steps_at_once, num_steps))
      carry, parts, scalars = beside.steps(
        carry, roots, self._draw(steps), pool
      )
      # What the last call gave is read while the devices are busy with this.
      if pending is not None:
        found.append(self._rows(*pending))
        on_steps(len(pending[0]))
      pending = (steps, parts, scalars)
    if pending is not None:
      found.append(self._rows(*pending))
      on_steps(len(pending[0]))
    losses, logits = self._predict(carry.state.released, test)
    return Group(
      models=self._models,
      params=jax.device_get(carry.state.released),
      init_roots=self._roots.init,
      metrics={
        name: np.concatenate([rows[name] for rows in found], axis=1)
        for name in found[0]
      },
      test_losses=losses,
      test_logits=logits,
    )

  def _draw(self, steps: range) -> np.ndarray:
    """The batches of some steps, non-members dropped."""
    drawn = []
    for sampler, is_member in zip(
      self._samplers, self._membership, strict=True
    ):
      own = []
      for step in steps:
        places = sampler.draw(step)
        own.append(places[is_member[places]])
      drawn.append(own)
    return self._beside.pad_places(drawn, num_rounds=self._usual_rounds())

  def _usual_rounds(self) -> int:
    """Microbatches that nearly every draw of the group fits in."""
    prob = self._samplers[0].sampling_prob
    members = int(self._membership.sum(axis=1).max())
    mean = members * prob
    room = _ROOM_STDDEVS * (members * prob * max(1 - prob, 0.0)) ** 0.5
    return -(-int(mean + room) // self._config.perf.microbatch_size)

  def _rows(
    self,
    steps: range,
    parts: step_lib.PerExample,
    scalars: Mapping[str, Any],
  ) -> dict[str, np.ndarray]:
    """What the trainer writes of a step, f64[G, S] by name."""
    parts, scalars = jax.device_get((parts, dict(scalars)))
    finite = scalars["params_finite"].all(axis=1)
    if not finite.all():
      raise loop.NonFiniteError(
        f"Step {steps[-1] + 1}: the parameters of the shadow models"
        f" {self._models[~finite].tolist()} are not finite. Lower"
        f" optimizer.learning_rate={self._config.optimizer.learning_rate}."
      )
    mechanism, noise = self._program.mechanism, self._config.attention_noise
    table: dict[str, list[list[float]]] = {}
    for model in range(len(self._models)):
      for place, step in enumerate(steps):
        at = lambda leaf, m=model, s=place: leaf[m, s]
        own = {name: at(value) for name, value in scalars.items()}
        row: dict[str, Any] = metrics.step_metrics(
          [jax.tree.map(at, parts)],
          own,
          l2_clip_norm=mechanism.reported_clip_norm(own.get("clip_norm")),
          consistency_weight=noise.consistency_weight if noise.stddev else 0.0,
        )
        row |= {
          "epsilon": mechanism.epsilon_after(step + 1),
          "learning_rate": float(own["learning_rate"]),
        }
        if "clip_norm" in own:
          row["clip_norm"] = float(own["clip_norm"])
        for name, value in row.items():
          rows = table.setdefault(name, [[] for _ in self._models])
          rows[model].append(np.nan if value is None else value)
    return {name: np.array(rows, np.float64) for name, rows in table.items()}

  def _predict(
    self, params: Any, test: pool_lib.Pool | None
  ) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Losses and answer logits of the test records."""
    if test is None:
      return None, None
    return self._beside.over_records(
      self._program.pure.evaluate,
      params,
      self._roots.init,
      test,
      batch_size=min(self._config.perf.microbatch_size, len(test)),
    )


def _check_folder(
  config: config_lib.ExperimentConfig,
  pool: pool_lib.Pool,
  design: Design,
  folder: pathlib.Path,
) -> None:
  """Writes what the folder is for, or compares it with what is there."""
  plain = records.to_plain(config)
  digest = hashlib.sha256(
    json.dumps(
      {k: v for k, v in plain.items() if k not in _NOT_PART + _MAY_CHANGE},
      sort_keys=True,
    ).encode()
  ).hexdigest()
  now = {
    "experiment": digest,
    "pool": pool.fingerprint(),
    "num_models": design.num_models,
    "num_records": len(pool),
    "num_members": design.num_members,
    # As text: JSON numbers lose what is beyond 53 bits.
    "seed": None if design.seed is None else str(design.seed),
    "membership": hashlib.sha256(
      np.packbits(design.membership).tobytes()
    ).hexdigest(),
    "models_at_once": config.audit.models_at_once,
  }
  path = folder / "design.json"
  if not path.exists():
    records.write_json(path, now)
    return
  differing = workdirs.differences(records.read_json(path), now)
  if differing:
    checks.fail(
      f"{folder} to hold shadow models of this experiment, pool and design",
      "Set these back, or delete the folder.",
      differing=differing,
    )


def _save(path: pathlib.Path, group: Group) -> None:
  """Writes a group, all of it or nothing."""
  arrays = {
    f"params/{'/'.join(entry.key for entry in tree_path)}": leaf
    for tree_path, leaf in jax.tree_util.tree_leaves_with_path(group.params)
  } | {f"metrics/{name}": values for name, values in group.metrics.items()}
  if group.test_losses is not None:
    arrays["test_losses"] = group.test_losses
  if group.test_logits is not None:
    arrays["test_logits"] = group.test_logits
  content = io.BytesIO()
  np.savez(
    content,
    allow_pickle=False,
    models=group.models,
    init_roots=group.init_roots,
    **arrays,
  )
  records.write_bytes(path, content.getvalue())


def load(path: pathlib.Path) -> Group:
  """Reads the file of a group."""
  params: dict[str, Any] = {}
  with np.load(path, allow_pickle=False) as saved:
    for name in saved.files:
      if name.startswith("params/"):
        node = params
        *parents, last = name.removeprefix("params/").split("/")
        for parent in parents:
          node = node.setdefault(parent, {})
        node[last] = saved[name]
    return Group(
      models=saved["models"],
      params=params,
      init_roots=saved["init_roots"],
      metrics={
        name.removeprefix("metrics/"): saved[name]
        for name in saved.files
        if name.startswith("metrics/")
      },
      test_losses=(
        saved["test_losses"] if "test_losses" in saved.files else None
      ),
      test_logits=(
        saved["test_logits"] if "test_logits" in saved.files else None
      ),
    )
