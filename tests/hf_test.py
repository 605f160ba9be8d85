"""Logits against transformers itself (extra hf): trunks and MTP modules."""

import dataclasses

import numpy as np
import pytest

from mtp_rl.models import pretrained
from tests import published
from tests.golden import make

torch = pytest.importorskip('torch')
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
