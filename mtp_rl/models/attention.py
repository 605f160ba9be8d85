"""Causal grouped-query attention, in several forms for different targets.

    plain    softmax(q k^T / sqrt(C)) v, all scores at once
    blocks   the same for one block of queries at a time, never T x T scores
    splash   JAX's Pallas kernel for TPU
    cudnn    `jax.nn.dot_product_attention` by cuDNN, for GPU

In all forms a query attends to the keys of its own segment, up to its column.
The two kernels cannot be differentiated twice, so Hessian-vector products use
'blocks' (`without_kernels`).
"""

import dataclasses
import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from mtp_rl import config as config_lib
from mtp_rl import sharding

NAME = 'attention'  # names the result for rematerialisation policies
BLOCK = 256  # queries whose scores are in memory at once
_LONG = 512  # above this number of columns 'auto' takes blocks
_PARTS = 4  # groups of blocks; each reads the keys up to its own end
_SMALL = 128  # a cache of at most so many columns is read as a whole
_PREFIXES = 4  # sizes in which a longer one is read
_TILE = 512  # largest tile of the splash kernel
_LANES = 128  # the splash kernel's sizes are multiples of it


class Rows(NamedTuple):
  """Which keys a query sees.

  Attributes:
    queries: int32 [B, T], segment of each query; 0 is padding.
    keys: int32 [B, U], segment of each key.
    columns: int32 [T], each query's column among the keys; None where T = U
      and query t is in column t.
    window: int32 [], columns up to its own that a query sees; None: all.
  """
  queries: jax.Array
  keys: jax.Array
  columns: jax.Array | None = None
  window: jax.Array | None = None


class Past(NamedTuple):
  """The keys and values of earlier columns, which new tokens attend to.

  Attributes:
    key, value: float [L, B, N, U, C], of all layers. In this order a decoding
      step's matmuls read them without a transpose.
    valid: bool [B, U], columns that hold a token of the row.
    used: int32 [B], a row's valid columns end before this one.
  """
  key: jax.Array
  value: jax.Array
  valid: jax.Array
  used: jax.Array


def full(segments):
  """Return the `Rows` of whole sequences, int32 or bool [B, T]."""
  segments = segments.astype(jnp.int32)
  return Rows(segments, segments)


def in_window(rows, m: config_lib.Model, layer, columns):
  """Return `Rows` with the sliding window of a layer.

  Without an effect on so many columns it is left out, so that the kernels,
  which have none, can be used.

  Args:
    rows: `Rows`.
    m: `config.Model`.
    layer: int or int32 [].
    columns: of the keys.
  """
  if not 0 < m.window < columns:
    return rows
  if 'f' not in m.window_layers:
    return rows._replace(window=m.window)
  sizes = [m.window if c == 's' else 2 ** 30 for c in m.window_layers]
  return rows._replace(window=jnp.asarray(sizes, jnp.int32)[layer])


def resolve(kind, channels, columns, dtype, windowed=False):
  """Return the form of attention to use, choosing one for 'auto'.

  Args:
    kind: model.attention.
    channels: C.
    columns: T.
    dtype: of the computation.
    windowed: whether a sliding window cuts keys off.

  Raises:
    config.ConfigError: the kernel asked for does not support the target or
      these sizes.
  """
  if windowed and kind in ('splash', 'cudnn'):
    raise config_lib.ConfigError(
        f'model.attention={kind} has no sliding window, but model.window is '
        f'shorter than the {columns} columns; set model.attention=auto')
  if windowed:
    return kind if kind != 'auto' else (
        'blocks' if columns > _LONG else 'plain')
  platform = sharding.platform()
  fits = (platform == 'tpu' and channels % _LANES == 0
          and columns % _LANES == 0)
  if kind == 'splash' and not fits:
    raise config_lib.ConfigError(
        f'model.attention=splash needs a TPU and multiples of {_LANES}, but '
        f'this is {platform} with {channels} channels a head and {columns} '
        'columns; set model.attention=auto')
  gpu = (platform == 'gpu' and jnp.dtype(dtype).itemsize == 2
         and channels % 8 == 0 and channels <= 128)
  if kind == 'cudnn' and not gpu:
    raise config_lib.ConfigError(
        'model.attention=cudnn needs a GPU, 16-bit floats and at most 128 '
        f'channels a head, a multiple of 8, but this is {platform} with '
        f'{jnp.dtype(dtype).name} and {channels}; set model.attention=auto')
  if kind != 'auto':
    return kind
  if fits:
    return 'splash'
  if gpu:
    return 'cudnn'
  return 'blocks' if columns > _LONG else 'plain'


