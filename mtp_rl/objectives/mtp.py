"""Losses of the MTP heads, one value a depth, for theta and for psi."""

import jax.numpy as jnp

from mtp_rl import masked
from mtp_rl.objectives import policy


def cross_entropy(logprobs, mask):
  """Return each head's mean negative log-likelihood.

  Args:
    logprobs: [B, S, K].
    mask: bool [B, S, K], tokens that depth k can predict.

  Returns:
    float32 [K], means over each depth's valid tokens of the minibatch.
  """
  return masked.mean(-logprobs, mask, axis=(0, 1))


def reference(batch, kind):
  """Return what delta_MTP is measured from, [B, S, K].

  Args:
    batch: `types.RolloutBatch`.
    kind: 'main_old', log pi_old of the main head as in the paper and the
      authors' code, or 'mtp_old', the heads' own old log-probs.
  """
  if kind == 'main_old':
    return jnp.broadcast_to(batch.old_main[..., None], batch.old_heads.shape)
  return batch.old_heads


def policy_losses(logprobs, mask, batch, rl, kind, scale=None, longest=None):
  """Return each head's RL loss: the main head's, on the head's log-probs.

  The ratio is exp(delta_MTP), advantages and clips are the main head's.

  Args:
    logprobs: [B, S, K], differentiable.
    mask: bool [B, S, K].
    batch: `types.RolloutBatch`.
    rl: `config.RL`.
    kind: 'main_old' or 'mtp_old', see `reference`.
    scale: float [B] on the advantages (regime occ_authors), or None.
    longest: rollout.max_response; see `masked.Sequences`.

  Returns:
    float32 [K] and the mean fraction of clipped tokens.
  """
  old = reference(batch, kind)
  advantages = batch.advantages
  if scale is not None:
    advantages = advantages * scale[:, None]
  weights = None
  if rl.tis_cap:
    weights = policy.importance_weights(batch.old_main, batch.sampler,
                                        rl.tis_cap)
  outs = [policy.policy_loss(logprobs[..., k], old[..., k], advantages,
                             mask[..., k], rl, weights,
                             masked.Sequences(batch.segments, longest))
          for k in range(logprobs.shape[-1])]
  return (jnp.stack([o.loss for o in outs]),
          jnp.mean(jnp.stack([o.clipfrac for o in outs])))
