"""The update: pullbacks, regimes, accumulation, sharding, curvature."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core as extend

from mtp_rl import (
  curvature,
  forward,
  gradients,
  occ,
  regimes,
  sharding,
  train_step,
  tree,
)
from mtp_rl.models import transformer
from mtp_rl.objectives import acceptance, logprobs, policy
from mtp_rl.objectives import mtp as mtp_loss
from tests import batches, conftest

S = batches.S


def _gradients(config, modules=1, params=None, state=None):
  """The combined gradient of a config, the tracked state and the metrics."""
  state = state or occ.initial_state(modules)
  params = params or batches.params(modules)
  step = regimes.Step(jnp.float32(config.occ.eta), tree.theta)
  def run(params, batch):
    out = regimes.update_gradient(params, batch, state, config, step)
    return out.gradient, out.occ, out.metrics
  return jax.jit(run)(params, batches.batch(modules))


def _losses(config, modules=1):
  """L_RL and the L_MTP of each kind as functions of all parameters."""
  batch = batches.batch(modules)
  mask = logprobs.mtp_mask(batch.valid, S, modules)
  def scored(p):
    return forward.score(p, batch.rows, config=config, entropy=True,
                         divergence=True)
  def l_rl(p):
    out = scored(p)
    return policy.rl_loss(out.main, out.entropy, batch, config.rl)[0]
  def l_ce(p):
    return mtp_loss.cross_entropy(scored(p).mtp, mask)
  def l_pg(p):
    return mtp_loss.policy_losses(scored(p).mtp, mask, batch, config.rl,
                                  config.mtp.reference)[0]
  def l_draft(loss, p):
    out = scored(p)
    return acceptance.losses(loss, out.kl, out.overlap, mask)
  return l_rl, {'ce': l_ce, 'policy': l_pg} | {
      x: functools.partial(l_draft, x) for x in acceptance.LOSSES}


@pytest.mark.parametrize('regime, modules, psi_loss', [
    ('ce', 1, 'theta'), ('policy', 2, 'theta'), ('fixed', 2, 'tv_e2e'),
    conftest.long('detach', 2, 'kl'),
    conftest.long('policy', 1, 'ce'), conftest.long('occ', 1, 'ce'),
    ('occ', 2, 'policy'), conftest.long('occ', 1, 'policy')])
def test_one_pullback_is_the_sum_of_the_gradients(regime, modules, psi_loss):
  config = batches.config(
      regime, mtp=dict(modules=modules, psi_loss=psi_loss,
                       reference='mtp_old'),
      rl=dict(entropy_coef=.1, kl_coef=.05, tis_cap=1.1))
  got, _, metrics = _gradients(config, modules)
  l_rl, l_mtp = _losses(config, modules)
  kind = {'ce': 'ce', 'fixed': 'hybrid'}.get(regime, 'policy')
  if regime == 'occ':
    lam = np.asarray([metrics[f'occ/lambda_{k + 1}'] for k in range(modules)]
                     if modules > 1 else [metrics['occ/lambda']])
    assert np.all(np.abs(lam) > 1e-4)
  else:
    lam = np.full(modules, .3 * (regime != 'detach') / modules)
  own = lam if psi_loss == 'theta' else np.full(modules, 1. / modules)
  theta = jax.jit(jax.grad(lambda p: l_rl(p) + lam @ l_mtp[kind](p)))(
      batches.params(modules))
  own_kind = kind if psi_loss == 'theta' else psi_loss
  psi = jax.jit(jax.grad(lambda p: own @ l_mtp[own_kind](p)))(
      batches.params(modules))
  batches.assert_close(tree.theta(got), tree.theta(theta))
  batches.assert_close(tree.psi(got), tree.psi(psi))


@pytest.mark.parametrize('regime', ['rl_only', 'detach'])
def test_separate_regimes_leave_theta_to_rl(regime):
  config = batches.config(regime)
  got, _, _ = _gradients(config)
  l_rl, l_mtp = _losses(config)
  plain = jax.jit(jax.grad(l_rl))(batches.params())
  batches.assert_close(tree.theta(got), tree.theta(plain))
  if regime == 'rl_only':
    assert float(tree.norm(tree.psi(got))) == 0
  else:
    psi = jax.jit(jax.grad(lambda p: l_mtp['ce'](p).sum()))(batches.params())
    batches.assert_close(tree.psi(got), tree.psi(psi))


def test_reference_and_negative_lambda_reach_the_metrics():
  main = _gradients(batches.config('occ'))[2]
  mtp = _gradients(batches.config('occ', mtp=dict(reference='mtp_old')))[2]
  assert main['occ/d_rl_norm'] == mtp['occ/d_rl_norm'] > 0
  assert main['occ/d_mtp_norm'] != mtp['occ/d_mtp_norm']
  np.testing.assert_allclose(
      main['occ/lambda'],
      main['occ/dot'] / (main['occ/d_mtp_norm'] ** 2 + 1e-8), rtol=1e-5)


def test_authors_lambda_scales_the_advantages():
  """lambda A enters the clipped loss, so its sign chooses the clip."""
  config = batches.config('occ_authors', mtp=dict(psi_loss='theta'),
                          occ=dict(lambda_plus=5.))
  got, _, metrics = _gradients(config)
  batch, lam = batches.batch(), float(metrics['occ/lambda'])
  out = forward.score(batches.params(), batch.rows, config=config)
  mask = logprobs.mtp_mask(batch.valid, S, 1)
  ratio = lambda x, old, m: np.where(m, x - old, 0.)
  d_rl = ratio(out.main, batch.old_main, batch.mask)
  d_mtp = ratio(out.mtp[..., 0], batch.old_main, mask[..., 0])
  np.testing.assert_allclose(lam, np.clip(
      5. * np.mean(d_rl * d_mtp / (d_mtp ** 2 + 1e-8)), -1, 1), rtol=1e-3)
  def loss(p):
    mtp = forward.score(p, batch.rows, config=config).mtp[..., 0]
    return policy.policy_loss(mtp, batch.old_main, lam * batch.advantages,
                              mask[..., 0], config.rl).loss
  l_rl, _ = _losses(config)
  plain = jax.jit(jax.grad(lambda p: l_rl(p) + loss(p)))(batches.params())
  batches.assert_close(got, plain)


@functools.cache
def _plain(modules=2, loss='policy'):
  """g_RL and [g_k] over theta by plain differentiation of each loss."""
  l_rl, l_mtp = _losses(batches.config('exact', mtp=dict(modules=modules)),
                        modules)
  theta = tree.theta(batches.params(modules))
  psi = tree.psi(batches.params(modules))
  up = lambda f: (lambda t: -f({**t, **psi}))
  jac = jax.jit(jax.jacrev(up(l_mtp[loss])))(theta)
  return (jax.jit(jax.grad(up(l_rl)))(theta),
          [jax.tree.map(lambda x, k=k: x[k], jac) for k in range(modules)])


@functools.cache
def _halves(modules):
  """(g_RL, [g_k]) of the even and of the odd prompts, which sum to `_plain`."""
  config = batches.config('exact', mtp=dict(modules=modules))
  batch, psi = batches.batch(modules), tree.psi(batches.params(modules))
  mask = logprobs.mtp_mask(batch.valid, S, modules)

  def objectives(theta, parity):
    """Of the whole minibatch's losses, through the rows of some prompts."""
    own = (jnp.arange(batches.ROWS) // config.rl.group % 2 == parity)[:, None]
    out = forward.score({**theta, **psi}, batch.rows, config=config)
    main = jnp.where(own, out.main, jax.lax.stop_gradient(out.main))
    mtp = jnp.where(own[..., None], out.mtp, jax.lax.stop_gradient(out.mtp))
    return -jnp.append(
        mtp_loss.policy_losses(mtp, mask, batch, config.rl, 'main_old')[0],
        policy.rl_loss(main, None, batch, config.rl)[0])

  jac = jax.jit(jax.jacrev(objectives))
  halves = []
  for parity in (0, 1):
    *g, rl = (jax.tree.map(lambda x, i=i: x[i], jac(
        tree.theta(batches.params(modules)), parity))
              for i in range(modules + 1))
    halves.append((rl, g))
  return halves


@pytest.mark.parametrize('estimator, parts, loss', [
    ('exact', 1, 'policy'), ('exact', 1, 'tv_e2e'),
    conftest.long('preconditioned', 2, 'policy'),
    ('cross_fitted', 2, 'kl'), ('curvature', 2, 'policy'), ('gac', 2, 'ce'),
    conftest.long('pcr', 2, 'policy'), conftest.long('affordable', 2, 'tv')])
def test_exact_products_are_those_of_plain_gradients(estimator, parts, loss):
  config = batches.config(estimator, mtp=dict(modules=2, theta_loss=loss),
                          occ=dict(disjoint_parts=parts))
  got, _, metrics = _gradients(config, 2)
  g_rl, g = _plain(2, loss)
  dots = [float(tree.dot(g_rl, x)) for x in g]
  np.testing.assert_allclose(metrics[f'occ/{estimator}/c'], sum(dots),
                             rtol=1e-3)
  np.testing.assert_allclose(metrics[f'occ/{estimator}/v2'],
                             sum(float(tree.dot(x, x)) for x in g), rtol=1e-4)
  named = conftest.glossary()
  assert all(map(named.fullmatch, (n for n in metrics if n[:4] == 'occ/')))
  lam = [float(metrics[f'occ/lambda_{k + 1}']) for k in range(2)]
  expected = tree.axpy(lam[1], g[1], tree.axpy(lam[0], g[0], g_rl))
  batches.assert_close(tree.theta(got), jax.tree.map(jnp.negative, expected))


def test_exact_lambda_is_that_of_plain_gradients():
  g_rl, g = _plain()
  gram = np.asarray([[float(tree.dot(a, b)) for b in g] for a in g])
  c = np.asarray([float(tree.dot(g_rl, a)) for a in g])
  config = batches.config('exact', mtp=dict(modules=2),
                          occ=dict(lambda_min=-99., lambda_max=99.))
  metrics = _gradients(config, 2)[2]
  np.testing.assert_allclose([metrics['occ/lambda_1'], metrics['occ/lambda_2']],
                             np.linalg.solve(gram, c), rtol=1e-3)


def test_a_scope_measures_its_parameters_and_the_step_is_over_all():
  config = batches.config('exact', mtp=dict(modules=2),
                          occ=dict(scope='trunk'))
  got, _, metrics = _gradients(config, 2)
  g_rl, g = _plain()
  c = sum(float(tree.dot(g_rl['blocks'], x['blocks'])) for x in g)
  np.testing.assert_allclose(metrics['occ/exact/c'], c, rtol=1e-3)
  lam = [float(metrics[f'occ/lambda_{k + 1}']) for k in range(2)]
  expected = tree.add(g_rl, tree.weighted(lam, g))
  batches.assert_close(tree.theta(got), jax.tree.map(jnp.negative, expected))


def _head_products(jaxpr):
  """How many products of a jaxpr have a side of the vocabulary's size."""
  n = 0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == 'dot_general':
      n += any(batches.V in x.aval.shape for x in (*eqn.invars, *eqn.outvars))
    n += sum(map(_head_products, extend.jaxprs_in_params(eqn.params)))
  return n


@pytest.mark.parametrize('loss, twice', [('ce', 0), ('tv_e2e', 1)])
def test_one_gradient_a_module_costs_one_head_a_module(loss, twice):
  """TV end to end alone reads the depths below as well: K^2."""
  found = []
  for modules in (1, 2, 3):
    config = batches.config('exact', mtp=dict(modules=modules, theta_loss=loss),
                            model=dict(head_chunk=2))
    params = jax.eval_shape(functools.partial(forward.init, config),
                            jax.random.key(0))
    rows = batches.batch()._replace(old_mtp=np.zeros(
        (batches.ROWS, S, modules), np.float32))
    pull = lambda p, b, config=config: [
        (x.boundaries, x.psi) for x in gradients.pull_each(
            gradients.score(p, b, config), loss)]
    found.append(_head_products(jax.make_jaxpr(pull)(params, rows).jaxpr))
  first, second, third = found
  assert second > first
  assert bool((third - second) - (second - first)) == twice, found


@pytest.mark.parametrize('tied', [True, False])
def test_readout_holds_the_trunk_fixed(tied):
  config = batches.config('readout', model=dict(tie_embeddings=tied))
  params = forward.network(config).init(
      jax.random.key(1), jnp.zeros((1, 5), int), jnp.ones((1, 5), bool))[
          'params']
  batch = batches.batch()
  out = jax.jit(lambda p: regimes.update_gradient(
      p, batch, occ.initial_state(1), config).metrics)(params)
  net, mask = forward.network(config), logprobs.mtp_mask(batch.valid, S, 1)
  fixed = net.apply({'params': params}, batch.tokens, batch.valid,
                    method='trunk')

  def losses(p):
    h = net.apply({'params': p}, fixed, method='norm')
    ahead = net.apply({'params': p}, fixed, batch.tokens, batch.valid,
                      method='ahead')
    scored = logprobs.token_logprobs(
        h, ahead, transformer.head_matrix(p), batch.tokens, S)
    return jnp.stack([
        policy.rl_loss(scored.main, None, batch, config.rl)[0],
        mtp_loss.policy_losses(scored.mtp, mask, batch, config.rl,
                               'main_old')[0][0]])
  jac = tree.theta(jax.jit(jax.jacrev(losses))(params))
  g_rl, g = (jax.tree.map(lambda x, i=i: x[i], jac) for i in range(2))
  assert float(tree.norm(g_rl['blocks'])) == 0
  np.testing.assert_allclose(out['occ/readout/c'], tree.dot(g_rl, g),
                             rtol=1e-4)
  np.testing.assert_allclose(out['occ/readout/v2'], tree.dot(g, g), rtol=1e-4)


@pytest.mark.parametrize('estimator', ['cross_fitted', 'affordable'])
def test_cross_fitting_pairs_disjoint_prompts(estimator):
  """c_cross and ||E g_RL||^2 of the halves, and the lambda that follows."""
  config = batches.config(estimator, occ=dict(lambda_min=-99., lambda_max=99.))
  metrics = _gradients(config)[2]
  (a_rl, (a,)), (b_rl, (b,)) = _halves(1)
  g_rl, (g,) = _plain(1)
  cross = 2 * (tree.dot(a_rl, b) + tree.dot(b_rl, a))
  np.testing.assert_allclose(metrics[f'occ/{estimator}/c_cross'], cross,
                             rtol=1e-3)
  s, v2 = float(metrics[f'occ/{estimator}/smoothness']), tree.dot(g, g)
  slope, root = cross - s * tree.dot(g_rl, g), 0.
  if estimator == 'affordable':
    rl_cross = 4 * tree.dot(a_rl, b_rl)
    np.testing.assert_allclose(metrics['occ/affordable/rl_cross'], rl_cross,
                               rtol=1e-3)
    gain = rl_cross - s * tree.dot(g_rl, g_rl) / 2
    root = np.sqrt(slope ** 2 + 2 * s * v2 * config.occ.budget * max(gain, 0))
  np.testing.assert_allclose(metrics['occ/lambda'], (slope + root) / (s * v2),
                             rtol=2e-3)


def _each_token(params, config):
  """Return the gradient over theta of each sampled token's log-prob, [N, P]."""
  batch = batches.batch(config.mtp.modules)

  def logp(theta):
    out = forward.score({**theta, **tree.psi(params)}, batch.rows,
                        config=config, with_mtp=False)
    return jnp.where(batch.mask, out.main, 0.).ravel()

  @jax.jit
  def each(theta):  # lax.map: XLA on CPU miscompiles jax.jacrev here
    back = jax.vjp(logp, theta)[1]
    return jax.lax.map(lambda w: back(w)[0], jnp.eye(batch.mask.size))

  return np.concatenate([np.asarray(x).reshape(batch.mask.size, -1)
                         for x in jax.tree.leaves(each(tree.theta(params)))],
                        axis=1)


@pytest.mark.parametrize('model', [
    dict(dtype='bfloat16'),
    dict(experts=4, experts_per_token=2, expert_ff=8)])
def test_fisher_products_of_narrow_floats_and_experts(model):
  """What has a backward pass of its own is differentiated forward as well."""
  config = batches.config('trust_region', model=model)
  net = forward.network(config)
  params = net.init(jax.random.key(0), jnp.zeros((1, 5), int),
                    jnp.ones((1, 5), bool))['params']
  batch = batches.batch()
  rows = jax.tree.map(lambda x: x[None], batch.rows)
  work = types.SimpleNamespace(params=params, config=config, batch=batch)
  wide = batches.config('trust_region', model=model | dict(dtype='float32'))
  rng = np.random.default_rng(0)
  a, b = (jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32),
                       tree.theta(params)) for _ in range(2))
  found = jax.jit(lambda: curvature.fisher(work, rows, a, [b]))()

  flat = lambda t: np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)])
  jac = _each_token(params, wide)
  u, v, count = jac @ flat(a), jac @ flat(b), batch.mask.sum()
  np.testing.assert_allclose(found.c[0], u @ v / count, rtol=1e-3)
  np.testing.assert_allclose(found.gram[0, 0], v @ v / count, rtol=1e-3)
  np.testing.assert_allclose(found.rl, u @ u / count, rtol=1e-3)


