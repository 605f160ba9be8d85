"""Configs, parameters and ragged batches that the step's tests share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mtp_rl import estimators, forward, regimes, types
from mtp_rl.models import attention, transformer
from tests import conftest

V, ROWS, R, S = 13, 16, 6, 6
# 'occ' is its default estimator, logprob.
REGIMES = (*regimes.REGIMES,
           *(n for n in estimators.ESTIMATORS if n != 'logprob'))


def config(regime='occ', **sections):
  """Return a tiny config; an estimator's name is regime occ with it."""
  mtp = dict(regime=regime, coef=.3)
  if regime == 'fixed':
    mtp |= dict(theta_loss='hybrid', psi_loss='tv_e2e')
  mtp |= sections.pop('mtp', {})
  extra = sections.pop('occ', {})
  if regime in estimators.ESTIMATORS:
    mtp['regime'] = 'occ'
    parts = 1 + ('parts' in estimators.ESTIMATORS[regime].reads)
    extra = dict(estimator=regime, eta=.1, disjoint_parts=parts) | extra
  model = dict(vocab_size=V) | sections.pop('model', {})
  return conftest.tiny_config(mtp=mtp, occ=extra, model=model, **sections)


@functools.cache
def params(modules=1):
  """Return the parameters of K modules, one key."""
  net = forward.network(config(mtp=dict(modules=modules)))
  return net.init(jax.random.key(0), jnp.zeros((1, 5), int),
                  jnp.ones((1, 5), bool))['params']


@functools.cache
def batch(modules=1, seed=0):
  """Ragged prompts and responses, one of them empty; old log-probs near."""
  rng = np.random.default_rng(seed)
  valid = np.zeros((ROWS, R + S), bool)
  for row in range(ROWS):
    valid[row, R - rng.integers(1, R + 1):R + rng.integers(1, S + 1)] = True
  valid[3, R:] = False
  tokens = np.where(valid, rng.integers(3, V, valid.shape), 0).astype(np.int32)
  out = jax.tree.map(np.asarray, jax.jit(functools.partial(
      forward.score, config=config(mtp=dict(modules=modules))))(
          params(modules), types.Tokens(tokens, valid)))
  noise = lambda x: (x + rng.normal(size=x.shape) * .2).astype(np.float32)
  old = noise(out.main)
  return types.RolloutBatch(
      tokens, valid, valid[:, R:],
      np.repeat(rng.normal(size=(ROWS, 1)), S, 1).astype(np.float32), old,
      noise(out.mtp), noise(old), noise(old))


def assert_close(a, b, rtol=2e-5, atol=2e-6):
  """Assert that two trees agree leaf by leaf."""
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol,
                                                       atol=atol), a, b)


def read_in_parts(net, params, tokens, valid, cuts):
  """Return h^0 [B, T, D] of rows that are read part by part, with a cache.

  Args:
    net: the Linen decoder.
    params: its parameters.
    tokens: int32 [B, T].
    valid: bool [B, T].
    cuts: (first, last + 1) columns of each part, in order.
  """
  positions, out, cache = transformer.positions_of(valid), [], None
  extend = jax.jit(lambda *a: net.apply({'params': params}, *a,
                                        method='extend'))
  for start, stop in cuts:
    past, at = None, np.full(len(tokens), start)
    if cache is not None:
      past = attention.Past(*cache, valid & (np.arange(tokens.shape[1])
                                             < start), at.astype(np.int32))
    x, new = extend(tokens[:, start:stop], positions[:, start:stop],
                    valid[:, start:stop], past)
    if cache is None:
      whole = lambda c: jnp.zeros((*c.shape[:3], tokens.shape[1], c.shape[4]))
      cache = jax.tree.map(whole, new)
    cache = transformer.write(cache, new, jnp.asarray(at))
    out.append(net.apply({'params': params}, x, method='norm'))
  return np.concatenate(out, 1)
