"""The mechanism: sampler, clipping, noise and accountant, from one config.

This is the one file that joins the others of this folder (`parts` chooses them
by the config). What trains, charges the ledger or prints an epsilon takes it
from the `Mechanism`, so that the noise that is added, the batches that are
drawn and the epsilon that is claimed cannot come apart: the accountant is told
what the sampler says of itself, and nothing else.
"""

import dataclasses
import math
from typing import Any

import jax
import optax

from ppnet import config as config_lib
from ppnet.core import checks
from ppnet.privacy import (
  accounting,
  adaptive,
  clip_rules,
  clipping,
  correlated,
  noise,
  parts,
  sampling,
  user_records,
)
from ppnet.privacy import participation as participation_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mechanism:
  """One run's mechanism. Made by `build`.

  *Formal guarantee.* If `has_guarantee`, a run that for each step t

  1. takes the units `sampler.draw(t)`, and no others, each in `rows_per_unit`
     rows of its own,
  2. sums their gradients through `clipped_grad_fn` (several calls add up),
  3. passes the sum through `privatizer()` with a fresh key, once, and the state
     that the step before left, or a fresh one after a restart that the ledger
     has charged; and the count of `adaptive`, where there is one, through
     `next_clip_norm`, once, and
  4. uses nothing else that depends on the private units

  is (`epsilon(T)`, `delta`)-DP after T steps, under `neighboring_relation`, for
  one `unit`. The number of units is treated as public. Whoever knows the
  sampler's root or the noise key is not covered.

  | edge case | result |
  | --- | --- |
  | privacy off; clipping or noise ablated; noise multiplier 0 | epsilon inf |
  | sampler or noise seeded | epsilon as usual; `claim` says "seeded" |

  Attributes:
    sampler: draws the indices of each step's units.
    sampler_name: what the claim calls it.
    num_steps: planned number of steps.
    expected_batch_size: public divisor of the noisy sum.
    noise_multiplier: noise standard deviation over sensitivity, of all that a
      step releases; what is accounted for. 0 if no noise is added.
    noise_stddev: standard deviation of the noise on the sum: the multiplier
      times the sensitivity, and more where a count has its part of the budget;
      of the noise before it is correlated, where it is.
    noise_mechanism: whether the noises of different steps are independent.
    num_bands: steps over which they are correlated; 1 if they are not.
    sensitivity: of the sum, under `neighboring_relation`; inf if unbounded. In
      units of the clip norm where that follows a quantile.
    l2_clip_norm: bound on each unit's gradient (PER_EXAMPLE clipping), the
      first where it follows a quantile.
    clipping: what is clipped.
    clip_rule: how it is clipped.
    clip_scope: what one norm is taken over.
    stabilizer: gamma of NORMALIZE.
    adaptive: how the clip norm follows a quantile; None where it is fixed.
    records: which records of a sampled user are taken; None where the unit is
      an example.
    rows_per_unit: rows of the batch that stand for one unit.
    unit_reduction: of their gradients.
    engine: how the sum is computed.
    delta: probability that the guarantee fails.
    epsilon_budget: target that the noise was calibrated to, or None.
    accountant: how epsilon is computed.
    neighboring_relation: which data sets are neighbours.
    unit: what one unit of protection is.
    has_guarantee: whether any finite epsilon can be claimed.
    why_not: why there is no guarantee; empty if there is one.
    sampler_seeded: whether the sampler's root comes from the config.
    noise_seeded: whether the noise root comes from the config.
    epsilon_curve: what `epsilon_after` reads.
  """

  sampler: sampling.Sampler
  sampler_name: str
  num_steps: int
  expected_batch_size: int
  noise_multiplier: float
  noise_stddev: float
  noise_mechanism: config_lib.NoiseMechanism
  num_bands: int
  sensitivity: float
  l2_clip_norm: float
  clipping: config_lib.Clipping
  clip_rule: config_lib.ClipRule
  clip_scope: config_lib.ClipScope
  stabilizer: float
  adaptive: adaptive.AdaptiveClip | None
  records: user_records.RecordChooser | None
  rows_per_unit: int
  unit_reduction: config_lib.UnitReduction
  engine: config_lib.Engine
  delta: float
  epsilon_budget: float | None
  accountant: config_lib.Accountant
  neighboring_relation: config_lib.NeighboringRelation
  unit: config_lib.PrivacyUnit
  has_guarantee: bool
  why_not: str
  sampler_seeded: bool
  noise_seeded: bool
  epsilon_curve: accounting.EpsilonCurve

  def __post_init__(self) -> None:
    """Correlated noise is only as good as the distance of participations."""
    which = self.participation
    if self.num_bands > 1 and not (
      isinstance(which, participation_lib.CyclicPoisson)
      and which.num_groups == self.num_bands
    ):
      checks.fail(
        "as many groups that take turns as the noise has bands",
        num_bands=self.num_bands,
        participation=which,
      )

  @property
  def sampling_prob(self) -> float:
    """Share of all examples that a step sees on average."""
    return self.sampler.sampling_prob

  @property
  def participation(self) -> participation_lib.Participation:
    """What the accountant is told of the sampler: by the sampler itself."""
    return self.sampler.participation

  def clipped_grad_fn(
    self,
    loss_fn: clipping.LossFn,
    *,
    has_aux: bool = False,
    microbatch_size: int | None = None,
    params: Any = None,
    num_stacked_axes: Any = None,
  ) -> clipping.GradFn:
    """Returns the gradient callable whose sum `privatizer` protects.

    Under `Clipping.BATCH` it leaves the sum alone, since it may see only a part
    of the batch; `finish_sum` clips the total. Where the clip norm follows a
    quantile, call it with that as `scale`: the sum is in its units.

    Args:
      loss_fn: see `clipping.clipped_grad`.
      has_aux: whether `loss_fn` returns aux.
      microbatch_size: units whose gradients are held at once.
      params: the parameters or their shapes; read under PER_LAYER.
      num_stacked_axes: see `clip_rules.equal_layer_norms`; None makes one layer
        of every parameter.
    """
    rows: dict[str, Any] = {
      "microbatch_size": microbatch_size,
      "has_aux": has_aux,
      "rows_per_unit": self.rows_per_unit,
      "unit_reduction": self.unit_reduction,
    }
    if self.clipping is not config_lib.Clipping.PER_EXAMPLE:
      return clipping.unprotected_grad(
        loss_fn,
        clipping=config_lib.Clipping.NONE,
        l2_clip_norm=self.l2_clip_norm,
        **rows,
      )
    bounds: Any = 1.0 if self.adaptive else self.l2_clip_norm
    if self.clip_scope is config_lib.ClipScope.PER_LAYER and params is not None:
      bounds = clip_rules.equal_layer_norms(
        params, l2_clip_norm=bounds, num_stacked_axes=num_stacked_axes
      )
    fn = clipping.clipped_grad(
      loss_fn,
      l2_clip_norm=bounds,
      engine=self.engine,
      clip_rule=self.clip_rule,
      clip_scope=self.clip_scope,
      stabilizer=self.stabilizer,
      **rows,
    )
    found = fn.sensitivity(self.neighboring_relation)
    assert math.isclose(found, self.sensitivity, rel_tol=1e-9), (
      f"The noise was scaled to {self.sensitivity}, the sum moves by {found}."
    )
    return fn

  def finish_sum(self, grad_sum: Any, *, num_examples: Any) -> Any:
    """Last step on the total of a batch, before the noise.

    The identity, except in the ablation `Clipping.BATCH`, which clips the mean.

    Args:
      grad_sum: sum over the whole batch, float32 leaves.
      num_examples: number of units in it, a scalar array.
    """
    if self.clipping is config_lib.Clipping.BATCH:
      return clipping.clip_batch_mean(
        grad_sum, num_examples=num_examples, l2_clip_norm=self.l2_clip_norm
      )
    return grad_sum

  def privatizer(self) -> optax.GradientTransformationExtraArgs:
    """Returns the transformation that adds the noise.

    Its state is kept from step to step, in memory alone (`noise.py` has none,
    `correlated.py` says why).
    """
    if self.noise_mechanism is config_lib.NoiseMechanism.BANDED:
      return correlated.banded_privatizer(
        noise_stddev=self.noise_stddev,
        num_steps=self.num_steps,
        num_bands=self.num_bands,
      )
    return noise.gaussian_privatizer(noise_stddev=self.noise_stddev)

  @property
  def initial_clip_norm(self) -> float | None:
    """The clip norm that a run starts with, or None where it is fixed."""
    return self.adaptive.initial_clip_norm if self.adaptive else None

  def next_clip_norm(
    self, clip_norm: jax.Array, count: jax.Array, *, noise_key: jax.Array
  ) -> jax.Array:
    """Releases the count of a step and moves the clip norm, f32[].

    Args:
      clip_norm: of the step.
      count: `adaptive.centred_count` over the whole batch. Private.
      noise_key: of this release alone.
    """
    assert self.adaptive is not None, "The clip norm is fixed."
    tx = noise.gaussian_privatizer(noise_stddev=self.adaptive.count_stddev)
    released, _ = tx.update(count, tx.init(count), noise_key=noise_key)
    (noisy,) = jax.tree.leaves(released)
    return self.adaptive.next_clip_norm(clip_norm, noisy)

  def reported_clip_norm(self, clip_norm: Any) -> float | None:
    """The bound that norms are compared with in records; None without one.

    Args:
      clip_norm: of the step, where it follows a quantile.
    """
    if (self.clipping, self.clip_rule, self.clip_scope) != (
      config_lib.Clipping.PER_EXAMPLE,
      config_lib.ClipRule.CLIP,
      config_lib.ClipScope.FLAT,
    ):
      return None
    return self.l2_clip_norm if clip_norm is None else float(clip_norm)

  def epsilon(self, num_steps: int) -> float:
    """Exact epsilon after `num_steps`; inf without a guarantee."""
    if not self.has_guarantee:
      # Even after 0 steps: nothing is claimed for this mechanism.
      return math.inf
    return accounting.epsilon(
      noise_multiplier=self.noise_multiplier,
      participation=self.participation,
      num_steps=num_steps,
      delta=self.delta,
      accountant=self.accountant,
      neighboring_relation=self.neighboring_relation,
    )

  def epsilon_after(self, steps: int) -> float:
    """Upper bound on epsilon, cheap to ask at every step of a run.

    Exact at `num_steps` and above, rounded up to one of 64 step counts below;
    for the ledger and the progress bar. inf without a guarantee.
    """
    return self.epsilon_curve(steps) if self.has_guarantee else math.inf

  def claim(self) -> dict[str, Any]:
    """What this run claims, for the ledger and the summary: plain values."""
    return {
      "noise_multiplier": self.noise_multiplier,
      "noise_stddev": self.noise_stddev,
      "noise_mechanism": self.noise_mechanism.name,
      "num_bands": self.num_bands,
      "sampling_prob": self.sampling_prob,
      "sampler": self.sampler_name,
      "steps_per_release": self.participation.steps_per_release,
      "accountant": self.accountant.name,
      "neighboring_relation": self.neighboring_relation.name,
      "unit": self.unit.name,
      "delta": self.delta,
      "epsilon_budget": self.epsilon_budget,
      "sensitivity": self.sensitivity,
      "l2_clip_norm": self.l2_clip_norm,
      "clipping": self.clipping.name,
      "clip_rule": self.clip_rule.name,
      "clip_scope": self.clip_scope.name,
      "clip_quantile": self.adaptive.quantile if self.adaptive else None,
      "clip_count_stddev": (
        self.adaptive.count_stddev if self.adaptive else None
      ),
      "rows_per_unit": self.rows_per_unit,
      "num_examples": self.sampler.num_examples,
      "expected_batch_size": self.expected_batch_size,
      "num_steps": self.num_steps,
      "sampler_seeded": self.sampler_seeded,
      "noise_seeded": self.noise_seeded,
      "has_guarantee": self.has_guarantee,
      "guarantee": self.guarantee(self.num_steps),
    }

  def guarantee(self, num_steps: int) -> str:
    """One sentence for people: what `num_steps` releases promise."""
    if not self.has_guarantee:
      return f"No guarantee (epsilon = inf): {self.why_not}."
    relation = {
      config_lib.NeighboringRelation.ADD_OR_REMOVE_ONE: (
        "adding or removing one"
      ),
      config_lib.NeighboringRelation.REPLACE_ONE: "replacing one",
    }[self.neighboring_relation]
    place = ""
    if (
      self.participation.keeps_place
      and self.neighboring_relation
      is config_lib.NeighboringRelation.ADD_OR_REMOVE_ONE
    ):
      place = " whose place in the order of examples stays empty"
    seeded = [
      name
      for name, is_seeded in (
        ("sampler", self.sampler_seeded),
        ("noise", self.noise_seeded),
      )
      if is_seeded
    ]
    caveat = ""
    if seeded:
      caveat = ", except towards whoever knows the seed of the " + (
        " and the ".join(seeded)
      )
    unit = f"training {self.unit.value.replace('_', ' ')}"
    how = [
      f"{self.sampler_name} sampling",
      f"{self.accountant.name} accountant",
    ]
    if self.noise_mechanism is config_lib.NoiseMechanism.BANDED:
      how.append(f"noise of {self.num_bands} bands")
    if self.unit is config_lib.PrivacyUnit.USER:
      unit += " with all their records"
      how.append(f"at most {self.rows_per_unit} records of a user in a step")
    elif self.unit is config_lib.PrivacyUnit.PACKED_ROW:
      how.append("a row of whole records is protected, which is no record")
    elif self.rows_per_unit > 1:
      how.append(f"the mean gradient of {self.rows_per_unit} views clipped")
    if self.clip_rule is config_lib.ClipRule.NORMALIZE:
      how.append("normalised gradients")
    if self.clip_scope is config_lib.ClipScope.PER_LAYER:
      how.append("each layer clipped")
    if self.adaptive:
      how.append("a clip norm that adapts, its noisy counts included")
    return (
      f"{num_steps} steps are ({_rounded_up(self.epsilon(num_steps))},"
      f" {self.delta:.4g})-differentially private with respect to {relation}"
      f" {unit}{place} ({', '.join(how)}){caveat}."
    )


