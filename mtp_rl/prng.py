"""The streams of random numbers of a run, all derived from config.seed.

A random number depends only on the seed, the stream and the counters passed
to `key`, so a resumed run draws what an uninterrupted one would. Tasks draw
their problems from NumPy generators seeded in tasks/generated.py.
"""

import enum

import jax
import numpy as np


class Stream(enum.IntEnum):
  """The streams by purpose; changing a value changes every run's numbers."""
  PARAMETERS = 1  # initial parameters, or those of fresh MTP modules
  EVALUATION = 2  # samples of held-out problems
  ROLLOUT = 3  # samples of the RL phase
  POOL = 4  # the model's own samples that the warm-up imitates


class Draw(enum.IntEnum):
  """What is drawn at one place of a completion."""
  TOKEN = 0
  DRAFT = 1  # the draft, where it is verified by rejection
  ACCEPT = 2  # whether the draft is accepted


def run_key(seed):
  """Return the key that all streams of a run start from."""
  return jax.random.key(seed)


def key(start, stream, *counters):
  """Return the key of a stream at some counters.

  Args:
    start: key from `run_key`.
    stream: `Stream`.
    *counters: ints, folded in one after the other.
  """
  return fold(jax.random.fold_in(start, int(stream)), *counters)


def fold(start, *counters):
  """Return a key with counters folded in one after the other."""
  for counter in counters:
    start = jax.random.fold_in(start, counter)
  return start


def generator(seed, stream, *counters):
  """Return the NumPy generator of a stream at some counters."""
  return np.random.default_rng([seed, int(stream), *counters])
