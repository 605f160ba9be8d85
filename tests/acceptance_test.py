"""Losses of drafts: by hand, and against plain autodiff in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_rl import config as config_lib
from mtp_rl import sharding
from mtp_rl.objectives import acceptance, logprobs
from mtp_rl.objectives import mtp as mtp_loss

P, Q = np.array([.5, .3, .2]), np.array([.2, .3, .5])
ALPHA, KL = .7, .3 * np.log(2.5)  # of P and Q


def test_kl_and_tv_of_three_tokens_by_hand():
  # min: .2 + .3 + .2. KL: .5 ln 2.5 + .3 ln 1 + .2 ln .4 = .3 ln 2.5.
  main, ahead = (jnp.broadcast_to(jnp.log(x), (1, 4, 3)) for x in (P, Q))
  out = logprobs.token_logprobs(main, (ahead,), jnp.eye(3),
                                np.zeros((1, 4), int), 2, divergence=True)
  np.testing.assert_allclose(out.overlap, ALPHA, rtol=1e-6)
  np.testing.assert_allclose(out.kl, KL, rtol=1e-6)


@pytest.mark.parametrize('loss, value', [
    ('kl', KL), ('tv', .3), ('tv_e2e', .3),
    ('hybrid', np.exp(-2.1) * KL + (1 - np.exp(-2.1)) * .3)])
def test_losses_by_hand(loss, value):
  # Two tokens of which the second is masked out.
  kl, overlap = (jnp.asarray([x, 9.])[None, :, None] for x in (KL, ALPHA))
  mask = jnp.asarray([True, False])[None, :, None]
  got = acceptance.losses(loss, kl, overlap, mask)
  np.testing.assert_allclose(got, [value], rtol=1e-6)


def test_hybrid_weighs_by_the_mean_acceptance_of_the_depth():
  overlap = jnp.asarray([[[.2, 1.], [.6, 1.]]])  # means .4 and 1
  kl = jnp.asarray([[[2., 3.], [4., 5.]]])
  got = acceptance.losses('hybrid', kl, overlap, jnp.ones((1, 2, 2), bool))
  w = np.exp([-1.2, -3.])
  np.testing.assert_allclose(got, w * [3., 4.] + (1 - w) * [.6, 0.], rtol=1e-6)


# Row 0: three tokens, all seen by all depths. Row 1: its first token has too
# short a past for depth 2, and its last column is padding.
OVERLAP = np.array([[[.5, .9, 1.], [.8, .6, 1.], [.4, .5, .7]],
                    [[.1, 9., 9.], [.3, .2, 9.], [9., 9., 9.]]])
MASK = np.array([[[1, 1, 1], [1, 1, 1], [1, 1, 1]],
                 [[1, 0, 0], [1, 1, 0], [0, 0, 0]]], bool)


def test_a_chain_follows_the_drafts_of_one_column():
  chains, whole = acceptance.chained(OVERLAP, MASK)
  # Depth k at token s continues depth k - 1 at token s - 1.
  np.testing.assert_array_equal(whole, [
      [[1, 0, 0], [1, 1, 0], [1, 1, 1]], [[1, 0, 0], [1, 1, 0], [0, 0, 0]]])
  np.testing.assert_allclose(np.where(whole, chains, 0), [
      [[.5, 0, 0], [.8, .5 * .6, 0], [.4, .8 * .5, .5 * .6 * .7]],
      [[.1, 0, 0], [.3, .1 * .2, 0], [0, 0, 0]]], rtol=1e-6)
  got = acceptance.losses('tv_e2e', None, OVERLAP, MASK)
  mean = np.array([2.1 / 5, (.3 + .4 + .02) / 3, .21])
  np.testing.assert_allclose(got, 1 - mean, rtol=1e-6)
  seen = acceptance.metrics(OVERLAP > .45, OVERLAP, MASK)
  np.testing.assert_allclose(
      [seen[f'mtp_{k}/accept_cumulative'] for k in (1, 2, 3)], mean, rtol=1e-6)
  np.testing.assert_allclose(seen['mtp/accept_length'], mean.sum(), rtol=1e-6)
  np.testing.assert_allclose(seen['mtp_2/accept_expected'], 2.2 / 4, rtol=1e-6)
  np.testing.assert_allclose(seen['mtp_1/accept_top1'], 2 / 5, rtol=1e-6)


def test_a_chain_stays_within_its_sequence_of_a_packed_row():
  """Two sequences in one row equal the two in rows of their own."""
  rng = np.random.default_rng(0)
  segments = np.array([[1, 1, 1, 1, 2, 2, 2, 2]])
  response = np.array([[0, 0, 1, 1, 0, 1, 1, 1]], bool)
  mask = np.asarray(logprobs.mtp_mask(segments, 8, 2)) & response[..., None]
  overlap = rng.uniform(size=(1, 8, 2))
  apart = lambda x: x.reshape(2, 4, 2)
  alone = np.asarray(logprobs.mtp_mask(np.ones((2, 4), bool), 4, 2))
  alone = alone & response.reshape(2, 4, 1)
  np.testing.assert_array_equal(apart(mask), alone)
  for loss in ('tv', 'tv_e2e'):
    np.testing.assert_allclose(
        acceptance.losses(loss, overlap, overlap, mask),
        acceptance.losses(loss, apart(overlap), apart(overlap), alone),
        rtol=1e-6)


B, T, S, D, V = 8, 8, 5, 6, 12
TEMPERATURE = .7


def _naive(loss, hidden, ahead, matrix, mask):
  """The formulas as they are written, on whole arrays of probabilities."""
  def probabilities(states, k):
    rows = [states[:, t - k - 1] for t in range(T - S, T)]
    return jax.nn.softmax(jnp.stack(rows, 1) @ matrix / TEMPERATURE)
  p = jax.lax.stop_gradient(probabilities(hidden, 0))
  q = [probabilities(h, k) for k, h in enumerate(ahead, 1)]
  tv = [jnp.sum(jnp.abs(p - x), -1) / 2 for x in q]
  kl = [jnp.sum(p * jnp.log(p / x), -1) for x in q]
  total = 0.
  for k in range(len(q)):
    if loss == 'tv_e2e':
      terms = []
      for row in range(B):
        for s in range(k, S):
          places = [(row, s - k + i) for i in range(k + 1)]
          if all(mask[(*at, i)] for i, at in enumerate(places)):
            accepted = [1 - tv[i][at] for i, at in enumerate(places)]
            terms.append(1 - jnp.prod(jnp.stack(accepted)))
      total += jnp.mean(jnp.stack(terms))
      continue
    mean = lambda x, k=k: jnp.sum(x[k] * mask[..., k]) / mask[..., k].sum()
    w = {'kl': 1., 'tv': 0., 'hybrid': jnp.exp(
        -3 * jax.lax.stop_gradient(1 - mean(tv)))}[loss]
    total += w * mean(kl) + (1 - w) * mean(tv)
  return total / len(q)


def test_gradients_are_those_of_plain_autodiff_in_float64():
  """Whole, in chunks, and on a mesh; for states, teacher and output head."""
  with jax.enable_x64(True):
    rng = np.random.default_rng(1)
    hidden, *ahead = (jnp.asarray(rng.normal(size=(B, T, D)))
                      for _ in range(3))
    matrix = jnp.asarray(rng.normal(size=(D, V)))
    tokens = rng.integers(0, V, (B, T))
    valid = np.arange(T) < rng.integers(T - S + 1, T + 1, (B, 1))
    valid[0, :2] = False
    mask = np.asarray(logprobs.mtp_mask(valid, S, 2))

    def ours(loss, chunk, detach_head, hidden, ahead, matrix):
      out = logprobs.token_logprobs(
          hidden, ahead, matrix, tokens, S, chunk=chunk,
          temperature=TEMPERATURE, detach_head=detach_head, divergence=True)
      scores = mtp_loss.Scores(out.mtp, out.kl, out.overlap)
      return jnp.mean(mtp_loss.supervised_losses(scores, mask, loss))

    def every(function):
      return jax.jit(lambda *x: {loss: jax.value_and_grad(
          lambda *y: function(loss, *y), argnums=(0, 1, 2))(*x)
                                 for loss in acceptance.LOSSES})

    x = hidden, tuple(ahead), matrix
    want = every(lambda loss, *y: _naive(loss, *y, mask))(*x)
    assert all(np.abs(want[loss][1][2]).max() > 1e-3 for loss in want)
    def check(got):
      jax.tree.map(lambda a, b: np.testing.assert_allclose(
          a, b, rtol=1e-6, atol=1e-8), got, want)
    for chunk in (0, 2):
      check(every(lambda *y, c=chunk: ours(y[0], c, False, *y[1:]))(*x))
    mesh = sharding.make_mesh(config_lib.Mesh(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
      check(every(lambda *y: ours(y[0], 2, False, *y[1:]))(*x))
    for _, (d_hidden, d_ahead, d_matrix) in every(
        lambda *y: ours(y[0], 2, True, *y[1:]))(*x).values():
      assert not np.any(d_hidden) and not np.any(d_matrix)
      assert np.abs(d_ahead[0]).max() > 1e-5
