"""How much privacy a run of the subsampled Gaussian mechanism spends.

The accountants are those of `dp_accounting`; this file fixes what they are
asked, so that one definition of `noise_multiplier` holds everywhere:

  noise_multiplier = noise standard deviation / sensitivity,

where the sensitivity is that of the clipped sum *under the relation asked for*:
C under add-or-remove-one, 2C under replace-one, C the clip norm. (An event of
`dp_accounting` divides by C under both; `_event` translates.)

Every epsilon returned is an upper bound: the PLD is discretised pessimistically
and RDP is converted by an inequality. What is sampled, and how, is said by a
`participation.Participation`, which a sampler gives of itself; a plain
`sampling_prob` means Poisson sampling. No JAX in this module.

>>> round(epsilon(noise_multiplier=1.1, sampling_prob=256 / 60000,
...               num_steps=14040, delta=1e-5), 2)
2.38
"""

import contextlib
import dataclasses
import enum
import functools
import logging
import math
from collections.abc import Iterator
from typing import TypeVar

import dp_accounting
from dp_accounting import pld, rdp

from ppnet import config
from ppnet.core import checks
from ppnet.privacy import bins
from ppnet.privacy import participation as participation_lib

_Member = TypeVar("_Member", bound=enum.Enum)

_MIN_NOISE_MULTIPLIER = 1e-2  # Below, epsilon is in the tens of thousands.
_MAX_NOISE_MULTIPLIER = 1e5  # Above, discretisation is all that is left.
_CALIBRATION_TOLERANCE = 2e-3  # Relative, in epsilon; always from below.
_DISCRETIZATION = 1e-4  # Of the privacy loss; the default of dp_accounting.
_MAX_GRID_POINTS = 64


def epsilon(
  *,
  noise_multiplier: float,
  sampling_prob: float | None = None,
  num_steps: int,
  delta: float,
  accountant: config.Accountant | str = config.Accountant.PLD,
  neighboring_relation: config.NeighboringRelation | str = (
    config.NeighboringRelation.ADD_OR_REMOVE_ONE
  ),
  participation: participation_lib.Participation | None = None,
) -> float:
  """Upper bound on epsilon after `num_steps` steps of noisy sums.

  PLD: Koskela et al. 2020 (https://arxiv.org/abs/1906.03049), discretised by
  "connect the dots", Doroshenko et al. 2022 (https://arxiv.org/abs/2207.04380,
  Section 3). RDP: Mironov et al. 2019 (https://arxiv.org/abs/1908.10530,
  Section 3.3), converted by Canonne et al. 2020
  (https://arxiv.org/abs/2004.00010, Proposition 12).

  *Formal guarantee.* A mechanism that `num_steps` times draws examples as
  `participation` says and releases a sum of sensitivity S plus Gaussian noise
  of standard deviation `noise_multiplier * S` is (epsilon, delta)-DP for the
  returned epsilon, also when each release depends on the earlier ones. It does
  not cover batches drawn in another way. What add-or-remove-one means where the
  batch size is fixed, `Participation.keeps_place` says.

  | participation | covered by |
  | --- | --- |
  | Poisson, CyclicPoisson | PLD, both relations; RDP, add-or-remove-one |
  | TruncatedPoisson | PLD, both relations (the bound of `dp_accounting`) |
  | BallsInBins | PLD, add-or-remove-one (see `privacy.bins`) |
  | OncePerEpoch, probability 1 | PLD and RDP, both relations: no sampling |

  | edge case | result |
  | --- | --- |
  | `num_steps` 0 | 0.0 |
  | `noise_multiplier` 0 | inf |
  | `sampling_prob` 1 | Gaussian mechanism on all data, either relation |
  | REPLACE_ONE, PLD, Poisson | exact (its own pair, not a doubling) |
  | a combination that nothing above covers | `ValueError` |
  | a release that `num_steps` cuts short | counted whole |
  | `noise_multiplier` close to 0 | finite, coarser upper bound |

  Args:
    noise_multiplier: noise standard deviation over sensitivity, >= 0.
    sampling_prob: probability that an example joins a step under Poisson
      sampling, in (0, 1]. Either this or `participation` is given.
    num_steps: number of steps, an integer >= 0.
    delta: probability that the bound fails, in (0, 1).
    accountant: PLD (tight) or RDP, or their string values.
    neighboring_relation: which data sets are neighbours.
    participation: what the sampler says of itself.

  Returns:
    Epsilon, in nats.

  Raises:
    ValueError: an argument out of range, or a combination that the accountant
      does not cover.
  """
  checks.non_negative(noise_multiplier=noise_multiplier)
  participation = _participation(sampling_prob, participation)
  accountant, neighboring_relation = _check(
    participation, num_steps, delta, accountant, neighboring_relation
  )
  if num_steps == 0:
    return 0.0
  if noise_multiplier == 0:
    return math.inf
  return _epsilon(
    float(noise_multiplier),
    participation,
    participation.num_releases(int(num_steps)),
    float(delta),
    accountant,
    neighboring_relation,
  )


