"""What the keys of a config.json mean: read, without effect, or refused.

A key that is neither read nor known to leave the forward pass alone is
refused, since it may change the model.
"""

from mtp_rl import config as config_lib

# Keys that a written config.json may have with another value than the one it
# was read from: the dtype of the tensors, and the MTP modules, where a run has
# another number or kind of them. All others come out as they went in.
MAY_DIFFER = ('dtype', 'torch_dtype', 'num_nextn_predict_layers',
              'num_mtp_layers', 'mtp_rl')
# Tensors that transformers keeps in float32 where a checkpoint is bfloat16.
FLOAT32 = {'glm4_moe': ('mlp.gate.e_score_correction_bias',
                        'mlp.gate.weight')}

_DENSE = {
    'hidden_size', 'num_hidden_layers', 'num_attention_heads',
    'num_key_value_heads', 'intermediate_size', 'vocab_size', 'rms_norm_eps',
    'head_dim', 'hidden_act', 'tie_word_embeddings', 'rope_theta',
    'rope_scaling', 'rope_parameters', 'partial_rotary_factor',
    'max_position_embeddings', 'original_max_position_embeddings',
    'attention_bias', 'mlp_bias', 'num_nextn_predict_layers',
    'num_mtp_layers', 'mtp_hidden_states_first', 'mtp_layer_types', 'mtp_rl',
    'use_sliding_window', 'sliding_window', 'max_window_layers', 'layer_types'}
_EXPERTS = {'num_experts_per_tok', 'moe_intermediate_size', 'norm_topk_prob',
            'num_local_experts'}
_READ = {
    'glm4_moe': _DENSE | _EXPERTS | {
        'n_routed_experts', 'n_shared_experts', 'first_k_dense_replace',
        'n_group', 'topk_group', 'routed_scaling_factor', 'use_qk_norm'},
    'qwen3_moe': _DENSE | _EXPERTS | {
        'num_experts', 'decoder_sparse_step', 'mlp_only_layers'}}
# Without effect on the logits of these families: bookkeeping, training alone,
# what is computed beside the logits, and defaults of generation.
_WITHOUT_EFFECT = {
    'model_type', 'architectures', 'auto_map', '_name_or_path', '_commit_hash',
    'transformers_version', 'dtype', 'torch_dtype', 'use_cache', 'use_bfloat16',
    'initializer_range', 'attention_dropout', 'pretraining_tp', 'bos_token_id',
    'eos_token_id', 'pad_token_id', 'sep_token_id', 'decoder_start_token_id',
    'id2label', 'label2id', 'num_labels', 'problem_type', 'finetuning_task',
    'task_specific_params', 'tokenizer_class', 'prefix', 'return_dict',
    'output_attentions', 'output_hidden_states', 'output_router_logits',
    'router_aux_loss_coef', 'aux_loss_alpha', 'seq_aux', 'torchscript',
    'chunk_size_feed_forward', 'gradient_checkpointing', 'unsloth_version',
    'unsloth_fixed', '_attn_implementation_autoset', 'do_sample', 'temperature',
    'top_k', 'top_p', 'typical_p', 'num_beams', 'num_beam_groups', 'max_length',
    'min_length', 'repetition_penalty', 'length_penalty', 'early_stopping',
    'no_repeat_ngram_size', 'diversity_penalty', 'num_return_sequences',
    'output_scores', 'return_dict_in_generate', 'bad_words_ids',
    'forced_bos_token_id', 'forced_eos_token_id', 'suppress_tokens',
    'begin_suppress_tokens', 'remove_invalid_values', 'transformers.js_config',
    'exponential_decay_length_penalty', 'encoder_no_repeat_ngram_size'}
# Keys with the one value (beside null) at which they have no effect.
_OFF = {'use_mrope': False, 'is_encoder_decoder': False, 'is_decoder': False,
        'add_cross_attention': False, 'cross_attention_hidden_size': None,
        'tie_encoder_decoder': False, 'pruned_heads': {}, 'mlp_bias': False,
        'hidden_act': 'silu', 'rope_interleaved': False}
