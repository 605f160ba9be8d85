"""Log-probabilities of response tokens, from a chunked output head.

The state in column i predicts column i+1 for the main head and i+k+1 for the
MTP module of depth k, so the states that predict the S scored columns, which
are the last of a row, are static slices of [B, T, D]. This is the only place
where that shift is made.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from mtp_rl import sharding
from mtp_rl.models import transformer


class LogProbs(NamedTuple):
  """Token-indexed results; each [B, S] or [B, S, K], float32.

  Attributes:
    main: log-probs of the main head (None where it was left out).
    mtp: log-probs of the MTP modules.
    entropy: of the main head in nats (None where it was not asked for).
    top1: bool, whether a module's argmax equals the main head's (or None).
    overlap: sum_v min(p, q_k) = 1 - TV, the acceptance of speculative
      sampling; no gradient to the main head's p (or None).
    kl: KL(p || q_k) in nats, likewise (or None).
    load: int32 [B, L, E], how many valid tokens of a row were routed to each
      expert, for each sparse layer of the trunk (None without experts).
  """
  main: jax.Array | None
  mtp: jax.Array
  entropy: jax.Array | None = None
  top1: jax.Array | None = None
  overlap: jax.Array | None = None
  kl: jax.Array | None = None
  load: jax.Array | None = None


def scored_states(hidden, depth, columns):
  """Return the states that predict the last `columns` columns.

  Args:
    hidden: [B, T, D], states of depth k at every column.
    depth: k; 0 for the main head.
    columns: S.

  Returns:
    [B, S, D]. Column s holds position R + s - k - 1; where that is negative,
    column 0 is used in its place and `mtp_mask` excludes the token.
  """
  first = hidden.shape[1] - columns - depth - 1
  if first >= 0:
    return hidden[:, first:first + columns]
  pad = jnp.repeat(hidden[:, :1], -first, axis=1)
  return jnp.concatenate([pad, hidden[:, :columns + first]], axis=1)


def mtp_mask(attending, columns, modules):
  """Return bool [B, S, K]: tokens of these columns that depth k can predict.

  The token in column t is predicted from column t-k-1, which must belong to
  the same sequence. There the module has seen the embeddings up to column t-1
  and none later, since attention is causal and stays within the sequence.
  Columns after the sequence's end (padding, or the next sequence of a packed
  row) reach only states that would predict tokens beyond the end, and those
  are excluded here.

  Args:
    attending: bool or int32 [B, T], see `types.Tokens`. In packed rows the
      result includes prompt tokens; combine it with the response mask.
    columns: S.
    modules: K.
  """
  length = attending.shape[1]
  out = []
  for k in range(1, modules + 1):
    source = jnp.pad(attending, ((0, 0), (k + 1, 0)))[:, :length]
    same = (attending > 0) & (source == attending)
    out.append(same[:, length - columns:])
  if not out:
    return jnp.zeros((attending.shape[0], columns, 0), bool)
  return jnp.stack(out, axis=-1)


def _by_chunks(function, chunk, states, targets):
  """Apply function to slices of the S axis, recomputed in the backward pass."""
  s = targets.shape[1]
  if not chunk or chunk >= s:
    return function(states, targets)
  chunks = -(-s // chunk)

  def cut(x):  # [B, S, ...] -> [chunks, B, chunk, ...]
    pad = ((0, 0), (0, chunks * chunk - s)) + ((0, 0),) * (x.ndim - 2)
    x = jnp.pad(x, pad).reshape(x.shape[0], chunks, chunk, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)

  def paste(x):
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], chunks * chunk, *x.shape[3:])[:, :s]

  out = jax.lax.map(jax.checkpoint(lambda xs: function(*xs), prevent_cse=False),
                    (jax.tree.map(cut, states), cut(targets)))
  return jax.tree.map(paste, out)


class _Vocabulary(NamedTuple):
  """Log-softmax over the vocabulary, which may be split over devices.

  Attributes:
    matrix: [D, V], or this device's columns of it.
    axis: mesh axis that V is split over, or None.
    temperature: divides the logits.
  """
  matrix: jax.Array
  axis: str | None
  temperature: float

  def _over(self, reduce, x):
    return reduce(x, self.axis) if self.axis else x

  def _first(self):
    return (jax.lax.axis_index(self.axis) * self.matrix.shape[1]
            if self.axis else 0)

  def log_softmax(self, states, detach=False):
    """Return log-probs [..., V] of states [..., D], this device's columns."""
    flat = states.reshape(-1, states.shape[-1])
    matrix = jax.lax.stop_gradient(self.matrix) if detach else self.matrix
    wide = jnp.promote_types(flat.dtype, jnp.float32)  # float64 in a test
    logits = transformer.matmul(flat, matrix, wide)
    logits = logits.reshape(*states.shape[:-1], -1) / self.temperature
    top = self._over(jax.lax.pmax, jax.lax.stop_gradient(
        jnp.max(logits, -1, keepdims=True)))
    total = self.sum(jnp.exp(logits - top))
    return logits - top - jnp.log(total)[..., None]

  def sum(self, x):
    """Return the sum over V."""
    return self._over(jax.lax.psum, jnp.sum(x, -1))

  def pick(self, x, targets):
    """Return x at the columns `targets`, int32 [...]."""
    if not self.axis:
      return jnp.take_along_axis(x, targets[..., None], -1)[..., 0]
    local = targets - self._first()
    here = (local >= 0) & (local < x.shape[-1])
    local = jnp.clip(local, 0, x.shape[-1] - 1)
    x = jnp.take_along_axis(x, local[..., None], -1)[..., 0]
    return jax.lax.psum(jnp.where(here, x, 0.), self.axis)

  def argmax(self, x):
    """Return the column of the largest x; of equal ones, the first."""
    x = jax.lax.stop_gradient(x)
    best = jnp.argmax(x, -1) + self._first()
    if not self.axis:
      return best
    top = jnp.max(x, -1)
    most = jax.lax.pmax(top, self.axis)
    return jax.lax.pmin(jnp.where(top == most, best, jnp.iinfo(jnp.int32).max),
                        self.axis)


