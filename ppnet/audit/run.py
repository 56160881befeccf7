"""The AUDIT job: attacks on a finished run, or on the way of training itself.

Shadow models are trained as configured, every attack is run on them, or on the
finished run with their help, bounds on epsilon are taken from them and from
gradients planted in a run of its own, and all of it goes to `audit.json`. What
that means stands in `ppnet.report.audit`, which reads the file.

Everything in the record but the claim is computed from private data and covered
by no guarantee.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from scipy import stats

from ppnet import config as config_lib
from ppnet.audit import (
  assess,
  attacks,
  extraction,
  gradient_canaries,
  inversion,
  robustness,
  score_table,
  scores,
  shadows,
)
from ppnet.audit import canaries as canaries_lib
from ppnet.audit import pool as pool_lib
from ppnet.core import checks, prng, records, workdirs
from ppnet.data import pipeline
from ppnet.privacy import accounting, ledger, sampling
from ppnet.privacy import mechanism as mechanism_lib
from ppnet.train import loop, metrics

# Where the claimed trade-off curve is asked for: what guesses can see of it. At
# a large epsilon they see large deltas most.
_PROFILE_DELTAS = (
  *(0.7, 0.5, 0.35, 0.2, 0.1, 0.05, 0.02),
  *(1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 1e-6),
)
# Of streams of randomness that follow from the configuration's seed.
_CANARY_DOMAIN = 64
_INVERSION_DOMAIN = 104


def loss_attack(
  experiment: loop.Experiment, params: Any
) -> attacks.AttackResult:
  """The loss threshold attack: training records tend to have lower losses.

  Yeom et al. 2018, adversary 2 (https://arxiv.org/abs/1709.01604), with the
  test split as non-members. It is the weakest attack there is: a low number
  says little, a high one says that the model leaks.

  Args:
    experiment: from `train.loop.open_experiment`.
    params: trained parameters on the program's mesh.
  """
  members = loop.predictions(experiment, params, split="train")
  others = loop.predictions(experiment, params, split="test")
  return attacks.threshold_attack(
    -members.losses, -others.losses, attack="loss_threshold"
  )


def audit(
  config: config_lib.ExperimentConfig, workdir: pathlib.Path
) -> dict[str, Any]:
  """Audits what is in `workdir`, or what the configuration would train.

  Where the folder has a finished run, that is attacked: its training records
  are members, its test records are not, and shadow models are trained on halves
  of all of them. Where it has none, the shadow models themselves are attacked.
  With `audit.num_models=0` no model is: only planted gradients are looked for.

  Args:
    config: the experiment; `audit.*` says how much is spent.
    workdir: its folder. Shadow models and their scores are kept under `audit/`,
      where a killed audit goes on.

  Returns:
    The record, which is in `audit.json` before this returns.

  Raises:
    ValueError: the experiment cannot be trained on a part of its records,
      canaries are asked for that a finished run was not trained on, or an
      inversion where there are no pictures.
  """
  experiment = loop.open_experiment(config, workdir)
  if config.audit.inversion:
    inversion.check_pictures(experiment)  # Now, not after the training.
  models = _models(experiment, is_finished=workdirs.is_finished(workdir))
  table = models.table
  trials = _gradient_trials(experiment)
  if table is not None:
    trials = [*assess.black_box_trials(table, models.claim), *trials]
  confidence = config.audit.confidence
  record = {
    "name": config.name,
    "confidence": confidence,
    "claim": models.claimed,
    "design": {
      "num_models": config.audit.num_models,
      "seed": str(shadows.design_seed(config)),
      "num_records": table.num_records if table is not None else None,
      "num_canaries": config.audit.num_canaries,
      "num_gradient_canaries": config.audit.num_gradient_canaries,
    },
    "membership": None
    if table is None
    else assess.attacks(table, confidence=confidence),
    "bounds": assess.bound(trials, confidence=confidence),
    "utility": models.utility,
    "robustness": models.robustness,
    **models.secrets,
    **_inversion(experiment),
  }
  records.write_json(workdir / "audit.json", record)
  return records.read_json(workdir / "audit.json")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Models:
  """What was trained and asked.

  Attributes:
    table: scores of every record under every model, a finished run first; None
      where there are no shadow models.
    claim: of one shadow model.
    claimed: of the finished run, or of one trained as configured; plain.
    secrets: exposure and extraction of canaries, {} without any; plain.
    utility: scores of each shadow model on the test split; plain.
    robustness: see `robustness.measure`; None where it was not asked for.
  """

  table: score_table.ScoreTable | None
  claim: assess.Claim
  claimed: Mapping[str, Any]
  secrets: Mapping[str, Any]
  utility: Sequence[Mapping[str, float]]
  robustness: Mapping[str, Any] | None


def _models(experiment: loop.Experiment, *, is_finished: bool) -> Models:
  """Trains the shadow models and asks them, and the finished run, all records.

  Raises:
    ValueError: see `audit`.
  """
  config = experiment.config
  if is_finished and config.audit.num_canaries:
    checks.fail(
      "no canaries where a finished run is attacked",
      "It was not trained on them: set --config.audit.num_canaries=0, or audit"
      " in an empty --workdir.",
      **{"audit.num_canaries": config.audit.num_canaries},
    )
  claimed = _claimed(experiment, is_finished=is_finished)
  if config.audit.num_models == 0:
    return Models(
      table=None,
      claim=claim_of(experiment.mechanism),
      claimed=claimed,
      secrets={},
      utility=[],
      robustness=None,
    )
  pool, planted = _pool(experiment)
  test = pool_lib.of_split(experiment, split="test")
  num_members = len(pool)
  if is_finished:
    pool = pool_lib.joined(pool, test)
  trained = shadows.train(
    config,
    pool,
    design=shadows.paired(
      num_models=config.audit.num_models,
      num_records=len(pool),
      seed=shadows.design_seed(config),
    ),
    folder=experiment.workdir / "audit" / "shadows",
    placeholder_ids=experiment.tokenizer.placeholder_ids,
    answer_ids=experiment.tokenizer.answer_ids.tolist(),
    test=test,
  )
  target = loop.restore(experiment)[0].released if is_finished else None

  def score() -> score_table.ScoreTable:
    table = scores.table(
      config, trained, pool, decode=experiment.tokenizer.decode
    )
    if target is None:
      return table
    return _with_target(
      table, target, experiment, pool, trained, num_members=num_members
    )

  return Models(
    table=score_table.kept(
      experiment.workdir / "audit" / "scores.npz",
      made_from=_made_from(trained, target),
      make=score,
    ),
    claim=claim_of(trained.mechanism),
    claimed=claimed,
    secrets=_secrets(experiment, trained, planted),
    utility=_utility(experiment, trained, test),
    robustness=robustness.measure(
      config, trained, test, answer_ids=experiment.tokenizer.answer_ids
    )
    if config.audit.robustness
    else None,
  )


def _utility(
  experiment: loop.Experiment, trained: shadows.Shadows, test: pool_lib.Pool
) -> list[dict[str, float]]:
  """What each shadow model is worth on the test split.

  Under CLASSIFY accuracy, macro F1 and AUC beside the loss. Where a finished
  run is attacked the test records were divided among the shadow models as well:
  half of them had been seen.
  """
  found = []
  for group in trained.groups():
    assert group.test_losses is not None
    for number, losses in enumerate(group.test_losses):
      own = {"loss": float(losses.mean())}
      if group.test_logits is not None:
        own |= metrics.classification(
          test.rows["label"],
          group.test_logits[number],
          answer_ids=experiment.tokenizer.answer_ids,
        )
      found.append(own)
  return found


def contradiction(record: Mapping[str, Any]) -> str | None:
  """One sentence where a bound is above its claim; else None.

  Args:
    record: from `audit`.
  """
  wrong = [row for row in record["bounds"] if row["exceeds"]]
  if not wrong:
    return None
  worst = max(wrong, key=lambda row: row["epsilon"])
  return (
    "THE PRIVACY CLAIM IS CONTRADICTED: claimed epsilon at most"
    f" {worst['allowed_epsilon']:.4g}, audited epsilon at least"
    f" {worst['epsilon']:.4g} at delta {worst['delta']:.4g} and confidence"
    f" {record['confidence']:.4g} ({worst['method']}: {worst['observer']})."
    " Do not release anything under this claim."
  )


def claim_of(mechanism: mechanism_lib.Mechanism) -> assess.Claim:
  """What a mechanism promises after all of its steps, with its whole curve."""
  num_steps = mechanism.num_steps
  profile = []
  if mechanism.has_guarantee:
    profile = [
      (
        accounting.epsilon(
          noise_multiplier=mechanism.noise_multiplier,
          participation=mechanism.participation,
          num_steps=num_steps,
          delta=delta,
          accountant=mechanism.accountant,
          neighboring_relation=mechanism.neighboring_relation,
        ),
        delta,
      )
      for delta in _PROFILE_DELTAS
    ]
  return assess.Claim(
    epsilon=mechanism.epsilon(num_steps),
    delta=mechanism.delta,
    neighboring_relation=mechanism.neighboring_relation.name,
    guarantee=mechanism.guarantee(num_steps),
    profile=tuple(profile),
  )


def _claimed(
  experiment: loop.Experiment, *, is_finished: bool
) -> dict[str, Any]:
  """What is claimed of the finished run, or of one trained as configured."""
  num_steps = experiment.mechanism.num_steps
  if is_finished:
    path = experiment.workdir / "privacy.json"
    num_steps = ledger.read(path)["charged_steps"]
  claimed = experiment.claimed(num_steps)
  return {
    name: claimed[name]
    for name in (
      "epsilon",
      "delta",
      "neighboring_relation",
      "unit",
      "guarantee",
      "seeded",
    )
  }


def _pool(
  experiment: loop.Experiment,
) -> tuple[pool_lib.Pool, list[canaries_lib.Canary]]:
  """The records that are asked about, some of them perhaps canaries."""
  config = experiment.config
  pool = pool_lib.of_split(
    experiment, split="train", num_records=config.audit.num_records
  )
  count = config.audit.num_canaries
  if not count:
    return pool, []
  checks.at_most(
    len(pool),
    "A canary takes the place of a record.",
    **{"audit.num_canaries": count},
  )
  dataset = experiment.datasets["train"]
  source = pipeline.open_source(
    config.data,
    loop.prepared_dir(config, experiment.workdir),
    split="train",
  )
  planted = canaries_lib.make(
    {position: source[position] for position in range(count)},
    task=config.data.task,
    num_classes=len(experiment.card.class_names),
    seed=config.seed + _CANARY_DOMAIN,
  )
  kinds = np.full(len(pool), "", dtype=object)
  kinds[[canary.position for canary in planted]] = [
    canary.kind for canary in planted
  ]
  rows = canaries_lib.plant(pool.rows, planted, dataset=dataset)
  return dataclasses.replace(
    pool, rows=rows, groups={**pool.groups, "canary": kinds.astype(np.str_)}
  ), planted


def _made_from(trained: shadows.Shadows, target: Any) -> dict[str, Any]:
  """What all scores follow from: the design, the models and the target.

  The design's file names the experiment and the pool by their hashes.
  """
  first = trained.paths[0]
  digest = hashlib.sha256()
  for leaf in jax.tree.leaves(jax.device_get(target)):
    digest.update(np.ascontiguousarray(leaf).tobytes())
  return {
    "design": records.read_json(first.with_name("design.json")),
    "models": [
      hashlib.sha256(path.read_bytes()).hexdigest() for path in trained.paths
    ],
    "finished_run": digest.hexdigest(),
  }


def _with_target(
  table: score_table.ScoreTable,
  params: Any,
  experiment: loop.Experiment,
  pool: pool_lib.Pool,
  trained: shadows.Shadows,
  *,
  num_members: int,
) -> score_table.ScoreTable:
  """The table with the finished run in front; the pool's first are members."""
  config = experiment.config
  score = scores.Scorer(
    config,
    trained.program,
    num_models=1,
    decode=experiment.tokenizer.decode,
  )
  own = score(
    jax.tree.map(lambda leaf: leaf[None], jax.device_get(params)),
    np.asarray(jax.random.key_data(experiment.program.root_key))[None],
    pool,
  )
  is_member = np.arange(len(pool)) < num_members
  return score_table.ScoreTable(
    scores={
      name: np.concatenate([own[name], values])
      for name, values in table.scores.items()
    },
    membership=np.concatenate([is_member[None], table.membership]),
    record_ids=table.record_ids,
    groups=table.groups,
    partner=np.append(-1, table.partner + 1),
  )


def _gradient_trials(experiment: loop.Experiment) -> list[assess.Trials]:
  """Coins of gradients planted in one run, seen by who sees every update."""
  config = experiment.config
  count = config.audit.num_gradient_canaries
  if not count:
    return []
  subject = gradient_canaries.subject(experiment, num_canaries=count)
  return [
    white_box_trials(
      gradient_canaries.Auditor(subject), seed=config.privacy.noise_seed
    )
  ]


def white_box_trials(
  auditor: gradient_canaries.Auditor, *, seed: int | None
) -> assess.Trials:
  """Coins of one run's gradient canaries beside what its mechanism claims.

  Args:
    auditor: of the run; trains once.
    seed: of the run; None takes the operating system's entropy.
  """
  found = auditor(seed=seed)
  return assess.Trials(
    observer="sees every noisy sum of one run and guesses which of"
    f" {found.scores.size:,} planted gradients it had (white box)",
    scores=found.scores,
    is_in=found.is_in,
    methods=("one_run", "f_dp_one_run", "gaussian"),
    claim=claim_of(auditor.subject.mechanism),
  )


def _inversion(experiment: loop.Experiment) -> dict[str, Any]:
  """What one step reveals; {} where it was not asked for.

  The pictures go to `audit/inversion.json`, the numbers to the record.
  """
  config = experiment.config
  if not config.audit.inversion:
    return {}
  root = sampling.root_from_seed(config.seed, domain=_INVERSION_DOMAIN)
  found = inversion.invert_gradient(experiment, key=prng.root(root)).record()
  folder = experiment.workdir / "audit"
  folder.mkdir(exist_ok=True)
  records.write_json(folder / "inversion.json", found)
  names = ("noise_multipliers", "epsilons", "delta", "psnr", "guess_psnr")
  return {"inversion": {name: found[name] for name in names}}


def _secrets(
  experiment: loop.Experiment,
  trained: shadows.Shadows,
  planted: Sequence[canaries_lib.Canary],
) -> dict[str, Any]:
  """Exposure and extraction of canaries from the first shadow model.

  Those that its coins left out are the controls.
  """
  if not planted:
    return {}
  first = next(iter(trained.groups()))
  params = jax.tree.map(lambda leaf: leaf[0], first.params)
  is_in = trained.design.membership[int(first.models[0])]
  inside = [canary for canary in planted if is_in[canary.position]]
  outside = [canary for canary in planted if not is_in[canary.position]]
  if not (inside and outside):
    return {}
  found, control = (
    canaries_lib.audit_exposure(experiment, params, some)
    for some in (inside, outside)
  )
  kinds = np.array(found.kinds)
  exposure = []
  for kind in sorted(set(found.kinds)):
    own = found.exposures[kinds == kind]
    exposure.append(
      {
        "kind": kind,
        "num_canaries": len(own),
        "mean_exposure": float(own.mean()),
        "max_exposure": float(own.max()),
        "control_exposure": float(control.exposures.mean()),
        "chance_exposure": found.chance,
        # Whether those planted are more exposed than those left out.
        "p_value": float(
          stats.mannwhitneyu(
            own, control.exposures, alternative="greater"
          ).pvalue
        ),
      }
    )
  taken = extraction.audit_extraction(experiment, params, inside)
  ways = {
    "the likeliest token": taken.greedy,
    f"a beam of {taken.beam_size}": taken.beam,
    f"the best of the {taken.beam_size}": taken.best_of_beam,
  }
  return {
    "exposure": exposure,
    "extraction": [
      {
        "how": how,
        "num_canaries": taken.num_canaries,
        "verbatim": rates.verbatim,
        "near_verbatim": rates.near_verbatim,
      }
      for how, rates in ways.items()
    ],
  }
