"""Estimators of the optimal coefficient lambda from measured gradients.

Every estimator is a pure function (Evidence, config.OCC) -> `Estimate`. To add
one, write a function here, list it in `ESTIMATORS` with the evidence that it
reads, and add its value on the quadratic to tests/estimators_test.py. The
equations are in occ.py, those of other papers in rivals.py.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from mtp_rl import config as config_lib
from mtp_rl import occ, rivals, tree


class Evidence(NamedTuple):
  """What is measured of a minibatch.

  Gradients, parts and Hessian products are None where nothing reads them.

  Gradients are ascent directions: g_RL = grad J, g_k = -grad L_k.

  Attributes:
    deltas: delta_RL [B, S], delta_MTP [B, S, K]; see `occ.deltas`.
    readout: (g_RL, [g_1 .. g_K]) over embedding, final norm and output head,
      with the trunk's output held fixed.
    gradients: (g_RL, [g_1 .. g_K]) over theta.
    parts: list of pairs like `gradients`, one for each of the disjoint parts
      of the minibatch; their sum is `gradients`.
    hessian: [H g_1 .. H g_K] over theta, H the Hessian of J.
    fisher: `occ.Products` of the gradients with F between them, see
      `occ.trust_region_coefficient`.
    precondition: function g -> P g, P the optimiser's preconditioner, known
      up to its scale.
    eta: float32 [], step size.
    smoothness: float32 [], tracked average of L eta.
  """
  deltas: tuple
  readout: tuple | None = None
  gradients: tuple | None = None
  parts: list | None = None
  hessian: list | None = None
  fisher: occ.Products | None = None
  precondition: Callable | None = None
  eta: Any = 0.
  smoothness: Any = None


class Estimate(NamedTuple):
  """The result of an estimator.

  Attributes:
    lam: float32 [K], neither bounded nor averaged.
    products: `occ.Products` of the gradients or their proxies, for metrics
      and `occ.guard`.
    info: further numbers by name for the metrics.
  """
  lam: jax.Array
  products: occ.Products
  info: dict = {}  # noqa: RUF012


def _dot(config: config_lib.OCC):
  """Return the inner product over the parameters of config.scope."""
  return lambda a, b: tree.dot(tree.scope(a, config.scope),
                               tree.scope(b, config.scope))


def logprob(evidence, config: config_lib.OCC):
  """The paper's: log-prob changes as proxies of gradients, at no cost."""
  products = occ.logprob_products(*evidence.deltas)
  return Estimate(occ.coefficient(products, config), products)


def authors(evidence, config: config_lib.OCC):
  """The authors' code: the mean of element-wise ratios, padding included."""
  d_rl, d_mtp = evidence.deltas
  lam = occ.authors_coefficient(d_rl, d_mtp, config.lambda_plus, config.eps)
  return Estimate(lam, occ.logprob_products(d_rl, d_mtp))


def readout(evidence, config: config_lib.OCC):
  """Gradients of the readout parameters: no extra pass through the trunk."""
  products = occ.gradient_products(*evidence.readout, tree.dot)
  return Estimate(occ.coefficient(products, config), products)


def exact(evidence, config: config_lib.OCC):
  """lambda_+ c / v^2 with the true gradients of one minibatch."""
  products = occ.gradient_products(*evidence.gradients, _dot(config))
  return Estimate(occ.coefficient(products, config), products)


def preconditioned(evidence, config: config_lib.OCC):
  """As `exact`, for the step P g; see `occ.preconditioned_coefficient`."""
  (g_rl, g), dot = evidence.gradients, _dot(config)
  p_rl, p = evidence.precondition(g_rl), list(map(evidence.precondition, g))
  first = occ.Products(jnp.stack([dot(g_rl, x) for x in p]), None,
                       dot(g_rl, p_rl))
  products = occ.gradient_products(p_rl, p, dot)
  return Estimate(occ.preconditioned_coefficient(first, products, config),
                  occ.gradient_products(g_rl, g, dot))


def _crossed(evidence, dot):
  """Return `occ.Products` of the minibatch, c_cross [K], and their metrics."""
  products = occ.gradient_products(*evidence.gradients, dot)
  cross = occ.cross_products(evidence.parts, products.c, dot)
  return products, cross, {'c_cross': jnp.sum(cross),
                           'smoothness': evidence.smoothness}


def cross_fitted(evidence, config: config_lib.OCC):
  """c across disjoint samples, penalty of the actual step, tracked L eta."""
  products, cross, info = _crossed(evidence, _dot(config))
  lam = occ.cross_fitted_coefficient(cross, products, evidence.smoothness,
                                     config)
  return Estimate(lam, products, info)


