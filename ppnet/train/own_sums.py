"""Clipped sums that replicas keep to themselves until the end of a step.

A step's batch is cut into microbatches, and each microbatch over the devices.
Reducing the sum over all devices after each microbatch would send all
parameters' gradients over the network as often as there are microbatches.
Replicas need not: each adds up the examples that it holds, and `combine` adds
up the replicas, once (Zhao et al. 2023, section 3.3.1,
https://arxiv.org/abs/2304.11277, "gradient accumulation without
communication"). Clipping is done before, of each example by itself, so the sum
is the same one.

Which axes are replicas in this sense: `sharding.rules.Rules.own_sums`.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ppnet.sharding import rules as rules_lib
from ppnet.train import step as step_lib


def init(
  params: Any, *, mesh: Mesh, rules: rules_lib.Rules
) -> step_lib.GradSum:
  """`step.init_grad_sum`, one for each replica.

  Returns:
    Leaves [R, ...] for R replicas; [...] where there is one.
  """
  empty = step_lib.init_grad_sum(params)
  replicas = num_replicas(mesh, rules)
  if replicas == 1:
    return empty
  return jax.tree.map(
    lambda leaf: jnp.broadcast_to(leaf, (replicas, *leaf.shape)), empty
  )


def shardings(
  param_shardings: Any, *, mesh: Mesh, rules: rules_lib.Rules
) -> step_lib.GradSum:
  """Where the leaves of `init` live: each replica's on the replica."""
  axes = rules.own_sums(mesh)
  own = (axes,) if axes else ()
  each = NamedSharding(mesh, P(*own))
  return step_lib.GradSum(
    total=jax.tree.map(
      lambda sharding: NamedSharding(mesh, P(*own, *sharding.spec)),
      param_shardings,
    ),
    num_units=each,
    count=each,
  )


def accumulate(
  fn: Callable[..., tuple[step_lib.GradSum, step_lib.PerExample]],
  *,
  mesh: Mesh,
  rules: rules_lib.Rules,
) -> Callable[..., tuple[step_lib.GradSum, step_lib.PerExample]]:
  """`step.accumulate` by each replica, of its rows to its sum.

  Args:
    fn: (grad_sum, params, microbatch, *others), all of it of one replica.
    mesh: the devices.
    rules: where parameters and examples live on them.

  Returns:
    A function of the same arguments, with grad_sum from `init` and the rows of
    all replicas.
  """
  axes = rules.own_sums(mesh)
  if not axes:
    return fn

  def on_replica(grad_sum, params, microbatch, *others):
    own = jax.tree.map(lambda leaf: leaf[0], grad_sum)
    own, parts = fn(own, params, microbatch, *others)
    return jax.tree.map(lambda leaf: leaf[None], own), parts

  def on_replicas(grad_sum, params, microbatch, *others):
    return jax.shard_map(
      on_replica,
      mesh=mesh,
      in_specs=(P(axes), P(), P(axes), *[P()] * len(others)),
      out_specs=(P(axes), P(axes)),
      check_vma=False,  # Kernels do not say over what their results vary.
    )(grad_sum, params, microbatch, *others)

  return on_replicas


def combine(
  grad_sum: step_lib.GradSum, *, mesh: Mesh, rules: rules_lib.Rules
) -> step_lib.GradSum:
  """The sum over all replicas, in float32."""
  if num_replicas(mesh, rules) == 1:
    return grad_sum
  return jax.tree.map(lambda leaf: leaf.sum(axis=0), grad_sum)


def num_replicas(mesh: Mesh, rules: rules_lib.Rules) -> int:
  """R: how many sums there are."""
  return math.prod(mesh.shape[axis] for axis in rules.own_sums(mesh))
