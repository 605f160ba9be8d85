"""LoRA: what is trained, what lambda is made of, and merging."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors import numpy as safe

from mtp_rl import config as config_lib
from mtp_rl import forward, occ, sharding, train_step, tree, types, validate
from mtp_rl.models import lora, transformer
from mtp_rl.objectives import logprobs, policy
from mtp_rl.objectives import mtp as mtp_loss
from tests import batches, conftest

RANKS = dict(model=dict(lora_rank=2, lora_alpha=6., lora_targets='query,down'),
             mtp=dict(lora_rank=3, lora_alpha=6., lora_targets='value,up'))


def _params(config, seed=1):
  """Initial parameters with random B, so that the adapters do something."""
  params = forward.init(config, jax.random.key(0))
  rng = np.random.default_rng(seed)
  return jax.tree_util.tree_map_with_path(
      lambda keys, x: .3 * rng.normal(size=x.shape).astype(np.float32)
      if tree.path(keys).endswith('lora_b') else x, params)


def _names(part):
  return {tree.path(k) for k, _ in jax.tree_util.tree_leaves_with_path(part)}


@functools.cache
def _update(regime, **ranks):
  """Return params, the state before and after an update, and its metrics."""
  config = batches.config(regime, **{k: dict(RANKS[k]) for k in ranks})
  params = _params(config)
  mesh = sharding.make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    steps = train_step.make(config, mesh)
    state = steps.init(jax.random.key(0))._replace(
        params=jax.tree.map(jnp.asarray, params))
    before = jax.device_get(state)
    after, metrics = steps.update(state, batches.batch())
  return params, before, jax.device_get(after), metrics


@pytest.mark.parametrize('regime, ranks', [
    ('exact', [*RANKS]),
    *(conftest.long(r, [*RANKS]) for r in batches.REGIMES
      if r not in ('exact', 'readout')),
    conftest.long('exact', ['model']), conftest.long('readout', ['mtp'])])
def test_adapters_alone_are_trained(regime, ranks):
  _, before, after, _ = _update(regime, **dict.fromkeys(ranks, True))
  adapters = _names(tree.adapters(before.params))
  trained = _names(tree.trained(before.params))
  assert len(_names(tree.theta(tree.adapters(before.params)))) == (
      4 if 'model' in ranks else 0)
  assert all(n.split('/')[-2] in ('query', 'down', 'value', 'up')
             for n in adapters)
  moved = {tree.path(k) for (k, x), y in zip(
      jax.tree_util.tree_leaves_with_path(before.params),
      jax.tree.leaves(after.params)) if not np.array_equal(x, y)}
  still = _names(tree.psi(before.params)) if regime == 'rl_only' else set()
  assert moved == trained - still
  adam = optax.tree_utils.tree_get(after.opt_state, 'ScaleByAdamState')
  assert {n for n in _names(adam.nu)} == trained - still


def test_c_and_v2_are_over_adapters_alone():
  config = batches.config('exact', **{k: dict(v) for k, v in RANKS.items()})
  batch = batches.batch()
  params, _, _, metrics = _update('exact', **dict.fromkeys(RANKS, True))
  mask = logprobs.mtp_mask(batch.valid, batches.S, 1)
  scored = lambda p: forward.score(tree.merge(params, p), batch.rows,
                                   config=config, entropy=True)
  def l_rl(p):
    out = scored(p)
    return policy.rl_loss(out.main, out.entropy, batch, config.rl)[0]
  l_mtp = lambda p: mtp_loss.policy_losses(
      scored(p).mtp, mask, batch, config.rl, config.mtp.reference)[0][0]
  for part, same in ((tree.theta(tree.adapters(params)), True),
                     (tree.theta(params), False)):
    g_rl, g = jax.jit(lambda p: (jax.grad(l_rl)(p), jax.grad(l_mtp)(p)))(part)
    for name, value in (('c', tree.dot(g_rl, g)), ('v2', tree.dot(g, g))):
      near = np.isclose(metrics[f'occ/exact/{name}'], value, rtol=1e-4)
      assert near == same, (name, metrics[f'occ/exact/{name}'], value)
  p = occ.Products(metrics['occ/exact/c'][None],
                   metrics['occ/exact/v2'][None, None], 1.)
  np.testing.assert_allclose(metrics['occ/exact/lambda_star'],
                             occ.coefficient(p, config.occ)[0], rtol=1e-5)


@pytest.mark.long
def test_adapters_start_at_nothing_and_merge_into_the_weights():
  config = batches.config('detach', **{k: dict(v) for k, v in RANKS.items()})
  rows = types.Tokens(batches.batch().tokens, batches.batch().valid)
  score = jax.jit(lambda p, c=config: forward.score(p, rows, config=c))
  plain = batches.config('detach')
  bare = jax.jit(lambda p: forward.score(p, rows, config=plain))
  first, params = forward.init(config, jax.random.key(0)), _params(config)
  batches.assert_close(score(first), bare(tree.without_adapters(first)))
  whole = lora.merged(params, config.model, config.mtp)
  batches.assert_close(score(params), bare(whole), rtol=1e-4, atol=1e-5)
  assert np.abs(score(params).main - score(first).main).max() > .01
  assert np.abs(score(params).mtp - score(first).mtp).max() > .01


@pytest.mark.parametrize('make', [lambda: optax.sgd(.1),
                                  lambda: optax.adam(1e-2)])
def test_full_rank_is_the_training_of_the_layer(make):
  """With A = 1, B moves as W does."""
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(2, 20, 6)).astype(np.float32)
  y = y[:, :4]
  own = transformer.Linear(4)
  with_adapter = transformer.Linear(4, rank=6, gain=1.)
  kernel = own.init(jax.random.key(0), x)['params']['kernel']
  fixed = {'kernel': kernel, 'lora_a': jnp.eye(6)}
  loss = lambda net, p: jnp.mean((net.apply({'params': p}, x) - y) ** 2)
  runs = ((lambda w: loss(own, {'kernel': w}), kernel),
          (lambda b: loss(with_adapter, {**fixed, 'lora_b': b}),
           jnp.zeros((6, 4))))
  ends = []
  for value, w in runs:
    step, state = make(), make().init(w)
    for _ in range(20):
      updates, state = step.update(jax.grad(value)(w), state)
      w = optax.apply_updates(w, updates)
    ends.append(w)
  np.testing.assert_allclose(kernel + ends[1], ends[0], atol=1e-5)
  assert np.abs(ends[1]).max() > .05


def test_adapters_are_written_in_the_format_of_peft(tmp_path):
  config = batches.config('exact', **{k: dict(v) for k, v in RANKS.items()})
  m, params = config.model, _params(config)
  lora.save(str(tmp_path), params, m, config.mtp)
  values = json.loads((tmp_path / lora.CONFIG).read_text())
  assert values['target_modules'] == ['down_proj', 'q_proj']
  assert (values['r'], values['lora_alpha']) == (2, 6.)
  held = safe.load_file(tmp_path / lora.WEIGHTS)
  assert len(held) == 2 * 2 * m.n_layers
  a = params['blocks']['layers']['down']['lora_a']
  np.testing.assert_array_equal(
      held['base_model.model.model.layers.1.mlp.down_proj.lora_A.weight'],
      a[1].T)
  ahead = safe.load_file(tmp_path / 'mtp' / lora.WEIGHTS)
  assert 'base_model.model.model.mtp_layers.0.mlp.up_proj.lora_B.weight' in (
      ahead)
  with pytest.raises(config_lib.ConfigError, match='holds adapters already'):
    lora.save(str(tmp_path), params, m, config.mtp)
  with pytest.raises(config_lib.ConfigError, match='no adapters'):
    lora.save(str(tmp_path), tree.without_adapters(params), m, config.mtp)


@pytest.mark.parametrize('said, sections', [
    ('names quarry', dict(model=dict(lora_rank=2, lora_targets='quarry'))),
    ('attention alone takes', dict(model=dict(
        lora_rank=2, lora_targets='up,gate', experts=4, experts_per_token=2,
        expert_ff=8))),
    ('readout is not trained', dict(model=dict(lora_rank=2),
                                    occ=dict(estimator='readout'))),
    ('needs an MTP module', dict(mtp=dict(lora_rank=2, modules=0,
                                          regime='rl_only')))])
def test_adapters_that_cannot_be_are_refused(said, sections):
  with pytest.raises(config_lib.ConfigError, match=said):
    validate.validate(conftest.tiny_config(**sections))
