"""Every estimator on a quadratic with known gradients, H and L; unbiasedness.

J(theta) = b'theta + theta'H theta / 2 at theta = 0 with theta split in the
readout ('embed') and the trunk ('blocks'). In float64: the numbers are exact.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_rl import config as config_lib
from mtp_rl import curvature, estimators, occ

N, READOUT, ETA = 12, 5, .05
L = 4.
PLUS = (1 - L * ETA) / (L * ETA)
GRADIENT = ('exact', 'preconditioned', 'cross_fitted')
BUDGET = .3
TARGET = .6
FISHER = np.diag(np.linspace(.2, 3., N))


def _tree(x):
  return {'embed': x[:READOUT], 'blocks': x[READOUT:]}


def _vector(theta):
  return jnp.concatenate([theta['embed'], theta['blocks']])


def _problem(modules, sign=1., concave=True, seed=0):
  """b, H with eigenvalues in [-L, -.4], and g with sign <b, g_k> > 0."""
  rng = np.random.default_rng(seed)
  q, _ = np.linalg.qr(rng.normal(size=(N, N)))
  h = -(q * np.linspace(.4, L, N)) @ q.T
  b, g = rng.normal(size=N), rng.normal(size=(N, modules))
  g = sign * (.3 * g + .2 * b[:, None])
  assert np.all(np.sign(b @ g) == sign)
  return b, h if concave else -h, g


def _evidence(b, h, g, scale=None):
  """The `estimators.Evidence` of the quadratic; P = diag(scale)."""
  trees = _tree(jnp.asarray(b)), [_tree(jnp.asarray(x)) for x in g.T]
  value = lambda t: (b @ _vector(t) + _vector(t) @ h @ _vector(t) / 2, None)
  zero = jax.tree.map(jnp.zeros_like, trees[0])
  along = [curvature.directional(value, zero, x) for x in trees[1]]
  only = lambda t: {'embed': t['embed']}
  return estimators.Evidence(
      deltas=(jnp.asarray(b)[None], jnp.asarray(g)[None]),
      readout=(only(trees[0]), [only(x) for x in trees[1]]),
      gradients=(along[-1][1], trees[1]),
      parts=[jax.tree.map(lambda x: x / 2, trees)] * 2,
      hessian=[product for _, _, _, product in along],
      fisher=occ.Products(b @ FISHER @ g, g.T @ FISHER @ g, b @ FISHER @ b),
      precondition=lambda t: _tree(_vector(t) * (
          1. if scale is None else scale)),
      eta=ETA, smoothness=L * ETA)


def _config(**changes):
  return config_lib.OCC(lambda_plus=PLUS, eps=1e-12, lambda_min=-30.,
                        lambda_max=30., budget=BUDGET, target=TARGET,
                        **changes)


def _maximum(b, g, quadratic):
  """argmax of  eta g'b lam - eta^2 (b + g lam)' Q (b + g lam) / 2."""
  return np.linalg.solve(ETA * g.T @ quadratic @ g,
                         g.T @ b - ETA * g.T @ quadratic @ b)


def _analytic(name, b, h, g, scale):
  """The lambda that an estimator stands for, from the maximum it claims."""
  if name == 'authors':
    return PLUS / g.shape[1] * np.mean(b[:, None] / g, axis=0)
  if name == 'readout':
    b, g = b[:READOUT], g[:READOUT]
  if name == 'curvature':
    return _maximum(b, g, -h)
  if name == 'trust_region':
    return _maximum(b, g, L * (b @ b) / (b @ FISHER @ b) * FISHER)
  if name == 'affordable':  # where the L-bound has lost the budget
    bound = np.polynomial.Polynomial.fit(
        [0, 1, 2], [ETA * b @ d - L * ETA ** 2 / 2 * d @ d
                    for d in (b + lam * g.sum(1) for lam in (0, 1, 2))], 2)
    left = bound - (1 - BUDGET) * bound(0)
    return np.full(g.shape[1], left.roots().max())
  if name == 'gac':  # the halves are alike: without noise it is the target
    return np.full(g.shape[1], TARGET / (1 - TARGET))
  if name == 'pcr':  # nor does it project then
    return np.zeros(g.shape[1])
  if name == 'preconditioned':  # the L-bound of a step along P(b + g lam)
    scale = scale * (b @ (scale * b)) / np.sum((scale * b) ** 2)
    p = scale[:, None] * g
    return np.linalg.solve(L * ETA * p.T @ p,
                           p.T @ b - L * ETA * p.T @ (scale * b))
  return _maximum(b, g, L * np.eye(len(b)))


@pytest.mark.parametrize('sign', [1., -1.])
@pytest.mark.parametrize('modules', [1, 3])
@pytest.mark.parametrize('name', estimators.ESTIMATORS)
def test_the_analytic_lambda_of_a_quadratic(name, modules, sign):
  with jax.enable_x64(True):
    b, h, g = _problem(modules, sign)
    scale = np.linspace(.5, 2., N)
    estimate = estimators.ESTIMATORS[name](_evidence(b, h, g, scale),
                                           _config())
    expected = _analytic(name, b, h, g, scale)
    assert estimate.lam.shape == (modules,)
    np.testing.assert_allclose(estimate.lam, expected, rtol=1e-5, atol=1e-5)
    assert (name in ('authors', 'affordable', 'gac', 'pcr') or modules > 1
            or np.sign(expected[0]) == sign)


@pytest.mark.parametrize('sign', [1., -1.])
def test_with_no_budget_lambda_is_where_the_bound_breaks_even(sign):
  b, h, g = _problem(1, sign)
  config = dataclasses.replace(_config(), budget=0.)
  lam = estimators.affordable(_evidence(b, h, g), config).lam
  best = estimators.cross_fitted(_evidence(b, h, g), config).lam
  np.testing.assert_allclose(lam, np.maximum(2 * best, 0), rtol=1e-4,
                             atol=1e-6)


def test_an_rl_step_without_gain_can_afford_nothing():
  b, h, g = _problem(1, -1.)
  seen = _evidence(b, h, g)
  half = jax.tree.map(lambda x: x / 2, seen.gradients)
  # One part's g_RL is -3 times the other's: their product is negative.
  parts = [jax.tree.map(lambda x, s=s: s * x, half) for s in (-1., 3.)]
  estimate = estimators.affordable(seen._replace(parts=parts), _config())
  assert estimate.info['rl_cross'] < 0 and estimate.info['c_cross'] > 0
  slope = estimate.info['c_cross'] - L * ETA * (b @ g[:, 0])
  np.testing.assert_allclose(
      estimate.lam, 2 * slope / (L * ETA * np.sum(g ** 2)), rtol=1e-4)


def _apart(b, g, rl_noise, mtp_noise, parts=4):
  """Evidence whose parts differ, but add up to b and g, and its NumPy parts."""
  rng = np.random.default_rng(5)
  def split(x, noise):
    noise = noise * rng.normal(size=(parts, *x.shape))
    return x / parts + noise - noise.mean(0)
  rl, mtp = split(b, rl_noise), split(g, mtp_noise)
  seen = _evidence(b, -np.eye(N), g)
  return rl, mtp.sum(-1), seen._replace(parts=[
      (_tree(jnp.asarray(r)), [_tree(jnp.asarray(x)) for x in m.T])
      for r, m in zip(rl, mtp)])


@pytest.mark.parametrize('modules', [1, 3])
def test_gac_minimises_the_error_of_a_mixture_of_independent_gradients(modules):
  with jax.enable_x64(True):
    b, _, g = _problem(modules)
    rl, mtp, seen = _apart(b, g, .2, .1)
    n = len(rl)
    over = lambda x, y: n / (n - 1) * (x.sum(0) @ y.sum(0) - np.sum(x * y))
    noise_rl = rl.sum(0) @ rl.sum(0) - over(rl, rl)
    noise = mtp.sum(0) @ mtp.sum(0) - over(mtp, mtp)
    apart = over(rl, rl) + over(mtp, mtp) - 2 * over(rl, mtp)
    assert min(noise_rl, noise, apart) > .1
    error = [(mu - TARGET) ** 2 * apart + mu ** 2 * noise
             + (1 - mu) ** 2 * noise_rl for mu in (0., .5, 1.)]
    mu, = np.polynomial.Polynomial.fit([0, .5, 1], error, 2).deriv().roots()
    estimate = estimators.ESTIMATORS['gac'](seen, _config())
    np.testing.assert_allclose(estimate.lam, np.full(modules, mu / (1 - mu)),
                               rtol=1e-5)
    np.testing.assert_allclose([estimate.info['rl_noise'],
                                estimate.info['mtp_noise']], [noise_rl, noise],
                               rtol=1e-5)


def test_gac_weighs_by_noise_alone_where_the_gradients_seem_alike():
  """Where the distance is estimated below 0, it counts as 0."""
  with jax.enable_x64(True):
    b, _, _ = _problem(1)
    rl, mtp, seen = _apart(b, b[:, None], 4., 3.)
    spread = [np.sum((x - x.mean(0)) ** 2) for x in (rl, mtp)]
    n = len(rl)
    apart = n / (n - 1) * np.sum((rl - mtp).sum(0) ** 2) - n / (n - 1) * np.sum(
        (rl - mtp) ** 2)
    assert apart < 0
    np.testing.assert_allclose(
        estimators.ESTIMATORS['gac'](seen, _config()).lam,
        spread[0] / spread[1], rtol=1e-5)


@pytest.mark.parametrize('scope, rows', [('trunk', slice(READOUT, N)),
                                         ('readout', slice(0, READOUT))])
@pytest.mark.parametrize('name', ['gac', 'pcr'])
def test_a_rival_measures_the_parameters_of_its_scope_only(name, scope, rows):
  with jax.enable_x64(True):
    b, _, g = _problem(1, sign=-1.)
    _, _, seen = _apart(b, g, .3, .2)
    kept = np.zeros(N)
    kept[rows] = 1.
    only = lambda t: _tree(_vector(t) * kept)
    cut = lambda pair: (only(pair[0]), [only(x) for x in pair[1]])
    alone = seen._replace(gradients=cut(seen.gradients),
                          parts=[cut(p) for p in seen.parts])
    rule = estimators.ESTIMATORS[name]
    lam = rule(seen, _config(scope=scope)).lam
    np.testing.assert_allclose(lam, rule(alone, _config()).lam, rtol=1e-6)
    assert lam[0] > 0 and abs(lam[0] / rule(seen, _config()).lam[0] - 1) > .01


@pytest.mark.parametrize('modules', [1, 3])
def test_pcr_projects_by_how_uncertain_the_rl_gradient_is(modules):
  with jax.enable_x64(True):
    b, _, g = _problem(modules, sign=-1.)
    along = g.sum(1)
    def left(rl_noise, mtp_noise):  # of <g_RL, g> after the projection
      _, _, seen = _apart(b, g, rl_noise, mtp_noise)
      lam = estimators.ESTIMATORS['pcr'](seen, _config()).lam
      assert np.ptp(lam) == 0
      return (b + lam[0] * along) @ along / (b @ along)
    np.testing.assert_allclose(left(.3, 0.), 0., atol=1e-5)
    np.testing.assert_allclose(left(0., .3), 1., rtol=1e-5)
    rl, mtp, seen = _apart(b, g, .3, .2)
    spread = [np.sum((x - x.mean(0)) ** 2) for x in (rl, mtp)]
    np.testing.assert_allclose(left(.3, .2), spread[1] / sum(spread),
                               rtol=1e-5)
    # Where both agree there is nothing to take away.
    g_rl, others = seen.gradients
    agrees = seen._replace(
        gradients=(jax.tree.map(jnp.negative, g_rl), others))
    np.testing.assert_array_equal(
        estimators.ESTIMATORS['pcr'](agrees, _config()).lam, 0.)


@pytest.mark.parametrize('name', GRADIENT)
@pytest.mark.parametrize('scope, rows', [('trunk', slice(READOUT, N)),
                                         ('readout', slice(0, READOUT))])
def test_a_scope_measures_its_parameters_only(name, scope, rows):
  with jax.enable_x64(True):
    b, h, g = _problem(1)
    estimate = estimators.ESTIMATORS[name](_evidence(b, h, g),
                                           _config(scope=scope))
    np.testing.assert_allclose(
        estimate.lam, _maximum(b[rows], g[rows], L * np.eye(len(b[rows]))),
        rtol=1e-5)


@pytest.mark.parametrize('name', estimators.ESTIMATORS)
def test_no_perturbation_ends_finite_and_bounded(name):
  b, h, g = _problem(1, -1.)
  for size in (0., 1e-18):
    estimate = estimators.ESTIMATORS[name](_evidence(b, h, size * g),
                                           _config())
    assert np.isfinite(estimate.lam).all()
    config = dataclasses.replace(_config(), lambda_min=-1., lambda_max=1.)
    lam, _ = occ.track(occ.initial_state(1), estimate.lam, config)
    assert np.abs(lam) <= 1


@pytest.mark.parametrize('modules', [1, 3])
def test_without_a_maximum_curvature_falls_back_to_exact(modules):
  b, h, g = _problem(modules, concave=False)
  estimate = estimators.curvature(_evidence(b, h, g), _config())
  assert estimate.info['concave'] == 0
  np.testing.assert_allclose(
      estimate.lam, estimators.exact(_evidence(b, h, g), _config()).lam)


def test_preconditioned_does_not_know_the_scale_of_p():
  b, h, g = _problem(1)
  scale = np.linspace(.5, 2., N)
  lam = [estimators.preconditioned(_evidence(b, h, g, s * scale), _config()).lam
         for s in (1., 1000.)]
  np.testing.assert_allclose(*lam, rtol=1e-4)


@functools.cache
def _noisy(draws=4000, n=4, noise=3.):
  """c_cross and c_same of gradients whose two roles share their noise."""
  rng = np.random.default_rng(1)
  b, _, g = _problem(1)
  shared = noise * rng.normal(size=(draws, n, N))
  g_rl = (b + shared) / n
  g_mtp = (g[:, 0] + shared + rng.normal(size=shared.shape)) / n

  def one(rl, mtp):
    parts = [(rl[i], [mtp[i]]) for i in range(n)]
    same = jnp.sum(rl, 0) @ jnp.sum(mtp, 0)
    return occ.cross_products(parts, same[None], jnp.dot)[0], same

  cross, same = jax.jit(jax.vmap(one))(g_rl, g_mtp)
  return np.asarray(cross), np.asarray(same), b @ g[:, 0], noise ** 2 * N / n


def test_cross_fitting_is_unbiased_and_one_batch_is_not():
  cross, same, truth, bias = _noisy()
  z = lambda x, mean: (x.mean() - mean) / (x.std() / np.sqrt(len(x)))
  assert abs(z(cross, truth)) < 3
  # The noise that both share adds its variance: E c_same = c + sigma^2 N / n.
  assert z(same, truth) > 30
  assert abs(z(same, truth + bias)) < 3


def test_cross_fitting_asks_for_disjoint_parts():
  b, h, g = _problem(1)
  seen = _evidence(b, h, g)
  seen = seen._replace(parts=[seen.gradients])
  with pytest.raises(ValueError, match='disjoint_parts'):
    estimators.cross_fitted(seen, _config())


def test_smoothness_of_a_gradient_step_is_l_eta():
  b, h, _ = _problem(1)
  move = ETA * b
  achieved = b @ move + move @ h @ move / 2
  ratio = occ.smoothness_ratio(b @ move, achieved, b @ move)
  np.testing.assert_allclose(ratio, ETA * -(b @ h @ b) / (b @ b))
  state = occ.initial_state(1, PLUS)
  np.testing.assert_allclose(state.smoothness, L * ETA, rtol=1e-6)
  for value, expected in ((.5, .9 * L * ETA + .05), (np.nan, L * ETA),
                          (9., .9 * L * ETA + .1),
                          (-1., .9 * L * ETA + .005)):
    after = occ.track_smoothness(state, value)
    np.testing.assert_allclose(after.smoothness, expected, rtol=1e-5)


def test_guard_bounds_the_perturbation():
  products = occ.Products(jnp.ones(2), jnp.asarray([[4., 1.], [1., 9.]]),
                          jnp.float32(1.))
  lam = jnp.asarray([1., -1.])  # ||lambda g||^2 = 4 - 2 + 9 = 11
  np.testing.assert_allclose(occ.guard(lam, products, 10.), lam)
  np.testing.assert_allclose(occ.guard(lam, products, .5),
                             .5 / np.sqrt(11) * np.asarray(lam), rtol=1e-6)
  np.testing.assert_array_equal(occ.guard(0 * lam, products, .5), [0, 0])
