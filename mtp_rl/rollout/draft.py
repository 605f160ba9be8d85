"""Speculative decoding: the MTP modules draft, the trunk verifies.

A step drafts d_1 .. d_k for the places behind a row's last token, reads that
token and the drafts in one forward pass, and keeps the drafts that pass and one
token more. Rejected ones need no undoing: `column` does not advance over them.

    coupled     t_j = argmax(log p_j + g_j) with the noise g_j of the place, as
                without drafts; d_j = argmax(log q_j + g_j), kept if d_j = t_j.
                The tokens are those of decoding without drafts, whatever the
                drafts are (Daliri et al. 2024, arXiv 2408.07978).
    rejection   d_j ~ q_j is kept with probability min(1, p_j / q_j); after the
                first that is not, the next token is drawn from max(p - q, 0),
                normalised (Leviathan et al. 2023, arXiv 2211.17192). The same
                distribution, other tokens, more of them accepted.

p and q are tempered and restricted alike. Depth k of the modules reads the
states of depth k - 1 and the tokens k ahead (models/mtp.py), and attends to its
own keys of earlier columns. Those within k columns of the end were computed
from drafts, so each step computes the last `window` columns again.

Most of a draft's cost is the output head. With rollout.draft_vocab=n it is
computed for the first n token ids alone; in byte-pair vocabularies these are
the frequent ones. The others are then never drafted, but drawn as ever.
"""

import jax
import jax.numpy as jnp

from mtp_rl import config as config_lib
from mtp_rl import prng
from mtp_rl.models import attention, mtp, transformer
from mtp_rl.rollout import decode


def window(config: config_lib.Config):
  """Return how many of the last columns the modules read in a step.

  A step advances by draft + 1 columns at most, and the keys of depth k of the
  k - 1 columns before were computed from drafts.
  """
  return 2 * config.rollout.draft


def _depth(params, k, below, tokens, rows_positions, here, past,
           config: config_lib.Config):
  """Return depth k's states, and keys and values [1, B, N, W, C].

  Depths beyond the last module apply that one again, to its own states.

  Args:
    params: the model's parameters.
    k: depth, from 1.
    below: [B, W, D], h^0 for a parallel module, else the states of depth k - 1.
    tokens: int32 [B, W], the tokens k ahead of each column.
    rows_positions: int32 [B, W], the columns' places among the valid ones.
    here: bool [B, W], columns that hold a token.
    past: `attention.Past` of all depths, or None.
    config: `config.Config`.
  """
  m = mtp.module_config(config.model, config.mtp)
  angles = transformer.angles_of(m, rows_positions)
  own = {'params': params['mtp'][f'depth_{min(k, config.mtp.modules)}']}
  rows = attention.full(here)
  if config.mtp.kind == 'parallel':
    h, new = mtp.ParallelMTPModule(m, True).apply(
        own, below, angles, rows, past, k - 1)
  else:
    table = params['embed']['embedding']
    embedding = jnp.take(table, tokens, axis=0).astype(jnp.dtype(m.dtype))
    h, new = mtp.MTPModule(m, config.mtp.concat, True).apply(
        own, below, embedding, angles, rows, past, k - 1)
  return h, jax.tree.map(lambda c: c[None], new)


def _reads_trunk(k, config: config_lib.Config):
  """Return whether depth k reads h^0 rather than the depth below."""
  return k == 1 or (config.mtp.kind == 'parallel' and k <= config.mtp.modules)


def read_columns(params, hidden, tokens, valid, *,
                 config: config_lib.Config):
  """Return the keys and values of every depth, [draft, B, N, T, C].

  Args:
    params: the model's parameters.
    hidden: [B, T, D], what depth 1 reads.
    tokens: int32 [B, T].
    valid: bool [B, T].
    config: `config.Config`.
  """
  out, below = [], hidden
  places = transformer.positions_of(valid)
  for k in range(1, config.rollout.draft + 1):
    below, new = _depth(
        params, k, hidden if _reads_trunk(k, config) else below,
        jnp.roll(tokens, -k, 1), places, valid, None, config)
    out.append(new)
  return jax.tree.map(lambda *c: jnp.concatenate(c), *out)


def _slice(x, columns, count):
  """Return `count` columns of every row [B, U, ...] from `columns` on."""
  return jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(
      row, at, count))(x, columns)


