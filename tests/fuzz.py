"""Helpers of the fuzz tests: the number of examples, and ways to damage bytes."""

import os
import random

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

# Multiplies the examples of each test; above 1 they also differ in each run, to find more bugs.
FACTOR = int(os.environ.get("FLAX_CIFAR_FUZZ", "1"))


def fuzz(examples: int) -> settings:
  """Settings for a test with `examples` examples, the same ones in every run if FACTOR is 1."""
  return settings(
    max_examples=examples * FACTOR,
    derandomize=FACTOR == 1,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
  )


def damaged(blob: bytes) -> st.SearchStrategy[bytes]:
  """`blob` with some bits flipped, or a part cut out, made zero, doubled or replaced."""
  return st.randoms(use_true_random=False).map(lambda rng: damage(blob, rng))


def damage(blob: bytes, rng: random.Random) -> bytes:
  data, start = bytearray(blob), rng.randrange(len(blob))
  length = rng.choice((1, 4, 64, 1024))
  match rng.randrange(6):
    case 0:
      for _ in range(rng.choice((1, 2, 8, 64))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    case 1:
      del data[start:]
    case 2:
      del data[start : start + length]
    case 3:
      data[start : start + length] = bytes(length)
    case 4:
      data[start:start] = data[start : start + length]
    case _:
      data[start : start + length] = rng.randbytes(length)
  return bytes(data)
