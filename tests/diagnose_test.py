"""The diagnosis: predictions on a quadratic, statistics, a tiny run, errors."""

import contextlib
import copy
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtp_rl import config as config_lib
from mtp_rl import config_io, occ, train_step, trainer, tree, types, validate
from mtp_rl.diagnose import lookahead, measure, oracle, study, summary
from mtp_rl.report import intervals
from mtp_rl.rollout import experience
from mtp_rl.run import checkpoint, metrics
from mtp_rl.run import workdir as workdir_lib
from tests import conftest

N, ETA = 10, .2


def _quadratic(modules, isotropic):
  """J(x) = b'x + x'Hx / 2 at x = 0, and K directions."""
  rng = np.random.default_rng(0)
  q, _ = np.linalg.qr(rng.normal(size=(N, N)))
  h = -2. * np.eye(N) if isotropic else (q * np.linspace(-3., 1., N)) @ q.T
  return rng.normal(size=N), h, rng.normal(size=(N, modules))


@pytest.mark.parametrize('modules', [1, 3])
@pytest.mark.parametrize('isotropic', [True, False])
def test_on_a_quadratic_the_curve_is_what_is_predicted(modules, isotropic):
  with jax.enable_x64(True):
    b, h, g = _quadratic(modules, isotropic)
    lams = jnp.asarray(np.random.default_rng(1).normal(size=(9, modules)))

    def ahead(lam):
      x = ETA * (b + g @ lam)
      return b @ x + x @ h @ x / 2

    achieved = measure.curves(ahead, lams)
    # c_cross = c_same: without sampling noise both forms are the paper's.
    predicted = measure.predictions(
        lams, {'c': g.T @ b, 'c_cross': g.T @ b}, g.T @ g,
        (g.T @ h @ b, g.T @ h @ g), ETA, 2. * ETA)
    np.testing.assert_allclose(predicted['curvature'], achieved, rtol=1e-9)
    if isotropic:  # the bound is the function itself, with L = 2
      np.testing.assert_allclose(predicted['same'], achieved, rtol=1e-9)
      np.testing.assert_allclose(predicted['cross'], achieved, rtol=1e-9)
    else:
      assert np.abs(predicted['same'] - achieved).max() > .1


def test_the_maximum_of_the_cross_form_is_the_cross_fitted_lambda():
  config = config_lib.OCC(eps=1e-12)
  cross, c, v2, l_eta = .7, .3, 2., .4
  products = occ.Products(jnp.asarray([c]), jnp.asarray([[v2]]),
                          jnp.float32(1.))
  best = occ.cross_fitted_coefficient(jnp.asarray([cross]), products, l_eta,
                                      config)[0]
  slope = jax.grad(occ.decomposition_cross)(best, cross, c, v2, ETA,
                                            l_eta / ETA)
  np.testing.assert_allclose(slope, 0., atol=1e-6)


def _noisy_measures(draws, noise, n=4, size=40):
  """Measures of gradients that share their noise, of a known alignment."""
  rng = np.random.default_rng(0)
  b = rng.normal(size=size)
  g = rng.normal(size=size)
  g -= b * (b @ g) / (b @ b)  # E g_RL and E g_MTP are orthogonal
  grid = np.linspace(-1., 1., 5)

  def one(eps):
    rl, mtp = ({'blocks': jnp.asarray(x + noise * eps) / n} for x in (b, g))
    row = lambda x, i: jax.tree.map(lambda y: y[i], x)
    parts = [(row(rl, i), [row(mtp, i)]) for i in range(n)]
    whole = jax.tree.map(lambda x: x.sum(0), (rl, mtp))
    return measure._alignment(parts, whole[0], [whole[1]], 'trunk')

  found = jax.jit(jax.vmap(one))(rng.normal(size=(draws, n, size)))
  zero = {e: np.zeros(1) for e in measure.NAMES}
  flat = {e: np.float32(0) for e in measure.NAMES}
  peak = -(grid - .4) ** 2
  return [measure.Measures(
      1., .1, .5, .5, 0., dict.fromkeys(measure.SCOPES, jax.tree.map(
          lambda x, i=i: np.asarray(x[i]), found)), zero, flat, flat, flat,
      {f: peak for f in ('achieved', *summary.FORMS)})
          for i in range(draws)], grid