def test_fisher_products_and_lambda_are_those_of_the_explicit_matrix():
  config = batches.config('trust_region', mtp=dict(modules=2),
                          occ=dict(lambda_min=-99., lambda_max=99.))
  metrics = _gradients(config, 2)[2]
  g_rl, g = _plain()
  batch, rows = batches.batch(2), _each_token(batches.params(2), config)
  fisher = rows.T @ rows / batch.mask.sum()
  flat = lambda t: np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)])
  rl, *each = map(flat, (g_rl, *g))
  np.testing.assert_allclose(metrics['occ/trust_region/rl_f_mtp'],
                             sum(rl @ fisher @ x for x in each), rtol=1e-3)
  np.testing.assert_allclose(metrics['occ/trust_region/mtp_f_mtp'],
                             sum(x @ fisher @ x for x in each), rtol=1e-3)
  # The lambda of most Delta: beta g'F (g_RL + g lambda) = c_cross, in matrices.
  (a_rl, a), (b_rl, b) = ((flat(r), np.stack([flat(x) for x in g]))
                          for r, g in _halves(2))
  s, g = float(metrics['occ/trust_region/smoothness']), np.stack(each)
  beta = s * (rl @ rl) / (rl @ fisher @ rl)
  expected = np.linalg.solve(
      beta * g @ fisher @ g.T,
      2 * (a @ b_rl + b @ a_rl) - beta * g @ fisher @ rl)
  np.testing.assert_allclose([metrics['occ/lambda_1'], metrics['occ/lambda_2']],
                             expected, rtol=1e-2)


