"""Optimal coefficient calibration (OCC): the equations of the method.

Wang et al., arXiv 2605.28184. theta: the parameters that the RL objective J
and the MTP objectives share. One update is theta + eta (g_RL + G lambda) with
g_RL = grad J and the columns g_k of G the ascent directions of the K MTP
modules.

  c_k = <g_RL, g_k>     Gram_kl = <g_k, g_l>     v_k^2 = Gram_kk

Everything here is a pure function of arrays; K >= 1 throughout.
"""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from mtp_rl import config as config_lib
from mtp_rl import types


class Products(NamedTuple):
  """Inner products of one minibatch's gradients, or of their proxies.

  Attributes:
    c: float32 [K], <g_RL, g_k>.
    gram: float32 [K, K], <g_k, g_l>.
    rl: float32 [], ||g_RL||^2.
  """
  c: jax.Array
  gram: jax.Array
  rl: jax.Array


def decomposition(lam, c, v2, eta, smoothness):
  """Return Delta_MTP(lambda), what MTP adds to the lower bound on J's gain.

  Delta = eta lambda (1 - L eta) c  -  L eta^2 lambda^2 / 2 v^2

  Args:
    lam, c, v2: arrays of one shape, of one MTP module.
    eta: step size.
    smoothness: L, the Lipschitz constant of grad J.
  """
  return (eta * lam * (1 - smoothness * eta) * c
          - smoothness * eta ** 2 * lam ** 2 / 2 * v2)


def decomposition_cross(lam, c_cross, c_same, v2, eta, smoothness):
  """Return Delta_MTP(lambda) of one module, with c apart for gain and penalty.

  Delta = eta lambda c_cross - L eta^2 lambda c_same - L eta^2 lambda^2 / 2 v^2

  The expected gain of a step depends on the true slope of J along g_MTP.
  c_cross, from disjoint samples, estimates it without the noise that g_RL and
  g_MTP of one batch share. The penalty is that of the step actually taken, so
  it keeps c_same. With c_cross = c_same this is `decomposition`.
  """
  return (eta * lam * c_cross
          - smoothness * eta ** 2 * (lam * c_same + lam ** 2 / 2 * v2))


def decomposition_curvature(lam, c, rl_h_mtp, mtp_h_mtp, eta):
  """Return the second-order Taylor form of Delta_MTP(lambda), one module.

  Delta = lambda eta c + lambda eta^2 g_RL'H g_MTP
          + lambda^2 eta^2 / 2 g_MTP'H g_MTP
  """
  return (lam * eta * c + lam * eta ** 2 * rl_h_mtp
          + lam ** 2 * eta ** 2 / 2 * mtp_h_mtp)


def lambda_plus(eta, smoothness):
  """Return lambda_+ = (1 - L eta) / (L eta)."""
  return (1 - smoothness * eta) / (smoothness * eta)


def best_gain(c, v2, smoothness, eta):
  """Return Delta_MTP(lambda*) = (1 - L eta)^2 c^2 / (2 L v^2), one module."""
  return (1 - smoothness * eta) ** 2 * c ** 2 / (2 * smoothness * v2)


def helpful_interval(star):
  """Return (low, high) between which Delta_MTP > 0: 0 and 2 lambda*, sorted."""
  return jnp.minimum(0., 2 * star), jnp.maximum(0., 2 * star)


def solve(gram, rhs, config: config_lib.OCC):
  """Return Gram^-1 rhs, or rhs_k / v_k^2 where occ.solver is 'per_module'.

  K = 1 is the paper's division by v^2 + eps. For K > 1 a ridge of eps plus
  1e-6 of the mean v^2 keeps (nearly) parallel g_k solvable.

  Args:
    gram: [K, K].
    rhs: [K].
    config: `config.OCC`.
  """
  k = rhs.shape[0]
  if k == 1 or config.solver == 'per_module':
    return rhs / (jnp.diagonal(gram) + config.eps)
  ridge = config.eps + 1e-6 * jnp.trace(gram) / k
  return jnp.linalg.solve(gram + ridge * jnp.eye(k), rhs)


def coefficient(products, config: config_lib.OCC):
  """Return lambda = lambda_+ Gram^-1 c, unbounded, [K]."""
  return config.lambda_plus * solve(products.gram, products.c, config)


