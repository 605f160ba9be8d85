"""Named architectures of the decoder, and Hugging Face's config.json.

With `model.pretrained` the config's fields must give the checkpoint's
architecture; a config file can take them from here:

    config.model, mtp = presets.model('mimo_7b')
    config.mtp = dataclasses.replace(config.mtp, **mtp)
"""

import dataclasses

from mtp_rl import config as config_lib
from mtp_rl.models import config_keys, rope

# Fields of config.Model and config.MTP that define an architecture; the others
# say how it is computed.
MODEL_FIELDS = (
    'd_model', 'n_layers', 'n_heads', 'n_kv_heads', 'head_dim', 'd_ff',
    'vocab_size', 'rope_theta', 'rotary', *rope.FIELDS, 'window',
    'window_layers', 'norm_eps', 'qkv_bias', 'qk_norm', 'tie_embeddings',
    'experts', 'experts_per_token', 'expert_ff', 'shared_experts',
    'dense_layers', 'router', 'router_groups', 'router_top_groups',
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
_QWEN_EXPERTS = {
    'experts': 'num_experts', 'experts_per_token': 'num_experts_per_tok',
    'expert_ff': 'moe_intermediate_size', 'norm_topk': 'norm_topk_prob'}
_ARCHITECTURES = {'llama': 'LlamaForCausalLM', 'qwen2': 'Qwen2ForCausalLM',
                  'qwen3': 'Qwen3ForCausalLM', 'mimo': 'MiMoForCausalLM',
                  'glm4_moe': 'Glm4MoeForCausalLM',
                  'qwen3_moe': 'Qwen3MoeForCausalLM'}
_MOST_LAYERS = 10_000  # beyond that a config.json is damaged


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
    kind = 'glm4_moe' if m.router == 'sigmoid' else 'qwen3_moe'
    plain = (m.qk_norm and not m.qkv_bias and not m.shared_experts
             and m.router_groups == 1 and m.router_scale == 1 and m.rotary == 1
             and not m.window_layers)
    fits = not m.window if kind == 'glm4_moe' else plain
  else:
    kind = 'qwen3' if m.qk_norm else (
        'mimo' if modules else 'qwen2') if m.qkv_bias else 'llama'
    fits = (m.rotary == 1 and not (m.qkv_bias and m.qk_norm)
            and not (m.window and kind == 'llama'))
  if not fits:
    raise config_lib.ConfigError(
        'no known Hugging Face architecture has these model.* fields together '
        '(model.rotary < 1 needs experts, model.window the fields of a Qwen, '
        'and no dense one has both model.qkv_bias and model.qk_norm); set them '
        'as a published model has them')
  return kind


def to_hf(model_config: config_lib.Model, mtp: config_lib.MTP, original=None,
          dtype='float32', **more):
  """Return config.json as a dict; `from_hf` reads it back.

  Args:
    model_config: `config.Model` with its vocab_size set.
    mtp: `config.MTP`.
    original: the config.json that the model was read from; every entry but
      those of `config_keys.MAY_DIFFER` is kept.
    dtype: of the tensors.
    **more: further entries of a new config.json; None leaves one out.
  """
  m = model_config
  if original is not None:
    found, modules = from_hf(original, mtp.layout)
    if not differences(m, mtp, found, {}):
      return _renewed(original, mtp, modules, dtype)
  kind = family(m, mtp.modules)
  out = {'model_type': kind, 'architectures': [_ARCHITECTURES[kind]],
         'hidden_act': 'silu', 'torch_dtype': dtype,
         'head_dim': m.head_dim or m.d_model // m.n_heads, **rope.write(m),
         'tie_word_embeddings': m.tie_embeddings,
         'num_nextn_predict_layers': mtp.modules,
         **{key: getattr(m, field) for field, key in _SAME.items()}}
  if kind == 'glm4_moe':
    out |= {key: getattr(m, field) for field, key in _EXPERTS.items()}
    out['partial_rotary_factor'] = m.rotary
  if kind == 'qwen3_moe':
    out |= {key: getattr(m, field) for field, key in _QWEN_EXPERTS.items()}
    out |= {'mlp_only_layers': list(range(m.dense_layers)),
            'decoder_sparse_step': 1}
  if m.window:
    out |= {'use_sliding_window': True, 'sliding_window': m.window}
    if kind != 'qwen3_moe':
      marks = m.window_layers or 's' * m.n_layers
      out['layer_types'] = [{'s': 'sliding_attention', 'f': 'full_attention'}[c]
                            for c in marks]
    if mtp.modules:
      out['mtp_layer_types'] = ['full_attention'] * mtp.modules
  if mtp.modules:
    out['mtp_rl'] = {field: getattr(mtp, field) for field in MTP_FIELDS}
  return out | {k: v for k, v in more.items() if v is not None}


def _renewed(original, mtp, found, dtype):
  """Return the original config.json with the dtype and modules of now."""
  out = dict(original)
  names = [k for k in ('dtype', 'torch_dtype') if k in out] or ['torch_dtype']
  out |= dict.fromkeys(names, dtype)
  fields = {field: getattr(mtp, field) for field in MTP_FIELDS}
  if mtp.modules != found.get('modules', 0):
    keys = ('num_nextn_predict_layers', 'num_mtp_layers')
    out |= dict.fromkeys([k for k in keys if k in out] or keys[:1],
                         mtp.modules)
  if mtp.modules and any(found.get(k) != v for k, v in fields.items()):
    out['mtp_rl'] = fields
  return out


def _kind(values):
  kind = values.get('model_type')
  if not isinstance(kind, str) or kind not in _ARCHITECTURES:
    raise config_lib.ConfigError(
        f'config.json has model_type={kind!r}, but only '
        f'{", ".join(_ARCHITECTURES)} can be read')
  return kind


def from_hf(values, layout=''):
  """Return the `config.Model` and MTP fields that a config.json describes.

  Args:
    values: the config.json as a dict.
    layout: that of the MTP modules' names in the file, if it is known.

  Raises:
    config.ConfigError: a field is missing, of a wrong type, or set to what the
      decoder does not support.
  """
  kind = _kind(values)
  config_keys.check(values, kind)
  try:
    fields = {field: values[key] for field, key in _SAME.items()
              if field != 'n_kv_heads' or kind != 'llama'}
    if fields.setdefault('n_kv_heads', values.get('num_key_value_heads')
                         ) is None:
      fields['n_kv_heads'] = fields['n_heads']
    if kind == 'qwen3' and 'head_dim' not in values:
      fields['head_dim'] = 128  # transformers' default
    else:
      fields['head_dim'] = (values.get('head_dim')
                            or fields['d_model'] // fields['n_heads'])
    table = {'glm4_moe': _EXPERTS, 'qwen3_moe': _QWEN_EXPERTS}.get(kind, {})
    if table:
      total = config_keys.first_of(values, table['experts'],
                                   'num_local_experts')
      fields |= {field: values[key] for field, key in table.items()
                 if field != 'experts' or total is None}
      fields.setdefault('experts', total)
  except KeyError as e:
    raise config_lib.ConfigError(f'config.json has no {e}; add that field'
                                 ) from e
  except (TypeError, ZeroDivisionError) as e:
    raise config_lib.ConfigError(
        f'config.json gives a size that cannot be used ({e}); correct the file'
        ) from e
  layers = fields['n_layers']
  if type(layers) is not int or not 0 < layers <= _MOST_LAYERS:
    config_keys.refuse('num_hidden_layers', layers, 'which must be an integer '
                       f'from 1 to {_MOST_LAYERS}')
  fields |= {'rotary': .5 if kind == 'glm4_moe' else 1., **rope.read(values)}
  if kind != 'glm4_moe' and fields['rotary'] != 1:
    config_keys.refuse('partial_rotary_factor', fields['rotary'])
  fields['tie_embeddings'] = bool(values.get('tie_word_embeddings', False))
  if kind in ('qwen2', 'mimo'):
    fields['qkv_bias'] = True
  if kind in ('qwen3', 'qwen3_moe'):
    fields['qk_norm'] = True
  _check_types(fields)
  fields |= config_keys.windows(values, kind, fields['n_layers'])
  if kind == 'qwen3_moe':
    fields |= {'router': 'softmax', 'dense_layers': config_keys.dense_prefix(
        values, fields['n_layers'])}
  mtp = _modules(values, kind, layout, fields)
  _check_types(mtp)
  return config_lib.Model(**fields), mtp


def _modules(values, kind, layout, fields):
  """Return the MTP fields that a config.json describes, {} without modules."""
  modules = config_keys.first_of(values, 'num_nextn_predict_layers',
                                 'num_mtp_layers')
  if not modules:
    return {}
  types = values.get('mtp_layer_types')
  full = types is None or (isinstance(types, list) and all(
      t == 'full_attention' for t in types))
  if not full or ('window' in fields and types is None):
    config_keys.refuse('mtp_layer_types', types, 'but the MTP modules of a '
                       'model with sliding windows must have full attention')
  deepseek = layout == 'deepseek' or 'experts' in fields
  first = values.get('mtp_hidden_states_first')
  concat = 'emb_h' if deepseek and not first else 'h_emb'
  if first is False:
    concat = 'emb_h'
  return {'modules': modules, 'kind': 'sequential', 'hidden': 'post_norm',
          'concat': concat, **(values.get('mtp_rl') or {})}


def _check_types(fields):
  """Raise ConfigError if a field has a value of another type."""
  for name, value in fields.items():
    default = getattr(config_lib.Model, name, getattr(config_lib.MTP, name, ''))
    kinds = (int, float) if isinstance(default, float) else type(default)
    if not isinstance(value, kinds) or (
        isinstance(value, bool) and not isinstance(default, bool)):
      raise config_lib.ConfigError(
          f'config.json gives {name} the value {value!r}, which is of another '
          'type; correct the file')


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
