"""The equations of occ.py: hand-derived numbers and analytic quadratics."""

import jax.numpy as jnp
import numpy as np
import pytest

from mtp_rl import config as config_lib
from mtp_rl import curvature, occ


def _products(g_rl, g):
  """Products of explicit vectors; g has one column a module."""
  return occ.Products(jnp.asarray(g.T @ g_rl), jnp.asarray(g.T @ g),
                      jnp.asarray(g_rl @ g_rl))


def test_lambda_star_maximises_the_bound():
  c, v2, eta, smoothness = .3, 2., .1, 4.
  grid = np.linspace(-3, 3, 60001)
  best = grid[np.argmax(occ.decomposition(grid, c, v2, eta, smoothness))]
  star = occ.lambda_plus(eta, smoothness) * c / v2
  np.testing.assert_allclose(best, star, atol=1e-4)
  # Delta(lambda*) = (1 - L eta)^2 c^2 / (2 L v^2); zero at 0 and 2 lambda*.
  np.testing.assert_allclose(
      occ.decomposition(star, c, v2, eta, smoothness),
      occ.best_gain(c, v2, smoothness, eta), rtol=1e-6)
  np.testing.assert_allclose(occ.best_gain(c, v2, smoothness, eta),
                             .6 ** 2 * .3 ** 2 / (2 * 4 * 2))
  assert occ.helpful_interval(-star)[1] == 0
  for lam in occ.helpful_interval(star):
    np.testing.assert_allclose(occ.decomposition(lam, c, v2, eta, smoothness),
                               0., atol=1e-9)


def test_logprob_products_by_hand():
  # Module 2 misses the first token. delta_RL = (.1, .2, -.1, masked),
  # delta_MTP1 = (.5, -.5, 1, -), delta_MTP2 = (-, .3, .2, -).
  mask = np.asarray([[1, 1], [1, 0]], bool)
  mtp_mask = np.stack([mask, mask & [[0, 1], [1, 1]]], -1)
  old = np.asarray([[-1., -2.], [-3., 99.]], np.float32)
  main = old + np.asarray([[.1, .2], [-.1, 7.]], np.float32)
  mtp = old[..., None] + np.asarray(
      [[[.5, 5.], [-.5, .3]], [[1., .2], [9., 9.]]], np.float32)
  reference = np.broadcast_to(old[..., None], mtp.shape)
  p = occ.logprob_products(*occ.deltas(main, mtp, old, reference, mask,
                                       mtp_mask))
  np.testing.assert_allclose(p.c, [.05 - .1 - .1, .06 - .02], atol=1e-5)
  np.testing.assert_allclose(p.gram, [[1.5, -.15 + .2], [.05, .13]], atol=1e-5)
  np.testing.assert_allclose(p.rl, .06, atol=1e-5)
  config = config_lib.OCC(solver='per_module')
  np.testing.assert_allclose(occ.coefficient(p, config),
                             [-.15 / 1.5, .04 / .13], rtol=1e-3)


@pytest.mark.parametrize('sign', [1., -1.])
@pytest.mark.parametrize('modules', [1, 3])
def test_the_joint_coefficient_is_the_least_squares_solution(modules, sign):
  """G^-1 c projects g_RL on the modules' span, whatever their overlap."""
  rng = np.random.default_rng(0)
  g_rl, g = sign * rng.normal(size=20), rng.normal(size=(20, modules))
  got = occ.coefficient(_products(g_rl, g), config_lib.OCC())
  np.testing.assert_allclose(got, np.linalg.lstsq(g, g_rl, rcond=None)[0],
                             rtol=1e-4, atol=1e-5)


def test_parallel_modules_share_the_coefficient():
  g = np.asarray([[1., 1.], [2., 2.]])
  lam = occ.coefficient(_products(np.asarray([1., 2.]), g), config_lib.OCC())
  np.testing.assert_allclose(g @ np.asarray(lam), [1., 2.], rtol=1e-3)
  np.testing.assert_allclose(lam, [.5, .5], atol=.05)  # float32 and the ridge


def test_no_perturbation_gives_a_finite_bounded_lambda():
  zero = occ.Products(jnp.zeros(1), jnp.zeros((1, 1)), jnp.ones(()))
  config = config_lib.OCC()
  assert occ.coefficient(zero, config) == 0
  tiny = occ.Products(jnp.full(1, 1e-3), jnp.full((1, 1), 1e-30),
                      jnp.ones(()))
  lam, _ = occ.track(occ.initial_state(1), occ.coefficient(tiny, config),
                     config)
  assert lam == config.lambda_max


def test_authors_form_by_hand():
  # One microbatch of 2 tokens and 2 paddings: ratios .1/.5 and -.2/.4 of
  # delta_MTP^2 .25 and .16; mean over four positions.
  d_rl = np.asarray([[[.1, -.2, 0, 0]]], np.float32)
  d_mtp = np.asarray([[[.5, .4, 0, 0]]], np.float32)
  lam = occ.authors_coefficient(d_rl, d_mtp[..., None], .1, 1e-8)
  np.testing.assert_allclose(lam, [[.1 * (.05 / .25 - .08 / .16) / 4]],
                             rtol=1e-5)


