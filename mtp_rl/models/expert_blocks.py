"""Experts as a loop over blocks of tokens, where no grouped matmul exists.

Copies of the tokens are sorted by expert and cut into blocks of a fixed number
of rows, each of one expert; an expert's last block is padded. A loop takes a
block at a time through its expert, so that the FLOPs are those of the tokens
routed here and one partly filled block for each expert:

    blocks <= rows / size + experts

It ends after the last block in use. The backward pass computes each block
again, so that nothing of the copies' number times D or F is in memory. What it
returns may be differentiated once more, forward.
"""

import functools

import jax
import jax.numpy as jnp

_SMALLEST, _LARGEST = 8, 1024  # rows of a block
_FILL = 4  # blocks that an expert's tokens fill, if they are evenly routed


def block_size(rows, experts):
  """Return the rows of a block: a power of two.

  Args:
    rows: copies of tokens in all.
    experts: over which they are spread.
  """
  size = _SMALLEST
  while size < _LARGEST and 2 * size * _FILL * experts <= rows:
    size *= 2
  return size


def _zeros(shape, like):
  """Return float32 zeros; in a `shard_map` they vary over the axes of `like`.

  All arguments of `mixture` there must vary over the same axes.
  """
  return jax.lax.full_like(like, 0, jnp.float32, shape)


def _plan(local, count, size):
  """Return the blocks: rows in order, and each block's expert and its rows.

  Args:
    local: int32 [R], expert of each row; `count` for those of other devices.
    count: of experts.
    size: of a block.

  Returns:
    int32 [R + size], rows sorted by expert, padded; (expert, start, stop) of
    the blocks, int32 [blocks] each; and the number of blocks in use.
  """
  order = jnp.argsort(local)
  sizes = jnp.bincount(local, length=count + 1)[:count].astype(jnp.int32)
  ends = jnp.cumsum(sizes)
  last = jnp.cumsum(-(-sizes // size))  # blocks up to each expert's last
  index = jnp.arange(len(local) // size + count, dtype=jnp.int32)
  expert = jnp.minimum(jnp.sum(index[:, None] >= last, 1), count - 1)
  before = last - -(-sizes // size)
  start = (ends - sizes)[expert] + (index - before[expert]) * size
  return jnp.pad(order, (0, size)), (expert, start, ends[expert]), last[-1]


def _over_blocks(body, carry, plan, tokens, k, size):
  """Return the carry after body(carry, e, rows, token, at) of every block.

  `rows` and `token` are a block's rows [size] and the tokens that they copy;
  padding has numbers beyond the last. `at` is the place of its first row.
  """
  order, (expert, start, stop), used = plan
  beyond = jnp.arange(size, dtype=jnp.int32)

  def step(state):
    i, carry = state
    at = start[i]
    there = at + beyond < stop[i]
    rows = jax.lax.dynamic_slice_in_dim(order, at, size)
    token = jnp.where(there, rows // k, tokens + beyond)
    rows = jnp.where(there, rows, tokens * k + beyond)
    return i + 1, body(carry, expert[i], rows, token, at)

  # The constant tells `aot.hlo` the most that the loop runs.
  more = lambda state: (state[0] < len(expert)) & (state[0] < used)
  return jax.lax.while_loop(more, step, (jnp.int32(0), carry))[1]


def _rows(x, index):
  """Return rows of x, zeros where the index lies beyond the last."""
  return x.at[index].get(mode='fill', fill_value=0, unique_indices=True)


def _dot(a, b, out=None):
  return jnp.matmul(a, b, preferred_element_type=out or jnp.float32)


def _act(gate, up):
  return jax.nn.silu(gate) * up


def _inner(x, gate, up):
  """Return gate and up of a block's tokens, of x's dtype."""
  return _dot(x, gate, x.dtype), _dot(x, up, x.dtype)


def _product(x, weights, kernels, masters, plan, size):
  """Return what the experts add; see `mixture`."""
  del masters
  (n, _), k = x.shape, weights.shape[1]
  gate, up, down = kernels
  flat = weights.reshape(-1)

  def body(y, e, rows, token, at):
    del at
    z = _act(*_inner(_rows(x, token), gate[e], up[e]))
    add = _dot(z, down[e]) * _rows(flat, rows)[:, None]
    return y.at[token].add(add, mode='drop', unique_indices=True)

  return _over_blocks(body, _zeros(x.shape, x), plan, n, k, size)


def _forward(x, weights, kernels, masters, plan, size):
  return (_product(x, weights, kernels, masters, plan, size),
          (x, weights, kernels, plan))


def _backward(size, saved, dy):
  """Return the cotangents of `_product`'s arguments.

  With y = w (z W_d) and t = dy W_dᵀ: dw = t·z, dz = w t, dW_d = zᵀ (w dy).
  """
  x, weights, kernels, plan = saved
  (n, _), k = x.shape, weights.shape[1]
  gate, up, down = kernels
  flat = weights.reshape(-1)
  add = lambda total, at, part: total.at[at].add(
      part, mode='drop', unique_indices=True)

  def body(carry, e, rows, token, at):
    dx, dw, (dgate, dup, ddown) = carry
    xs, w, d = _rows(x, token), _rows(flat, rows)[:, None], _rows(dy, token)
    z, pull = jax.vjp(_act, *_inner(xs, gate[e], up[e]))
    t = _dot(d.astype(x.dtype), down[e].T)
    dg, du = pull((t * w).astype(x.dtype))
    dx = add(dx, token, _dot(dg, gate[e].T) + _dot(du, up[e].T))
    # Rows behind a block's last are overwritten by the next block.
    dw = jax.lax.dynamic_update_slice_in_dim(
        dw, jnp.sum(t * z.astype(jnp.float32), 1), at, 0)
    grown = (dgate.at[e].add(_dot(xs.T, dg)), dup.at[e].add(_dot(xs.T, du)),
             ddown.at[e].add(_dot(z.T, (d * w).astype(x.dtype))))
    return dx, dw, grown

  order = plan[0]
  dx, dw, grown = _over_blocks(
      body, (_zeros(x.shape, x), _zeros(order.shape, x),
             tuple(_zeros(w.shape, x) for w in kernels)), plan, n, k, size)
  dweights = _zeros(flat.shape, x).at[order[:len(flat)]].set(
      dw[:len(flat)], unique_indices=True)
  return (dx.astype(x.dtype), dweights.reshape(weights.shape), None, grown,
          None)


_blocked = jax.custom_vjp(_product, nondiff_argnums=(5,))
_blocked.defvjp(_forward, _backward)


def mixture(x, chosen, weights, kernels, masters, first=0, shards=1,
            product=_blocked):
  """Return what consecutive experts add to each token.

  The arguments are those of `moe.mixture`; all gradients are summed in float32.
  `product` is `_product`, which jax.jvp alone can differentiate, or the same
  with its backward pass.
  """
  count, k = kernels[0].shape[0], chosen.shape[1]
  local = chosen.reshape(-1) - first
  local = jnp.where((local >= 0) & (local < count), local, count)
  size = block_size(x.shape[0] * k, count * shards)
  return product(x, weights, kernels, masters, _plan(local, count, size),
                 size)


forward = functools.partial(mixture, product=_product)
