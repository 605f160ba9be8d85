"""The expert layer: a router, and experts for the tokens it sends.

    s = sigmoid(x R)                        scores of all E experts, float32
    chosen = top-k of s + b                 b: correction bias, no gradient
    w = s_chosen [/ sum s_chosen] * scale
    y = sum_chosen w_e down_e(silu(gate_e x) * up_e x)

With groups, only the experts of the best groups can be chosen; a group's
rank is the sum of its two largest s + b. Source: DeepSeek-V3
(arXiv 2412.19437, equations 12-16), GLM-4.5 (arXiv 2508.06471). With
`model.router` 'softmax' (Qwen3-MoE, arXiv 2505.09388) s = softmax(x R), b = 0.

Copies of the tokens are sorted by expert. Two forms multiply them, for
different targets (`model.expert_form`):

    ragged   `jax.lax.ragged_dot` with the stacked matrices. XLA has a kernel
             for it on TPU; elsewhere it computes all E experts for every copy
    blocks   a loop over blocks of one expert's tokens: models/expert_blocks.py
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from mtp_rl import config as config_lib
from mtp_rl import sharding
from mtp_rl.models import expert_blocks

LOAD = 'load'  # collection that `Experts` writes to, if mutable


def load(variables):
  """Return the trunk's loads, int32 [B, L, E], or None without experts.

  Args:
    variables: what a forward pass with `LOAD` mutable returned.
  """
  if 'blocks' not in variables.get(LOAD, {}):
    return None
  return variables[LOAD]['blocks']['layers']['experts']['tokens'].swapaxes(0, 1)


def balance(loads):
  """Return metrics of how evenly tokens are routed; 1 is an even load.

  Args:
    loads: int [B, L, E] NumPy array, see `load`.

  Returns:
    dict of moe/load_max and moe/load_min: E times the share of choices that
    the busiest and the idlest expert of a layer get, means over layers.
  """
  share = loads.sum(0) / np.maximum(loads.sum((0, 2))[:, None], 1)
  return {'moe/load_max': float(share.max(1).mean() * loads.shape[2]),
          'moe/load_min': float(share.min(1).mean() * loads.shape[2])}


def route(x, router, bias, m: config_lib.Model):
  """Return each token's experts and their weights.

  Args:
    x: [N, D], tokens.
    router: float32 [D, E].
    bias: float32 [E] or 0, added to choose experts, but not to their weights.
    m: `config.Model`.

  Returns:
    int32 [N, k] and float32 [N, k], k = experts_per_token.
  """
  squash = jax.nn.sigmoid if m.router == 'sigmoid' else jax.nn.softmax
  scores = squash(jnp.matmul(
      x.astype(jnp.float32), router, precision=jax.lax.Precision.HIGHEST))
  choice = jax.lax.stop_gradient(scores + bias)
  if m.router_top_groups < m.router_groups:
    grouped = choice.reshape(len(x), m.router_groups, -1)
    rank = jnp.sum(jax.lax.top_k(grouped, 2)[0], -1)
    best = jax.lax.top_k(rank, m.router_top_groups)[1]
    kept = jnp.any(best[..., None] == jnp.arange(m.router_groups), 1)
    choice = jnp.where(kept[..., None], grouped, -jnp.inf).reshape(
        choice.shape)
  chosen = jax.lax.top_k(choice, m.experts_per_token)[1]
  weights = jnp.take_along_axis(scores, chosen, 1)
  if m.norm_topk:
    weights = weights / (jnp.sum(weights, -1, keepdims=True) + 1e-20)
  return chosen, weights * m.router_scale


def _product(x, kernel, master, sizes, out):
  del master  # its value is that of kernel
  return jax.lax.ragged_dot(x, kernel, sizes, preferred_element_type=out)


def _forward(x, kernel, master, sizes, out):
  return _product(x, kernel, master, sizes, out), (x, kernel, sizes)


_BY_GROUP = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())),
    lhs_ragged_dimensions=[0], rhs_group_dimensions=[])


def _backward(out, saved, dy):
  x, kernel, sizes = saved
  dy = dy.astype(x.dtype)
  return (jax.lax.ragged_dot(dy, kernel.swapaxes(1, 2), sizes), None,
          jax.lax.ragged_dot_general(x, dy, sizes, _BY_GROUP,
                                     preferred_element_type=jnp.float32),
          None)


_narrow = jax.custom_vjp(_product, nondiff_argnums=(4,))
_narrow.defvjp(_forward, _backward)


def grouped_matmul(x, kernel, master, sizes, out):
  """Return x W_g for each group g of rows.

  If x is narrower than float32, the gradient goes to `master` in float32;
  autodiff would round it to x's dtype before summing it over devices.

  Args:
    x: [N, D], rows sorted by group.
    kernel: [G, D, F], of x's dtype.
    master: float32 [G, D, F], the source of `kernel`; passed only to receive
      the gradient, so that devices gather the narrow one.
    sizes: int32 [G], rows of each group.
    out: dtype of the result.

  Returns:
    [N, F]; rows beyond the groups are unspecified.
  """
  if x.dtype == master.dtype:
    return jax.lax.ragged_dot(x, kernel, sizes, preferred_element_type=out)
  return _narrow(x, kernel, master, sizes, out)


def resolve(form):
  """Return the form of the experts' matmuls, choosing one for 'auto'."""
  if form != 'auto':
    return form
  return 'ragged' if sharding.platform() == 'tpu' else 'blocks'


