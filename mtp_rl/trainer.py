"""The loop: warm-up, then rollout and updates, evaluation, checkpoints.

A workdir holds config.json, tokenizer.json, warmup.jsonl, metrics.jsonl,
samples.jsonl, events/, figures/, checkpoints/{warmup,rl}/ and summary.json.
The same call on the same workdir goes on where it stopped.
"""

import contextlib
import functools
import json
import os
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtp_rl import (
  checkpoint,
  distributed,
  evaluate,
  metrics,
  plots,
  sharding,
  signals,
  tasks,
  tokenizers,
  train_step,
  validate,
  warmup,
)
from mtp_rl import config as config_lib
from mtp_rl.rollout import experience, layout, packing, sampler

# Fields that may change between the runs of one workdir.
_MAY_CHANGE = ('rl.steps', 'eval.every', 'run.checkpoint_every', 'run.keep',
               'run.progress')


class Run(NamedTuple):
  """What the phases of a run share."""
  config: config_lib.Config
  workdir: str
  task: Any
  mesh: jax.sharding.Mesh
  key: jax.Array

  def path(self, *names):
    """Return a path inside the workdir."""
    return os.path.join(self.workdir, *names)

  @property
  def vocab_size(self):
    """V, rows of the token table."""
    return self.config.model.vocab_size or self.task.tokenizer.vocab_size


def setup(config, workdir):
  """Check everything that can be checked before long work, and return a Run.

  Raises:
    config.ConfigError: one sentence on what is wrong and its mend.
  """
  validate.validate(config)
  mesh = sharding.make_mesh(config.mesh)
  path = os.path.join(workdir, 'config.json')
  with distributed.together():
    checkpoint.prepare_workdir(workdir)
    _same_config(path, config)
  task = distributed.in_turn(lambda: tasks.make(config))
  run = Run(config, workdir, task, mesh, jax.random.key(config.seed))
  with distributed.together():
    _check_task(run)
    warmup.check(run)
  report = getattr(task, 'report', None)
  data = os.path.join(workdir, 'data.json')
  with distributed.together():
    if report is not None:
      _same_data(data, report)
  differing = distributed.differing({
      'config': config_lib.to_dict(config),
      'tokenizer': task.tokenizer.to_dict(), 'data': report})
  if differing:
    raise config_lib.ConfigError(
        f'the processes differ in {", ".join(differing)}; start all of them '
        'with the same command on the same files')
  metrics.write_json(path, config_lib.to_dict(config))
  metrics.write_json(os.path.join(workdir, 'tokenizer.json'),
                     task.tokenizer.to_dict())
  if report is not None:
    metrics.write_json(data, report)
  return run


def _same_config(path, config):
  """Refuse another config than a workdir's own."""
  if not os.path.exists(path):
    return
  # A decaying schedule depends on the number of steps.
  free = _MAY_CHANGE[config.optim.schedule != 'constant':]
  changed = [n for n in config_lib.differences(config, config_lib.load(path))
             if n not in free]
  if changed:
    raise config_lib.ConfigError(
        f'workdir {os.path.dirname(path)} belongs to a run that differs in '
        f'{", ".join(changed)}; choose another --workdir, or set the same')


def _check_task(run):
  """Refuse a task whose longest texts do not fit."""
  config, task = run.config, run.task
  if config.warmup.init:
    task.tokenizer = _finished_warmup(config.warmup.init)
  for example in task.probe():
    sampler.check_prompt(example.prompt,
                         len(task.tokenizer.encode(example.prompt)),
                         config.rollout.max_prompt)
    if (config.warmup.steps and config.warmup.data == 'solutions'
        and example.solution):
      sampler.pad_supervised([example], task.tokenizer,
                             config.rollout.max_prompt,
                             config.rollout.max_response)


def _same_data(path, report):
  """Refuse other files than a run began with."""
  if os.path.exists(path):
    with open(path, encoding='utf-8') as f:
      before = json.load(f)['sha256']
    changed = [n for n in before if before[n] != report['sha256'].get(n)]
    if changed:
      raise config_lib.ConfigError(
          f'the files of {", ".join(changed)} are not those that {path} was '
          'begun with; put them back, or choose another workdir')


def _finished_warmup(workdir):
  """Return the tokenizer of a workdir whose warm-up is complete."""
  steps = config_lib.load(os.path.join(workdir, 'config.json')).warmup.steps
  directory = os.path.join(workdir, 'checkpoints', 'warmup', str(steps))
  if not os.path.isdir(directory):
    raise config_lib.ConfigError(
        f'warmup.init={workdir} has no complete warm-up ({steps} steps); run '
        'experiments.pretrain on it first')
  return load_tokenizer(workdir)


