"""Gaussian noise that is correlated over the steps: banded factorisation.

The sum of step t gets the t-th row of C^-1 z, z independent Gaussians and C a
lower-triangular matrix with `num_bands` bands. A part of each step's noise is
taken back in the next ones, so that less of it is left in the parameters, which
are sums over steps (Choquette-Choo et al. 2023,
https://arxiv.org/abs/2306.08153). The factorisation is that of
`jax_privacy.matrix_factorization`. Its recurrence is not used: a contraction
over the bands, which some accelerators round to bfloat16.

C^-1 has no bands: a row needs the noise of all steps before. What makes it
cheap is a recurrence over the last noises that were *added*, and they must be
remembered. Whoever has one of them and the released sum has the clipped sum
itself. So they are a state of their own, in memory alone (`num_bands` - 1 times
the parameters in float32), never in the train state and never in a checkpoint.
After a restart they are computed again where the noise is seeded, and forgotten
otherwise: then a new factorisation begins, which the ledger charges for.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ppnet.core import checks
from ppnet.privacy import noise


class BandedState(NamedTuple):
  """What the noise of later steps depends on. Secret: see the file's heading.

  Attributes:
    step: steps taken, i32[].
    history: for each leaf of the sum its last noises before scaling, the newest
      first, f32[num_bands - 1, ...]; zeros where there was no step.
  """

  step: Any
  history: Any


def banded_privatizer(
  *, noise_stddev: float, num_steps: int, num_bands: int
) -> optax.GradientTransformationExtraArgs:
  """Adds noise that is independent over the entries and correlated over steps.

  C is the square root of the matrix of prefix sums (Fichtenberger et al. 2023,
  https://arxiv.org/abs/2202.11205), cut to its first `num_bands` bands, each
  column then divided by its norm.

  *Formal guarantee.* Let each example contribute, with norm at most S, to the
  sums of steps that are `num_bands` or more apart. Then all sums together are
  one release of the Gaussian mechanism that adds noise of standard deviation
  `noise_stddev` to C times the sums; each contribution moves it by at most S,
  in rows that no other contribution of that example moves. So with the sampling
  of `participation.CyclicPoisson` a turn of `num_bands` steps is one sampled
  Gaussian release. It does not hold under sampling without that distance. From
  `start_at` on, the noise is independent of all before, the same matrix without
  its first rows and columns.

  | edge case | result |
  | --- | --- |
  | `num_bands` 1 | `noise.gaussian_privatizer`, exactly |
  | `noise_stddev` 0 | the sum in float32, exactly |
  | a key that is legacy, batched, or not threefry | `ValueError` |
  | more than `num_steps` updates | undefined: there is no such row |

  Args:
    noise_stddev: standard deviation of z (noise multiplier times sensitivity).
    num_steps: rows of C, >= 1.
    num_bands: bands of C, in [1, num_steps].

  Returns:
    A transformation `update(grad_sum, state, params=None, *, noise_key)` with a
    `BandedState`. `noise_key` is one typed threefry key, used up by the call.
    The updates are float32 in the structure of `grad_sum`.

  Raises:
    ValueError: an argument is out of range.
  """
  checks.non_negative(noise_stddev=noise_stddev)
  checks.positive(num_steps=num_steps, num_bands=num_bands)
  checks.at_most(num_steps, num_bands=num_bands)
  ratios, scales = _strategy(num_steps, num_bands)

  def init_fn(params: optax.Params) -> BandedState:
    # Nothing was added before the first step.
    return BandedState(
      step=jnp.int32(0),
      history=jax.tree.map(
        lambda leaf: jnp.zeros((num_bands - 1, *leaf.shape), jnp.float32),
        params,
      ),
    )

  def update_fn(
    grad_sum: optax.Updates,
    state: BandedState,
    params: optax.Params | None = None,
    *,
    noise_key: jax.Array,
    **extra_args: Any,
  ) -> tuple[optax.Updates, BandedState]:
    del params, extra_args  # Noise depends on keys and steps alone.
    drawn = noise.standard_normal(noise_key, grad_sum)
    lags = jnp.arange(num_bands)
    row = jnp.asarray(ratios)[jnp.maximum(state.step - lags, 0), lags]

    def solve(z: jax.Array, old: jax.Array) -> jax.Array:
      """Row t of C x = z (Algorithm 9 of the paper), for C with ones in it."""
      for lag in range(1, num_bands):
        z = z - row[lag] * old[lag - 1]
      return z

    solved = jax.tree.map(solve, drawn, state.history)
    scale = jnp.asarray(noise_stddev * scales)[state.step]
    noisy = jax.tree.map(
      lambda leaf, x: leaf.astype(jnp.float32) + scale * x, grad_sum, solved
    )
    history = jax.tree.map(
      lambda x, old: jnp.concatenate([x[None], old])[: num_bands - 1],
      solved,
      state.history,
    )
    return noisy, BandedState(step=state.step + 1, history=history)

  # Optax passes the first argument by position; its name says what may enter.
  # pyrefly: ignore [bad-argument-type]
  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@functools.lru_cache(maxsize=2)
def _strategy(num_steps: int, num_bands: int) -> tuple[np.ndarray, np.ndarray]:
  """C as the recurrence needs it.

  Computed outside of the program that uses it: otherwise its last digits, and
  so the noise, depend on how that is compiled.

  Returns:
    f32[T, num_bands] and f32[T]. The first at [j, k] is C[j + k, j] / C[j, j],
    so that no step divides; the second at j is 1 / C[j, j] for columns of
    norm 1.
  """
  # Here, because it takes a second and runs without such noise need not wait.
  from jax_privacy.matrix_factorization import banded

  with jax.ensure_compile_time_eval():
    columns = np.asarray(
      banded.ColumnNormalizedBanded.default(num_steps, num_bands).params,
      np.float64,
    )
  diagonal = columns[:, 0]
  scales = np.linalg.norm(columns, axis=1) / diagonal
  ratios = columns / diagonal[:, np.newaxis]
  return ratios.astype(np.float32), scales.astype(np.float32)


def start_at(state: Any, step: int, *, put: Callable[[Any], Any]) -> Any:
  """The state of a run that begins at `step` and remembers no noise.

  Args:
    state: a fresh state of either privatizer; that of independent noise is
      empty and stays so.
    step: number of the next step.
    put: places a small value on the devices.
  """
  if isinstance(state, BandedState):
    return state._replace(step=put(np.int32(step)))
  return state