def mixture(x, chosen, weights, kernels, masters, first=0, shards=1):
  """Return what consecutive experts add to each token, in the form 'ragged'.

  Args:
    x: [N, D], tokens.
    chosen: int32 [N, k].
    weights: float32 [N, k].
    kernels: gate and up, [e, D, F], and down, [e, F, D], of the experts
      first .. first + e - 1, of x's dtype.
    masters: the same in float32, see `grouped_matmul`.
    first: int32 [].
    shards: among how many devices the tokens' experts are spread.

  Returns:
    float32 [N, D]; 0 for tokens that chose none of these experts.
  """
  del shards
  count, k = kernels[0].shape[0], chosen.shape[1]
  local = chosen.reshape(-1) - first
  local = jnp.where((local >= 0) & (local < count), local, count)
  order = jnp.argsort(local)  # those of other experts come last
  sizes = jnp.bincount(local, length=count + 1)[:count].astype(jnp.int32)
  gate, up, down = (functools.partial(
      grouped_matmul, kernel=w, master=m, sizes=sizes)
                    for w, m in zip(kernels, masters))
  inside = (local < count)[order, None]  # else unspecified, in backward too
  rows = jnp.where(inside, x[order // k], 0)
  y = down(jax.nn.silu(gate(rows, out=x.dtype)) * up(rows, out=x.dtype),
           out=jnp.float32)
  y = jnp.where(inside, y, 0.)
  y = y * weights.reshape(-1)[order, None]
  return jnp.zeros(x.shape, jnp.float32).at[order // k].add(y)


FORMS = {'ragged': mixture, 'blocks': expert_blocks.mixture}
FORWARD = 'forward'  # blocks that only jax.jvp differentiates


def on_mesh(x, chosen, weights, kernels, masters, form='auto'):
  """Run a form of `mixture` with each device's own experts; see it.

  Experts are split over 'expert', their inner width over 'tensor'. Tokens are
  gathered over 'expert'; the results are summed over it and scattered back to
  the devices that the tokens came from.
  """
  mesh = jax.sharding.get_abstract_mesh()
  mix = (expert_blocks.forward if form == FORWARD
         else FORMS[resolve(form)])
  whole = functools.partial(mix, x, chosen, weights, kernels, masters)
  if mesh.empty or mesh.size == 1:
    return whole()
  if (x.shape[0] % sharding.batch_size(mesh)
      or kernels[0].shape[0] % mesh.shape['expert']
      or kernels[0].shape[2] % mesh.shape['tensor']):
    return whole()  # does not divide: leave it to the compiler

  vary = lambda x, *axes: jax.lax.pcast(x, axes, to='varying')
  alone = tuple(a for a in sharding.BATCH if a != 'expert')

  def local(x, chosen, weights, kernels, masters):
    meet = lambda y: jax.lax.all_gather(y, 'expert', tiled=True)
    # Marks the kernels as varying over the axes that replicate them, so that
    # their gradients are summed over those.
    kernels, masters = jax.tree.map(lambda w: vary(w, *alone),
                                    (kernels, masters))
    # The tokens vary over 'tensor' so that their gradients are summed over it.
    x, chosen, weights = (vary(meet(t), 'tensor') for t in (x, chosen, weights))
    y = mix(x, chosen, weights, kernels, masters,
            jax.lax.axis_index('expert') * kernels[0].shape[0],
            mesh.shape['expert'])
    y = jax.lax.psum(y, 'tensor')
    return jax.lax.psum_scatter(y, 'expert', tiled=True)

  tokens = P(sharding.BATCH)
  wide = P('expert', None, 'tensor')
  each = wide, wide, P('expert', 'tensor')
  return jax.shard_map(
      local, in_specs=(tokens, tokens, tokens, each, each),
      out_specs=tokens)(x, chosen, weights, kernels, masters)


class _Matrices(nn.Module):
  """E stacked kernels, [E, inputs, outputs]."""
  shape: tuple

  @nn.compact
  def __call__(self):
    init = nn.initializers.lecun_normal(batch_axis=(0,))
    return self.param('kernel', init, self.shape)


class _Router(nn.Module):
  """The router's matrix [D, E] and its correction bias [E], or 0."""
  shape: tuple
  biased: bool = True

  @nn.compact
  def __call__(self):
    kernel = self.param('kernel', nn.initializers.lecun_normal(), self.shape)
    if not self.biased:
      return kernel, 0.
    bias = self.param('bias', nn.initializers.zeros, self.shape[1:])
    return kernel, jax.lax.stop_gradient(bias)


class Experts(nn.Module):
  """The routed experts of one layer.

  If the collection `LOAD` is mutable it receives int32 [B, E]: how many of a
  row's valid tokens were routed to each expert.
  """
  config: config_lib.Model

  @nn.compact
  def __call__(self, x, valid):
    """Return what the experts add to x.

    Args:
      x: [B, T, D].
      valid: bool [B, T], tokens that count for the load.
    """
    m = self.config
    e, d, f = m.experts, m.d_model, m.expert_ff
    flat = x.reshape(-1, d).astype(jnp.dtype(m.dtype))
    router = _Router((d, e), m.router == 'sigmoid', name='router')
    chosen, weights = route(flat, *router(), m)
    masters = tuple(_Matrices(shape, name=name)() for name, shape in (
        ('gate', (e, d, f)), ('up', (e, d, f)), ('down', (e, f, d))))
    kernels = tuple(w.astype(flat.dtype) for w in masters)
    if self.is_mutable_collection(LOAD) and not self.is_initializing():
      taken = jax.nn.one_hot(chosen, e, dtype=jnp.int32).sum(1)
      taken = taken.reshape(*x.shape[:2], e) * valid[..., None]
      self.sow(LOAD, 'tokens', taken.sum(1), reduce_fn=lambda _, y: y,
               init_fn=lambda: None)
    y = on_mesh(flat, chosen, weights, kernels, masters, m.expert_form)
    return y.reshape(x.shape).astype(x.dtype)
