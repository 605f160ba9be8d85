"""Second-order evidence of a minibatch: H g, and F between gradients.

H is the Hessian of J over theta, F = E[grad log pi grad log pi'] the Fisher
matrix of the policy. Both go part by part over the minibatch and never hold a
matrix over theta.
"""

import dataclasses

import jax
import jax.numpy as jnp

from mtp_rl import config as config_lib
from mtp_rl import forward, occ, tree
from mtp_rl.models import attention, moe
from mtp_rl.objectives import policy


def _differentiable(config: config_lib.Config):
  """Return the config with attention that can be differentiated forward."""
  return dataclasses.replace(
      config, model=attention.without_kernels(config.model))


def _forward_alone(config: config_lib.Config):
  """Return the config of log-probs that jax.jvp alone can differentiate.

  They are float32: the matmuls of bfloat16, and the experts', have a backward
  pass of their own, which forward mode does not know.
  """
  return dataclasses.replace(config, model=dataclasses.replace(
      attention.without_kernels(config.model), dtype='float32',
      expert_form=moe.FORWARD))


def directional(objective, theta, direction):
  """Return J's gradient, its slope and its Hessian along a direction.

  One jax.jvp of jax.value_and_grad(J): forward over reverse.

  Args:
    objective: theta -> (J, aux).
    theta: parameters.
    direction: tree like theta, g_MTP.

  Returns:
    (J, aux), g = grad J, c = <g, direction>, and H direction.
  """
  ((value, g), ((c, _), hv)) = jax.jvp(
      jax.value_and_grad(objective, has_aux=True), (theta,), (direction,))
  return value, g, c, hv


def hessian(work, rows, direction):
  """Return g_RL and H direction over theta, by forward over reverse.

  Each part takes one jvp of grad J. J is a sum over rows (denominators come
  from the mask), so a part's share of both is that of J with the log-probs of
  all other rows held constant.

  Args:
    work: `gradients.Minibatch` of n parts.
    rows: `types.Tokens`, [n, B / n, ..], the parts.
    direction: a tree like theta.
  """
  theta, config = tree.theta(tree.trained(work.params)), work.config
  n, group, config = len(work.parts), config.rl.group, _differentiable(config)
  use_entropy = bool(config.rl.entropy_coef)

  def put(whole, i, part):
    if n == 1:
      return part
    y = whole.reshape(-1, n, group, *whole.shape[1:])
    part = part.reshape(y.shape[0], *y.shape[2:])
    return y.at[:, i].set(part).reshape(whole.shape)

  def add(total, part):
    def value(theta):
      i, rows = part
      out = forward.score(tree.merge(work.params, theta), rows,
                          with_mtp=False, config=config, entropy=use_entropy)
      entropy = put(work.entropy, i, out.entropy) if use_entropy else 0.
      return -policy.rl_loss(put(work.main, i, out.main), entropy, work.batch,
                             config.rl, config.rollout.max_response)[0], None
    _, g, _, product = directional(value, theta, direction)
    return tree.add(total, (g, product)), None

  zero = jax.tree.map(jnp.zeros_like, (theta, theta))
  total, _ = jax.lax.scan(add, zero, (jnp.arange(n), rows))
  return total


def fisher(work, rows, g_rl, g):
  """Return `occ.Products` of gradients with F between them: <a, F b>.

  F over the sampled tokens is the mean of grad log pi grad log pi', so <a, F b>
  is the mean of the products of two directional derivatives of log pi: forward
  mode alone, all K + 1 directions at once, of a float32 model whatever
  `model.dtype` (the matrix products as precise as the device's default).

  Args:
    work, rows: see `hessian`; rows are not packed.
    g_rl, g: g_RL and the list of K gradients, trees like theta.
  """
  theta, config = tree.theta(tree.trained(work.params)), work.config
  config, columns = _forward_alone(config), work.batch.mask.shape[1]
  along = jax.tree.map(lambda *x: jnp.stack(x), g_rl, *g)

  def add(total, rows):
    def logp(theta):
      return forward.score(tree.merge(work.params, theta), rows,
                           with_mtp=False, config=config).main
    slopes = jax.vmap(
        lambda v: jax.jvp(logp, (theta,), (v,))[1])(along)  # [K + 1, rows, S]
    slopes = jnp.where(rows.valid[:, -columns:], slopes, 0.)
    return total + jnp.einsum('ibs,jbs->ij', slopes, slopes,
                              precision='highest'), None

  k = len(g) + 1
  found, _ = jax.lax.scan(add, jnp.zeros((k, k)), rows)
  found /= jnp.maximum(jnp.sum(work.batch.mask), 1)
  return occ.Products(found[0, 1:], found[1:, 1:], found[0, 0])
