"""The gradients of one minibatch: J, the MTP objectives, lambda, their sum.

    log-probs, pullbacks = forward(params)               one shared forward
    cotangents of J = -L_RL and of -L_MTP                on [B, S] arrays
    lambda = the regime's coefficient, or an estimator's
    theta: trunk pullback of (d_RL + lambda d_MTP)       one trunk backward
    psi:   the heads' pullback of their own loss

The objectives see the log-probs of the whole minibatch, so lambda and every
denominator are the same for any number of microbatches or devices.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtp_rl import config as config_lib
from mtp_rl import estimators, forward, occ, sharding, tree
from mtp_rl.models import attention
from mtp_rl.objectives import logprobs, policy
from mtp_rl.objectives import mtp as mtp_loss

SEPARATE = ('rl_only', 'detach')  # no MTP gradient reaches theta
POLICY = ('policy', 'occ', 'occ_authors')  # the MTP loss is the RL loss


class Result(NamedTuple):
  """What an update needs.

  Attributes:
    gradient: of what is minimised, a tree like params.
    occ: the new `types.OccState`.
    metrics: dict of float32 [].
    objective: J at params, float32 [].
    g_rl: grad J over theta where it was computed apart, else None.
  """
  gradient: Any
  occ: Any
  metrics: dict
  objective: jax.Array
  g_rl: Any = None


def mtp_losses(heads, head_mask, batch, config, kind, scale=None):
  """Return the K losses of one kind ('ce' or 'policy') and metrics."""
  ce = mtp_loss.cross_entropy(heads, head_mask)
  pg, clipfrac = mtp_loss.policy_losses(heads, head_mask, batch, config.rl,
                                        config.mtp.reference, scale,
                                        config.rollout.max_response)
  metrics = {'mtp/pg_clipfrac': clipfrac}
  for k in range(heads.shape[-1]):
    metrics[f'mtp_{k + 1}/loss'] = ce[k]
    metrics[f'mtp_{k + 1}/pg_loss'] = pg[k]
  return (ce if kind == 'ce' else pg), metrics


def objective(params, batch, config, vocab_size):
  """Return J (to be maximised), float32 []."""
  out = forward.score(params, batch.tokens, batch.valid, config=config,
                      vocab_size=vocab_size, heads=False,
                      responses=batch.mask.shape[1],
                      entropy=bool(config.rl.entropy_coef))
  return -policy.rl_loss(out.main, out.entropy, batch, config.rl,
                         config.rollout.max_response)[0]


def _fixed(config, d_rl, d_mtp):
  """Return lambda [K] of the regimes that measure nothing, and row scales.

  occ_authors puts its lambda, one a microbatch, on the advantages.
  """
  k, regime = config.mtp.heads, config.mtp.regime
  if regime != 'occ_authors':
    return jnp.full((k,), config.mtp.coef / k), None
  pieces = config.rl.microbatches
  lam = occ.authors_coefficient(
      forward.split(d_rl, pieces), forward.split(d_mtp, pieces),
      config.occ.lambda_plus, config.occ.eps)[:, 0]
  lam = jnp.clip(lam, config.occ.lambda_min, config.occ.lambda_max)
  return jnp.mean(lam)[None], jnp.tile(lam, d_rl.shape[0] // pieces)


def _occ_metrics(products, lam):
  out = {'occ/lambda': jnp.mean(lam), 'occ/dot': jnp.sum(products.c),
         'occ/d_rl_norm': jnp.sqrt(products.rl),
         'occ/d_mtp_norm': jnp.sqrt(jnp.trace(products.gram)),
         'occ/cos': jnp.mean(occ.cosine(products))}
  if lam.shape[0] > 1:
    out |= {f'occ/lambda_{k + 1}': x for k, x in enumerate(lam)}
  return out


def _estimate_metrics(estimate, name):
  if estimate.gradients is not None:
    name = 'exact'
  products = estimate.products
  numbers = {'c': jnp.sum(products.c), 'v2': jnp.trace(products.gram),
             'cos': jnp.mean(occ.cosine(products)),
             'lambda_star': jnp.mean(estimate.lam),
             **(estimate.info or {})}
  return {f'occ/{name}/{k}': v for k, v in numbers.items()}


class Minibatch:
  """One minibatch under one set of parameters: log-probs and pullbacks.

  Every method but the constructor's work is lazy and done once. Gradients
  ascend (paper: g), losses descend. With pieces > 1 the rows pass in disjoint
  parts, prompts kept whole, whose gradients add up: cross-fitting needs them,
  and whoever goes through the trunk more often is faster on fewer rows.
  """

  def __init__(self, params, batch, config, vocab_size, pieces=1):
    self.params, self.batch, self.config = params, batch, config
    self._vocab_size, self._pieces = vocab_size, pieces
    self.kind = 'policy' if config.mtp.regime in POLICY else 'ce'
    use_heads = config.mtp.regime != 'rl_only'
    self._entropy = bool(config.rl.entropy_coef)
    self._forwards = [
        forward.forward(params, tokens, valid, config=config,
                        vocab_size=vocab_size, heads=use_heads,
                        responses=batch.mask.shape[1], entropy=self._entropy)
        for tokens, valid in zip(self._cut(batch.tokens),
                                 self._cut(batch.valid))]
    self.main = self._paste([f.main for f in self._forwards])
    self.entropy = (self._paste([f.entropy for f in self._forwards])
                    if self._entropy else 0.)
    (loss, self.metrics), d_rl = jax.value_and_grad(
        policy.rl_loss, argnums=(0, 1), has_aux=True)(
            self.main, self.entropy, batch, config.rl,
            config.rollout.max_response)
    self.value = -loss
    self._d_rl = jax.tree.map(jnp.negative, d_rl)
    if use_heads:
      self.heads = self._paste([f.heads for f in self._forwards])
      self.head_mask = logprobs.head_mask(
          batch.valid, batch.mask.shape[1], config.mtp.heads)
      self.head_mask &= batch.mask[..., None]  # no prompt of a packed row

  def _cut(self, x):
    """[B, ...] -> list of parts, prompt p in part p mod n."""
    n, group = self._pieces, self.config.rl.group
    if n == 1:
      return [x]
    y = x.reshape(-1, n, group, *x.shape[1:])
    return [y[:, i].reshape(-1, *x.shape[1:]) for i in range(n)]

  def _paste(self, parts):
    n, group = self._pieces, self.config.rl.group
    if n == 1:
      return parts[0]
    y = jnp.stack([x.reshape(-1, group, *x.shape[1:]) for x in parts], 1)
    return y.reshape(-1, *parts[0].shape[1:])

  @functools.cached_property
  def deltas(self):
    """delta_RL and delta_MTP; see `occ.deltas`."""
    b = self.batch
    old = mtp_loss.reference(b, self.config.mtp.reference)
    return occ.deltas(self.main, self.heads, b.old_main, old, b.mask,
                      self.head_mask)

  def pull_heads(self, weights, kind, scale=None):
    """Return each part's `Boundary` and psi gradient of -weights . L_MTP."""
    def total(heads):
      values, info = mtp_losses(heads, self.head_mask, self.batch, self.config,
                                kind, scale)
      return -jnp.sum(weights * values), info
    d_heads, info = jax.grad(total, has_aux=True)(self.heads)
    self.metrics |= info
    return [f.pull_heads(d) for f, d in zip(self._forwards,
                                            self._cut(d_heads))]

  @functools.cached_property
  def rl_boundaries(self):
    """Each part's `Boundary` of J."""
    d_main, d_entropy = self._d_rl
    entropies = (self._cut(d_entropy) if self._entropy
                 else [None] * self._pieces)
    return [f.pull_main(d, e) for f, d, e in zip(
        self._forwards, self._cut(d_main), entropies)]

  @functools.cached_property
  def units(self):
    """For each head alone, what `pull_heads` returns of theta's loss."""
    k = self.config.mtp.heads
    return [self.pull_heads(jax.nn.one_hot(i, k), self.kind) for i in range(k)]

  def pull_trunk(self, boundaries):
    """Return each part's gradient over theta."""
    return [f.pull_trunk(b) for f, b in zip(self._forwards, boundaries)]

  @functools.cached_property
  def parts(self):
    """Pairs (g_RL, [g_k]) over theta, one a part."""
    return list(zip(self.pull_trunk(self.rl_boundaries), map(
        list, zip(*self.head_gradients)), strict=True))

  @functools.cached_property
  def head_gradients(self):
    """For each head, a list of each part's g_k over theta."""
    return [self.pull_trunk([b for b, _ in unit]) for unit in self.units]

  @functools.cached_property
  def whole(self):
    """[g_1 .. g_K] over theta, their parts summed."""
    return [_sum(g) for g in self.head_gradients]

  def directional(self, direction):
    """Return g_RL and H direction over theta, by jvp of grad J in each part.

    J is a sum over rows (denominators come from the mask), so a part's share
    is J with the log-probs of all other rows held constant.
    """
    psi, theta = tree.head(self.params), tree.shared(self.params)
    config = dataclasses.replace(
        self.config, model=attention.without_kernels(self.config.model))

    def put(whole, i, part):
      if self._pieces == 1:
        return part
      y = whole.reshape(-1, self._pieces, self.config.rl.group,
                        *whole.shape[1:])
      part = part.reshape(y.shape[0], *y.shape[2:])
      return y.at[:, i].set(part).reshape(whole.shape)

    def add(total, part):
      def value(theta):
        i, tokens, valid = part
        out = forward.score({**theta, **psi}, tokens, valid, heads=False,
                            config=config, vocab_size=self._vocab_size,
                            responses=self.batch.mask.shape[1],
                            entropy=self._entropy)
        entropy = put(self.entropy, i, out.entropy) if self._entropy else 0.
        return -policy.rl_loss(put(self.main, i, out.main), entropy,
                               self.batch, self.config.rl,
                               self.config.rollout.max_response)[0], None
      _, g, _, product = occ.directional(value, theta, direction)
      return tree.add(total, (g, product)), None

    rows = [sharding.constrain_batch(jnp.stack(self._cut(x)), axis=1)
            for x in (self.batch.tokens, self.batch.valid)]
    zero = jax.tree.map(jnp.zeros_like, (theta, theta))
    total, _ = jax.lax.scan(add, zero, (jnp.arange(self._pieces), *rows))
    return total

  def view(self, state, eta, precondition=None, ahead=None):
    """Return the `estimators.View` of this minibatch."""
    upper = lambda boundaries: _sum([b.readout for b in boundaries])
    return estimators.View(
        deltas=lambda: self.deltas,
        readout=lambda: (upper(self.rl_boundaries),
                         [upper(b for b, _ in unit) for unit in self.units]),
        gradients=lambda: (_sum([g for g, _ in self.parts]), self.whole),
        heads=lambda: self.whole,
        parts=lambda: self.parts, directional=self.directional,
        precondition=precondition, ahead=ahead, eta=eta,
        smoothness=state.smoothness)

  @property
  def apart(self):
    """Whether the heads were pulled back one by one."""
    return 'units' in self.__dict__


