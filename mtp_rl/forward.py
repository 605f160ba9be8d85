"""The forward pass of a minibatch in two stages, and its pullbacks.

    trunk:    embedding and blocks -> residual stream        most of the time
    readout:  final norm, output head, MTP modules -> token log-probs

Main head and MTP modules read the same residual stream, so each loss reaches
the trunk as one cotangent [B, T, D]. An estimator that needs the two gradients
separately (occ.estimator=exact) pulls each cotangent back through the trunk;
everything else adds the cotangents first and pulls back once.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtp_rl import config as config_lib
from mtp_rl import sharding, tree, types
from mtp_rl.models import attention, moe, transformer
from mtp_rl.models import mtp as mtp_model
from mtp_rl.objectives import logprobs
from mtp_rl.objectives import mtp as mtp_loss


def network(config: config_lib.Config):
  """Return the Linen decoder of a config (without parameters).

  model.vocab_size must be resolved (`config.with_vocabulary`).
  """
  return mtp_model.Decoder(config.model, config.mtp)


def init(config: config_lib.Config, key):
  """Return random parameters, float32, from a PRNG key."""
  net = network(config)
  example = jnp.zeros((1, config_lib.depths(config.mtp) + 2), jnp.int32)
  return net.init(key, example, jnp.ones_like(example, bool))['params']


def _microbatched(function, microbatches):
  """Return function(params, *rows) that runs one microbatch at a time.

  Each microbatch is recomputed in the backward pass.
  """
  if microbatches == 1:
    return function
  one = jax.checkpoint(function, prevent_cse=False)

  def run(params, *rows):
    out = jax.lax.map(lambda xs: one(params, *xs), jax.tree.map(
        lambda x: sharding.split_rows(x, microbatches), rows))
    return jax.tree.map(sharding.join_rows, out)
  return run


def _token_logprobs(config: config_lib.Config, hidden, ahead, params, rows,
                    function=logprobs.token_logprobs, **what):
  """Call a function of logprobs.py with the settings of a config."""
  return function(
      hidden, ahead, transformer.head_matrix(params), rows.tokens,
      rows.scored(config.rollout.max_response), chunk=config.model.head_chunk,
      temperature=config.rollout.temperature,
      detach_head=config.mtp.detach_head, **what)


def _for_rows(config: config_lib.Config, rows):
  """Return the config with an attention form that supports these rows."""
  if rows.segments is None:
    return config
  return dataclasses.replace(config, model=attention.for_segments(
      config.model, transformer.head_channels(config.model),
      rows.tokens.shape[1]))


def score(params, rows: types.Tokens, *, config: config_lib.Config,
          with_mtp=True, entropy=False, acceptance=False, divergence=False):
  """Return the `logprobs.LogProbs` of the response tokens under params.

  The last rollout.max_response columns are scored, or all T of packed rows.
  With rl.microbatches > 1 the rows are processed in that many microbatches,
  each recomputed in the backward pass: this takes the memory of one microbatch
  and costs one more forward pass.

  Args:
    params: the model's parameters.
    rows: `types.Tokens`.
    config: `config.Config`.
    with_mtp: whether the MTP modules are scored.
    entropy, acceptance, divergence: see `logprobs.token_logprobs`.
  """
  config = _for_rows(config, rows)
  net = network(config)

  def one(params, rows):
    (hidden, ahead), seen = net.apply(
        {'params': params}, rows.tokens, rows.attending, with_mtp,
        mutable=[moe.LOAD])
    out = _token_logprobs(config, hidden, ahead, params, rows,
                          entropy=entropy, acceptance=acceptance,
                          divergence=divergence)
    return out._replace(load=moe.load(seen))

  return _microbatched(one, config.rl.microbatches)(params, rows)


class Boundary(NamedTuple):
  """A gradient pulled back as far as the end of the trunk.

  Attributes:
    readout: gradient over final norm, output head and embedding (as a tied
      output head and as the input of the MTP modules); {} with adapters.
    trunk: [B, T, D], cotangent of the residual stream.
  """
  readout: Any
  trunk: jax.Array


class Forward(NamedTuple):
  """Token log-probs of a minibatch and the pullbacks of its two stages.

  Attributes:
    main: [B, S].
    entropy: [B, S], or None.
    mtp: `mtp_loss.Scores`, or None where the MTP modules were left out.
    pull_main: function (d_main, d_entropy) -> `Boundary`.
    pull_mtp: function (d_mtp, depths) -> (`Boundary`, gradient over psi), or
      None. It pulls back the depths of a slice, all by default.
    pull_trunk: function `Boundary` -> gradient over theta.
  """
  main: jax.Array
  entropy: jax.Array | None
  mtp: mtp_loss.Scores | None
  pull_main: Callable
  pull_mtp: Callable | None
  pull_trunk: Callable


def _stages(config: config_lib.Config, entropy):
  """Return the stages' functions: trunk, main head, MTP modules (K scores)."""
  net, divergence = network(config), mtp_loss.reads_teacher(config.mtp)

  def trunk(params, rows):
    return net.apply({'params': params}, rows.tokens, rows.attending,
                     method='trunk')

  def main(params, x, rows):
    h = net.apply({'params': params}, x, method='norm')
    out = _token_logprobs(config, h, (), params, rows, entropy=entropy)
    return out.main, out.entropy

  def ahead(params, x, rows):
    states = net.apply({'params': params}, x, rows.tokens, rows.attending,
                       method='ahead')
    teacher = net.apply({'params': params}, x, method='norm')
    out = _token_logprobs(config, teacher if divergence else None, states,
                          params, rows, logprobs.by_depth,
                          divergence=divergence)
    seen = (out.mtp, out.kl, out.overlap) if divergence else (out.mtp,)
    return [mtp_loss.Scores(*x) for x in zip(*seen)]

  run = functools.partial(_microbatched, microbatches=config.rl.microbatches)
  return run(trunk), run(main), run(ahead)