def without_kernels(model_config: config_lib.Model):
  """Return a `config.Model` whose attention can be differentiated twice."""
  kind = model_config.attention
  if kind in ('splash', 'cudnn', 'auto'):
    kind = 'blocks'
  return dataclasses.replace(model_config, attention=kind)


def in_float32(model_config: config_lib.Model):
  """Return a `config.Model` that computes in float32."""
  kind = model_config.attention  # cudnn has 16-bit floats only
  return dataclasses.replace(model_config, dtype='float32',
                             attention='auto' if kind == 'cudnn' else kind)


def for_segments(model_config: config_lib.Model, channels, columns):
  """Return a `config.Model` whose attention takes several segments a row.

  Args:
    model_config: `config.Model`.
    channels: C.
    columns: T.
  """
  kind = resolve(model_config.attention, channels, columns, model_config.dtype)
  if kind != 'cudnn':  # 'auto' stays, as windowed layers have another answer
    return model_config
  return dataclasses.replace(model_config, attention='blocks')


def attend(query, key, value, rows, kind='plain'):
  """Return softmax(q k^T / sqrt(C)) v, softmax in float32.

  Args:
    query: [B, T, H, C].
    key, value: [B, U, N, C] with H a multiple of N.
    rows: `Rows`.
    kind: one of the module's forms; all but 'plain' need whole sequences.

  Returns:
    [B, T, H, C].
  """
  form = {'plain': plain, 'blocks': blocks, 'splash': splash,
          'cudnn': aligned}[kind]
  y = form(query, key, value, rows)
  # splash names its result itself; named again, it would be saved twice.
  return y if kind == 'splash' else checkpoint_name(y, NAME)


def plain(query, key, value, rows):
  """Attend with all scores [B, H, T, U] in memory at once; see `attend`."""
  t, u = query.shape[1], key.shape[1]
  columns = jnp.arange(t) if rows.columns is None else rows.columns
  mask = ((rows.queries[:, :, None] == rows.keys[:, None, :])
          & (jnp.arange(u)[None, :] <= columns[:, None]))
  if rows.window is not None:
    mask &= jnp.arange(u)[None, :] > columns[:, None] - rows.window
  return _softmax(query, [(key.swapaxes(1, 2), value.swapaxes(1, 2), mask)])


def _softmax(query, parts):
  """Attend to the keys of several parts at once.

  Args:
    query: [B, T, H, C].
    parts: (key, value, mask) each: [B, N, U, C] twice, and bool [B, T, U].
  """
  b, t, h, c = query.shape
  n = parts[0][0].shape[1]
  # Matmuls are batched over [B, N], which a mesh may split, and have the h / n
  # query heads of a group as rows. Dividing by the sum of the weights after the
  # second one saves a pass over them.
  g = h // n
  q = (query * c ** -0.5).reshape(b, t, n, g, c)
  q = q.transpose(0, 2, 3, 1, 4).reshape(b, n, g * t, c)

  def score(key, mask):
    u = key.shape[2]
    bias = jnp.where(mask, 0., -1e30).astype(jnp.float32)  # [B, T, U]
    bias = jnp.broadcast_to(bias[:, None], (b, g, t, u))
    return bias.reshape(b, 1, g * t, u) + jnp.einsum(
        'bnqc,bnuc->bnqu', q, key, preferred_element_type=jnp.float32)

  scores = [score(key, mask) for key, _, mask in parts]
  top = functools.reduce(jnp.maximum, [
      jnp.max(s, -1, keepdims=True) for s in scores])
  weights = [jnp.exp(s - jax.lax.stop_gradient(top)) for s in scores]
  y = sum(jnp.matmul(w.astype(value.dtype), value,
                     preferred_element_type=jnp.float32)
          for w, (_, value, _) in zip(weights, parts))
  y = y / sum(jnp.sum(w, -1, keepdims=True) for w in weights)
  y = y.astype(query.dtype).reshape(b, n, g, t, c).transpose(0, 3, 1, 2, 4)
  return y.reshape(b, t, h, c)