def calibrate_noise_multiplier(
  *,
  epsilon: float,
  delta: float,
  sampling_prob: float | None = None,
  num_steps: int,
  accountant: config.Accountant | str = config.Accountant.PLD,
  neighboring_relation: config.NeighboringRelation | str = (
    config.NeighboringRelation.ADD_OR_REMOVE_ONE
  ),
  participation: participation_lib.Participation | None = None,
) -> float:
  """Noise multiplier whose epsilon reaches the target from below.

  *Formal guarantee.* The function `epsilon` of this module, called with the
  result and the same arguments, returns at most the target, and at least
  99.8 % of it.

  | edge case | result |
  | --- | --- |
  | a target below what the accountant can resolve | `ValueError` |
  | a target above what almost no noise spends | `ValueError` |
  | `num_steps` 0 | `ValueError`: nothing to calibrate |

  Args:
    epsilon: the target, > 0.
    delta: probability that the bound fails, in (0, 1).
    sampling_prob: probability that an example joins a step under Poisson
      sampling, in (0, 1]. Either this or `participation` is given.
    num_steps: number of steps, an integer >= 1.
    accountant: PLD (tight) or RDP, or their string values.
    neighboring_relation: which data sets are neighbours.
    participation: what the sampler says of itself.

  Returns:
    The noise standard deviation over the sensitivity.

  Raises:
    ValueError: an argument out of range, a combination that the accountant
      does not cover, or a target that no noise reaches.
  """
  checks.positive(epsilon=epsilon)
  participation = _participation(sampling_prob, participation)
  accountant, neighboring_relation = _check(
    participation, num_steps, delta, accountant, neighboring_relation
  )
  checks.positive("There is nothing to calibrate.", num_steps=num_steps)
  num_releases = participation.num_releases(int(num_steps))

  def spent(noise_multiplier: float) -> float:
    return _epsilon(
      noise_multiplier,
      participation,
      num_releases,
      float(delta),
      accountant,
      neighboring_relation,
    )

  # Invariant once bracketed: spent(low) > epsilon >= spent(high).
  low = high = 1.0
  low_spent = high_spent = spent(1.0)
  while high_spent > epsilon:
    if high >= _MAX_NOISE_MULTIPLIER:
      _unreachable(epsilon, high, high_spent, "Raise epsilon or delta.")
    low, low_spent = high, high_spent
    high = min(2 * high, _MAX_NOISE_MULTIPLIER)
    high_spent = spent(high)
  while low_spent <= epsilon:
    if _close_enough(low_spent, epsilon):
      return low
    if low <= _MIN_NOISE_MULTIPLIER:
      _unreachable(
        epsilon,
        high,
        high_spent,
        f"Even noise_multiplier={low!r} spends only {low_spent!r}: lower"
        " epsilon, or take more steps or larger batches.",
      )
    high, high_spent = low, low_spent
    low = max(low / 2, _MIN_NOISE_MULTIPLIER)
    low_spent = spent(low)
  while not _close_enough(high_spent, epsilon):
    if high / low < 1 + 1e-9:
      # Epsilon jumps over the target here: the discretisation of the PLD, or
      # the end of the list of Renyi orders.
      _unreachable(epsilon, high, high_spent, "Raise epsilon or delta.")
    middle = _interpolate(low, low_spent, high, high_spent, epsilon)
    middle_spent = spent(middle)
    if middle_spent > epsilon:
      low, low_spent = middle, middle_spent
    else:
      high, high_spent = middle, middle_spent
  return high


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpsilonCurve:
  """Upper bound on epsilon after any number of steps, cheap to ask repeatedly.

  Epsilon is computed at no more than 64 step counts, each on its first use,
  spaced evenly in the square root of the step count (as epsilon grows), and a
  count in between is rounded *up* to the next of them.

  *Formal guarantee.* `curve(steps)` is at least the epsilon of `steps` steps.
  At `num_steps`, and at every count above it, it is that of `epsilon` itself;
  below it never exceeds `curve(num_steps)`. So a run whose noise was calibrated
  for `num_steps` stays within its budget for each of its steps.

  | edge case | result |
  | --- | --- |
  | 0 steps | 0.0 |
  | more than `num_steps` | exact, one accountant call each |
  | `noise_multiplier` 0 | inf from the first step on |

  Attributes:
    noise_multiplier: noise standard deviation over sensitivity, >= 0.
    participation: what the sampler says of itself.
    num_steps: planned number of steps, an integer >= 0.
    delta: probability that the bound fails, in (0, 1).
    accountant: PLD or RDP.
    neighboring_relation: which data sets are neighbours.
  """

  noise_multiplier: float
  participation: participation_lib.Participation
  num_steps: int
  delta: float
  accountant: config.Accountant | str = config.Accountant.PLD
  neighboring_relation: config.NeighboringRelation | str = (
    config.NeighboringRelation.ADD_OR_REMOVE_ONE
  )

  def __post_init__(self) -> None:
    """Checks everything now, so that no step of a run finds an error."""
    checks.non_negative(noise_multiplier=self.noise_multiplier)
    _check(
      self.participation,
      self.num_steps,
      self.delta,
      self.accountant,
      self.neighboring_relation,
    )

  def __call__(self, steps: int) -> float:
    """Upper bound on epsilon after `steps` steps, an integer >= 0."""
    _check_steps(steps=steps)
    if steps < self.num_steps:
      steps = _round_up(steps, self.num_steps)
    bound = epsilon(
      noise_multiplier=self.noise_multiplier,
      participation=self.participation,
      num_steps=steps,
      delta=self.delta,
      accountant=self.accountant,
      neighboring_relation=self.neighboring_relation,
    )
    if 0 < steps < self.num_steps:
      # Fewer steps release less. This only matters where the discretisations of
      # two calls differ in the last digits.
      bound = min(bound, self(self.num_steps))
    return bound


