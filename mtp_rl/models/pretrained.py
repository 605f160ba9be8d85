"""Pretrained weights: Hugging Face folders and GGUF files <-> parameters.

Reading and writing use one table of the names of each parameter in published
checkpoints. Tensors are read one at a time, and only those rows and columns
that this process's devices hold; nothing is unpickled. Names of MTP modules:

    'mimo' (any dense model)         model.mtp_layers.<k-1>.*
    'deepseek' (those with experts)  model.layers.<n_layers+k-1>.*

`mtp.layout` chooses another one than the family's.
"""

import json
import os
import re

import jax
import ml_dtypes
import numpy as np

from mtp_rl import config as config_lib
from mtp_rl import tree as tree_lib
from mtp_rl.models import config_keys, presets, sources

_LAYER = {
    'attention_norm': 'input_layernorm',
    'attention/query': 'self_attn.q_proj', 'attention/key': 'self_attn.k_proj',
    'attention/value': 'self_attn.v_proj', 'attention/out': 'self_attn.o_proj',
    'attention/query_norm': 'self_attn.q_norm',
    'attention/key_norm': 'self_attn.k_norm',
    'mlp_norm': 'post_attention_layernorm'}
_MLP = {name: f'{name}_proj' for name in ('gate', 'up', 'down')}
_MODULES = {
    'mimo': {'hidden_norm': 'hidden_layernorm',
             'embedding_norm': 'token_layernorm', 'proj': 'input_proj',
             'final_norm': 'final_layernorm'},
    'deepseek': {'hidden_norm': 'hnorm', 'embedding_norm': 'enorm',
                 'proj': 'eh_proj', 'final_norm': 'shared_head.norm'}}
_TOP = {'embed': 'model.embed_tokens', 'final_norm': 'model.norm',
        'lm_head': 'lm_head'}


def _in_layer(module, sparse):
  """Return the name inside a layer, '{}' where an expert's number goes."""
  if module in _LAYER:
    return _LAYER[module]
  if module == 'experts/router':
    return 'mlp.gate'
  if module.startswith('experts/'):
    return 'mlp.experts.{}.' + _MLP[module.split('/')[1]]
  return ('mlp.shared_experts.' if sparse else 'mlp.') + _MLP[module]


def layout(m: config_lib.Model, chosen=''):
  """Return 'mimo' or 'deepseek': the names of the MTP modules in a file.

  Args:
    m: `config.Model`.
    chosen: mtp.layout.
  """
  return chosen or ('deepseek' if m.experts else 'mimo')


def _mtp_prefix(depth, m: config_lib.Model, chosen):
  if layout(m, chosen) == 'deepseek':
    return f'model.layers.{m.n_layers + depth - 1}.'
  return f'model.mtp_layers.{depth - 1}.'


def names(path, m: config_lib.Model, chosen=''):
  """Return the names of one parameter in a published checkpoint.

  Args:
    path: '/'-joined path of the parameter.
    m: `config.Model`.
    chosen: mtp.layout.

  Returns:
    array of str, shaped as the parameter's stacked leading dimensions (layers,
    experts), and whether each tensor is the transpose of ours.
  """
  *module, kind = path.split('/')
  last = '.bias' if kind == 'bias' else '.weight'
  if module[-2:] == ['experts', 'router'] and kind == 'bias':
    last = '.e_score_correction_bias'
  prefixes, sparse = None, bool(m.experts)
  if module[0] == 'blocks':
    dense = m.dense_layers if m.experts else 0
    layers = range(dense, m.n_layers)
    if module[1] == 'dense':
      layers, sparse = range(dense), False
    prefixes = [f'model.layers.{i}.' for i in layers]
    name = _in_layer('/'.join(module[2:]), sparse)
  elif module[0] == tree_lib.PSI:
    prefixes = _mtp_prefix(int(module[1].removeprefix('depth_')), m, chosen)
    own = _MODULES[layout(m, chosen)]
    name = (own[module[2]] if module[2] in own
            else _in_layer('/'.join(module[3:]), sparse))
  else:
    prefixes, name = _TOP[module[0]], ''
  grid = np.asarray(prefixes, object)
  if '{}' in name:
    grid = np.asarray([[p + name.format(e) + last for e in range(m.experts)]
                       for p in np.atleast_1d(grid)], object)
    grid = grid if module[0] == 'blocks' else grid[0]
  else:
    grid = grid + (name + last)
  return np.asarray(grid, object), kind == 'kernel'


