r"""Runs one job, or a sweep of jobs, from one config file.

  python -m ppnet.main --config=configs/quickstart.py
  python -m ppnet.main --config=configs/quickstart.py --workdir=runs/eps1 \
      --config.privacy.epsilon=1 --config.seed=3
  python -m ppnet.main --config=configs/quickstart.py \
      --sweep="privacy.epsilon=1,2,4,8;seed=0,1,2" --sweep_shard=0/2
  python -m ppnet.main --config=configs/quickstart.py --config.job=ACCOUNT

Any field of the configuration is a flag (--config.FIELD=VALUE); "none" unsets
an optional one. ACCOUNT answers what the privacy budget of a config is, without
training. A run that was killed goes on where it was when the same
command is given again.
"""

import contextlib
import dataclasses
import os
import pathlib
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import tqdm
from absl import app, flags, logging
from ml_collections import config_flags

from ppnet import config as config_lib
from ppnet import config_args, study, sweep
from ppnet.audit import assess
from ppnet.audit import attention as audit_attention
from ppnet.audit import run as audit
from ppnet.bench import attention, engines
from ppnet.bench import pipeline as pipeline_bench
from ppnet.bench import record_peers as record_peers_bench
from ppnet.bench import shadows as shadows_bench
from ppnet.core import (
  allocator,
  checks,
  hosts,
  prng,
  records,
  workdirs,
)
from ppnet.data import layout, prepare, text, tokenizers
from ppnet.models import generate, hf, lora, multimodal
from ppnet.privacy import budget, input_privacy, ledger
from ppnet.report import attention as attention_figures
from ppnet.report import audit as audit_report
from ppnet.report import budget as budget_figures
from ppnet.report import (
  compiled,
  figures,
  pipelines,
  ratios,
  record_peers,
  tables,
  throughput,
)
from ppnet.train import (
  attention_maps,
  compile_only,
  goodput,
  loop,
  preemption,
  profiling,
)

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Experiment file, as FILE or FILE:ARG.", lock_config=False
)
_WORKDIR = flags.DEFINE_string(
  "workdir",
  None,
  "Folder of this run's records. Default: runs/<name>, or runs/<name>-sweep,"
  " followed by the overriding flags.",
)
_SWEEP = flags.DEFINE_string(
  "sweep",
  None,
  'Grid of runs, one folder each: "FIELD=V1,V2;FIELD=V1,V2". Finished runs are'
  " not repeated.",
)
_SWEEP_SHARD = flags.DEFINE_string(
  "sweep_shard", "0/1", "i/n: this machine takes every n-th run from i on."
)
_DISTRIBUTED = flags.DEFINE_bool(
  "distributed",
  False,
  "This is one of several processes of a job; on a TPU slice and under SLURM"
  " they find each other, elsewhere the next three flags say where.",
)
_COORDINATOR = flags.DEFINE_string(
  "coordinator", None, "host:port of the first process."
)
_NUM_PROCESSES = flags.DEFINE_integer(
  "num_processes", None, "How many processes the job has."
)
_PROCESS_ID = flags.DEFINE_integer(
  "process_id", None, "Which of them this is, from 0."
)
_PROFILE_STEPS = flags.DEFINE_string(
  "profile_steps",
  None,
  "FIRST:LAST: traces these steps of a TRAIN job, both included, from 1;"
  " `tensorboard --logdir=WORKDIR/tensorboard` shows the trace (with the plugin"
  " that `pip install xprof` brings).",
)


