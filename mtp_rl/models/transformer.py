"""A pre-norm decoder: RMSNorm, RoPE, grouped-query attention, SwiGLU.

With `model.experts` the SwiGLU of all but the first `model.dense_layers` layers
is a mixture of experts (`moe.py`).

Other packages see `params`, a plain nested dict with the top level keys
'embed', 'blocks' (layers stacked on axis 0), 'final_norm', 'lm_head' (untied
only) and 'mtp' (K > 0 only). New tokens attend to the keys and values of
earlier columns, an argument; their own are a result, which the caller keeps.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from mtp_rl import config as config_lib
from mtp_rl import sharding
from mtp_rl.models import attention, moe, rope

_TOGETHER = 4  # rows of the cache written in a step; of one libtpu 0.0.42 fails


def _product(x, kernel, out):
  return jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=out)


def _narrow_backward(out, saved, dy):
  x, kernel = saved
  dy = dy.astype(x.dtype)
  dx = jnp.matmul(dy, kernel.astype(x.dtype).T)
  return dx, jnp.matmul(x.T, dy, preferred_element_type=kernel.dtype)


_narrow = jax.custom_vjp(_product, nondiff_argnums=(2,))
_narrow.defvjp(lambda x, kernel, out: (_product(x, kernel, out), (x, kernel)),
               _narrow_backward)


def matmul(x, kernel, out=None):
  """Return x W, with the gradient of W in W's own dtype.

  If x is bfloat16, a float32 W is cast to bfloat16 for the product; autodiff
  would then round dW to bfloat16 before summing it over devices.

  Args:
    x: [N, D].
    kernel: [D, F].
    out: dtype of the result; None: that of x.
  """
  out = jnp.dtype(out or x.dtype)
  if x.dtype == kernel.dtype:
    return jnp.matmul(x, kernel, preferred_element_type=out)
  return _narrow(x, kernel, out)


class Linear(nn.Module):
  """y = x W + b, with the leading axes flattened to one before the matmul.

  On CPU one [tokens, D] matmul is 1.7 times as fast as [B, T, D]; elsewhere it
  makes no difference.
  """
  features: int
  use_bias: bool = False
  dtype: jnp.dtype = jnp.float32
  rank: int = 0  # of a LoRA adapter; see models/lora.py
  gain: float = 1.

  @nn.compact
  def __call__(self, x):
    init = nn.initializers.lecun_normal()
    kernel = self.param('kernel', init, (x.shape[-1], self.features))
    flat = x.reshape(-1, x.shape[-1]).astype(self.dtype)
    y = matmul(flat, kernel)
    if self.rank:
      a = self.param('lora_a', init, (x.shape[-1], self.rank))
      b = self.param('lora_b', nn.initializers.zeros,
                     (self.rank, self.features))
      y = y + matmul(matmul(flat, a), b) * jnp.asarray(self.gain, self.dtype)
    if self.use_bias:
      bias = self.param('bias', nn.initializers.zeros, (self.features,))
      if jnp.dtype(self.dtype).itemsize < 4:  # the gradient in float32
        kind = jnp.finfo(self.dtype)
        rounded = jax.lax.reduce_precision(bias, kind.nexp, kind.nmant)
        bias = bias + jax.lax.stop_gradient(rounded - bias)
      y = (y + bias).astype(self.dtype)
    return y.reshape(*x.shape[:-1], self.features)


def projection(m: config_lib.Model, features, name, use_bias=False):
  """Return a block's `Linear` of that name, with an adapter if it is to have.

  Args:
    m: `config.Model`.
    features: its outputs.
    name: as in model.lora_targets.
    use_bias: whether it has a bias.
  """
  rank = m.lora_rank if name in m.lora_targets.split(',') else 0
  gain = m.lora_alpha / rank if rank else 1.
  return Linear(features, use_bias, jnp.dtype(m.dtype), rank, gain, name=name)


class RMSNorm(nn.Module):
  """x / rms(x) * scale, computed in float32 and returned in x's dtype."""
  eps: float

  @nn.compact
  def __call__(self, x):
    scale = self.param('scale', nn.initializers.ones, (x.shape[-1],))
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)
    return (y * scale).astype(x.dtype)


def rope_angles(positions, channels, theta, stretched=None):
  """Return cos and sin of the rotary angles, float32 [B, T, 1, C/2] each.

  Args:
    positions: int32 [B, T].
    channels: C, channels of a head that RoPE turns; see `rotary_channels`.
    theta: base of the frequencies theta^(-2c / C).
    stretched: frequencies in their place, and a gain; see `rope.stretched`.
  """
  if stretched is None:
    frequency = theta ** (-jnp.arange(0, channels, 2, jnp.float32) / channels)
    gain = 1.
  else:
    frequency, gain = stretched
  angles = positions[..., None, None].astype(jnp.float32) * frequency
  if gain == 1:
    return jnp.cos(angles), jnp.sin(angles)
  return jnp.cos(angles) * gain, jnp.sin(angles) * gain


