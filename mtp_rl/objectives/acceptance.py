"""How often drafts are accepted, and the losses that make it more often.

p is the main head's distribution of a token and q_k that of MTP module k, both
at the sampling temperature. Verified by rejection sampling (Leviathan et al.
2023), a token drafted from q_k is accepted with probability

    alpha_k = sum_v min(p, q_k) = 1 - TV_k,    TV_k = 1/2 sum_v |p - q_k|

The losses of depth k, each a mean over its valid tokens of the minibatch:

    kl       KL(p || q_k)
    tv       TV_k
    hybrid   w_k KL(p || q_k) + (1 - w_k) TV_k,    w_k = exp(-3 sg[alpha_k]),
             alpha_k the mean over the minibatch: one w_k for each depth
             (LK losses, arXiv 2602.23881)
    tv_e2e   1 - prod_{i <= k} (1 - TV_i): that not all of the first k drafts
             are accepted. The mean over k = 1 .. K, which even coefficients
             give, is end-to-end TV (Bebop, arXiv 2606.12370).

p is the teacher: no gradient reaches it. The gradient of q_k goes wherever
that of its log-probs goes (`mtp.detach_head`, `mtp.detach_hidden`, ..).
alpha_k and KL come from the chunked output head (`logprobs.token_logprobs`).
"""

import chex
import jax
import jax.numpy as jnp

from mtp_rl.objectives import masked

LOSSES = ('kl', 'tv', 'hybrid', 'tv_e2e')
_DECAY = 3.  # of w_k in 'hybrid'


def chained(overlap, mask):
  """Return how likely a draft is accepted together with all before it.

  The K modules read one column and draft consecutive tokens from there, so
  depth k at token s follows depth k - 1 at token s - 1:

      chain_k(s) = alpha_k(s) chain_{k-1}(s - 1),    chain_0 = 1

  Args:
    overlap: [B, S, K], alpha_k of each token.
    mask: bool [B, S, K], tokens that depth k can predict. In packed rows a
      chain stays within its sequence, because the mask does.

  Returns:
    [B, S, K], and bool [B, S, K]: where all k drafts are in the mask.
  """
  chex.assert_equal_shape([overlap, mask])
  if not overlap.shape[-1]:
    return overlap, mask
  later = lambda x: jnp.pad(x, ((0, 0), (1, 0)))[:, :-1]
  chains, wholes = [overlap[..., 0]], [mask[..., 0]]
  for k in range(1, overlap.shape[-1]):
    chains.append(later(chains[-1]) * overlap[..., k])
    wholes.append(later(wholes[-1]) & mask[..., k])
  return jnp.stack(chains, -1), jnp.stack(wholes, -1)


def losses(loss, kl, overlap, mask):
  """Return the loss of each depth, float32 [K].

  Args:
    loss: one of `LOSSES`.
    kl: [B, S, K], KL(p || q_k) in nats.
    overlap: [B, S, K], alpha_k.
    mask: bool [B, S, K], tokens that depth k can predict.
  """
  chex.assert_rank(overlap, 3)
  if loss == 'tv_e2e':
    chains, wholes = chained(overlap, mask)
    return masked.mean(1 - chains, wholes, axis=(0, 1))
  tv = masked.mean(1 - overlap, mask, axis=(0, 1))
  kl = masked.mean(kl, mask, axis=(0, 1))
  weight = {'kl': 1., 'tv': 0., 'hybrid': jnp.exp(
      -_DECAY * jax.lax.stop_gradient(1 - tv))}[loss]
  return weight * kl + (1 - weight) * tv


def metrics(top1, overlap, mask, mean=masked.mean):
  """Return acceptance by depth, and how many drafts in a row are accepted.

  Args:
    top1: bool [B, S, K], whether the argmax of depth k is the main head's.
    overlap: [B, S, K], alpha_k.
    mask: bool [B, S, K], tokens that depth k can predict.
    mean: function (x [B, S], where [B, S]) -> mean of x over where.

  Returns:
    dict of numbers; empty where K = 0.
  """
  chains, wholes = chained(overlap, mask)
  out = {}
  for k in range(mask.shape[-1]):
    out |= {f'mtp_{k + 1}/accept_top1': mean(top1[..., k], mask[..., k]),
            f'mtp_{k + 1}/accept_expected': mean(overlap[..., k],
                                                 mask[..., k]),
            f'mtp_{k + 1}/accept_cumulative': mean(chains[..., k],
                                                   wholes[..., k])}
  if out:
    out['mtp/accept_length'] = sum(
        v for n, v in out.items() if n.endswith('accept_cumulative'))
  return out