def propose(params, state, draw, *, config: config_lib.Config):
  """Return k drafts of every row, the modules' logits, and their cache.

  Args:
    params: the model's parameters.
    state: `decode.SamplingState`.
    draw: function (logits [B, 1, V], int32 [B, 1] places) -> int32 [B, 1].
    config: `config.Config`.

  Returns:
    int32 [B, k], float32 [B, k, V] (or rollout.draft_vocab of them), and keys
    and values [k, B, N, U, C].
  """
  count = window(config)
  start = state.column - count
  hidden = below = _slice(state.states, start, count)
  line = _slice(state.tokens, start + 1, count)
  here = _slice(decode.there(state), start, count)
  places = decode.positions(state, start, count)
  place = state.column[:, None] + 1 - state.prompt.shape[1]
  past = decode.past(state.ahead, state, start)
  logits, made = [], []
  for k in range(1, config.rollout.draft + 1):
    below, new = _depth(
        params, k, hidden if _reads_trunk(k, config) else below,
        line[:, k - 1:], places, here, past, config)
    made.append(new)
    logits.append(decode.head(params, below[:, -1:],
                              config.rollout.draft_vocab))
    line = jnp.concatenate([line, draw(logits[-1], place + k - 1)], 1)
  made = jax.tree.map(lambda *c: jnp.concatenate(c), *made)
  # Tokens are never negative. So the write waits for the last depth to read;
  # XLA would write first, into a copy of the whole cache.
  start = jnp.where(line[:, -1] >= 0, start, 0)
  return (line[:, count:], jnp.concatenate(logits, 1),
          transformer.write(state.ahead, made, start))


def reject(target, proposal, drafts, uniform, gumbel):
  """Verify drafts by rejection sampling.

  Args:
    target: float32 [B, k + 1, V], log p of the places.
    proposal: float32 [B, k, V], log q.
    drafts: int32 [B, k], drawn from q.
    uniform: float32 [B, k], in [0, 1).
    gumbel: float32 [B, k + 1, V], noise for the token behind the drafts.

  Returns:
    int32 [B, k + 1], the tokens: kept drafts, one token more, and a rest
    without meaning; and bool [B, k], drafts that are kept with all before.
  """
  p = jnp.exp(target)
  q = jnp.pad(jnp.exp(proposal), ((0, 0), (0, 1), (0, 0)))  # k + 1: no draft
  of = lambda x: jnp.take_along_axis(x[:, :-1], drafts[..., None], -1)[..., 0]
  kept = jnp.cumprod(uniform * of(q) < of(p), 1).astype(bool)
  rest = jnp.maximum(p - q, 0.)
  # Where rounding leaves nothing of p - q, p is q.
  rest = jnp.where(jnp.sum(rest, -1, keepdims=True) > 0, rest, p)
  other = jnp.argmax(jnp.log(rest) + gumbel, -1).astype(jnp.int32)
  longer = jnp.pad(drafts, ((0, 0), (0, 1)))
  more = jnp.pad(kept, ((0, 0), (0, 1)))
  return jnp.where(more, longer, other), kept


def speculate(params, state, *, config: config_lib.Config, ends, greedy=False):
  """Return the `decode.SamplingState` after one step with k drafts a row.

  The arguments are those of `sampler.generate`.
  """
  r, k = config.rollout, config.rollout.draft
  coupled = greedy or r.verify == 'coupled'
  places = state.column[:, None] + 1 - state.prompt.shape[1] + jnp.arange(k + 1)

  def draw(logits, place):
    if coupled:
      return decode.choose(logits, state.keys, place, r, greedy)[0]
    kept = decode.tempered(logits, r)[1] + decode.noise(
        state.keys, place, logits.shape[-1:], prng.Draw.DRAFT)
    return jnp.argmax(kept, -1).astype(jnp.int32)

  drafts, proposal, ahead = propose(params, state, draw, config=config)
  last = jnp.take_along_axis(state.tokens, state.column[:, None], 1)
  h, hidden, cache = decode.read(
      params, state, jnp.concatenate([last, drafts], 1), config=config)
  logits = decode.head(params, h)
  if coupled:
    tokens, logp = decode.choose(logits, state.keys, places, r, greedy)
    kept = jnp.cumprod(tokens[:, :-1] == drafts, 1).astype(bool)
  else:
    scored, target = decode.tempered(logits, r)
    uniform = jnp.exp(-jnp.exp(-decode.noise(  # of a Gumbel variable: its cdf
        state.keys, places[:, :-1], (), prng.Draw.ACCEPT)))
    proposed = jnp.pad(
        decode.tempered(proposal, r)[1],
        ((0, 0), (0, 0), (0, target.shape[-1] - proposal.shape[-1])),
        constant_values=-jnp.inf)
    tokens, kept = reject(
        target, proposed, drafts, uniform,
        decode.noise(state.keys, places, target.shape[-1:], prng.Draw.TOKEN))
    logp = jnp.take_along_axis(scored, tokens[..., None], -1)[..., 0]
  after = decode.emit(state, tokens, logp, jnp.sum(kept, 1) + 1, ends)
  return after._replace(
      cache=cache, ahead=ahead, states=decode.keep(state, hidden),
      counts=decode.count_forward(state, after, *kept.T))