def _sum(trees):
  return functools.reduce(tree.add, trees)


def _weighted(weights, trees):
  """Return sum_k weights_k trees_k."""
  return _sum([jax.tree.map(lambda x, w=w: w * x, t)
               for w, t in zip(weights, trees)])


def _psi_gradient(work, own, kind, scale, pulled, joint):
  """Return the ascent direction of psi.

  Args:
    work: `Minibatch`.
    own: [K], psi's own coefficients (theta's where `joint`).
    kind: psi's loss.
    scale: see `mtp_losses`.
    pulled: (Boundary, psi) of each part, pulled back for theta, or None.
    joint: whether psi follows theta's loss and coefficients.
  """
  if joint and pulled is not None:
    return _sum([psi for _, psi in pulled])
  if scale is None and kind == work.kind and (
      work.apart or work.config.mtp.heads == 1):
    return _weighted(own, [_sum([psi for _, psi in unit])
                           for unit in work.units])
  return _sum([psi for _, psi in work.pull_heads(
      own, kind, scale if joint else None)])


def gradients(params, batch, state, config, vocab_size, eta=0.,
              precondition=None):
  """Return the `Result` of a minibatch: the regime's combined gradient.

  Args:
    params: the model's parameters.
    batch: `types.RolloutBatch`, the whole minibatch.
    state: `types.OccState`.
    config: `config.Config`.
    vocab_size: V.
    eta: float32 [], the step size of the decomposition (curvature).
    precondition: g -> P g over theta (preconditioned).
  """
  m, o = config.mtp, config.occ
  measured = m.regime == 'occ'
  in_parts = measured and o.estimator in config_lib.IN_PARTS
  pieces = o.pieces if in_parts else 1
  work = Minibatch(params, batch, config, vocab_size, pieces)
  down = lambda *trees: jax.tree.map(
      jnp.negative, functools.reduce(lambda a, b: {**a, **b}, trees))
  if m.regime == 'rl_only':
    zero = jax.tree.map(jnp.zeros_like, tree.head(params))
    theta = _sum(work.pull_trunk(work.rl_boundaries))
    return Result(down(theta, zero), state, work.metrics, work.value)

  d_rl, d_mtp = work.deltas
  joint, own = m.head_loss == 'joint', m.head_coef
  kind = work.kind if joint else m.head_loss
  estimate, scale, g_rl, pulled = None, None, None, None
  if m.regime == 'detach':
    lam, own = jnp.zeros((m.heads,)), m.coef if joint else own
    theta = _sum(work.pull_trunk(work.rl_boundaries))
  else:
    if measured:
      view = work.view(state, eta, precondition)
      estimate = estimators.ESTIMATORS[o.estimator](view, o)
      work.metrics |= _estimate_metrics(estimate, o.estimator)
      lam, state = occ.track(state, estimate.lam, o)
      if o.guard:
        lam = occ.guard(lam, estimate.products, o.guard)
    else:
      lam, scale = _fixed(config, d_rl, d_mtp)
    if estimate is not None and estimate.gradients is not None:
      g_rl, g = estimate.gradients
      theta = tree.add(g_rl, _weighted(lam, g))
    else:
      if work.apart or (m.heads == 1 and scale is None):
        extra = _weighted(lam, [unit[0][0] for unit in work.units])
      else:
        weights = jnp.ones_like(lam) if scale is not None else lam
        pulled = work.pull_heads(weights, work.kind, scale)
        extra = pulled[0][0]
      theta, = work.pull_trunk([tree.add(work.rl_boundaries[0], extra)])
  own = lam if joint and m.regime != 'detach' else jnp.full_like(
      lam, own / m.heads)
  psi = _psi_gradient(work, own, kind, scale, pulled,
                      joint and m.regime != 'detach')
  metrics = work.metrics | _occ_metrics(
      occ.logprob_products(d_rl, d_mtp), lam)
  return Result(down(theta, psi), state, metrics, work.value, g_rl)
