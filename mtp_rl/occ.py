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


def decomposition_cross(lam, c_cross, c_same, v2, eta, smoothness):
  """Return Delta_MTP(lambda) with the two roles of c told apart, one head.

  Delta = eta lambda c_cross - L eta^2 lambda c_same - L eta^2 lambda^2 / 2 v^2

  What a step gains in expectation depends on the objective's own slope along
  g_MTP, and c_cross, from disjoint samples, estimates it without the noise
  that g_RL and g_MTP of one batch share; the penalty is that of the very step
  taken. c_cross = c_same is `decomposition`.
  """
  return (eta * lam * c_cross
          - smoothness * eta ** 2 * (lam * c_same + lam ** 2 / 2 * v2))


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


def best_gain(c, v2, smoothness, eta):
  """Return Delta_MTP(lambda*) = (1 - L eta)^2 c^2 / (2 L v^2), one head."""
  return (1 - smoothness * eta) ** 2 * c ** 2 / (2 * smoothness * v2)


def helpful_interval(star):
  """Return the lambdas between which Delta_MTP > 0: 0 and 2 lambda*."""
  return jnp.minimum(0., 2 * star), jnp.maximum(0., 2 * star)


def solve(gram, rhs, config):
  """Return Gram^-1 rhs, or rhs_k / v_k^2 with `config.OCC.heads` 'per_head'.

  K = 1 is the paper's division by v^2 + eps. For K > 1 a ridge of eps plus
  1e-6 of the mean v^2 keeps (nearly) parallel heads solvable.

  Args:
    gram: [K, K].
    rhs: [K].
    config: `config.OCC`.
  """
  k = rhs.shape[0]
  if k == 1 or config.heads == 'per_head':
    return rhs / (jnp.diagonal(gram) + config.eps)
  ridge = config.eps + 1e-6 * jnp.trace(gram) / k
  return jnp.linalg.solve(gram + ridge * jnp.eye(k), rhs)


def coefficient(products, config):
  """Return lambda = lambda_+ Gram^-1 c, unbounded, [K]."""
  return config.lambda_plus * solve(products.gram, products.c, config)


def cross_fitted_coefficient(cross, products, smoothness, config):
  """Return lambda* = Gram^-1 (c_cross / (L eta) - c_same), [K].

  The maximum of `decomposition_cross`; c_cross = c_same is lambda_+ c / v^2.

  Args:
    cross: [K], <g_RL, g_k> across disjoint samples.
    products: `Products` of the whole batch's gradients.
    smoothness: L eta.
    config: `config.OCC`.
  """
  return solve(products.gram, cross / smoothness - products.c, config)


def cross_products(parts, c, dot):
  """Return c_cross [K] of n >= 2 disjoint samples: a U-statistic.

  c_cross = n / (n - 1) (c - sum_i <g_RL,i, g_k,i>), unbiased for
  <E g_RL, E g_k> of the whole batch.

  Args:
    parts: n pairs (g_RL, [g_1 .. g_K]) that add up to the batch's gradients.
    c: [K], <g_RL, g_k> of the batch's gradients.
    dot: inner product of two gradients.

  Raises:
    ValueError: there is one part only.
  """
  n = len(parts)
  if n < 2:
    raise ValueError('c_cross needs disjoint parts; make the Minibatch with '
                     'pieces >= 2')
  within = [sum(dot(rl, g[k]) for rl, g in parts) for k in range(len(c))]
  return n / (n - 1) * (c - jnp.stack(within))


def preconditioned_coefficient(first, products, config):
  """Return lambda* of a step eta P (g_RL + lambda g_MTP), [K].

  Delta = eta lambda <g_RL, P g> - L eta^2 lambda <P g_RL, P g>
          - L eta^2 lambda^2 ||P g||^2 / 2,  with 1 / (L eta) = 1 + lambda_+.

  Only P's shape is known, not its scale (that is in the learning rate): P is
  scaled so that <g_RL, P g_RL> = ||P g_RL||^2, and P = 1 is lambda_+ c / v^2.

  Args:
    first: `Products` with one factor P: <g_RL, P g_k>, -, <g_RL, P g_RL>.
    products: `Products` of the preconditioned gradients P g.
    config: `config.OCC`.
  """
  scale = first.rl / jnp.maximum(products.rl, 1e-30)
  slope = first.c / scale - products.c
  return (solve(products.gram, slope, config)
          + config.lambda_plus * solve(products.gram, first.c / scale, config))


def gradient_products(g_rl, g, dot):
  """Return the `Products` of g_RL and the list g of K gradients."""
  return Products(jnp.stack([dot(g_rl, x) for x in g]),
                  jnp.stack([jnp.stack([dot(a, b) for b in g]) for a in g]),
                  dot(g_rl, g_rl))


