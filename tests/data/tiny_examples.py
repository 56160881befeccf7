"""Examples without files: a record says in every way that it is itself."""

import dataclasses

import grain
import numpy as np

from ppnet import config as config_lib
from ppnet.data import examples as examples_lib
from ppnet.data import layout as layout_lib
from ppnet.data import pipeline, sources, tokenizers
from tests.data import conftest


class Tiny:
  """A source whose record i says that it is i, in its picture and its text."""

  def __init__(self, count: int):
    self._count = count

  def __len__(self) -> int:
    return self._count

  def __getitem__(self, index) -> sources.Record:
    position = index.__index__()
    assert 0 <= position < self._count
    return sources.Record(
      id=f"r{position}",
      media={"image": (bytes([position + 1]),)},
      text="x" * position,
      label=0,
    )

  def user(self, index) -> None:
    return None

  @property
  def description(self) -> str:
    return "a tiny source"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spread(grain.transforms.Map):
  """A byte -> [2, 3] of its value."""

  kind = "decode"

  def map(self, element):
    value = element["image"][0]
    return {**element, "image": np.full((2, 3), value, np.float32)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Jitter(grain.transforms.RandomMap):
  """Adds one draw to all of a picture."""

  kind = "augmentation"

  def random_map(self, element, rng):
    return {**element, "image": element["image"] + np.float32(rng.random())}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Halve(grain.transforms.Map):
  """Divides by two, and subtracts one: padding would not stay zero."""

  kind = "normalisation"
  elementwise = True

  def map(self, element):
    return {**element, "image": element["image"] / 2 - 1}


def examples(
  count: int, *, transforms=(Spread(),), lengths=(), has_text=False, seed=7
) -> examples_lib.Examples:
  """Examples of a `Tiny` source."""
  config = conftest.digits_config()
  config.data.tokenizer = config_lib.TokenizerKind.BYTES
  config.data.vocab_size = config.model.decoder.vocab_size = 300
  config.data.prompt = ""
  config.data.image_size = 1
  config.data.lengths = lengths
  config.model.image = config_lib.ImageStemConfig(channels=(1,), strides=(1,))
  return examples_lib.Examples(
    Tiny(count),
    layout=layout_lib.Layout(
      config,
      counts={"image": (1, 1)},
      has_text=has_text,
      tokenizer=tokenizers.ByteTokenizer(class_names=["a", "b"]),
    ),
    chains={"image": examples_lib.Chain(transforms, shape=(2, 3))},
    skip=False,
    cache=True,
    seed=seed,
  )


def steps(dataset, draw, **options):
  """`pipeline.train_steps` with small options."""
  options = {
    "num_steps": 5,
    "microbatch_size": 4,
    "num_threads": 2,
    "prefetch_steps": 3,
    **options,
  }
  return pipeline.train_steps(dataset, draw=draw, **options)


def assert_equal(ours, theirs):
  """Holds two steps or batches to be equal, dtypes included."""
  assert ours.keys() == theirs.keys()
  for name, value in ours.items():
    if isinstance(value, dict):
      assert_equal(value, theirs[name])
    elif isinstance(value, list):
      for mine, other in zip(value, theirs[name], strict=True):
        assert_equal(mine, other)
    else:
      np.testing.assert_array_equal(value, theirs[name])
      assert np.asarray(value).dtype == np.asarray(theirs[name]).dtype
