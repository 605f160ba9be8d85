"""Logits against transformers itself (extra hf): trunks and MTP modules."""

import dataclasses
import random

import numpy as np
import pytest

from mtp_rl.models import presets, pretrained, rope
from tests import published
from tests.golden import make

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
modeling_layers = pytest.importorskip('transformers.modeling_layers')


def _variants(family):
  """Three configurations of a family that change what the golden ones fix."""
  m, _ = published.model(family)
  yield m
  yield dataclasses.replace(m, n_kv_heads=1, rope_theta=77., norm_eps=1e-3,
                            tie_embeddings=not m.tie_embeddings)
  if m.router == 'softmax':
    yield dataclasses.replace(m, norm_topk=False, dense_layers=2, n_heads=6,
                              rope_type='linear', rope_factor=3.)
  elif m.experts:
    yield dataclasses.replace(
        m, n_heads=6, router_groups=1, router_top_groups=1, norm_topk=False,
        qk_norm=False, qkv_bias=False, rotary=.25, dense_layers=2,
        shared_experts=1)
  else:
    yield dataclasses.replace(m, n_heads=6, n_kv_heads=6, n_layers=3, d_ff=8)


@pytest.mark.parametrize('family', published.TRUNKS)
def test_random_small_models_have_the_logits_of_transformers(family, tmp_path):
  for seed, m in enumerate(_variants(family)):
    mtp = published.model(family, modules=0)[1]
    tensors = published.weights(m, mtp, seed=seed + 5)
    want, _ = make.logits(m, mtp, tensors)
    path = published.write(tmp_path / str(seed), m, mtp, tensors)
    net, abstract = published.network(m, mtp)
    got, = published.logits(net, pretrained.load(path, abstract, m, mtp))
    assert want.std() > .3
    np.testing.assert_allclose(got[published.tokens()[1]], want, atol=1e-4)


def _ropes(tries=300):
  """Yield (theta, channels, config.json's object): published, then drawn."""
  llama = {'rope_type': 'llama3', 'low_freq_factor': 1.,
           'high_freq_factor': 4., 'original_max_position_embeddings': 8192}
  yield 5e5, 128, llama | {'factor': 8.}  # Llama 3.1
  yield 5e5, 64, llama | {'factor': 32.}  # Llama 3.2
  yield 1e6, 128, {'rope_type': 'yarn', 'factor': 4.,  # Qwen2.5, Qwen3
                   'original_max_position_embeddings': 32768}
  rng = random.Random(0)
  for _ in range(tries):
    kind = rng.choice(('linear', 'llama3', 'yarn'))
    out = {'rope_type': kind, 'factor': rng.choice((1., 1.5, 4., 8., 40.))}
    if kind != 'linear':
      out['original_max_position_embeddings'] = rng.choice((16, 4096, 32768))
    if kind == 'llama3':
      out |= {'low_freq_factor': rng.choice((.5, 1., 2.)),
              'high_freq_factor': rng.choice((3., 4., 8.))}
    elif kind == 'yarn':
      out |= {key: rng.choice(some) for key, some in {
          'beta_fast': (2., 32., 64.), 'beta_slow': (.5, 1.),
          'attention_factor': (.7, 1.3), 'mscale': (.7, 1.),
          'mscale_all_dim': (1., 1.1), 'truncate': (True, False)}.items()
              if rng.random() < .4}
    yield (rng.choice((50., 1e4, 5e5, 1e7)), rng.choice((4, 8, 64, 96, 128)),
           out)


def test_frequencies_and_gain_are_those_of_transformers():
  """Up to float32: a blend (llama3) loses digits where it begins or ends."""
  m, mtp = published.model('llama')
  moved = 0
  for theta, channels, scaling in _ropes():
    context = scaling.get('original_max_position_embeddings', 64)
    values = presets.to_hf(m, mtp) | {
        'head_dim': channels, 'rope_theta': theta, 'rope_scaling': scaling,
        'max_position_embeddings': int(context * scaling['factor'])}
    found, _ = presets.from_hf(values)
    got, gain = rope.stretched(found, channels)
    values.pop('architectures')
    config = transformers.LlamaConfig(**values)
    want, factor = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS[
        scaling['rope_type']](config, 'cpu')
    exact = scaling['rope_type'] != 'llama3'
    np.testing.assert_allclose(got, want.numpy(), rtol=1e-6 if exact else 1e-5)
    assert gain == pytest.approx(factor, rel=1e-12)
    plain = theta ** (-np.arange(0, channels, 2) / channels)
    moved += np.abs(got / plain - 1).max() > .01
  assert moved > 150


@pytest.mark.parametrize('family', ['mimo', 'glm4_moe', 'qwen3_moe',
                                    'deepseek names'])
def test_modules_have_the_logits_of_transformers(family, tmp_path):
  """Its MtpModel; MiMo's as Qwen2's layer with the hidden state first."""
  m, mtp = published.model('mimo' if ' ' in family else family, modules=1)
  if family == 'deepseek names':  # in a dense model
    mtp = dataclasses.replace(mtp, layout='deepseek', concat='emb_h')
  if m.router == 'softmax':  # torch's module is like layer 0
    m = dataclasses.replace(m, dense_layers=0)
    mtp = dataclasses.replace(mtp, concat='emb_h')
  tensors = published.weights(m, mtp)
  path = published.write(tmp_path / 'hf', m, mtp, tensors)
  net, abstract = published.network(m, mtp)
  main, ahead = published.logits(net, pretrained.load(path, abstract, m, mtp))

  bare = dataclasses.replace(mtp, modules=0)
  trunk = {k: v for k, v in tensors.items() if k in pretrained.shapes(
      published.network(m, bare)[1], m)}
  _, model = make.logits(m, bare, trunk)
  model.config.num_mtp_layers = 1
  model.config.mtp_hidden_states_first = mtp.concat == 'h_emb'
  if hasattr(model.config, 'layer_types'):
    model.config.mtp_layer_types = model.config.layer_types[:1]
  modules = modeling_layers.MtpModel(model, 1).eval()
  names = {'hidden_layernorm': 'hnorm', 'token_layernorm': 'enorm',
           'input_proj': 'eh_proj', 'final_layernorm': 'post_norm',
           'shared_head.norm': 'post_norm'}
  state = {}
  for name in sorted(tensors.keys() - trunk.keys()):
    rest = name.split('.', 3)[3]
    stem = rest.rsplit('.', 1)[0]
    own = names.get(stem, stem) in (*names.values(), 'enorm', 'hnorm',
                                    'eh_proj')
    rest = rest.replace(stem, names.get(stem, stem))
    state[f'layers.0.{"" if own else "mtp_block."}{rest}'] = torch.from_numpy(
        tensors[name].copy())
  wanted = {k: v for k, v in modules.state_dict().items()
            if k.startswith('layers.')}
  modules.load_state_dict(make.fused(state, wanted), strict=False)
  assert make.fused(state, wanted).keys() == wanted.keys()

  tokens, valid = published.tokens()
  for row in range(len(tokens)):
    keep = np.flatnonzero(valid[row])
    ids = torch.from_numpy(tokens[row:row + 1, keep]).long()
    with torch.no_grad():
      h = model.model(input_ids=ids).last_hidden_state
      y = modules.forward_layer(
          0, h[:, :-1], torch.arange(1, len(keep))[None], None,
          input_ids=ids[:, 1:])
      want = model.lm_head(y)[0].numpy()
    np.testing.assert_allclose(ahead[row, keep[:-1]], want, atol=1e-4)
    np.testing.assert_allclose(main[row, keep], model.lm_head(h)[0].detach(),
                               atol=1e-4)
