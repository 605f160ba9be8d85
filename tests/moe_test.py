"""The expert layer against a dense one, twice differentiated, and on a mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_rl import config as config_lib
from mtp_rl import forward, gradients, sharding, tokenizers
from mtp_rl.aot import hlo
from mtp_rl.models import expert_blocks, moe
from mtp_rl.objectives import logprobs
from mtp_rl.rollout import describe
from tests import batches

M = config_lib.Model(d_model=6, experts=8, experts_per_token=3, expert_ff=5,
                     router_groups=4, router_top_groups=2, router_scale=1.3)
EXPERTS = dict(qk_norm=False, n_layers=2, experts=4, experts_per_token=2,
               expert_ff=8, shared_experts=1, dense_layers=1, rotary=.5,
               remat='none', head_chunk=0)


def _inputs(n=7, m=M):
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  e, d, f = m.experts, m.d_model, m.expert_ff
  return dict(x=draw(n, d), router=draw(d, e), gate=draw(e, d, f),
              up=draw(e, d, f), down=draw(e, f, d)), draw(e)


def _sparse(p, bias, m=M, dtype='float32', form='blocks'):
  x = jnp.asarray(p['x'], dtype)
  chosen, weights = moe.route(x, p['router'], bias, m)
  masters = tuple(p[n] for n in ('gate', 'up', 'down'))
  mix = functools.partial(moe.on_mesh, form=form)
  return mix(x, chosen, weights, tuple(
      jnp.asarray(w, x.dtype) for w in masters), masters)


def _dense(p, bias, m=M):
  """Every expert on every token, weighted by a mask."""
  s = 1 / (1 + jnp.exp(-p['x'] @ p['router']))
  c = np.asarray(s + bias)
  mask = np.zeros(c.shape)
  for row, scores in zip(mask, c):
    groups = scores.reshape(m.router_groups, -1)
    rank = np.sort(groups, 1)[:, -2:].sum(1)
    size = groups.shape[1]
    allowed = [g * size + i for g in np.argsort(-rank)[:m.router_top_groups]
               for i in range(size)]
    row[sorted(allowed, key=lambda e: -scores[e])[:m.experts_per_token]] = 1
  def value(p):
    w = mask / (1 + jnp.exp(-p['x'] @ p['router']))
    if m.norm_topk:
      w = w / w.sum(-1, keepdims=True)
    z = jnp.einsum('nd,edf->nef', p['x'], p['gate'])
    z = z / (1 + jnp.exp(-z)) * jnp.einsum('nd,edf->nef', p['x'], p['up'])
    return m.router_scale * jnp.einsum('ne,nef,efd->nd', w, z, p['down'])
  return value(p), value


@pytest.mark.parametrize('form', moe.FORMS)
@pytest.mark.parametrize('fields', [{}, dict(router_groups=1, norm_topk=False,
                                             router_top_groups=1)])
def test_only_the_chosen_experts_are_mixed(fields, form):
  m = dataclasses.replace(M, **fields)
  p, bias = _inputs()
  np.testing.assert_allclose(_sparse(p, bias, m, form=form),
                             _dense(p, bias, m)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('form', moe.FORMS)
@pytest.mark.parametrize('rows', (7, 90))  # 90: several blocks of an expert
def test_gradient_and_its_jvp_are_the_dense_layers(rows, form):
  p, bias = _inputs(rows)
  v = jax.tree.map(lambda x: np.cos(x), p)
  dense = _dense(p, bias)[1]
  def twice(layer):
    loss = lambda p: jnp.sum(jnp.sin(layer(p)))
    return jax.jit(lambda p: jax.jvp(jax.grad(loss), (p,), (v,)))(p)
  got, want = twice(lambda p: _sparse(p, bias, form=form)), twice(dense)
  assert all(np.abs(x).max() > .1 for x in jax.tree.leaves(want))
  batches.assert_close(got, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('form', moe.FORMS)
@pytest.mark.parametrize('mesh', ({}, dict(fsdp=2, tensor=2, expert=2)))
def test_bfloat16_experts_have_float32_gradients(mesh, form):
  """Near those of no mesh, unrounded, and so is the jvp of the gradient."""
  m = dataclasses.replace(M, expert_ff=4)
  p, bias = _inputs(8, m)
  v = jax.tree.map(jnp.cos, p)

  def twice(dtype, mesh):
    loss = lambda p: jnp.sum(jnp.sin(.1 * _sparse(
        p, bias, m, dtype, form)))
    with jax.set_mesh(sharding.make_mesh(config_lib.Mesh(**mesh))):
      return jax.jit(lambda p: jax.jvp(jax.grad(loss), (p,), (v,)))(p)
  want = twice(jnp.float32, {})
  batches.assert_close(twice(jnp.float32, mesh), want, rtol=1e-4, atol=1e-5)
  for got, exact in zip(twice(jnp.bfloat16, mesh), want, strict=True):
    for name, y in exact.items():
      x, y = np.asarray(got[name]), np.asarray(y)
      assert x.dtype == np.float32
      assert np.abs(x - y).max() < .05 * np.abs(y).max() > 0, name
      assert name == 'x' or (x != x.astype(jnp.bfloat16)).any(), name


def test_the_correction_bias_chooses_and_gets_no_gradient():
  p, bias = _inputs()
  far = bias.copy()
  far[0] = 99.
  chosen, weights = moe.route(p['x'], p['router'], far, M)
  assert (np.asarray(chosen) == 0).any(1).all()
  np.testing.assert_allclose(weights.sum(1), M.router_scale, rtol=1e-5)
  grad = jax.grad(lambda b: jnp.sum(_sparse(p, b) ** 2))(bias)
  np.testing.assert_array_equal(grad, 0.)


@functools.cache
def _model():
  config = batches.config(model=EXPERTS)
  net = forward.network(config)
  batch = batches.batch()
  params = jax.jit(net.init)(jax.random.key(0), batch.tokens[:1],
                             batch.valid[:1])['params']
  return config, net, params, batch


def test_load_counts_valid_tokens_alone():
  config, _, params, batch = _model()
  out = jax.jit(functools.partial(
      forward.score, config=config, entropy=True,
      acceptance=True))(params, batch.rows)
  out = jax.tree.map(np.asarray, out)
  assert out.load.shape == (batches.ROWS, 1, 4)
  np.testing.assert_array_equal(out.load.sum((1, 2)), 2 * batch.valid.sum(1))
  rewards = np.zeros(batches.ROWS, np.float32)
  row = describe.batch_metrics(batch, out, rewards, 4,
                               tokenizers.Ends(0, (1,)))
  assert 0 <= row['moe/load_min'] < 1 < row['moe/load_max'] <= 4
  # One layer sends 6, 2 and 0 tokens, another 4, 2 and 2.
  seen = moe.balance(np.array([[[6, 2, 0], [1, 1, 1]], [[0, 0, 0], [3, 1, 1]]]))
  np.testing.assert_allclose(seen['moe/load_max'], 3 * (6 / 8 + 4 / 8) / 2)
  np.testing.assert_allclose(seen['moe/load_min'], 3 * (0 + 2 / 8) / 2)


def test_cached_decoding_is_the_full_forward_through_dense_and_sparse_layers():
  _, net, params, batch = _model()
  tokens, valid = batch.tokens[:4], batch.valid[:4]
  full, _ = jax.jit(net.apply)({'params': params}, tokens, valid)
  got = batches.read_in_parts(net, params, tokens, valid, ((0, 6), (6, 12)))
  np.testing.assert_allclose(got[valid], np.asarray(full)[valid], atol=1e-5)


def _gradient(**mesh):
  """Gradient of the log-probs of main head and MTP module, on a mesh."""
  config = batches.config(model=EXPERTS, mesh=mesh)
  _, _, params, batch = _model()
  mesh = sharding.make_mesh(config.mesh)
  placed = jax.device_put(params, sharding.tree_shardings(params, mesh))

  def loss(params, rows):
    out = forward.score(params, rows, config=config)
    mask = logprobs.mtp_mask(rows.valid, batches.S, 1)
    return jnp.sum(out.main * rows.valid[:, batches.R:]) + jnp.sum(
        out.mtp * mask), out.load

  rows = sharding.batch_sharding(mesh)
  with jax.set_mesh(mesh):
    out = jax.jit(jax.grad(loss, has_aux=True))(
        placed, jax.device_put(batch.rows, rows))
  kernel = placed['blocks']['layers']['experts']['gate']['kernel']
  return jax.device_get(out), kernel.addressable_shards[0].data.shape


def test_a_mesh_with_experts_apart_is_no_mesh():
  one, _ = _gradient()
  many, shard = _gradient(fsdp=2, tensor=2, expert=2)
  assert shard == (1, 2, 8, 4)  # of 1, 4, 16, 8
  batches.assert_close(one, many, rtol=1e-4, atol=1e-4)
  experts = one[0]['mtp']['depth_1']['block']['experts']
  assert np.abs(experts['down']['kernel']).max() > .01
  np.testing.assert_array_equal(experts['router']['bias'], 0.)


def test_hessian_vector_products_pass_the_whole_model(monkeypatch):
  """jvp of grad J with blocks, and with all experts on every token."""
  config = batches.config('rl_only', mtp=dict(modules=0), model=EXPERTS | dict(
      n_layers=1, dense_layers=0, remat='dots'))
  batch = batches.batch()
  net = forward.network(config)
  params = jax.jit(net.init)(jax.random.key(1), batch.tokens[:1],
                             batch.valid[:1])['params']
  v = jax.tree.map(np.cos, params)

  def dense(x, chosen, weights, kernels, masters, first=0, shards=1):
    gate, up, down = kernels
    w = jnp.sum(jax.nn.one_hot(chosen, 4) * weights[..., None], 1)
    z = jax.nn.silu(jnp.einsum('nd,edf->nef', x, gate))
    z = z * jnp.einsum('nd,edf->nef', x, up)
    return jnp.einsum('ne,nef,efd->nd', w, z, down)

  def product():
    grad = jax.grad(lambda p: gradients.objective(p, batch, config))
    return jax.jit(lambda p: jax.jvp(grad, (p,), (v,)))(params)

  sparse = product()
  monkeypatch.setitem(moe.FORMS, 'blocks', dense)
  batches.assert_close(sparse, product(), rtol=1e-3, atol=1e-4)
  assert np.abs(sparse[1]['blocks']['layers']['experts']['down']['kernel']
                ).max() > 1e-3


def flops_of_blocks(experts, grad, lower=lambda f, *args: jax.jit(f).lower(
    *args)):
  """Return FLOPs by the compiled text, and those of the copies of tokens.

  The gradient has 11 products for the 3 of the forward pass: two are computed
  again, and each has two.
  """
  n, k, d, f = 512, 4, 16, 8
  x, weights = jnp.ones((n, d)), jnp.ones((n, k))
  kernels = tuple(jnp.ones((experts, *shape)) for shape in (
      (d, f), (d, f), (f, d)))
  chosen = jnp.zeros((n, k), jnp.int32)
  mix = lambda x, weights, kernels: jnp.sum(expert_blocks.mixture(
      x, chosen, weights, kernels, kernels) ** 2)
  text = lower(jax.value_and_grad(mix, (0, 1, 2)) if grad else mix, x, weights,
               kernels).compile().as_text()
  return hlo.summarise(text).flops, 2 * n * k * d * f * (11 if grad else 3)


@pytest.mark.parametrize('grad', (False, True))
def test_flops_are_those_of_the_tokens_routed(grad):
  for experts in (4, 16, 64):
    got, least = flops_of_blocks(experts, grad)
    # An expert's last block is padded; evenly filled experts have four blocks.
    assert least <= got <= 1.25 * least, (experts, got / least)
