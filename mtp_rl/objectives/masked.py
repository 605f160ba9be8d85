"""Masked reductions and the aggregations of token losses.

Each row of a [B, S] array is one sequence, unless `Sequences` says which
sequences its columns belong to.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

AGGREGATIONS = ('token-mean', 'seq-mean-token-sum', 'seq-mean-token-mean',
                'seq-mean-token-sum-norm')


class Sequences(NamedTuple):
  """Where the sequences of a [B, S] array lie.

  Attributes:
    segments: int32 [B, S], the sequence of its row that a column belongs to,
      1 .. S, and 0 at padding; None where each row is one sequence.
    max_response: rollout.max_response in tokens, the constant of
      'seq-mean-token-sum-norm'; None: S, where each row is one sequence.
  """
  segments: jax.Array | None = None
  max_response: int | None = None


ROWS = Sequences()  # one sequence a row


def total(x, where, axis=None):
  """Return the float32 sum of x over where; 0 where nothing is selected."""
  return jnp.sum(jnp.where(where, x, 0).astype(jnp.float32), axis=axis)


def mean(x, where, axis=None):
  """Return the float32 mean of x over where; 0 where nothing is selected."""
  count = jnp.sum(jnp.broadcast_to(where, x.shape), axis=axis)
  return total(x, where, axis) / jnp.maximum(count, 1)


def _by_sequence(x, segments):
  """Return the sums of x over each sequence, [B, 1] or [B, S + 1]."""
  if segments is None:
    return jnp.sum(x, axis=-1, keepdims=True)
  # Row by row, so that a mesh can split the rows. S + 1 bins always suffice:
  # a row of S columns has at most S sequences.
  add = lambda x, s: jax.ops.segment_sum(x, s, x.shape[0] + 1)
  return jax.vmap(add)(x, segments)


def sequence_means(x, where, segments=None):
  """Return each sequence's mean of x over `where`, and its token count.

  Args:
    x: float [B, S].
    where: bool [B, S].
    segments: see `Sequences`.

  Returns:
    float32 means, 0 where nothing is selected, and int32 counts: [B, 1], or
    [B, S + 1] with column n for segment n of the row.
  """
  count = _by_sequence(where.astype(jnp.int32), segments)
  sums = _by_sequence(jnp.where(where, x, 0).astype(jnp.float32), segments)
  return sums / jnp.maximum(count, 1), count


def spread(values, segments=None):
  """Broadcast each sequence's value to its columns; see `sequence_means`.

  Args:
    values: [B, 1] or [B, S + 1].
    segments: see `Sequences`.

  Returns:
    [B, 1] or [B, S].
  """
  if segments is None:
    return values
  return jnp.take_along_axis(values, segments, axis=1)


def aggregate(x, mask, how, sequences=ROWS):
  """Reduce a token-indexed loss to a scalar.

  Denominators are those of the arrays passed in, so pass the whole minibatch.

  Args:
    x: float [B, S].
    mask: bool [B, S].
    how: 'token-mean' (sum / valid tokens), 'seq-mean-token-sum',
      'seq-mean-token-mean' (both over sequences that have a valid token),
      or 'seq-mean-token-sum-norm' (sum / (sequences * S), the constant of
      Dr.GRPO; `Sequences.max_response` in place of S where it is given).
    sequences: `Sequences`.

  Returns:
    float32 []; 0 where no token is valid.

  Raises:
    ValueError: `how` is unknown, or sequences share rows and
      'seq-mean-token-sum-norm' lacks `Sequences.max_response`.
  """
  chex.assert_rank(x, 2)
  chex.assert_equal_shape([x, mask])
  if how == 'token-mean':
    return mean(x, mask)
  segments, max_response = sequences
  means, counts = sequence_means(x, mask, segments)
  filled = jnp.maximum(jnp.sum(counts > 0), 1)
  if how == 'seq-mean-token-sum':
    return total(x, mask) / filled
  if how == 'seq-mean-token-mean':
    return jnp.sum(means) / filled
  if how == 'seq-mean-token-sum-norm':
    if segments is not None and max_response is None:
      raise ValueError('a packed row does not tell the longest response; '
                       'set Sequences.max_response')
    return total(x, mask) / (filled * (max_response or x.shape[-1]))
  raise ValueError(f'aggregation {how!r} is none of {AGGREGATIONS}')

