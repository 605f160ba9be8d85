"""The streams of random numbers of a run, all derived from config.seed.

A random number depends only on the seed, the stream and the counters passed
to `key`, so a resumed run draws what an uninterrupted one would. Tasks draw
their problems from NumPy generators seeded in tasks/generated.py.
"""

import enum
import zlib

import jax
import jax.numpy as jnp
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


def identify(prompts, valid):
  """Return what the samples of each prompt depend on, uint32 [P, 2].

  That is a checksum of its tokens, and how many equal prompts stand before it:
  equal prompts get different samples.

  Args:
    prompts: int32 [P, R], NumPy array.
    valid: bool [P, R].
  """
  seen, out = {}, np.zeros((len(prompts), 2), np.uint32)
  for row, (tokens, there) in enumerate(zip(prompts, valid)):
    name = zlib.crc32(np.ascontiguousarray(tokens[there], '<i4').tobytes())
    out[row] = name, seen.get(name, 0)
    seen[name] = seen.get(name, 0) + 1
  return out


def row_keys(key, prompts, group):
  """Return the PRNG keys [B] of the samples of P prompts.

  Args:
    key: PRNG key of the rollout.
    prompts: uint32 [P, 2], from `identify`.
    group: G.
  """
  one = lambda prompt, sample: fold(
      key, prompt[0], prompt[1] * jnp.uint32(group) + sample)
  every = lambda prompt: jax.vmap(lambda i: one(prompt, i))(
      jnp.arange(group, dtype=jnp.uint32))
  return jax.vmap(every)(prompts).reshape(-1)
