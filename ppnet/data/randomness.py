"""Generators for random transformations."""

import hashlib

import numpy as np


def generator(
  seed: int, *, visit: int, record: int, view: int, stream: int
) -> np.random.Generator:
  """A generator that depends on these integers alone."""
  text = f"{seed},{visit},{record},{view},{stream}".encode()
  key = int.from_bytes(hashlib.blake2b(text, digest_size=16).digest())
  return np.random.Generator(np.random.Philox(key=key))
