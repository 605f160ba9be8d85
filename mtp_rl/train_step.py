"""The pure update: gradients, optimiser, tracked coefficient; and its jit."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mtp_rl import forward, gradients, masked, occ, optim, sharding, tree, types
from mtp_rl.objectives import logprobs
from mtp_rl.objectives import mtp as mtp_loss


def train_step(state, batch, *, config, vocab_size, transform, rate):
  """Return the state after one optimiser update, and its metrics.

  Args:
    state: `types.TrainState`.
    batch: `types.RolloutBatch`, one minibatch.
    config: `config.Config`.
    vocab_size: V.
    transform: the optax transformation.
    rate: schedule, update count -> learning rate.
  """
  o = config.occ
  lr = jnp.asarray(rate(state.step), jnp.float32)
  measured = o.estimator if config.mtp.regime == 'occ' else None
  precondition = (optim.preconditioner(state.opt_state, config.optim)
                  if measured == 'preconditioned' else None)
  out = gradients.gradients(
      state.params, batch, state.occ, config, vocab_size,
      jnp.float32(o.eta) if o.eta else lr, precondition)
  after = _apply(state, out.gradient, out.occ, transform)
  if measured == 'cross_fitted':
    tracked = jax.lax.cond(
        state.step % o.probe_every == 0,
        lambda: _probe(state, after, out, batch, config, vocab_size),
        lambda: after.occ)
    after = after._replace(occ=tracked)
  metrics = out.metrics | {
      'grad_norm/policy': tree.norm(tree.shared(out.gradient)),
      'grad_norm/mtp': tree.norm(tree.head(out.gradient)), 'lr': lr}
  return after, metrics


def _probe(before, after, out, batch, config, vocab_size):
  """Return the OccState with L eta of the update just made averaged in."""
  move = jax.tree.map(jnp.subtract, tree.shared(after.params),
                      tree.shared(before.params))
  achieved = gradients.objective(
      {**after.params, **tree.head(before.params)}, batch, config,
      vocab_size) - out.objective
  ascent = jax.tree.map(jnp.negative, tree.shared(out.gradient))
  length = tree.dot(ascent, move)
  ratio = occ.smoothness_ratio(tree.dot(out.g_rl, move), achieved, length)
  return occ.track_smoothness(after.occ,
                              jnp.where(length > 0, ratio, jnp.nan))


def _apply(state, grads, tracked, transform):
  updates, opt_state = transform.update(grads, state.opt_state, state.params)
  params = jax.tree.map(jnp.add, state.params, updates)
  return types.TrainState(state.step + 1, params, opt_state, tracked)


def supervised_step(state, batch, *, config, vocab_size, transform, rate):
  """Return the state after one warm-up update: next-token + MTP losses.

  Args:
    batch: `types.Tokens`; the response columns hold the solution.
    The others: see `train_step`.

  With warmup.train='mtp' only the MTP modules are differentiated, and how
  often their argmax is the main head's is among the metrics.
  """
  alone = config.warmup.train == 'mtp'
  responses = config.rollout.max_response
  mask = batch.valid[:, -responses:]
  head_mask = logprobs.head_mask(batch.valid, responses, config.mtp.heads)

  def loss_fn(trained):
    out = forward.score({**state.params, **trained}, batch.tokens, batch.valid,
                        config=config, vocab_size=vocab_size, acceptance=alone)
    main = masked.mean(-out.main, mask)
    ahead = mtp_loss.cross_entropy(out.heads, head_mask)
    total = main + config.warmup.mtp_coef * jnp.sum(ahead) / max(
        config.mtp.heads, 1)
    metrics = {f'mtp_{k + 1}/loss': x for k, x in enumerate(ahead)}
    if alone:
      agree = masked.mean(out.top1.astype(jnp.float32), head_mask, axis=(0, 1))
      metrics |= {f'mtp_{k + 1}/accept_top1': x for k, x in enumerate(agree)}
    return total, metrics | {'warmup/loss': main}

  trained = tree.head(state.params) if alone else state.params
  grads, metrics = jax.grad(loss_fn, has_aux=True)(trained)
  grads = {**jax.tree.map(jnp.zeros_like, state.params), **grads}
  metrics |= {'grad_norm/policy': tree.norm(tree.shared(grads)),
              'grad_norm/mtp': tree.norm(tree.head(grads)),
              'lr': jnp.asarray(rate(state.step), jnp.float32)}
  return _apply(state, grads, state.occ, transform), metrics


class Steps(NamedTuple):
  """The jitted functions of a phase; call them inside jax.set_mesh(mesh).

  Attributes:
    init: key -> TrainState, created in its shards.
    init_rest: key -> the same without theta, of which nothing is computed:
      for weights from elsewhere.
    update: (state, batch) -> (state, metrics); state is donated.
    score: (params, tokens, valid) -> LogProbs with entropy and acceptance.
    abstract: TrainState of ShapeDtypeStructs with shardings.
  """
  init: Callable
  init_rest: Callable
  update: Callable
  score: Callable
  abstract: Any


def make(config, vocab_size, mesh, phase='rl'):
  """Shard and jit the functions of a phase.

  Args:
    config: `config.Config`.
    vocab_size: V.
    mesh: see `sharding.make_mesh`.
    phase: 'rl' or 'warmup'.

  Returns:
    `Steps`.
  """
  if phase == 'rl':
    step, lr = train_step, config.rl.lr
    updates = config.rl.steps * config.rl.minibatches
    train_head = config.mtp.regime != 'rl_only'
  else:
    step, lr, updates = supervised_step, config.warmup.lr, config.warmup.steps
    train_head = True
  train_shared = phase == 'rl' or config.warmup.train == 'all'
  rate = optim.schedule(lr, config.optim, updates)
  transform = optim.make(config.optim, rate, train_head, train_shared)

  def init(key):
    params = forward.init(config, vocab_size, key)
    return types.TrainState(jnp.int32(0), params, transform.init(params),
                            occ.initial_state(config.mtp.heads,
                                              config.occ.lambda_plus))

  def init_rest(key):
    state = init(key)
    return state._replace(params=tree.head(state.params))

  with jax.set_mesh(mesh):
    shapes = jax.eval_shape(lambda: init(jax.random.key(0)))
  shardings = sharding.tree_shardings(shapes, mesh)
  abstract = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      shapes, shardings)
  rows, whole = sharding.batch_sharding(mesh), NamedSharding(mesh, P())
  bound = dict(config=config, vocab_size=vocab_size)
  return Steps(
      init=jax.jit(init, out_shardings=shardings),
      init_rest=jax.jit(init_rest, out_shardings=shardings._replace(
          params=tree.head(shardings.params))),
      update=jax.jit(
          functools.partial(step, transform=transform, rate=rate, **bound),
          in_shardings=(shardings, rows), out_shardings=(shardings, whole),
          donate_argnums=0),
      score=jax.jit(
          functools.partial(forward.score, entropy=True, acceptance=True,
                            **bound),
          in_shardings=(shardings.params, rows, rows), out_shardings=rows),
      abstract=abstract)
