"""What a lambda is worth after several updates, not after one.

From a checkpoint the run's own optimiser goes on for n updates with lambda held
fixed (regime fixed; lambda = 0 is Detach), on fresh rollouts of the policy as
it changes; then J is the mean reward of samples on prompts of steps that no run
gets to (a finite set has them in others as well). All lambdas start from one
state and draw the same prompts with the same random numbers, so that their
differences are paired. Where the best lambda moves with n, the lambda of one
step is myopic.
"""

import copy

import jax
import jax.numpy as jnp
import numpy as np

from mtp_rl import config as config_lib
from mtp_rl import distributed, sharding, tree, validate
from mtp_rl.diagnose import measure, summary
from mtp_rl.report import intervals, tables
from mtp_rl.rollout import experience, packing

# Steps whose prompts serve as fresh ones, beside those of `study`.
FRESH, FURTHER = 3 * 10 ** 6, 4 * 10 ** 6


def config_at(config: config_lib.Config, lam):
  """Return a run's config with lambda fixed for every module.

  Raises:
    config.ConfigError: the run trained no MTP module.
  """
  if not config.mtp.modules:
    raise config_lib.ConfigError(
        'mtp.modules=0: there is no lambda to look ahead with; name the '
        'workdir of a run with mtp.modules >= 1')
  if config.mtp.regime == 'rl_only':
    raise config_lib.ConfigError(
        'mtp.regime=rl_only froze the MTP modules, so their optimiser has no '
        'state to look ahead from; name the workdir of a run with another '
        'regime, such as detach, or leave --lookahead out')
  config = copy.deepcopy(config)
  config.mtp.theta_loss = measure.theta_loss(config.mtp)
  config.mtp.regime, config.occ = 'fixed', config_lib.OCC()
  if config.mtp.psi_loss == 'theta':  # psi would follow lambda, even 0
    config.mtp.psi_loss, config.mtp.psi_coef = 'ce', config.mtp.coef
  validate.validate(config)
  # After the checks: to a user's run a negative coefficient is forbidden.
  config.mtp.coef = float(lam) * config_lib.depths(config.mtp)
  return config


def _walk(run, actor, steps, state, reference, first, updates):
  """Yield (n, parameters) after each n of `updates`."""
  placed, done = sharding.batch_sharding(run.mesh), 0
  for step in range(first, first + max(updates)):
    batch = experience.collect(actor, state.params, reference, step).batch
    for part in tree.cut(batch, run.config.rl.minibatches):
      part, _ = packing.for_update(part, run.config)
      state, _ = steps.update(state, distributed.put(part, placed))
      done += 1
      if done in updates:
        yield done, state.params
      if done == max(updates):
        return


def collect(run, functions, state, reference, updates, steps, repeats, note):
  """Return the mean rewards, [repeats, len(updates), len(steps)].

  Args:
    run: `workdir.Run`.
    functions: `trainer.Functions` of the run.
    state: `types.TrainState` of the checkpoint.
    reference: parameters of the KL penalty's reference, or None.
    updates: sorted list of ints, n.
    steps: list of `train_step.Steps`, one for each lambda; see `config_at`.
    repeats: how many times over, with other prompts and samples.
    note: function () that is called after each walk.
  """
  out = np.zeros((repeats, len(updates), len(steps)))
  for column, one in enumerate(steps):
    for i in range(repeats):
      start = jax.tree.map(jnp.copy, state)  # the update donates its state
      walk = _walk(run, functions.actor, one, start, reference,
                   FRESH + i * max(updates), updates)
      for row, (_, params) in enumerate(walk):
        out[i, row, column] = np.mean(experience.rewards(
            functions.actor, params, FURTHER + i))
      note()
  return out


def summarise(step, rewards, updates, lams):
  """Return a dict of the statistics of a checkpoint.

  Args:
    step: of the checkpoint.
    rewards: from `collect`.
    updates: see `collect`.
    lams: the lambdas of its steps, evenly spaced, 0 among them.
  """
  zero = int(np.argmin(np.abs(lams)))
  out = {'step': step, 'lambdas': list(map(float, lams)), 'after': {}}
  for n, found in zip(updates, np.moveaxis(rewards, 1, 0)):
    out['after'][n] = {
        'detach': intervals.interval(found[:, zero].tolist()),
        'best': summary.best_lambda(lams, found),
        'minus_detach': [intervals.interval((x - found[:, zero]).tolist())
                         for x in found.T]}
  return out


def _signed(x):
  if x.low is None:
    return f'{x.mean:+.3f}'
  told = '**' * intervals.told(x)
  return f'{told}{x.mean:+.3f}{told} ± {x.high - x.mean:.3f}'


def markdown(summaries):
  """Return the tables of a list of dicts from `summarise`."""
  out = ['## Look-ahead\n\nMean reward on unseen prompts after n updates with '
         'lambda held fixed, minus that of lambda = 0 (Detach), ± half of the '
         '95 % t-interval over repeats, bold where 0 lies outside (by chance '
         'that happens to one in 20); best: bootstrap over repeats.\n\n']
  for s in summaries:
    lines = []
    for n, found in s['after'].items():
      b = found['best']
      ends = '' if b.low is None else f' [{b.low:+.2f}, {b.high:+.2f}]'
      lines.append([str(s['step']), str(n), f'{found["detach"].mean:.3f}',
                    *map(_signed, found['minus_detach']),
                    f'{b.mean:+.2f}{ends}'])
    out.append(tables.markdown(
        ['step', 'n', 'Detach', *[f'{x:+.2f}' for x in s['lambdas']],
         'best lambda'], lines, aligned=True) + '\n')
  return ''.join(out)