def test_hessian_vector_product_is_the_central_difference():
  # Without clips: a difference across a kink measures the jump, not H.
  config = batches.config('curvature', occ=dict(disjoint_parts=2),
                          rl=dict(clip_low=1., clip_high=1e6, dual_clip=0.))
  _, _, metrics = _gradients(config)
  l_rl, l_mtp = _losses(config)
  theta, psi = tree.theta(batches.params()), tree.psi(batches.params())
  grad = jax.jit(jax.grad(lambda t: -l_rl({**t, **psi})))
  g = jax.jit(jax.grad(lambda t: -l_mtp['policy']({**t, **psi})[0]))(theta)
  # Richardson: two central differences, the error of order h^2 cancelled.
  def difference(step):
    step = step / float(tree.norm(g))
    move = lambda s: jax.tree.map(lambda x, y: x + s * y, theta, g)
    return jax.tree.map(lambda a, b: (a - b) / (2 * step), grad(move(step)),
                        grad(move(-step)))
  hg = jax.tree.map(lambda a, b: (4 * a - b) / 3, difference(1e-3),
                    difference(2e-3))
  _, _, _, exact = jax.jit(lambda t: curvature.directional(
      lambda t: (-l_rl({**t, **psi}), None), t, g))(theta)
  gap = jax.tree.map(jnp.subtract, exact, hg)
  assert float(tree.norm(gap) / tree.norm(hg)) < 1e-3
  bend = float(tree.dot(g, hg))
  cross = float(tree.dot(grad(theta), hg))
  np.testing.assert_allclose(metrics['occ/curvature/mtp_h_mtp'], bend,
                             rtol=1e-3)
  np.testing.assert_allclose(metrics['occ/curvature/rl_h_mtp'], cross,
                             rtol=1e-3)
  c, eta = float(metrics['occ/curvature/c']), config.occ.eta
  if bend < 0:
    expected = -(c + eta * cross) / (eta * bend)
  else:
    expected = c / float(metrics['occ/curvature/v2'])
  assert metrics['occ/curvature/concave'] == (bend < 0)
  np.testing.assert_allclose(metrics['occ/curvature/lambda_star'], expected,
                             rtol=5e-3)
  np.testing.assert_allclose(metrics['occ/lambda'], np.clip(expected, -1, 1),
                             rtol=5e-3)


