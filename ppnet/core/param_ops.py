"""The one interface through which a model touches its parameters.

Models never multiply by a weight themselves: they hand the weight and its input
to a `ParamOps`. The plain implementation multiplies. An engine that needs
per-example gradient norms hands the model another implementation with the same
operations, so a model is written once and a new layer is private the day
its operation has a rule (design: "models and privacy never meet").

Letters: B batch, `...` any axes, I input features, O output features, V rows,
D columns, C channels.
"""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_EPS = 1e-5  # Added to a column's squared norm.


@runtime_checkable
class ParamOps(Protocol):
  """Every parametrised operation a model may use.

  `name` is the parameter's path, so that an engine without a rule can name the
  layer in its error.
  """

  def dense(
    self, name: str, weight: Float[Array, "I O"], x: Float[Array, "*b I"]
  ) -> Float[Array, "*b O"]:
    """x @ weight."""
    ...

  def embed(
    self, name: str, table: Float[Array, "V D"], ids: Int[Array, "*b"]
  ) -> Float[Array, "*b D"]:
    """Rows of `table`; an id may occur many times in one example."""
    ...

  def scale(
    self, name: str, weight: Float[Array, " D"], x: Float[Array, "*b D"]
  ) -> Float[Array, "*b D"]:
    """x * weight, one factor per feature."""
    ...

  def bias(
    self, name: str, weight: Float[Array, " D"], x: Float[Array, "*b D"]
  ) -> Float[Array, "*b D"]:
    """x + weight, one term per feature."""
    ...

  def standardised_dense(
    self, name: str, weight: Float[Array, "I O"], x: Float[Array, "*b I"]
  ) -> Float[Array, "*b O"]:
    """x @ standardised(weight); the parameter is what was standardised."""
    ...

  def conv(
    self,
    name: str,
    weight: Float[Array, "KH KW C O"],
    x: Float[Array, "*b H W C"],
    stride: int,
    *,
    is_standardised: bool = False,
  ) -> Float[Array, "*b H2 W2 O"]:
    """Two-dimensional convolution with SAME padding, any pictures a row.

    `is_standardised`: with the kernel standardised, see `standardised_dense`.
    """
    ...


def standardised(weight: Float[Array, "I O"]) -> Float[Array, "I O"]:
  """Each column less its mean, then divided by its Euclidean norm.

  Qiao et al. 2019, section 3 (https://arxiv.org/abs/1903.10520), over a
  kernel's whole receptive field, and scaled by the root of its size as in Brock
  et al. 2021 (https://arxiv.org/abs/2101.08692): so the output is as large as
  that of a random kernel of unit gain. Computed in float32; the dtype stays.

  | edge case | result |
  | --- | --- |
  | a constant column | zeros, and a finite gradient |
  | I = 1 | zeros: there is nothing but the mean |
  """
  return _standardised(weight.astype(jnp.float32)).astype(weight.dtype)


@jax.custom_vjp
def _standardised(weight: jax.Array) -> jax.Array:
  """`standardised` of float32."""
  return _standardised_forward(weight)[0]


def _standardised_forward(weight: jax.Array) -> tuple[jax.Array, Any]:
  """The result, and what its derivative needs."""
  centred = weight - jnp.mean(weight, axis=0, keepdims=True)
  squared = jnp.sum(jnp.square(centred), axis=0, keepdims=True)
  inverse = jax.lax.rsqrt(squared + _EPS)
  return centred * inverse, (centred * inverse, inverse)


def _standardised_backward(kept: Any, g: jax.Array) -> tuple[jax.Array]:
  """What is left of g without its mean and its part along the result.

  JAX derives the same, but for many cotangents at once XLA's CPU backend then
  sums a column again for each of its entries: 380 times as long.
  """
  result, inverse = kept
  along = jnp.sum(g * result, axis=0, keepdims=True)
  mean = jnp.mean(g, axis=0, keepdims=True)
  return (inverse * (g - mean - result * along),)


_standardised.defvjp(_standardised_forward, _standardised_backward)


def patches(
  x: Float[Array, "*b H W C"], kernel_size: tuple[int, int], stride: int
) -> Float[Array, "*b H2 W2 K"]:
  """Gathers each output position's receptive field, K = KH * KW * C.

  Written with slices instead of a convolution: under `vmap` over examples the
  weight gradient is then a matrix product, where XLA's CPU backend would run a
  slow batch-grouped convolution, and a ghost rule for convolution is the one
  for `dense`.
  """
  *leading, height, width, _ = x.shape
  out_height, out_width = -(-height // stride), -(-width // stride)
  kernel_height, kernel_width = kernel_size
  pad_height = max((out_height - 1) * stride + kernel_height - height, 0)
  pad_width = max((out_width - 1) * stride + kernel_width - width, 0)
  padded = jnp.pad(
    x,
    (
      *[(0, 0)] * len(leading),
      (pad_height // 2, pad_height - pad_height // 2),
      (pad_width // 2, pad_width - pad_width // 2),
      (0, 0),
    ),
  )
  columns = [
    padded[
      ...,
      row : row + (out_height - 1) * stride + 1 : stride,
      column : column + (out_width - 1) * stride + 1 : stride,
      :,
    ]
    for row in range(kernel_height)
    for column in range(kernel_width)
  ]
  return jnp.stack(columns, axis=-2).reshape(
    *leading, out_height, out_width, -1
  )


def conv_factors(
  weight: Float[Array, "KH KW C O"], x: Float[Array, "*b H W C"], stride: int
) -> tuple[Float[Array, "K O"], Float[Array, "*b H2 W2 K"]]:
  """A convolution as a product: its kernel as a matrix, and the patches."""
  *kernel_size, _, features = weight.shape
  height, width = kernel_size
  return weight.reshape(-1, features), patches(x, (height, width), stride)


class PlainOps:
  """The plain implementation: multiplies, looks up, adds."""

  def dense(self, name, weight, x):
    """See `ParamOps.dense`."""
    del name  # Only engines with rules need it.
    return jnp.einsum("...i,io->...o", x, weight)

  def embed(self, name, table, ids):
    """See `ParamOps.embed`."""
    del name
    return jnp.take(table, ids, axis=0)

  def scale(self, name, weight, x):
    """See `ParamOps.scale`."""
    del name
    return x * _aligned(weight, x)

  def bias(self, name, weight, x):
    """See `ParamOps.bias`."""
    del name
    return x + _aligned(weight, x)

  def standardised_dense(self, name, weight, x):
    """See `ParamOps.standardised_dense`."""
    return self.dense(name, standardised(weight), x)

  def conv(self, name, weight, x, stride, *, is_standardised=False):
    """See `ParamOps.conv`."""
    product = self.standardised_dense if is_standardised else self.dense
    return product(name, *conv_factors(weight, x, stride))


def _aligned(weight: Array, x: Array) -> Array:
  """Adds leading axes, so that no rank promotion is silent."""
  return weight.reshape((1,) * (x.ndim - 1) + weight.shape)


PLAIN = PlainOps()