def deltas(main, heads, old_main, reference, mask, head_mask):
  """Return delta_RL [B, S] and delta_MTP [B, S, K], without gradient.

  delta_RL = log pi - log pi_old,  delta_MTP = log pi^MTP - reference, both
  float32 and 0 at tokens that the head does not predict.

  Args:
    main, old_main: [B, S].
    heads, reference: [B, S, K].
    mask: bool [B, S].
    head_mask: bool [B, S, K].
  """
  d_rl = jnp.where(mask, main - old_main, 0.).astype(jnp.float32)
  d_mtp = jnp.where(head_mask, heads - reference, 0.).astype(jnp.float32)
  return jax.lax.stop_gradient((d_rl, d_mtp))


def logprob_products(d_rl, d_mtp):
  """Return the paper's stand-ins for the inner products of gradients.

  c = <delta_RL, delta_MTP>,  v^2 = ||delta_MTP||^2, sums over all tokens of
  the minibatch (see `deltas`).
  """
  return Products(jnp.einsum('bs,bsk->k', d_rl, d_mtp),
                  jnp.einsum('bsk,bsl->kl', d_mtp, d_mtp),
                  jnp.sum(d_rl * d_rl))


def authors_coefficient(d_rl, d_mtp, plus, eps):
  """Return the authors' element-wise form, [..., K].

  lambda = lambda_+ / K mean(delta_RL delta_MTP / (delta_MTP^2 + eps)), the
  mean over all positions, padding included (where both deltas are zero).

  Args:
    d_rl: [..., B, S].
    d_mtp: [..., B, S, K].
    plus: lambda_+.
    eps: 1e-8 in the paper.
  """
  ratio = d_rl[..., None] * d_mtp / (d_mtp ** 2 + eps)
  return plus / d_mtp.shape[-1] * jnp.mean(ratio, axis=(-3, -2))


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


def vertex(grid, values):
  """Return the argument of the maximum of a function sampled on a grid.

  The vertex of the parabola through the best point and its two neighbours
  (through the three outermost points at an end), clipped to the grid.

  Args:
    grid: [n], evenly spaced, ascending, n >= 3.
    values: [n].
  """
  step = grid[1] - grid[0]
  i = jnp.clip(jnp.argmax(values), 1, grid.shape[0] - 2)
  low, middle, high = values[i - 1], values[i], values[i + 1]
  bend = low - 2 * middle + high
  inner = grid[i] + step * (low - high) / 2 / jnp.where(bend < 0, bend, 1.)
  best = jnp.where(bend < 0, inner, grid[jnp.argmax(values)])
  return jnp.clip(best, grid[0], grid[-1])


def initial_state(heads, plus=1.):
  """Return the `types.OccState` before the first update of K heads.

  L eta starts where lambda_+ = (1 - L eta) / (L eta) puts it.
  """
  # Checkpoints hold no empty arrays: K = 0 keeps one unused entry.
  return types.OccState(jnp.zeros((max(heads, 1),), jnp.float32), jnp.int32(0),
                        jnp.float32(1 / (1 + plus)))


def smoothness_ratio(predicted, achieved, length):
  """Return L eta of a step u = eta d from what it achieved, one number.

  predicted = <g_RL, u>, achieved = J(theta + u) - J(theta), length = <d, u>:
  achieved = predicted - L eta^2 ||d||^2 / 2, so
  L eta = 2 (predicted - achieved) / length. For another optimiser than SGD
  this defines the L that its step meets.
  """
  return 2 * (predicted - achieved) / length


def track_smoothness(state, ratio, decay=.9, low=.05):
  """Return the OccState with a new L eta averaged in.

  Values are clipped to [low, 1] (lambda_+ from (1 - low) / low to 0), and one
  that is not finite is left out.
  """
  good = jnp.isfinite(ratio)
  ratio = jnp.clip(jnp.where(good, ratio, 1.), low, 1.)
  mixed = decay * state.smoothness + (1 - decay) * ratio
  return state._replace(smoothness=jnp.where(good, mixed, state.smoothness))


def guard(lam, products, rho):
  """Return lambda scaled down until ||sum_k lambda_k g_k|| <= rho ||g_RL||."""
  length = jnp.sqrt(lam @ products.gram @ lam)
  limit = rho * jnp.sqrt(products.rl)
  return lam * jnp.where(length > limit, limit / jnp.where(
      length > 0, length, 1.), 1.)


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
  return used, state._replace(average=average, count=count)


def cosine(products):
  """Return c_k / (||g_RL|| ||g_k||), [K]; 0 where either vanishes."""
  scale = jnp.sqrt(products.rl * jnp.diagonal(products.gram))
  return jnp.where(scale > 0, products.c / jnp.where(scale > 0, scale, 1.), 0.)
