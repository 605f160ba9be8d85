"""Several completions of a minibatch in one row, so that less is padding.

A rollout's rows are prompts padded to R and completions padded to S columns.
For the update the sequences (a prompt and its completion, without padding)
move into as few rows of the same T = R + S columns as first-fit decreasing
finds. `types.RolloutBatch` says what a packed row looks like; losses, lambda
and gradients are those of the rows as they were, but for the order of sums.
"""

import numpy as np

from mtp_rl import sharding, types

_SIZES = 8  # numbers of rows that are compiled for, at most


def place(lengths, columns):
  """Return a row and a first column of each sequence: first-fit decreasing.

  Args:
    lengths: int [N], none longer than a row.
    columns: T.

  Returns:
    int [N] rows, int [N] columns and int [N] segments: its number in the row.
  """
  count = len(lengths)
  rows, first, segments = np.zeros((3, count), np.int64)
  used, held = np.zeros((2, count), np.int64)
  for i in np.argsort(-lengths, kind='stable'):
    row = np.argmax(used + lengths[i] <= columns)
    held[row] += 1
    rows[i], first[i], segments[i] = row, used[row], held[row]
    used[row] += lengths[i]
  return rows, first, segments


def row_count(needed, most, unit):
  """Return `needed` rounded up to one of at most `_SIZES` numbers of rows.

  Each number is compiled for once, when it is first met.

  Args:
    needed: rows that hold a sequence, at most `most`.
    most: B, a multiple of `unit`.
    unit: what a number of rows must be a multiple of.
  """
  step = -(-most // (_SIZES * unit)) * unit
  return min(-(-needed // step) * step, most)


def pack(batch, unit=1):
  """Return a `types.RolloutBatch` of packed rows, NumPy arrays.

  Args:
    batch: `types.RolloutBatch` with one completion a row; no prompt is empty,
      so the token before a completion is of its own sequence.
    unit: see `row_count`.
  """
  valid = np.asarray(batch.valid)
  most, columns = valid.shape
  lengths = valid.sum(1)
  rows, first, segments = place(lengths, columns)
  count = row_count(rows.max() + 1, most, unit)
  source, _ = np.nonzero(valid)  # the tokens, sequence by sequence
  place_in_sequence = (np.cumsum(valid, 1) - 1)[valid]
  to = rows[source], first[source] + place_in_sequence

  def move(x):
    x = np.asarray(x)
    before = columns - x.shape[1]  # none, or those of the prompt
    x = np.pad(x, ((0, 0), (before, 0)) + ((0, 0),) * (x.ndim - 2))
    out = np.zeros((count, columns, *x.shape[2:]), x.dtype)
    out[to] = x[valid]
    return out

  which = np.broadcast_to(segments[:, None], valid.shape).astype(np.int32)
  return types.RolloutBatch(*map(move, batch._replace(valid=which)))


def for_update(batch, config):
  """Return a minibatch as `rl.pack` wants it, and metrics.

  Args:
    batch: `types.RolloutBatch` with one completion a row.
    config: `config.Config`.
  """
  if not config.rl.pack:
    return batch, {}
  packed = pack(batch, config.rl.microbatches
                * sharding.batch_devices(config.mesh))
  return packed, {'rollout/packed_rows': len(packed.mask) / len(batch.mask)}
