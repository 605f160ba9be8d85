"""Named architectures of the decoder, and Hugging Face's config.json.

With `model.pretrained` the config's fields must give the checkpoint's
architecture; a config file can take them from here:

    config.model, mtp = presets.model('mimo_7b')
    config.mtp = dataclasses.replace(config.mtp, **mtp)
"""

import dataclasses

from mtp_rl import config as config_lib

# Fields of config.Model and config.MTP that define an architecture; the others
# say how it is computed.
MODEL_FIELDS = (
    'd_model', 'n_layers', 'n_heads', 'n_kv_heads', 'head_dim', 'd_ff',
    'vocab_size', 'rope_theta', 'rotary', 'norm_eps', 'qkv_bias', 'qk_norm',
    'tie_embeddings', 'experts', 'experts_per_token', 'expert_ff',
    'shared_experts', 'dense_layers', 'router_groups', 'router_top_groups',
    'router_scale', 'norm_topk')
MTP_FIELDS = ('kind', 'concat', 'hidden')

_PRESETS = {
    'smollm2_135m': (dict(  # Llama
        d_model=576, n_layers=30, n_heads=9, n_kv_heads=3, head_dim=64,
        d_ff=1536, vocab_size=49152, rope_theta=1e5, norm_eps=1e-5), {}),
    'qwen3_0_6b': (dict(
        d_model=1024, n_layers=28, n_heads=16, n_kv_heads=8, head_dim=128,
        d_ff=3072, vocab_size=151936, rope_theta=1e6, norm_eps=1e-6,
        qk_norm=True), {}),
    'mimo_7b': (dict(  # Qwen2 with one MTP layer
        d_model=4096, n_layers=36, n_heads=32, n_kv_heads=8, head_dim=128,
        d_ff=11008, vocab_size=151680, rope_theta=640000., norm_eps=1e-5,
        qkv_bias=True, tie_embeddings=False),
                dict(modules=1, concat='h_emb', hidden='post_norm')),
    'glm_4_5_air': (dict(  # GLM-4-MoE with one MTP layer
        d_model=4096, n_layers=46, n_heads=96, n_kv_heads=8, head_dim=128,
        d_ff=10944, vocab_size=151552, rope_theta=1e6, rotary=.5,
        norm_eps=1e-5, qkv_bias=True, tie_embeddings=False, experts=128,
        experts_per_token=8, expert_ff=1408, shared_experts=1, dense_layers=1),
                    dict(modules=1, concat='emb_h', hidden='post_norm')),
}
NAMES = tuple(_PRESETS)

# config.Model field -> key of config.json with the same meaning.
_SAME = {
    'd_model': 'hidden_size', 'n_layers': 'num_hidden_layers',
    'n_heads': 'num_attention_heads', 'n_kv_heads': 'num_key_value_heads',
    'd_ff': 'intermediate_size', 'vocab_size': 'vocab_size',
    'norm_eps': 'rms_norm_eps'}
_EXPERTS = {
    'experts': 'n_routed_experts', 'experts_per_token': 'num_experts_per_tok',
    'expert_ff': 'moe_intermediate_size', 'shared_experts': 'n_shared_experts',
    'dense_layers': 'first_k_dense_replace', 'router_groups': 'n_group',
    'router_top_groups': 'topk_group', 'router_scale': 'routed_scaling_factor',
    'norm_topk': 'norm_topk_prob', 'qkv_bias': 'attention_bias',
    'qk_norm': 'use_qk_norm'}
_ARCHITECTURES = {'llama': 'LlamaForCausalLM', 'qwen2': 'Qwen2ForCausalLM',
                  'qwen3': 'Qwen3ForCausalLM', 'mimo': 'MiMoForCausalLM',
                  'glm4_moe': 'Glm4MoeForCausalLM'}


def model(name):
  """Return the `config.Model` of a named architecture and its MTP fields.

  The second is a dict of `config.MTP` fields, empty where the published
  weights have no MTP modules (then set mtp.fresh=true to attach new ones).

  Raises:
    config.ConfigError: the name is unknown.
  """
  if name not in _PRESETS:
    raise config_lib.ConfigError(
        f'model preset {name!r} is unknown; choose from {", ".join(NAMES)}')
  fields, mtp = _PRESETS[name]
  return config_lib.Model(**fields), dict(mtp)


def family(model_config: config_lib.Model, modules):
  """Return the model_type of config.json that can express this architecture.

  Args:
    model_config: `config.Model`.
    modules: K.

  Raises:
    config.ConfigError: this project knows none that can.
  """
  m = model_config
  if m.experts:
    return 'glm4_moe'
  if m.rotary != 1 or (m.qkv_bias and m.qk_norm):
    raise config_lib.ConfigError(
        'no known Hugging Face architecture has experts=0 and rotary < 1, or '
        'both model.qkv_bias and model.qk_norm; set one of them false')
  if m.qk_norm:
    return 'qwen3'
  return ('mimo' if modules else 'qwen2') if m.qkv_bias else 'llama'


