"""What a clipped sum costs, by each engine and by other libraries.

A *step* is, for every row, the sum of the examples' gradients and their losses:
clipped for all rows but the baselines. The optimizer and the noise come after
it, are the same for all, and are left out of all (optax's aggregate alone
cannot do without its noise: it is drawn, and multiplied by 0).

Before a row is timed its sum is compared with the first engine's (VMAP's, the
reference, wherever that fits): a row that computes something else is not
measured.

A case is a shape and, after slashes, what is done with it:

| case | shape |
| --- | --- |
| d256 | Llama d 256, 6 layers, T 128, B 16, vocabulary 2048 |
| d512 | Llama d 512, 4 layers, T 256, B 8, vocabulary 2048 |
| 1b | Llama 3.2's 1B shape in bfloat16, T 1024, B 4; a GPU |
| tiny | two layers of d 16: to try the benchmark, not the engines |
| own | the configuration's own model and data, one microbatch |
| X/mb4 | X in microbatches of 4 (any number), the baseline as well |
| X/remat | X computing activations again in the backward pass |
| default | d256, d256/mb4, d512, d512/mb4 |
| all | these, d256/mb1, d512/mb1, d256/remat, d256/remat/mb4, own; GPU: 1b |
"""

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from ppnet import config as config_lib
from ppnet.bench import measure, peers, torch_llama
from ppnet.core import checks, param_ops, prng, records, trees, workdirs
from ppnet.data import pipeline, prepare, tokenizers
from ppnet.models import llama, multimodal
from ppnet.privacy import clipping
from ppnet.train import loop
from ppnet.train import losses as losses_lib
from ppnet.train import step as step_lib

PyTree = Any

BASELINE = "non-private"
_PACKAGES = ("jax-privacy", "torch", "opacus")
_RECORD = "bench.json"

_DEFAULT = ("d256", "d256/mb4", "d512", "d512/mb4")
_GROUPS = {
  "default": _DEFAULT,
  "all": (
    *_DEFAULT,
    "d256/mb1",
    "d512/mb1",
    "d256/remat",
    "d256/remat/mb4",
    "own",
    "1b",
  ),
}

