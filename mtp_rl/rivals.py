"""Coefficients of other papers that mix two noisy gradients, for comparison.

Both take one auxiliary gradient g = sum_k g_k (the paper's supervised or
stability gradient), so lambda is the same for all modules. They read how noisy
a gradient is; here the disjoint parts of the minibatch say so, exactly as for
c_cross. See occ.py for the notation.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtp_rl import config as config_lib
from mtp_rl import occ, tree


class Moments(NamedTuple):
  """Means and noise of g_RL and g of a minibatch, float32 [] each.

  Attributes:
    batch_c, batch_v2: <g_RL, g> and ||g||^2 as they are; the rest is unbiased.
    c: <E g_RL, E g>.
    rl, mtp: ||E g_RL||^2 and ||E g||^2.
    rl_noise, mtp_noise: E ||g_RL - E g_RL||^2 and the same of g.
  """
  batch_c: jax.Array
  batch_v2: jax.Array
  c: jax.Array
  rl: jax.Array
  mtp: jax.Array
  rl_noise: jax.Array
  mtp_noise: jax.Array


def moments(parts, products, dot):
  """Return the `Moments` of a minibatch from n >= 2 disjoint parts of it.

  Args:
    parts: see `occ.cross_products`.
    products: `occ.Products` of the whole minibatch.
    dot: inner product of two gradients.
  """
  def mean(pairs, whole):
    return occ.cross_products([(a, [b]) for a, b in pairs], whole[None], dot)[0]

  rl = [g_rl for g_rl, _ in parts]
  mtp = [tree.total(g) for _, g in parts]
  c, v2 = jnp.sum(products.c), jnp.sum(products.gram)
  rl_mean = mean(zip(rl, rl), products.rl)
  mtp_mean = mean(zip(mtp, mtp), v2)
  return Moments(c, v2, mean(zip(rl, mtp), c), rl_mean, mtp_mean,
                 jnp.maximum(products.rl - rl_mean, 0.),
                 jnp.maximum(v2 - mtp_mean, 0.))


def gac_coefficient(m, config: config_lib.OCC):
  """Return lambda = mu / (1 - mu) of GAC (Hu et al., arXiv 2605.26184), [].

  mu minimises the expected squared error of mu g + (1 - mu) g_RL as an estimate
  of the target a E g + (1 - a) E g_RL, a = occ.target:

      E(mu) = (mu - a)^2 D + mu^2 noise + (1 - mu)^2 noise_RL
      mu    = (a D + noise_RL) / (D + noise + noise_RL),  D = ||E g - E g_RL||^2

  Read in the notes to the authors' code. As there, the covariance of the two
  noises is taken as 0; gradients of one minibatch share some, c_same - c_cross.
  Left out: their stand-ins of D and the noise (from advantages and
  log-likelihoods), as the gradients are measured here; averages of those over
  updates, the schedule that mu is blended with and the bound on its change
  (occ.ema averages lambda); the factor 1 - mu of g_RL, as Adam all but divides
  it out where mu changes slowly. Their mu in [.05, .9] is lambda in [.053, 9],
  the default occ.lambda_max of 1 is mu <= .5.

  Args:
    m: `Moments`.
    config: `config.OCC`.
  """
  apart = jnp.maximum(m.rl + m.mtp - 2 * m.c, 0.)
  return ((config.target * apart + m.rl_noise)
          / ((1 - config.target) * apart + m.mtp_noise + config.eps))


def pcr_coefficient(m, config: config_lib.OCC):
  """Return lambda of PCR (Qiang et al., arXiv 2602.06453), a soft projection.

  Where the gradients of a batch disagree (c < 0), a share of g_RL's part along
  g is taken away, by how uncertain g_RL is beside g (their equation 15):

      g_RL - s c / v^2 g,   s = noise_RL / (noise_RL + noise)

  so lambda = -s c / v^2 there, and 0 where they agree. Read in a review, which
  gives 1 - s as g_RL's share of two weights, taken here as 1 / noise each. Not
  known are their estimator of the noise, and whether g is added where both
  agree. They project in the MLP layers alone.

  Args:
    m: `Moments`.
    config: `config.OCC`.
  """
  share = m.rl_noise / (m.rl_noise + m.mtp_noise + config.eps)
  return share * jnp.maximum(-m.batch_c, 0.) / (m.batch_v2 + config.eps)
