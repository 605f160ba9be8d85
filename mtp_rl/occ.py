"""Optimal coefficient calibration: every equation of the method, once.

Wang et al., arXiv 2605.28184. theta: the parameters that the RL objective J
and the MTP objectives share. One update is theta + eta (g_RL + G lambda) with
g_RL = grad J and the columns g_k of G the ascent directions of K MTP heads.

  c_k = <g_RL, g_k>     Gram_kl = <g_k, g_l>     v_k^2 = Gram_kk

Everything here is a pure function of arrays; K >= 1 throughout.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtp_rl import types


class Products(NamedTuple):
  """Inner products of one minibatch, of gradients or of their stand-ins.

  Attributes:
    c: float32 [K], <g_RL, g_k>.
    gram: float32 [K, K], <g_k, g_l>.
    rl: float32 [], ||g_RL||^2.
  """
  c: jax.Array
  gram: jax.Array
  rl: jax.Array


def decomposition(lam, c, v2, eta, smoothness):
  """Return Delta_MTP(lambda), the part of J's lower bound owed to MTP.

  Delta = eta lambda (1 - L eta) c  -  L eta^2 lambda^2 / 2 v^2

  Args:
    lam, c, v2: arrays of one shape (one head).
    eta: step size.
    smoothness: L, J's Lipschitz constant of the gradient.
  """
  return (eta * lam * (1 - smoothness * eta) * c
          - smoothness * eta ** 2 * lam ** 2 / 2 * v2)


def decomposition_curvature(lam, c, rl_h_mtp, mtp_h_mtp, eta):
  """Return the second-order Taylor form of Delta_MTP(lambda), one head.

  Delta = lambda eta c + lambda eta^2 g_RL'H g_MTP
          + lambda^2 eta^2 / 2 g_MTP'H g_MTP
  """
  return (lam * eta * c + lam * eta ** 2 * rl_h_mtp
          + lam ** 2 * eta ** 2 / 2 * mtp_h_mtp)


def lambda_plus(eta, smoothness):
  """Return lambda_+ = (1 - L eta) / (L eta)."""
  return (1 - smoothness * eta) / (smoothness * eta)


def per_head_coefficient(products, plus, eps):
  """Return lambda_k = lambda_+ c_k / (v_k^2 + eps), [K]: each head alone."""
  return plus * products.c / (jnp.diagonal(products.gram) + eps)


def joint_coefficient(products, plus, eps):
  """Return lambda = lambda_+ Gram^-1 c, [K]: the heads taken together.

  K = 1 is the paper's c / (v^2 + eps). For K > 1 a ridge of eps plus 1e-6 of
  the mean v^2 keeps (nearly) parallel heads solvable.
  """
  k = products.c.shape[0]
  if k == 1:
    return per_head_coefficient(products, plus, eps)
  ridge = eps + 1e-6 * jnp.trace(products.gram) / k
  return plus * jnp.linalg.solve(products.gram + ridge * jnp.eye(k),
                                 products.c)


def coefficient(products, config):
  """Return the unbounded lambda of `config.OCC`'s `heads` choice, [K]."""
  rule = joint_coefficient if config.heads == 'joint' else per_head_coefficient
  return rule(products, config.lambda_plus, config.eps)


def logprob_products(main, heads, old_main, reference, mask, head_mask):
  """Return the paper's log-probability stand-ins for the inner products.

  delta_RL = log pi - log pi_old,  delta_MTP = log pi^MTP - reference
  c = <delta_RL, delta_MTP>,  v^2 = ||delta_MTP||^2

  Sums run over the valid tokens of the whole minibatch, each pair over the
  tokens that both of its members predict. No gradient flows.

  Args:
    main, old_main: [B, S].
    heads, reference: [B, S, K].
    mask: bool [B, S].
    head_mask: bool [B, S, K].

  Returns:
    `Products`.
  """
  d_rl = jnp.where(mask, main - old_main, 0.).astype(jnp.float32)
  d_mtp = jnp.where(head_mask, heads - reference, 0.).astype(jnp.float32)
  products = Products(jnp.einsum('bs,bsk->k', d_rl, d_mtp),
                      jnp.einsum('bsk,bsl->kl', d_mtp, d_mtp),
                      jnp.sum(d_rl * d_rl))
  return jax.lax.stop_gradient(products)


