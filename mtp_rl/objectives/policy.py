"""Policy losses on token log-probs: ratio -> clip -> aggregate.

d = log pi - log pi_old, r = exp(clip(d, -20, 20)), A advantage, m mask. All
arrays are [B, S] and float32, of the whole minibatch.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from mtp_rl import config as config_lib
from mtp_rl.objectives import masked


class PolicyLoss(NamedTuple):
  """A loss and its statistics, float32 [] each.

  Attributes:
    loss: to be minimised.
    clipfrac: fraction of tokens whose clip is active.
    kl: mean of -d, an estimate of KL(pi_old || pi) on samples of pi_old.
  """
  loss: jax.Array
  clipfrac: jax.Array
  kl: jax.Array


def ratio(d):
  """Return r = exp(clip(d, -20, 20))."""
  return jnp.exp(jnp.clip(d, -20., 20.))


def ppo(d, advantages, clip_low, clip_high, dual_clip):
  """Return the clipped surrogate of PPO and DAPO, and where a clip is active.

  L = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)); with dual_clip c > 0
  and A < 0: min(L, -A c) (Ye et al. 2020), which bounds the loss of a token
  with a negative advantage and a large ratio.
  """
  r = ratio(d)
  plain = -advantages * r
  clipped = -advantages * jnp.clip(r, 1 - clip_low, 1 + clip_high)
  loss, active = jnp.maximum(plain, clipped), clipped > plain
  if dual_clip:
    bound = -advantages * dual_clip
    over = (advantages < 0) & (loss > bound)
    loss, active = jnp.where(over, bound, loss), active | over
  return loss, active


def gspo(logprob, d, mask, advantages, clip_low, clip_high, segments=None):
  """Return GSPO's loss (Zheng et al. 2025) and where its clip is active.

  s_t = exp(sg(mean_t d) + log pi - sg(log pi)), exponent capped at 10: its
  value is the length-normalised ratio of the sequence, its gradient that of
  the token. The mean is over one sequence (`masked.Sequences.segments`).
  """
  mean = masked.spread(masked.sequence_means(d, mask, segments)[0], segments)
  log_s = jax.lax.stop_gradient(mean - logprob) + logprob
  s = jnp.exp(jnp.minimum(log_s, 10.))
  plain = -advantages * s
  clipped = -advantages * jnp.clip(s, 1 - clip_low, 1 + clip_high)
  return jnp.maximum(plain, clipped), clipped > plain


def cispo(logprob, d, advantages, clip_low, clip_high):
  """Return CISPO's loss -sg(clip r) A log pi (MiniMax 2025), and its clips."""
  r = ratio(d)
  weight = jnp.clip(r, 1 - clip_low, 1 + clip_high)
  return (-jax.lax.stop_gradient(weight) * advantages * logprob, weight != r)


def policy_loss(logprob, old, advantages, mask, rl: config_lib.RL,
                weights=None, sequences=masked.ROWS):
  """Return the policy loss of one predictor (to be minimised: L = -J).

  Args:
    logprob: [B, S] of the main head or of a module, differentiable.
    old: [B, S], log-probs in the denominator of the ratio.
    advantages: [B, S].
    mask: bool [B, S].
    rl: `config.RL`: loss, clips and aggregation.
    weights: [B, S] truncated importance weights, or None.
    sequences: `masked.Sequences`.

  Returns:
    `PolicyLoss`.

  Raises:
    ValueError: rl.loss is unknown.
  """
  chex.assert_rank(logprob, 2)
  chex.assert_equal_shape([logprob, old, advantages, mask])
  d = jnp.where(mask, logprob - old, 0.)
  if rl.loss == 'ppo':
    loss, active = ppo(d, advantages, rl.clip_low, rl.clip_high, rl.dual_clip)
  elif rl.loss == 'gspo':
    loss, active = gspo(logprob, d, mask, advantages, rl.clip_low,
                        rl.clip_high, sequences.segments)
  elif rl.loss == 'cispo':
    loss, active = cispo(logprob, d, advantages, rl.clip_low, rl.clip_high)
  else:
    raise ValueError(f'rl.loss={rl.loss!r} is none of ppo, gspo, cispo')
  if weights is not None:
    loss = loss * weights
  return PolicyLoss(masked.aggregate(loss, mask, rl.aggregation, sequences),
                    masked.mean(active, mask), masked.mean(-d, mask))


def importance_weights(old, sampler, cap):
  """Return min(pi_old / pi_sampler, cap), without gradient, [B, S].

  They correct for differences between the sampler's and the trainer's
  log-probs (truncated importance sampling, Yao et al. 2025).
  """
  return jax.lax.stop_gradient(jnp.minimum(ratio(old - sampler), cap))


def kl_penalty(logprob, reference, kind):
  """Return the per-token estimate of KL(pi || pi_ref), [B, S].

  With delta = log pi - log pi_ref (Schulman 2020): k1 = delta,
  k2 = delta^2 / 2, k3 = exp(-delta) + delta - 1.

  Raises:
    ValueError: kind is unknown.
  """
  delta = jnp.clip(logprob - reference, -20., 20.)
  if kind == 'k1':
    return delta
  if kind == 'k2':
    return delta ** 2 / 2
  if kind == 'k3':
    return jnp.exp(-delta) + delta - 1
  raise ValueError(f'rl.kl_kind={kind!r} is none of k1, k2, k3')


def rl_loss(logprob, entropy, batch, rl: config_lib.RL, max_response=None):
  """Return L_RL of the main head: surrogate + KL - entropy bonus.

  Args:
    logprob: [B, S], differentiable.
    entropy: [B, S] or None where rl.entropy_coef is 0.
    batch: `types.RolloutBatch` of the whole minibatch.
    rl: `config.RL`.
    max_response: rollout.max_response; see `masked.Sequences`.

  Returns:
    the loss, float32 [], and a dict of metrics, float32 [].
  """
  sequences = masked.Sequences(batch.segments, max_response)
  weights = None
  if rl.tis_cap:
    weights = importance_weights(batch.old_main, batch.sampler, rl.tis_cap)
  out = policy_loss(logprob, batch.old_main, batch.advantages, batch.mask, rl,
                    weights, sequences)
  loss = out.loss
  metrics = {'actor/pg_loss': out.loss, 'actor/pg_clipfrac': out.clipfrac,
             'actor/ppo_kl': out.kl}
  if rl.kl_coef:
    kl = masked.aggregate(kl_penalty(logprob, batch.reference, rl.kl_kind),
                          batch.mask, rl.aggregation, sequences)
    loss = loss + rl.kl_coef * kl
    metrics['actor/kl_loss'] = kl
  if rl.entropy_coef:
    loss = loss - rl.entropy_coef * masked.aggregate(
        entropy, batch.mask, rl.aggregation, sequences)
  return loss, metrics