def test_the_guard_bounds_what_mtp_adds():
  config = batches.config('exact', occ=dict(guard=.01, lambda_plus=50.,
                                            lambda_max=99., lambda_min=-99.))
  got = tree.theta(_gradients(config)[0])
  g_rl, _ = _plain(1)
  added = tree.norm(tree.add(got, g_rl))  # got descends
  np.testing.assert_allclose(added, .01 * tree.norm(g_rl), rtol=1e-2)


@pytest.mark.parametrize('modules, psi_loss, ema', [
    (1, 'ce', .5), (2, 'theta', 0.)])
def test_a_lambda_that_is_held_gives_the_gradient_that_it_was_measured_for(
    modules, psi_loss, ema):
  config = batches.config('exact', mtp=dict(modules=modules, psi_loss=psi_loss),
                          occ=dict(disjoint_parts=2, ema=ema, measure=1))
  want, tracked, seen = _gradients(config, modules)
  got, after, metrics = _gradients(dataclasses.replace(
      config, mtp=dataclasses.replace(config.mtp, regime='held')), modules,
                                   state=tracked)
  batches.assert_close(got, want)
  batches.assert_close(after, tracked, rtol=0, atol=0)
  for name in ('occ/lambda', *(['occ/lambda_2'] if modules > 1 else [])):
    np.testing.assert_allclose(metrics[name], seen[name], rtol=1e-6)
    assert abs(seen[name]) > 1e-3


