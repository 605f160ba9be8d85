"""The diagnosis of a run: fresh rollouts at its checkpoints, and the report.

    RUN/diagnosis/diagnosis.{md,json}, alignment.png, lambda.png, curves.png
    RUN/diagnosis/rollouts.jsonl, the `measure.Measures` of each rollout
"""

import contextlib
import json
import os
import sys

import jax
import numpy as np
import tqdm

from mtp_rl import checkpoint, metrics, trainer, validate, warmup
from mtp_rl import config as config_lib
from mtp_rl.diagnose import figures, measure, summary

# Prompts are functions of the step: training never comes this far.
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
  return warmup.train(run, lambda: True)


def _note(run, steps):
  """Return a sentence if the workdir keeps fewer checkpoints than it made."""
  config = run.config
  made = {0, *range(0, steps[-1] + 1, config.run.checkpoint_every), steps[-1]}
  if len(steps) >= len(made):
    return []
  return [f'This workdir keeps the checkpoints {steps} of {len(made)} made; '
          f'train with --config.run.keep={len(made)} for all of them.']


def _choose(saved, wanted, where):
  """Return the steps to diagnose, those wanted or all there are."""
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


def _split(batch, config):
  """Return the list of a rollout's minibatches."""
  n = config.rl.minibatches
  rows = batch.mask.shape[0] // n
  return [jax.tree.map(lambda x: x[i * rows:(i + 1) * rows], batch)
          for i in range(n)]


def _one(run, functions, measured, state, reference, i):
  """Return the `measure.Measures` of fresh rollout i at a checkpoint.

  The run's update is made with the first minibatch, the second is measured,
  the others are held out; a rollout of one or two minibatches is held out
  against another one.
  """
  fresh = lambda step: functions.collect(state.params, reference, step)[0]
  parts = _split(fresh(FRESH + i), run.config)
  if len(parts) > 2:
    held_out = jax.tree.map(lambda *x: np.concatenate(x), *parts[2:])
  else:
    held_out = fresh(FURTHER + i)
  first = parts[0] if len(parts) > 1 else None
  batch = parts[min(1, len(parts) - 1)]
  return jax.device_get(measured(state, first, batch, held_out))


def collect(run, config, steps, rollouts, grid, progress):
  """Return dict step -> list of `measure.Measures`, one a rollout.

  Args:
    run: `trainer.Run`, under the run's own config.
    config: see `measure.measuring_config`.
    steps: of the checkpoints.
    rollouts: how many at each.
    grid: [N] lambdas.
    progress: whether to show a bar.
  """
  with jax.set_mesh(run.mesh), contextlib.closing(run.task):
    functions = trainer.prepare(run)
    abstract = functions.steps.abstract
    reference = _reference(run)
    measured = measure.make(run.config, config, grid, run.vocab_size, run.mesh,
                            abstract)
    saved = checkpoint.Checkpoints(run.path('checkpoints', 'rl'),
                                   run.config.run.keep)
    out = {s: [] for s in steps}
    with contextlib.closing(saved), tqdm.tqdm(
        total=len(steps) * rollouts, desc='rollouts', file=sys.stderr,
        disable=not progress, dynamic_ncols=True) as bar:
      for step in steps:
        state = saved.restore(abstract, step)
        for i in range(rollouts):
          out[step].append(_one(run, functions, measured, state, reference, i))
          bar.set_postfix(step=step, refresh=False)
          bar.update()
  return out


def diagnose(workdir, rollouts=8, steps=None, bound=1., points=17,
             pieces=None, progress=False):
  """Diagnose the checkpoints of a run; return the report and its directory.

  Args:
    workdir: of the run.
    rollouts: fresh ones at each checkpoint.
    steps: list of checkpoints, None for all that are kept.
    bound: lambdas are searched in [-bound, bound].
    points: of the grid of lambdas.
    pieces: see `measure.measuring_config`.
    progress: whether to show a bar.

  Raises:
    config.ConfigError: one sentence on what is wrong and its mend.
  """
  own = config_lib.load(os.path.join(workdir, 'config.json'))
  config = measure.measuring_config(own, bound, pieces)
  validate.validate(config)
  run = trainer.reopen(own, workdir)
  where = trainer.checkpoints(run, 'rl')
  with contextlib.closing(checkpoint.Checkpoints(where, own.run.keep)) as saved:
    chosen, notes = _choose(saved, steps, where), _note(run, saved.steps())
  grid = np.linspace(-bound, bound, points)
  found = collect(run, config, chosen, rollouts, grid, progress)
  summaries = [summary.summarise(s, m, grid) for s, m in found.items()]
  directory = run.path('diagnosis')
  os.makedirs(directory, exist_ok=True)
  title = (f'{own.task.name} {own.task.dataset}'.strip() +
           f', regime {own.mtp.regime}, seed {own.seed}')
  text = summary.markdown(summaries, f'Diagnosis: {title}', notes)
  with open(os.path.join(directory, 'diagnosis.md'), 'w',
            encoding='utf-8') as f:
    f.write(text)
  metrics.write_json(os.path.join(directory, 'diagnosis.json'), summary.plain(
      {'title': title, 'bound': bound, 'pieces': config.occ.pieces,
       'notes': notes, 'checkpoints': summaries}))
  with open(os.path.join(directory, 'rollouts.jsonl'), 'w',
            encoding='utf-8') as f:
    f.writelines(json.dumps({'step': s, **summary.plain(m)}) + '\n'
                 for s, ms in found.items() for m in ms)
  if any(s['rollouts'] for s in summaries):
    figures.draw_all(summaries, directory, title)
  return text, directory
