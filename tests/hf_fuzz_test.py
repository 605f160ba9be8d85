"""Changed config.json files: refused in one sentence, or transformers' logits.

Also greedy sampling against its `generate` (extra hf).
"""

import copy
import dataclasses
import random
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_rl import config as config_lib
from mtp_rl import prng, tokenizers, validate
from mtp_rl.models import presets, pretrained, transformer
from mtp_rl.rollout import sampler
from tests import conftest, published
from tests.golden import make

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
T = 20
_NONE = object()  # the key is left out
_FULL, _SLIDE = 'full_attention', 'sliding_attention'
_ROPES = (
    None, {}, {'rope_type': 'default'}, {'rope_theta': 50.},
    {'rope_type': 'default', 'rope_theta': 50.},
    {'type': 'linear', 'factor': 3.}, {'rope_type': 'linear', 'factor': 2},
    {'rope_type': 'linear'}, {'rope_type': 'dynamic', 'factor': 2.},
    {'rope_type': 'llama3', 'factor': 8., 'low_freq_factor': 1.,
     'high_freq_factor': 4., 'original_max_position_embeddings': 16},
    {'rope_type': 'llama3', 'factor': 4., 'low_freq_factor': 1.,
     'high_freq_factor': 3., 'rope_theta': 50.},
    {'rope_type': 'llama3', 'factor': 4., 'low_freq_factor': 1.},
    {'type': 'yarn', 'factor': 4., 'original_max_position_embeddings': 8},
    {'rope_type': 'yarn', 'factor': 4.},
    {'rope_type': 'yarn', 'original_max_position_embeddings': 8,
     'factor': None},
    {'rope_type': 'yarn', 'factor': 4., 'original_max_position_embeddings': 8,
     'beta_fast': 4., 'beta_slow': .5, 'attention_factor': 1.3},
    {'rope_type': 'yarn', 'factor': 4., 'original_max_position_embeddings': 8,
     'mscale': .7, 'mscale_all_dim': 1.1, 'rope_theta': 100.},
    {'rope_type': 'yarn', 'factor': 4., 'original_max_position_embeddings': 8,
     'truncate': False, 'beta_fast': 2},
    {'rope_type': 'yarn', 'factor': 4., 'original_max_position_embeddings': 8,
     'mscale': .7},
    {'rope_type': 'longrope', 'short_factor': [1.], 'long_factor': [2.],
     'original_max_position_embeddings': 8},
    {'rope_type': 'yarn', 'factor': 2., 'surprise': 1},
    {'type': 'linear', 'rope_type': 'default', 'factor': 2.},
    {'rope_type': 'default', 'partial_rotary_factor': .25})
_CHANGES = {
    'rope_scaling': _ROPES, 'rope_parameters': _ROPES,
    'rope_theta': (_NONE, 50., 77, 1e6, '1e4'),
    'partial_rotary_factor': (.25, .5, 1., None, _NONE),
    'max_position_embeddings': (_NONE, 16, 32, 128),
    'original_max_position_embeddings': (8, 16, None),
    'use_sliding_window': (True, False), 'sliding_window': (4, 7, 64, None),
    'max_window_layers': (0, 1, 2, 9),
    'layer_types': ([_FULL] * 2, [_SLIDE] * 2, [_FULL, _SLIDE],
                    [_SLIDE, _FULL], [_FULL] * 3, [_FULL, _SLIDE, _FULL],
                    ['chunked_attention'] * 2),
    'attention_bias': (True, False), 'mlp_bias': (True, False),
    'hidden_act': ('silu', 'gelu', 'relu'), 'head_dim': (None, _NONE, 4, 6),
    'num_attention_heads': (2, 4, 6),
    'num_key_value_heads': (1, 4, None, _NONE),
    'num_hidden_layers': (1, 3, '2'), 'intermediate_size': (8, 40.),
    'rms_norm_eps': (.1, 1e-5, 0), 'tie_word_embeddings': (True, False, _NONE),
    'attention_dropout': (.3,), 'initializer_range': (.5,),
    'pad_token_id': (0, None), 'bos_token_id': (2,), 'use_cache': (False,),
    'num_nextn_predict_layers': (0, None), 'is_causal': (False,),
    'scale_depth': (1.4,), 'per_layer_config': ({'0': {'hidden_act': 'relu'}},),
    'quantization_config': ({'bits': 4},), 'rope_interleaved': (True, False),
    'num_experts_per_tok': (1, 2, 8), 'norm_topk_prob': (True, False),
    'moe_intermediate_size': (6,), 'decoder_sparse_step': (1, 2),
    'mlp_only_layers': ([], [0], [1], [0, 1], None), 'n_group': (1, 2),
    'topk_group': (1, 2), 'routed_scaling_factor': (1., 2.5),
    'first_k_dense_replace': (0, 1, 2), 'n_shared_experts': (1, 2),
    'use_qk_norm': (True, False), 'n_routed_experts': (4, 16),
    'num_experts': (4, 16), 'num_local_experts': (4, 8),
    'output_router_logits': (True,), 'is_llama_config': (True, False),
    'shared_expert_intermediate_size': (0, 8)}
_MOE = ('num_experts_per_tok', 'norm_topk_prob', 'moe_intermediate_size',
        'n_group', 'topk_group', 'routed_scaling_factor', 'num_local_experts',
        'first_k_dense_replace', 'n_shared_experts', 'use_qk_norm',
        'n_routed_experts', 'num_experts', 'decoder_sparse_step',
        'mlp_only_layers', 'output_router_logits',
        'shared_expert_intermediate_size')


