"""The gradients of one minibatch: J, the MTP objectives, lambda, their sum.

    score:   log-probs and pullbacks                     one shared forward
    choose:  the regime's lambda, perhaps measured       regimes.py
    theta:   trunk pullback of (d_RL + lambda d_MTP)     one trunk backward
    psi:     the MTP modules' pullback of their own loss

The objectives see the log-probs of the whole minibatch, so lambda and every
denominator are the same for any number of microbatches or devices.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtp_rl import config as config_lib
from mtp_rl import curvature, estimators, forward, occ, sharding, tree, types
from mtp_rl.models import attention
from mtp_rl.objectives import logprobs, policy
from mtp_rl.objectives import mtp as mtp_loss


class Minibatch(NamedTuple):
  """One minibatch scored under one set of parameters.

  The rows are processed in n disjoint parts; all samples of a prompt are in
  one part, and the parts' gradients add up to the minibatch's. n > 1 is for
  estimators that run the trunk more than once: repeated trunk passes are
  faster on smaller parts, and cross-fitting needs disjoint samples.

  Gradients are ascent directions (the paper's g); losses are minimised.

  Attributes:
    params, batch, config: what was scored.
    parts: list of n `forward.Forward`, one per part.
    main: [B, S], log-probs of the main head.
    entropy: [B, S], or 0 where rl.entropy_coef is 0.
    mtp: `mtp_loss.Scores` of the MTP modules; None in rl_only.
    mtp_mask: bool [B, S, K], response tokens that depth k can predict.
    deltas: delta_RL, delta_MTP; see `occ.deltas`.
    objective: J, float32 [].
    rl: gradient of J at the end of the trunk, list of n `forward.Boundary`.
    metrics: dict of float32 [].
  """
  params: Any
  batch: types.RolloutBatch
  config: config_lib.Config
  parts: list
  main: jax.Array
  entropy: jax.Array | float
  mtp: mtp_loss.Scores | None
  mtp_mask: jax.Array | None
  deltas: tuple | None
  objective: jax.Array
  rl: list
  metrics: dict


def disjoint_parts(config: config_lib.Config):
  """Return n, the number of parts that each minibatch is processed in."""
  measured = (config.mtp.regime == 'occ'
              and estimators.ESTIMATORS[config.occ.estimator].in_parts)
  return config.occ.disjoint_parts if measured else 1


def score(params, batch, config: config_lib.Config):
  """Score a minibatch: the forward pass, J, and the pullback of J.

  Args:
    params: the model's parameters.
    batch: `types.RolloutBatch`, the whole minibatch.
    config: `config.Config`.

  Returns:
    `Minibatch`.
  """
  n, group = disjoint_parts(config), config.rl.group
  split = lambda x: tree.by_prompts(x, n, group)
  join = lambda x: tree.rejoin(x, group)
  with_mtp = config.mtp.regime != 'rl_only'
  use_entropy = bool(config.rl.entropy_coef)
  parts = [forward.forward(params, rows, config=config, with_mtp=with_mtp,
                           entropy=use_entropy)
           for rows in split(batch.rows)]
  main = join([f.main for f in parts])
  entropy = join([f.entropy for f in parts]) if use_entropy else 0.
  (loss, metrics), descent = jax.value_and_grad(
      policy.rl_loss, argnums=(0, 1), has_aux=True)(
          main, entropy, batch, config.rl, config.rollout.max_response)
  d_main, d_entropy = jax.tree.map(jnp.negative, descent)
  d_entropies = split(d_entropy) if use_entropy else [None] * n
  rl = [f.pull_main(*d) for f, *d in zip(parts, split(d_main), d_entropies)]
  mtp = mtp_mask = deltas = None
  if with_mtp:
    mtp = jax.tree.map(lambda *x: join(x), *[f.mtp for f in parts])
    mtp_mask = logprobs.mtp_mask(batch.rows.attending, batch.mask.shape[1],
                                 config_lib.depths(config.mtp))
    mtp_mask &= batch.mask[..., None]  # packed rows: leave out prompts
    old = mtp_loss.reference(batch, config.mtp.reference)
    deltas = occ.deltas(main, mtp.logprobs, batch.old_main, old, batch.mask,
                        mtp_mask)
    metrics |= mtp_loss.metrics(mtp.logprobs, mtp_mask, batch, config)
  return Minibatch(params, batch, config, parts, main, entropy, mtp, mtp_mask,
                   deltas, -loss, rl, metrics)


class Pull(NamedTuple):
  """The gradient of an MTP loss at the end of the trunk, and over psi.

  Attributes:
    boundaries: list of `forward.Boundary`, one per part.
    psi: gradient over psi, summed over the parts.
  """
  boundaries: list
  psi: Any


def pull_mtp(work, weights, loss, row_scale=None, depths=slice(None)):
  """Return the `Pull` of -sum_k weights_k L_k.

  Args:
    work: `Minibatch`.
    weights: float32 [K].
    loss, row_scale: see `mtp_loss.losses`.
    depths: slice of the modules whose log-probs are read where the weights are
      not 0; the others' heads, and the modules above, are left out.
  """
  def total(mtp):
    return -jnp.sum(weights * mtp_loss.losses(
        mtp, work.mtp_mask, work.batch, work.config, loss, row_scale))
  d_mtp = tree.by_prompts(jax.grad(total)(work.mtp), len(work.parts),
                          work.config.rl.group)
  pulled = [f.pull_mtp(d, depths) for f, d in zip(work.parts, d_mtp)]
  return Pull([b for b, _ in pulled], tree.total([psi for _, psi in pulled]))


def pull_each(work, loss):
  """Return a list of K `Pull`s, the k-th that of -L_k alone."""
  k = config_lib.depths(work.config.mtp)
  below = loss == 'tv_e2e'  # its L_k reads the depths up to k, others depth k
  return [pull_mtp(work, jax.nn.one_hot(i, k), loss,
                   depths=slice(0 if below else i, i + 1)) for i in range(k)]


def pull_trunk(work, boundaries):
  """Return each part's gradient over theta, given its `forward.Boundary`."""
  return [f.pull_trunk(b) for f, b in zip(work.parts, boundaries)]


def objective(params, batch, config: config_lib.Config):
  """Return J (to be maximised), float32 [], of a float32 model.

  J's change over one update is less than what a narrower `model.dtype` rounds.
  """
  config = dataclasses.replace(config,
                               model=attention.in_float32(config.model))
  out = forward.score(params, batch.rows, config=config, with_mtp=False,
                      entropy=bool(config.rl.entropy_coef))
  return -policy.rl_loss(out.main, out.entropy, batch, config.rl,
                         config.rollout.max_response)[0]


def evidence(work, each, reads, **known):
  """Return the `estimators.Evidence` of a minibatch.

  Args:
    work: `Minibatch`.
    each: K `Pull`s of theta's MTP loss; see `pull_each`.
    reads: see `estimators.Estimator`.
    **known: fields of the evidence that the caller has (eta, smoothness, ..).
  """
  out = {}
  if 'readout' in reads:
    upper = lambda boundaries: tree.total([b.readout for b in boundaries])
    out['readout'] = upper(work.rl), [upper(p.boundaries) for p in each]
  if {'gradients', 'hessian'} & set(reads):
    by_module = [pull_trunk(work, p.boundaries) for p in each]
    g = [tree.total(parts) for parts in by_module]
    stacked = jax.tree.map(
        lambda *x: sharding.constrain_batch(jnp.stack(x), axis=1),
        *tree.by_prompts(work.batch.rows, len(work.parts),
                         work.config.rl.group))
  if 'hessian' in reads:  # `curvature.hessian` also returns g_RL
    seen = [curvature.hessian(work, stacked, x) for x in g]
    out |= {'gradients': (seen[-1][0], g), 'hessian': [hg for _, hg in seen]}
  if 'gradients' in reads:
    parts = list(zip(pull_trunk(work, work.rl), map(list, zip(*by_module))))
    out |= {'gradients': (tree.total([rl for rl, _ in parts]), g),
            'parts': parts}
  if 'fisher' in reads:
    out['fisher'] = curvature.fisher(work, stacked, *out['gradients'])
  return estimators.Evidence(work.deltas, **out, **known)


class Choice(NamedTuple):
  """What a regime decided about one minibatch.

  Attributes:
    state: the new `types.OccState`.
    loss: the MTP loss that theta follows beside J, see `mtp_loss.losses`, or
      None.
    lam: float32 [K], lambda, the coefficients of that loss.
    row_scale: float [B], factor on the advantages of that loss, or None.
    psi_loss: psi's own loss, likewise; None: psi follows lambda times theta's
      loss; 'frozen': psi is not trained.
    psi: float32 [K], the coefficients of psi's own loss.
    each: K `Pull`s of theta's loss, one per module, if the regime has computed
      them.
    gradients: (g_RL, [g_1 .. g_K]) over theta, if the regime has computed them.
    metrics: dict of float32 [].
  """
  state: types.OccState
  loss: str | None
  lam: jax.Array | None = None
  row_scale: jax.Array | None = None
  psi_loss: str | None = None
  psi: jax.Array | None = None
  each: list | None = None
  gradients: tuple | None = None
  metrics: dict = {}  # noqa: RUF012


class Result(NamedTuple):
  """What an update needs.

  Attributes:
    gradient: descent gradient (of the losses), see `tree.trained`.
    occ: the new `types.OccState`.
    metrics: dict of float32 [].
    objective: J at params, float32 [].
    g_rl: grad J over theta if it was computed separately, else None.
  """
  gradient: Any
  occ: Any
  metrics: dict
  objective: jax.Array
  g_rl: Any = None


def combine(work, choice):
  """Return the `Result` of a minibatch under a regime's `Choice`.

  theta follows g_RL + sum_k lambda_k g_k, psi the gradient of its own loss.
  """
  each, mtp = choice.each, None
  if choice.loss is not None:
    if each is None and choice.row_scale is None and len(choice.lam) == 1:
      each = pull_each(work, choice.loss)  # one module: psi can share it
    if each is not None:
      mtp = tree.weighted(choice.lam, each)
    else:
      weights = (choice.lam if choice.row_scale is None
                 else jnp.ones_like(choice.lam))  # lambda is in the scale
      mtp = pull_mtp(work, weights, choice.loss, choice.row_scale)

  if choice.gradients is not None:
    g_rl, g = choice.gradients
    theta = tree.add(g_rl, tree.weighted(choice.lam, g))
  else:
    ends = work.rl if mtp is None else [
        tree.add(*pair) for pair in zip(work.rl, mtp.boundaries)]
    theta = tree.total(pull_trunk(work, ends))

  if choice.psi_loss == 'frozen':
    psi = jax.tree.map(jnp.zeros_like,
                       tree.psi(tree.trained(work.params)))
  elif choice.psi_loss is None:
    psi = mtp.psi
  elif each is not None and choice.psi_loss == choice.loss:
    psi = tree.weighted(choice.psi, [p.psi for p in each])
  else:
    psi = pull_mtp(work, choice.psi, choice.psi_loss).psi
  return Result(jax.tree.map(jnp.negative, {**theta, **psi}), choice.state,
                work.metrics | choice.metrics, work.objective,
                choice.gradients and choice.gradients[0])
