"""AdamW with theta and psi clipped separately (or by one joint norm)."""

import jax
import jax.numpy as jnp
import optax

from mtp_rl import config as config_lib
from mtp_rl import tree


def schedule(lr, optim: config_lib.Optim, updates):
  """Return the learning rate as a function of the update count.

  Args:
    lr: peak learning rate.
    optim: `config.Optim`.
    updates: updates of the whole run, for 'cosine' and 'linear' decay to 0.
  """
  rest = max(updates - optim.ramp, 1)
  after = {
      'constant': optax.constant_schedule(lr),
      'cosine': optax.cosine_decay_schedule(lr, rest),
      'linear': optax.linear_schedule(lr, 0., rest),
  }[optim.schedule]
  if not optim.ramp:
    return after
  # Starts at lr / ramp, not 0: at 0 the first update would do nothing.
  ramp = optax.linear_schedule(lr / optim.ramp, lr, optim.ramp)
  return optax.join_schedules([ramp, after], [optim.ramp])


def decayed(params):
  """Return a tree of bools: True at matrices, which weight decay acts on."""
  matrices = ('kernel', 'embedding', *tree.ADAPTER)
  return jax.tree_util.tree_map_with_path(
      lambda keys, _: tree.path(keys[-1:]) in matrices, params)


def make(optim: config_lib.Optim, rate, train_psi=True, train_theta=True):
  """Return the optax transformation of a run.

  Args:
    optim: `config.Optim`.
    rate: learning rate or schedule.
    train_psi: False freezes the MTP modules, weight decay included (rl_only).
    train_theta: False freezes everything else (warmup.train=mtp).

  Returns:
    optax.GradientTransformation for a params tree that `tree.labels` covers.
  """
  clip = (optax.clip_by_global_norm(optim.clip) if optim.clip
          else optax.identity())
  if optim.clip and optim.clip_mode == 'separate':
    clip = optax.partition({'theta': clip, 'psi': clip}, tree.labels)
  steps = optax.chain(
      clip, optax.adamw(
          rate, optim.b1, optim.b2, optim.eps, mu_dtype=optim.mu_dtype,
          weight_decay=optim.weight_decay, mask=decayed))
  if train_psi and train_theta:
    return steps
  frozen = optax.set_to_zero()
  return optax.partition({'theta': steps if train_theta else frozen,
                          'psi': steps if train_psi else frozen},
                         tree.labels)


def preconditioner(opt_state, optim: config_lib.Optim):
  """Return g -> P g over theta, Adam's 1 / (sqrt(nu_hat) + eps).

  nu is Adam's second moment after the previous update; before the first
  update, P = 1.

  Args:
    opt_state: state of a transformation that `make` returned.
    optim: `config.Optim`.
  """
  adam = optax.tree_utils.tree_get(opt_state, 'ScaleByAdamState')
  fresh = adam.count == 0
  scale = 1 / jnp.where(fresh, 1., 1 - optim.b2 ** adam.count)

  def apply(g):
    return jax.tree.map(
        lambda x, nu: jnp.where(
            fresh, x, x / (jnp.sqrt(nu * scale) + optim.eps)),
        g, tree.theta(adam.nu))
  return apply