def test_noise_aligns_one_batch_and_not_disjoint_prompts():
  measures, grid = _noisy_measures(400, 3.)
  out = summary.summarise(7, measures, grid)
  a = out['alignment']['all']
  assert a['same'].low > .4  # sigma^2 N / n, shared by both
  assert abs(a['cross'].mean) < 3 * (a['cross'].high - a['cross'].mean) / 2
  assert abs(a['pooled']) < .15 and abs(a['signal']['c']) < .1
  assert .2 < a['signal']['rl'] < .45  # 1 / (1 + 9 / 4)
  np.testing.assert_allclose(out['best'].mean, .4, atol=1e-5)
  assert out['rollouts'] == 400 and out['silent'] == 0


def test_rollouts_without_a_gradient_are_left_out():
  measures, grid = _noisy_measures(3, 0.)
  silent = measures[0]._replace(eta=0.)
  out = summary.summarise(0, [silent, *measures[1:]], grid)
  assert (out['rollouts'], out['silent']) == (2, 1)
  out = summary.summarise(0, [silent], grid)
  assert 'left out' in summary.markdown([out], 'title', [])


def test_the_bootstrap_covers_the_maximum():
  rng = np.random.default_rng(0)
  grid = np.linspace(-1., 1., 9)
  curves = -(grid - .3 - .2 * rng.normal(size=(30, 1))) ** 2
  best = summary.best_lambda(grid, curves)
  assert best.low < best.mean < best.high and best.high - best.low < .3
  assert best.low < .3 < best.high
  assert summary.best_lambda(grid, curves[:1]) == intervals.Interval(
      best_of(curves[0], grid), None, None, 1)


def best_of(curve, grid):
  """Return the vertex of one curve."""
  return float(oracle.vertex(jnp.asarray(grid), jnp.asarray(curve)))


@pytest.fixture(scope='module', name='run')
def _run(tmp_path_factory):
  """A run of two MTP modules."""
  workdir = str(tmp_path_factory.mktemp('run'))
  config = conftest.tiny_config(
      mtp=dict(modules=2, regime='policy'), warmup=dict(steps=40),
      rl=dict(steps=2, prompts=16, minibatches=2),
      optim=dict(schedule='linear'))
  trainer.train(config, workdir)
  return workdir


@pytest.mark.long
def test_a_run_is_diagnosed_end_to_end(run):
  text, directory = study.diagnose(run, rollouts=2, points=5, bound=2.,
                                   updates=[3, 1, 3])
  assert sorted(os.listdir(directory)) == [
      'alignment.png', 'curves.png', 'diagnosis.json', 'diagnosis.md',
      'lambda.png', 'rollouts.jsonl']
  with open(os.path.join(directory, 'diagnosis.json'), encoding='utf-8') as f:
    found = json.load(f)
  assert [c['step'] for c in found['checkpoints']] == [0, 2]
  rows = metrics.read(os.path.join(directory, 'rollouts.jsonl'))
  assert [r['step'] for r in rows] == [0, 0, 2, 2]
  assert len(rows[0]['curve']['achieved']) == 5
  for c in found['checkpoints']:
    assert c['rollouts'] == 2 and c['silent'] == 0
    each = c['estimators']
    assert list(each) == list(measure.NAMES)
    assert all(len(e['modules']) == 2 and abs(e['lam']['mean']) <= 2
               for e in each.values())
    assert each['logprob']['lam']['mean'] != 0  # the policy has moved
    assert c['curve']['grid'][2] == 0
    for form in summary.FORMS:
      assert c['curve'][form][2] == 0 != c['curve'][form][0]
    assert c['curve']['achieved'][2]['mean'] == 0
    assert c['curve']['achieved'][0]['mean'] != 0
    # The schedule ends at 0, the diagnosis at a tenth of the peak.
    assert c['rate']['mean'] >= .99e-4 and c['eta']['mean'] > 0
  assert 'Held-out best lambda' in text and 'cross_fitted' in text
  for c in found['lookahead']:
    assert c['lambdas'] == [-2, -1, 0, 1, 2] and list(c['after']) == ['1', '3']
    for after in c['after'].values():
      assert after['minus_detach'][2] == {'mean': 0, 'low': 0, 'high': 0,
                                          'n': 2}
      assert 0 <= after['detach']['mean'] <= 1


