"""Policy losses by hand: both clips, dual clip, empty rows, KL, weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_rl import config as config_lib
from mtp_rl.objectives import policy


def _rl(**kw):
  return config_lib.RL(**{**dict(clip_low=.2, clip_high=.28, dual_clip=3.,
                                 aggregation='token-mean'), **kw})


def _loss_and_grad(d, advantage, rl):
  """Loss and d loss / d log pi of one token whose log-ratio is d."""
  old = jnp.full((1, 1), -1.)
  mask = jnp.ones((1, 1), bool)
  f = lambda lp: policy.policy_loss(lp, old, jnp.full((1, 1), advantage), mask,
                                    rl).loss
  value, grad = jax.value_and_grad(f)(old + d)
  return float(value), float(grad[0, 0])


@pytest.mark.parametrize('ratio, advantage, loss, grad', [
    (1.1, 2., -2.2, -2.2),       # inside: -A r, gradient -A r
    (1.5, 2., -2.56, 0.),        # above 1.28 with A > 0: clipped, flat
    (.5, 2., -1., -1.),          # below with A > 0: not clipped
    (.5, -2., 1.6, 0.),          # below .8 with A < 0: clipped, flat
    (1.5, -2., 3., 3.),          # above with A < 0: not clipped
    (4., -2., 6., 0.),           # above the dual clip: A c = 6, flat
])
def test_ppo_clips(ratio, advantage, loss, grad):
  got = _loss_and_grad(np.log(ratio), advantage, _rl())
  np.testing.assert_allclose(got, (loss, grad), rtol=1e-5, atol=1e-6)


def test_without_dual_clip_a_bad_token_is_unbounded():
  got = _loss_and_grad(np.log(40.), -1., _rl(dual_clip=0.))
  np.testing.assert_allclose(got, (40., 40.), rtol=1e-5)


def test_the_ratio_is_capped_at_exp_20():
  loss, grad = _loss_and_grad(50., -1., _rl(dual_clip=0.))
  np.testing.assert_allclose(loss, np.exp(20.), rtol=1e-5)
  assert grad == 0.


def test_gspo_uses_the_mean_log_ratio_of_the_row():
  # d = (.3, .1), mean .2; A = 1, no clip: L_t = -exp(.2) for both tokens, and
  # each token's gradient is -exp(.2) / 2 under the mean of token-means.
  old = jnp.zeros((1, 3)) - 1
  d = jnp.asarray([[.3, .1, 9.]])
  mask = jnp.asarray([[True, True, False]])
  rl = _rl(loss='gspo', clip_low=.5, clip_high=.5, dual_clip=0.,
           aggregation='seq-mean-token-mean')
  f = lambda lp: policy.policy_loss(lp, old, jnp.ones((1, 3)), mask, rl).loss
  value, grad = jax.value_and_grad(f)(old + d)
  np.testing.assert_allclose(value, -np.exp(.2), rtol=1e-6)
  np.testing.assert_allclose(grad, [[-np.exp(.2) / 2] * 2 + [0]], rtol=1e-6)


@pytest.mark.parametrize('d, advantage, clipped', [
    (.1, 1., True), (.1, -1., False), (-.1, 1., False), (-.1, -1., True)])
def test_gspo_clip_on_both_sides(d, advantage, clipped):
  rl = _rl(loss='gspo', clip_low=3e-4, clip_high=4e-4, dual_clip=0.)
  loss, grad = _loss_and_grad(d, advantage, rl)
  if clipped:
    bound = 1 + 4e-4 if d > 0 else 1 - 3e-4
    np.testing.assert_allclose((loss, grad), (-advantage * bound, 0.),
                               rtol=1e-6)
  else:
    np.testing.assert_allclose((loss, grad), [-advantage * np.exp(d)] * 2,
                               rtol=1e-5)


def test_cispo_keeps_the_gradient_of_clipped_tokens():
  # r = 9 clipped to 5: L = -5 A log pi, gradient -5 A at log pi = -1 + log 9.
  rl = _rl(loss='cispo', clip_low=1., clip_high=4., dual_clip=0.)
  loss, grad = _loss_and_grad(np.log(9.), 2., rl)
  np.testing.assert_allclose(loss, -10 * (np.log(9.) - 1), rtol=1e-5)
  np.testing.assert_allclose(grad, -10., rtol=1e-5)


@pytest.mark.parametrize('kind', ['ppo', 'gspo', 'cispo'])
def test_an_empty_row_is_as_if_it_were_not_there(kind):
  rng = np.random.default_rng(0)
  lp, old, adv = rng.normal(size=(3, 3, 4)).astype(np.float32) * .1
  mask = np.asarray([[1, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]], bool)
  rl = _rl(loss=kind, dual_clip=0., aggregation='seq-mean-token-mean')
  grad = jax.grad(lambda x: policy.policy_loss(x, old, adv, mask, rl).loss)
  without = policy.policy_loss(*[x[[0, 2]] for x in (lp, old, adv, mask)], rl)
  np.testing.assert_allclose(
      policy.policy_loss(lp, old, adv, mask, rl).loss, without.loss, rtol=1e-6)
  assert np.all(np.asarray(grad(lp))[~mask] == 0)


@pytest.mark.parametrize('kind, expected', [
    ('k1', .5), ('k2', .125), ('k3', np.exp(-.5) - .5)])
def test_kl_estimates_by_hand(kind, expected):
  got = policy.kl_penalty(jnp.float32(-1.), jnp.float32(-1.5), kind)
  np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_importance_weights_are_truncated():
  # pi_old / pi_sampler = e^1 and e^-1, cap 2.
  got = policy.importance_weights(jnp.asarray([-1., -2.]),
                                  jnp.asarray([-2., -1.]), 2.)
  np.testing.assert_allclose(got, [2., np.exp(-1.)], rtol=1e-6)


def test_dr_grpo_divides_by_a_constant_not_by_the_length():
  rl = _rl(aggregation='seq-mean-token-sum-norm', dual_clip=0.)
  zero, one = jnp.zeros((2, 4)), jnp.ones((2, 4))
  mask = jnp.asarray([[True] * 4, [True, False, False, False]])
  # r = 1, A = 1: L = -(4 + 1) / (2 rows * 4 columns).
  np.testing.assert_allclose(policy.policy_loss(zero, zero, one, mask, rl).loss,
                             -5 / 8)