def cross_fitted_coefficient(cross, products, smoothness,
                             config: config_lib.OCC):
  """Return lambda* = Gram^-1 (c_cross / (L eta) - c_same), [K].

  It maximises `decomposition_cross`; with c_cross = c_same it is
  lambda_+ c / v^2.

  Args:
    cross: [K], <g_RL, g_k> across disjoint samples.
    products: `Products` of the whole batch's gradients.
    smoothness: L eta.
    config: `config.OCC`.
  """
  return solve(products.gram, cross / smoothness - products.c, config)


def affordable_coefficient(cross, rl_cross, products, smoothness,
                           config: config_lib.OCC):
  """Return the largest lambda that J can afford, the same for all modules, [K].

  For the sum of the modules, g = sum_k g_k, it solves -Delta = occ.budget G:
  the predicted loss of J (`decomposition_cross`) is a share of what the RL
  step itself is predicted to gain. Over eta, with s = L eta:

      Delta = lambda b - s v^2 lambda^2 / 2,    b = c_cross - s c_same
      G     = max(0, ||E g_RL||^2 - s ||g_RL||^2 / 2)
      lambda = (b + sqrt(b^2 + 2 s v^2 occ.budget G)) / (s v^2)  >= 0

  With budget 0 it is 2 lambda* where lambda* > 0 (Delta = 0), and 0 elsewhere.

  Args:
    cross: [K], <g_RL, g_k> across disjoint samples.
    rl_cross: ||E g_RL||^2, estimated likewise.
    products, smoothness, config: see `cross_fitted_coefficient`.
  """
  penalty = smoothness * (jnp.sum(products.gram) + config.eps)
  slope = jnp.sum(cross - smoothness * products.c)
  gain = jnp.maximum(rl_cross - smoothness * products.rl / 2, 0.)
  root = jnp.sqrt(slope ** 2 + 2 * penalty * config.budget * gain)
  return jnp.full_like(cross, (slope + root) / penalty)


def trust_region_coefficient(cross, fisher, products, smoothness,
                             config: config_lib.OCC):
  """Return the lambda of most gain for the KL that it moves the policy, [K].

  F = E[grad log pi grad log pi']: the step eta d moves the policy by a KL of
  eta^2 d'Fd / 2 a token. With d = g_RL + G lambda,

      Delta = eta lambda c_cross
              - beta eta^2 (lambda g_RL'F g + lambda^2 / 2 g'F g)

  and beta such that the RL step alone costs what it costs in the bound:
  beta g_RL'F g_RL = L ||g_RL||^2. F = 1 gives `cross_fitted_coefficient`.

  Args:
    fisher: `Products` with one factor F: c is [<g_RL, F g_k>], and so on; its
      scale cancels.
    The others: see `cross_fitted_coefficient`.
  """
  scale = products.rl / jnp.maximum(fisher.rl, 1e-30)
  return solve(scale * fisher.gram, cross / smoothness - scale * fisher.c,
               config)


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
    raise ValueError('c_cross needs disjoint parts; set occ.disjoint_parts '
                     '>= 2')
  within = [sum(dot(rl, g[k]) for rl, g in parts) for k in range(len(c))]
  return n / (n - 1) * (c - jnp.stack(within))