def affordable(evidence, config: config_lib.OCC):
  """The largest lambda whose predicted loss of J stays within occ.budget."""
  products, cross, info = _crossed(evidence, _dot(config))
  rl_cross = occ.cross_products([(rl, [rl]) for rl, _ in evidence.parts],
                                products.rl[None], _dot(config))[0]
  lam = occ.affordable_coefficient(cross, rl_cross, products,
                                   evidence.smoothness, config)
  return Estimate(lam, products, info | {'rl_cross': rl_cross})


def trust_region(evidence, config: config_lib.OCC):
  """c across disjoint samples, penalty by the KL that the step moves."""
  products, cross, info = _crossed(evidence, tree.dot)
  lam = occ.trust_region_coefficient(cross, evidence.fisher, products,
                                     evidence.smoothness, config)
  return Estimate(lam, products, info | {
      'rl_f_mtp': jnp.sum(evidence.fisher.c),
      'mtp_f_mtp': jnp.trace(evidence.fisher.gram)})


def rival(rule):
  """Return an `Estimator.rule` of (`rivals.Moments`, config.OCC) -> lambda."""
  def estimate(evidence, config: config_lib.OCC):
    dot = _dot(config)
    products = occ.gradient_products(*evidence.gradients, dot)
    m = rivals.moments(evidence.parts, products, dot)
    return Estimate(jnp.full_like(products.c, rule(m, config)), products,
                    {'c_cross': m.c, 'rl_noise': m.rl_noise,
                     'mtp_noise': m.mtp_noise})
  return estimate


def curvature(evidence, config: config_lib.OCC):
  """lambda*_H, which maximises the second-order form; falls back to `exact`."""
  (g_rl, g), hg = evidence.gradients, evidence.hessian
  products = occ.gradient_products(g_rl, g, tree.dot)
  rl_h_mtp = jnp.stack([tree.dot(g_rl, x) for x in hg])
  mtp_h_mtp = jnp.stack([jnp.stack([tree.dot(a, b) for b in hg]) for a in g])
  lam, usable = occ.curvature_coefficient(
      products, rl_h_mtp, mtp_h_mtp, evidence.eta,
      occ.coefficient(products, config))
  info = {'rl_h_mtp': jnp.sum(rl_h_mtp), 'mtp_h_mtp': jnp.trace(mtp_h_mtp),
          'concave': usable.astype(jnp.float32)}
  return Estimate(lam, products, info)


class Estimator(NamedTuple):
  """An estimator and the evidence that it needs.

  Attributes:
    rule: (Evidence, config.OCC) -> `Estimate`.
    reads: entries of `Evidence` to compute or track for it; the checks of
      validate.py follow from them. 'parts' needs 'gradients' beside it,
      'hessian' brings the gradients. eta is always there.
  """
  rule: Callable
  reads: tuple

  @property
  def pulls(self):
    """Whether it needs each module's loss pulled back by itself."""
    return bool({'readout', 'gradients', 'hessian'} & set(self.reads))

  @property
  def in_parts(self):
    """Whether a minibatch passes in occ.disjoint_parts parts for it."""
    return bool({'gradients', 'hessian'} & set(self.reads))

  def __call__(self, evidence, config: config_lib.OCC):
    """Check the shapes of the evidence and return the `Estimate`."""
    d_rl, d_mtp = evidence.deltas
    chex.assert_rank([d_rl, d_mtp], [2, 3])
    chex.assert_equal_shape_prefix([d_rl, d_mtp], 2)
    for _, g in filter(None, (evidence.readout, evidence.gradients)):
      assert len(g) == d_mtp.shape[-1], (len(g), d_mtp.shape)
    estimate = self.rule(evidence, config)
    chex.assert_shape(estimate.lam, d_mtp.shape[-1:])
    return estimate


ESTIMATORS = {
    'logprob': Estimator(logprob, ('deltas',)),
    'authors': Estimator(authors, ('deltas',)),
    'readout': Estimator(readout, ('readout',)),
    'exact': Estimator(exact, ('gradients',)),
    'preconditioned': Estimator(preconditioned, ('gradients', 'precondition')),
    'cross_fitted': Estimator(cross_fitted, ('gradients', 'parts',
                                             'smoothness')),
    'affordable': Estimator(affordable, ('gradients', 'parts', 'smoothness')),
    'trust_region': Estimator(trust_region, ('gradients', 'parts',
                                             'smoothness', 'fisher')),
    'curvature': Estimator(curvature, ('hessian',)),
    'gac': Estimator(rival(rivals.gac_coefficient), ('gradients', 'parts')),
    'pcr': Estimator(rival(rivals.pcr_coefficient), ('gradients', 'parts')),
}
