"""One minibatch under a run's parameters: alignment, lambdas, Delta(lambda).

The step under study is a plain gradient step, theta + eta (g_RL + lambda g_MTP)
with psi unchanged, so that the decompositions apply. eta is chosen so that
||eta g_RL|| equals the length of the update of theta that the run's optimiser
would make from g_RL alone: the step is as long as in training. Its gain in J is
measured on rollouts of the same policy on other prompts.
"""

import copy
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtp_rl import config as config_lib
from mtp_rl import (
  estimators,
  gradients,
  occ,
  optim,
  sharding,
  train_step,
  tree,
)
from mtp_rl.diagnose import oracle

NAMES = (*estimators.ESTIMATORS, 'oracle')
SCOPES = ('all', 'trunk', 'readout')
# The learning rate decays here to this share of its peak, not to 0: at the end
# of a schedule there would be no step to measure.
FLOOR = .1


class Measures(NamedTuple):
  """Measurements of one minibatch; N is the number of grid points.

  Attributes:
    rate: the learning rate.
    eta: the plain step's size, 0 where the minibatch has no gradient.
    ratio: L eta of the RL-only step as measured on the minibatch itself.
    smoothness: the same, clipped to [.05, 1] as the estimators use it.
    gain: J of held-out rollouts after the RL-only step, minus J before it.
    scopes: dict scope -> dict of `_alignment`.
    lam: dict estimator -> [K], bounded lambda; those that read log-probs, which
      stand in for the policy loss, are there only for that loss.
    same, cross, achieved: dicts estimator -> Delta at its lambda, by the
      paper's form, by the cross-fitted form, and as J on held-out rollouts.
    curve: dict of [N], Delta of one lambda for all modules: 'achieved' on
      held-out rollouts, and by the forms 'same', 'cross' and 'curvature'.
  """
  rate: Any
  eta: Any
  ratio: Any
  smoothness: Any
  gain: Any
  scopes: dict
  lam: dict
  same: dict
  cross: dict
  achieved: dict
  curve: dict


def theta_loss(config: config_lib.MTP):
  """Return theta's MTP loss in a run, or what a run without one is asked for.

  That is `mtp.theta_loss`, but in regime ce, which has its own.
  """
  return 'ce' if config.regime == 'ce' else config.theta_loss


def measuring_config(config: config_lib.Config, bound, disjoint_parts=None):
  """Return the config, of regime occ, that measures a run's minibatches.

  Its MTP loss is that of the run, see `theta_loss`.

  Args:
    config: of the run.
    bound: lambda is searched in [-bound, bound].
    disjoint_parts: of a minibatch; None: occ.disjoint_parts of the run, 2 or
      more.

  Raises:
    config.ConfigError: the run has no MTP module, or `bound` is not positive.
  """
  if config.mtp.modules < 1:
    raise config_lib.ConfigError(
        'mtp.modules=0: there is no MTP gradient to diagnose; name the workdir '
        'of a run with mtp.modules >= 1')
  if not 0 < bound < float('inf'):
    raise config_lib.ConfigError(
        f'--bound={bound} must be positive and finite: lambda is searched '
        'in [-bound, bound]')
  config = copy.deepcopy(config)
  config.mtp.theta_loss = theta_loss(config.mtp)
  config.mtp.regime, config.occ.estimator = 'occ', 'cross_fitted'
  config.occ.lambda_min, config.occ.lambda_max = -bound, bound
  # The run's own bound and schedule of lambda are not measured.
  config.occ.guard, config.occ.measure = 0., 0
  config.occ.disjoint_parts = disjoint_parts or max(
      config.occ.disjoint_parts, 2)
  config.rl.pack = False  # parts are split by prompt
  return config


def _alignment(parts, g_rl, g, scope):
  """Return inner products over a scope, of one batch and across parts.

  Returns:
    dict of c, v2 [K] and rl [], and of their U-statistics over disjoint
    prompts c_cross, v2_cross [K] and rl_cross [], which noise does not bias.
  """
  dot = lambda a, b: tree.dot(tree.scope(a, scope), tree.scope(b, scope))
  products = occ.gradient_products(g_rl, g, dot)
  square = lambda xs, whole: occ.cross_products(
      [(x, [x]) for x in xs], whole[None], dot)[0]
  v2 = jnp.diagonal(products.gram)
  return {'c': products.c, 'v2': v2, 'rl': products.rl,
          'c_cross': occ.cross_products(parts, products.c, dot),
          'v2_cross': jnp.stack([square([each[k] for _, each in parts], v2[k])
                                 for k in range(len(g))]),
          'rl_cross': square([rl for rl, _ in parts], products.rl)}


def predictions(lams, alignment, gram, curvature, eta, smoothness):
  """Return Delta at vectors of lambdas by the three forms, dict of [n].

  K modules with coefficients lambda act as one module with g = G lambda.

  Args:
    lams: [n, K].
    alignment: dict from `_alignment`, over all of theta.
    gram: [K, K], <g_k, g_l>.
    curvature: (g_RL'H g_k [K], g_k'H g_l [K, K]).
    eta: step size.
    smoothness: L eta.
  """
  quadratic = lambda m: jnp.einsum('nk,kl,nl->n', lams, m, lams)
  c, v2 = lams @ alignment['c'], quadratic(gram)
  bound = smoothness / jnp.where(eta > 0, eta, 1.)
  return {
      'same': occ.decomposition(1., c, v2, eta, bound),
      'cross': occ.decomposition_cross(1., lams @ alignment['c_cross'], c, v2,
                                       eta, bound),
      'curvature': occ.decomposition_curvature(
          1., c, lams @ curvature[0], quadratic(curvature[1]), eta)}


