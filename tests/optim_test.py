"""Clipping apart and jointly, weight decay, schedules, frozen psi."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_rl import config as config_lib
from mtp_rl import optim, tree

PARAMS = {'embed': {'embedding': jnp.ones((2, 2))},
          'final_norm': {'scale': jnp.ones(2)},
          'mtp': {'depth_1': {'proj': {'kernel': jnp.ones((2, 2))}}}}


def _updates(config, grads, train_psi=True):
  transform = optim.make(config, 1., train_psi)
  return transform.update(grads, transform.init(PARAMS), PARAMS)[0]


def _grads(theta, psi):
  fill = lambda t, x: jax.tree.map(lambda y: jnp.full_like(y, x), t)
  return {**fill(tree.theta(PARAMS), theta), **fill(tree.psi(PARAMS), psi)}


@pytest.mark.parametrize('mode', ['separate', 'joint'])
def test_a_huge_gradient_of_psi_shrinks_theta_only_under_a_joint_clip(mode):
  # With Adam's eps = 1e3 far above the gradients, an update is ~ -g / eps.
  config = config_lib.Optim(clip=1., clip_mode=mode, weight_decay=0., eps=1e3)
  small, huge = (_updates(config, _grads(.1, psi)) for psi in (.1, 1e4))
  ratio = float(tree.norm(tree.theta(huge)) / tree.norm(tree.theta(small)))
  if mode == 'separate':
    np.testing.assert_allclose(ratio, 1., rtol=1e-5)
  else:
    # Joint norm 2e4 clipped to 1: theta keeps 1 / 2e4 of its gradient.
    np.testing.assert_allclose(ratio, 1 / 2e4, rtol=1e-3)


def test_clip_bounds_each_part_by_hand():
  config = config_lib.Optim(clip=1., weight_decay=0., eps=1e3, b1=0., b2=0.)
  got = _updates(config, _grads(3., .1))
  # Six entries of 3 have norm 3 sqrt 6 > 1; four of .1 have norm .2 < 1.
  np.testing.assert_allclose(got['final_norm']['scale'], -1 / 6 ** .5 / 1e3,
                             rtol=1e-3)
  np.testing.assert_allclose(tree.psi(got)['mtp']['depth_1']['proj']['kernel'],
                             -.1 / 1e3, rtol=1e-3)


def test_weight_decay_acts_on_matrices_only():
  got = _updates(config_lib.Optim(weight_decay=.5), _grads(0., 0.))
  np.testing.assert_allclose(got['embed']['embedding'], -.5)
  np.testing.assert_allclose(got['final_norm']['scale'], 0.)


def test_a_frozen_psi_gets_no_update_and_no_decay():
  got = _updates(config_lib.Optim(weight_decay=.5), _grads(1., 1.), False)
  assert float(tree.norm(tree.psi(got))) == 0
  assert float(tree.norm(tree.theta(got))) > 0


@pytest.mark.parametrize('kind, end', [('constant', 2.), ('linear', 0.),
                                       ('cosine', 0.)])
def test_schedules_warm_up_from_above_zero_and_end(kind, end):
  rate = optim.schedule(2., config_lib.Optim(schedule=kind, ramp=4), 20)
  np.testing.assert_allclose([rate(0), rate(4)], [.5, 2.], rtol=1e-6)
  np.testing.assert_allclose(rate(20), end, atol=1e-6)
