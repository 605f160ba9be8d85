"""Losses of the MTP modules, one value per depth, for theta and for psi."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from mtp_rl import config as config_lib
from mtp_rl import types
from mtp_rl.objectives import acceptance, masked, policy


class Scores(NamedTuple):
  """What the losses read of the modules; see `logprobs.LogProbs`.

  Attributes:
    logprobs: [B, S, K].
    kl, overlap: [B, S, K], or None where no loss reads the teacher.
  """
  logprobs: jax.Array
  kl: jax.Array | None = None
  overlap: jax.Array | None = None


def reads_teacher(config: config_lib.MTP):
  """Return whether a loss compares with the main head's distribution."""
  return bool({config.theta_loss, config.psi_loss} & set(acceptance.LOSSES))


def cross_entropy(logprobs, mask):
  """Return each module's mean negative log-likelihood.

  Args:
    logprobs: [B, S, K].
    mask: bool [B, S, K], tokens that depth k can predict.

  Returns:
    float32 [K], means over each depth's valid tokens of the minibatch.
  """
  chex.assert_rank(logprobs, 3)
  chex.assert_equal_shape([logprobs, mask])
  return masked.mean(-logprobs, mask, axis=(0, 1))


def reference(batch: types.RolloutBatch, kind):
  """Return the log-probs that delta_MTP subtracts, [B, S, K].

  Args:
    batch: `types.RolloutBatch`.
    kind: 'main_old', log pi_old of the main head as in the paper and the
      authors' code, or 'mtp_old', the modules' own old log-probs.
  """
  if kind == 'main_old':
    return jnp.broadcast_to(batch.old_main[..., None], batch.old_mtp.shape)
  return batch.old_mtp


def policy_losses(logprobs, mask, batch: types.RolloutBatch,
                  rl: config_lib.RL, kind, row_scale=None, max_response=None):
  """Return each module's RL loss: the policy loss on the module's log-probs.

  The ratio is exp(delta_MTP); advantages and clips are those of the main head.

  Args:
    logprobs: [B, S, K], differentiable.
    mask: bool [B, S, K].
    batch: `types.RolloutBatch`.
    rl: `config.RL`.
    kind: 'main_old' or 'mtp_old', see `reference`.
    row_scale: float [B], factor on the advantages (regime occ_authors), or
      None.
    max_response: rollout.max_response; see `masked.Sequences`.

  Returns:
    float32 [K] and the mean fraction of clipped tokens.
  """
  chex.assert_rank(logprobs, 3)
  chex.assert_equal_shape([logprobs, mask, batch.old_mtp])
  old = reference(batch, kind)
  advantages = batch.advantages
  if row_scale is not None:
    advantages = advantages * row_scale[:, None]
  weights = None
  if rl.tis_cap:
    weights = policy.importance_weights(batch.old_main, batch.sampler,
                                        rl.tis_cap)
  outs = [policy.policy_loss(logprobs[..., k], old[..., k], advantages,
                             mask[..., k], rl, weights,
                             masked.Sequences(batch.segments, max_response))
          for k in range(logprobs.shape[-1])]
  return (jnp.stack([o.loss for o in outs]),
          jnp.mean(jnp.stack([o.clipfrac for o in outs])))


def supervised_losses(scores: Scores, mask, loss):
  """Return the losses that need no reward, float32 [K].

  Args:
    scores: `Scores`.
    mask: bool [B, S, K].
    loss: 'ce' or one of `acceptance.LOSSES`.
  """
  if loss == 'ce':
    return cross_entropy(scores.logprobs, mask)
  return acceptance.losses(loss, scores.kl, scores.overlap, mask)


def losses(scores: Scores, mask, batch, config: config_lib.Config, loss,
           row_scale=None):
  """Return the losses of the modules, float32 [K].

  Args:
    scores: `Scores`.
    loss: 'policy', or see `supervised_losses`.
    The others: see `policy_losses`.
  """
  if loss != 'policy':
    return supervised_losses(scores, mask, loss)
  return policy_losses(scores.logprobs, mask, batch, config.rl,
                       config.mtp.reference, row_scale,
                       config.rollout.max_response)[0]


def metrics(logprobs, mask, batch, config: config_lib.Config):
  """Return both losses of each depth and the clipped fraction, a dict."""
  ce = cross_entropy(logprobs, mask)
  pg, clipfrac = policy_losses(logprobs, mask, batch, config.rl,
                               config.mtp.reference,
                               max_response=config.rollout.max_response)
  out = {'mtp/pg_clipfrac': clipfrac}
  for k in range(logprobs.shape[-1]):
    out |= {f'mtp_{k + 1}/loss': ce[k], f'mtp_{k + 1}/pg_loss': pg[k]}
  return out