def build(
  config: config_lib.ExperimentConfig,
  num_examples: int,
  *,
  sampler_root: int | None = None,
) -> Mechanism:
  """Builds the mechanism of an experiment on `num_examples` privacy units.

  *Formal guarantee.* See `Mechanism`. Where the config names an epsilon, the
  noise is calibrated so that `epsilon(num_steps)` is at most that, and at least
  99.8 % of it.

  | edge case | result |
  | --- | --- |
  | `privacy.enabled` False | same sampler, no clipping, no noise |
  | a clipping ablation | the noise of the row it is compared with |
  | `privacy.noise` False | noise multiplier 0 |
  | unit USER | N, batch size and sampling are of users |
  | a clip norm that follows a quantile | the count is paid from the budget |

  Args:
    config: the experiment; `privacy`, `train` and `perf.engine` are read.
    num_examples: size of the training set in units, examples or users; treated
      as public.
    sampler_root: 128 secret bits that all hosts agree on. None takes them from
      `privacy.sampler_seed`, or else from this machine's entropy.

  Raises:
    ValueError: the settings contradict each other or the data, or no correct
      epsilon is known for them. The message names both sides.
  """
  privacy = config.privacy
  parts.check(config, num_examples)
  root = parts.sampler_root(config, sampler_root)
  sampler = parts.sampler(config, num_examples, root)
  why_not = parts.why_no_guarantee(privacy)
  has_noise = privacy.enabled and privacy.noise
  noise_multiplier = 0.0
  if has_noise:
    noise_multiplier = parts.noise_multiplier(config, sampler.participation)
  clip = privacy.clipping if privacy.enabled else config_lib.Clipping.NONE
  bounded = parts.clipped_sensitivity(privacy) if privacy.enabled else math.inf
  has_bound = clip is config_lib.Clipping.PER_EXAMPLE
  is_user = privacy.unit is config_lib.PrivacyUnit.USER
  follows = parts.adaptive_clip(config, noise_multiplier)
  grad_noise_multiplier = noise_multiplier
  if follows is not None:
    grad_noise_multiplier = adaptive.grad_noise_multiplier(
      noise_multiplier,
      count_stddev=follows.count_stddev,
      neighboring_relation=privacy.neighboring_relation,
    )
  return Mechanism(
    sampler=sampler,
    sampler_name=parts.sampler_name(config),
    num_steps=config.train.num_steps,
    expected_batch_size=config.train.expected_batch_size,
    noise_multiplier=noise_multiplier,
    # A clipping ablation has no finite sensitivity to scale by. It gets the
    # noise of the run it is compared with, so that only the clipping differs.
    noise_stddev=grad_noise_multiplier * bounded if has_noise else 0.0,
    noise_mechanism=privacy.noise_mechanism,
    num_bands=privacy.num_bands or 1,
    sensitivity=bounded if has_bound else math.inf,
    l2_clip_norm=float(privacy.l2_clip_norm),
    clipping=clip,
    clip_rule=privacy.clip_rule,
    clip_scope=privacy.clip_scope,
    stabilizer=float(privacy.normalize_stabilizer),
    adaptive=follows,
    records=(
      user_records.RecordChooser(
        max_records=privacy.max_records_per_user, root=root
      )
      if is_user
      else None
    ),
    rows_per_unit=(
      privacy.max_records_per_user
      if is_user
      else config.train.views_per_example
    ),
    unit_reduction=(
      config_lib.UnitReduction.SUM if is_user else config_lib.UnitReduction.MEAN
    ),
    engine=config.perf.engine,
    delta=float(privacy.delta),
    epsilon_budget=None if why_not else privacy.epsilon,
    accountant=privacy.accountant,
    neighboring_relation=privacy.neighboring_relation,
    unit=privacy.unit,
    has_guarantee=not why_not,
    why_not=why_not,
    sampler_seeded=privacy.sampler_seed is not None,
    noise_seeded=privacy.noise_seed is not None,
    epsilon_curve=accounting.EpsilonCurve(
      noise_multiplier=noise_multiplier,
      participation=sampler.participation,
      num_steps=config.train.num_steps,
      delta=float(privacy.delta),
      accountant=privacy.accountant,
      neighboring_relation=privacy.neighboring_relation,
    ),
  )


def _rounded_up(epsilon: float) -> str:
  """Four digits of it; a claim is rounded to a weaker one, never a stronger."""
  if not 0 < epsilon < math.inf:
    return f"{epsilon:.4g}"
  scale = 10.0 ** (3 - math.floor(math.log10(epsilon)))
  # The slack keeps what rounding in binary lifted by its last digit.
  return f"{math.ceil(epsilon * scale - 1e-9) / scale:.4g}"


def sampler_root_entropy(config: config_lib.ExperimentConfig) -> int:
  """Returns the root of the batches, for `build`, where processes must agree.

  *Formal guarantee.* As for `noise_root_entropy`, of `privacy.sampler_seed`.
  """
  return parts.sampler_root(config, None)


def noise_root_entropy(config: config_lib.ExperimentConfig) -> int:
  """Returns 128 bits for the root key of the DP noise.

  *Formal guarantee.* Secret, fresh bits of the operating system's entropy,
  unless `privacy.noise_seed` is set; then they are known to whoever knows it.
  """
  seed = config.privacy.noise_seed
  if seed is None:
    return sampling.root_from_entropy()
  return sampling.root_from_seed(seed, domain=parts.NOISE_DOMAIN)
