"""The decoder and its MTP modules: cache, padding, causality, detach."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_rl import config as config_lib
from mtp_rl import forward, tree, types
from mtp_rl.models import attention, transformer
from mtp_rl.models import mtp as mtp_model
from mtp_rl.objectives import logprobs
from tests import batches, conftest

V, R, S = 11, 5, 4


def _tokens(lengths, seed=0):
  """Ragged rows: prompt lengths and response lengths."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(3, V, (len(lengths), R + S)).astype(np.int32)
  valid = np.zeros(tokens.shape, bool)
  for row, (prompt, response) in enumerate(lengths):
    valid[row, R - prompt:R + response] = True
  return np.where(valid, tokens, 0), valid


def _network(config):
  return forward.network(config_lib.with_vocabulary(config, V))


RAGGED = _tokens([(5, 4), (2, 3), (1, 0), (3, 1)])


def _model(config):
  net = _network(config)
  params = net.init(jax.random.key(0), *RAGGED)['params']
  return net, params


@pytest.mark.parametrize('sections', [
    {}, dict(model=dict(tie_embeddings=False, qkv_bias=False, qk_norm=False,
                        remat='none', n_kv_heads=4)),
    dict(model=dict(head_dim=8, n_kv_heads=1, remat='block')),
    dict(model=dict(window=3, window_layers='fs'))])
def test_cached_decoding_is_the_full_forward(sections):
  config = conftest.tiny_config(**sections)
  net, params = _model(config)
  tokens, valid = RAGGED
  full, _ = net.apply({'params': params}, tokens, valid)
  cuts = [(0, R)] + [(c, c + 1) for c in range(R, R + S)]
  got = batches.read_in_parts(net, params, tokens, valid, cuts)
  np.testing.assert_allclose(got[valid], np.asarray(full)[valid], atol=1e-5)


def test_padding_and_other_rows_change_nothing(tiny):
  config = tiny(mtp=dict(modules=2))
  net, params = _model(config)
  tokens, valid = RAGGED
  apply = jax.jit(lambda t, v: net.apply({'params': params}, t, v))
  full, ahead = apply(tokens, valid)
  noise = np.where(valid, tokens, 7)
  again, ahead_again = apply(noise, valid)
  np.testing.assert_allclose(np.asarray(again)[valid], np.asarray(full)[valid],
                             atol=1e-6)
  for row in range(len(tokens)):  # the row alone, without its padding
    keep = np.flatnonzero(valid[row])
    alone, ahead_alone = net.apply(
        {'params': params}, tokens[row:row + 1, keep],
        np.ones((1, len(keep)), bool))
    np.testing.assert_allclose(alone[0], full[row, keep], atol=1e-5)
    for k in (1, 2):  # depth k at i needs the valid token i + k
      n = max(len(keep) - k, 0)
      np.testing.assert_allclose(ahead_alone[k - 1][0, :n],
                                 ahead[k - 1][row, keep[:n]], atol=1e-5)
      np.testing.assert_allclose(ahead_again[k - 1][row, keep[:n]],
                                 ahead[k - 1][row, keep[:n]], atol=1e-5)


def test_depth_k_sees_token_i_plus_k_and_none_after_it(tiny):
  net, params = _model(tiny(mtp=dict(modules=3)))
  tokens = np.full((1, 9), 4, np.int32)
  valid = np.ones((1, 9), bool)
  base = net.apply({'params': params}, tokens, valid)
  tokens[0, 6] = 9
  moved = net.apply({'params': params}, tokens, valid)
  changed = lambda a, b: np.flatnonzero(np.abs(a - b)[0].max(-1) > 1e-6)
  np.testing.assert_array_equal(changed(base[0], moved[0]), [6, 7, 8])
  for k in (1, 2, 3):
    first = changed(base[1][k - 1], moved[1][k - 1])[0]
    assert first == 6 - k


def test_rope_is_relative():
  rng = np.random.default_rng(0)
  q, k = rng.normal(size=(2, 1, 4, 2, 8)).astype(np.float32)
  def scores(shift):
    angles = transformer.rope_angles(jnp.arange(4)[None] + shift, 8, 1e4)
    return jnp.einsum('bthc,buhc->bhtu', transformer.rotate(q, *angles),
                      transformer.rotate(k, *angles))
  np.testing.assert_allclose(scores(0), scores(100), atol=1e-4)


