"""The pure update: losses, pullbacks, lambda, one combined gradient.

    log-probs, pullback = jax.vjp(score, params)         one shared forward
    cotangents of L_RL and of L_MTP                      on [B, S] arrays
    lambda = the regime's coefficient                    from those log-probs
    theta: pullback(dL_RL, lambda * dL_MTP)              one trunk backward
    psi:   pullback(dL_head), the MTP modules only

The objectives see the log-probs of the whole minibatch, so lambda and every
denominator are the same for any number of microbatches or devices.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mtp_rl import masked, occ, optim, sharding, tree, types
from mtp_rl.models import mtp as mtp_model
from mtp_rl.models import transformer
from mtp_rl.objectives import logprobs, policy
from mtp_rl.objectives import mtp as mtp_loss

SEPARATE = ('rl_only', 'detach')  # no MTP gradient reaches theta
POLICY = ('policy', 'occ', 'occ_authors')  # the MTP loss is the RL loss


def network(config, vocab_size):
  """Return the Linen decoder of a config (without parameters)."""
  return mtp_model.Decoder(config.model, config.mtp, vocab_size)


def _split(x, pieces):
  """[B, ...] -> [M, B/M, ...], row r in microbatch r mod M (device-local)."""
  x = x.reshape(x.shape[0] // pieces, pieces, *x.shape[1:]).swapaxes(0, 1)
  return sharding.constrain_batch(x, axis=1)


def _join(x):
  x = x.swapaxes(0, 1)
  return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def score(params, tokens, valid, *, config, vocab_size, heads=True, detach=(),
          entropy=False, acceptance=False):
  """Return the `logprobs.LogProbs` of the response tokens under params.

  With rl.microbatches > 1 the rows pass in that many pieces, each recomputed
  in a backward pass: the memory of one piece, for one more forward.

  Args:
    params: the model's parameters.
    tokens: int32 [B, T].
    valid: bool [B, T].
    config: `config.Config`.
    vocab_size: V.
    heads: whether the MTP heads are scored.
    detach: which of 'hidden', 'embedding', 'head' the MTP heads' gradient
      does not enter, beside those that config.mtp detaches.
    entropy, acceptance: see `logprobs.token_logprobs`.
  """
  stops = {f'detach_{name}': True for name in detach}
  mtp_config = type(config.mtp)(**{**vars(config.mtp), **stops})
  net = mtp_model.Decoder(config.model, mtp_config, vocab_size)

  def piece(params, tokens, valid):
    hidden, ahead = net.apply({'params': params}, tokens, valid, heads)
    matrix = transformer.head_matrix(params)
    head_matrix = (jax.lax.stop_gradient(matrix) if mtp_config.detach_head
                   else matrix)
    return logprobs.token_logprobs(
        hidden, ahead, matrix, head_matrix, tokens,
        config.rollout.max_response, chunk=config.model.head_chunk,
        temperature=config.rollout.temperature, entropy=entropy,
        acceptance=acceptance)

  pieces = config.rl.microbatches
  if pieces == 1:
    return piece(params, tokens, valid)
  piece = jax.checkpoint(piece, prevent_cse=False)
  out = jax.lax.map(lambda xs: piece(params, *xs),
                    (_split(tokens, pieces), _split(valid, pieces)))
  return jax.tree.map(_join, out)


def mtp_losses(heads, head_mask, batch, config, kind, scale=None):
  """Return the K losses of one kind ('ce' or 'policy') and metrics."""
  ce = mtp_loss.cross_entropy(heads, head_mask)
  pg, clipfrac = mtp_loss.policy_losses(heads, head_mask, batch, config.rl,
                                        config.mtp.reference, scale)
  metrics = {'mtp/pg_clipfrac': clipfrac}
  for k in range(heads.shape[-1]):
    metrics[f'mtp_{k + 1}/loss'] = ce[k]
    metrics[f'mtp_{k + 1}/pg_loss'] = pg[k]
  return (ce if kind == 'ce' else pg), metrics


def _products(main, heads, head_mask, batch, config):
  return occ.logprob_products(
      main, heads, batch.old_main, mtp_loss.reference(
          batch, config.mtp.reference), batch.mask, head_mask)


def _coefficient(config, products, main, heads, batch, head_mask):
  """Return the regime's lambda [K] before bounds, and advantage scales [B]."""
  k, regime = config.mtp.heads, config.mtp.regime
  if regime in SEPARATE:
    return jnp.zeros((k,)), None
  if regime in ('ce', 'policy'):
    return jnp.full((k,), config.mtp.coef / k), None
  if regime == 'occ':
    return occ.coefficient(products, config.occ), None
  pieces = config.rl.microbatches
  old = mtp_loss.reference(batch, config.mtp.reference)
  # Padding is made equal on both sides: its deltas are zero and still count.
  main = jnp.where(batch.mask, main, batch.old_main)
  heads = jnp.where(head_mask, heads, old)
  lam = occ.authors_coefficient(
      *[_split(x, pieces) for x in (main, heads, batch.old_main, old)],
      config.occ.lambda_plus / k, config.occ.eps)
  lam = jnp.clip(lam, config.occ.lambda_min, config.occ.lambda_max)
  scale = jnp.tile(lam, batch.mask.shape[0] // pieces)
  return jnp.mean(lam)[None], scale


def _occ_metrics(products, lam):
  out = {'occ/lambda': jnp.mean(lam), 'occ/dot': jnp.sum(products.c),
         'occ/d_rl_norm': jnp.sqrt(products.rl),
         'occ/d_mtp_norm': jnp.sqrt(jnp.trace(products.gram)),
         'occ/cos': jnp.mean(occ.cosine(products))}
  if lam.shape[0] > 1:
    out |= {f'occ/lambda_{k + 1}': x for k, x in enumerate(lam)}
  return out


def _head_kind(config):
  """Return psi's loss: 'ce', 'policy', or theta's own where it is joint."""
  if config.mtp.head_loss != 'joint':
    return config.mtp.head_loss
  return 'policy' if config.mtp.regime in POLICY else 'ce'


def pullback_gradients(params, batch, state, config, vocab_size):
  """Return the combined gradient with lambda from log-probabilities.

  Args:
    params: the model's parameters.
    batch: `types.RolloutBatch`, the whole minibatch.
    state: `types.OccState`.
    config: `config.Config`.
    vocab_size: V.

  Returns:
    gradient of what is minimised (tree like params), the new OccState, and
    metrics.
  """
  regime, joint = config.mtp.regime, config.mtp.head_loss == 'joint'
  use_heads = regime != 'rl_only'
  entropy = bool(config.rl.entropy_coef)
  out, pullback = jax.vjp(
      functools.partial(
          score, tokens=batch.tokens, valid=batch.valid, config=config,
          vocab_size=vocab_size, heads=use_heads, entropy=entropy,
          detach=('hidden', 'embedding', 'head') if regime in SEPARATE else ()),
      params)
  (_, metrics), (d_main, d_entropy) = jax.value_and_grad(
      policy.rl_loss, argnums=(0, 1), has_aux=True)(
          out.main, out.entropy if entropy else 0., batch, config.rl)
  pull = lambda main, ent, heads: pullback(
      out._replace(main=main, heads=heads, entropy=ent if entropy else None))[0]
  if not use_heads:
    return pull(d_main, d_entropy, out.heads), state, metrics

  head_mask = logprobs.head_mask(batch.valid, batch.mask.shape[1],
                                 config.mtp.heads)
  products = _products(out.main, out.heads, head_mask, batch, config)
  lam, scale = _coefficient(config, products, out.main, out.heads, batch,
                            head_mask)
  if regime in ('occ', 'occ_authors'):
    lam, state = occ.track(state, lam, config.occ)
  metrics |= _occ_metrics(products, lam)

  def losses(heads, weights, kind, scale=None):
    values, info = mtp_losses(heads, head_mask, batch, config, kind, scale)
    return jnp.sum(weights * values), info

  grad = jax.grad(losses, has_aux=True)
  weights = jnp.ones_like(lam) if scale is not None else lam
  kind = 'policy' if regime in POLICY else 'ce'
  d_theta, info = grad(out.heads, weights, kind, scale)
  metrics |= info
  own = config.mtp.head_coef if not joint else config.mtp.coef
  own = jnp.full_like(lam, own / config.mtp.heads)
  if regime in SEPARATE:  # the model itself keeps psi's loss out of theta
    d_head, _ = grad(out.heads, own, 'ce')
    return pull(d_main, d_entropy, d_head), state, metrics
  combined = pull(d_main, d_entropy, d_theta)
  if joint:
    return combined, state, metrics
  d_head, _ = grad(out.heads, own, _head_kind(config))
  psi = tree.head(pull(jnp.zeros_like(d_main), jnp.zeros_like(d_entropy),
                       d_head))
  return {**tree.shared(combined), **psi}, state, metrics


def curvature_gradients(params, batch, state, eta, config, vocab_size):
  """Return the combined gradient with lambda*_H from exact gradients.

  The g_k by jax.grad over theta; g_RL, c = dJ(g_k) and H g_k together by one
  jax.jvp of J's gradient along g_k; then `occ.curvature_coefficient`.

  Args:
    eta: float32 [], the step size of the decomposition.
    The others, and the result: see `pullback_gradients`.
  """
  theta, psi = tree.shared(params), tree.head(params)
  heads = config.mtp.heads
  head_mask = logprobs.head_mask(batch.valid, batch.mask.shape[1], heads)
  scored = functools.partial(
      score, tokens=batch.tokens, valid=batch.valid, config=config,
      vocab_size=vocab_size)

  def objective(theta):  # J, to be maximised
    out = scored({**theta, **psi}, heads=False,
                 entropy=bool(config.rl.entropy_coef))
    loss, metrics = policy.rl_loss(out.main, out.entropy, batch, config.rl)
    return -loss, (out.main, metrics)

  def mtp_objective(theta, k):
    out = scored({**theta, **psi})
    values, info = mtp_losses(out.heads, head_mask, batch, config, 'policy')
    return -values[k], (out.heads, info)

  def head_loss(psi, weights):
    out = scored({**jax.lax.stop_gradient(theta), **psi})
    values, _ = mtp_losses(out.heads, head_mask, batch, config,
                           _head_kind(config))
    return jnp.sum(weights * values)

  g, c, hg = [], [], []
  for k in range(heads):
    g_k, (ahead, info) = jax.grad(mtp_objective, has_aux=True)(theta, k)
    (_, (main, metrics)), g_rl, c_k, hg_k = occ.directional(
        objective, theta, g_k)
    g.append(g_k), c.append(c_k), hg.append(hg_k)

  gram = jnp.stack([jnp.stack([tree.dot(a, b) for b in g]) for a in g])
  products = occ.Products(jnp.stack(c), gram, tree.dot(g_rl, g_rl))
  mtp_h_mtp = jnp.stack([jnp.stack([tree.dot(a, b) for b in hg]) for a in g])
  rl_h_mtp = jnp.stack([tree.dot(g_rl, b) for b in hg])
  raw, usable = occ.curvature_coefficient(
      products, rl_h_mtp, mtp_h_mtp, eta, occ.coefficient(products, config.occ))
  lam, state = occ.track(state, raw, config.occ)

  grads = g_rl
  for k in range(heads):
    grads = tree.axpy(lam[k], g[k], grads)
  grads = jax.tree.map(jnp.negative, grads)
  own = jnp.full_like(lam, config.mtp.head_coef / heads)
  weights = lam if config.mtp.head_loss == 'joint' else own
  metrics |= info | _occ_metrics(
      _products(main, ahead, head_mask, batch, config), lam)
  metrics |= {
      'occ/exact/c': jnp.sum(products.c), 'occ/exact/v2': jnp.trace(gram),
      'occ/exact/cos': jnp.mean(occ.cosine(products)),
      'occ/exact/lambda_star': jnp.mean(raw),
      'occ/exact/rl_h_mtp': jnp.sum(rl_h_mtp),
      'occ/exact/mtp_h_mtp': jnp.trace(mtp_h_mtp),
      'occ/exact/concave': usable.astype(jnp.float32)}
  return {**grads, **jax.grad(head_loss)(psi, weights)}, state, metrics


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
  args = (state.params, batch, state.occ)
  lr = jnp.asarray(rate(state.step), jnp.float32)
  if config.occ.estimator == 'curvature':
    eta = jnp.float32(config.occ.eta) if config.occ.eta else lr
    grads, tracked, metrics = curvature_gradients(*args, eta, config,
                                                  vocab_size)
  else:
    grads, tracked, metrics = pullback_gradients(*args, config, vocab_size)
  metrics |= {'grad_norm/policy': tree.norm(tree.shared(grads)),
              'grad_norm/mtp': tree.norm(tree.head(grads)), 'lr': lr}
  return _apply(state, grads, tracked, transform), metrics


def _apply(state, grads, tracked, transform):
  updates, opt_state = transform.update(grads, state.opt_state, state.params)
  params = jax.tree.map(jnp.add, state.params, updates)
  return types.TrainState(state.step + 1, params, opt_state, tracked)


def supervised_step(state, batch, *, config, vocab_size, transform, rate):
  """Return the state after one warm-up update: next-token + MTP losses.

  Args:
    batch: `types.Tokens`; the response columns hold the solution.
    The others: see `train_step`.
  """
  responses = config.rollout.max_response
  mask = batch.valid[:, -responses:]
  head_mask = logprobs.head_mask(batch.valid, responses, config.mtp.heads)

  def loss_fn(params):
    out = score(params, batch.tokens, batch.valid, config=config,
                vocab_size=vocab_size)
    main = masked.mean(-out.main, mask)
    ahead = mtp_loss.cross_entropy(out.heads, head_mask)
    total = main + config.warmup.mtp_coef * jnp.sum(ahead) / max(
        config.mtp.heads, 1)
    metrics = {f'mtp_{k + 1}/loss': x for k, x in enumerate(ahead)}
    return total, metrics | {'warmup/loss': main}

  grads, metrics = jax.grad(loss_fn, has_aux=True)(state.params)
  metrics |= {'grad_norm/policy': tree.norm(tree.shared(grads)),
              'grad_norm/mtp': tree.norm(tree.head(grads)),
              'lr': jnp.asarray(rate(state.step), jnp.float32)}
  return _apply(state, grads, state.occ, transform), metrics


class Steps(NamedTuple):
  """The jitted functions of a phase; call them inside jax.set_mesh(mesh).

  Attributes:
    init: key -> TrainState, created in its shards.
    update: (state, batch) -> (state, metrics); state is donated.
    score: (params, tokens, valid) -> LogProbs with entropy and acceptance.
    abstract: TrainState of ShapeDtypeStructs with shardings.
  """
  init: Callable
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
  rate = optim.schedule(lr, config.optim, updates)
  transform = optim.make(config.optim, rate, train_head)

  def init(key):
    net = network(config, vocab_size)
    example = jnp.zeros((1, config.mtp.heads + 2), jnp.int32)
    params = net.init(key, example, jnp.ones_like(example, bool))['params']
    return types.TrainState(jnp.int32(0), params, transform.init(params),
                            occ.initial_state(config.mtp.heads))

  with jax.set_mesh(mesh):
    shapes = jax.eval_shape(init, jax.random.key(0))
  shardings = sharding.tree_shardings(shapes, mesh)
  abstract = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      shapes, shardings)
  rows, whole = sharding.batch_sharding(mesh), NamedSharding(mesh, P())
  bound = dict(config=config, vocab_size=vocab_size)
  return Steps(
      init=jax.jit(init, out_shardings=shardings),
      update=jax.jit(
          functools.partial(step, transform=transform, rate=rate, **bound),
          in_shardings=(shardings, rows), out_shardings=(shardings, whole),
          donate_argnums=0),
      score=jax.jit(
          functools.partial(score, entropy=True, acceptance=True, **bound),
          in_shardings=(shardings.params, rows, rows), out_shardings=rows),
      abstract=abstract)
