"""One record through a list of transforms, every stage kept.

For figures, tables and tests, which show what a pipeline does. A training
pipeline applies the same transforms and keeps the end alone.

>>> import numpy as np
>>> from ppnet.data import image
>>> element = {"id": "a", "image": image.encode_png(np.zeros((4, 4), np.uint8))}
>>> chain = [
...   image.Decode(image_size=4, image_channels=1, as_uint8=True),
...   image.MinMax(),
... ]
>>> [stage.value.dtype.name for stage in trace(chain, element, "image", seed=0)]
['uint8', 'float32']
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import grain

from ppnet.core import checks
from ppnet.data import randomness

KINDS = ("decode", "normalisation", "feature extraction", "augmentation")

Transform = grain.transforms.Map | grain.transforms.RandomMap


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
  """What came out of a transform.

  Attributes:
    transform: the transform.
    value: pixels, samples, frames or ids, an array; or text, a str.
  """

  transform: Any  # A `Transform` that also has `kind` and `label`.
  value: Any


def is_random(transform: Transform) -> bool:
  """Whether a transform draws random numbers."""
  return isinstance(transform, grain.transforms.RandomMap)


def map_many(
  transform: Any, elements: Sequence[Mapping[str, Any]]
) -> Sequence[Mapping[str, Any]]:
  """Applies a fixed transform to elements, each of which stays by itself.

  Side by side where the transform has a `map_many`, which is faster for
  products of matrices; one after the other where it has none.
  """
  if hasattr(transform, "map_many"):
    return transform.map_many(elements)
  return [transform.map(element) for element in elements]


def trace(
  transforms: Sequence[Transform],
  element: Mapping[str, Any],
  modality: str,
  *,
  seed: int,
  record: int = 0,
  view: int = 0,
  augment: bool = True,
) -> list[Stage]:
  """Applies transforms one after the other.

  Args:
    transforms: in order.
    element: holds "id" and the encoded item under the modality's name.
    modality: "image", "audio" or "text".
    seed: of `randomness.generator`; the stream of a transform is its place in
      the list, the visit is 0.
    record: position of the record.
    view: which of its views.
    augment: whether random transforms are applied; False is what evaluation
      sees.

  Returns:
    A stage for each transform that was applied.

  Raises:
    ValueError: the element does not hold the modality, or a transform is of no
      kind in `KINDS`.
    sources.BadRecordError: the record cannot be used.
  """
  if modality not in element:
    checks.fail(f"an element with {modality!r}", element=sorted(element))
  stages = []
  for place, transform in enumerate(transforms):
    kind = getattr(transform, "kind", None)
    if kind not in KINDS:
      checks.fail(
        f"a transform whose kind is one of {KINDS}",
        transform=type(transform).__name__,
        kind=kind,
      )
    if isinstance(transform, grain.transforms.RandomMap):
      if not augment:
        continue
      rng = randomness.generator(
        seed, visit=0, record=record, view=view, stream=place
      )
      element = transform.random_map(element, rng)
    else:
      element = transform.map(element)
    stages.append(Stage(transform=transform, value=element[modality]))
  return stages