def test_attention_is_softmax_attention():
  rng = np.random.default_rng(0)
  q = rng.normal(size=(2, 3, 4, 8)).astype(np.float32)
  k, v = rng.normal(size=(2, 2, 5, 2, 8)).astype(np.float32)
  keys = np.array([[1, 1, 2, 2, 1], [0, 1, 1, 1, 0]])  # segments
  queries, columns = np.array([[1, 2, 2], [1, 1, 1]]), np.array([1, 3, 4])
  mask = ((queries[..., None] == keys[:, None])
          & (np.arange(5) <= columns[:, None]))
  got = attention.attend(q, k, v, attention.Rows(queries, keys, columns))
  for head in range(4):  # query heads 0, 1 share kv head 0; 2, 3 share 1
    s = np.einsum('btc,buc->btu', q[:, :, head], k[:, :, head // 2]) / 8 ** .5
    w = np.exp(np.where(mask, s, -np.inf))
    w = w / w.sum(-1, keepdims=True)
    np.testing.assert_allclose(got[:, :, head],
                               np.einsum('btu,buc->btc', w, v[:, :, head // 2]),
                               atol=1e-5)


def test_swapped_concat_is_another_model(tiny):
  net, params = _model(tiny())
  swapped = _network(tiny(mtp=dict(concat='emb_h')))
  a = net.apply({'params': params}, *RAGGED)[1][0]
  b = swapped.apply({'params': params}, *RAGGED)[1][0]
  assert np.abs(a - b)[RAGGED[1]].max() > 1e-3
  # Swapping the halves of W as well gives the first one back.
  kernel = params['mtp']['depth_1']['proj']['kernel']
  half = kernel.shape[0] // 2
  params['mtp']['depth_1']['proj']['kernel'] = jnp.concatenate(
      [kernel[half:], kernel[:half]])
  c = swapped.apply({'params': params}, *RAGGED)[1][0]
  np.testing.assert_allclose(c, a, atol=1e-5)


def test_a_bias_has_a_float32_gradient():
  """Whatever the activations' dtype; summed in bfloat16 it is 1e-2 off."""
  layer = transformer.Linear(3, use_bias=True, dtype=jnp.bfloat16)
  x = np.ones((2 ** 15, 2), np.float32)
  params = layer.init(jax.random.key(0), x)
  params = {'params': {**params['params'], 'bias': np.full(3, .3, np.float32)}}
  weight = jnp.asarray(np.random.default_rng(0).uniform(size=(2 ** 15, 3)),
                       jnp.bfloat16)
  y, back = jax.vjp(lambda p: layer.apply(p, x), params)
  assert y.dtype == jnp.bfloat16
  narrow = jax.tree.map(lambda p: jnp.asarray(p, jnp.bfloat16), params)
  np.testing.assert_array_equal(y, layer.apply(narrow, x))  # as sampled
  np.testing.assert_allclose(back(weight)[0]['params']['bias'],
                             np.asarray(weight, np.float64).sum(0), rtol=1e-5)


@pytest.mark.parametrize('kind', ['sequential', 'parallel'])
def test_only_a_sequential_module_sees_the_tokens_between(kind, tiny):
  net, params = _model(tiny(mtp=dict(kind=kind, modules=2)))
  tokens, valid = _tokens([(5, 4), (5, 4)])
  states = net.apply({'params': params}, tokens, valid)[1]
  place = tokens.shape[1] - 3
  other = np.asarray(tokens).copy()
  other[:, place] = 3 + (other[:, place] - 2) % (V - 3)
  moved = net.apply({'params': params}, other, valid)[1]
  for k in (1, 2):
    gap = np.abs(states[k - 1] - moved[k - 1]).max(-1)
    seen = place - k if kind == 'sequential' else place
    assert gap[:, :seen].max() == 0 and gap[:, seen].min() > 0, k


@pytest.mark.parametrize('hidden', ['post_norm', 'pre_norm'])
def test_which_trunk_state_depth_1_receives(hidden, tiny):
  net, params = _model(tiny(mtp=dict(hidden=hidden)))
  base = net.apply({'params': params}, *RAGGED)[1][0]
  # Scale channel 0 of the final norm: only the post-norm state feels it.
  scale = params['final_norm']['scale']
  params['final_norm']['scale'] = scale.at[0].set(3.)
  moved = net.apply({'params': params}, *RAGGED)[1][0]
  assert (np.abs(base - moved)[RAGGED[1]].max() > 1e-4) == (
      hidden == 'post_norm')


def _mtp_gradient(config):
  """Gradient of a loss of the MTP modules alone over all parameters."""
  params = _model(config)[1]
  def loss(p):
    out = forward.score(p, types.Tokens(*RAGGED),
                        config=config_lib.with_vocabulary(config, V))
    return jnp.sum(jnp.where(logprobs.mtp_mask(RAGGED[1], S, 2)[..., :],
                             out.mtp, 0.))
  return jax.jit(jax.grad(loss))(params)


@pytest.mark.parametrize('tied', [True, conftest.long(False)])
def test_each_detach_switch_cuts_its_path_exactly(tied, tiny):
  def gradient(**switches):
    return _mtp_gradient(tiny(
        model=dict(tie_embeddings=tied),
        # A regime that trains theta refuses all three switches at once.
        mtp=dict(modules=2, regime='detach', **switches),
        rollout=dict(max_response=S)))
  norm = lambda g, *names: float(sum(tree.norm(g[n]) for n in names))
  free = gradient()
  head = 'embed' if tied else 'lm_head'
  assert norm(free, 'blocks') > 0 and norm(free, head) > 0
  assert norm(free, 'embed') > 0 and norm(free, 'final_norm') > 0

  hidden = gradient(detach_hidden=True)
  assert norm(hidden, 'blocks', 'final_norm') == 0 and norm(hidden, 'embed') > 0
  # With the hidden state cut, the embedding is reached as the module's input
  # and, where tied, as the output head: each switch takes its part away.
  one = gradient(detach_hidden=True, detach_embedding=True)
  assert (norm(one, 'embed') > 0) == tied and norm(one, head) > 0
  other = gradient(detach_hidden=True, detach_head=True)
  assert norm(other, 'embed') > 0
  if not tied:
    assert norm(other, 'lm_head') == 0
  all_cut = gradient(detach_hidden=True, detach_embedding=True,
                     detach_head=True)
  assert float(tree.norm(tree.theta(all_cut))) == 0
  for g in (hidden, one, other, all_cut):
    np.testing.assert_allclose(tree.norm(tree.psi(g)),
                               tree.norm(tree.psi(free)), rtol=1e-5)


def test_an_unrolled_module_is_a_loop_over_its_own_states(tiny):
  """Values, and the gradient of the one set of parameters."""
  config = tiny(mtp=dict(unroll=3))
  net, params = _model(config)
  assert params['mtp'].keys() == {'depth_1'}
  tokens, valid = RAGGED
  module = mtp_model.MTPModule(net.model, config.mtp.concat)
  angles = transformer.rope_angles(
      transformer.positions_of(valid), transformer.rotary_channels(net.model),
      net.model.rope_theta)
  weights = np.random.default_rng(0).normal(size=(3, *tokens.shape, 16))

  def naive(params):
    trunk = net.apply({'params': params}, tokens, valid, method='trunk')
    h = net.apply({'params': params}, trunk, method='norm')
    embedding = params['embed']['embedding'][tokens]
    total = 0.
    for k in range(3):
      embedding = jnp.concatenate([embedding[:, 1:], embedding[:, :1]], 1)
      h = module.apply({'params': params['mtp']['depth_1']}, h, embedding,
                       angles, attention.full(valid))
      total += jnp.sum(weights[k] * h)
    return total

  def unrolled(params):
    states = net.apply({'params': params}, tokens, valid)[1]
    return jnp.sum(weights * jnp.stack(states))

  want, got = (jax.jit(jax.value_and_grad(f))(params)
               for f in (naive, unrolled))
  np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(
      a, b, rtol=1e-4, atol=1e-4), got[1], want[1])
