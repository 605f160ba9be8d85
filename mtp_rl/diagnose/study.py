"""The diagnosis of a run: fresh rollouts at its checkpoints, and the report.

    RUN/diagnosis/diagnosis.{md,json}, alignment.png, lambda.png, curves.png
    RUN/diagnosis/rollouts.jsonl, the `measure.Measures` of each rollout
"""

import contextlib
import dataclasses
import json
import os
import sys

import jax
import numpy as np
import tqdm

from mtp_rl import config as config_lib
from mtp_rl import config_io, train_step, trainer, tree, validate, warmup
from mtp_rl.diagnose import lookahead, measure, summary
from mtp_rl.report import diagnosis_figures, style
from mtp_rl.rollout import experience
from mtp_rl.run import checkpoint, metrics
from mtp_rl.run import workdir as workdir_lib

# Steps whose prompts serve as fresh ones: training never gets this far.
FRESH, FURTHER = 10 ** 6, 2 * 10 ** 6


def _reference(run):
  """Return the warm-up's parameters where the KL penalty needs them."""
  config = run.config
  if not config.rl.kl_coef:
    return None
  where = run.path('checkpoints', 'warmup', str(config.warmup.steps))
  if config.warmup.steps and not config.warmup.init and not os.path.isdir(
      where):
    raise config_lib.ConfigError(
        f'{where} does not exist, but rl.kl_coef={config.rl.kl_coef} needs '
        'the warm-up\'s parameters; put that checkpoint back')
  return warmup.restore(run)


def _note(run, steps):
  """Return [sentence] if the run made more checkpoints than it keeps, or []."""
  config = run.config
  made = {0, *range(0, steps[-1] + 1, config.run.checkpoint_every), steps[-1]}
  if len(steps) >= len(made):
    return []
  return [f'This workdir keeps the checkpoints {steps} of {len(made)} made; '
          f'train with --config.run.keep={len(made)} for all of them.']


def _choose(saved, wanted, where):
  """Return the steps to diagnose: those wanted, or all that are kept."""
  have = saved.steps()
  if not have:
    raise config_lib.ConfigError(
        f'{where} holds no checkpoint; name the workdir of a run')
  missing = [s for s in wanted or () if s not in have]
  if missing:
    raise config_lib.ConfigError(
        f'--steps={",".join(map(str, missing))}: {where} keeps {have}; choose '
        'from these')
  return sorted(set(wanted or have))


def _one(run, functions, measured, state, reference, i):
  """Return the `measure.Measures` of fresh rollout i at a checkpoint.

  The run's own update is made with the first minibatch, the second one is
  measured, and the others are held out. If there are only one or two, a second
  rollout is held out.
  """
  fresh = lambda step: experience.collect(functions.actor, state.params,
                                          reference, step).batch
  parts = tree.cut(fresh(FRESH + i), run.config.rl.minibatches)
  if len(parts) > 2:
    held_out = jax.tree.map(lambda *x: np.concatenate(x), *parts[2:])
  else:
    held_out = fresh(FURTHER + i)
  first = parts[0] if len(parts) > 1 else None
  batch = parts[min(1, len(parts) - 1)]
  return jax.device_get(measured(state, first, batch, held_out))


def collect(run: workdir_lib.Run, config: config_lib.Config, steps, rollouts,
            grid, progress):
  """Return dict step -> list of `measure.Measures`, one per rollout.

  Args:
    run: `workdir.Run`, under the run's own config.
    config: see `measure.measuring_config`.
    steps: list of steps of checkpoints.
    rollouts: number of rollouts at each.
    grid: [N] lambdas.
    progress: whether to show a bar.
  """
  with jax.set_mesh(run.mesh), contextlib.closing(run.task):
    workdir_lib.start(run.config, run.task)
    functions = trainer.prepare(run)
    abstract = functions.steps.abstract
    reference = _reference(run)
    config = dataclasses.replace(config, model=run.config.model)
    measured = measure.make(run.config, config, grid, run.mesh, abstract)
    saved = checkpoint.Checkpoints(run.path('checkpoints', 'rl'),
                                   run.config.run.keep)
    out = {s: [] for s in steps}
    with tqdm.tqdm(total=len(steps) * rollouts, desc='rollouts',
                   file=sys.stderr, disable=not progress,
                   dynamic_ncols=True) as bar:
      for step in steps:
        state = saved.restore(abstract, step)
        for i in range(rollouts):
          out[step].append(_one(run, functions, measured, state, reference, i))
          bar.set_postfix(step=step, refresh=False)
          bar.update()
  return out