def test_l_eta_is_measured_in_float32():
  """An update changes J by less than what bfloat16 rounds."""
  value = lambda dtype: jax.jit(functools.partial(
      gradients.objective, config=batches.config(
          'cross_fitted', model=dict(dtype=dtype))))(
              batches.params(), batches.batch())
  assert value('bfloat16') == value('float32')


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_narrow_models_own_j_is_no_start_of_a_change(monkeypatch, dtype):
  """J of the update's forward pass is as narrow as the model."""
  monkeypatch.setattr(gradients, 'objective',
                      lambda params, *_: -tree.dot(params, params))
  config = batches.config('cross_fitted', model=dict(dtype=dtype))
  at = lambda x: types.SimpleNamespace(params={'w': jnp.float32(x)},
                                       occ=occ.initial_state(1))
  found = [float(train_step._probe(
      at(1.), at(.9), types.SimpleNamespace(
          objective=jnp.float32(j), gradient={'w': jnp.float32(2.)},
          g_rl={'w': jnp.float32(-2.)}), None, config).smoothness)
      for j in (-1., 7.)]
  # Predicted .2, achieved 1 - .81 = .19: L eta = 2 (.2 - .19) / .2 = .1.
  np.testing.assert_allclose(found[0], .9 * .5 + .1 * .1, rtol=1e-5)
  assert (found[0] == found[1]) == (dtype == 'bfloat16')