def preconditioned_coefficient(first, products, config: config_lib.OCC):
  """Return lambda* of a step eta P (g_RL + lambda g_MTP), [K].

  Delta = eta lambda <g_RL, P g> - L eta^2 lambda <P g_RL, P g>
          - L eta^2 lambda^2 ||P g||^2 / 2,  with 1 / (L eta) = 1 + lambda_+.

  P is known only up to its scale, which the learning rate sets; it is scaled
  here so that <g_RL, P g_RL> = ||P g_RL||^2. P = 1 gives lambda_+ c / v^2.

  Args:
    first: `Products` with one factor P: c is <g_RL, P g_k>, rl is
      <g_RL, P g_RL>, gram is not read.
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


def deltas(main, mtp, old_main, reference, mask, mtp_mask):
  """Return delta_RL [B, S] and delta_MTP [B, S, K], without gradient.

  delta_RL = log pi - log pi_old,  delta_MTP = log pi^MTP - reference, both
  float32 and 0 outside the masks.

  Args:
    main, old_main: [B, S], log-probs of the main head, now and at rollout.
    mtp, reference: [B, S, K], of the modules; see `objectives.mtp.reference`.
    mask: bool [B, S], response tokens.
    mtp_mask: bool [B, S, K], response tokens that depth k can predict.
  """
  chex.assert_rank(main, 2)
  chex.assert_equal_shape([main, old_main, mask])
  chex.assert_equal_shape([mtp, reference, mtp_mask])
  chex.assert_equal_shape_prefix([main, mtp], 2)
  d_rl = jnp.where(mask, main - old_main, 0.).astype(jnp.float32)
  d_mtp = jnp.where(mtp_mask, mtp - reference, 0.).astype(jnp.float32)
  return jax.lax.stop_gradient((d_rl, d_mtp))


def logprob_products(d_rl, d_mtp):
  """Return the paper's proxies of the inner products of gradients.

  c = <delta_RL, delta_MTP>,  v^2 = ||delta_MTP||^2, sums over all tokens of
  the minibatch (see `deltas`).
  """
  product = functools.partial(jnp.einsum, precision='highest')
  return Products(product('bs,bsk->k', d_rl, d_mtp),
                  product('bsk,bsl->kl', d_mtp, d_mtp),
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


def curvature_coefficient(products, rl_h_mtp, mtp_h_mtp, eta, fallback):
  """Return lambda*_H, the maximum of the second-order Taylor form, [K].

  lambda*_H = -(c + eta g_RL'H g_MTP) / (eta g_MTP'H g_MTP); for K modules the
  solution of  -eta G'HG lambda = c + eta G'H g_RL.

  That maximum exists only where G'HG is negative definite. Elsewhere the
  second-order form grows without bound along some combination of modules, and
  `fallback` (lambda_+ Gram^-1 c of the lower bound) is returned.

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


def initial_state(modules, plus=1.):
  """Return the `types.OccState` before the first update of K modules.

  L eta starts at 1 / (1 + plus), where lambda_+ = (1 - L eta) / (L eta) holds.
  """
  # Checkpoints hold no empty arrays: K = 0 keeps one unused entry.
  return types.OccState(jnp.zeros((max(modules, 1),), jnp.float32),
                        jnp.int32(0), jnp.float32(1 / (1 + plus)))


def smoothness_ratio(predicted, achieved, length):
  """Return L eta, float [], of a step u = eta d from the gain that it achieved.

  predicted = <g_RL, u>, achieved = J(theta + u) - J(theta), length = <d, u>:
  achieved = predicted - L eta^2 ||d||^2 / 2, so
  L eta = 2 (predicted - achieved) / length. For optimisers other than SGD this
  defines an effective L along their step.
  """
  return 2 * (predicted - achieved) / length


def track_smoothness(state, ratio, decay=.9, low=.05):
  """Return the OccState with a new L eta averaged in.

  Values are clipped to [low, 1] (lambda_+ from (1 - low) / low to 0); a value
  that is not finite is ignored.
  """
  good = jnp.isfinite(ratio)
  ratio = jnp.clip(jnp.where(good, ratio, 1.), low, 1.)
  mixed = decay * state.smoothness + (1 - decay) * ratio
  return state._replace(smoothness=jnp.where(good, mixed, state.smoothness))


def guard(lam, products, rho):
  """Return lambda scaled down until ||sum_k lambda_k g_k|| <= rho ||g_RL||."""
  dot = functools.partial(jnp.dot, precision='highest')
  length = jnp.sqrt(dot(dot(lam, products.gram), lam))
  limit = rho * jnp.sqrt(products.rl)
  return lam * jnp.where(length > limit, limit / jnp.where(
      length > 0, length, 1.), 1.)


def track(state, lam, config: config_lib.OCC):
  """Bound lambda and average it over updates.

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
  average = config.ema * state.average + (1 - config.ema) * lam
  state = state._replace(average=average, count=state.count + 1)
  return held(state, config), state


def held(state, config: config_lib.OCC):
  """Return the lambda of the last `track`, [K]; 0 where there was none."""
  return state.average / (1 - config.ema ** jnp.maximum(state.count, 1))


def cosine(products):
  """Return c_k / (||g_RL|| ||g_k||), [K]; 0 where either vanishes."""
  scale = jnp.sqrt(products.rl * jnp.diagonal(products.gram))
  return jnp.where(scale > 0, products.c / jnp.where(scale > 0, scale, 1.), 0.)