def check_supported(
  *,
  participation: participation_lib.Participation,
  accountant: config.Accountant | str,
  neighboring_relation: config.NeighboringRelation | str,
) -> None:
  """Raises `ValueError` for a combination without a correct epsilon."""
  accountant = _enum(config.Accountant, accountant=accountant)
  relation = _enum(
    config.NeighboringRelation, neighboring_relation=neighboring_relation
  )
  reason, remedy = _not_covered(participation, accountant, relation)
  if reason:
    checks.fail(
      f"an accountant that covers {reason}",
      remedy,
      accountant=accountant.name,
      neighboring_relation=relation.name,
    )


@contextlib.contextmanager
def quiet_orders() -> Iterator[None]:
  """Hides that `dp_accounting` leaves an order out: epsilon only rises."""

  def keep(record: logging.LogRecord) -> bool:
    return "Excluding this order" not in record.getMessage()

  logger = logging.getLogger("absl")
  logger.addFilter(keep)
  try:
    yield
  finally:
    logger.removeFilter(keep)


def _not_covered(
  participation: participation_lib.Participation,
  accountant: config.Accountant,
  relation: config.NeighboringRelation,
) -> tuple[str, str]:
  """What no accountant covers and what to do; twice "" if it is covered."""
  is_rdp = accountant is config.Accountant.RDP
  is_replace = relation is config.NeighboringRelation.REPLACE_ONE
  match participation.release(1.0):
    case dp_accounting.GaussianDpEvent():
      return "", ""
    case dp_accounting.PoissonSampledDpEvent():
      if is_rdp and is_replace:
        return (
          "Poisson sampling under REPLACE_ONE by RDP",
          "Use the PLD accountant, or ADD_OR_REMOVE_ONE.",
        )
      return "", ""
    case dp_accounting.TruncatedSubsampledGaussianDpEvent():
      if is_rdp:
        return "truncated sampling by RDP", "Use the PLD accountant."
      return "", ""
    case participation_lib.BallsInBinsDpEvent():
      if is_rdp:
        return "balls-in-bins sampling by RDP", "Use the PLD accountant."
      if is_replace:
        return (
          "balls-in-bins sampling under REPLACE_ONE",
          "Use ADD_OR_REMOVE_ONE.",
        )
      return "", ""
  return "this sampling", "Use a sampler of ppnet.privacy.sampling."