def test_l_eta_is_measured_on_the_update_itself():
  """It counts updates that measure lambda, not those between that keep it."""
  config = batches.config('cross_fitted', occ=dict(probe_every=2, eta=0.,
                                                   measure=1))
  mesh = sharding.make_mesh(config.mesh)
  batch = batches.batch()
  theta = lambda p: {**p, **tree.psi(before)}
  with jax.set_mesh(mesh):
    steps = train_step.make(config, mesh)
    state = steps.init(jax.random.key(0))
    before = jax.device_get(state.params)
    state, _ = steps.update(state, batch)
    after = jax.device_get(state.params)
    value = jax.jit(jax.value_and_grad(
        lambda p: gradients.objective(p, batch, config)))
    j0, g = value(before)
    j1, _ = value(theta(after))
    descent = tree.theta(_gradients(config, params=before)[0])
    move = jax.tree.map(np.subtract, tree.theta(after), tree.theta(before))
    ratio = 2 * (tree.dot(tree.theta(g), move) - (j1 - j0)) / -tree.dot(
        descent, move)
    expected = .9 * .5 + .1 * np.clip(ratio, .05, 1.)
    measured = float(state.occ.smoothness)
    np.testing.assert_allclose(measured, expected, rtol=1e-3)
    for step in (steps.hold, steps.update, steps.hold):
      state, _ = step(state, batch)
      assert float(state.occ.smoothness) == measured
    state, _ = steps.update(state, batch)  # the third that measures lambda
    assert float(state.occ.smoothness) != measured


@pytest.mark.parametrize('regime', [
    *map(conftest.long, ('detach', 'ce', 'fixed', 'exact', 'curvature',
                         'cross_fitted', 'affordable', 'trust_region', 'gac',
                         'pcr')), 'occ'])
def test_accumulated_is_whole(regime):
  sections = dict(rl=dict(loss='gspo', dual_clip=0., clip_low=.05,
                          clip_high=.05, aggregation='seq-mean-token-mean'))
  whole = _gradients(batches.config(regime, **sections))
  sections['rl'] |= dict(microbatches=4)
  parts = _gradients(batches.config(regime, **sections))
  batches.assert_close(whole[0], parts[0])
  for name, value in whole[2].items():
    np.testing.assert_allclose(parts[2][name], value, rtol=2e-4, atol=1e-6,
                               err_msg=name)