def train(config: config_lib.ExperimentConfig, workdir: pathlib.Path) -> None:
  """Trains (or goes on, or finds it done), then prints table and figure."""
  # One answer for all: the first process may be about to write it.
  if hosts.from_first(lambda: workdirs.is_finished(workdir)):
    print(f"{workdir} holds a finished run; nothing is trained again.")
    summary = records.read_json(workdir / "summary.json")
  else:
    experiment = loop.open_experiment(config, workdir)
    if hosts.is_first():
      print(_plan(experiment), flush=True)
    summary, state = loop.train(
      experiment,
      began=goodput.process_start(),
      profile_steps=_profile_steps(config),
    )
    attack = audit.loss_attack(experiment, state.released)
    # Written last: a folder with a summary is a finished run.
    summary |= {"leakage": attack.advantage, "attack": attack}
    if hosts.is_first():
      records.write_json(workdir / "summary.json", summary)
  if not hosts.is_first():
    return
  figure = figures.training_figure(workdir)
  print(f"\n{tables.summary_table(summary)}\n\nrecords: {workdir}")
  print(f"figure:  {figure}")


def _profile_steps(
  config: config_lib.ExperimentConfig,
) -> profiling.Steps | None:
  """The steps that --profile_steps names."""
  # A function's caller in Python has parsed no flags.
  if not flags.FLAGS.is_parsed() or _PROFILE_STEPS.value is None:
    return None
  if config.job is not config_lib.Job.TRAIN or _SWEEP.value is not None:
    checks.fail(
      "--profile_steps with one TRAIN job",
      "Leave it out, or give --config.job=TRAIN without --sweep.",
      profile_steps=_PROFILE_STEPS.value,
      **{"config.job": config.job.name},
    )
  return profiling.parse(_PROFILE_STEPS.value, num_steps=config.train.num_steps)


def evaluate(
  config: config_lib.ExperimentConfig, workdir: pathlib.Path
) -> None:
  """Evaluates the newest checkpoint; writes `evaluation.json`.

  Where there is attention noise, and one host, also `attention.json` and its
  figure.
  """
  experiment = loop.open_experiment(config, workdir)
  state, _ = loop.restore(experiment)
  scores = loop.evaluate(experiment, state.released)
  # The ledger's count: it may be ahead of the checkpoint's, never behind.
  charged_steps = ledger.read(workdir / "privacy.json")["charged_steps"]
  evaluation = {
    "split": "test",
    "num_steps": int(jax.device_get(state.step)),
    "charged_steps": charged_steps,
    **experiment.claimed(charged_steps),
    **scores,
  }
  if not hosts.is_first():
    return
  records.write_json(workdir / "evaluation.json", evaluation)
  print(tables.summary_table(evaluation))
  if config.attention_noise.stddev and jax.process_count() == 1:
    maps = attention_maps.attention_maps(experiment, state.released)
    records.write_json(workdir / "attention.json", maps)
    print(f"figure:  {attention_figures.attention_figure(workdir)}")


def audit_models(
  config: config_lib.ExperimentConfig, workdir: pathlib.Path
) -> None:
  """Attacks the finished run, or models trained as configured.

  Writes `audit.json`, `audit.md` and, of attacks, the figure, and adds the
  numbers to `summary.json`; in a folder without a run, that holds nothing else.

  Raises:
    RuntimeError: a lower bound on epsilon is above what is claimed; the records
      are written all the same.
  """
  found = audit.audit(config, workdir)
  path = workdir / "summary.json"
  summary = records.read_json(path) if path.exists() else {"name": config.name}
  records.write_json(path, summary | assess.headline(found))
  print(audit_report.write(workdir))
  print(f"\nrecords: {workdir}")
  if found["membership"] is not None:
    print(f"figure:  {workdir / 'figures' / 'roc.png'}")
  problem = audit.contradiction(found)
  if problem is not None:
    raise RuntimeError(problem)


def prepare_data(
  config: config_lib.ExperimentConfig, workdir: pathlib.Path
) -> None:
  """Turns raw data into what training reads."""
  folder = loop.prepared_dir(config, workdir)
  card = prepare.prepare(config.data, folder)
  print(
    f"{folder}: {card.num_train} training and {card.num_test} test records,"
    f" {len(card.class_names)} classes"
  )
  skipped = {
    f"bad records of the {split} split": count
    for split, count in card.num_skipped.items()
    if count
  }
  for why, count in (dict(card.left_out) | skipped).items():
    print(f"left out: {count} {why}")
  for sentence in card.uncovered:
    print(f"not covered: {sentence}")