def rotate(x, cos, sin):
  """Apply RoPE to [B, T, heads, C], first half paired with second half.

  If the angles are for fewer channels, the others are returned unchanged.
  """
  turned = 2 * cos.shape[-1]
  a, b = jnp.split(x[..., :turned].astype(jnp.float32), 2, axis=-1)
  y = jnp.concatenate([a * cos - b * sin, b * cos + a * sin],
                      -1).astype(x.dtype)
  if turned == x.shape[-1]:
    return y
  return jnp.concatenate([y, x[..., turned:]], -1)


def rematerialised(module, policy):
  """Return the module class under a rematerialisation policy.

  For the backward pass 'none' keeps everything, 'dots' the results of weight
  matmuls and of attention (fastest on CPU: 1.3 times 'none' at d 128, 4
  layers), 'attention' the results of attention, 'block' the inputs alone.
  """
  if policy == 'none':
    return module
  policies = jax.checkpoint_policies
  saved = {
      'dots': policies.save_from_both_policies(
          policies.dots_with_no_batch_dims_saveable,
          policies.save_only_these_names(attention.NAME)),
      'attention': policies.save_only_these_names(attention.NAME),
      'block': policies.nothing_saveable}[policy]
  return nn.remat(module, prevent_cse=False, policy=saved)


class Attention(nn.Module):
  """Causal grouped-query self-attention; see `Block` for the arguments."""
  config: config_lib.Model

  @nn.compact
  def __call__(self, x, layer, angles, rows, past):
    m = self.config
    channels = head_channels(m)
    linear = functools.partial(projection, m)
    split = lambda y, n: y.reshape(*y.shape[:2], n, channels)
    q = split(linear(m.n_heads * channels, 'query', m.qkv_bias)(x), m.n_heads)
    k = split(linear(m.n_kv_heads * channels, 'key', m.qkv_bias)(x),
              m.n_kv_heads)
    v = split(linear(m.n_kv_heads * channels, 'value', m.qkv_bias)(x),
              m.n_kv_heads)
    if m.qk_norm:
      q = RMSNorm(m.norm_eps, name='query_norm')(q)
      k = RMSNorm(m.norm_eps, name='key_norm')(k)
    q, k = rotate(q, *angles), rotate(k, *angles)
    rows = attention.in_window(
        rows, m, layer, x.shape[1] if past is None else past.key.shape[3])
    if past is None:
      kind = attention.resolve(m.attention, channels, x.shape[1], m.dtype,
                               rows.window is not None)
      y = attention.attend(q, k, v, rows, kind)
    else:
      y = attention.with_past(q, k, v, past, layer, rows)
    y = linear(m.d_model, 'out')(y.reshape(*x.shape[:2], -1))
    return y, (k.swapaxes(1, 2), v.swapaxes(1, 2))


class Block(nn.Module):
  """Attention and SwiGLU, each behind a norm and a residual.

  Takes x [B, T, D] and returns it with the tokens' keys and values, two arrays
  [B, N, T, C], or None if `keep` is False. `past` is an `attention.Past`, in
  which `layer` is this one, or None. Called under `nn.scan`. A sparse block
  has `moe.Experts`, and the experts that all tokens share as its SwiGLU.
  """
  config: config_lib.Model
  sparse: bool = False
  keep: bool = False

  @nn.compact
  def __call__(self, x, layer, angles, rows, past):
    m = self.config
    linear = functools.partial(projection, m)
    y, new = Attention(m, name='attention')(
        RMSNorm(m.norm_eps, name='attention_norm')(x), layer, angles, rows,
        past)
    x = x + y
    y = RMSNorm(m.norm_eps, name='mlp_norm')(x)
    width = m.shared_experts * m.expert_ff if self.sparse else m.d_ff
    if self.sparse:
      x = x + moe.Experts(m, name='experts')(y, rows.queries > 0)
    if width:
      z = nn.silu(linear(width, 'gate')(y)) * linear(width, 'up')(y)
      x = x + linear(m.d_model, 'down')(z)
    return sharding.constrain_batch(x), new if self.keep else None


