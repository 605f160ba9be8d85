"""Packs several completions into one row, to spend less on padding.

A rollout's rows are prompts padded to R and completions padded to S columns.
For the update, first-fit decreasing places the sequences (a prompt and its
completion, without padding) in few rows of the same T = R + S columns.
`types.RolloutBatch` says what a packed row looks like. Losses, lambda and
gradients equal those of the unpacked rows, up to the order of sums.
"""

import numpy as np

from mtp_rl import config as config_lib
from mtp_rl import sharding, types

_SIZES = 8  # different row counts to compile for, at most


def place(lengths, columns):
  """Place sequences in rows by first-fit decreasing.

  Args:
    lengths: int [N], tokens of each sequence, at most `columns`.
    columns: T.

  Returns:
    int [N] each: a sequence's row, its first column, and its segment, which
    counts from 1 within the row.
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
  """Return `needed` rounded up to one of at most `_SIZES` row counts.

  Each count is a new shape, compiled once when it first occurs.

  Args:
    needed: rows that hold a sequence, at most `most`.
    most: B, a multiple of `unit`.
    unit: every count is a multiple of it.
  """
  step = -(-most // (_SIZES * unit)) * unit
  return min(-(-needed // step) * step, most)


def pack(batch, unit=1):
  """Return a `types.RolloutBatch` of packed rows, NumPy arrays.

  Args:
    batch: `types.RolloutBatch` with one completion a row and no empty prompt
      (so the token before a completion belongs to the same sequence).
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
    before = columns - x.shape[1]  # prompt columns that x lacks, or 0
    x = np.pad(x, ((0, 0), (before, 0)) + ((0, 0),) * (x.ndim - 2))
    out = np.zeros((count, columns, *x.shape[2:]), x.dtype)
    out[to] = x[valid]
    return out

  which = np.broadcast_to(segments[:, None], valid.shape).astype(np.int32)
  return types.RolloutBatch(*map(move, batch._replace(segments=which)))


def for_update(batch, config: config_lib.Config):
  """Return a minibatch, packed if rl.pack is set, and a dict of metrics.

  Args:
    batch: `types.RolloutBatch` with one completion a row.
    config: `config.Config`.
  """
  if not config.rl.pack:
    return batch, {}
  packed = pack(batch, config.rl.microbatches
                * sharding.batch_devices(config.mesh))
  return packed, {'rollout/packed_rows': len(packed.mask) / len(batch.mask)}