def _on_mesh(function, states, matrix, targets):
  """Call function(states, matrix, targets, axis) on each device's rows.

  The output head is gathered over 'fsdp' once, before the chunks, and stays
  split over 'tensor'; its gradient is summed over the devices once, after the
  chunks. The compiler alone would do both in every chunk.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1 or (
      targets.shape[0] % sharding.batch_size(mesh)):
    return function(states, matrix, targets, None)
  axis = 'tensor' if (
      mesh.shape['tensor'] > 1
      and matrix.shape[1] % mesh.shape['tensor'] == 0) else None
  split = 'fsdp' if matrix.shape[0] % mesh.shape['fsdp'] == 0 else None

  # A custom gradient cannot sum over devices, so inputs that are equal on
  # several devices are cast to 'varying': the transpose of the cast sums.
  vary = lambda x, axes: jax.lax.pcast(x, axes, to='varying') if axes else x

  def local(states, matrix, targets):
    if split:
      matrix = jax.lax.all_gather(matrix, split, axis=0, tiled=True)
    matrix = vary(matrix, tuple(a for a in sharding.BATCH if a != split))
    states = jax.tree.map(lambda x: vary(x, axis), states)
    return function(states, matrix, targets, axis)

  rows = P(sharding.BATCH)
  return jax.shard_map(local, in_specs=(rows, P(split, axis), rows),
                       out_specs=rows)(states, matrix, targets)


def token_logprobs(hidden, ahead, matrix, tokens, columns, **what):
  """Return the `LogProbs` of `by_depth`, the depths stacked."""
  out = by_depth(hidden, ahead, matrix, tokens, columns, **what)
  stack = lambda xs: (jnp.stack(xs, -1) if xs else
                      jnp.zeros((tokens.shape[0], columns, 0)))
  return out._replace(**{name: stack(x) for name, x in out._asdict().items()
                         if isinstance(x, list)})


def by_depth(hidden, ahead, matrix, tokens, columns, *, chunk=0,
             temperature=1., detach_head=False, entropy=False,
             acceptance=False, divergence=False):
  """Score the last S columns under the main head and every MTP module.

  Args:
    hidden: [B, T, D], the main head's states, or None to leave it out.
    ahead: K arrays [B, T, D], the modules' states.
    matrix: [D, V], the output head.
    tokens: int32 [B, T].
    columns: S.
    chunk: columns whose logits are in memory at once; 0: all.
    temperature: of the sampling policy; divides the logits of the main head
      and of the modules.
    detach_head: whether to stop the modules' gradient to the matrix.
    entropy: whether to return the main head's entropy.
    acceptance: whether to return `top1` and `overlap`.
    divergence: whether to return `kl` and `overlap`.

  Returns:
    `LogProbs` with a list of K arrays [B, S] for each [B, S, K]: a pullback
    of some depths then leaves out the heads of the others.
  """
  chex.assert_shape(tokens, (None, None))
  chex.assert_shape([h for h in (hidden, *ahead) if h is not None],
                    (*tokens.shape, matrix.shape[0]))
  states = tuple(scored_states(h, k, columns)
                 for k, h in enumerate((hidden, *ahead)) if h is not None)
  first = int(hidden is not None)

  def score(states, targets, v):
    foreseen = [v.log_softmax(h, detach_head) for h in states[first:]]
    out = LogProbs(None, [v.pick(q, targets) for q in foreseen])
    if hidden is None:
      return out
    main = v.log_softmax(states[0])
    out = out._replace(main=v.pick(main, targets))
    if entropy:
      out = out._replace(entropy=-v.sum(jnp.exp(main) * main))
    if acceptance:
      best = v.argmax(main)
      out = out._replace(top1=[v.argmax(q) == best for q in foreseen])
    teacher = jax.lax.stop_gradient(main)
    if acceptance or divergence:
      out = out._replace(overlap=[
          v.sum(jnp.exp(jnp.minimum(teacher, q))) for q in foreseen])
    if divergence:
      out = out._replace(kl=[
          v.sum(jnp.exp(teacher) * (teacher - q)) for q in foreseen])
    return out

  def local(states, matrix, targets, axis):
    v = _Vocabulary(matrix, axis, temperature)
    return _by_chunks(lambda s, t: score(s, t, v), chunk, states, targets)

  return _on_mesh(local, states, matrix, tokens[:, -columns:])