class Stack(nn.Module):
  """n_layers blocks, scanned, their parameters stacked on axis 0.

  'layers' holds all of them; or, with experts, 'dense' holds the first
  model.dense_layers and 'layers' the others.
  """
  config: config_lib.Model

  @nn.compact
  def __call__(self, x, angles, rows, past=None, keep=False):
    """Return x, and the keys and values [L, B, N, T, C] if `keep`."""
    m = self.config
    block = rematerialised(Block, m.remat)
    dense = m.dense_layers if m.experts else 0
    new = []
    for name, layers, sparse in (
        ('dense', jnp.arange(dense), False),
        ('layers', jnp.arange(dense, m.n_layers), bool(m.experts))):
      if not layers.size:
        continue
      scanned = nn.scan(
          block, variable_axes={'params': 0, moe.LOAD: 0},
          split_rngs={'params': True},
          in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
          length=layers.size)
      x, made = scanned(m, sparse, keep, name=name)(x, layers, angles, rows,
                                                    past)
      new.append(made)
    if not keep:
      return x, None
    return x, jax.tree.map(lambda *parts: jnp.concatenate(parts), *new)


class Embedding(nn.Module):
  """The token table, float32 [V, D]."""
  vocab_size: int
  width: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, tokens):
    table = self.param('embedding', nn.initializers.normal(0.02),
                       (self.vocab_size, self.width))
    x = jnp.take(table, tokens, axis=0).astype(self.dtype)
    return sharding.constrain_batch(x)


def head_channels(model_config: config_lib.Model):
  """Return C, the channels of one attention head."""
  return model_config.head_dim or model_config.d_model // model_config.n_heads


def rotary_channels(model_config: config_lib.Model):
  """Return the channels of one head that RoPE turns."""
  return int(head_channels(model_config) * model_config.rotary)


def angles_of(model_config: config_lib.Model, positions):
  """Return the `rope_angles` of a model at positions, int32 [B, T]."""
  channels = rotary_channels(model_config)
  return rope_angles(positions, channels, model_config.rope_theta,
                     rope.stretched(model_config, channels))


def positions_of(segments):
  """Return int32 [B, T]: each token's place among its segment's tokens.

  Args:
    segments: int32 [B, T], 0 at padding; or bool, one segment a row.
  """
  segments = segments.astype(jnp.int32)
  there = segments > 0
  count = jnp.cumsum(there.astype(jnp.int32), axis=1)
  before = jnp.pad(segments, ((0, 0), (1, 0)))[:, :-1]
  start = jax.lax.cummax(
      jnp.where(there & (segments != before), count, 0), axis=1)
  return jnp.maximum(count - jnp.maximum(start, 1), 0)


def write(cache, new, columns):
  """Return a cache with the keys and values of new tokens in it.

  Args:
    cache: arrays [L, B, N, U, C].
    new: the same of W tokens a row, [L, B, N, W, C].
    columns: int32 [B], each row's first column to write.
  """
  new = jax.tree.map(lambda c, x: x.astype(c.dtype), cache, new)
  mesh = jax.sharding.get_abstract_mesh()
  apart = 1 if mesh.empty else sharding.batch_size(mesh)
  if sharding.platform() != 'tpu' or len(columns) % (apart * _TOGETHER):
    put = lambda c, x: _scatter(c, x, columns)
    return jax.tree.map(lambda c, x: constrain_cache(put(c, x)), cache, new)
  # XLA for TPU would lay a scatter's result out otherwise than the layers read
  # it, and copy the whole cache in every step.
  if mesh.empty or mesh.size == 1:
    return _by_rows(cache, new, columns)
  split = P(None, sharding.BATCH, None if cache[0].shape[2]
            % mesh.shape['tensor'] else 'tensor')
  return jax.shard_map(
      _by_rows, in_specs=(split, split, P(sharding.BATCH)), out_specs=split,
      check_vma=False)(cache, new, columns)


def _scatter(c, x, columns):
  """Write one window a row; vmap of an update would transpose the cache."""
  windows = jax.lax.ScatterDimensionNumbers(
      update_window_dims=(0, 2, 3, 4), inserted_window_dims=(),
      scatter_dims_to_operand_dims=(3,), operand_batching_dims=(1,),
      scatter_indices_batching_dims=(0,))
  return jax.lax.scatter(c, columns[:, None], x, windows, unique_indices=True,
                         mode='promise_in_bounds')


def _by_rows(cache, new, columns):
  """Write a few rows after the others, in place."""
  def put(c, x):
    def some(step, c):
      for i in range(_TOGETHER):
        row = step * _TOGETHER + i
        c = jax.lax.dynamic_update_slice(
            c, jax.lax.dynamic_slice_in_dim(x, row, 1, 1),
            (0, row, 0, columns[row], 0))
      return c
    return jax.lax.fori_loop(0, len(columns) // _TOGETHER, some, c)
  return jax.tree.map(put, cache, new)


def constrain_cache(x):
  """Split keys or values [L, B, N, U, C] by rows, and heads over 'tensor'."""
  return sharding.constrain(x, None, sharding.BATCH, 'tensor', None, None)


def head_matrix(params):
  """Return the output head, float32 [D, V], tied to the embedding or not."""
  if 'lm_head' in params:
    return params['lm_head']['kernel']
  return params['embed']['embedding'].T
