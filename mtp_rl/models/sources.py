"""Where pretrained tensors come from: safetensors folders and GGUF files.

A source has `config`, the dict of a config.json; `shapes`, {name: shape}
under Hugging Face names; and `read(name, slices)`, a float NumPy array.
"""

import functools
import json
import os

import numpy as np

from mtp_rl import config as config_lib

INDEX = 'model.safetensors.index.json'
_FLOATS = 'F32', 'F16', 'BF16', 'F64'


def package(name):
  """Import a module of the extra 'models'; raises config.ConfigError."""
  return config_lib.optional(name, 'a published model', 'models')


def open_source(path):
  """Return the source at a path: a folder, or a file named *.gguf.

  Raises:
    config.ConfigError: there is none, or it cannot be read.
  """
  if os.path.isdir(path):
    return Folder(path)
  if path.endswith('.gguf') and os.path.isfile(path):
    return Gguf(path)
  raise config_lib.ConfigError(
      f'{path} is neither a folder with config.json and *.safetensors nor a '
      '.gguf file; set model.pretrained to one')


def _json(path):
  try:
    with open(path, encoding='utf-8') as f:
      values = json.load(f)
  except (OSError, ValueError, RecursionError) as e:
    raise config_lib.ConfigError(
        f'{path} cannot be read ({e}); name a complete folder') from e
  if not isinstance(values, dict):
    raise config_lib.ConfigError(f'{path} holds no JSON object; name another '
                                 'folder')
  return values


class Folder:
  """A Hugging Face folder; tensors stay on disk until they are read."""

  def __init__(self, path):
    """Read config.json and the headers of the safetensors files."""
    safetensors = package('safetensors')
    self.config = _json(os.path.join(path, 'config.json'))
    files = ['model.safetensors']
    index = os.path.join(path, INDEX)
    if os.path.exists(index):
      listed = _json(index).get('weight_map')
      if not isinstance(listed, dict):
        raise config_lib.ConfigError(f'{index} has no weight_map; name a '
                                     'complete folder')
      files = sorted({str(f) for f in listed.values()})
    self.shapes, self._handles = {}, {}
    for name in files:
      file = os.path.join(path, os.path.basename(name))
      try:
        handle = safetensors.safe_open(file, framework='np')
      except (OSError, safetensors.SafetensorError) as e:
        raise config_lib.ConfigError(
            f'{file} cannot be read ({e}); name a complete folder of '
            'safetensors files') from e
      for key in handle.keys():  # noqa: SIM118 a handle is no dict
        piece = handle.get_slice(key)
        if piece.get_dtype() not in _FLOATS:
          raise config_lib.ConfigError(
              f'{file} holds {key} as {piece.get_dtype()}, but only '
              f'{", ".join(_FLOATS)} can be read; convert it')
        self.shapes[key] = tuple(piece.get_shape())
        self._handles[key] = handle

  def read(self, name, slices):
    """Return a slice of a tensor; the rest of the tensor is not copied."""
    return self._handles[name].get_slice(name)[slices]


_GGUF_TOP = {'token_embd': 'model.embed_tokens', 'output_norm': 'model.norm',
             'output': 'lm_head'}
_GGUF_LAYER = {
    'attn_norm': 'input_layernorm', 'ffn_norm': 'post_attention_layernorm',
    'attn_q': 'self_attn.q_proj', 'attn_k': 'self_attn.k_proj',
    'attn_v': 'self_attn.v_proj', 'attn_output': 'self_attn.o_proj',
    'attn_q_norm': 'self_attn.q_norm', 'attn_k_norm': 'self_attn.k_norm',
    'ffn_gate': 'mlp.gate_proj', 'ffn_up': 'mlp.up_proj',
    'ffn_down': 'mlp.down_proj'}
_GGUF_CONFIG = {
    'hidden_size': 'embedding_length', 'num_hidden_layers': 'block_count',
    'num_attention_heads': 'attention.head_count',
    'intermediate_size': 'feed_forward_length',
    'rms_norm_eps': 'attention.layer_norm_rms_epsilon'}
_GGUF_IDS = {f'{name}_token_id': f'tokenizer.ggml.{theirs}_token_id'
             for name, theirs in (('bos', 'bos'), ('eos', 'eos'),
                                  ('pad', 'padding'))}


def _from_gguf(name):
  """Return a GGUF tensor's Hugging Face name; unknown names are kept."""
  stem, _, kind = name.rpartition('.')
  if stem in _GGUF_TOP:
    return f'{_GGUF_TOP[stem]}.{kind}'
  parts = stem.split('.')
  if len(parts) == 3 and parts[0] == 'blk' and parts[2] in _GGUF_LAYER:
    return f'model.layers.{parts[1]}.{_GGUF_LAYER[parts[2]]}.{kind}'
  return name