def to_hf(model_config: config_lib.Model, mtp: config_lib.MTP):
  """Return config.json as a dict; `from_hf` reads it back.

  Args:
    model_config: `config.Model` with its vocab_size set.
    mtp: `config.MTP`.
  """
  m, kind = model_config, family(model_config, mtp.modules)
  out = {'model_type': kind, 'architectures': [_ARCHITECTURES[kind]],
         'hidden_act': 'silu', 'torch_dtype': 'float32',
         'head_dim': m.head_dim or m.d_model // m.n_heads,
         'rope_theta': m.rope_theta, 'tie_word_embeddings': m.tie_embeddings,
         'num_nextn_predict_layers': mtp.modules,
         **{key: getattr(m, field) for field, key in _SAME.items()}}
  if kind == 'glm4_moe':
    out |= {key: getattr(m, field) for field, key in _EXPERTS.items()}
    out['partial_rotary_factor'] = m.rotary
  if mtp.modules:
    out['mtp_rl'] = {field: getattr(mtp, field) for field in MTP_FIELDS}
  return out


def _refuse_unknown(values):
  """Raise ConfigError if config.json sets what the decoder does not support."""
  kind = values.get('model_type')
  if kind not in _ARCHITECTURES:
    raise config_lib.ConfigError(
        f'config.json has model_type={kind!r}, but only '
        f'{", ".join(_ARCHITECTURES)} can be read')
  for name in ('rope_parameters', 'rope_scaling', 'mtp_rl'):
    if not isinstance(values.get(name) or {}, dict):
      raise config_lib.ConfigError(
          f'config.json sets {name}={values[name]!r}, which must be an object')
  rope = values.get('rope_parameters') or values.get('rope_scaling') or {}
  wrong = {
      'hidden_act': values.get('hidden_act', 'silu') != 'silu',
      'rope_scaling': rope.get('rope_type', rope.get('type', 'default'))
                      != 'default',
      'use_sliding_window': bool(values.get('use_sliding_window')),
      'mlp_bias': bool(values.get('mlp_bias')),
      # Llama's and Qwen3's attention bias is on the output as well.
      'attention_bias': kind in ('llama', 'qwen3') and bool(
          values.get('attention_bias'))}
  for name, bad in wrong.items():
    if bad:
      raise config_lib.ConfigError(
          f'config.json sets {name}={values.get(name, rope)!r}, which the '
          'decoder does not support; choose another model')


def from_hf(values):
  """Return the `config.Model` and MTP fields that a config.json describes.

  Args:
    values: the config.json as a dict.

  Raises:
    config.ConfigError: a field is missing, of a wrong type, or set to what the
      decoder does not support.
  """
  _refuse_unknown(values)
  kind = values['model_type']
  rope = {**values, **(values.get('rope_parameters') or {})}
  try:
    fields = {field: values[key] for field, key in _SAME.items()
              if field != 'n_kv_heads'}
    fields['n_kv_heads'] = (values.get('num_key_value_heads')
                            or fields['n_heads'])
    fields['head_dim'] = (values.get('head_dim')
                          or fields['d_model'] // fields['n_heads'])
    fields['rope_theta'] = rope.get('rope_theta', 10000.)
    if kind == 'glm4_moe':
      fields |= {field: values[key] for field, key in _EXPERTS.items()}
      fields['rotary'] = rope.get('partial_rotary_factor', .5)
  except KeyError as e:
    raise config_lib.ConfigError(f'config.json has no {e}; add that field'
                                 ) from e
  fields['tie_embeddings'] = bool(values.get('tie_word_embeddings', False))
  if kind in ('qwen2', 'mimo'):
    fields['qkv_bias'] = True
  if kind == 'qwen3':
    fields['qk_norm'] = True
  modules = values.get('num_nextn_predict_layers') or 0
  mtp = {}
  if modules:
    mtp = {'modules': modules, 'kind': 'sequential', 'hidden': 'post_norm',
           'concat': 'emb_h' if kind == 'glm4_moe' else 'h_emb',
           **(values.get('mtp_rl') or {})}
  for name, value in {**fields, **mtp}.items():
    default = getattr(config_lib.Model, name, getattr(config_lib.MTP, name, ''))
    kinds = (int, float) if isinstance(default, float) else type(default)
    if not isinstance(value, kinds) or (
        isinstance(value, bool) and not isinstance(default, bool)):
      raise config_lib.ConfigError(
          f'config.json gives {name} the value {value!r}, which is of another '
          'type; correct the file')
  return config_lib.Model(**fields), mtp


def differences(model_config: config_lib.Model, mtp: config_lib.MTP,
                found_model: config_lib.Model, found_mtp):
  """Return a list of 'field (config's value, file's value)' that differ.

  Args:
    model_config: `config.Model` that a run sets.
    mtp: `config.MTP` that it sets.
    found_model: `config.Model` of the file.
    found_mtp: MTP fields of the file, {} where it has no modules.
  """
  def full(m):
    channels = m.head_dim or m.d_model // m.n_heads
    return dataclasses.replace(m, head_dim=channels)
  a, b = full(model_config), full(found_model)
  pairs = [(f'model.{f}', getattr(a, f), getattr(b, f)) for f in MODEL_FIELDS
           if f != 'vocab_size' or a.vocab_size]
  if mtp.modules and found_mtp:
    pairs += [(f'mtp.{f}', getattr(mtp, f), found_mtp[f]) for f in MTP_FIELDS]
  return [f'{name} ({x!r}, {y!r})' for name, x, y in pairs
          if x != y and not (isinstance(x, float) and abs(x - y) < 1e-6 * abs(
              x))]