def load_tokenizer(workdir):
  """Return the tokenizer of a workdir; raises config.ConfigError."""
  path = os.path.join(workdir, 'tokenizer.json')
  try:
    with open(path, encoding='utf-8') as f:
      return tokenizers.from_dict(json.load(f))
  except (OSError, ValueError, KeyError, TypeError) as e:
    raise config_lib.ConfigError(
        f'{path} cannot be read ({e}); name the workdir of a run') from e


def _update(run, steps, state, batch):
  """Run the minibatches of a rollout; return the state and mean metrics.

  Each is cut from the whole batch on the host, so that its rows are the same
  ones on any number of processes.
  """
  placed = sharding.batch_sharding(run.mesh)
  rows = batch.mask.shape[0] // run.config.rl.minibatches
  seen = []
  for i in range(run.config.rl.minibatches):
    part = jax.tree.map(lambda x: x[i * rows:(i + 1) * rows], batch)
    part, packed = packing.for_update(part, run.config)
    state, values = steps.update(state, distributed.put(part, placed))
    seen.append(values | packed)
  seen = jax.device_get(seen)
  return state, {k: np.mean([v[k] for v in seen]) for k in seen[0]}


class Functions(NamedTuple):
  """The jitted functions of the RL phase.

  Attributes:
    steps: `train_step.Steps`.
    collect: (params, reference, step) -> RolloutBatch, metrics, show; see
      `experience.collect`.
    evaluate: params -> metrics.
    measure: params, log -> scores of the problems, see `evaluate.measure`.
  """
  steps: train_step.Steps
  collect: Any
  evaluate: Any
  measure: Any


def prepare(run):
  """Return the `Functions` of a run (compiled when first called)."""
  config, task = run.config, run.task
  steps = train_step.make(config, run.vocab_size, run.mesh)
  make = functools.partial(evaluate.make_generate, config, run.vocab_size,
                           run.mesh, steps.abstract.params,
                           task.tokenizer.ends)
  place = layout.make_place(steps.abstract.params, config, run.mesh)
  sample, greedy, several = (make(config.rl.group), make(1, greedy=True),
                             make(config.eval.samples))

  rows = sharding.batch_sharding(run.mesh)

  def score(params, *tokens):
    """Score as many rows at a time as an update reads, in its memory."""
    cut = [np.split(x, config.rl.minibatches) for x in tokens]
    out = [steps.score(params, *distributed.put(part, rows))
           for part in zip(*cut)]
    return jax.tree.map(lambda *x: np.concatenate(x), *map(
        distributed.fetch, out))

  def collect(params, reference, step):
    return experience.collect(
        params, reference, step, task=task, config=config, place=place,
        generate=sample, score=score, key=jax.random.fold_in(run.key, 3))

  measure = lambda params, log=None: evaluate.measure(
      place(params), task, greedy, several, config,
      jax.random.fold_in(run.key, 2), log)

  def held_out(params):
    start = time.perf_counter()
    values = {k: float(v.mean()) for k, v in measure(params).items()}
    return values | {'timing_s/eval': time.perf_counter() - start}

  return Functions(steps, collect, held_out, measure)


def rl(run, warm_params, stopped):
  """Train by RL from the warm-up's parameters, or from the last checkpoint.

  Returns:
    whether all steps are done.
  """
  config, functions = run.config, prepare(run)
  saved = checkpoint.Checkpoints(run.path('checkpoints', 'rl'), config.run.keep)
  start = saved.latest()
  if start is None:
    # The first update donates them, unless the KL penalty needs them on.
    state = functions.steps.init_rest(run.key)._replace(
        params=jax.tree.map(jnp.copy, warm_params) if config.rl.kl_coef
        else warm_params)
  else:
    state = saved.restore(functions.steps.abstract)
  reference = warm_params if config.rl.kl_coef else None
  writer = metrics.Writer(run.path('metrics.jsonl'), run.path('events'), start)
  metrics.keep_until(run.path('samples.jsonl'), start)
  shown = {}
  if start is None:
    start, shown = 0, functions.evaluate(state.params)
    writer.write(0, shown)
    saved.save(0, state)
  with contextlib.closing(saved), contextlib.closing(writer), metrics.progress(
      config, config.rl.steps, start, 'RL') as bar:
    for step in range(start + 1, config.rl.steps + 1):
      began = time.perf_counter()
      batch, values, show = functions.collect(state.params, reference, step)
      updating = time.perf_counter()
      state, updated = _update(run, functions.steps, state, batch)
      values |= updated
      values['timing_s/update'] = time.perf_counter() - updating
      values['timing_s/step'] = time.perf_counter() - began
      last = step == config.rl.steps
      if last or step % config.eval.every == 0:
        values |= functions.evaluate(state.params)
      if last or step == 1 or step % config.eval.every == 0:
        _note_samples(run, step, show)
      row = writer.write(step, values)
      shown |= row
      bar.set_postfix(_postfix(shown), refresh=False)
      bar.update()
      stop = stopped()
      if last or stop or step % config.run.checkpoint_every == 0:
        saved.save(step, state)
      if stop and not last:
        return False
  return True


