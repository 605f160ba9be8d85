"""The forward pass of a minibatch in two stages, and its pullbacks.

    trunk:    embedding and blocks -> residual stream        the long part
    readout:  final norm, output head, MTP modules -> token log-probs

Main head and MTP heads leave the trunk at the same place, so the gradients of
their losses differ there by a cotangent [B, T, D] each: whoever needs them
apart (occ.estimator=exact) pulls the trunk back twice, everybody else adds
the cotangents first and pulls it back once.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtp_rl import sharding, tree
from mtp_rl.models import attention, moe, transformer
from mtp_rl.models import mtp as mtp_model
from mtp_rl.objectives import logprobs


def network(config, vocab_size):
  """Return the Linen decoder of a config (without parameters)."""
  return mtp_model.Decoder(config.model, config.mtp, vocab_size)


def init(config, vocab_size, key):
  """Return random parameters, float32."""
  net = network(config, vocab_size)
  example = jnp.zeros((1, config.mtp.heads + 2), jnp.int32)
  return net.init(key, example, jnp.ones_like(example, bool))['params']


def split(x, pieces):
  """[B, ...] -> [M, B/M, ...], row r in microbatch r mod M (device-local)."""
  x = x.reshape(x.shape[0] // pieces, pieces, *x.shape[1:]).swapaxes(0, 1)
  return sharding.constrain_batch(x, axis=1)


def join(x):
  """Undo `split`."""
  x = x.swapaxes(0, 1)
  return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def _microbatched(function, pieces):
  """Return function(params, *rows) run in pieces, recomputed in backward."""
  if pieces == 1:
    return function
  piece = jax.checkpoint(function, prevent_cse=False)

  def run(params, *rows):
    out = jax.lax.map(lambda xs: piece(params, *xs),
                      tuple(split(x, pieces) for x in rows))
    return jax.tree.map(join, out)
  return run


def _token_logprobs(config, hidden, heads, params, tokens, responses, **what):
  return logprobs.token_logprobs(
      hidden, heads, transformer.head_matrix(params), tokens,
      responses or config.rollout.max_response, chunk=config.model.head_chunk,
      temperature=config.rollout.temperature,
      detach_head=config.mtp.detach_head, **what)


def _for_rows(config, valid):
  """Return the config whose attention takes rows of several sequences."""
  if valid.dtype == bool:
    return config
  return dataclasses.replace(config, model=attention.for_segments(
      config.model, transformer.head_channels(config.model), valid.shape[1]))


def score(params, tokens, valid, *, config, vocab_size, responses=None,
          heads=True, entropy=False, acceptance=False):
  """Return the `logprobs.LogProbs` of the response tokens under params.

  With rl.microbatches > 1 the rows pass in that many pieces, each recomputed
  in a backward pass: the memory of one piece, for one more forward.

  Args:
    params: the model's parameters.
    tokens: int32 [B, T].
    valid: bool [B, T], or int32 segments of packed rows.
    config: `config.Config`.
    vocab_size: V.
    responses: S, the last columns, which are scored; None:
      rollout.max_response. All T of packed rows.
    heads: whether the MTP heads are scored.
    entropy, acceptance: see `logprobs.token_logprobs`.
  """
  config = _for_rows(config, valid)
  net = network(config, vocab_size)

  def piece(params, tokens, valid):
    (hidden, ahead), seen = net.apply({'params': params}, tokens, valid, heads,
                                      mutable=[moe.LOAD])
    out = _token_logprobs(config, hidden, ahead, params, tokens, responses,
                          entropy=entropy, acceptance=acceptance)
    return out._replace(load=moe.load(seen))

  return _microbatched(piece, config.rl.microbatches)(params, tokens, valid)


class Boundary(NamedTuple):
  """A gradient pulled back to where the heads leave the trunk.

  Attributes:
    readout: gradient of embedding (as output head and as the MTP modules'
      input), final norm and output head.
    trunk: [B, T, D], cotangent of the residual stream.
  """
  readout: Any
  trunk: jax.Array


class Forward(NamedTuple):
  """Token log-probs of a minibatch and the pullbacks of its two stages.

  Attributes:
    main: [B, S].
    entropy: [B, S], or None.
    heads: [B, S, K], or None where the heads were left out.
    pull_main: (d_main, d_entropy) -> `Boundary`.
    pull_heads: d_heads -> `Boundary`, gradient of psi.
    pull_trunk: `Boundary` -> gradient of theta.
  """
  main: jax.Array
  entropy: jax.Array | None
  heads: jax.Array | None
  pull_main: Callable
  pull_heads: Callable | None
  pull_trunk: Callable


def _stages(config, vocab_size, responses, entropy):
  """Return the functions trunk, main and ahead of (params, *rows)."""
  net = network(config, vocab_size)

  def trunk(params, tokens, valid):
    return net.apply({'params': params}, tokens, valid, method='trunk')

  def main(params, x, tokens):
    h = net.apply({'params': params}, x, method='norm')
    out = _token_logprobs(config, h, (), params, tokens, responses,
                          entropy=entropy)
    return out.main, out.entropy

  def ahead(params, x, tokens, valid):
    states = net.apply({'params': params}, x, tokens, valid, method='ahead')
    return _token_logprobs(config, None, states, params, tokens,
                           responses).heads

  run = functools.partial(_microbatched, pieces=config.rl.microbatches)
  return run(trunk), run(main), run(ahead)


def _parts(params):
  """Return the parameters of the trunk stage and of the readout stage."""
  below = {k: v for k, v in params.items() if k in ('embed', 'blocks')}
  above = {k: v for k, v in tree.shared(params).items() if k != 'blocks'}
  return below, above


def forward(params, tokens, valid, *, config, vocab_size, responses=None,
            heads=True, entropy=False):
  """Return the `Forward` of a minibatch; see `score` for the arguments."""
  trunk, main, ahead = _stages(_for_rows(config, valid), vocab_size, responses,
                               entropy)
  below, above = _parts(params)
  psi = tree.head(params)
  x, back = jax.vjp(lambda p: trunk(p, tokens, valid), below)
  (logp, ent), back_main = jax.vjp(lambda p, x: main(p, x, tokens), above, x)

  def pull_trunk(boundary):
    lower, = back(boundary.trunk.astype(x.dtype))
    both = lower['embed'], boundary.readout['embed']
    return {**boundary.readout, **lower,
            'embed': jax.tree.map(lambda a, b: a + b, *both)}

  out = Forward(logp, ent, None,
                lambda m, e: Boundary(*back_main((m, e if entropy else None))),
                None, pull_trunk)
  if not heads:
    return out
  logp, back_heads = jax.vjp(
      lambda p, psi, x: ahead({**p, **psi}, x, tokens, valid), above, psi, x)

  def pull_heads(d_heads):
    readout, d_psi, d_trunk = back_heads(d_heads)
    return Boundary(readout, d_trunk), d_psi

  return out._replace(heads=logp, pull_heads=pull_heads)
