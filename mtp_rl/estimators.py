"""Estimators of the optimal coefficient: what is measured, and lambda from it.

Every estimator is a pure function (view, config.OCC) -> `Estimate`. To add
one: a function here, its name in `ESTIMATORS` and `config.ESTIMATORS`, a test
on the quadratic in tests/estimators_test.py. Equations are in occ.py.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtp_rl import config as config_lib
from mtp_rl import occ, tree


class View(NamedTuple):
  """What an estimator may ask of a minibatch.

  Entries but the last two are functions, so that only what is asked for is
  computed. All gradients ascend: g_RL = grad J, g_k = -grad L_k.

  Attributes:
    deltas: () -> delta_RL [B, S], delta_MTP [B, S, K]; see `occ.deltas`.
    readout: () -> g_RL, [g_1 .. g_K] over embedding, final norm and output
      head, the trunk's output held fixed.
    gradients: () -> g_RL, [g_1 .. g_K] over theta.
    heads: () -> [g_1 .. g_K] over theta.
    parts: () -> pairs like `gradients` of disjoint samples, their sum.
    directional: direction -> g_RL and H direction; see `occ.directional`.
    precondition: tree -> tree, the optimiser's P up to its scale.
    ahead: lambda [K] -> J of held-out rollouts after the update by lambda.
    eta: float32 [], step size.
    smoothness: float32 [], L eta as tracked.
  """
  deltas: Callable
  readout: Callable
  gradients: Callable
  heads: Callable
  parts: Callable
  directional: Callable
  precondition: Callable
  ahead: Callable
  eta: Any
  smoothness: Any


class Estimate(NamedTuple):
  """What an estimator found.

  Attributes:
    lam: float32 [K], neither bounded nor averaged.
    products: `occ.Products` that it comes from.
    gradients: (g_RL, [g_k]) over theta where they were computed, else None.
    info: further numbers by name for the metrics, or None.
  """
  lam: jax.Array
  products: occ.Products
  gradients: Any = None
  info: dict | None = None


def _dot(config):
  """Return the inner product over the parameters of config.scope."""
  return lambda a, b: tree.dot(tree.scope(a, config.scope),
                               tree.scope(b, config.scope))


def logprob(view, config):
  """The paper's: log-probability changes stand in for gradients, free."""
  products = occ.logprob_products(*view.deltas())
  return Estimate(occ.coefficient(products, config), products)


def authors(view, config):
  """The authors' code: the mean of element-wise ratios, over padding too."""
  d_rl, d_mtp = view.deltas()
  lam = occ.authors_coefficient(d_rl, d_mtp, config.lambda_plus, config.eps)
  return Estimate(lam, occ.logprob_products(d_rl, d_mtp))


def readout(view, config):
  """Gradients where the heads leave the trunk: no backward pass of its own."""
  products = occ.gradient_products(*view.readout(), tree.dot)
  return Estimate(occ.coefficient(products, config), products)


def exact(view, config):
  """lambda_+ c / v^2 of the gradients themselves, of one batch."""
  gradients = view.gradients()
  products = occ.gradient_products(*gradients, _dot(config))
  return Estimate(occ.coefficient(products, config), products, gradients)


def preconditioned(view, config):
  """The same for the optimiser's step P g; see `occ`."""
  g_rl, g = view.gradients()
  dot = _dot(config)
  p_rl, p = view.precondition(g_rl), [view.precondition(x) for x in g]
  first = occ.Products(jnp.stack([dot(g_rl, x) for x in p]), None,
                       dot(g_rl, p_rl))
  products = occ.gradient_products(p_rl, p, dot)
  return Estimate(occ.preconditioned_coefficient(first, products, config),
                  occ.gradient_products(g_rl, g, dot), (g_rl, g))


def cross_fitted(view, config):
  """c from disjoint samples, the penalty from the step, L eta as tracked."""
  (g_rl, g), dot = view.gradients(), _dot(config)
  products = occ.gradient_products(g_rl, g, dot)
  cross = occ.cross_products(view.parts(), products.c, dot)
  lam = occ.cross_fitted_coefficient(cross, products, view.smoothness, config)
  info = {'c_cross': jnp.sum(cross), 'smoothness': view.smoothness}
  return Estimate(lam, products, (g_rl, g), info)


def curvature(view, config):
  """lambda*_H, the maximum of the second-order form; `exact` as fallback."""
  g, hg = view.heads(), []
  for direction in g:
    g_rl, product = view.directional(direction)
    hg.append(product)
  products = occ.gradient_products(g_rl, g, tree.dot)
  rl_h_mtp = jnp.stack([tree.dot(g_rl, x) for x in hg])
  mtp_h_mtp = jnp.stack([jnp.stack([tree.dot(a, b) for b in hg]) for a in g])
  lam, usable = occ.curvature_coefficient(
      products, rl_h_mtp, mtp_h_mtp, view.eta,
      occ.coefficient(products, config))
  info = {'rl_h_mtp': jnp.sum(rl_h_mtp), 'mtp_h_mtp': jnp.trace(mtp_h_mtp),
          'concave': usable.astype(jnp.float32)}
  return Estimate(lam, products, (g_rl, g), info)


def oracle(view, config, points=21, sweeps=40):
  """The lambda best on held-out rollouts, by line search.

  `points` lambdas between the bounds, then the vertex of the parabola
  through the best and its neighbours; K > 1 goes round the coordinates
  `sweeps` times. For diagnosis only: it needs rollouts that the update does
  not see, and finite bounds.
  """
  gradients = view.gradients()
  products = occ.gradient_products(*gradients, _dot(config))
  k = products.c.shape[0]
  grid = jnp.linspace(config.lambda_min, config.lambda_max, points)

  def search(n, lam):
    at = lambda x: view.ahead(lam.at[n % k].set(x))
    return lam.at[n % k].set(occ.vertex(grid, jax.lax.map(at, grid)))

  rounds = k * sweeps if k > 1 else 1
  lam = jax.lax.fori_loop(0, rounds, search, jnp.zeros((k,), grid.dtype))
  return Estimate(lam, products, gradients)


ESTIMATORS = dict(logprob=logprob, authors=authors, readout=readout,
                  exact=exact, preconditioned=preconditioned,
                  cross_fitted=cross_fitted, curvature=curvature,
                  oracle=oracle)
assert tuple(ESTIMATORS) == config_lib.ESTIMATORS
