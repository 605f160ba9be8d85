"""Completions token by token: the rows of tokens.jsonl, for people to look at.

A row is one completion. Its lists have a value a response token (the end token
included, at most `LIMIT`), lists by depth one such list for each depth k:

    prompt, answer, extracted, reward   the problem and the verdict
    prompt_tokens, tokens               texts
    length                              of the whole response, in tokens
    main, entropy                       log-prob of the main head, its entropy
    mtp, top1, overlap                  by depth: log-prob; whether the argmax
                                        is the main head's; sum_v min(p, q_k)
    advantage, d_rl, d_mtp              of rows that an update has seen

Everything but the deltas is what the batch was made of: the score before the
update. delta_RL is 0 there, since pi is pi_old, so both deltas are those after
the step's updates, as one more minibatch of these rows would see them:

    delta_RL = log pi_after - log pi_old        (d_rl)
    delta_MTP = log pi_MTP,after - reference    (d_mtp; mtp.reference)

Summed over all tokens of the minibatch their product is <delta_RL, delta_MTP>,
which stands in for c. The sampled rows are of a step's first minibatch, which
all its later updates have moved as well. Where depth k cannot predict a token,
its values are null. So are entropy and all of a module's but its delta where
the rollout was not scored (rl.old_logprobs=rollout).
"""

import functools

import jax
import numpy as np

from mtp_rl import config as config_lib
from mtp_rl import occ, types
from mtp_rl.objectives import logprobs
from mtp_rl.objectives import mtp as mtp_loss

LIMIT = 1024  # response tokens of a row that are kept
PROMPTS = 4  # prompts of a rollout, two completions each
HELD_OUT = 4  # problems of an evaluation


def updates(batch, after, config: config_lib.Config):
  """Return what an update did to a batch, a dict of float32 arrays.

  Args:
    batch: `types.RolloutBatch`, unpacked or packed.
    after: `logprobs.LogProbs` of its rows under the parameters after it.
    config: `config.Config`.

  Returns:
    advantage and d_rl [B, S], d_mtp [B, S, K]; see the top of this file.
  """
  d_rl, d_mtp = _deltas(
      after.main, after.mtp, batch, config.mtp.reference)
  return {'advantage': batch.advantages, 'd_rl': np.asarray(d_rl),
          'd_mtp': np.asarray(d_mtp)}


@functools.partial(jax.jit, static_argnums=3)
def _deltas(main, mtp, batch, kind):
  seen = logprobs.mtp_mask(batch.rows.attending, batch.mask.shape[1],
                           mtp.shape[-1]) & batch.mask[..., None]
  return occ.deltas(main, mtp, batch.old_main,
                    mtp_loss.reference(batch, kind), batch.mask, seen)


_seen = jax.jit(logprobs.mtp_mask, static_argnums=(1, 2))


def contrasting(rewards, group):
  """Return two rows of some prompts: the best and the worst by reward.

  Prompts whose rewards differ come first; at most `PROMPTS` of them.

  Args:
    rewards: float [B], those of a prompt adjacent.
    group: G.
  """
  groups = np.asarray(rewards).reshape(-1, group)
  order = np.argsort(groups.min(1) == groups.max(1), kind='stable')
  out = []
  for i in order[:PROMPTS].tolist():
    best, worst = int(groups[i].argmax()), int(groups[i].argmin())
    if best == worst:  # all are equal
      worst = group - 1
    out += [i * group + j for j in dict.fromkeys((best, worst))]
  return out


def row(index, rows: types.Tokens, scores, tokenizer, max_response, more=None):
  """Return the part of a row of tokens.jsonl that the arrays hold.

  Args:
    index: of the row.
    rows: `types.Tokens`, one completion a row.
    scores: their `logprobs.LogProbs` with entropy and acceptance.
    tokenizer: see `tokenizers`.
    max_response: S.
    more: from `updates`, or None.
  """
  count = int(rows.valid[index, -max_response:].sum())
  kept = min(count, LIMIT)
  prompt = rows.tokens[index, :-max_response]
  depths = scores.mtp.shape[-1]
  seen = np.asarray(_seen(rows.valid[index:index + 1], max_response,
                          depths))[0, :kept]
  flat = lambda x: _numbers(x[index, :kept])
  by_depth = lambda x: [_numbers(x[index, :kept, k], seen[:, k])
                        for k in range(depths)]
  if scores.entropy is None:
    unknown = np.full(scores.mtp.shape, np.nan, np.float32)
    scores = scores._replace(
        entropy=np.full(scores.main.shape, np.nan, np.float32), mtp=unknown,
        top1=unknown, overlap=unknown)
  out = {
      'prompt_tokens': tokenizer.pieces(
          prompt[rows.valid[index, :-max_response]]),
      'tokens': tokenizer.pieces(
          rows.tokens[index, rows.tokens.shape[1] - max_response:][:kept]),
      'length': count, 'main': flat(scores.main),
      'entropy': flat(scores.entropy), 'mtp': by_depth(scores.mtp),
      'top1': by_depth(scores.top1), 'overlap': by_depth(scores.overlap)}
  if more is not None:
    out |= {'advantage': flat(more['advantage']), 'd_rl': flat(more['d_rl']),
            'd_mtp': by_depth(more['d_mtp'])}
  return out


def _numbers(x, where=None):
  """Return six significant digits of x; null where it is not finite."""
  where = np.isfinite(x) if where is None else where & np.isfinite(x)
  if x.dtype == bool:
    return [int(v) if w else None for v, w in zip(x, where)]
  return [float(f'{v:.6g}') if w else None for v, w in zip(x.tolist(), where)]
