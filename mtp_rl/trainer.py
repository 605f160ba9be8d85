"""The loop: warm-up, then rollout and updates, evaluation, checkpoints.

The same call on the same workdir resumes where the run stopped.
"""

import contextlib
import functools
import itertools
import signal
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtp_rl import config as config_lib
from mtp_rl import distributed, prng, sharding, train_step, tree, warmup
from mtp_rl.evaluation import held_out
from mtp_rl.report import journal
from mtp_rl.rollout import experience, layout, packing, slots
from mtp_rl.run import checkpoint, endings, metrics, owner, signals
from mtp_rl.run import workdir as workdir_lib


class Functions(NamedTuple):
  """What the RL phase calls.

  Attributes:
    steps: `train_step.Steps`.
    actor: `experience.Actor`, makes rollouts.
    examiner: `held_out.Examiner`, measures held-out accuracy.
  """
  steps: train_step.Steps
  actor: experience.Actor
  examiner: held_out.Examiner


def prepare(run: workdir_lib.Run):
  """Return the `Functions` of a run (compiled when first called)."""
  config, task = run.config, run.task
  steps = train_step.make(config, run.mesh)
  params = steps.abstract.params
  make = functools.partial(slots.make_generate, config, run.mesh, params,
                           task.tokenizer.ends)
  place = layout.make_place(params, config, run.mesh)
  return Functions(
      steps,
      experience.Actor(config, task, place, make(config.rl.group),
                       functools.partial(_score, run, steps.score),
                       functools.partial(_score, run, steps.score_main),
                       prng.key(run.key, prng.Stream.ROLLOUT)),
      held_out.Examiner(config, task, place, make(1, greedy=True),
                        make(config.eval.samples),
                        prng.key(run.key, prng.Stream.EVALUATION)))


def _score(run, score, params, rows):
  """Return the `logprobs.LogProbs` of rows, NumPy arrays.

  Rows are scored a minibatch at a time, in no more memory than an update.
  """
  placed = sharding.batch_sharding(run.mesh)
  out = [score(params, distributed.put(part, placed))
         for part in tree.cut(rows, run.config.rl.minibatches)]
  return jax.tree.map(lambda *x: np.concatenate(x),
                      *map(distributed.fetch, out))


def _update(run, steps, state, batch):
  """Run the minibatches of a rollout; return the state and mean metrics.

  Minibatches are cut from the whole batch on the host, so they hold the same
  rows for any number of processes.
  """
  placed = sharding.batch_sharding(run.mesh)
  seen = []
  for i, part in enumerate(tree.cut(batch, run.config.rl.minibatches)):
    part, packed = packing.for_update(part, run.config)
    holds = steps.hold and i >= run.config.occ.measure
    update = steps.hold if holds else steps.update
    state, values = update(state, distributed.put(part, placed))
    seen.append(values | packed)
  seen = jax.device_get(seen)
  return state, {
      k: np.mean([v[k] for v in seen if k in v]) for k in seen[0]} | {
      k: seen[-1][k] for k in train_step.COUNTS}