def _participation(
  sampling_prob: float | None,
  participation: participation_lib.Participation | None,
) -> participation_lib.Participation:
  """What was said of the sampling, in one of two ways."""
  if (sampling_prob is None) == (participation is None):
    checks.fail(
      "exactly one of sampling_prob and participation",
      "A plain sampling_prob means Poisson sampling.",
      sampling_prob=sampling_prob,
      participation=participation,
    )
  if participation is not None:
    return participation
  assert sampling_prob is not None, "One of the two is given."
  return participation_lib.Poisson(sampling_prob=float(sampling_prob))


def _check(
  participation: participation_lib.Participation,
  num_steps: int,
  delta: float,
  accountant: config.Accountant | str,
  neighboring_relation: config.NeighboringRelation | str,
) -> tuple[config.Accountant, config.NeighboringRelation]:
  """Checks what both public functions share; returns the enum members."""
  _check_steps(num_steps=num_steps)
  checks.in_open_unit_interval(delta=delta)
  check_supported(
    participation=participation,
    accountant=accountant,
    neighboring_relation=neighboring_relation,
  )
  return (
    _enum(config.Accountant, accountant=accountant),
    _enum(
      config.NeighboringRelation, neighboring_relation=neighboring_relation
    ),
  )


def _check_steps(**values: int) -> None:
  """Every value is an integer (NumPy's too, but no bool) not below zero."""
  for name, value in values.items():
    if isinstance(value, bool) or not hasattr(value, "__index__"):
      checks.fail(f"{name} to be an integer", **{name: value})
  checks.non_negative(**values)


def _enum(kind: type[_Member], **values: _Member | str) -> _Member:
  """Member of `kind` from itself or its string value."""
  ((name, value),) = values.items()
  if isinstance(value, kind):
    return value
  known = [member.value for member in kind]
  if value not in known:
    checks.fail(
      f"{name} to be one of {known}",
      checks.did_you_mean(str(value), known).strip(),
      **{name: value},
    )
  return kind(value)


@functools.lru_cache(maxsize=4096)
def _epsilon(
  noise_multiplier: float,
  participation: participation_lib.Participation,
  num_releases: int,
  delta: float,
  accountant: config.Accountant,
  relation: config.NeighboringRelation,
) -> float:
  """Epsilon for checked arguments; a pure function, so remembered."""
  event, its_relation = _event(noise_multiplier, participation, relation)
  if accountant is config.Accountant.RDP:
    with quiet_orders():
      return _rdp_epsilon(event, num_releases, delta)
  interval = _interval(noise_multiplier, participation, num_releases, delta)
  if isinstance(event, dp_accounting.GaussianDpEvent):
    return _gaussian_epsilon(event, num_releases, delta, interval)
  tail_mass = 0.0  # Of `bins` alone; fixed, so that others are remembered.
  if isinstance(event, participation_lib.BallsInBinsDpEvent):
    tail_mass = 10.0 ** math.floor(math.log10(1e-3 * delta / num_releases))
  one = _one_release(event, its_relation, interval, tail_mass)
  spent = float(one.self_compose(num_releases).get_epsilon_for_delta(delta))
  if isinstance(event, participation_lib.BallsInBinsDpEvent):
    # Whichever bin an example falls into, it is in one. With little noise the
    # grid of `bins` is coarse, and this bound the better one.
    known = dp_accounting.GaussianDpEvent(event.noise_multiplier)
    interval = _unsampled_interval(noise_multiplier, num_releases, delta)
    spent = min(spent, _gaussian_epsilon(known, num_releases, delta, interval))
  return spent


