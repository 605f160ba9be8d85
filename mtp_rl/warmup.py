"""Supervised training before RL: on solutions, or on the model's own samples.

The parameters come from random values or from pretrained weights, once: a
resumed run reads its own checkpoint.
"""

import contextlib
import os

import jax
import numpy as np

from mtp_rl import (
  checkpoint,
  distributed,
  evaluate,
  metrics,
  sharding,
  train_step,
)
from mtp_rl import config as config_lib
from mtp_rl.models import pretrained
from mtp_rl.rollout import layout, sampler


def _directory(run):
  home = run.config.warmup.init or run.workdir
  return os.path.join(home, 'checkpoints', 'warmup')


def check(run):
  """Reject pretrained weights that do not fit, before long work starts.

  Raises:
    config.ConfigError: they cannot be read or are of another model, or the
      tokenizer has more tokens than the model's table has rows.
  """
  m, have = run.config.model, run.task.tokenizer.vocab_size
  if have > run.vocab_size:
    raise config_lib.ConfigError(
        f'the tokenizer has {have} tokens, but model.vocab_size='
        f'{m.vocab_size}; set it to the rows of the token table')
  started = os.path.isdir(_directory(run)) and os.listdir(_directory(run))
  if m.pretrained and not started:
    pretrained.check(m.pretrained, m, run.config.mtp)


def _first_state(run, steps):
  """Return the state before the first update."""
  config, key = run.config, jax.random.fold_in(run.key, 1)
  if not config.model.pretrained:
    return steps.init(key)
  state = steps.init_rest(key)
  fresh = state.params.get('mtp') if config.mtp.fresh else None
  return state._replace(params=pretrained.load(
      config.model.pretrained, steps.abstract.params, config.model, config.mtp,
      fresh))


def _solutions(run, step):
  """Return the batch of a step: prompts and the task's solutions."""
  config = run.config
  return sampler.pad_supervised(
      run.task.supervised(step, config.warmup.batch), run.task.tokenizer,
      config.rollout.max_prompt, config.rollout.max_response)


class Samples:
  """Batches from pools of the model's own completions of training prompts.

  A pool is `warmup.pool` rollouts and serves `warmup.pool_steps` updates. The
  trunk is frozen, so that a pool is a function of its number and the seed,
  and a resumed run draws the same.
  """

  def __init__(self, run, abstract):
    """Set up the sampler.

    Args:
      run: `trainer.Run`.
      abstract: parameters as ShapeDtypeStructs with shardings.
    """
    self._run, self._number, self._pool = run, None, None
    self._place = layout.make_place(abstract, run.config, run.mesh)
    self._generate = evaluate.make_generate(
        run.config, run.vocab_size, run.mesh, abstract,
        run.task.tokenizer.ends, run.config.rl.group)

  def _rollout(self, params, index):
    run, config = self._run, self._run.config
    prompts, valid = sampler.pad_prompts(
        [e.prompt for e in run.task.prompts(index + 1, config.rl.prompts)],
        run.task.tokenizer, config.rollout.max_prompt)
    key = jax.random.fold_in(jax.random.fold_in(run.key, 4), index)
    return distributed.fetch(self._generate(params, prompts, valid, key)[0])

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
    rng = np.random.default_rng([self._run.config.seed, 4, step])
    picked = rng.choice(rows, w.batch, replace=w.batch > rows)
    return jax.tree.map(lambda x: x[picked], self._pool)


def train(run, stopped):
  """Train or resume the warm-up.

  Args:
    run: `trainer.Run`.
    stopped: () -> whether to stop after this step.

  Returns:
    the parameters, or None if it was stopped before the end.
  """
  config = run.config
  w = config.warmup
  steps = train_step.make(config, run.vocab_size, run.mesh, 'warmup')
  saved = checkpoint.Checkpoints(_directory(run), keep=1)
  with contextlib.closing(saved):
    if w.init:
      return saved.restore(steps.abstract, params_only=True)
    start = saved.latest()
    if start is None:
      start, state = 0, _first_state(run, steps)
      if config.model.pretrained:
        saved.save(0, state)  # from here on the run is on its own
    else:
      state = saved.restore(steps.abstract)
    if start >= w.steps:
      return state.params
    draw = lambda params, step: _solutions(run, step)
    if w.data == 'samples':
      draw = Samples(run, steps.abstract.params).batch
    state, done = _loop(run, steps, state, draw, start, saved, stopped)
  return state.params if done else None


def _loop(run, steps, state, draw, start, saved, stopped):
  """Return the state after the last update, and whether all are done."""
  w, step = run.config.warmup, start
  writer = metrics.Writer(run.path('warmup.jsonl'), run.path('events'), start)
  rows = sharding.batch_sharding(run.mesh)
  with contextlib.closing(writer), metrics.progress(
      run.config, w.steps, start, 'warm-up') as bar:
    for step in range(start + 1, w.steps + 1):
      batch = distributed.put(draw(state.params, step), rows)
      state, values = steps.update(state, batch)
      if step % 20 == 0 or step == w.steps:
        row = writer.write(step, values)
        if any(v is None for n, v in row.items() if n.endswith('/loss')):
          raise config_lib.ConfigError(
              f'the warm-up diverged at step {step}; lower warmup.lr={w.lr}')
        bar.set_postfix(loss=f'{row["warmup/loss"]:.3f}', refresh=False)
      bar.update()
      last = step == w.steps or stopped()
      if last or step % run.config.run.checkpoint_every == 0:
        saved.save(step, state)
      if last:
        break
  return state, step == w.steps
