"""Choosing the best run: bounds against divergences known exactly."""

import numpy as np
import pytest
from dp_accounting import dp_event, rdp
from scipy import special

from ppnet.privacy import selection

ORDERS = selection.ORDERS


def divergence(p, q, order):
  """Renyi divergence of two distributions on the same few outcomes."""
  exponents = order * np.log(p) + (1 - order) * np.log(q)
  return special.logsumexp(exponents) / (order - 1)


def exact_curve(p, q):
  """Of both directions the larger, at every order."""
  return np.array(
    [max(divergence(p, q, a), divergence(q, p, a)) for a in ORDERS]
  )


def best_of(p, generating):
  """Law of the largest of K outcomes; mass that is left over is "no run"."""
  below = generating(np.concatenate([[0.0], np.cumsum(p)]))
  law = np.diff(below)
  return np.append(law, below[0]) if below[0] > 0 else law


# Outcomes in the order of their scores: what leaks is rare and best, or common.
CASES = [
  (np.array([0.99, 0.01]), np.array([0.98, 0.02])),
  (np.array([0.6, 0.4]), np.array([0.4, 0.6])),
  (np.array([0.9, 0.09, 0.01]), np.array([0.85, 0.12, 0.03])),
]
MEAN = 20.0


def poisson(at):
  return np.exp(MEAN * (at - 1))


def geometric(at):
  stop = 1 / MEAN
  return stop * at / (1 - (1 - stop) * at)


@pytest.mark.parametrize("case", range(len(CASES)))
@pytest.mark.parametrize(
  ("generating", "bound"),
  [
    (poisson, selection.best_of_poisson),
    (geometric, selection.best_of_geometric),
  ],
)
def test_bounds_hold_for_mechanisms_of_which_all_is_known(
  case, generating, bound
):
  p, q = CASES[case]
  one = exact_curve(p, q)
  bounded = bound(one, mean_runs=MEAN)
  exact = exact_curve(best_of(p, generating), best_of(q, generating))
  assert (exact <= bounded + 1e-9).all()
  # One run's own curve would not do: the choice leaks.
  assert (exact > one * 1.05).any()
  # Fails if: the number of runs, or the second term, is left out.


GAUSSIAN = ORDERS / (2 * 2.5**2)


@pytest.mark.parametrize("shape", [0.5, 1.0, 3.0, np.inf])
@pytest.mark.parametrize("mean_runs", [2.0, 12.5, 300.0])
def test_bounds_are_those_of_dp_accounting(shape, mean_runs):
  accountant = rdp.RdpAccountant(list(ORDERS))
  accountant.compose(
    dp_event.RepeatAndSelectDpEvent(
      dp_event.GaussianDpEvent(2.5), mean_runs, shape
    )
  )
  if shape == np.inf:
    found = selection.best_of_poisson(GAUSSIAN, mean_runs=mean_runs)
  else:
    found = selection.best_of_truncated_negative_binomial(
      GAUSSIAN, mean_runs=mean_runs, shape=shape
    )
  for delta in (1e-3, 1e-5, 1e-8):
    np.testing.assert_allclose(
      selection.epsilon(found, delta=delta),
      accountant.get_epsilon(delta),
      rtol=1e-6,
    )


def test_theorem_2_by_hand():
  """One order of each kind, from the printed formula."""
  one = ORDERS * 0.02
  order, mean = 16.0, 8.0
  place = list(ORDERS).index(order)
  second = min((1 - 1 / m) * 0.02 * m + np.log(mean) / m for m in ORDERS)
  expected = 0.02 * order + 2 * second + np.log(mean) / (order - 1)
  found = selection.best_of_geometric(one, mean_runs=mean)
  assert found[place] == pytest.approx(expected, rel=1e-9)


def test_a_run_s_curve_is_the_gaussian_s_where_nothing_is_sampled():
  found = selection.curve(noise_multiplier=2.5, sampling_prob=1.0, num_steps=4)
  np.testing.assert_allclose(found, 4 * GAUSSIAN)
  sampled = selection.curve(
    noise_multiplier=2.5, sampling_prob=0.1, num_steps=4
  )
  assert (sampled < found).all()


def test_runs_compose_and_the_worst_holds_for_all():
  found = selection.composed([GAUSSIAN, 2 * GAUSSIAN])
  np.testing.assert_allclose(found, 3 * GAUSSIAN)
  crossing = [np.linspace(0, 1, len(ORDERS)), np.linspace(1, 0, len(ORDERS))]
  assert selection.worst(crossing).min() >= 0.5 - 0.01


def test_the_best_of_random_runs_costs_less_than_all_of_them():
  one = selection.epsilon(GAUSSIAN, delta=1e-5)
  best = selection.epsilon(
    selection.best_of_poisson(GAUSSIAN, mean_runs=30), delta=1e-5
  )
  all_of_them = selection.epsilon(30 * GAUSSIAN, delta=1e-5)
  assert one < best < 0.7 * all_of_them


def test_without_noise_there_is_no_guarantee_and_without_steps_no_cost():
  none = selection.curve(noise_multiplier=0, sampling_prob=0.5, num_steps=1)
  for values in (
    none,
    selection.composed([none, GAUSSIAN]),
    selection.best_of_poisson(none, mean_runs=3),
    selection.best_of_geometric(none, mean_runs=3),
  ):
    assert selection.epsilon(values, delta=1e-5) == np.inf
  rest = selection.curve(noise_multiplier=1.0, sampling_prob=0.5, num_steps=0)
  assert not rest.any()


@pytest.mark.parametrize(
  ("call", "says"),
  [
    (lambda: selection.best_of_poisson(GAUSSIAN, mean_runs=0.5), ">= 1"),
    (lambda: selection.best_of_geometric(GAUSSIAN, mean_runs=1), "> 1"),
    (
      lambda: selection.best_of_truncated_negative_binomial(
        GAUSSIAN, mean_runs=3, shape=0
      ),
      "shape",
    ),
    (lambda: selection.epsilon(GAUSSIAN, delta=0), "delta"),
  ],
)
def test_what_no_theorem_covers_is_refused(call, says):
  with pytest.raises(ValueError, match=says):
    call()


def test_an_order_that_is_left_out_is_infinite_and_no_news(caplog):
  curve = selection.curve(
    noise_multiplier=1.2671, sampling_prob=0.1365, num_steps=150
  )
  assert np.isinf(curve[0])
  assert np.isfinite(selection.epsilon(curve, delta=1e-5))
  assert not caplog.records
  # Fails if: a sweep prints each order that the accountant leaves out.