@pytest.mark.long
def test_a_walk_with_lambda_0_is_detach(run):
  own = config_io.load(os.path.join(run, 'config.json'))
  again = workdir_lib.reopen(own, run)
  found = []
  with jax.set_mesh(again.mesh), contextlib.closing(again.task):
    functions = trainer.prepare(again)
    state = checkpoint.Checkpoints(
        again.path('checkpoints', 'rl'), 9).restore(functions.steps.abstract, 0)
    detach = copy.deepcopy(again.config)
    detach.mtp.regime = 'detach'
    for config in (lookahead.config_at(again.config, 0.), detach,
                   lookahead.config_at(again.config, 1.)):
      walk = lookahead._walk(
          again, functions.actor, train_step.make(config, again.mesh),
          jax.tree.map(jnp.copy, state), None, 5, [1, 3])
      found.append({n: jax.device_get(params) for n, params in walk})
  assert [list(x) for x in found] == [[1, 3]] * 3
  for n in (1, 3):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(
        a, b, rtol=1e-5, atol=1e-6), found[0][n], found[1][n])
    assert float(tree.norm(jax.tree.map(np.subtract, tree.theta(
        found[0][n]), tree.theta(found[2][n])))) > 1e-4


def test_the_best_lambda_may_move_with_the_number_of_updates():
  lams = np.linspace(-1, 1, 5)
  rng = np.random.default_rng(0)
  noise = .02 * rng.normal(size=(20, 1, 1))  # of a repeat, shared by lambdas
  rewards = noise + .5 - np.stack([.1 * (lams + .5) ** 2,
                                   .1 * (lams - .5) ** 2])[None]
  out = lookahead.summarise(7, rewards, [1, 20], lams)
  for n, best in ((1, -.5), (20, .5)):
    found = out['after'][n]
    np.testing.assert_allclose(found['best'][:3], best, atol=1e-6)
    np.testing.assert_allclose(
        [x.mean for x in found['minus_detach']],
        .1 * (.25 - (lams - best) ** 2), atol=1e-9)
  assert '**+' not in lookahead.markdown([out])  # all equal: that tells nothing
  rewards = rewards + 1e-6 * rng.normal(size=rewards.shape)
  text = lookahead.markdown([lookahead.summarise(7, rewards, [1, 20], lams)])
  assert '-0.50 [-0.50, -0.50]' in text and '**+0.025** ± 0.000' in text


@pytest.mark.parametrize('minibatches', [1, 2, 4])
def test_held_out_rollouts_are_of_other_prompts(minibatches, monkeypatch):
  """Eight rows of one prompt each, marked by the step they come from."""
  config = conftest.tiny_config(
      mtp=dict(regime='detach'), rl=dict(prompts=8, group=1,
                                         minibatches=minibatches))
  calls = []

  def collect(actor, params, reference, step):
    del actor, params, reference
    calls.append(step)
    batch = types.RolloutBatch(*[step + np.arange(8)] * 8)
    return experience.Rollout(batch, [], None, {})

  monkeypatch.setattr(experience, 'collect', collect)
  run = workdir_lib.Run(config, '', None, None, None)
  functions = trainer.Functions(None, None, None)
  state = types.TrainState(0, None, None, None, None)
  _, first, batch, held_out = study._one(
      run, functions, lambda *args: args, state, None, 3)
  rows = 8 // minibatches
  here = study.FRESH + 3 + np.arange(8)
  if minibatches == 1:
    assert first is None
    np.testing.assert_array_equal(batch.mask, here)
  else:
    np.testing.assert_array_equal(first.mask, here[:rows])
    np.testing.assert_array_equal(batch.mask, here[rows:2 * rows])
  if minibatches > 2:
    np.testing.assert_array_equal(held_out.mask, here[2 * rows:])
  else:
    np.testing.assert_array_equal(held_out.mask,
                                  study.FURTHER + 3 + np.arange(8))
  assert len(calls) == (1 if minibatches > 2 else 2)


def test_the_step_is_as_long_as_the_update_of_the_optimiser():
  g = {'blocks': jnp.asarray([3., -4.])}
  state = types.TrainState(
      0, {**g, 'mtp': {'w': jnp.ones(3)}}, None, None, None)
  transform = optax.sgd(.1)
  state = state._replace(opt_state=transform.init(state.params))
  np.testing.assert_allclose(measure._step_size(g, state, transform), .1,
                             rtol=1e-6)
  none = {'blocks': jnp.zeros(2)}
  assert measure._step_size(none, state, transform) == 0


def _said(workdir, **kw):
  with pytest.raises(config_lib.ConfigError) as e:
    study.diagnose(str(workdir), rollouts=1, **kw)
  return str(e.value)


