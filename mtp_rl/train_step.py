"""One optimiser update as a pure function, and its sharded, jitted form."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mtp_rl import config as config_lib
from mtp_rl import (
  estimators,
  forward,
  gradients,
  occ,
  optim,
  regimes,
  sharding,
  tree,
  types,
)
from mtp_rl.objectives import acceptance, logprobs, masked
from mtp_rl.objectives import mtp as mtp_loss

COUNTS = ('skipped_updates', 'skipped_in_a_row')  # metrics, not to be averaged


def train_step(state, batch, *, config: config_lib.Config, transform, rate):
  """Return the state after one optimiser update, and its metrics.

  Args:
    state: `types.TrainState`.
    batch: `types.RolloutBatch`, one minibatch.
    config: `config.Config`, its vocabulary resolved.
    transform: the optax transformation.
    rate: schedule, update count -> learning rate.
  """
  o = config.occ
  lr = jnp.asarray(rate(state.step), jnp.float32)
  reads = (estimators.ESTIMATORS[o.estimator].reads
           if config.mtp.regime == 'occ' else ())
  precondition = (optim.preconditioner(state.opt_state, config.optim)
                  if 'precondition' in reads else None)
  out = regimes.update_gradient(
      state.params, batch, state.occ, config,
      regimes.Step(jnp.float32(o.eta) if o.eta else lr, precondition))
  after = _apply(state, out.gradient, out.occ, transform)
  if 'smoothness' in reads:
    tracked = jax.lax.cond(
        state.occ.count % o.probe_every == 0,  # updates that measured lambda
        lambda: _probe(state, after, out, batch, config),
        lambda: after.occ)
    after = after._replace(occ=tracked)
  return _unless_bad(state, after, out.objective, out.gradient,
                     out.metrics | {'lr': lr}, config.run.max_skipped)


def _probe(before, after, out, batch, config: config_lib.Config):
  """Measure L eta of the update just made; return the OccState with it."""
  move = jax.tree.map(
      jnp.subtract, *(tree.theta(tree.trained(s.params))
                      for s in (after, before)))
  value = lambda params: gradients.objective(params, batch, config)
  start = (out.objective if config.model.dtype == 'float32'
           else value(before.params))
  achieved = value({**after.params, **tree.psi(before.params)}) - start
  ascent = jax.tree.map(jnp.negative, tree.theta(out.gradient))
  length = tree.dot(ascent, move)
  ratio = occ.smoothness_ratio(tree.dot(out.g_rl, move), achieved, length)
  return occ.track_smoothness(after.occ,
                              jnp.where(length > 0, ratio, jnp.nan))


def _apply(state, grads, tracked, transform):
  trained = tree.trained(state.params)
  updates, opt_state = transform.update(grads, state.opt_state, trained)
  params = tree.merge(state.params, optax.apply_updates(trained, updates))
  return types.TrainState(state.step + 1, params, opt_state, tracked,
                          state.skipped)


def _unless_bad(before, after, loss, gradient, metrics, limit):
  """Return `after`, or `before` where the update is not finite, and metrics.

  The loss, the norms of the gradient, the new parameters and the tracked
  coefficient must be finite. A skipped update changes nothing but the counts.
  After `limit` of them in a row nothing changes any more; the host then ends
  the run, however much later it looks.

  Args:
    before, after: `types.TrainState`.
    loss: float32 [].
    gradient: a tree like params.
    metrics: dict, to which the norms and counts are added.
    limit: run.max_skipped.
  """
  norms = {'grad_norm/theta': tree.norm(tree.theta(gradient)),
           'grad_norm/psi': tree.norm(tree.psi(gradient))}
  finite = tree.is_finite((loss, norms, after.params, after.occ))
  total, in_a_row = before.skipped
  goes_on = in_a_row < limit
  good, bad = finite & goes_on, ~finite & goes_on
  kept = jax.tree.map(lambda new, old: jnp.where(good, new, old), after, before)
  skipped = types.Skipped(
      total + bad, jnp.where(good, 0, in_a_row + bad).astype(jnp.int32))
  return kept._replace(skipped=skipped), metrics | norms | {
      'skipped_updates': skipped.total, 'skipped_in_a_row': skipped.in_a_row}


def supervised_step(state, batch, *, config: config_lib.Config, transform,
                    rate):
  """Return the state after one warm-up update: next-token + MTP losses.

  Args:
    batch: `types.Tokens`; the response columns hold the solution.
    The others: see `train_step`.

  With warmup.train='mtp' only the MTP modules get a gradient, and the metrics
  include how often a module's argmax equals the main head's.
  """
  w, k = config.warmup, config_lib.depths(config.mtp)
  alone, columns = w.train == 'mtp', config.rollout.max_response
  mask = batch.valid[:, -columns:]
  mtp_mask = logprobs.mtp_mask(batch.valid, columns, k)

  def loss_fn(trained):
    out = forward.score(tree.merge(state.params, trained), batch,
                        config=config, acceptance=alone,
                        divergence=w.mtp_loss != 'ce')
    main = masked.mean(-out.main, mask)
    ahead = mtp_loss.supervised_losses(
        mtp_loss.Scores(out.mtp, out.kl, out.overlap), mtp_mask, w.mtp_loss)
    total = main + w.mtp_coef * jnp.sum(ahead) / max(k, 1)
    metrics = {f'mtp_{k + 1}/loss': x for k, x in enumerate(
        mtp_loss.cross_entropy(out.mtp, mtp_mask))}
    if alone:
      metrics |= acceptance.metrics(out.top1, out.overlap, mtp_mask)
    return total, metrics | {'warmup/loss': main}

  lr = jnp.asarray(rate(state.step), jnp.float32)
  whole = tree.trained(state.params)
  trained = tree.psi(whole) if alone else whole
  (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(trained)
  grads = {**jax.tree.map(jnp.zeros_like, whole), **grads}
  return _unless_bad(state, _apply(state, grads, state.occ, transform), loss,
                     grads, metrics | {'lr': lr}, config.run.max_skipped)


class Steps(NamedTuple):
  """The jitted functions of a phase; call them inside jax.set_mesh(mesh).

  Attributes:
    init: function key -> TrainState, created sharded.
    init_rest: function key -> the same without theta (params has psi and
      theta's adapters alone); for runs that load theta.
    update: function (state, batch) -> (state, metrics); state is donated.
    hold: the same for minibatches that keep lambda, see occ.measure, or None.
    score: function (params, `types.Tokens`) -> LogProbs with entropy and
      acceptance.
    score_main: the same of the main head alone, without either.
    abstract: TrainState of ShapeDtypeStructs with shardings.
  """
  init: Callable
  init_rest: Callable
  update: Callable
  hold: Callable | None
  score: Callable
  score_main: Callable
  abstract: Any


def make(config: config_lib.Config, mesh, phase='rl'):
  """Shard and jit the functions of a phase.

  Args:
    config: `config.Config`, its vocabulary resolved.
    mesh: see `sharding.make_mesh`.
    phase: 'rl' or 'warmup'.

  Returns:
    `Steps`.
  """
  if phase == 'rl':
    step, lr = train_step, config.rl.lr
    updates = config.rl.steps * config.rl.minibatches
    train_psi = config.mtp.regime != 'rl_only'
  else:
    step, lr, updates = supervised_step, config.warmup.lr, config.warmup.steps
    train_psi = True
  train_theta = phase == 'rl' or config.warmup.train == 'all'
  rate = optim.schedule(lr, config.optim, updates)
  transform = optim.make(config.optim, rate, train_psi, train_theta)

  def init(key):
    params = forward.init(config, key)
    return types.TrainState(
        jnp.int32(0), params, transform.init(tree.trained(params)),
        occ.initial_state(config_lib.depths(config.mtp),
                          config.occ.lambda_plus),
        types.Skipped(jnp.int32(0), jnp.int32(0)))

  def rest(params):
    return {**tree.adapters(params), **tree.psi(params)}

  def init_rest(key):
    state = init(key)
    return state._replace(params=rest(state.params))

  with jax.set_mesh(mesh):
    shapes = jax.eval_shape(lambda: init(jax.random.key(0)))
  shardings = sharding.tree_shardings(shapes, mesh)
  abstract = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      shapes, shardings)
  rows, whole = sharding.batch_sharding(mesh), NamedSharding(mesh, P())

  def update(config):
    return jax.jit(
        functools.partial(step, config=config, transform=transform, rate=rate),
        in_shardings=(shardings, rows), out_shardings=(shardings, whole),
        donate_argnums=0)

  def score(**what):
    return jax.jit(functools.partial(forward.score, config=config, **what),
                   in_shardings=(shardings.params, rows), out_shardings=rows)

  holding = dataclasses.replace(config, mtp=dataclasses.replace(
      config.mtp, regime='held'))
  return Steps(
      init=jax.jit(init, out_shardings=shardings),
      init_rest=jax.jit(init_rest, out_shardings=shardings._replace(
          params=rest(shardings.params))),
      update=update(config),
      hold=(update(holding) if phase == 'rl' and regimes.holds(config)
            else None),
      score=score(entropy=True, acceptance=True),
      score_main=score(with_mtp=False),
      abstract=abstract)