def rl(run: workdir_lib.Run, warm_params, stopped):
  """Train by RL from the warm-up's parameters, or from the last checkpoint.

  Args:
    run: `workdir.Run`.
    warm_params: parameters after the warm-up; also the KL penalty's reference.
    stopped: () -> whether to stop after this step.

  Returns:
    whether all RL steps are done.
  """
  config, functions = run.config, prepare(run)
  saved = checkpoint.Checkpoints(run.checkpoints('rl'), config.run.keep)
  start = saved.recover(config.run.strict)
  if start is None:
    # The first update donates its state; the KL penalty needs the parameters
    # later, so it then gets a copy.
    state = functions.steps.init_rest(run.key)._replace(
        params=jax.tree.map(jnp.copy, warm_params) if config.rl.kl_coef
        else warm_params)
  else:
    state = saved.restore(functions.steps.abstract)
  reference = warm_params if config.rl.kl_coef else None
  writer = metrics.Writer(run.path('metrics.jsonl'), run.path('events', 'rl'),
                          start, range(config.rl.steps + 1), config.run.loggers)
  notes, shown = journal.Journal(run, functions, start), {}
  with contextlib.closing(writer), metrics.progress(
      config, config.rl.steps, start or 0, 'RL') as bar:
    if start is None:
      start, shown = 0, notes.examine(0, state.params) | warmup.outcome(run)
      writer.write(0, shown)
      writer.flush()
      saved.save(0, state)
    for step in range(start + 1, config.rl.steps + 1):
      began = time.perf_counter()
      rollout = experience.collect(functions.actor, state.params, reference,
                                   step)
      updating = time.perf_counter()
      state, updated = _update(run, functions.steps, state, rollout.batch)
      values = rollout.metrics | updated
      values['timing_s/update'] = time.perf_counter() - updating
      values['timing_s/step'] = time.perf_counter() - began
      last = step == config.rl.steps
      if looks := last or step % config.eval.every == 0:
        values |= notes.examine(step, state.params)
      if looks or step == 1:
        notes.rollout(step, rollout, state.params)
      row = writer.write(step, values)
      endings.refuse_diverged(config, updated['skipped_in_a_row'], 'rl', step,
                              saved.latest_path())
      shown |= row
      bar.set_postfix(metrics.postfix(shown), refresh=False)
      bar.update()
      stop = stopped()
      if last or stop or step % config.run.checkpoint_every == 0:
        writer.flush()
        saved.save(step, state)
      if stop and not last:
        return False
      if looks and not last:
        notes.draw()
  return True


def finish(run: workdir_lib.Run, status):
  """Draw the figures, write summary.json and the page; return the summary.

  Args:
    run: `workdir.Run`.
    status: 'complete', 'interrupted' or 'diverged'.
  """
  distributed.barrier()  # process 0 has written what all read below
  rows = metrics.read(run.path('metrics.jsonl'))
  config = run.config
  journal.draw_figures(run)
  there = rows[-1]['step'] if rows else 0
  step = max(config.rl.steps, there) if status == 'complete' else there
  scores = {r['step']: v for r in rows if (v := {
      k: x for k, x in r.items() if k.startswith('val/')})}
  last = max(scores, default=0) if there == step else step  # no other row's
  summary = {
      'status': status, 'step': step, 'steps': config.rl.steps,
      'seed': config.seed, 'regime': config.mtp.regime,
      'estimator': config.occ.estimator, 'after_warmup': scores.get(0, {}),
      'last': scores.get(last, {}),
      'train_seconds': sum(r.get('timing_s/step', 0.) for r in rows)}
  metrics.write_json(run.path('summary.json'), summary)
  journal.write_page(run, status)
  distributed.barrier()  # no process ends while process 0 draws
  return summary


@contextlib.contextmanager
def _running(run):
  # JAX's preemption service, where it is on, takes SIGTERM.
  leave = (signal.SIGTERM,) if distributed.preemption_service() else ()
  checks = itertools.count(1)
  with (jax.set_mesh(run.mesh), contextlib.closing(run.task),
        signals.interruptible(leave) as stopped):
    yield lambda: (distributed.preempted(next(checks))
                   or distributed.any_of(stopped()))


@owner.releasing
def pretrain(config: config_lib.Config, workdir):
  """Run or resume the warm-up alone; return whether it is complete.

  It leaves report.html, also where it diverges.
  """
  run, status = workdir_lib.setup(config, workdir), 'diverged'
  with _running(run) as stopped:
    try:
      done = warmup.train(run, stopped) is not None
      status = 'pretrained' if done else 'interrupted'
    except endings.DivergedError:
      journal.write_page(run, status)
      raise
  journal.write_page(run, status)
  return done


@owner.releasing
def train(config: config_lib.Config, workdir):
  """Run or resume a whole run; return its summary.

  Args:
    config: `config.Config`.
    workdir: directory of the run, created if need be.

  Raises:
    config.ConfigError: one sentence on what is wrong and how to fix it.
  """
  run = workdir_lib.setup(config, workdir)
  with _running(run) as stopped:
    try:
      params = warmup.train(run, stopped)
      done = params is not None and rl(run, params, stopped)
    except endings.DivergedError:
      finish(run, 'diverged')
      raise
  return finish(run, 'complete' if done else 'interrupted')