def curves(ahead, lams):
  """Return ahead(lambda) - ahead(0) at vectors of lambdas [n, K], [n]."""
  zero = jnp.zeros_like(lams[:1])
  values = jax.lax.map(ahead, jnp.concatenate([zero, lams]))
  return values[1:] - values[0]


def _step_size(g_rl, state, transform):
  """Return eta, ||update of theta by g_RL alone|| / ||g_RL||."""
  down = jax.tree.map(jnp.negative, g_rl)
  trained = tree.trained(state.params)
  still = jax.tree.map(jnp.zeros_like, tree.psi(trained))
  updates, _ = transform.update({**down, **still}, state.opt_state, trained)
  length = tree.norm(g_rl)
  return jnp.where(length > 0, tree.norm(tree.theta(updates))
                   / jnp.where(length > 0, length, 1.), 0.)


def measure(state, first, batch, held_out, *, config: config_lib.Config,
            own: config_lib.Config, grid, transform, rate):
  """Return the `Measures` of a minibatch.

  Args:
    state: `types.TrainState` of a checkpoint.
    first: minibatch for an update of the run before the measurement, or None.
    batch: minibatch to measure.
    held_out: `types.RolloutBatch` of the same policy on other prompts.
    config: see `measuring_config`.
    own: the run's config.
    grid: [N] lambdas.
    transform, rate: see `train_step.train_step`.
  """
  if first is not None:
    state, _ = train_step.train_step(state, first, config=own, rate=rate,
                                     transform=transform)
  o, modules = config.occ, config_lib.depths(config.mtp)
  work = gradients.score(state.params, batch, config)
  theta = tree.theta(tree.trained(state.params))
  value = lambda t, rows: gradients.objective(tree.merge(state.params, t), rows,
                                              config)
  each = gradients.pull_each(work, config.mtp.theta_loss)
  seen = gradients.evidence(work, each, ('readout', 'gradients', 'parts',
                                         'hessian', 'fisher'))
  g_rl, g = seen.gradients
  eta = _step_size(g_rl, state, transform)

  def after(lam):
    direction = g_rl
    for k in range(modules):
      direction = tree.axpy(lam[k], g[k], direction)
    return tree.axpy(eta, direction, theta)

  ahead = lambda lam: value(after(lam), held_out)
  still = jnp.zeros((modules,))
  predicted = eta * tree.dot(g_rl, g_rl)
  ratio = occ.smoothness_ratio(
      predicted, value(after(still), batch) - value(theta, batch), predicted)
  tracked = occ.track_smoothness(state.occ, ratio, decay=0.)
  seen = seen._replace(
      eta=eta, smoothness=tracked.smoothness,
      precondition=optim.preconditioner(state.opt_state, config.optim))
  found = {name: rule(seen, o).lam
           for name, rule in estimators.ESTIMATORS.items()
           if config.mtp.theta_loss == 'policy' or 'deltas' not in rule.reads}
  found['oracle'] = oracle.line_search(ahead, modules, o, sweeps=6)
  found = {name: _bounded(lam, o) for name, lam in found.items()}

  curvature = (jnp.stack([tree.dot(g_rl, x) for x in seen.hessian]),
               jnp.stack([jnp.stack([tree.dot(a, x) for x in seen.hessian])
                          for a in g]))
  scopes = {s: _alignment(seen.parts, g_rl, g, s) for s in SCOPES}
  grid_lams = jnp.tile(jnp.asarray(grid, jnp.float32)[:, None], (1, modules))
  lams = jnp.concatenate([grid_lams, jnp.stack(list(found.values()))])
  deltas = predictions(lams, scopes['all'],
                       occ.gradient_products(g_rl, g, tree.dot).gram,
                       curvature, eta, tracked.smoothness)
  deltas['achieved'] = curves(ahead, lams)
  n = len(grid)
  each = lambda name: {e: deltas[name][n + i] for i, e in enumerate(found)}
  return Measures(
      jnp.float32(rate(state.step)), eta, ratio, tracked.smoothness,
      ahead(still) - value(theta, held_out), scopes, found, each('same'),
      each('cross'), each('achieved'), {k: v[:n] for k, v in deltas.items()})


def _bounded(lam, config: config_lib.OCC):
  lam = jnp.where(jnp.isfinite(lam), lam, 0.)
  return jnp.clip(lam, config.lambda_min, config.lambda_max)


def make(own: config_lib.Config, config: config_lib.Config, grid, mesh,
         abstract):
  """Shard and jit `measure` for the checkpoints of a run.

  Args:
    own: the run's config.
    config: see `measuring_config`.
    grid: [N] lambdas.
    mesh: see `sharding.make_mesh`.
    abstract: see `train_step.Steps`.

  Returns:
    function (state, first, batch, held_out) -> `Measures`.
  """
  r = own.rl
  decay = optim.schedule(r.lr, own.optim, r.steps * r.minibatches)
  rate = lambda count: jnp.maximum(decay(count), FLOOR * r.lr)
  transform = optim.make(own.optim, rate, own.mtp.regime != 'rl_only')
  rows = sharding.batch_sharding(mesh)
  return jax.jit(
      functools.partial(measure, config=config, own=own, grid=grid,
                        transform=transform, rate=rate),
      in_shardings=(jax.tree.map(lambda x: x.sharding, abstract), rows, rows,
                    rows))