def _quadratic(modules, seed=0, indefinite=False):
  """J(theta) = b'theta + theta'H theta / 2 at theta = 0, and its products."""
  rng = np.random.default_rng(seed)
  n = 12
  a = rng.normal(size=(n, n))
  h = -(a @ a.T) / n - np.eye(n) * .1
  if indefinite:
    h = -h
  b, g = rng.normal(size=n), rng.normal(size=(n, modules))
  return b, h, g


@pytest.mark.parametrize('sign', [1., -1.])
@pytest.mark.parametrize('modules', [1, 3])
def test_lambda_h_maximises_a_quadratic(modules, sign):
  b, h, g = _quadratic(modules)
  g, eta = sign * g, .05
  lam, usable = occ.curvature_coefficient(
      _products(b, g), jnp.asarray(g.T @ h @ b), jnp.asarray(g.T @ h @ g), eta,
      jnp.full(modules, np.nan))
  # J(eta (b + G lambda)) is stationary in lambda: its gradient, over eta, is
  # G'(b + eta H (b + G lambda)) = 0.
  expected = np.linalg.solve(-eta * g.T @ h @ g, g.T @ b + eta * g.T @ h @ b)
  assert usable
  np.testing.assert_allclose(lam, expected, rtol=1e-4, atol=1e-5)
  if modules == 1:
    grid = expected + np.linspace(-1, 1, 2001)
    delta = occ.decomposition_curvature(
        grid, float(g[:, 0] @ b), float(b @ h @ g[:, 0]),
        float(g[:, 0] @ h @ g[:, 0]), eta)
    assert np.argmax(delta) == 1000


def test_one_jvp_gives_gradient_slope_and_curvature_of_a_quadratic():
  b, h, g = _quadratic(1)
  b, h, g = (jnp.asarray(x, jnp.float32) for x in (b, h, g[:, 0]))
  theta = jnp.linspace(-1., 1., len(b))
  objective = lambda t: (b @ t + t @ h @ t / 2, jnp.float32(7))
  (value, aux), grad, c, hg = curvature.directional(objective, theta, g)
  assert aux == 7
  np.testing.assert_allclose(value, objective(theta)[0])
  np.testing.assert_allclose(grad, b + h @ theta, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(c, (b + h @ theta) @ g, rtol=1e-4)
  np.testing.assert_allclose(hg, h @ g, rtol=1e-4, atol=1e-5)
  # From these to lambda*_H: the maximum of J along g after the step eta g_RL.
  eta = .05
  products = occ.Products(c[None], (g @ g)[None, None], grad @ grad)
  lam, usable = occ.curvature_coefficient(
      products, (grad @ hg)[None], (g @ hg)[None, None], eta, jnp.zeros(1))
  after = lambda x: float(objective(theta + eta * (grad + x * g))[0])
  assert usable
  slope = (after(lam[0] + .5) - after(lam[0] - .5)) / eta
  np.testing.assert_allclose(slope, 0., atol=2e-3 * abs(float(c)))


@pytest.mark.parametrize('modules', [1, 2])
def test_without_negative_curvature_the_fallback_is_taken(modules):
  b, h, g = _quadratic(modules, indefinite=True)
  fallback = jnp.arange(1., modules + 1)
  lam, usable = occ.curvature_coefficient(
      _products(b, g), jnp.asarray(g.T @ h @ b), jnp.asarray(g.T @ h @ g), .05,
      fallback)
  assert not usable
  np.testing.assert_array_equal(lam, fallback)


def test_tracking_bounds_averages_and_survives_nan():
  config = config_lib.OCC(ema=.5, lambda_min=-1., lambda_max=2.)
  state, seen = occ.initial_state(1), []
  for raw in (4., 1., np.nan, -8.):
    lam, state = occ.track(state, jnp.asarray([raw]), config)
    seen.append(float(lam[0]))
  # Clipped 2, 1, 0, -1; weights .5^n, corrected for the zero start.
  np.testing.assert_allclose(
      seen, [2., (.5 * 1 + .25 * 2) / .75, (.25 * 1 + .125 * 2) / .875,
             (-.5 + .125 * 1 + .0625 * 2) / .9375], rtol=1e-6)


def test_without_ema_lambda_is_the_clipped_value():
  config = config_lib.OCC(lambda_min=-.5, lambda_max=.5)
  lam, state = occ.track(occ.initial_state(2), jnp.asarray([.2, 9.]), config)
  np.testing.assert_allclose(lam, [.2, .5])
  assert state.count == 1


def test_cosine():
  p = _products(np.asarray([3., 4.]), np.asarray([[1., 0.], [0., 0.]]))
  np.testing.assert_allclose(occ.cosine(p), [.6, 0.], rtol=1e-6)