@functools.lru_cache(maxsize=4)
def _one_release(
  event: dp_accounting.DpEvent,
  relation: dp_accounting.NeighboringRelation,
  interval: float,
  tail_mass: float,
) -> pld.privacy_loss_distribution.PrivacyLossDistribution:
  """The privacy loss of one sampled release, remembered.

  What `PLDAccountant.compose` would build anew for every number of steps; it
  takes most of the time, and a curve over steps asks for dozens of them.
  """
  distribution = pld.privacy_loss_distribution
  match event:
    case dp_accounting.PoissonSampledDpEvent(event=gaussian):
      assert isinstance(gaussian, dp_accounting.GaussianDpEvent)
      return distribution.from_gaussian_mechanism(
        standard_deviation=gaussian.noise_multiplier,
        value_discretization_interval=interval,
        sampling_prob=event.sampling_probability,
        neighboring_relation=relation,
      )
    case dp_accounting.TruncatedSubsampledGaussianDpEvent():
      return distribution.from_truncated_subsampled_gaussian_mechanism(
        dataset_size=event.dataset_size,
        sampling_probability=event.sampling_probability,
        truncated_batch_size=event.truncated_batch_size,
        noise_multiplier=event.noise_multiplier,
        value_discretization_interval=interval,
        neighboring_relation=relation,
      )
    case participation_lib.BallsInBinsDpEvent():
      return bins.cycle_loss(
        noise_multiplier=event.noise_multiplier,
        num_bins=event.num_bins,
        interval=interval,
        tail_mass=tail_mass,
      )
  raise AssertionError(f"check_supported lets no {event!r} through.")


def _event(
  noise_multiplier: float,
  participation: participation_lib.Participation,
  relation: config.NeighboringRelation,
) -> tuple[dp_accounting.DpEvent, dp_accounting.NeighboringRelation]:
  """One release, in the terms of `dp_accounting`.

  There, an event's noise multiplier is the noise over the *norm bound* C
  whatever the relation, and replace-one moves the sum by 2C. Ours is the noise
  over the sensitivity, 2C under replace-one: hence the factor 2.
  """
  add_or_remove = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
  event = participation.release(noise_multiplier)
  if relation is config.NeighboringRelation.ADD_OR_REMOVE_ONE:
    return event, add_or_remove
  if isinstance(event, dp_accounting.GaussianDpEvent):
    # Without sampling only noise over sensitivity matters: one event for both.
    return event, add_or_remove
  return (
    participation.release(2 * noise_multiplier),
    dp_accounting.NeighboringRelation.REPLACE_ONE,
  )


def _gaussian_epsilon(
  event: dp_accounting.GaussianDpEvent,
  num_releases: int,
  delta: float,
  interval: float,
) -> float:
  """Epsilon of Gaussian releases without sampling, by PLD."""
  composed = pld.PLDAccountant(
    dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, interval
  )
  return float(composed.compose(event, num_releases).get_epsilon(delta))


def _rdp_epsilon(
  event: dp_accounting.DpEvent, num_releases: int, delta: float
) -> float:
  """Epsilon by Renyi DP. Covers add-or-remove-one, or no sampling at all."""
  composed = rdp.RdpAccountant(
    neighboring_relation=dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
  )
  composed.compose(event, num_releases)
  return float(composed.get_epsilon(delta))


