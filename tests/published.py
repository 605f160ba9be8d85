"""Small models of each published family, with weights from a seed.

The weights are made under the names of the published checkpoints, so a
golden file needs to hold the logits alone.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import numpy as safe

from mtp_rl import config as config_lib
from mtp_rl.models import mtp as mtp_model
from mtp_rl.models import presets, pretrained, sources

V = 29
_SMALL = dict(d_model=24, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=40,
              vocab_size=V, remat='none', head_chunk=0)
_MODELS = {
    'llama': (dict(rope_theta=5e3, norm_eps=1e-5), {}),
    'qwen2': (dict(qkv_bias=True, tie_embeddings=False), {}),
    'qwen3': (dict(qk_norm=True, head_dim=8), {}),
    'mimo': (dict(qkv_bias=True, tie_embeddings=False, rope_theta=64e4),
             dict(modules=1)),
    'glm4_moe': (dict(
        qkv_bias=True, qk_norm=True, tie_embeddings=False, n_layers=3,
        head_dim=8, rotary=.5, experts=8, experts_per_token=3, expert_ff=12,
        shared_experts=2, dense_layers=1, router_groups=4, router_top_groups=2,
        router_scale=1.7), dict(modules=1, concat='emb_h')),
    'qwen3_moe': (dict(
        qk_norm=True, head_dim=8, n_layers=3, experts=8, experts_per_token=3,
        expert_ff=12, dense_layers=1, router='softmax'), {}),
}
FAMILIES = tuple(_MODELS)
TRUNKS = tuple(f for f in FAMILIES if f != 'mimo')  # known to transformers


def model(family, **mtp):
  """Return the `config.Model` and `config.MTP` of a family."""
  fields, own = _MODELS[family]
  return (config_lib.Model(**{**_SMALL, **fields}),
          config_lib.MTP(**{'modules': 0, **own, **mtp}))


def network(m, mtp):
  """Return the decoder and the ShapeDtypeStructs of its parameters."""
  net = mtp_model.Decoder(m, mtp)
  shapes = jax.eval_shape(net.init, jax.random.key(0),
                          jnp.zeros((1, 4), jnp.int32), jnp.ones((1, 4), bool))
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return net, jax.tree.map(lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=device), shapes['params'])


def weights(m, mtp, seed=0):
  """Return {published name: float32 array}, drawn from the seed."""
  rng = np.random.default_rng(seed)
  out = {}
  for name, shape in sorted(pretrained.shapes(
      network(m, mtp)[1], m, mtp.layout).items()):
    x = rng.normal(size=shape)
    if len(shape) == 2:
      x = x * (.4 if 'embed' in name else 1.4 / shape[1] ** .5)
    elif name.endswith('norm.weight'):
      x = 1 + .3 * x
    else:
      x = .3 * x  # biases, that of the router among them
    out[name] = x.astype(np.float32)
  return out


def write(folder, m, mtp, tensors, files=2, **config):
  """Write a Hugging Face folder by hand, in several files."""
  folder.mkdir(exist_ok=True)
  parts = [dict(list(tensors.items())[i::files]) for i in range(files)]
  where = {}
  for i, part in enumerate(parts):
    safe.save_file(part, folder / f'part-{i}.safetensors')
    where |= dict.fromkeys(part, f'part-{i}.safetensors')
  (folder / sources.INDEX).write_text(json.dumps({'weight_map': where}))
  values = presets.to_hf(m, mtp) | config
  (folder / 'config.json').write_text(json.dumps(values))
  return str(folder)


def tokens():
  """Return int32 [B, T] and bool [B, T]: ragged, padded left and right."""
  rng = np.random.default_rng(1)
  valid = np.zeros((3, 11), bool)
  for row, (start, stop) in enumerate([(0, 11), (4, 11), (2, 8)]):
    valid[row, start:stop] = True
  return np.where(valid, rng.integers(3, V, valid.shape), 0).astype(
      np.int32), valid


def logits(net, params):
  """Return the logits of the main head and of the MTP modules, [B, T, V]."""
  @jax.jit
  def run(params, tokens, valid):
    h, ahead = net.apply({'params': params}, tokens, valid)
    matrix = (params['lm_head']['kernel'] if 'lm_head' in params
              else params['embed']['embedding'].T)
    return [x @ matrix for x in (h, *ahead)]
  return [np.asarray(x) for x in run(params, *tokens())]
