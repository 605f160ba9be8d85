"""Supervised training before RL: on solutions, or on the model's own samples.

A new run starts from random values or from pretrained weights; a resumed run
starts from its own checkpoint.
"""

import contextlib
import dataclasses
import os
import statistics

import jax
import numpy as np

from mtp_rl import config_io, distributed, prng, sharding, train_step, tree
from mtp_rl.models import pretrained
from mtp_rl.rollout import layout, slots
from mtp_rl.rollout import prompts as prompts_lib
from mtp_rl.run import checkpoint, endings, metrics
from mtp_rl.run import workdir as workdir_lib

_ROW_EVERY = 20  # updates
_LAST_ROWS = 5  # over which the last loss is averaged


def _first_state(run, steps):
  """Return the state before the first update."""
  config, key = run.config, prng.key(run.key, prng.Stream.PARAMETERS)
  if not config.model.pretrained:
    return steps.init(key)
  state = steps.init_rest(key)
  modules = tree.without_adapters(state.params).get(tree.PSI)
  params = pretrained.load(
      config.model.pretrained, tree.without_adapters(steps.abstract.params),
      config.model, config.mtp, modules if config.mtp.fresh else None)
  return state._replace(params=tree.merge(params, tree.adapters(state.params)))


def _solutions(run, step):
  """Return the batch of a step: prompts and the task's solutions."""
  config = run.config
  return prompts_lib.pad_supervised(
      run.task.supervised(step, config.warmup.batch), run.task.tokenizer,
      config.rollout.max_prompt, config.rollout.max_response)


class Samples:
  """Batches from pools of the model's own completions of training prompts.

  A pool is `warmup.pool` rollouts, without drafts, and serves
  `warmup.pool_steps` updates. The trunk is frozen, so a pool depends on its
  number and the seed alone, and a resumed run draws the same samples; drafts
  would come from the modules, which are trained.
  """

  def __init__(self, run, abstract):
    """Set up the sampler.

    Args:
      run: `workdir.Run`.
      abstract: parameters as ShapeDtypeStructs with shardings.
    """
    self._run, self._number, self._pool = run, None, None
    config = dataclasses.replace(run.config, rollout=dataclasses.replace(
        run.config.rollout, draft=0))
    self._place = layout.make_place(abstract, config, run.mesh)
    self._generate = slots.make_generate(
        config, run.mesh, abstract, run.task.tokenizer.ends, config.rl.group)

  def _rollout(self, params, index):
    run, config = self._run, self._run.config
    prompts, valid = prompts_lib.pad_prompts(
        [e.prompt for e in run.task.prompts(index + 1, config.rl.prompts)],
        run.task.tokenizer, config.rollout.max_prompt)
    key = prng.key(run.key, prng.Stream.POOL, index)
    return self._generate(params, prompts, valid, key).rows

  def batch(self, params, step):
    """Return `types.Tokens` of warmup.batch rows for an update.

    Args:
      params: the model's parameters.
      step: int, from 1.
    """
    w = self._run.config.warmup
    number = (step - 1) // w.pool_steps
    if number != self._number:
      placed = self._place(params)
      rollouts = [self._rollout(placed, number * w.pool + i)
                  for i in range(w.pool)]
      self._pool = jax.tree.map(lambda *x: np.concatenate(x), *rollouts)
      self._number = number
    rows = len(self._pool.tokens)
    rng = prng.generator(self._run.config.seed, prng.Stream.POOL, step)
    picked = rng.choice(rows, w.batch, replace=w.batch > rows)
    return jax.tree.map(lambda x: x[picked], self._pool)


def restore(run: workdir_lib.Run):
  """Return the parameters of a finished warm-up.

  Without a warm-up these are the initial ones, which the seed gives again.

  Raises:
    config.ConfigError: there is no such checkpoint, or it is damaged.
  """
  steps = train_step.make(run.config, run.mesh, 'warmup')
  saved = checkpoint.Checkpoints(run.checkpoints('warmup'), keep=1)
  if saved.latest() is None and not run.config.warmup.steps:
    return _first_state(run, steps).params
  return saved.restore(steps.abstract, params_only=True)


