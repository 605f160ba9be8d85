"""MTP alignment and masks by hand; chunked head == whole head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_rl import config as config_lib
from mtp_rl import sharding, train_step
from mtp_rl.objectives import logprobs
from mtp_rl.objectives import mtp as mtp_loss
from tests import batches


@pytest.mark.parametrize('depth, expected', [
    (0, [3, 4, 5]),  # response columns 4, 5, 6 of 7 are read one before
    (1, [2, 3, 4]), (2, [1, 2, 3]), (3, [0, 1, 2]),
    (4, [0, 0, 1])])  # column -1 does not exist: 0 stands in, masked below
def test_states_that_predict_the_response(depth, expected):
  hidden = jnp.broadcast_to(jnp.arange(7.)[None, :, None], (2, 7, 1))
  got = logprobs.scored_states(hidden, depth, 3)[..., 0]
  np.testing.assert_array_equal(got, [expected] * 2)


def test_mtp_mask_by_hand_for_ragged_prompts():
  # 4 prompt and 3 response columns; prompts of 4, 1 and 2 tokens, responses
  # of 3, 3 and 1. Column t is predicted by depth k from column t - k - 1.
  valid = jnp.asarray([[1, 1, 1, 1, 1, 1, 1],
                       [0, 0, 0, 1, 1, 1, 1],
                       [0, 0, 1, 1, 1, 0, 0]], bool)
  got = logprobs.mtp_mask(valid, 3, 3).astype(int)
  np.testing.assert_array_equal(got[..., 0], [[1, 1, 1], [0, 1, 1], [1, 0, 0]])
  np.testing.assert_array_equal(got[..., 1], [[1, 1, 1], [0, 0, 1], [0, 0, 0]])
  np.testing.assert_array_equal(got[..., 2], [[1, 1, 1], [0, 0, 0], [0, 0, 0]])


@pytest.mark.parametrize('modules', [1, 2, 3])
def test_modules_are_read_where_they_predict_the_token(modules):
  """The log-prob of y_t under depth k comes from column t - k - 1."""
  rng = np.random.default_rng(0)
  b, t, s, d, v = 2, 8, 3, 4, 6
  states = [rng.normal(size=(b, t, d)).astype(np.float32)
            for _ in range(modules + 1)]
  matrix = rng.normal(size=(d, v)).astype(np.float32)
  tokens = rng.integers(0, v, (b, t))
  out = logprobs.token_logprobs(states[0], states[1:], matrix, tokens, s)
  for k in range(modules + 1):
    for row in range(b):
      for j in range(s):
        column = t - s + j
        logits = states[k][row, column - k - 1] @ matrix
        expected = logits[tokens[row, column]] - np.log(np.exp(logits).sum())
        got = out.main[row, j] if k == 0 else out.mtp[row, j, k - 1]
        np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_a_module_that_knows_the_next_token_has_no_loss():
  """Labels shifted once: an oracle state at i encodes token i + k + 1."""
  tokens = np.asarray([[1, 3, 2, 0, 3, 1, 2]])
  out = []
  for k in (1, 2):
    ahead = np.roll(tokens, -(k + 1), axis=1)
    out.append(jax.nn.one_hot(ahead, 4) * 50.)
  scored = logprobs.token_logprobs(out[0], out, jnp.eye(4), tokens, 3)
  mask = logprobs.mtp_mask(np.ones_like(tokens, bool), 3, 2)
  np.testing.assert_allclose(mtp_loss.cross_entropy(scored.mtp, mask), 0.,
                             atol=1e-6)


@pytest.mark.parametrize('chunk', [1, 2, 3])
def test_chunks_change_nothing(chunk):
  rng = np.random.default_rng(0)
  h = [rng.normal(size=(2, 9, 4)).astype(np.float32) for _ in range(3)]
  matrix = rng.normal(size=(4, 6)).astype(np.float32)
  tokens = rng.integers(0, 6, (2, 9))
  def run(matrix, chunk):
    return logprobs.token_logprobs(h[0], h[1:], matrix, tokens, 5,
                                   chunk=chunk, temperature=.7, entropy=True,
                                   acceptance=True)
  whole, chunked = run(matrix, 0), run(matrix, chunk)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), whole,
               chunked)
  grad = lambda c: jax.grad(lambda m: run(m, c).mtp.sum())(matrix)
  np.testing.assert_allclose(grad(0), grad(chunk), rtol=1e-4, atol=1e-5)


def test_entropy_and_acceptance_by_hand():
  # Main uniform over 4: entropy ln 4. Module p = (.7, .1, .1, .1): overlap
  # .25 + .1 * 3 = .55. Ties of the uniform argmax go to token 0: agreed.
  tokens = np.zeros((1, 4), int)
  h0 = jnp.zeros((1, 4, 4))
  h1 = jnp.broadcast_to(jnp.log(jnp.asarray([.7, .1, .1, .1])), (1, 4, 4))
  out = logprobs.token_logprobs(h0, (h1,), jnp.eye(4), tokens, 2,
                                entropy=True, acceptance=True)
  np.testing.assert_allclose(out.entropy, np.log(4.), rtol=1e-6)
  np.testing.assert_allclose(out.overlap, .55, rtol=1e-5)
  assert np.all(out.top1)


def _arrays_in(jaxpr, found):
  for eqn in jaxpr.eqns:
    for var in eqn.outvars:
      found.append(getattr(var.aval, 'shape', ()))
    for value in eqn.params.values():
      for sub in jax.tree.leaves(value, is_leaf=lambda x: hasattr(x, 'eqns') or
                                 hasattr(x, 'jaxpr')):
        inner = getattr(sub, 'jaxpr', sub)
        if hasattr(inner, 'eqns'):
          _arrays_in(inner, found)
  return found


@pytest.mark.parametrize('regime, chunk, alive', [
    *[(r, 2, False) for r in batches.REGIMES], ('occ', 0, True)])
def test_no_array_of_tokens_times_vocabulary_is_alive(regime, chunk, alive):
  """Every intermediate of the whole update, forward, backward and jvp."""
  vocab = 97
  config = batches.config(regime, model=dict(head_chunk=chunk,
                                             vocab_size=vocab),
                          rl=dict(entropy_coef=.1))
  mesh = sharding.make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    steps = train_step.make(config, mesh)
    jaxpr = jax.make_jaxpr(steps.update)(steps.abstract, batches.batch())
  shapes = _arrays_in(jaxpr.jaxpr, [])
  assert len(shapes) > 500
  tokens = batches.ROWS * batches.S
  big = [s for s in shapes if vocab in s and np.prod(s) >= tokens * vocab]
  assert bool(big) == alive, big


@pytest.mark.parametrize('dtype', ('float32', 'bfloat16'))
def test_a_vocabulary_on_two_devices_is_the_whole_one(dtype):
  """Values, and the gradient in float32 of states and head."""
  rng = np.random.default_rng(3)
  b, t, s, d, v = 8, 7, 4, 8, 12
  hidden, ahead = (jnp.asarray(rng.normal(size=(b, t, d)), dtype)
                   for _ in range(2))
  matrix = jnp.asarray(rng.normal(size=(d, v)), jnp.float32)
  tokens = rng.integers(0, v, (b, t)).astype(np.int32)

  def run(hidden, ahead, matrix):
    out = logprobs.token_logprobs(hidden, (ahead,), matrix, tokens, s, chunk=2,
                                  entropy=True, acceptance=True)
    total = jnp.sum(out.main) - jnp.sum(out.mtp ** 2) + jnp.sum(out.entropy)
    return total, out

  f = jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True)
  (_, want), want_grads = f(hidden, ahead, matrix)
  mesh = sharding.make_mesh(config_lib.Mesh(data=2, fsdp=2, tensor=2))
  with jax.set_mesh(mesh):
    (_, got), grads = jax.jit(f)(hidden, ahead, matrix)
  np.testing.assert_array_equal(got.top1, want.top1)
  for x, y in zip(jax.tree.leaves(got._replace(top1=None)),
                  jax.tree.leaves(want._replace(top1=None)), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
  assert grads[2].dtype == jnp.float32
  rough = 1e-5 if dtype == 'float32' else 3e-2
  for x, y in zip(grads, want_grads, strict=True):
    x, y = (np.asarray(z, np.float32) for z in (x, y))
    np.testing.assert_allclose(x, y, rtol=rough, atol=rough * np.abs(y).max())
