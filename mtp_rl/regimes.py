"""The regimes: which MTP gradient reaches theta, and with which lambda.

A regime is a function (Minibatch, OccState, step) -> `gradients.Choice`. To
add one, write it here and name it in `REGIMES`; tests/mesh_test.py covers
every name there, most of them with -m long.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from mtp_rl import config as config_lib
from mtp_rl import estimators, gradients, occ, sharding


class Step(NamedTuple):
  """What a regime reads from the optimiser.

  Attributes:
    eta: float32 [], step size that occ.estimator=curvature assumes.
    precondition: function g -> P g over theta; None unless
      occ.estimator=preconditioned.
  """
  eta: Any = 0.
  precondition: Callable | None = None


def _evenly(coef, config: config_lib.MTP):
  """Return a coefficient split over the K depths, float32 [K]."""
  k = config_lib.depths(config)
  return jnp.full((k,), coef / k)


def _own_psi(config: config_lib.Config):
  """Return the `Choice` fields of psi's own loss; {} if it follows theta's."""
  m = config.mtp
  if m.psi_loss == 'theta':
    return {}
  return dict(psi_loss=m.psi_loss, psi=_evenly(m.psi_coef, m))


def rl_only(work, state, step):
  """The control: the RL loss alone; no MTP loss, psi frozen."""
  del work, step
  return gradients.Choice(state, None, psi_loss='frozen')


def detach(work, state, step):
  """theta follows the RL loss alone, psi a loss of its own."""
  del step
  m = work.config.mtp
  psi = _own_psi(work.config) or dict(psi_loss='ce', psi=_evenly(m.coef, m))
  lam = _evenly(0., m)
  return gradients.Choice(state, None, lam, **psi,
                          metrics=_metrics(work, lam))


def _fixed(loss=None, held=False):
  """Return the regime with constant lambda: mtp.coef / K for each module.

  Args:
    loss: theta's MTP loss; None: mtp.theta_loss.
    held: take the lambda that regime occ has measured last instead.
  """
  def fixed(work, state, step):
    del step
    m = work.config.mtp
    lam = occ.held(state, work.config.occ) if held else _evenly(m.coef, m)
    return gradients.Choice(state, loss or m.theta_loss, lam,
                            **_own_psi(work.config),
                            metrics=_metrics(work, lam))
  return fixed


def occ_authors(work, state, step):
  """The authors' code: one lambda per microbatch scales its advantages."""
  del step
  config, (d_rl, d_mtp) = work.config, work.deltas
  m = config.rl.microbatches
  lam = occ.authors_coefficient(
      sharding.split_rows(d_rl, m), sharding.split_rows(d_mtp, m),
      config.occ.lambda_plus, config.occ.eps)[:, 0]
  lam = jnp.clip(lam, config.occ.lambda_min, config.occ.lambda_max)
  mean = jnp.mean(lam)[None]
  return gradients.Choice(
      state, 'policy', mean, jnp.tile(lam, d_rl.shape[0] // m),
      **_own_psi(config), metrics=_metrics(work, mean))


def measured(work, state, step):
  """OCC: lambda from occ.estimator, then bounded, averaged and guarded."""
  config, loss = work.config.occ, work.config.mtp.theta_loss
  estimator = estimators.ESTIMATORS[config.estimator]
  each = gradients.pull_each(work, loss) if estimator.pulls else None
  found = gradients.evidence(
      work, each, estimator.reads, eta=step.eta, smoothness=state.smoothness,
      precondition=step.precondition)
  estimate = estimator(found, config)
  lam, state = occ.track(state, estimate.lam, config)
  if config.guard:
    lam = occ.guard(lam, estimate.products, config.guard)
  numbers = {'c': jnp.sum(estimate.products.c),
             'v2': jnp.trace(estimate.products.gram),
             'cos': jnp.mean(occ.cosine(estimate.products)),
             'lambda_star': jnp.mean(estimate.lam), **estimate.info}
  return gradients.Choice(
      state, loss, lam, **_own_psi(work.config), each=each,
      gradients=found.gradients, metrics=_metrics(work, lam) | {
          f'occ/{config.estimator}/{k}': v for k, v in numbers.items()})


def _metrics(work, lam):
  """Return metrics: lambda as used, and the log-prob proxies of c and norms."""
  products = occ.logprob_products(*work.deltas)
  out = {'occ/lambda': jnp.mean(lam), 'occ/dot': jnp.sum(products.c),
         'occ/d_rl_norm': jnp.sqrt(products.rl),
         'occ/d_mtp_norm': jnp.sqrt(jnp.trace(products.gram)),
         'occ/cos': jnp.mean(occ.cosine(products))}
  if lam.shape[0] > 1:
    out |= {f'occ/lambda_{k + 1}': x for k, x in enumerate(lam)}
  return out


REGIMES = {'rl_only': rl_only, 'detach': detach, 'ce': _fixed('ce'),
           'policy': _fixed('policy'), 'fixed': _fixed(), 'occ': measured,
           'occ_authors': occ_authors}
HELD = {'held': _fixed(held=True)}  # follows 'occ' within a step: occ.measure


def holds(config: config_lib.Config):
  """Return whether some minibatches of a step keep lambda; see occ.measure."""
  o, estimator = config.occ, estimators.ESTIMATORS[config.occ.estimator]
  return (config.mtp.regime == 'occ' and 'deltas' not in estimator.reads
          and 0 < o.measure < config.rl.minibatches)


def update_gradient(params, batch, state, config: config_lib.Config,
                    step=None):
  """Return the `gradients.Result` of a minibatch: the regime's gradient.

  Args:
    params: the model's parameters.
    batch: `types.RolloutBatch`, the whole minibatch.
    state: `types.OccState`.
    config: `config.Config`.
    step: `Step`.
  """
  work = gradients.score(params, batch, config)
  choice = (REGIMES | HELD)[config.mtp.regime](work, state, step or Step())
  return gradients.combine(work, choice)