def _table(abstract, m: config_lib.Model, chosen=''):
  """Return {path: (leaf, names, transposed)} of a tree of parameters."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(abstract)
  return {tree_lib.path(keys): (leaf, *names(tree_lib.path(keys), m, chosen))
          for keys, leaf in leaves}


def shapes(abstract, m: config_lib.Model, chosen=''):
  """Return {checkpoint name: shape} of parameters (arrays or abstract)."""
  out = {}
  for leaf, grid, transposed in _table(abstract, m, chosen).values():
    shape = leaf.shape[grid.ndim:]
    out |= dict.fromkeys(grid.flat, shape[::-1] if transposed else shape)
  return out


def _copies(m: config_lib.Model, modules, chosen=''):
  """Return {name: original} of the tensors that repeat another one."""
  head = 'lm_head' if not m.tie_embeddings else 'model.embed_tokens'
  out = {'lm_head.weight': head + '.weight'} if m.tie_embeddings else {}
  if layout(m, chosen) == 'deepseek':
    for depth in range(1, modules + 1):
      prefix = _mtp_prefix(depth, m, chosen)
      out[prefix + 'embed_tokens.weight'] = 'model.embed_tokens.weight'
      out[prefix + 'shared_head.head.weight'] = head + '.weight'
  return out


def _left_out(name, m, modules, chosen):
  """Return whether a tensor belongs to a deeper MTP module or is a buffer."""
  deepseek = layout(m, chosen) == 'deepseek'
  pattern = (r'model\.layers\.(\d+)\.' if deepseek
             else r'model\.mtp_layers\.(\d+)\.')
  found = re.match(pattern, name)
  first = m.n_layers if deepseek else 0
  return name.endswith('rotary_emb.inv_freq') or bool(
      found and int(found[1]) >= first + modules)


def _compare(path, wanted, have, m, mtp):
  """Raise one ConfigError that lists every tensor that does not fit."""
  copies = _copies(m, mtp.modules, mtp.layout)
  extra = sorted(n for n in have.keys() - wanted.keys() - copies.keys()
                 if not _left_out(n, m, mtp.modules, mtp.layout))
  missing = sorted(wanted.keys() - have.keys())
  odd = [f'{n} {tuple(have[n])} for {tuple(wanted[n])}'
         for n in sorted(wanted.keys() & have.keys())
         if tuple(have[n]) != tuple(wanted[n])]
  parts = [f'{what}: {", ".join(some)}' for what, some in (
      ('unknown', extra), ('missing', missing), ('of another shape', odd))
      if some]
  if parts:
    raise config_lib.ConfigError(
        f'the tensors of {path} are not those of the config\'s model; '
        f'{"; ".join(parts)}; set model.* as the checkpoint has it')


def _check_copies(path, source, m, mtp, rows=4096):
  for name, original in _copies(m, mtp.modules, mtp.layout).items():
    if name not in source.shapes:
      continue
    shape = source.shapes[original]
    for start in range(0, shape[0], rows):
      piece = (slice(start, min(start + rows, shape[0])), slice(0, shape[1]))
      if source.shapes[name] != shape or not np.array_equal(
          source.read(name, piece), source.read(original, piece)):
        raise config_lib.ConfigError(
            f'{name} of {path} differs from {original}, but the decoder shares '
            'them; set mtp.modules=0 or choose another checkpoint')


def _array(source, leaf, grid, transposed):
  """Return one parameter; each tensor fills its part of all shards here."""
  places = lambda index: tuple(range(n)[s] for s, n in zip(index, leaf.shape))
  shards = {places(index): None for index in
            leaf.sharding.addressable_devices_indices_map(leaf.shape).values()}
  for ranges in shards:
    shards[ranges] = np.empty([len(r) for r in ranges], np.float32)
  for at in np.ndindex(grid.shape):
    for ranges, out in shards.items():
      if all(i in r for i, r in zip(at, ranges)):
        piece = tuple(slice(r.start, r.stop) for r in ranges[grid.ndim:])
        x = source.read(grid[at], piece[::-1] if transposed else piece)
        out[tuple(i - r.start for i, r in zip(at, ranges))] = (
            x.T if transposed else x)
  # Wait, so that this parameter's buffers are freed before the next is read.
  return jax.block_until_ready(jax.make_array_from_callback(
      leaf.shape, leaf.sharding, lambda index: shards[places(index)]))


def _held_layout(source, m):
  """Return the layout of a file's MTP modules, '' if it has none."""
  for name in ('mimo', 'deepseek'):
    if any(n.startswith(_mtp_prefix(1, m, name)) for n in source.shapes):
      return name
  return ''


