"""The one training loop: draw, accumulate, charge, update, record, save.

What is written, and when, decides whether a killed run can still be trusted:

1. The ledger is charged, durably, before the step is dispatched.
2. Metrics of step t - 1 are fetched after step t was dispatched, so the device
   does not wait for the host.
3. A checkpoint holds parameters, optimizer, data position and the ledger's
   count together. A resumed run starts from it and re-writes later metrics.
"""

import dataclasses
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from ppnet import config as config_lib
from ppnet.core import checks, hosts, prng
from ppnet.data import examples as examples_lib
from ppnet.data import pipeline, prepare, sources, tokenizers
from ppnet.privacy import correlated, input_privacy
from ppnet.privacy import ledger as ledger_lib
from ppnet.privacy import mechanism as mechanism_lib
from ppnet.train import checkpoint, metrics, preemption, watching
from ppnet.train import program as program_lib
from ppnet.train import state as state_lib

_NO_GUARANTEE_OF_ATTENTION_NOISE = (
  "None. Attention noise is a regulariser: under a causal mask the first token"
  " attends to itself alone and never sees it, and values and residuals pass"
  " without noise."
)


NonFiniteError = metrics.NonFiniteError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
  """Everything a job needs, opened once.

  Attributes:
    config: the experiment.
    workdir: where its records are.
    card: what the data are.
    tokenizer: of the same data.
    mechanism: sampler, clip, noise and accountant.
    program: the compiled pieces.
    datasets: the examples of each split, opened once, so that what one
      evaluation decoded the next one finds.
    bad_records: counts what could not be decoded.
    users: whose records are whose; None where the unit is an example.
    training: the train split as it is trained on, one row or several per
      unit; what it has in common with `datasets` is decoded once.
  """

  config: config_lib.ExperimentConfig
  workdir: pathlib.Path
  card: prepare.Card
  tokenizer: tokenizers.Tokenizer
  mechanism: mechanism_lib.Mechanism
  program: program_lib.Program
  datasets: Mapping[str, examples_lib.Examples]
  training: pipeline.AnyExamples
  bad_records: examples_lib.BadRecords
  users: pipeline.Users | None

  def note_bad_records(self, causes: Mapping[str, str]) -> None:
    """Adds what a part of the pipeline could not decode."""
    for record_id, cause in causes.items():
      self.bad_records.add(record_id, cause)

  def claimed(self, charged_steps: int) -> dict[str, Any]:
    """What a record of this run says of its privacy, after so many charges."""
    claim = self.mechanism.claim()
    cut = self.config.model.private_cut
    of_inputs = (
      {} if cut.layer is None else {"private_cut": input_privacy.claim(cut)}
    )
    if self.config.attention_noise.stddev:
      of_inputs["attention_noise"] = {
        "stddev": self.config.attention_noise.stddev,
        "guarantee": _NO_GUARANTEE_OF_ATTENTION_NOISE,
      }
    return (
      of_inputs
      | {
        name: claim[name]
        for name in (
          "delta",
          "noise_multiplier",
          "l2_clip_norm",
          "sampling_prob",
          "neighboring_relation",
          "accountant",
          "unit",
          "clip_rule",
          "clip_scope",
          "clip_quantile",
        )
      }
      | {
        "epsilon": self.mechanism.epsilon_after(charged_steps),
        # Of the charged steps: a restart may have made them more than planned.
        # What the data's preparation gave away is said with it.
        "guarantee": " ".join(
          [self.mechanism.guarantee(charged_steps), *self.card.uncovered]
        ),
        "seeded": claim["sampler_seeded"] or claim["noise_seeded"],
      }
    )


def prepared_dir(
  config: config_lib.ExperimentConfig, workdir: pathlib.Path
) -> pathlib.Path:
  """Where the prepared data are."""
  return pathlib.Path(config.data.prepared_dir or workdir / "prepared")


def records_by_user(
  config: config_lib.ExperimentConfig, folder: pathlib.Path
) -> Sequence[np.ndarray] | None:
  """Whose the training records are; None where the unit is an example."""
  if config.privacy.unit is not config_lib.PrivacyUnit.USER:
    return None
  return pipeline.records_by_user(config, folder)


def num_units(config: config_lib.ExperimentConfig, folder: pathlib.Path) -> int:
  """How many privacy units a prepared folder's train split makes."""
  by_user = records_by_user(config, folder)
  if by_user is not None:
    return len(by_user)
  return len(pipeline.training_examples(config, folder))


def _has_rows_of_its_own(config: config_lib.ExperimentConfig) -> bool:
  """Whether training sees other rows than evaluations of the same split."""
  return (
    config_lib.is_augmented(config.data)
    or config.privacy.unit is config_lib.PrivacyUnit.PACKED_ROW
  )