def account(config: config_lib.ExperimentConfig, workdir: pathlib.Path) -> None:
  """Answers what the budget is, without training; writes `account.json`."""
  num_examples = config.account.num_examples
  if num_examples is None:
    folder = loop.prepared_dir(config, workdir)
    prepare.prepare(config.data, folder)
    num_examples = loop.num_units(config, folder)
  found = budget.budget(
    config,
    num_examples,
    progress=lambda tasks, total: tqdm.tqdm(
      tasks, total=total, desc="accounting", leave=False, delay=2
    ),
  )
  records.write_json(workdir / "account.json", found)
  # Read back: the table and the figure show what the record says.
  found = records.read_json(workdir / "account.json")
  print(tables.budget_table(found))
  print(f"\nrecord: {workdir / 'account.json'}")
  if found["accountants"]:
    print(f"figure: {budget_figures.budget_figure(workdir, found)}")


def benchmark(
  config: config_lib.ExperimentConfig, workdir: pathlib.Path
) -> None:
  """Measures what `config.bench` asks for, then prints table and figure."""
  record = _BENCHMARKS[config.bench.subject](config, workdir)
  if config.bench.subject is config_lib.BenchSubject.SHADOWS:
    print(f"\n{shadows_bench.table(record)}\n\nrecords: {workdir}")
    return
  if config.bench.subject is config_lib.BenchSubject.RECORD_PEERS:
    print(f"\n{record_peers.write(workdir)}\n\nrecords: {workdir}")
    return
  if config.bench.subject is config_lib.BenchSubject.PIPELINE:
    figure, shown = throughput.write(workdir), throughput.table(record)
  else:
    figure, shown = ratios.write(workdir), ratios.bench_table(record)
  print(f"\n{shown}\n\nrecords: {workdir}")
  print(f"figure:  {figure}")


def table(config: config_lib.ExperimentConfig, workdir: pathlib.Path) -> None:
  """Tells what pipelines do, or what models reached and leaked."""
  if config.table.subject is not config_lib.TableSubject.PIPELINES:
    is_one = config.table.subject is not config_lib.TableSubject.COLLECTION
    make = study.table if is_one else study.collection
    print(make(config, workdir, maps=audit_attention.first_models_maps))
    print(f"\nrecords: {workdir}")
    return
  folder = loop.prepared_dir(config, workdir)
  prepare.prepare(config.data, folder)
  print(pipelines.write(config, folder, workdir))
  print(f"\nrecords: {workdir}\nfigures: {workdir / 'figures'}")


def compile_ahead(
  config: config_lib.ExperimentConfig, workdir: pathlib.Path
) -> None:
  """Compiles a step for a pod that is not here; writes `compile.json`.

  Raises:
    RuntimeError: a program does not fit; the record is written all the same.
  """
  if not config.topology:
    checks.fail(
      "config.topology to name a pod",
      "Set --config.topology=v5e:8x8, say.",
      **{"config.topology": config.topology},
    )
  # Where there is a TPU, it is not asked for: it may be another one, and busy.
  jax.config.update("jax_platforms", "cpu")
  records.write_json(workdir / "compile.json", compile_only.compile_for(config))
  found = records.read_json(workdir / "compile.json")
  print(compiled.compile_table(found))
  print(f"\nrecord: {workdir / 'compile.json'}")
  if not found["fits"]:
    raise RuntimeError(
      f"{config.name} does not fit {config.topology}. Make"
      " perf.microbatch_size smaller, split more ways (mesh), or take another"
      " perf.engine."
    )


_BENCHMARKS = {
  config_lib.BenchSubject.ENGINES: engines.run,
  config_lib.BenchSubject.ATTENTION: attention.run,
  config_lib.BenchSubject.PIPELINE: pipeline_bench.run,
  config_lib.BenchSubject.SHADOWS: shadows_bench.run,
  config_lib.BenchSubject.RECORD_PEERS: record_peers_bench.run,
}


