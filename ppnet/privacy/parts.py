"""From the configuration to the parts of the mechanism, each by itself.

What `privacy.mechanism.build` puts together, and the refusals that come before:
settings that contradict each other or the data. It chooses; what it chooses is
accounted for in `accounting`, drawn in `sampling` and clipped in `clipping`.
"""

from typing import Any

from ppnet import config as config_lib
from ppnet.core import checks
from ppnet.privacy import (
  accounting,
  adaptive,
  clip_rules,
  clipping,
  sampling,
)
from ppnet.privacy import participation as participation_lib

# Domains of `sampling.root_from_seed`; append only. They keep a config that
# uses one seed for both from using one root for both.
_SAMPLER_DOMAIN = 1
NOISE_DOMAIN = 2


def check(config: config_lib.ExperimentConfig, num_examples: int) -> None:
  """Raises for settings that contradict each other or the data."""
  privacy = config.privacy
  checks.positive(num_examples=num_examples)
  checks.positive(
    num_steps=config.train.num_steps,
    expected_batch_size=config.train.expected_batch_size,
  )
  if config.train.expected_batch_size > num_examples:
    checks.fail(
      "expected_batch_size <= num_examples",
      f"Use --config.train.expected_batch_size={num_examples} or less.",
      expected_batch_size=config.train.expected_batch_size,
      num_examples=num_examples,
    )
  if (
    privacy.sampler is config_lib.Sampler.FULL_BATCH
    and config.train.expected_batch_size != num_examples
  ):
    checks.fail(
      "expected_batch_size == num_examples for the FULL_BATCH sampler",
      f"Use --config.train.expected_batch_size={num_examples}, or the POISSON"
      " sampler.",
      expected_batch_size=config.train.expected_batch_size,
      num_examples=num_examples,
    )
  if (privacy.sampler is config_lib.Sampler.TRUNCATED_POISSON) != (
    privacy.max_batch_size is not None
  ):
    checks.fail(
      "max_batch_size with the TRUNCATED_POISSON sampler, and with no other",
      sampler=privacy.sampler,
      max_batch_size=privacy.max_batch_size,
    )
  _check_bands(config, num_examples)
  if not privacy.enabled:
    return
  if (
    privacy.unit is config_lib.PrivacyUnit.USER
    and config.train.views_per_example > 1
  ):
    checks.fail(
      "one view per example where the unit is a user",
      "Set --config.train.views_per_example=1.",
      views_per_example=config.train.views_per_example,
    )
  if privacy.clip_quantile is not None and (
    privacy.clipping is not config_lib.Clipping.PER_EXAMPLE
    or privacy.clip_rule is not config_lib.ClipRule.CLIP
    or privacy.clip_scope is not config_lib.ClipScope.FLAT
  ):
    checks.fail(
      "clipping PER_EXAMPLE, clip_rule CLIP and clip_scope FLAT where the clip"
      " norm follows a quantile",
      "The budget of the count is known for those alone. Set"
      " --config.privacy.clip_quantile=none.",
      clip_quantile=privacy.clip_quantile,
      clipping=privacy.clipping.name,
      clip_rule=privacy.clip_rule.name,
      clip_scope=privacy.clip_scope.name,
    )
  checks.positive(l2_clip_norm=privacy.l2_clip_norm)
  checks.in_open_unit_interval(delta=privacy.delta)
  if privacy.delta * num_examples >= 1 and not privacy.allow_large_delta:
    checks.fail(
      f"delta < 1/num_examples = {1 / num_examples:.3g}",
      "Publishing one random example whole would satisfy such a delta. Lower"
      " --config.privacy.delta, or set --config.privacy.allow_large_delta.",
      delta=privacy.delta,
      num_examples=num_examples,
    )
  if privacy.noise and (privacy.epsilon is None) == (
    privacy.noise_multiplier is None
  ):
    checks.fail(
      "exactly one of privacy.epsilon and privacy.noise_multiplier",
      "Set the other to None.",
      epsilon=privacy.epsilon,
      noise_multiplier=privacy.noise_multiplier,
    )


def _check_bands(
  config: config_lib.ExperimentConfig, num_examples: int
) -> None:
  """Raises where banded noise fits neither sampler nor data nor length."""
  privacy, bands = config.privacy, config.privacy.num_bands
  is_banded = privacy.noise_mechanism is config_lib.NoiseMechanism.BANDED
  if is_banded != (bands is not None) or (
    is_banded and privacy.sampler is not config_lib.Sampler.POISSON
  ):
    checks.fail(
      "BANDED noise with num_bands and the POISSON sampler, or neither",
      "Its groups take turns; no other sampler keeps an example out of steps"
      " whose noise is correlated.",
      noise_mechanism=privacy.noise_mechanism.name,
      num_bands=bands,
      sampler=privacy.sampler,
    )
  if bands is None:
    return
  checks.positive(num_bands=bands)
  checks.at_most(config.train.num_steps, num_bands=bands)
  if privacy.clip_quantile is not None:
    checks.fail(
      "a fixed clip norm with BANDED noise",
      "Correlated noise takes back what earlier steps added, which was in units"
      " of another clip norm. Set --config.privacy.clip_quantile=none.",
      clip_quantile=privacy.clip_quantile,
      noise_mechanism=privacy.noise_mechanism.name,
    )
  if bands * config.train.expected_batch_size > num_examples:
    most = num_examples // config.train.expected_batch_size
    checks.fail(
      "num_bands * expected_batch_size <= num_examples",
      "A batch is drawn from one of num_bands groups. Use"
      f" --config.privacy.num_bands={most} or less.",
      num_bands=bands,
      expected_batch_size=config.train.expected_batch_size,
      num_examples=num_examples,
    )