def _positive(path, key, value, kind):
  """Refuse a field that is no positive int, or no positive number."""
  kinds = (int,) if kind is int else (int, float)
  if type(value) not in kinds or not value > 0:
    raise config_lib.ConfigError(
        f'{path} has {key}={value!r}, which must be a positive '
        f'{kind.__name__}; choose another file')


class Gguf:
  """A GGUF file of a dense Llama, Qwen2 or Qwen3, dequantised as it is read.

  Llama's GGUF files order the rows of q and k for RoPE on pairs of neighbouring
  channels; `read` reorders them for ours, which pairs the halves of a head.
  """

  def __init__(self, path):
    """Read the header.

    Raises:
      config.ConfigError: the file is damaged or of another architecture.
    """
    gguf = package('gguf')
    try:
      reader = gguf.GGUFReader(path)
      fields = {k: f.contents() for k, f in reader.fields.items()
                if not k.startswith('tokenizer.') or k in _GGUF_IDS.values()}
    except Exception as e:  # the reader fails in many ways on a damaged file
      raise config_lib.ConfigError(f'{path} is no readable GGUF file '
                                   f'({type(e).__name__}: {e})') from e
    self._path, self._dequantize = path, gguf.quants.dequantize
    self._tensors = {_from_gguf(t.name): t for t in reader.tensors}
    self.shapes = {name: tuple(int(n) for n in t.shape[::-1])
                   for name, t in self._tensors.items()}
    self._kind = fields.get('general.architecture')
    self.config = self._config(path, fields)
    self._heads = {
        'q_proj': self.config['num_attention_heads'],
        'k_proj': self.config['num_key_value_heads']}
    self._whole = functools.lru_cache(maxsize=1)(self._dequantized)

  def _config(self, path, fields):
    get = lambda key, default=None: fields.get(f'{self._kind}.{key}', default)
    if self._kind not in ('llama', 'qwen2', 'qwen3') or get('expert_count'):
      raise config_lib.ConfigError(
          f'{path} is of architecture {self._kind!r}, but only dense llama, '
          'qwen2 and qwen3 GGUF files can be read')
    try:
      values = {ours: fields[f'{self._kind}.{theirs}']
                for ours, theirs in _GGUF_CONFIG.items()}
      values['vocab_size'] = self.shapes['model.embed_tokens.weight'][0]
    except KeyError as e:
      raise config_lib.ConfigError(
          f'{path} has no {e}; choose a complete file') from e
    for key, value in values.items():
      _positive(path, key, value, float if key == 'rms_norm_eps' else int)
    heads = values['num_attention_heads']
    channels = get('attention.key_length', values['hidden_size'] // heads)
    groups = get('attention.head_count_kv', heads)
    theta = get('rope.freq_base', 10000.)
    for key, value, kind in (('key_length', channels, int),
                             ('head_count_kv', groups, int),
                             ('freq_base', theta, float)):
      _positive(path, key, value, kind)
    scaling = get('rope.scaling.type')
    # Without a type llama.cpp takes it to be linear.
    stretched = scaling not in (None, 'none') or (scaling is None and any(
        get(f'rope.{key}', 1) not in (0, 1) for key in (
            'scaling.factor', 'scaling.attn_factor', 'scale_linear')))
    if stretched or get('rope.dimension_count', channels) != channels:
      raise config_lib.ConfigError(
          f'{path} scales or shortens its rotary positions, which is not '
          'supported for GGUF files; choose another file')
    beside = {'max_position_embeddings': get('context_length')} | {
        ours: fields.get(theirs) for ours, theirs in _GGUF_IDS.items()}
    return values | {k: v for k, v in beside.items() if v is not None} | {
        'model_type': self._kind, 'head_dim': channels,
        'num_key_value_heads': groups, 'rope_theta': float(theta),
        'tie_word_embeddings': 'lm_head.weight' not in self.shapes}

  def _dequantized(self, name):
    tensor = self._tensors[name]
    try:
      x = self._dequantize(tensor.data, tensor.tensor_type)
      x = np.asarray(x, np.float32).reshape(self.shapes[name])
      heads = self._heads.get(name.split('.')[-2])
      if self._kind == 'llama' and heads:
        y = x.reshape(heads, -1, 2, *x.shape[1:])
        x = y.swapaxes(1, 2).reshape(x.shape)
    except (ValueError, NotImplementedError) as e:
      raise config_lib.ConfigError(
          f'{self._path}: {name} cannot be read ({e}); choose a file of '
          'another quantisation') from e
    return x

  def read(self, name, slices):
    """Return a slice of a tensor as float32."""
    return self._whole(name)[slices]