def authors_coefficient(main, heads, old_main, reference, plus, eps):
  """Return the authors' element-wise form, one lambda a microbatch.

  lambda = lambda_+ mean(delta_RL delta_MTP / (delta_MTP^2 + eps)), the mean
  over all positions, padding included (where both deltas are zero).

  Args:
    main, old_main: [M, B/M, S], padding set to equal values.
    heads, reference: [M, B/M, S, 1], likewise.
    plus: lambda_+.
    eps: 1e-8 in the paper.

  Returns:
    float32 [M].
  """
  d_rl = main - old_main
  d_mtp = (heads - reference)[..., 0]
  lam = plus * jnp.mean(d_rl * d_mtp / (d_mtp ** 2 + eps), axis=(1, 2))
  return jax.lax.stop_gradient(lam)


def directional(objective, theta, direction):
  """Return J's gradient, its slope and its Hessian along a direction.

  One jax.jvp of jax.value_and_grad(J): forward over reverse.

  Args:
    objective: theta -> (J, aux).
    theta: parameters.
    direction: tree like theta, g_MTP.

  Returns:
    (J, aux), g = grad J, c = <g, direction>, and H direction.
  """
  ((value, g), ((c, _), hv)) = jax.jvp(
      jax.value_and_grad(objective, has_aux=True), (theta,), (direction,))
  return value, g, c, hv


def curvature_coefficient(products, rl_h_mtp, mtp_h_mtp, eta, fallback):
  """Return lambda*_H, the maximum of the second-order Taylor form, [K].

  lambda*_H = -(c + eta g_RL'H g_MTP) / (eta g_MTP'H g_MTP); for K heads the
  solution of  -eta G'HG lambda = c + eta G'H g_RL.

  Only where G'HG is negative definite does that maximum exist. Elsewhere J
  grows without bound along some combination of heads as far as second order
  can see, and `fallback` (the bound form's lambda_+ Gram^-1 c) is returned.

  Args:
    products: `Products` of the exact gradients.
    rl_h_mtp: [K], g_RL'H g_k.
    mtp_h_mtp: [K, K], g_k'H g_l.
    eta: float, step size.
    fallback: [K].

  Returns:
    float32 [K], and bool []: whether the curvature was used.
  """
  k = products.c.shape[0]
  penalty = -eta * (mtp_h_mtp + mtp_h_mtp.T) / 2
  gain = products.c + eta * rl_h_mtp
  if k == 1:
    usable = penalty[0, 0] > 0
    solution = gain / jnp.where(usable, penalty[0, 0], 1.)
  else:
    values = jnp.linalg.eigvalsh(penalty)
    usable = values[0] > 1e-6 * jnp.maximum(values[-1], 0.)
    safe = jnp.where(usable, penalty, jnp.eye(k))
    solution = jnp.linalg.solve(safe, gain)
  usable &= jnp.all(jnp.isfinite(solution))
  return jnp.where(usable, solution, fallback), usable


def initial_state(heads):
  """Return the `types.OccState` before the first update of K heads."""
  # Checkpoints hold no empty arrays: K = 0 keeps one unused entry.
  return types.OccState(jnp.zeros((max(heads, 1),), jnp.float32), jnp.int32(0))


def track(state, lam, config):
  """Bound lambda, average it over updates, and carry the average on.

  A lambda that is not finite counts as 0. The moving average is corrected for
  its zero start (as in Adam), and each new value is clipped to
  [lambda_min, lambda_max] before it enters, so the average stays inside.

  Args:
    state: `types.OccState`.
    lam: float32 [K], unbounded.
    config: `config.OCC`.

  Returns:
    float32 [K] to use in this update, and the new state.
  """
  lam = jnp.where(jnp.isfinite(lam), lam, 0.)
  lam = jnp.clip(lam, config.lambda_min, config.lambda_max)
  lam = jax.lax.stop_gradient(lam)
  count = state.count + 1
  average = config.ema * state.average + (1 - config.ema) * lam
  used = average / (1 - config.ema ** count) if config.ema else lam
  return used, types.OccState(average, count)


def cosine(products):
  """Return c_k / (||g_RL|| ||g_k||), [K]; 0 where either vanishes."""
  scale = jnp.sqrt(products.rl * jnp.diagonal(products.gram))
  return jnp.where(scale > 0, products.c / jnp.where(scale > 0, scale, 1.), 0.)