def look_ahead(run: workdir_lib.Run, steps, repeats, updates, bound, progress):
  """Return a list of dicts of `lookahead.summarise`, one for each checkpoint.

  Args:
    run, steps, progress: see `collect`.
    repeats, updates: see `lookahead.collect`.
    bound: five lambdas are tried, from -bound to bound.
  """
  lams = np.linspace(-bound, bound, 5)
  out = []
  with jax.set_mesh(run.mesh), contextlib.closing(run.task):
    functions, reference = trainer.prepare(run), _reference(run)
    walks = [train_step.make(lookahead.config_at(run.config, lam), run.mesh)
             for lam in lams]
    saved = checkpoint.Checkpoints(run.path('checkpoints', 'rl'),
                                   run.config.run.keep)
    with tqdm.tqdm(total=len(steps) * repeats * len(lams), desc='look-ahead',
                   file=sys.stderr, disable=not progress,
                   dynamic_ncols=True) as bar:
      for step in steps:
        state = saved.restore(functions.steps.abstract, step)
        rewards = lookahead.collect(run, functions, state, reference, updates,
                                    walks, repeats, bar.update)
        out.append(lookahead.summarise(step, rewards, updates, lams))
  return out


def _write(directory, text, report):
  """Write diagnosis.md and diagnosis.json."""
  with open(os.path.join(directory, 'diagnosis.md'), 'w',
            encoding='utf-8') as f:
    f.write(text)
  metrics.write_json(os.path.join(directory, 'diagnosis.json'),
                     metrics.to_json(report, digits=6))


def diagnose(workdir, rollouts=8, steps=None, bound=1., points=17,
             disjoint_parts=None, updates=(), progress=False,
             allow_eval=False):
  """Diagnose the checkpoints of a run; return the report and its directory.

  Args:
    workdir: of the run.
    rollouts: number of fresh rollouts at each checkpoint.
    steps: list of steps of checkpoints; None: all that are kept.
    bound: lambdas are searched in [-bound, bound].
    points: number of lambdas on the grid.
    disjoint_parts: see `measure.measuring_config`.
    updates: see `look_ahead`; none: leave it out.
    progress: whether to show a bar.
    allow_eval: as task.allow_eval, which the workdir cannot set.

  Raises:
    config.ConfigError: one sentence on what is wrong and how to fix it.
  """
  own = config_io.load(os.path.join(workdir, 'config.json'))
  own.task.allow_eval = allow_eval
  config = measure.measuring_config(own, bound, disjoint_parts)
  validate.validate(config)
  if updates:
    lookahead.config_at(own, 0.)  # refuses before any work
  run = workdir_lib.reopen(own, workdir)
  where = workdir_lib.existing_checkpoints(run, 'rl')
  saved = checkpoint.Checkpoints(where, own.run.keep)
  chosen, notes = _choose(saved, steps, where), _note(run, saved.steps())
  notes.append(f"Theta's MTP loss: {config.mtp.theta_loss}.")
  grid = np.linspace(-bound, bound, points)
  found = collect(run, config, chosen, rollouts, grid, progress)
  summaries = [summary.summarise(s, m, grid) for s, m in found.items()]
  directory, title = run.path('diagnosis'), style.title(own)
  os.makedirs(directory, exist_ok=True)
  report = {'title': title, 'bound': bound,
            'disjoint_parts': config.occ.disjoint_parts, 'notes': notes,
            'checkpoints': summaries, 'lookahead': []}
  text = summary.markdown(summaries, f'Diagnosis: {title}', notes)
  _write(directory, text, report)
  with open(os.path.join(directory, 'rollouts.jsonl'), 'w',
            encoding='utf-8') as f:
    f.writelines(json.dumps({'step': s, **metrics.to_json(m, digits=6)}) + '\n'
                 for s, ms in found.items() for m in ms)
  if any(s['rollouts'] for s in summaries):
    diagnosis_figures.draw_all(summaries, directory, title)
  if updates:  # takes long, and the diagnosis is on disk by now
    again = workdir_lib.reopen(own, workdir)  # the task of `run` is closed
    report['lookahead'] = look_ahead(again, chosen, rollouts,
                                     sorted(set(updates)), bound, progress)
    text += '\n' + lookahead.markdown(report['lookahead'])
    _write(directory, text, report)
  return text, directory