# The same in one family, where the value says what the family does anyway.
_OFF_IN = {'llama': {'is_llama_config': True},  # SmolLM2
           'qwen3_moe': {'shared_expert_intermediate_size': 0,  # Qwen3-Coder
                         'qkv_bias': False, 'use_qk_norm': True}}


def refuse(key, value, why='which the decoder does not support'):
  """Raise the ConfigError about one key."""
  raise config_lib.ConfigError(
      f'config.json sets {key}={value!r}, {why}; choose another model or '
      'correct the file')


def check(values, kind):
  """Refuse every key that may change the forward pass and is not read.

  Args:
    values: the config.json as a dict.
    kind: its model_type.

  Raises:
    config.ConfigError: one key and its value.
  """
  off = _OFF | _OFF_IN.get(kind, {})
  for key, value in values.items():
    if value is None:
      continue
    if key in off:
      if value != off[key]:
        refuse(key, value)
    elif key not in _READ.get(kind, _DENSE) and key not in _WITHOUT_EFFECT:
      refuse(key, value, 'which this project does not know and the forward '
             'pass may depend on')
  # In these families the attention's bias is on the output as well.
  if kind in ('llama', 'qwen3', 'qwen3_moe') and values.get('attention_bias'):
    refuse('attention_bias', values['attention_bias'])
  if values.get('mtp_rl') is not None and not isinstance(values['mtp_rl'],
                                                         dict):
    refuse('mtp_rl', values['mtp_rl'], 'which must be an object')


def first_of(values, *keys):
  """Return the value of whichever key is there; None if none is.

  Raises:
    config.ConfigError: two of them disagree.
  """
  found = {k: values[k] for k in keys if values.get(k) is not None}
  for key, value in found.items():
    if value != next(iter(found.values())):
      refuse(key, value, f'but another key of that meaning differs: {found!r}')
  return next(iter(found.values()), None)


def windows(values, kind, layers):
  """Return the fields window and window_layers, {} where nothing slides.

  Args:
    values: the config.json as a dict.
    kind: its model_type.
    layers: number of layers.
  """
  types, size = values.get('layer_types'), values.get('sliding_window')
  if types is not None and (
      not isinstance(types, list) or len(types) != layers
      or any(t not in ('full_attention', 'sliding_attention')
             for t in types)):
    refuse('layer_types', types, 'which must name full_attention or '
           f'sliding_attention for each of the {layers} layers')
  if kind in ('llama', 'glm4_moe') and size is not None:
    refuse('sliding_window', size)  # here a window has no switch
  on = bool(values.get('use_sliding_window')) and size is not None
  if types is None:
    first = values.get('max_window_layers')
    first = 28 if first is None else first
    first = 0 if kind == 'qwen3_moe' else first
    if not isinstance(first, int):
      refuse('max_window_layers', first, 'which must be an integer')
    slide = [on and i >= first for i in range(layers)]
  else:
    slide = [t == 'sliding_attention' for t in types]
    if kind == 'qwen3_moe' and slide != [on] * layers:
      refuse('layer_types', types, 'which this family does not read')
  if not any(slide):
    return {}
  if not on:
    refuse('layer_types', types, 'but no sliding window is switched on')
  if isinstance(size, bool) or not isinstance(size, int) or size < 1:
    refuse('sliding_window', size, 'which must be a positive integer')
  marks = ''.join('s' if s else 'f' for s in slide)
  return {'window': size, 'window_layers': marks if 'f' in marks else ''}


def dense_prefix(values, layers):
  """Return how many first layers of a Qwen3-MoE have no experts."""
  step = values.get('decoder_sparse_step')
  step, plain = 1 if step is None else step, values.get('mlp_only_layers') or []
  if isinstance(step, bool) or not isinstance(step, int) or step < 1:
    refuse('decoder_sparse_step', step, 'which must be a positive integer')
  if not isinstance(plain, list):
    refuse('mlp_only_layers', plain, 'which must be a list')
  sparse = [i not in plain and (i + 1) % step == 0 for i in range(layers)]
  first = sparse.index(True) if True in sparse else layers
  if not all(sparse[first:]) or first == layers:
    refuse('mlp_only_layers', plain, f'and decoder_sparse_step={step}; only '
           'the first layers can be without experts')
  return first