def check(path, model_config: config_lib.Model, mtp: config_lib.MTP):
  """Return the source at a path if its architecture is the config's.

  Raises:
    config.ConfigError: it cannot be read, or fields differ (each is named).
  """
  source = sources.open_source(path)
  held = _held_layout(source, model_config)
  used = layout(model_config, mtp.layout)
  if mtp.modules and held not in ('', used):
    raise config_lib.ConfigError(
        f'{path} names its MTP modules as {held} does, but mtp.layout is '
        f'{used}; set mtp.layout={held}')
  found = presets.differences(model_config, mtp,
                              *presets.from_hf(source.config, held or used))
  if found:
    raise config_lib.ConfigError(
        f'{path} is of another architecture: (config, file) differ in '
        f'{", ".join(found)}; set them as the file has them')
  return source


def load(path, abstract, model_config: config_lib.Model, mtp: config_lib.MTP,
         fresh=None):
  """Read a checkpoint straight into sharded arrays.

  Host memory, in addition to the arrays: this process's shards of one parameter
  and one tensor.

  Args:
    path: Hugging Face folder (config.json, *.safetensors) or GGUF file.
    abstract: parameters as ShapeDtypeStructs with shardings.
    model_config: `config.Model`.
    mtp: `config.MTP`.
    fresh: values of the MTP modules for depths that the checkpoint lacks (a
      tree like abstract['mtp']), or None to refuse that.

  Returns:
    the parameters, a tree like abstract.

  Raises:
    config.ConfigError: the checkpoint is unreadable or of another
      architecture; every unknown, missing and misshapen tensor is named.
  """
  m, source = model_config, check(path, model_config, mtp)
  new = [k for k in range(1, mtp.modules + 1) if not any(
      n.startswith(_mtp_prefix(k, m, mtp.layout)) for n in source.shapes)]
  if new and fresh is None:
    raise config_lib.ConfigError(
        f'{path} has no MTP weights for depth {new[0]}; set mtp.fresh=true '
        'for new modules, or mtp.modules to the number it has')
  kept = {f'depth_{k}': fresh[f'depth_{k}'] for k in new}
  stored = {**abstract}
  if new:
    stored[tree_lib.PSI] = {k: v for k, v in abstract[tree_lib.PSI].items()
                            if k not in kept}
  _compare(path, shapes(stored, m, mtp.layout), source.shapes, m, mtp)
  _check_copies(path, source, m, mtp)
  out = jax.tree_util.tree_map_with_path(
      lambda keys, leaf: _array(
          source, leaf, *names(tree_lib.path(keys), m, mtp.layout)),
      stored)
  if new:
    out[tree_lib.PSI] |= kept
  return out


