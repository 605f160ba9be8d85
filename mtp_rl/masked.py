"""Masked reductions; each loss aggregation stands here once."""

import jax.numpy as jnp

AGGREGATIONS = ('token-mean', 'seq-mean-token-sum', 'seq-mean-token-mean',
                'seq-mean-token-sum-norm')


def total(x, where, axis=None):
  """Return the float32 sum of x over where; 0 where nothing is selected."""
  return jnp.sum(jnp.where(where, x, 0).astype(jnp.float32), axis=axis)


def mean(x, where, axis=None):
  """Return the float32 mean of x over where; 0 where nothing is selected."""
  count = jnp.sum(jnp.broadcast_to(where, x.shape), axis=axis)
  return total(x, where, axis) / jnp.maximum(count, 1)


def aggregate(x, mask, how):
  """Reduce a token-indexed loss to a scalar.

  Denominators are those of the arrays passed in, so pass the whole minibatch.

  Args:
    x: float [B, S].
    mask: bool [B, S].
    how: 'token-mean' (sum / valid tokens), 'seq-mean-token-sum',
      'seq-mean-token-mean' (both over rows that have a valid token), or
      'seq-mean-token-sum-norm' (sum / (rows * S), the constant of Dr.GRPO).

  Returns:
    float32 []; 0 where no token is valid.

  Raises:
    ValueError: how is none of the four.
  """
  if how == 'token-mean':
    return mean(x, mask)
  filled = jnp.any(mask, axis=-1)
  rows = jnp.maximum(jnp.sum(filled), 1)
  if how == 'seq-mean-token-sum':
    return total(x, mask) / rows
  if how == 'seq-mean-token-mean':
    return jnp.sum(mean(x, mask, axis=-1)) / rows
  if how == 'seq-mean-token-sum-norm':
    return total(x, mask) / (rows * x.shape[-1])
  raise ValueError(f'aggregation {how!r} is none of {AGGREGATIONS}')

