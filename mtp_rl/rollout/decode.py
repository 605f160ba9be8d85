"""The state of rows that are being sampled, and one step of decoding.

Every row has its own column: the last token of a row, not read yet, is its
`column`. A step reads it and draws the next one (`extend`), or several with the
help of the MTP modules (`draft.speculate`).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtp_rl import config as config_lib
from mtp_rl import forward, prng
from mtp_rl.models import attention, transformer


class SamplingState(NamedTuple):
  """What the decoding loop carries; U >= R + S + rollout.draft.

  Attributes:
    tokens: int32 [B, U].
    prompt: bool [B, R], valid prompt tokens.
    column: int32 [B], of the last token, which is not read yet.
    logprobs: float32 [B, S], of the sampled tokens.
    done: bool [B], rows that have ended.
    keys: PRNG keys [B].
    cache: keys and values [L, B, N, U, C] of the columns before `column`.
    states: what depth 1 reads, [B, U, D]; None without drafts.
    ahead: keys and values of the MTP modules, [rollout.draft, B, N, U, C];
      None without drafts.
    counts: int32 [3 + draft]: forward passes of the trunk that rows took part
      in, tokens drawn by them, how many of them had drafts, and how many
      accepted draft 1, 2, ... before their row ended.
  """
  tokens: jax.Array
  prompt: jax.Array
  column: jax.Array
  logprobs: jax.Array
  done: jax.Array
  keys: jax.Array
  cache: Any
  states: jax.Array | None
  ahead: Any
  counts: jax.Array


def restrict(logits, top_k, top_p):
  """Return logits with all but the top-k and the top-p nucleus at -inf.

  The nucleus is the smallest set of most likely tokens whose probability
  reaches top_p; the most likely token always stays.

  Args:
    logits: float32 [..., V].
    top_k: tokens to keep; 0 keeps all.
    top_p: in (0, 1]; 1 keeps all.
  """
  if top_k and top_k < logits.shape[-1]:
    kth = jax.lax.top_k(logits, top_k)[0][..., -1:]
    logits = jnp.where(logits < kth, -jnp.inf, logits)
  if top_p < 1:
    order = jnp.sort(logits, axis=-1)[..., ::-1]
    probs = jax.nn.softmax(order)
    inside = jnp.cumsum(probs, -1) - probs < top_p
    lowest = jnp.min(jnp.where(inside, order, jnp.inf), -1, keepdims=True)
    logits = jnp.where(logits < lowest, -jnp.inf, logits)
  return logits


def tempered(logits, rollout: config_lib.Rollout):
  """Return log-probs that are scored, and those that are drawn from.

  Both sum to 1 as probabilities: rejection sampling compares those of two
  models, whose nuclei hold different shares.
  """
  logp = jax.nn.log_softmax(logits / rollout.temperature)
  if not rollout.top_k and rollout.top_p == 1:
    return logp, logp
  return logp, jax.nn.log_softmax(restrict(logp, rollout.top_k, rollout.top_p))


def noise(keys, places, shape, purpose):
  """Return Gumbel noise for W places of every row, float32 [B, W, *shape].

  A token's noise does not depend on the size of the vocabulary.

  Args:
    keys: PRNG keys [B].
    places: int32 [B, W], response columns.
    shape: of the noise of one place.
    purpose: `prng.Draw`.
  """
  one = lambda key, place: jax.random.gumbel(
      prng.fold(key, place, int(purpose)), shape)
  return jax.vmap(lambda key, row: jax.vmap(
      lambda place: one(key, place))(row))(keys, places)


def choose(logits, keys, places, rollout: config_lib.Rollout, greedy):
  """Draw tokens: the argmax of log-probs and Gumbel noise.

  Args:
    logits: float32 [B, W, V].
    keys: PRNG keys [B].
    places: int32 [B, W], response columns of the tokens.
    rollout: `config.Rollout`.
    greedy: take the most likely token instead.

  Returns:
    int32 [B, W], and their log-probs, float32 [B, W].
  """
  logp, kept = tempered(logits, rollout)
  if not greedy:
    kept = kept + noise(keys, places, logits.shape[-1:], prng.Draw.TOKEN)
  best = logits if greedy else kept
  # As argmax does; but one reduction of noise to a value and its place is not
  # vectorised by XLA for CPU.
  token = jnp.argmax(best == jnp.max(best, -1, keepdims=True), -1)
  token = token.astype(jnp.int32)
  return token, jnp.take_along_axis(logp, token[..., None], -1)[..., 0]


def head(params, h, first=0):
  """Return logits, float32 [B, W, V], of states after the final norm.

  Args:
    params: the model's parameters.
    h: [B, W, D].
    first: only those of the first so many tokens; 0: of all.
  """
  matrix = transformer.head_matrix(params)[:, :first or None]
  logits = jnp.matmul(h.reshape(-1, h.shape[-1]), matrix.astype(h.dtype),
                      preferred_element_type=jnp.float32)
  return logits.reshape(*h.shape[:2], -1)


def there(state):
  """Return bool [B, U]: columns that hold a token, read or not yet."""
  rest = jnp.ones((len(state.column), state.tokens.shape[1]
                   - state.prompt.shape[1]), bool)
  columns = jnp.arange(state.tokens.shape[1])
  return jnp.concatenate([state.prompt, rest], 1) & (
      columns <= state.column[:, None])


def past(cache, state, columns):
  """Return the `attention.Past` of the columns before `columns`, int32 [B]."""
  before = jnp.arange(state.tokens.shape[1]) < columns[:, None]
  return attention.Past(*cache, there(state) & before, columns)


def positions(state, columns, count):
  """Return int32 [B, count]: places among valid tokens, from `columns` on."""
  padding = state.prompt.shape[1] - jnp.sum(state.prompt, 1)
  return jnp.maximum(columns[:, None] + jnp.arange(count)
                     - padding[:, None], 0).astype(jnp.int32)


def read(params, state, tokens, *, config: config_lib.Config):
  """Read tokens from `state.column` on.

  Args:
    params: the model's parameters.
    state: `SamplingState`.
    tokens: int32 [B, W].
    config: `config.Config`.

  Returns:
    h^0 [B, W, D], what depth 1 reads [B, W, D], and the new cache.
  """
  net, column = forward.network(config), state.column
  x, new = net.apply(
      {'params': params}, tokens, positions(state, column, tokens.shape[1]),
      jnp.ones_like(tokens, bool), past(state.cache, state, column),
      method='extend')
  h = net.apply({'params': params}, x, method='norm')
  return h, h if config.mtp.hidden == 'post_norm' else x, transformer.write(
      state.cache, new, column)


def keep(state, hidden):
  """Return `state.states` with those of the columns from `column` on.

  Args:
    state: `SamplingState`.
    hidden: [B, W, D].
  """
  put = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice_in_dim(
      row, new, at, 0))
  return put(state.states, hidden.astype(state.states.dtype), state.column)


def over_columns(function, state):
  """Return a state with function(x, axis of columns) of its caches, states."""
  caches = lambda pair: jax.tree.map(
      lambda c: transformer.constrain_cache(function(c, 3)), pair)
  states = None if state.states is None else function(state.states, 1)
  return state._replace(cache=caches(state.cache), ahead=caches(state.ahead),
                        states=states)


def emit(state, tokens, logprobs, count, ends):
  """Append drawn tokens to the rows that are not done.

  Args:
    state: `SamplingState`.
    tokens: int32 [B, W].
    logprobs: float32 [B, W].
    count: int32 [B], how many of them count; those behind an EOS do not, nor
      those beyond the last column.
    ends: `tokenizers.Ends`.
  """
  width, (r, s) = tokens.shape[1], (state.prompt.shape[1],
                                    state.logprobs.shape[1])
  last = r + s - 1
  over = jnp.isin(tokens, jnp.asarray(ends.eos))
  before = jnp.cumsum(over, 1) - over  # EOS tokens before this one
  count = jnp.minimum(count, jnp.sum(before == 0, 1))
  count = jnp.minimum(count, last - state.column)
  count = jnp.where(state.done, 0, count)
  kept = jnp.arange(width) < count[:, None]
  texts, scores = state.tokens, state.logprobs
  for i in range(width):
    at = jnp.where(kept[:, i], state.column + 1 + i, -1)[:, None]
    texts = jnp.where(jnp.arange(texts.shape[1]) == at, tokens[:, i:i + 1],
                      texts)
    scores = jnp.where(jnp.arange(s) == at - r, logprobs[:, i:i + 1], scores)
  column = state.column + count
  return state._replace(
      tokens=texts, logprobs=scores, column=column,
      done=state.done | jnp.any(over & kept, 1) | (column == last))


def count_forward(state, emitted, *accepted):
  """Return the counts after a forward pass of the rows that are not done.

  Args:
    state: `SamplingState` before it.
    emitted: the one after it.
    *accepted: bool [B] each, rows that accepted draft 1, 2, ...; those behind
      the end of a row do not count.
  """
  alive = ~state.done
  rows = jnp.sum(alive)
  tokens = emitted.column - state.column
  more = [rows, jnp.sum(tokens), rows * bool(accepted),
          *[jnp.sum(a & alive & (tokens >= k))
            for k, a in enumerate(accepted, 1)]]
  more += [0] * (len(state.counts) - len(more))
  return state.counts + jnp.stack([jnp.int32(n) for n in more])


def extend(params, state, *, config: config_lib.Config, ends, greedy=False):
  """Return the `SamplingState` with one more token in every row.

  The arguments are those of `generate`.
  """
  tokens = jnp.take_along_axis(state.tokens, state.column[:, None], 1)
  h, hidden, cache = read(params, state, tokens, config=config)
  place = state.column[:, None] + 1 - state.prompt.shape[1]
  token, logp = choose(head(params, h), state.keys, place, config.rollout,
                       greedy)
  after = emit(state, token, logp, jnp.ones_like(state.column), ends)
  if state.states is not None:  # for drafts of later steps
    after = after._replace(states=keep(state, hidden))
  return after._replace(cache=cache, counts=count_forward(state, after))
