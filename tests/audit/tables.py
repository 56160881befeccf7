"""Tables of models whose best attack is known in closed form."""

import numpy as np


def design(num_pairs, num_records, rng):
  """Membership bool[2K, n] and partner i64[2K] of fair coins."""
  coins = rng.random((num_pairs, num_records)) < 0.5
  membership = np.stack([coins, ~coins], axis=1).reshape(-1, num_records)
  models = np.arange(2 * num_pairs)
  return membership, models ^ 1


def with_target(membership, partner, rng):
  """A finished run in front, which has no partner."""
  first = rng.random((1, membership.shape[1])) < 0.5
  shifted = np.where(partner >= 0, partner + 1, -1)
  return np.concatenate([first, membership]), np.append(-1, shifted)


def gaussian_margins(membership, rng, *, shift, spread=5.0):
  """Records differ by `spread`; a member's margin lies `shift` higher."""
  level = rng.normal(0, spread, membership.shape[1])
  noise = rng.normal(size=membership.shape)
  return level + noise + shift * membership


def losses_of(margins):
  """Minus the loss whose logit is the margin: log of a sigmoid."""
  return -np.logaddexp(0, -margins)
