"""The one interface through which a model touches its parameters.

Models never multiply by a weight themselves: they hand the weight and its input
to a `ParamOps`. The plain implementation multiplies. An engine that needs
per-example gradient norms hands the model another implementation with the same
four operations, so a model is written once and a new layer is private the day
its operation has a rule (design: "models and privacy never meet").

Letters: B batch, `...` any axes, I input features, O output features, V rows,
D columns, C channels.
"""

from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


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

  def conv(
    self,
    name: str,
    weight: Float[Array, "KH KW C O"],
    x: Float[Array, "*b H W C"],
    stride: int,
  ) -> Float[Array, "*b H2 W2 O"]:
    """Two-dimensional convolution with SAME padding, any pictures a row."""
    ...


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

  def conv(self, name, weight, x, stride):
    """See `ParamOps.conv`."""
    kernel_height, kernel_width, channels, features = weight.shape
    matrix = weight.reshape(kernel_height * kernel_width * channels, features)
    return self.dense(
      name, matrix, patches(x, (kernel_height, kernel_width), stride)
    )


def _aligned(weight: Array, x: Array) -> Array:
  """Adds leading axes, so that no rank promotion is silent."""
  return weight.reshape((1,) * (x.ndim - 1) + weight.shape)


PLAIN = PlainOps()