@pytest.mark.long
def test_what_cannot_be_diagnosed_is_one_sentence(run, tmp_path):
  assert '--bound=-1' in _said(run, bound=-1.)
  assert 'occ.disjoint_parts=3' in _said(run, disjoint_parts=3)
  assert '--steps=7' in _said(run, steps=[0, 7])
  assert 'config.json does not exist' in _said(tmp_path)
  config = conftest.tiny_config(mtp=dict(modules=0, regime='rl_only'))
  path = tmp_path / 'config.json'
  metrics.write_json(str(path), config_io.to_dict(config))
  assert 'mtp.modules=0' in _said(tmp_path)
  for name in ('config.json', 'tokenizer.json'):
    shutil.copy(os.path.join(run, name), tmp_path / name)
  assert 'no rl checkpoint' in _said(tmp_path)
  (tmp_path / 'checkpoints' / 'rl').mkdir(parents=True)
  assert 'holds no checkpoint' in _said(tmp_path)


@pytest.mark.parametrize('regime, loss', [('ce', 'ce'), ('policy', 'policy'),
                                          ('detach', 'policy'), ('occ', 'kl')])
def test_the_mtp_loss_under_study_is_that_of_the_run(regime, loss):
  mtp, own = dict(regime=regime, psi_loss='ce'), {}
  if regime == 'occ':
    mtp['theta_loss'], own = loss, dict(estimator='exact')
  own = conftest.tiny_config(mtp=mtp, occ=own)
  assert measure.measuring_config(own, 1.).mtp.theta_loss == loss
  assert lookahead.config_at(own, .5).mtp.theta_loss == loss
  assert own.mtp.regime == regime


def test_what_a_run_does_to_lambda_does_not_hinder_its_diagnosis():
  own = conftest.tiny_config(mtp=dict(psi_loss='theta', coef=.1),
                             occ=dict(guard=1., measure=1))
  validate.validate(measure.measuring_config(own, 1.))
  still = lookahead.config_at(own, 0.).mtp  # Detach: psi by CE, mtp.coef
  assert (still.psi_loss, still.psi_coef) == ('ce', .1)


def test_a_lambda_at_the_bound_is_said_to_lie_there():
  measures, _ = _noisy_measures(6, 0.)
  grid = np.linspace(-.3, .3, measures[0].curve['achieved'].size)
  rising = [m._replace(curve=m.curve | {'achieved': grid + 1e-3 * i * grid})
            for i, m in enumerate(measures)]
  text = summary.markdown([summary.summarise(0, rising, grid)], 'title', [])
  assert 'It lies at the bound' in text


def test_a_run_that_froze_its_modules_has_nothing_to_look_ahead_from(tmp_path):
  config = conftest.tiny_config(mtp=dict(regime='rl_only'))
  metrics.write_json(str(tmp_path / 'config.json'), config_io.to_dict(config))
  said = _said(tmp_path, updates=(1,))
  assert 'mtp.regime=rl_only' in said and '--lookahead' in said


def test_a_workdir_that_keeps_fewer_says_so():
  run = workdir_lib.Run(
      conftest.tiny_config(run=dict(checkpoint_every=50)), '', None, None, None)
  assert study._note(run, [0, 50, 100]) == []
  note, = study._note(run, [50, 100])
  assert '[50, 100] of 3' in note and '--config.run.keep=3' in note


def test_vertex_of_a_sampled_parabola():
  grid = np.linspace(-1., 1., 9)
  for best in (.1234, -.9, .999):
    np.testing.assert_allclose(oracle.vertex(grid, -(grid - best) ** 2), best,
                               atol=1e-6)
  assert oracle.vertex(grid, grid) == 1 and oracle.vertex(grid, -grid) == -1


@pytest.mark.parametrize('modules', [1, 3])
def test_the_line_search_finds_the_best_lambda(modules):
  rng = np.random.default_rng(0)
  best, a = rng.uniform(-.8, .8, modules), rng.normal(size=(modules, modules))
  bend = a @ a.T + np.eye(modules)
  ahead = lambda lam: -(lam - best) @ bend @ (lam - best)
  config = config_lib.OCC(lambda_min=-1., lambda_max=1.)
  with jax.enable_x64(True):
    np.testing.assert_allclose(oracle.line_search(ahead, modules, config), best,
                               atol=1e-5)