def tensors(params, model_config: config_lib.Model, mtp: config_lib.MTP):
  """Yield (name, shape, read) of a published checkpoint of the parameters.

  Args:
    params: the parameters, arrays that this process can read in full.
    model_config: `config.Model`.
    mtp: `config.MTP`.
  """
  table = _table(params, model_config, mtp.layout)
  for leaf, grid, transposed in table.values():
    shape = leaf.shape[grid.ndim:]
    for place in np.ndindex(grid.shape):
      def read(leaf=leaf, place=place, transposed=transposed):
        x = np.asarray(leaf[place])
        return x.T if transposed else x
      yield grid[place], shape[::-1] if transposed else shape, read
  originals = {grid[()]: (leaf, transposed) for leaf, grid, transposed in
               table.values() if not grid.ndim}
  for name, original in _copies(model_config, mtp.modules,
                                mtp.layout).items():
    if name != 'lm_head.weight':
      leaf, transposed = originals[original]
      yield (name, leaf.shape[::-1] if transposed else leaf.shape,
             lambda x=leaf, t=transposed: np.asarray(x).T if t
             else np.asarray(x))


def new_folder(folder, model_config: config_lib.Model, mtp: config_lib.MTP,
               **about):
  """Create a folder for `save` and return its config.json as a dict.

  Args:
    folder, model_config, mtp: see `save`.
    **about: see `presets.to_hf`.

  Raises:
    config.ConfigError: the folder holds weights or cannot be written, or no
      known architecture fits the model.
  """
  sources.package('safetensors')  # fails before any work
  values = presets.to_hf(model_config, mtp, **about)
  try:
    os.makedirs(folder, exist_ok=True)
    held = os.listdir(folder)
  except OSError as e:
    raise config_lib.ConfigError(
        f'{folder} cannot be written ({e.strerror}); choose another folder'
        ) from e
  if any(n.endswith('.safetensors') for n in held):
    raise config_lib.ConfigError(f'{folder} holds weights already; choose '
                                 'another folder')
  return values


def save(folder, params, model_config: config_lib.Model, mtp: config_lib.MTP,
         dtype='float32', shard_bytes=2 ** 31, **about):
  """Write a Hugging Face folder: config.json, shards and their index.

  Takes host memory for one shard. Works in one process, which must hold all
  arrays in full.

  Args:
    folder: path, see `new_folder`.
    params: the parameters.
    model_config: `config.Model`, vocab_size set.
    mtp: `config.MTP`.
    dtype: 'float32' (exact) or 'bfloat16'; tensors of `config_keys.FLOAT32`
      are float32 in either case.
    shard_bytes: most bytes of a file, unless it is one larger tensor.
    **about: see `presets.to_hf`.

  Raises:
    config.ConfigError: see `new_folder`.
  """
  safe = sources.package('safetensors.numpy')
  values = new_folder(folder, model_config, mtp, dtype=dtype, **about)
  exact = config_keys.FLOAT32.get(values['model_type'], ())
  kind = lambda name: np.dtype(
      np.float32 if name.endswith(exact) and exact
      else getattr(ml_dtypes, dtype, dtype))
  shards, size = [[]], 0
  for name, shape, read in tensors(params, model_config, mtp):
    n = int(np.prod(shape)) * kind(name).itemsize
    if size + n > shard_bytes and shards[-1]:
      shards.append([])
      size = 0
    shards[-1].append((name, read))
    size += n
  where, total = {}, 0
  for i, shard in enumerate(shards, 1):
    file = ('model.safetensors' if len(shards) == 1 else
            f'model-{i:05d}-of-{len(shards):05d}.safetensors')
    held = {name: np.ascontiguousarray(read().astype(kind(name)))
            for name, read in shard}
    safe.save_file(held, os.path.join(folder, file), {'format': 'pt'})
    where |= dict.fromkeys(held, file)
    total += sum(x.nbytes for x in held.values())
  if len(shards) > 1:
    with open(os.path.join(folder, sources.INDEX), 'w', encoding='utf-8') as f:
      json.dump({'metadata': {'total_size': total}, 'weight_map': where}, f,
                indent=1)
  with open(os.path.join(folder, 'config.json'), 'w', encoding='utf-8') as f:
    json.dump(values, f, indent=2)