def _note_samples(run, step, show):
  """Append one completion of each of the first four prompts."""
  if not distributed.is_writer():
    return
  r = run.config.rl
  with open(run.path('samples.jsonl'), 'a', encoding='utf-8') as f:
    for i in range(min(4, r.prompts)):
      f.write(json.dumps({'step': step, **show(i * r.group)}) + '\n')


def _postfix(row):
  out = {'reward': f'{row["reward/mean"]:.2f}'}
  for name, value in row.items():
    if name.endswith('/greedy'):
      out['acc'] = f'{value:.2f}'
  if row.get('occ/lambda') is not None:
    out['lambda'] = f'{row["occ/lambda"]:+.3f}'
  out['tok/s'] = f'{row["rollout/tokens_per_s"]:.0f}'
  return out


def finish(run, done):
  """Draw the figures and write summary.json; return the summary."""
  distributed.barrier()  # the others read what process 0 has written
  rows = metrics.read(run.path('metrics.jsonl'))
  config = run.config
  title = (f'{config.task.name} {config.task.dataset}'.strip() +
           f', regime {config.mtp.regime}, seed {config.seed}')
  if distributed.is_writer():
    plots.draw_all(rows, metrics.read(run.path('samples.jsonl')),
                   run.path('figures'), title)
  held_out = [{k: v for k, v in r.items() if k.startswith('val/')}
              for r in rows]
  held_out = [v for v in held_out if v] or [{}]
  summary = {
      'status': 'complete' if done else 'interrupted',
      'step': rows[-1]['step'] if rows else 0, 'steps': config.rl.steps,
      'seed': config.seed, 'regime': config.mtp.regime,
      'estimator': config.occ.estimator, 'after_warmup': held_out[0],
      'last': held_out[-1],
      'train_seconds': sum(r.get('timing_s/step', 0.) for r in rows)}
  metrics.write_json(run.path('summary.json'), summary)
  distributed.barrier()  # none leaves while process 0 still draws
  return summary


@contextlib.contextmanager
def _running(run):
  with (jax.set_mesh(run.mesh), contextlib.closing(run.task),
        signals.interruptible() as stopped):
    yield lambda: distributed.any_of(stopped())


def pretrain(config, workdir):
  """Run the warm-up alone; return whether it is done."""
  run = setup(config, workdir)
  with _running(run) as stopped:
    return warmup.train(run, stopped) is not None


def train(config, workdir):
  """Run or resume a whole run; return its summary.

  Args:
    config: `config.Config`.
    workdir: directory of the run, created if need be.

  Raises:
    config.ConfigError: one sentence on what is wrong and its mend.
  """
  run = setup(config, workdir)
  with _running(run) as stopped:
    params = warmup.train(run, stopped)
    done = params is not None and rl(run, params, stopped)
  return finish(run, done)


def reopen(config, workdir):
  """Return the Run of a workdir, as it trained, under its config or a variant.

  Raises:
    config.ConfigError: the config cannot work, or the workdir is damaged.
  """
  validate.validate(config)
  mesh = sharding.make_mesh(config.mesh)
  task = distributed.in_turn(lambda: tasks.make(config))
  with distributed.together():
    task.tokenizer = load_tokenizer(workdir)
  return Run(config, workdir, task, mesh, jax.random.key(config.seed))


def checkpoints(run, phase):
  """Return the directory of a phase's checkpoints; raises ConfigError."""
  where = run.path('checkpoints', phase)
  if not os.path.isdir(where):
    raise config_lib.ConfigError(f'{where} does not exist: this run has no '
                                 f'{phase} checkpoint yet')
  return where