def _by_stage(params):
  """Return the parameters of the trunk stage and of the readout stage.

  Args:
    params: the model's parameters, or those that are trained.
  """
  below = {k: v for k, v in params.items() if k in ('embed', 'blocks')}
  above = {k: v for k, v in tree.theta(params).items() if k != 'blocks'}
  return below, above


def forward(params, rows: types.Tokens, *, config: config_lib.Config,
            with_mtp=True, entropy=False):
  """Return the `Forward` of a minibatch; see `score` for the arguments."""
  trunk, main, ahead = _stages(_for_rows(config, rows), entropy)
  below, above = _by_stage(params)
  trained = tree.trained(params)
  below_t, above_t = _by_stage(trained)
  x, back = jax.vjp(lambda p: trunk(tree.merge(below, p), rows), below_t)
  (logp, ent), back_main = jax.vjp(
      lambda p, x: main(tree.merge(above, p), x, rows), above_t, x)

  def pull_trunk(boundary):
    lower, = back(boundary.trunk.astype(x.dtype))
    out = {**boundary.readout, **lower}
    if 'embed' in out:
      out['embed'] = tree.add(lower['embed'], boundary.readout['embed'])
    return out

  out = Forward(logp, ent, None,
                lambda m, e: Boundary(*back_main((m, e if entropy else None))),
                None, pull_trunk)
  if not with_mtp:
    return out
  above_psi = {**above, **tree.psi(params)}
  at = above_t, tree.psi(trained), x
  scores, linear = jax.linearize(
      lambda p, psi, x: ahead(tree.merge(above_psi, {**p, **psi}), x, rows),
      *at)

  def pull_mtp(d_mtp, depths=slice(None)):
    by_depth = [jax.tree.map(lambda d, k=k: d[..., k], d_mtp)
                for k in range(len(scores))]
    back = jax.linear_transpose(lambda *t: linear(*t)[depths], *at)
    readout, d_psi, d_trunk = back(by_depth[depths])
    return Boundary(readout, d_trunk), d_psi

  stacked = jax.tree.map(lambda *x: jnp.stack(x, -1), *scores)
  return out._replace(mtp=stacked, pull_mtp=pull_mtp)
