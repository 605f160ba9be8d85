"""A mesh of 8 devices computes what one device computes, in every regime."""

import functools

import jax
import numpy as np
import pytest

from mtp_rl import sharding, train_step, trainer, tree
from mtp_rl.run import workdir
from tests import batches, conftest


@functools.cache
def _three_updates(regime, data=1, fsdp=1, tensor=1):
  """Parameters before, the state after three updates, and last metrics."""
  config = batches.config(regime,
                          mesh=dict(data=data, fsdp=fsdp, tensor=tensor))
  mesh = sharding.make_mesh(config.mesh)
  minibatches = [batches.batch(1, seed) for seed in range(3)]
  with jax.set_mesh(mesh):
    steps = train_step.make(config, mesh)
    state = steps.init(jax.random.key(0))
    before = jax.device_get(state.params)
    for batch in minibatches:
      state, metrics = steps.update(state, batch)
    return before, jax.device_get(state), jax.device_get(metrics)


QUICK = ('policy', 'occ')


@pytest.mark.parametrize('regime', [
    r if r in QUICK else conftest.long(r) for r in batches.REGIMES])
def test_a_mesh_of_8_is_no_mesh(regime):
  _, one, seen = _three_updates(regime)
  _, many, seen_many = _three_updates(regime, data=2, fsdp=2, tensor=2)
  batches.assert_close(one.params, many.params, rtol=1e-5, atol=1e-5)
  # The authors' mean of ratios divides by single deltas near zero.
  rtol = 1e-3 if regime in ('occ_authors', 'authors') else 1e-4
  for name, value in seen.items():
    np.testing.assert_allclose(seen_many[name], value, rtol=rtol, atol=1e-5,
                               err_msg=name)


def test_parameters_are_really_sharded():
  config = batches.config(mesh=dict(data=2, fsdp=2, tensor=2))
  mesh = sharding.make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    state = train_step.make(config, mesh).init(jax.random.key(0))
  kernel = state.params['blocks']['layers']['gate']['kernel']
  assert kernel.addressable_shards[0].data.shape == (2, 8, 16)  # of 2, 16, 32
  moments = [x for path, x in jax.tree_util.tree_flatten_with_path(
      state.opt_state)[0] if 'gate' in str(path) and 'mu' in str(path)]
  assert moments[0].sharding == kernel.sharding


def test_the_updates_of_a_step_copy_nothing_from_the_host_unasked():
  """The trainer places each minibatch; nothing else may move."""
  config = batches.config(mesh=dict(data=2, fsdp=2, tensor=2))
  mesh, batch = sharding.make_mesh(config.mesh), batches.batch()
  run = workdir.Run(config, '', None, mesh, None)
  with jax.set_mesh(mesh):
    steps = train_step.make(config, mesh)
    state = steps.init(jax.random.key(0))
    whole = jax.tree.map(lambda x: np.concatenate([x, x]), batch)
    with jax.transfer_guard('disallow'):
      state, metrics = trainer._update(run, steps, state, whole)
      with pytest.raises(jax.errors.JaxRuntimeError, match='host-to-device'):
        steps.update(state, batch)  # the guard is at work
  assert state.step == 2 and np.isfinite(metrics['grad_norm/theta'])


@pytest.mark.parametrize('ema', [conftest.long(0.), .5])
def test_behind_the_minibatch_that_measures_lambda_is_held(ema):
  """On 8 devices: one update with the estimator, then one of regime fixed."""
  mesh_8 = dict(data=2, fsdp=2, tensor=2)
  config = batches.config('cross_fitted', mesh=mesh_8, rl=dict(minibatches=2),
                          occ=dict(measure=1, ema=ema, lambda_plus=3.))
  first, second = batches.batch(), batches.batch(1, 1)
  mesh = sharding.make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    steps = train_step.make(config, mesh)
    state, seen = steps.update(steps.init(jax.random.key(0)), first)
    between, seen = jax.device_get((state, seen))
    got, metrics = trainer._update(
        workdir.Run(config, '', None, mesh, None), steps,
        steps.init(jax.random.key(0)),
        jax.tree.map(lambda *x: np.concatenate(x), first, second))
  lam = float(seen['occ/lambda'])
  assert 1e-3 < abs(lam) < 1
  own = batches.config('fixed', mtp=dict(
      coef=lam, theta_loss='policy', psi_loss=config.mtp.psi_loss))
  mesh = sharding.make_mesh(own.mesh)
  with jax.set_mesh(mesh):
    want, fixed = train_step.make(own, mesh).update(between, second)
  batches.assert_close(got.params, want.params, rtol=1e-5, atol=1e-5)
  batches.assert_close(got.occ, between.occ, rtol=1e-6)
  assert metrics['occ/cross_fitted/c'] == seen['occ/cross_fitted/c']
  np.testing.assert_allclose(metrics['occ/lambda'], lam, rtol=1e-6)
  np.testing.assert_allclose(
      metrics['grad_norm/theta'],
      (seen['grad_norm/theta'] + fixed['grad_norm/theta']) / 2, rtol=1e-5)


def test_rl_only_leaves_psi_untouched_and_detach_does_not():
  for regime, moves in (('rl_only', False), ('detach', True)):
    before, after, _ = _three_updates(regime)
    gap = lambda part: float(tree.norm(jax.tree.map(
        np.subtract, part(after.params), part(before))))
    assert gap(tree.theta) > 0
    assert (gap(tree.psi) > 0) == moves


@pytest.mark.parametrize('regime', ['occ', conftest.long('curvature')])
def test_bfloat16_on_a_mesh_is_near_float32(regime):
  """Parameters, moments and gradients stay float32; lambda is near."""
  out, batch = {}, batches.batch()
  for dtype in ('float32', 'bfloat16'):
    config = batches.config(regime, mesh=dict(data=2, fsdp=2, tensor=2),
                            model=dict(dtype=dtype, vocab_size=12))
    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
      steps = train_step.make(config, mesh)
      state, metrics = steps.update(steps.init(jax.random.key(0)), batch)
    assert {x.dtype.name for x in jax.tree.leaves(state.params)} == {'float32'}
    out[dtype] = jax.device_get(metrics)
  for name in ('actor/pg_loss', 'grad_norm/theta', 'grad_norm/psi'):
    np.testing.assert_allclose(out['bfloat16'][name], out['float32'][name],
                               rtol=.05, atol=.02, err_msg=name)