def open_experiment(
  config: config_lib.ExperimentConfig,
  workdir: pathlib.Path,
  *,
  devices: list[jax.Device] | None = None,
) -> Experiment:
  """Prepares the data if needed and builds mechanism and program.

  Raises:
    ValueError: data, mechanism, mesh and model do not fit each other.
  """
  folder = prepared_dir(config, workdir)
  card = hosts.first_then_others(
    lambda: prepare.prepare(config.data, folder, progress=hosts.is_first())
  )
  by_user = records_by_user(config, folder)
  datasets = {
    split: pipeline.examples(config, folder, split=split)
    for split in sources.SPLITS
  }
  training: pipeline.AnyExamples = datasets["train"]
  if _has_rows_of_its_own(config):
    training = pipeline.training_examples(config, folder)
  mechanism = mechanism_lib.build(
    config,
    len(training) if by_user is None else len(by_user),
    sampler_root=hosts.from_first(
      lambda: mechanism_lib.sampler_root_entropy(config)
    ),
  )
  # Shapes only: skipping keeps a bad first record from ending the run here.
  probe = dataclasses.replace(
    config,
    data=dataclasses.replace(
      config.data, on_bad_record=config_lib.BadRecord.SKIP, cache=False
    ),
  )
  example = (
    training[0]  # Its texts were read already, to lay them out.
    if config.privacy.unit is config_lib.PrivacyUnit.PACKED_ROW
    else pipeline.examples(probe, folder, split="train")[0]
  )
  tokenizer = tokenizers.load(config.data, folder, class_names=card.class_names)
  return Experiment(
    config=config,
    workdir=workdir,
    card=card,
    tokenizer=tokenizer,
    mechanism=mechanism,
    program=program_lib.build(
      config,
      mechanism,
      example,
      placeholder_ids=tokenizer.placeholder_ids,
      answer_ids=tokenizer.answer_ids.tolist(),
      devices=devices,
    ),
    datasets=datasets,
    training=training,
    bad_records=examples_lib.BadRecords(),
    users=(
      None
      if by_user is None or mechanism.records is None
      else pipeline.Users(
        records=by_user,
        max_records=mechanism.records.max_records,
        choose=mechanism.records.choose,
      )
    ),
  )


def train(
  experiment: Experiment,
  *,
  log: Any = sys.stderr,
  began: float | None = None,
  profile_steps: tuple[int, int] | None = None,
) -> tuple[dict[str, Any], state_lib.TrainState]:
  """Trains to the end, or to the end of the budget, and saves the result.

  Args:
    experiment: from `open_experiment`.
    log: where the progress bar goes, and reports of stalls.
    began: when this process began, in Unix time; now, where it is None.
    profile_steps: the first and the last step of a trace, from 1.

  Returns:
    The run's final numbers, for `summary.json`, and the final state.

  Raises:
    preemption.PreemptedError: SIGTERM came; everything is saved.
    NonFiniteError: the loss or the parameters are not finite any more.
    ValueError: the workdir's checkpoints and ledger do not belong together.
    data.sources.BadRecordError: a record cannot be decoded, under RAISE.
  """
  with watching.Watch(
    experiment.config,
    experiment.workdir,
    experiment.program,
    began=time.time() if began is None else began,
    log=log,
    profile_steps=profile_steps,
  ) as watch:
    run = _Run(experiment, watch)
    try:
      # Only explicit transfers: an implicit one in the loop is a stall.
      with preemption.listening() as notice, jax.transfer_guard("disallow"):
        stopped = run.steps(log, notice)
      return run.finish(stopped_by_budget=stopped), run.state
    finally:
      run.close()


class Predictions(NamedTuple):
  """What a model says of the readable records of a split, in order.

  Attributes:
    losses: task loss of each record, f32[n]: the mean over the tokens that
      count, nats.
    num_targets: how many those are, i64[n].
    logits: at the answer's position, f32[n, V], under CLASSIFY; else None.
    labels: i32[n], under CLASSIFY; else None.
    num_bytes: of the text that counts, i32[n]; None under CLASSIFY.
  """

  losses: np.ndarray
  num_targets: np.ndarray
  logits: np.ndarray | None
  labels: np.ndarray | None
  num_bytes: np.ndarray | None