# Relative distance of two float32 sums that are equal up to rounding: Opacus
# adds 1e-6 to each norm, our clip norm has a slack of 1e-5. Activations in
# bfloat16 have 8 bits.
_MAX_SUM_ERROR = {
  config_lib.ComputeDtype.FLOAT32: 1e-4,
  config_lib.ComputeDtype.BFLOAT16: 5e-2,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
  """A decoder and a batch for it.

  Attributes:
    decoder: the model.
    batch_size: B.
    num_tokens: T.
    goal: what an engine should reach.
    needs_gpu: whether it is of no use on a CPU.
  """

  decoder: config_lib.LlamaConfig
  batch_size: int
  num_tokens: int
  goal: measure.Goal = measure.Goal(time_ratio=1.05, memory_ratio=1.10)
  needs_gpu: bool = False


def _llama(
  *, embed_dim: int, num_layers: int, num_tokens: int, batch_size: int
) -> Shape:
  """A small Llama: heads of 64 features, and about 8/3 d in the mlp."""
  return Shape(
    decoder=config_lib.LlamaConfig(
      vocab_size=2048,
      embed_dim=embed_dim,
      num_layers=num_layers,
      num_heads=embed_dim // 64,
      num_kv_heads=embed_dim // 64,
      head_dim=64,
      mlp_dim=embed_dim * 43 // 16,
      max_seq_len=num_tokens,
    ),
    batch_size=batch_size,
    num_tokens=num_tokens,
  )


SHAPES = {
  "d256": _llama(embed_dim=256, num_layers=6, num_tokens=128, batch_size=16),
  "d512": _llama(embed_dim=512, num_layers=4, num_tokens=256, batch_size=8),
  "1b": Shape(
    decoder=config_lib.LlamaConfig(
      vocab_size=128256,
      embed_dim=2048,
      num_layers=16,
      num_heads=32,
      num_kv_heads=8,
      head_dim=64,
      mlp_dim=8192,
      max_seq_len=1024,
      rope_theta=500000.0,
      tie_embeddings=True,
      compute_dtype=config_lib.ComputeDtype.BFLOAT16,
    ),
    batch_size=4,
    num_tokens=1024,
    goal=measure.Goal(time_ratio=1.10, memory_ratio=1.10),
    needs_gpu=True,
  ),
  "tiny": Shape(
    decoder=config_lib.LlamaConfig(
      vocab_size=61,
      embed_dim=16,
      num_layers=2,
      num_heads=2,
      num_kv_heads=2,
      head_dim=8,
      mlp_dim=24,
      max_seq_len=12,
    ),
    batch_size=6,
    num_tokens=12,
  ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """One group of rows, measured together.

  Attributes:
    name: as it was given.
    shape: None for the configuration's own model and data.
    microbatch_size: None takes the whole batch at once.
    remat: compute activations again.
  """

  name: str
  shape: Shape | None
  microbatch_size: int | None = None
  remat: bool = False


def parse_case(name: str) -> Case:
  """A case from its name; see the table above.

  >>> parse_case("d256/remat/mb4").microbatch_size
  4

  Raises:
    ValueError: a name that says nothing here.
  """
  base, *options = name.split("/")
  known = [*SHAPES, "own"]
  if base not in known:
    checks.fail(
      f"bench.cases to name {', '.join([*known, *_GROUPS])}",
      checks.did_you_mean(base, [*known, *_GROUPS]).strip(),
      case=name,
    )
  case = Case(name=name, shape=SHAPES.get(base))
  for option in options:
    size = option.removeprefix("mb")
    if option == "remat" and case.shape is not None:
      case = dataclasses.replace(case, remat=True)
    elif option.startswith("mb") and size.isdecimal() and int(size) > 0:
      case = dataclasses.replace(case, microbatch_size=int(size))
    else:
      checks.fail(
        "a case's options to be /mbN or, with a shape, /remat",
        case=name,
        option=option,
      )
  return case


def parse_cases(names: str) -> list[Case]:
  """The cases of a text like "d256,d256/mb4"; a GPU's only on a GPU.

  Raises:
    ValueError: an unknown name, no name, or a case that this machine cannot
      run and that was asked for by its name.
  """
  cases: dict[str, Case] = {}
  has_gpu = jax.default_backend() == "gpu"
  for name in filter(None, (part.strip() for part in names.split(","))):
    for member in _GROUPS.get(name, (name,)):
      case = parse_case(member)
      if case.shape is not None and case.shape.needs_gpu and not has_gpu:
        if name not in _GROUPS:
          checks.fail(
            "a GPU for this case",
            "Leave it out, or run where JAX finds one.",
            case=member,
            backend=jax.default_backend(),
          )
        continue
      cases[member] = case
  if not cases:
    checks.fail("bench.cases to name a case", cases=names)
  return list(cases.values())


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Subject:
  """A model and a batch, ready to be differentiated.

  Attributes:
    loss_fn: `loss_fn(params, batch, ops=PLAIN) -> losses f32[B]`.
    params: initial parameters.
    batch: leaves [B, ...].
    decoder: the whole model, if it is a plain Llama.
    compute_dtype: of its activations.
    facts: for the record.
  """

  loss_fn: Callable[..., jax.Array]
  params: PyTree
  batch: Mapping[str, jax.Array]
  decoder: config_lib.LlamaConfig | None
  compute_dtype: config_lib.ComputeDtype
  facts: Mapping[str, Any]


def _llama_subject(case: Case, shape: Shape, seed: int) -> _Subject:
  """A plain decoder and random tokens."""
  decoder = dataclasses.replace(shape.decoder, remat=case.remat)
  model = llama.Llama(decoder)
  tokens = np.random.default_rng(seed).integers(
    decoder.vocab_size,
    size=(shape.batch_size, shape.num_tokens + 1),
    dtype=np.int32,
  )
  batch = {
    "tokens": jnp.asarray(tokens[:, :-1]),
    "targets": jnp.asarray(tokens[:, 1:]),
  }

  def loss_fn(params, batch, ops: param_ops.ParamOps = param_ops.PLAIN):
    logits = model.clone(ops=ops).apply({"params": params}, batch["tokens"])
    assert isinstance(logits, jax.Array)  # Linen declares a union.
    mask = jnp.ones(batch["tokens"].shape, jnp.float32)
    return losses_lib.cross_entropy(logits, batch["targets"], mask)

  init = jax.jit(lambda key, tokens: model.init(key, tokens)["params"])
  params = init(
    prng.stream(prng.root(seed), prng.Stream.INIT, 0), batch["tokens"][:1]
  )
  return _Subject(
    loss_fn=loss_fn,
    params=nn.meta.unbox(params),
    batch=batch,
    decoder=decoder,
    compute_dtype=decoder.compute_dtype,
    facts={"num_tokens": shape.num_tokens, "decoder": decoder},
  )


def _own_subject(
  config: config_lib.ExperimentConfig, workdir: pathlib.Path
) -> _Subject:
  """The configuration's own network and its first training records."""
  folder = loop.prepared_dir(config, workdir)
  card = prepare.prepare(config.data, folder)
  tokenizer = tokenizers.load(config.data, folder, class_names=card.class_names)
  rows = next(
    pipeline.eval_batches(
      pipeline.examples(config, folder, split="train"),
      batch_size=config.perf.microbatch_size,
    )
  )
  root = prng.root(config.seed)
  stem = prng.stream(root, prng.Stream.ATTENTION_NOISE, 0)
  # Keys as data: the same ones serve every row and every round, on purpose.
  batch = {
    name: jnp.asarray(rows[name])
    for name in rows
    if name not in step_lib.NOT_FOR_THE_LOSS
  } | {
    "key_data": jax.random.key_data(
      prng.per_record(stem, jnp.asarray(rows["index"]))
    )
  }
  model = multimodal.PPNet(config.model, dict(tokenizer.placeholder_ids))
  with_terms = losses_lib.make_loss_fn(model, config.attention_noise)

  def loss_fn(params, batch, ops: param_ops.ParamOps = param_ops.PLAIN):
    keys = jax.random.wrap_key_data(batch["key_data"])
    return with_terms(params, {**batch, "key": keys}, ops=ops)[0]

  init = jax.jit(
    lambda key, batch: model.init(
      key, batch["tokens"], media=losses_lib.media(batch)
    )["params"]
  )
  return _Subject(
    loss_fn=loss_fn,
    params=nn.meta.unbox(init(prng.stream(root, prng.Stream.INIT, 0), batch)),
    batch=batch,
    decoder=None,
    compute_dtype=config.model.decoder.compute_dtype,
    facts={
      "num_tokens": batch["tokens"].shape[1],
      "decoder": config.model.decoder,
      "attention_noise": config.attention_noise,
    },
  )


class _Lineup:
  """The contenders of one case; each is checked when it is added."""

  def __init__(
    self,
    subject: _Subject,
    *,
    microbatch_size: int | None,
    l2_clip_norm: float,
    on_next: Callable[[str], None],
  ):
    """Starts with no contender; `on_next` hears each name."""
    self.contenders: list[measure.Contender] = []
    self._subject = subject
    self._microbatch_size = microbatch_size
    self._l2_clip_norm = l2_clip_norm
    self._on_next = on_next
    # Of the baseline and of the first engine: what the others must equal.
    self._sums: dict[bool, list[np.ndarray]] = {}

  def _add(
    self,
    name: str,
    build: Callable[[], measure.Program],
    *,
    read: Callable[[Any], PyTree] = lambda result: result[0],
    framework: str = "jax",
    is_peer: bool = False,
    note: str = "",
    reason: str = "",
  ) -> None:
    """Compiles and runs a contender once, and compares its sum.

    Args:
      name: of the row.
      build: compiles it.
      read: the gradient sum, in our structure, from what a run returns.
      framework: whose baseline it is compared with.
      is_peer: whether it is another project's.
      note: for the reader.
      reason: why it cannot be measured here; empty if it can.
    """
    self._on_next(name)
    program, error = None, None
    clipped = BASELINE not in name
    if not reason:
      try:
        program = build()
        error = self._sum_error(read(program.run()), clipped=clipped)
      except (ValueError, jax.errors.JaxRuntimeError) as failure:
        # Too large for this machine, say: the other rows still count.
        program, reason = None, str(failure).split("\n", 1)[0]
    largest = _MAX_SUM_ERROR[self._subject.compute_dtype]
    if error is not None and not error <= largest:
      program, reason = None, f"wrong sum: off by {error:.1e}, relatively"
    self.contenders.append(
      measure.Contender(
        name=name,
        framework=framework,
        program=program,
        is_peer=is_peer,
        note=reason or note,
        facts={"sum_error": error},
      )
    )

  def _sum_error(self, grad_sum: PyTree, *, clipped: bool) -> float:
    """Relative l2 distance to the first sum of this kind, 0 for itself."""
    if jax.tree.structure(grad_sum) != jax.tree.structure(self._subject.params):
      checks.fail("a sum in the structure of the parameters")
    leaves = [
      np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(grad_sum)
    ]
    expected = self._sums.setdefault(clipped, leaves)
    squares = lambda arrays: sum(
      float(np.sum(np.square(array, dtype=np.float64))) for array in arrays
    )
    off = squares(a - b for a, b in zip(leaves, expected, strict=True))
    return (off / squares(expected)) ** 0.5

  def add_ours(self) -> None:
    """The plain gradient, then every engine there is."""
    options = {
      "l2_clip_norm": self._l2_clip_norm,
      "microbatch_size": self._microbatch_size,
    }
    loss_fn = self._subject.loss_fn
    self._add(
      BASELINE,
      lambda: self._compile(
        clipping.unprotected_grad(
          loss_fn, clipping=config_lib.Clipping.NONE, **options
        )
      ),
    )
    for engine in config_lib.Engine:
      grad_fn = clipping.clipped_grad(loss_fn, engine=engine, **options)
      choice = grad_fn.engine_choice(self._subject.params, self._subject.batch)
      self._add(
        engine.name,
        functools.partial(self._compile, grad_fn),
        note=""
        if choice is None or choice.engine is engine
        else f"is {choice.engine.name} here: {choice.why}",
      )

  def _compile(self, grad_fn: clipping.GradFn) -> measure.Program:
    """Compiles one of our gradient callables."""

    def step(params, batch):
      result = grad_fn(params, batch)
      return result.grad_sum, result.losses

    return measure.compile_program(
      step, self._subject.params, self._subject.batch
    )

  def add_jax_peers(self) -> None:
    """JAX-Privacy, and optax's aggregate."""
    subject = self._subject
    num_rows = jax.tree.leaves(subject.batch)[0].shape[0]
    is_whole = num_rows % (self._microbatch_size or 1) == 0
    self._add(
      "jax_privacy.clipped_grad",
      lambda: measure.compile_program(
        peers.jax_privacy_step(
          subject.loss_fn,
          l2_clip_norm=self._l2_clip_norm,
          microbatch_size=self._microbatch_size,
        ),
        subject.params,
        subject.batch,
      ),
      is_peer=True,
      reason=peers.missing("jax_privacy")
      or ("" if is_whole else "wants batches of whole microbatches"),
    )
    key_data = jax.random.key_data(prng.root(0))
    self._add(
      "optax.contrib DP aggregate",
      lambda: measure.compile_program(
        peers.optax_step(subject.loss_fn, l2_clip_norm=self._l2_clip_norm),
        subject.params,
        (subject.batch, key_data),
      ),
      is_peer=True,
      note="draws its noise, times 0",
      reason="has no microbatches" if self._microbatch_size else "",
    )

  def add_torch_peers(self) -> None:
    """An equal Llama in PyTorch: plain, Opacus' hooks and ghost clipping."""
    reason = torch_llama.why_not(self._subject.decoder)
    reason = reason or peers.missing("torch", "opacus")
    if not reason and jax.default_backend() != "cpu":
      reason = "PyTorch is measured beside JAX on CPUs only"
    for name, make_step in (
      (f"PyTorch, {BASELINE}", torch_llama.plain_step),
      (
        "Opacus, hooks",
        functools.partial(
          torch_llama.hooks_step, l2_clip_norm=self._l2_clip_norm
        ),
      ),
      (
        "Opacus, ghost",
        functools.partial(
          torch_llama.ghost_step, l2_clip_norm=self._l2_clip_norm
        ),
      ),
    ):
      self._add(
        name,
        functools.partial(self._torch_program, make_step),
        read=self._from_torch,
        framework="torch",
        is_peer=True,
        reason=reason,
      )

  def _torch_program(
    self, make_step: Callable[[Any, list[Any]], torch_llama.Step]
  ) -> measure.Program:
    """One of the PyTorch steps, on a model of its own."""
    assert self._subject.decoder is not None  # There is an equal model.
    model = torch_llama.build(self._subject.decoder, self._subject.params)
    microbatches = torch_llama.microbatches_of(
      self._subject.batch, self._microbatch_size
    )
    return torch_llama.program(make_step(model, microbatches))

  def _from_torch(self, result: tuple[dict[str, Any], Any]) -> PyTree:
    """A PyTorch step's sum in our structure."""
    assert self._subject.decoder is not None
    sums = {name: grad.numpy() for name, grad in result[0].items()}
    return torch_llama.to_ours(self._subject.decoder, sums)


def run(
  config: config_lib.ExperimentConfig,
  workdir: pathlib.Path,
  *,
  log: Any = sys.stderr,
) -> dict[str, Any]:
  """Measures the cases of `config.bench`; writes `bench.json` after each.

  A killed benchmark goes on with the first case that was not finished.

  Args:
    config: the experiment; its seed gives parameters and tokens.
    workdir: its folder.
    log: where progress and warnings go.

  Returns:
    The record that `bench.json` holds.

  Raises:
    ValueError: unknown cases, or a folder with the beginning of a benchmark of
      another machine or version.
  """
  cases = parse_cases(config.bench.cases)
  machine = measure.machine(packages=_PACKAGES)
  record: dict[str, Any] = {
    "subject": config.bench.subject,
    "machine": machine,
    "rounds": config.bench.rounds,
    "is_complete": False,
    "cases": {},
    "rows": [],
  }
  path = workdir / _RECORD
  if path.exists():
    record = records.read_json(path)
    _check_same_machine(record["machine"], machine, workdir)
  for case in cases:
    if case.name not in record["cases"]:
      rows, facts = _measure(config, workdir, case, log)
      record["rows"] += rows
      record["cases"][case.name] = facts
      record = records.to_plain(record)
      records.write_json(path, record)
  record["is_complete"] = True
  records.write_json(path, record)
  return record


def _measure(
  config: config_lib.ExperimentConfig,
  workdir: pathlib.Path,
  case: Case,
  log: Any,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
  """The rows of one case, and what there is to know about it."""
  shape, goal = case.shape, measure.Goal(time_ratio=1.05, memory_ratio=1.10)
  if shape is None:
    subject = _own_subject(config, workdir)
  else:
    subject, goal = _llama_subject(case, shape, config.seed), shape.goal
  with tqdm.tqdm(desc=case.name, unit="run", file=log) as bar:
    lineup = _Lineup(
      subject,
      microbatch_size=case.microbatch_size,
      l2_clip_norm=config.privacy.l2_clip_norm,
      on_next=lambda name: bar.set_postfix_str(f"compiling {name}"),
    )
    lineup.add_ours()
    if config.bench.peers:
      lineup.add_jax_peers()
      lineup.add_torch_peers()
    measured = [c for c in lineup.contenders if c.program is not None]
    bar.reset(total=len(measured) * config.bench.rounds)
    bar.set_postfix_str("")
    load = measure.Load()
    rows = measure.rows(
      lineup.contenders,
      case=case.name,
      rounds=config.bench.rounds,
      goal=goal,
      on_run=bar.update,
    )
  busy = load.record()
  share = busy["others_cpu_share"]
  is_quiet = share is None or share <= measure.QUIET_SHARE
  if not is_quiet:
    print(
      f"warning: during {case.name} others had {share:.0%} of the processor;"
      " repeat it on a quiet machine before relying on a few per cent",
      file=log,
    )
  facts = {
    "num_parameters": trees.num_parameters(subject.params),
    "batch_size": jax.tree.leaves(subject.batch)[0].shape[0],
    "microbatch_size": case.microbatch_size,
    "goal": goal,
    **subject.facts,
    **busy,
    "is_quiet": is_quiet,
  }
  return rows, facts


def _check_same_machine(
  old: Mapping[str, Any], new: Mapping[str, Any], workdir: pathlib.Path
) -> None:
  """Raises where a benchmark would be put together from two machines."""
  differing = workdirs.differences(old, records.to_plain(new))
  if differing:
    raise ValueError(
      f"Expected {workdir} to hold a benchmark of this machine and these"
      f" versions, but these differ: {'; '.join(differing)}. Pass another"
      " --workdir."
    )