def _values(family):
  m, mtp = published.model(family, modules=0)
  return presets.to_hf(m, mtp, max_position_embeddings=64)


def _changed(family, rng):
  """Return a config.json with one to three changes, and their description."""
  values = _values(family)
  keys = [k for k in _CHANGES if 'moe' in family or k not in _MOE]
  if rng.random() < .5:  # where the difficult ones are
    keys = [k for k in keys if 'rope' in k or 'window' in k or 'layer' in k
            or 'position' in k or k in _MOE]
  picked = {k: rng.choice(_CHANGES[k]) for k in rng.sample(
      keys, rng.choice((1, 2, 2, 3)))}
  if picked.get('rope_parameters') and rng.random() < .7:
    picked['rope_theta'] = _NONE
  for key, value in picked.items():
    values.pop(key, None)
    if value is not _NONE:
      values[key] = copy.deepcopy(value)
  return values, {k: '-' if v is _NONE else v for k, v in picked.items()}


def _ours(m, tensors, ids):
  mtp = config_lib.MTP(modules=0)
  net, abstract = published.network(m, mtp)
  source = types.SimpleNamespace(read=lambda name, at: tensors[name][at])
  params = jax.tree_util.tree_map_with_path(
      lambda keys, leaf: pretrained._array(source, leaf, *pretrained.names(
          pretrained.tree_lib.path(keys), m)), abstract)
  with jax.disable_jit():
    h, _ = net.apply({'params': params}, ids, jnp.ones_like(ids, bool))
    return np.asarray(h @ transformer.head_matrix(params))[0]


def _theirs(values, tensors, ids):
  values = copy.deepcopy(values)
  kind = getattr(transformers, values.pop('architectures')[0])
  model = kind(kind.config_class(**values)).eval()
  state = {k: torch.from_numpy(v.copy()) for k, v in tensors.items()}
  model.load_state_dict(make.fused(state, model.state_dict()))
  with torch.no_grad():
    return model(torch.from_numpy(np.asarray(ids)).long()).logits[0].numpy()


@pytest.mark.parametrize('family', published.TRUNKS)
def test_a_changed_config_is_refused_or_gives_the_same_logits(
    family, tries=80, salt=''):
  rng = random.Random(family + salt)
  ids = jnp.asarray(np.random.default_rng(0).integers(
      3, published.V, (1, T)).astype(np.int32))
  config = conftest.tiny_config(mtp=dict(modules=0, regime='rl_only'))
  count, wrong = {'equal': 0, 'refused': 0, 'neither': 0}, []
  for _ in range(tries):
    values, change = _changed(family, rng)
    try:
      m, _ = presets.from_hf(values)
      config.model = m  # a run's fields are those of the file, or it is refused
      validate.validate(config)
    except config_lib.ConfigError as e:
      assert '\n' not in str(e) and len(str(e)) > 20
      count['refused'] += 1
      continue
    m = dataclasses.replace(m, remat='none', head_chunk=0)
    try:
      tensors = published.weights(m, config_lib.MTP(modules=0))
      want = _theirs(values, tensors, ids)
    except Exception as e:
      if 'state_dict' in str(e):
        wrong.append((change, str(e)[:300]))
      count['neither'] += 1  # transformers cannot run it either
      continue
    gap = np.abs(_ours(m, tensors, ids) - want).max()
    if gap > 1e-4:
      wrong.append((change, gap))
    count['equal'] += 1
  assert not wrong, wrong
  assert min(count['equal'], count['refused']) >= tries // 5, count


@pytest.mark.parametrize('family, fields', [
    ('llama', dict(rope_type='llama3', rope_factor=4., rope_context=8)),
    ('qwen2', dict(window=5, window_layers='fs')),
    ('qwen3', dict(rope_type='yarn', rope_factor=4., rope_context=8,
                   rope_gain=1.2, window=6)),
    ('qwen3_moe', dict(window=4)), ('glm4_moe', {})])
def test_greedy_tokens_are_those_of_generate(family, fields, tmp_path):
  m, mtp = published.model(family, modules=0)
  m = dataclasses.replace(m, **fields)
  tensors = published.weights(m, mtp)
  _, model = make.logits(m, mtp, tensors)
  r, s = 8, 24
  prompts = np.random.default_rng(3).integers(3, published.V, (3, r))
  valid = np.ones((3, r), bool)
  valid[1, :3], valid[2, :5] = False, False
  config = conftest.tiny_config(mtp=dict(modules=0, regime='rl_only'),
                                rollout=dict(max_prompt=r, max_response=s))
  config.model = m
  path = published.write(tmp_path / 'hf', m, mtp, tensors)
  params = pretrained.load(path, published.network(m, mtp)[1], m, mtp)
  prompts = prompts.astype(np.int32)
  got = jax.jit(lambda p: sampler.generate(
      p, prompts, valid, prng.identify(prompts, valid), jax.random.key(0),
      config=config, greedy=True, ends=tokenizers.Ends(0, (1,))))(params).rows
  for row in range(3):
    ids = torch.from_numpy(prompts[row:row + 1, valid[row]]).long()
    want = model.generate(ids, do_sample=False, max_new_tokens=s,
                          eos_token_id=1, pad_token_id=0)[0].numpy()
    mine = np.asarray(got.tokens)[row][np.asarray(got.valid)[row]]
    assert len(want) == ids.shape[1] + s or want[-1] == 1
    np.testing.assert_array_equal(mine, want)