def evaluate(
  experiment: Experiment,
  params: Any,
  *,
  split: str = "test",
  on_batch: Callable[[int], Any] = lambda number: None,
) -> dict[str, float]:
  """Scores over one split.

  Args:
    experiment: from `open_experiment`.
    params: parameters on the program's mesh.
    split: "train" or "test".
    on_batch: see `predictions`.

  Returns:
    The loss; with accuracy, macro F1 and AUC under CLASSIFY, and bits per byte
    and perplexity under the other tasks.
  """
  found = predictions(experiment, params, split=split, on_batch=on_batch)
  scores = {"loss": float(found.losses.mean())}
  if found.logits is not None and found.labels is not None:
    return scores | metrics.classification(
      found.labels, found.logits, answer_ids=experiment.tokenizer.answer_ids
    )
  assert found.num_bytes is not None
  return scores | metrics.language(
    found.losses, num_targets=found.num_targets, num_bytes=found.num_bytes
  )


def predictions(
  experiment: Experiment,
  params: Any,
  *,
  split: str,
  on_batch: Callable[[int], Any] = lambda number: None,
) -> Predictions:
  """Every readable record of the split once, in order.

  After each batch `on_batch` is told how many are done.
  """
  program = experiment.program
  dataset = experiment.datasets[split]
  rows: dict[str, list[np.ndarray]] = {}
  for number, batch in enumerate(
    pipeline.eval_batches(
      dataset,
      batch_size=experiment.config.perf.microbatch_size,
      host=program.host,
    ),
    start=1,
  ):
    placed = program.put_batch(batch)
    loss, logits = program.evaluate(params, placed, program.root_key)
    # Of the rows of all hosts.
    known = program.whole(
      {
        name: placed[name]
        for name in ("is_padding_example", "label", "num_bytes", "loss_mask")
        if name in placed
      }
    )
    loss, logits, known = jax.device_get((loss, logits, known))
    real = ~known["is_padding_example"]
    found = {
      "losses": loss,
      "num_targets": known["loss_mask"].sum(axis=1).astype(np.int64),
      "logits": logits,
      "labels": known.get("label"),
      "num_bytes": known.get("num_bytes"),
    }
    for name, value in found.items():
      if value is not None:
        rows.setdefault(name, []).append(value[real])
    on_batch(number)
  experiment.note_bad_records(dataset.bad_records.causes)
  whole: dict[str, Any] = {
    name: np.concatenate(rows[name]) if name in rows else None
    for name in Predictions._fields
  }
  return Predictions(**whole)


def restore(
  experiment: Experiment,
) -> tuple[state_lib.TrainState, dict[str, Any]]:
  """The newest checkpoint of a workdir.

  Raises:
    ValueError: there is none.
  """
  saved = checkpoint.Checkpoints(
    experiment.workdir / "checkpoints",
    keep=experiment.config.train.checkpoints_to_keep,
  )
  try:
    found = saved.restore_newest(
      experiment.program.abstract_state,
      fingerprint=experiment.program.fingerprint,
      warn=logging.warning,
    )
  finally:
    saved.close()
  if found is None:
    checks.fail(
      "a workdir with a checkpoint",
      "Train first, with the same --workdir.",
      workdir=str(experiment.workdir),
    )
  return found