def _interval(
  noise_multiplier: float,
  participation: participation_lib.Participation,
  num_releases: int,
  delta: float,
) -> float:
  """Discretisation of the privacy loss: finer than it matters, but bounded.

  The arrays are about (largest loss) / interval long, so the default interval
  wants tens of gigabytes where epsilon is in the thousands. There a coarser one
  costs nothing: at epsilon 13 an interval of 4e-4 moves epsilon by 2e-6 of
  itself, and always upwards.
  """
  event = participation.release(noise_multiplier)
  if isinstance(event, dp_accounting.GaussianDpEvent):
    return _unsampled_interval(noise_multiplier, num_releases, delta)
  if isinstance(event, dp_accounting.TruncatedSubsampledGaussianDpEvent):
    noise_multiplier /= 2  # A cut batch moves by twice the norm bound.
  # Size of epsilon: without sampling, and if that is large, with it. Only
  # accuracy depends on this.
  scale = _unsampled_scale(noise_multiplier, num_releases, delta)
  if scale > 50:
    like = participation
    if isinstance(participation, participation_lib.TruncatedPoisson):
      like = participation_lib.Poisson(
        sampling_prob=participation.sampling_prob
      )
    elif isinstance(participation, participation_lib.BallsInBins):
      like = participation_lib.Poisson(sampling_prob=1 / participation.num_bins)
      num_releases *= participation.num_bins
    with quiet_orders():
      sampled = like.release(noise_multiplier)
      scale = min(scale, _rdp_epsilon(sampled, num_releases, delta))
  return _bounded_interval(noise_multiplier, scale)


def _unsampled_interval(
  noise_multiplier: float, num_releases: int, delta: float
) -> float:
  """The same without sampling: the composition is one Gaussian release."""
  return _bounded_interval(
    noise_multiplier / math.sqrt(num_releases),
    _unsampled_scale(noise_multiplier, num_releases, delta),
  )


def _unsampled_scale(
  noise_multiplier: float, num_releases: int, delta: float
) -> float:
  """Epsilon without sampling, about (Bun and Steinke 2016, Prop. 1.3)."""
  rho = num_releases / (2 * noise_multiplier**2)
  return rho + 2 * math.sqrt(rho * math.log(1 / delta))


def _bounded_interval(noise_multiplier: float, scale: float) -> float:
  """A power of two times the default, for an epsilon of about `scale`."""
  # Of one release: exact would be 1 / (2 s^2) + x / s at x deviations.
  largest_loss = 1 / noise_multiplier**2 + 10 / noise_multiplier
  wanted = max(scale / 50 * _DISCRETIZATION, largest_loss / 2e6)
  doublings = max(0, math.ceil(math.log2(wanted / _DISCRETIZATION)))
  return _DISCRETIZATION * 2**doublings


def _close_enough(spent: float, target: float) -> bool:
  """At most the target, and within the tolerance of it."""
  return target * (1 - _CALIBRATION_TOLERANCE) <= spent <= target


def _interpolate(
  low: float, low_spent: float, high: float, high_spent: float, target: float
) -> float:
  """Next guess: on the log-log chord, away from the ends of the bracket."""
  log_low, log_high = math.log(low), math.log(high)
  share = 0.5
  if high_spent > 0 and math.isfinite(low_spent):
    aim = target * (1 - _CALIBRATION_TOLERANCE / 2)
    share = math.log(low_spent / aim) / math.log(low_spent / high_spent)
  share = min(max(share, 0.05), 0.95)
  return math.exp(log_low + share * (log_high - log_low))


def _unreachable(
  target: float, noise_multiplier: float, reached: float, remedy: str
) -> None:
  """Raises for a target that no noise reaches."""
  checks.fail(
    "a target epsilon that noise can reach within 0.2 % from below",
    remedy,
    epsilon=target,
    largest_noise_multiplier_tried=noise_multiplier,
    epsilon_it_reached=reached,
  )


def _round_up(steps: int, num_steps: int) -> int:
  """Smallest grid point that is not below `steps`; 0 stays 0."""
  # Grid points: ceil(num_steps * (i / 64)**2), i = 1..64. Start one below the
  # estimate, so that rounding in the square root cannot skip a point.
  if steps == 0:
    return 0
  first = math.isqrt(steps * _MAX_GRID_POINTS**2 // num_steps)
  for i in range(max(first - 1, 1), _MAX_GRID_POINTS + 1):
    point = -(-num_steps * i * i // _MAX_GRID_POINTS**2)
    if point >= steps:
      return point
  return num_steps
