"""Log-probabilities of response tokens, from a chunked output head.

Hidden state of column i predicts column i+1 for the main head and i+k+1 for
the MTP head of depth k, so the states that predict the S response columns are
static slices of [B, T, D]: this is the only place where that shift is made.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class LogProbs(NamedTuple):
  """Token-indexed results; each [B, S] or [B, S, K], float32.

  Attributes:
    main: log-probs of the main head (None where it was left out).
    heads: log-probs of the MTP heads.
    entropy: of the main head in nats (None where it was not asked for).
    top1: True where an MTP head's argmax is the main head's (or None).
    overlap: sum_v min(p, q_k), the acceptance of speculative sampling (None).
    load: int32 [B, L, E], valid tokens of a row that took each expert of each
      sparse layer of the trunk (None without experts).
  """
  main: jax.Array | None
  heads: jax.Array
  entropy: jax.Array | None = None
  top1: jax.Array | None = None
  overlap: jax.Array | None = None
  load: jax.Array | None = None


def response_states(hidden, depth, responses):
  """Return the states that predict the last `responses` columns.

  Args:
    hidden: [B, T, D], states of depth k at every column.
    depth: k; 0 for the main head.
    responses: S.

  Returns:
    [B, S, D]. Column s holds position R + s - k - 1; where that lies before
    the sequence, its own column 0 stands in and `head_mask` excludes it.
  """
  first = hidden.shape[1] - responses - depth - 1
  if first >= 0:
    return hidden[:, first:first + responses]
  pad = jnp.repeat(hidden[:, :1], -first, axis=1)
  return jnp.concatenate([pad, hidden[:, :responses + first]], axis=1)


def head_mask(valid, responses, heads):
  """Return bool [B, S, K]: response tokens that depth k can predict.

  The token in column t is read at column t-k-1, which must be valid.

  Args:
    valid: bool [B, T].
    responses: S.
    heads: K.
  """
  length = valid.shape[1]
  out = []
  for k in range(1, heads + 1):
    source = jnp.pad(valid, ((0, 0), (k + 1, 0)))[:, :length]
    out.append((valid & source)[:, length - responses:])
  if not out:
    return jnp.zeros((valid.shape[0], responses, 0), bool)
  return jnp.stack(out, axis=-1)


def _by_chunks(function, chunk, states, targets):
  """Apply function to slices of the S axis, recomputed in the backward pass."""
  s = targets.shape[1]
  if not chunk or chunk >= s:
    return function(states, targets)
  pieces = -(-s // chunk)

  def cut(x):  # [B, S, ...] -> [pieces, B, chunk, ...]
    pad = ((0, 0), (0, pieces * chunk - s)) + ((0, 0),) * (x.ndim - 2)
    x = jnp.pad(x, pad).reshape(x.shape[0], pieces, chunk, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)

  def paste(x):
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], pieces * chunk, *x.shape[3:])[:, :s]

  out = jax.lax.map(jax.checkpoint(lambda xs: function(*xs), prevent_cse=False),
                    (jax.tree.map(cut, states), cut(targets)))
  return jax.tree.map(paste, out)


def _log_softmax(states, matrix, temperature):
  flat = states.reshape(-1, states.shape[-1])
  logits = jnp.matmul(flat, matrix.astype(flat.dtype),
                      preferred_element_type=jnp.float32)
  logits = logits.reshape(*states.shape[:-1], -1)
  return jax.nn.log_softmax(logits / temperature)


def token_logprobs(hidden, heads, matrix, tokens, responses, *, chunk=0,
                   temperature=1., detach_head=False, entropy=False,
                   acceptance=False):
  """Score the response tokens under the main head and every MTP head.

  Args:
    hidden: [B, T, D], the main head's states, or None to leave it out.
    heads: K arrays [B, T, D].
    matrix: [D, V], the output head.
    tokens: int32 [B, T].
    responses: S.
    chunk: columns whose logits are alive at once; 0 for all.
    temperature: of the sampling policy; divides the logits of every head.
    detach_head: whether the MTP heads read the matrix without a gradient.
    entropy: whether to return the main head's entropy.
    acceptance: whether to return `top1` and `overlap`.

  Returns:
    `LogProbs`.
  """
  states = tuple(response_states(h, k, responses)
                 for k, h in enumerate((hidden, *heads)) if h is not None)

  def score(states, targets):
    pick = lambda logp: jnp.take_along_axis(logp, targets[..., None],
                                            -1)[..., 0]
    stack = lambda xs: (jnp.stack(xs, -1) if xs else
                        jnp.zeros((*targets.shape, 0)))
    other = jax.lax.stop_gradient(matrix) if detach_head else matrix
    ahead = [_log_softmax(h, other, temperature)
             for h in states[hidden is not None:]]
    out = LogProbs(None, stack([pick(q) for q in ahead]))
    if hidden is None:
      return out
    main = _log_softmax(states[0], matrix, temperature)
    out = out._replace(main=pick(main))
    if entropy:
      out = out._replace(entropy=-jnp.sum(jnp.exp(main) * main, -1))
    if acceptance:
      best = jnp.argmax(main, -1)
      out = out._replace(
          top1=stack([jnp.argmax(q, -1) == best for q in ahead]),
          overlap=stack([jnp.sum(jnp.exp(jnp.minimum(main, q)), -1)
                         for q in ahead]))
    return out

  return _by_chunks(score, chunk, states, tokens[:, -responses:])