class _Run:
  """One process's run: the state between steps and the open files."""

  def __init__(self, experiment: Experiment, watch: watching.Watch):
    config = experiment.config
    self._watch = watch
    self._experiment = experiment
    self._config = config
    self._program = experiment.program
    self._mechanism = experiment.mechanism
    self._checkpoints = checkpoint.Checkpoints(
      experiment.workdir / "checkpoints",
      keep=config.train.checkpoints_to_keep,
    )
    with watch.waiting_for("the newest checkpoint"):
      self.state, self._ledger = self._start()
      self._start_step = int(jax.device_get(self.state.step))
    self._steps_data = iter(
      pipeline.train_steps(
        experiment.training,
        draw=self._mechanism.sampler.draw,
        num_steps=config.train.num_steps,
        start_step=self._start_step,
        microbatch_size=config.perf.microbatch_size,
        num_threads=config.perf.data_threads,
        num_workers=config.perf.data_workers,
        prefetch_steps=config.perf.prefetch_steps,
        users=experiment.users,
        num_views=config.train.views_per_example,
        host=self._program.host,
      )
    )
    self._step = self._start_step
    entropy = hosts.from_first(lambda: mechanism_lib.noise_root_entropy(config))
    self._noise_key = self._program.put(prng.root(entropy))
    self._noise_state = self._start_noise()
    self._writer = metrics.writer(
      experiment.workdir if hosts.is_first() else None,
      start_step=self._start_step,
    )

  def _start(self) -> tuple[state_lib.TrainState, ledger_lib.Ledger]:
    """Fresh state and ledger, or the newest checkpoint's."""
    path = self._experiment.workdir / "privacy.json"
    claim = self._mechanism.claim()
    epsilon_after = self._mechanism.epsilon_after
    with jax.transfer_guard("allow"):
      found = self._checkpoints.restore_newest(
        self._program.abstract_state,
        fingerprint=self._program.fingerprint,
        warn=logging.warning,
      )
    step = 0 if found is None else int(jax.device_get(found[0].step))
    ledger: ledger_lib.Ledger | None = None

    def open_ledger() -> dict[str, Any]:
      nonlocal ledger
      if found is None and not path.exists():
        ledger = ledger_lib.Ledger.create(
          path, claim, epsilon_after=epsilon_after
        )
      else:
        # Raises where it is missing, damaged, or older than the checkpoint.
        ledger = ledger_lib.Ledger.load(
          path, claim, epsilon_after=epsilon_after, resumed_at_step=step
        )
      return ledger.record

    record = hosts.from_first(open_ledger)
    if ledger is None:
      ledger = ledger_lib.Ledger.follow(record, epsilon_after=epsilon_after)
    if found is None:  # Killed before the first checkpoint was complete.
      return self._program.init(), ledger
    state, position = found
    if position["charged_steps"] > ledger.charged_steps:
      checks.fail(
        f"{path} to have charged what the checkpoint has",
        "The ledger is older than the checkpoint. Restore the newer ledger.",
        checkpoint=position["charged_steps"],
        ledger=ledger.charged_steps,
      )
    return state, ledger

  def _start_noise(self) -> Any:
    """The state of the noise at the first step; it is never saved.

    A seeded root draws the noise of the earlier steps again. A fresh one knows
    nothing of it and begins anew, which the ledger has charged.
    """
    program, params = self._program, self.state.params
    state = program.init_noise_state(params)
    if not self._mechanism.noise_seeded:
      return correlated.start_at(state, self._start_step, put=program.put)
    if jax.tree.leaves(state):  # Independent noise has no state.
      for step in range(self._start_step):
        state = program.replay_noise(
          params, self._noise_key, state, program.put(np.int32(step))
        )
    return state

  def steps(self, log: Any, notice: preemption.Notice) -> bool:
    """Runs what is left; True where the budget ended it early."""
    train = self._config.train
    watch = self._watch
    lengths = self._experiment.training.layout.lengths
    watch.begin(self._start_step, lengths=lengths, writer=self._writer)
    pending = None
    with watching.progress_bar(
      self._config, num_done=self._start_step, log=log
    ) as bar:
      for data in watch.each(self._steps_data):
        step = data["step"]
        self._experiment.note_bad_records(data["bad_records"])
        try:
          with watch.waiting_for(f"the ledger's charge of step {step + 1}"):
            self._ledger.charge(step)
        except ledger_lib.BudgetExhausted as error:
          self._report(pending, bar)
          bar.write(f"Stopped before step {step + 1}: {error}", file=log)
          return True
        dispatched = self._dispatch(data)
        self._report(pending, bar)
        pending = (self._ledger.epsilon, *dispatched)
        self._step = step + 1
        evaluating = self._step % train.eval_every_steps == 0
        saving = self._step % train.checkpoint_every_steps == 0
        tracing = watch.changes_after(self._step)
        if evaluating or saving or tracing or self._step == train.num_steps:
          # Nothing is saved before its own metrics were seen to be finite.
          self._report(pending, bar)
          pending = None
          watch.done(self._step)
        if evaluating and self._step < train.num_steps:
          self._evaluate()
        if saving and self._step < train.num_steps:
          self._save()
        with watch.waiting_for(f"whether to end after step {self._step}"):
          told = self._step < train.num_steps and notice.reached(self._step)
        if told:
          self._end_early(pending, bar)
    return False

  def _end_early(self, pending: Any, bar: Any) -> None:
    """Saves what was done and raises."""
    self._report(pending, bar)
    if self._checkpoints.latest_step() != self._step:
      self._save()
    self._wait()
    raise preemption.PreemptedError(
      f"Told to end (SIGTERM) after step {self._step} of"
      f" {self._config.train.num_steps}; it is saved. The same command goes on"
      " from there."
    )

  def _dispatch(self, data: Mapping[str, Any]) -> tuple[Any, list[Any], Any]:
    """Sends one step to the device; returns its unfetched diagnostics."""
    with self._watch.sending(data) as sent:
      parts, scalars = self._send(data)
    self._watch.follow(sent, scalars)
    return sent, parts, scalars

  def _send(self, data: Mapping[str, Any]) -> tuple[list[Any], Any]:
    """The calls of one step."""
    program = self._program
    grad_sum = program.init_grad_sum(self.state.params)
    weights = program.weights(self.state.params)
    parts = []
    for microbatch in data["microbatches"]:
      grad_sum, part = program.accumulate(
        grad_sum,
        weights,
        program.put_batch(microbatch),
        program.root_key,
        self.state.step,
        self.state.clip_norm,
      )
      parts.append(part)
    del weights  # Of the state as it was.
    self.state, self._noise_state, scalars = program.update(
      self.state, grad_sum, self._noise_key, self._noise_state
    )
    del grad_sum  # Donated, and private.
    return parts, scalars

  def _report(self, pending: Any, bar: Any) -> None:
    """Fetches and writes a step's metrics; raises if they are not finite."""
    if pending is None:
      return
    epsilon, sent, parts, scalars = pending
    step = sent.num_done
    with self._watch.waiting_for(f"the devices at step {step}"):
      parts, scalars = jax.device_get((parts, scalars))
    noise = self._config.attention_noise
    row = metrics.step_metrics(
      parts,
      scalars,
      l2_clip_norm=self._mechanism.reported_clip_norm(scalars.get("clip_norm")),
      consistency_weight=noise.consistency_weight if noise.stddev else 0.0,
    )
    machine = self._watch.ended(sent)
    # Under per-example clipping a bad example counts as zero; else it ends.
    metrics.check_finite(
      row,
      scalars,
      step=step,
      tolerated=self._mechanism.clipping is config_lib.Clipping.PER_EXAMPLE,
      learning_rate=self._config.optimizer.learning_rate,
      saved=self._checkpoints.latest_step(),
    )
    self._writer.write(
      {
        "split": "train",
        "step": step,
        "epoch": step * self._mechanism.sampling_prob,
        "epsilon": epsilon,
      }
      | {
        name: float(scalars[name])
        for name in ("learning_rate", "clip_norm")
        if name in scalars
      }
      | row
      | machine
    )
    text = self._watch.progress(
      loss=row["nonprivate/loss/total"], epsilon=epsilon
    )
    bar.set_postfix_str(text, refresh=False)
    bar.update(1)

  def _evaluate(self) -> dict[str, float]:
    """Evaluates on the test split and writes a row."""
    what = f"the evaluation after step {self._step}"
    with self._watch.away("evaluation", what):
      scores = evaluate(
        self._experiment,
        self.state.released,
        on_batch=lambda number: self._watch.now(
          f"{what}, behind batch {number}"
        ),
      )
    self._writer.write(
      {
        "split": "test",
        "step": self._step,
        "epoch": self._step * self._mechanism.sampling_prob,
        "epsilon": self._ledger.epsilon,
      }
      | scores
    )
    self._writer.flush()
    return scores

  def _save(self) -> None:
    """Starts a checkpoint of the state and everything that goes with it."""
    with self._watch.away("checkpoint", f"the checkpoint of step {self._step}"):
      self._writer.flush()
      self._checkpoints.save(
        self.state,
        step=self._step,
        position={
          # Step t of the data is a function of t: this is all their state.
          "data": {"next_step": self._step},
          "sampler": self._mechanism.claim()["sampler"],
          "charged_steps": self._ledger.charged_steps,
          "fingerprint": jax.device_get(
            self._program.fingerprint(self.state)
          ).tolist(),
        },
      )

  def _wait(self) -> None:
    """Blocks until every started checkpoint is on disk."""
    with self._watch.away("checkpoint", "the checkpoints to be on disk"):
      self._checkpoints.wait()

  def finish(self, *, stopped_by_budget: bool) -> dict[str, Any]:
    """Final evaluation and checkpoint; returns the run's numbers."""
    scores = self._evaluate()
    if self._checkpoints.latest_step() != self._step:
      self._save()
    self._wait()
    return {
      "name": self._config.name,
      "status": "stopped_by_budget" if stopped_by_budget else "complete",
      "num_steps": self._step,
      "charged_steps": self._ledger.charged_steps,
      **scores,
      **self._experiment.claimed(self._ledger.charged_steps),
      "engine": self._program.engine,
      "expected_batch_size": self._mechanism.expected_batch_size,
      "num_train": self._experiment.card.num_train,
      "num_units": self._mechanism.sampler.num_examples,
      "num_test": self._experiment.card.num_test,
      **metrics.totals(self._experiment.workdir),
      **self._watch.totals(self._experiment.workdir),
      "bad_records": self._experiment.bad_records.causes,
    }

  def close(self) -> None:
    """Closes files and waits for saves."""
    self._writer.close()
    with self._watch.waiting_for("the checkpoints to be closed"):
      self._checkpoints.close()