def sampler_root(config: config_lib.ExperimentConfig, given: int | None) -> int:
  """The secret of the batches: given, from the config's seed, or entropy."""
  if given is not None:
    return given
  seed = config.privacy.sampler_seed
  if seed is None:
    return sampling.root_from_entropy()
  return sampling.root_from_seed(seed, domain=_SAMPLER_DOMAIN)


def sampler(
  config: config_lib.ExperimentConfig,
  num_examples: int,
  root: int,
) -> sampling.Sampler:
  """The sampler that the config names.

  Args:
    config: the experiment.
    num_examples: size of the training set, in units.
    root: from `sampler_root`.
  """
  privacy, batch_size = config.privacy, config.train.expected_batch_size
  if privacy.sampler is config_lib.Sampler.FULL_BATCH:
    return sampling.FullBatchSampler(num_examples=num_examples)
  if privacy.noise_mechanism is config_lib.NoiseMechanism.BANDED:
    assert privacy.num_bands is not None, "check wants it."
    return sampling.CyclicPoissonSampler(
      num_examples=num_examples,
      group_sampling_prob=batch_size * privacy.num_bands / num_examples,
      num_groups=privacy.num_bands,
      root=root,
    )
  match privacy.sampler:
    case config_lib.Sampler.POISSON:
      return sampling.PoissonSampler(
        num_examples=num_examples,
        sampling_prob=batch_size / num_examples,
        root=root,
      )
    case config_lib.Sampler.TRUNCATED_POISSON:
      assert privacy.max_batch_size is not None, "check wants one."
      return sampling.TruncatedPoissonSampler(
        num_examples=num_examples,
        sampling_prob=batch_size / num_examples,
        max_batch_size=privacy.max_batch_size,
        root=root,
      )
    case config_lib.Sampler.BALLS_IN_BINS:
      return sampling.BallsInBinsSampler(
        num_examples=num_examples,
        num_bins=max(round(num_examples / batch_size), 1),
        root=root,
      )
    case config_lib.Sampler.SHUFFLE:
      return sampling.ShuffleSampler(
        num_examples=num_examples, batch_size=batch_size, root=root
      )
  checks.fail("a sampler that an accountant covers", sampler=privacy.sampler)


def sampler_name(config: config_lib.ExperimentConfig) -> str:
  """What a claim calls the sampler."""
  if config.privacy.noise_mechanism is config_lib.NoiseMechanism.BANDED:
    return "CYCLIC_POISSON"
  return config.privacy.sampler.name


def noise_multiplier(
  config: config_lib.ExperimentConfig,
  participation: participation_lib.Participation,
) -> float:
  """The given noise multiplier, or the one that reaches the target."""
  privacy = config.privacy
  if privacy.noise_multiplier is not None:
    checks.non_negative(noise_multiplier=privacy.noise_multiplier)
    accounting.check_supported(
      participation=participation,
      accountant=privacy.accountant,
      neighboring_relation=privacy.neighboring_relation,
    )
    return float(privacy.noise_multiplier)
  assert privacy.epsilon is not None, "check wants exactly one of the two."
  return accounting.calibrate_noise_multiplier(
    epsilon=float(privacy.epsilon),
    delta=float(privacy.delta),
    participation=participation,
    num_steps=config.train.num_steps,
    accountant=privacy.accountant,
    neighboring_relation=privacy.neighboring_relation,
  )


def clipped_sensitivity(privacy: config_lib.PrivacyConfig) -> float:
  """Sensitivity of the clipped sum, from the callable itself."""
  follows = privacy.clip_quantile is not None
  return clipping.clipped_grad(
    _no_loss,
    l2_clip_norm=1.0 if follows else float(privacy.l2_clip_norm),
    clip_rule=privacy.clip_rule,
    clip_scope=privacy.clip_scope,
    stabilizer=float(privacy.normalize_stabilizer),
  ).sensitivity(privacy.neighboring_relation)


def adaptive_clip(
  config: config_lib.ExperimentConfig, noise_multiplier: float
) -> adaptive.AdaptiveClip | None:
  """How the clip norm follows a quantile, if it does."""
  privacy = config.privacy
  if not privacy.enabled or privacy.clip_quantile is None:
    return None
  clip_rules.check_clip_norm(float(privacy.l2_clip_norm))
  size = config.train.expected_batch_size
  stddev = privacy.clip_count_stddev
  if stddev is None:
    stddev = size / 20  # As Andrew et al. 2021 have it.
  return adaptive.AdaptiveClip(
    initial_clip_norm=float(privacy.l2_clip_norm),
    quantile=privacy.clip_quantile,
    learning_rate=privacy.clip_learning_rate,
    expected_batch_size=size,
    count_stddev=float(stddev) if noise_multiplier > 0 else 0.0,
  )


def _no_loss(params: Any, batch: Any) -> Any:
  """Stands in where only the sensitivity is asked for."""
  del params, batch  # Never called.
  raise NotImplementedError("This function is never called.")


def why_no_guarantee(privacy: config_lib.PrivacyConfig) -> str:
  """Why there is no guarantee; empty if there is one."""
  reasons = []
  if not privacy.enabled:
    return "privacy is off, gradients are neither clipped nor noised"
  if privacy.clipping is config_lib.Clipping.NONE:
    reasons.append("gradients are not clipped")
  if privacy.clipping is config_lib.Clipping.BATCH:
    reasons.append(
      "the batch gradient is clipped, which bounds no example's influence"
    )
  if not privacy.noise:
    reasons.append("no noise is added")
  elif privacy.noise_multiplier == 0:
    reasons.append("the noise multiplier is 0")
  return "; ".join(reasons)