def generate_text(
  config: config_lib.ExperimentConfig, workdir: pathlib.Path
) -> None:
  """Continues prompts or test records; writes `generations.json`."""
  options = config.generate
  if options.weights:
    given = _published(options)
  else:
    given = _checkpoint(config, workdir)
  tokenizer, prompts, media = given.tokenizer, given.prompts, given.media
  generator = generate.Generator(
    given.model,
    given.params,
    batch_size=options.batch_size,
    # How long records are is known.
    max_prompt_len=options.max_prompt_len
    if options.prompts
    else max(len(prompt) for prompt in prompts),
    max_new_tokens=options.max_new_tokens,
  )
  continued = generator(
    prompts,
    sampling=generate.Sampling(
      temperature=options.temperature,
      top_k=options.top_k,
      top_p=options.top_p,
    ),
    stop_ids=[tokenizer.eos_id],
    key=prng.stream(prng.root(config.seed), prng.Stream.GENERATE, 0),
    media=media,
  )
  rows = [
    {
      "prompt": tokenizer.decode(prompt),
      "continuation": tokenizer.decode(tokens),
      "tokens": tokens,
    }
    for prompt, tokens in zip(prompts, continued, strict=True)
  ]
  records.write_json(workdir / "generations.json", rows)
  for row in rows:
    print(f"{row['prompt']!r} -> {row['continuation']!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Given:
  """A model and what it is to continue."""

  tokenizer: text.PretrainedTokenizer | tokenizers.Tokenizer
  model: multimodal.PPNet
  params: Any
  prompts: list[list[int]]
  media: dict[str, np.ndarray]


def _published(options: config_lib.GenerateConfig) -> _Given:
  """Published weights and the prompts' texts."""
  if not options.prompts:
    checks.fail(
      "generate.prompts beside generate.weights",
      "Set --config.generate.prompts='(\"Once upon a time\",)'.",
      **{"generate.prompts": options.prompts},
    )
  folder = pathlib.Path(options.weights)
  model, params = generate.text_only(*hf.load(folder))
  tokenizer = text.PretrainedTokenizer.load(folder / "tokenizer.model")
  return _Given(
    tokenizer=tokenizer,
    model=model,
    params=params,
    prompts=[tokenizer.encode(prompt, bos=True) for prompt in options.prompts],
    media={},
  )


def _checkpoint(
  config: config_lib.ExperimentConfig, workdir: pathlib.Path
) -> _Given:
  """The newest checkpoint; the prompts' texts, or the first test records."""
  options = config.generate
  experiment = loop.open_experiment(config, workdir)
  state, _ = loop.restore(experiment)
  tokenizer, dataset = experiment.tokenizer, experiment.datasets["test"]
  media: dict[str, np.ndarray] = {}
  if options.prompts:
    prompts = [
      [tokenizer.bos_id, *tokenizer.encode(prompt)]
      for prompt in options.prompts
    ]
  else:
    checks.positive(**{"generate.num_records": options.num_records})
    rows = [dataset[i] for i in range(min(options.num_records, len(dataset)))]
    rows = [row for row in rows if not row["is_padding_example"]]
    if not rows:
      checks.fail(
        "a test record that can be read", num_records=options.num_records
      )
    prompts = [layout.given_tokens(row, config.data.task) for row in rows]
    media = {
      name: np.stack([row[name] for row in rows])
      for name in config_lib.MODALITIES
      if name in rows[0]
    }
  return _Given(
    tokenizer=tokenizer,
    model=experiment.program.model,
    params=lora.combine(state.released, experiment.program.frozen()),
    prompts=prompts,
    media=media,
  )


_JOBS = {
  config_lib.Job.ACCOUNT: account,
  config_lib.Job.TRAIN: train,
  config_lib.Job.EVALUATE: evaluate,
  config_lib.Job.AUDIT: audit_models,
  config_lib.Job.PREPARE: prepare_data,
  config_lib.Job.BENCHMARK: benchmark,
  config_lib.Job.GENERATE: generate_text,
  config_lib.Job.COMPILE: compile_ahead,
  config_lib.Job.TABLE: table,
}


# Those that one process does not do alone.
_JOBS_OF_MANY = (config_lib.Job.TRAIN, config_lib.Job.EVALUATE)
_JOBS_OF_STEPS = (config_lib.Job.TRAIN, config_lib.Job.AUDIT)


def run_job(config: config_lib.ExperimentConfig, workdir: pathlib.Path) -> None:
  """Runs `config.job` in `workdir`.

  Raises:
    ValueError: an invalid configuration, or one that does not fit its folder.
    RuntimeError: what the job is to find out came out badly.
  """
  config_lib.validate(config)
  if config.job in _JOBS_OF_STEPS and (
    os.environ.get("JAX_PLATFORMS") == "cpu" or not allocator.has_accelerator()
  ):
    allocator.keep_freed()  # Before the next line starts a backend.
  if jax.process_count() > 1 and config.job not in _JOBS_OF_MANY:
    checks.fail(
      "a job of several processes to be one of "
      + ", ".join(job.name for job in _JOBS_OF_MANY),
      "Run it without --distributed.",
      **{"config.job": config.job.name},
    )
  with contextlib.ExitStack() as stack:
    if hosts.is_first():
      stack.enter_context(workdirs.opened(workdir, config))
    _JOBS[config.job](config, workdir)


def _plan(experiment: loop.Experiment) -> str:
  """What is about to happen, in five lines."""
  config, mechanism = experiment.config, experiment.mechanism
  engine = experiment.program.engine
  claim = mechanism.claim()
  media = " and ".join(
    f"{count} {name}"
    for name, count in config_lib.num_media_tokens(config).items()
    if name in experiment.card.media
  )
  return "\n".join(
    [
      f"{config.name}: {experiment.card.num_train:,} training records"
      + (f", {media} tokens each" if media else ""),
      f"model: {experiment.program.num_parameters:,} parameters on"
      f" {jax.device_count()} {jax.default_backend()} device(s)",
      f"steps: {config.train.num_steps} of about"
      f" {mechanism.expected_batch_size} records, drawn by"
      f" {config.privacy.sampler.name} sampling"
      f" (probability {mechanism.sampling_prob:.4g})",
      "engine: "
      + (f"{engine.engine.name} ({engine.why})" if engine else "no clipping"),
      " ".join(["guarantee:", claim["guarantee"], *experiment.card.uncovered]),
    ]
    + _input_guarantee(config)
  )


def _input_guarantee(config: config_lib.ExperimentConfig) -> list[str]:
  """What the private cut promises, where there is one."""
  cut = config.model.private_cut
  if cut.layer is None:
    return []
  return [f"private cut: {input_privacy.claim(cut)['guarantee']}"]


def _parse(argv: Sequence[str]) -> list[str]:
  """Parses the flags, with help and errors about fields of the config."""
  try:
    arguments = config_args.Arguments.split(argv)
    if arguments.wants_help:
      print(__doc__)
      print(flags.FLAGS.module_help(sys.modules[__name__]))
      print(arguments.describe_fields())
      sys.exit(0)
    arguments.check_file()
    arguments.check_fields()
  except ValueError as error:
    sys.exit(f"error: {error}")
  try:
    rest = app.parse_flags_with_usage(arguments.without_none)
  except ValueError as error:
    explained = arguments.explain(error)
    if explained is None:
      raise
    sys.exit(f"error: {explained}")
  if _CONFIG.value is None:
    sys.exit(
      "error: --config is missing. Try --config=configs/quickstart.py, or"
      " --help."
    )
  arguments.set_none(_CONFIG.value)
  if len(rest) > 1:
    sys.exit(f"error: unexpected arguments {rest[1:]}. Flags begin with --.")
  return list(rest)


def _main(argv: Sequence[str]) -> None:
  """Dispatches to one job or a sweep; a user's mistake ends in one line."""
  del argv  # `_parse` refuses positional arguments.
  # Libraries report every backend that is not there; a user cannot act on it.
  logging.set_verbosity(logging.WARNING)
  if _DISTRIBUTED.value:
    hosts.start(
      coordinator=_COORDINATOR.value,
      num_processes=_NUM_PROCESSES.value,
      process_id=_PROCESS_ID.value,
    )
  config: Any = _CONFIG.value
  _share_cores(config)
  arguments = config_args.Arguments.split(sys.argv)
  # A sweep's folder holds folders of runs: not one that is a run itself.
  name = config.name if _SWEEP.value is None else f"{config.name}-sweep"
  default = workdirs.run_name(name, arguments.overrides)
  workdir = pathlib.Path(_WORKDIR.value or pathlib.Path("runs") / default)
  try:
    _profile_steps(config)  # A mistake is told before anything is done.
    if _SWEEP.value is None:
      run_job(config, workdir)
    else:
      _sweep(_SWEEP.value, config, workdir, arguments)
  except preemption.PreemptedError as error:
    print(error, file=sys.stderr)
    sys.exit(preemption.EXIT_CODE)
  except jax.errors.JaxRuntimeError as error:
    if jax.process_count() == 1 or "RESOURCE_EXHAUSTED" in str(error):
      raise
    hosts.leave(
      "Another process of this job ended or cannot be reached"
      f" ({str(error).splitlines()[0][:200]}). Start all of them again: the"
      " same command goes on from the last checkpoint.",
      exit_code=preemption.EXIT_CODE,
    )
  except (ValueError, RuntimeError) as error:
    if not _raised_by_ppnet(error):
      raise  # A bug, ours or a library's: the traceback is what helps.
    sys.exit(f"error: {error}")
  except KeyboardInterrupt:
    sys.exit("interrupted; the same command goes on from the last checkpoint")


def _share_cores(config: config_lib.ExperimentConfig) -> None:
  """Makes each core a device where shadow models are to be trained on a CPU.

  They are trained side by side, one on each device. As many devices as share a
  microbatch evenly; none where somebody chose a mesh or their number.
  """
  chosen = (
    config.mesh.data != -1
    or "JAX_NUM_CPU_DEVICES" in os.environ
    or "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
  )
  if config.job is not config_lib.Job.AUDIT or chosen or _SWEEP.value:
    return
  cores, rows = os.cpu_count() or 1, config.perf.microbatch_size
  ways = [n for n in range(1, cores + 1) if rows % n == 0]
  jax.config.update("jax_num_cpu_devices", max(ways, default=1))


def _sweep(
  text: str,
  config: config_lib.ExperimentConfig,
  workdir: pathlib.Path,
  arguments: config_args.Arguments,
) -> None:
  """Runs this shard of the grid and prints what all shards have so far."""
  grid = sweep.parse_grid(text)
  arguments.check_fields([o.split("=")[0] for o in grid[0]])
  summary, failed = sweep.run(
    grid,
    flags=arguments.config_flags,
    workdir=workdir,
    shard=sweep.parse_shard(_SWEEP_SHARD.value),
    tuning=config.tuning,
  )
  print(f"\n{summary}\n\nsummary: {workdir / 'sweep.md'}")
  picture = workdir / "figures" / "sweep.png"
  if picture.exists():
    print(f"figure:  {picture}")
  if failed:
    raise RuntimeError(
      f"{len(failed)} of {len(grid)} runs failed: {'; '.join(failed)}. Give the"
      " same command again to repeat them alone."
    )


def _raised_by_ppnet(error: BaseException) -> bool:
  """Whether a check of ours raised it, and not a library we called."""
  frames = list(traceback.walk_tb(error.__traceback__))
  package = pathlib.Path(__file__).parent
  return (
    bool(frames)
    and package in pathlib.Path(frames[-1][0].f_code.co_filename).parents
  )


if __name__ == "__main__":
  app.run(_main, flags_parser=_parse)