def with_past(query, key, value, past, layer, rows):
  """Attend to the valid columns of the past and to the new tokens up to each.

  Only a prefix of the past is read: the shortest of a few sizes that holds the
  columns used. Up to `_SMALL` columns are read as a whole. XLA for one CPU
  copies what it reads, so there a longer past is read row by row: a row's keys
  stay in the processor's cache, and each row has a prefix of its own.

  Args:
    query: [B, W, H, C], of new tokens.
    key, value: [B, W, N, C], theirs.
    past: `Past`.
    layer: int32 [], of the past.
    rows: `Rows` of the new tokens; queries are 0 at those that do not belong.
  """
  new = (query, key, value, rows.queries > 0, past.valid, past.used)
  mesh = jax.sharding.get_abstract_mesh()
  if (past.key.shape[3] <= _SMALL or sharding.platform() != 'cpu'
      or not (mesh.empty or mesh.size == 1)):
    return _with_past(new, lambda size: [c[layer, :, :, :size]
                                      for c in (past.key, past.value)],
                      rows.window)

  def one(xs):
    row, new = xs
    take = lambda size: [jax.lax.dynamic_slice(
        c, (layer, row, 0, 0, 0), (1, 1, c.shape[2], size, c.shape[4]))[0]
                         for c in (past.key, past.value)]
    return _with_past(tuple(x[None] for x in new), take, rows.window)[0]

  return jax.lax.map(one, (jnp.arange(len(query)), new))


def _with_past(new, past, window):
  """Attend as `with_past` does, in some rows.

  Args:
    new: query, key, value, bool [B, W] whether they belong, and the valid and
      used of the past, of these rows.
    past: function of a size, returns that many columns of their keys and
      values, [B, N, size, C].
    window: see `Rows`.
  """
  query, key, value, there, valid, used = new
  at = jnp.arange(query.shape[1])
  own = there[:, None, :] & (at <= at[:, None])
  if window is not None:
    own &= at > at[:, None] - window
  new = key.swapaxes(1, 2), value.swapaxes(1, 2), own

  def read(size):
    seen = jnp.broadcast_to(valid[:, None, :size], (*own.shape[:2], size))
    if window is not None:
      seen &= jnp.arange(size) > (used[:, None] + at - window)[..., None]
    return lambda: _softmax(query, [(*past(size), seen),
                                    new])

  sizes = _sizes(valid.shape[1])
  if len(sizes) == 1:
    return read(sizes[0])()
  index = jnp.sum(jnp.max(used) > jnp.asarray(sizes[:-1]))
  return jax.lax.switch(index, [read(size) for size in sizes])


