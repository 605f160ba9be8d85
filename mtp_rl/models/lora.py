"""LoRA adapters: merged into the weights, or written in PEFT's format.

A projection with an adapter computes x W + (alpha / r) (x A) B, with A random
and B zero at the start (Hu et al. 2021, arXiv 2106.09685). The parameters A
and B stand beside W as 'lora_a' [in, r] and 'lora_b' [r, out]
(`transformer.Linear`); `tree.trained` says that they alone are trained.
"""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np

from mtp_rl import config as config_lib
from mtp_rl import tree as tree_lib
from mtp_rl.models import pretrained, sources

CONFIG, WEIGHTS = 'adapter_config.json', 'adapter_model.safetensors'


def merged(params, model_config: config_lib.Model, mtp: config_lib.MTP):
  """Return the parameters of the same model without adapters.

  Args:
    params: the parameters.
    model_config: `config.Model`.
    mtp: `config.MTP`.
  """
  def walk(node, gain):
    if not isinstance(node, dict):
      return node
    out = {k: walk(v, gain) for k, v in node.items()
           if k not in tree_lib.ADAPTER}
    if 'lora_a' in node:
      out['kernel'] = node['kernel'] + gain * jnp.matmul(
          node['lora_a'], node['lora_b'], precision=jax.lax.Precision.HIGHEST)
    return out

  gain = lambda c: c.lora_alpha / max(c.lora_rank, 1)
  return {k: walk(v, gain(mtp if k == tree_lib.PSI else model_config))
          for k, v in params.items()}


def _tensors(adapters, m, mtp):
  """Return {PEFT's name: array} of a tree of adapters."""
  out = {}
  leaves, _ = jax.tree_util.tree_flatten_with_path(adapters)
  for keys, leaf in leaves:
    module, _, kind = tree_lib.path(keys).rpartition('/')
    grid, _ = pretrained.names(f'{module}/kernel', m, mtp.layout)
    part = {'lora_a': 'lora_A', 'lora_b': 'lora_B'}[kind]
    for place in np.ndindex(grid.shape):
      stem = grid[place].removesuffix('.weight')
      out[f'base_model.model.{stem}.{part}.weight'] = np.ascontiguousarray(
          np.asarray(leaf[place], np.float32).T)
  return out


def save(folder, params, model_config: config_lib.Model, mtp: config_lib.MTP):
  """Write the adapters as folders that PEFT loads.

  The trunk's are in `folder`; those of the MTP modules, which transformers
  does not build with the model, in folder/mtp.

  Args:
    folder: path; must not hold adapters.
    params: the parameters, arrays that this process can read in full.
    model_config: `config.Model`.
    mtp: `config.MTP`.

  Raises:
    config.ConfigError: there are no adapters, or the folder cannot be used.
  """
  safe = sources.package('safetensors.numpy')
  trained = tree_lib.adapters(params)
  if not trained:
    raise config_lib.ConfigError(
        'this run has no adapters (model.lora_rank=0, mtp.lora_rank=0); write '
        'its weights instead')
  parts = ((folder, model_config, tree_lib.theta(trained)),
           (os.path.join(folder, 'mtp'), mtp, tree_lib.psi(trained)))
  for where, c, adapters in parts:
    if not adapters:
      continue
    try:
      os.makedirs(where, exist_ok=True)
    except OSError as e:
      raise config_lib.ConfigError(
          f'{where} cannot be written ({e.strerror}); choose another folder'
          ) from e
    if os.path.exists(os.path.join(where, WEIGHTS)):
      raise config_lib.ConfigError(f'{where} holds adapters already; choose '
                                   'another folder')
    held = _tensors(adapters, model_config, mtp)
    safe.save_file(held, os.path.join(where, WEIGHTS), {'format': 'pt'})
    values = {
        'peft_type': 'LORA', 'task_type': 'CAUSAL_LM', 'r': c.lora_rank,
        'lora_alpha': c.lora_alpha, 'lora_dropout': 0., 'bias': 'none',
        'target_modules': sorted({n.split('.')[-3] for n in held}),
        'fan_in_fan_out': False, 'inference_mode': True,
        'base_model_name_or_path': model_config.pretrained or None}
    with open(os.path.join(where, CONFIG), 'w', encoding='utf-8') as f:
      json.dump(values, f, indent=2)