def train(run: workdir_lib.Run, stopped):
  """Train or resume the warm-up.

  Args:
    run: `workdir.Run`.
    stopped: function () -> whether to stop after this step.

  Returns:
    the parameters, or None if it was stopped before the end; nothing is read
    and {} is returned where RL has begun and no longer needs them.
  """
  config = run.config
  w = config.warmup
  begun = checkpoint.Checkpoints(run.checkpoints('rl'), keep=1).latest()
  if begun is not None and not config.rl.kl_coef:
    return {}
  if w.init:
    return restore(run)
  steps = train_step.make(config, run.mesh, 'warmup')
  saved = checkpoint.Checkpoints(run.checkpoints('warmup'), keep=1)
  start = saved.recover(config.run.strict)
  if start is None:
    start, state = 0, _first_state(run, steps)
    if config.model.pretrained:
      saved.save(0, state)  # a resumed run reads this
  else:
    state = saved.restore(steps.abstract)
  if start >= w.steps:
    return state.params
  draw = lambda params, step: _solutions(run, step)
  if w.data == 'samples':
    draw = Samples(run, steps.abstract.params).batch
  state, done = _loop(run, steps, state, draw, start, saved, stopped)
  return state.params if done else None


def outcome(run: workdir_lib.Run):
  """Return what the warm-up reached, the metrics `after_warmup/...`.

  `loss` is the main head's loss, mean of the last five rows of warmup.jsonl;
  {} where the run has no warm-up on solutions. `floor` is the task's, and left
  out where the warm-up was one of another task or seed.

  Args:
    run: `workdir.Run`, whose warm-up is complete.
  """
  config, home = run.config, run.config.warmup.init or run.workdir
  warmed = config if home == run.workdir else config_io.load(
      os.path.join(home, 'config.json'))
  losses = [row['warmup/loss'] for row in metrics.read(
      os.path.join(home, 'warmup.jsonl'))[-_LAST_ROWS:]
            if row.get('warmup/loss') is not None]
  if warmed.warmup.data == 'samples' or not losses:
    return {}
  out, floor = {'after_warmup/loss': statistics.fmean(losses)}, None
  if (warmed.task, warmed.seed) == (config.task, config.seed):
    floor = getattr(run.task, 'floor', None)
  return out if floor is None else out | {'after_warmup/floor': floor}


def _loop(run, steps, state, draw, start, saved, stopped):
  """Return the state after the last update made, and whether all are done."""
  w, step = run.config.warmup, start
  writer = metrics.Writer(
      run.path('warmup.jsonl'), run.path('events', 'warmup'), start,
      range(_ROW_EVERY, w.steps + 1, _ROW_EVERY), run.config.run.loggers)
  rows = sharding.batch_sharding(run.mesh)
  refuse_diverged = lambda step, values: endings.refuse_diverged(
      run.config, int(values['skipped_in_a_row']), 'warmup', step,
      saved.latest_path(), step == w.steps)
  with contextlib.closing(writer), metrics.progress(
      run.config, w.steps, start, 'warm-up') as bar:
    for step in range(start + 1, w.steps + 1):
      batch = distributed.put(draw(state.params, step), rows)
      state, values = steps.update(state, batch)
      if step % _ROW_EVERY == 0 or step == w.steps:
        row = writer.write(step, values)
        refuse_diverged(step, values)
        if row['warmup/loss'] is not None:
          bar.set_postfix(loss=f'{row["warmup/loss"]:.3f}', refresh=False)
      bar.update()
      last = step == w.steps or stopped()
      if last or step % run.config.run.checkpoint_every == 0:
        refuse_diverged(step, values)
        writer.flush()
        saved.save(step, state)
      if last:
        break
  return state, step == w.steps