def _sizes(columns):
  """Return the prefixes of a cache that `with_past` may read, ascending."""
  if columns <= _SMALL:
    return [columns]
  return [-(-columns * i // _PREFIXES) for i in range(1, _PREFIXES + 1)]


def blocks(query, key, value, rows, block=BLOCK):
  """Attend with up to `block` queries at a time; see `attend`.

  Each block is recomputed in the backward pass. The blocks form a few parts,
  each of which reads the keys up to its own end, so that only about 5/8 of all
  scores are computed.
  """
  t = query.shape[1]
  n = -(-t // block)  # blocks in all
  if n == 1:
    return plain(query, key, value, rows)
  block = -(-t // n)  # of nearly equal size: less padding
  pad = lambda x: jnp.pad(x, ((0, 0), (0, n * block - t))
                          + ((0, 0),) * (x.ndim - 2))
  cut = lambda x: jnp.moveaxis(
      pad(x).reshape(x.shape[0], n, block, *x.shape[2:]), 1, 0)
  q, segments = cut(query), cut(rows.queries)
  columns = jnp.arange(n * block).reshape(n, block)
  out = []
  for first, last in _parts(n):
    end = min(last * block, t)
    seen = key[:, :end], value[:, :end], rows.keys[:, :end]

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one(xs, seen=seen):
      k, v, keys = seen
      return plain(xs[0], k, v, Rows(xs[1], keys, xs[2], rows.window))

    out.append(jax.lax.map(one, tuple(
        x[first:last] for x in (q, segments, columns))))
  y = jnp.moveaxis(jnp.concatenate(out), 0, 1)
  return y.reshape(y.shape[0], n * block, *y.shape[3:])[:, :t]


def _parts(n):
  """Return at most `_PARTS` runs (first, last) of n blocks."""
  ends = sorted({-(-n * i // _PARTS) for i in range(_PARTS + 1)})
  return list(itertools.pairwise(ends))


def splash(query, key, value, rows, interpret=False):
  """Run the Pallas kernel for TPU, on each device's rows and heads.

  T must be a multiple of 128, and C as well; see `attend`.
  """
  from jax.experimental.pallas.ops.tpu import splash_attention as lib
  t = query.shape[1]
  tile = next(n for n in range(_TILE, 0, -_LANES) if t % n == 0)
  sizes = lib.BlockSizes(
      block_q=tile, block_kv=tile, block_q_dkv=tile, block_kv_dkv=tile,
      block_q_dq=tile, block_kv_dq=tile)

  def local(q, k, v, segments):
    heads = q.shape[2]
    kernel = lib.make_splash_mha(
        lib.MultiHeadMask([lib.CausalMask((t, t))] * heads),
        block_sizes=sizes, head_shards=1, q_seq_shards=1,
        residual_checkpoint_name=NAME, interpret=interpret)
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    y = jax.vmap(lambda q, k, v, s: kernel(q, k, v, lib.SegmentIds(s, s)))(
        q, k, v, segments)
    return y.swapaxes(1, 2)

  args = (query * query.shape[-1] ** -.5).astype(query.dtype), key, value
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return local(*args, rows.queries)
  split = 'tensor' if (key.shape[2] % mesh.shape['tensor'] == 0) else None
  wide = P(sharding.BATCH, None, split)
  return jax.shard_map(local, in_specs=(wide, wide, wide, P(sharding.BATCH)),
                       out_specs=wide, check_vma=False)(*args, rows.queries)


def aligned(query, key, value, rows, implementation='cudnn'):
  """Run `jax.nn.dot_product_attention` on rows shifted to the left.

  cuDNN supports causality and lengths but not left padding, and a mask would
  take T x T memory again. So each row is rolled to put its padding last, and
  the result is rolled back. A row must hold one segment; see `attend`.
  """
  t = query.shape[1]
  there = rows.queries > 0
  first = jnp.argmax(there, 1)[:, None]
  lengths = jnp.sum(there, 1).astype(jnp.int32)
  roll = lambda x, by: jnp.take_along_axis(
      x, ((jnp.arange(t) + by) % t)[..., None, None], 1)
  y = jax.nn.dot_product_attention(
      *(roll(x, first) for x in (query, key, value)), is_causal=True,
      query_seq_lengths=lengths, key_value_seq_lengths=lengths,
      implementation=implementation)
  return roll(y, -first)
