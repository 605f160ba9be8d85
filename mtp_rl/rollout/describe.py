"""The metrics of a rollout: of its batch, and of what the sampler counted."""

import numpy as np
from absl import logging

from mtp_rl import types
from mtp_rl.models import moe
from mtp_rl.objectives import acceptance, logprobs
from mtp_rl.objectives import advantages as advantages_lib

# Of so many first drafts fewer than this share accepted: something is wrong.
_MANY, _RARE = 200, .02


def batch_metrics(batch: types.RolloutBatch, old, rewards, group, ends):
  """Return the metrics of a rollout, a dict of numbers.

  Args:
    batch: `types.RolloutBatch`.
    old: `logprobs.LogProbs` with entropy and acceptance; without, if they are
      the sampler's own.
    rewards: float [B].
    group: G.
    ends: `tokenizers.Ends`.
  """
  mask, length = batch.mask, batch.mask.sum(1)
  full = mask.all(1)
  tokens = max(mask.sum(), 1)
  out = {
      'reward/mean': rewards.mean(), 'reward/std': rewards.std(),
      'reward/varied_groups': advantages_lib.varied_groups(
          rewards, group).mean(),
      'response_length/mean': length.mean(),
      'response_length/max': length.max(),
      # A full row whose last token is no EOS was cut off.
      'response_length/clip_ratio': (
          full & ~np.isin(batch.tokens[:, -1], ends.eos)).mean()}
  if old.entropy is None:
    return out
  out |= {'actor/entropy': (old.entropy * mask).sum() / tokens,
          'rollout/logprob_gap_max': np.abs(
              (old.main - batch.sampler) * mask).max()}
  if old.load is not None:
    out |= moe.balance(old.load)
  modules = old.mtp.shape[-1]
  if modules:
    seen = np.asarray(logprobs.mtp_mask(batch.valid, mask.shape[1], modules))
    mean = lambda x, where: (np.asarray(x) * where).sum() / max(
        np.asarray(where).sum(), 1)
    out |= acceptance.metrics(old.top1, old.overlap, seen, mean)
  return out


def seconds(draws):
  """Return metrics of the parts that `slots` timed, {} without slots."""
  names = ('prefill', 'decode', 'draft', 'wait')
  return {f'timing_s/rollout_{n}': sum(d.get(n, 0.) for d in draws)
          for n in names if all(draws)}


def drafting(counts):
  """Return metrics of the drafts from `decode.SamplingState.counts`.

  Says once, on stderr, that drafts are hardly ever accepted.
  """
  forwards, tokens, drafted, *accepted = counts.tolist()
  out = {'rollout/tokens_per_forward': tokens / max(forwards, 1)}
  if not accepted:
    return out
  if drafted >= _MANY and accepted[0] < _RARE * drafted:
    logging.log_first_n(
        logging.WARNING, 'of %d first drafts %d were accepted: the MTP modules '
        'draft in vain; train them first (warmup.mtp_coef, warmup.train=mtp) '
        'or set rollout.draft=0', 1, drafted, accepted[0])
  return out | {'rollout/draft_share': drafted / max(forwards, 1)} | {
      f'rollout/accepted_{k}': n / max(drafted, 1)
      for k, n in enumerate(accepted, 1)}
