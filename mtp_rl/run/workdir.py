"""A run and its workdir: everything that is checked before long work starts.

A workdir holds config.json, tokenizer.json, data.json (tasks with data sets),
published.json (the config.json of pretrained weights), warmup.jsonl,
metrics.jsonl, samples.jsonl, tokens.jsonl, what run.loggers writes, figures/,
report.html, checkpoints/{warmup,rl}/ and summary.json; experiments/README.md
says what each is.
"""

import json
import os
from typing import Any, NamedTuple

import jax
import numpy as np

from mtp_rl import config as config_lib
from mtp_rl import (
  config_io,
  distributed,
  prng,
  sharding,
  tasks,
  tokenizers,
  validate,
)
from mtp_rl.models import pretrained
from mtp_rl.rollout import prompts as prompts_lib
from mtp_rl.run import checkpoint, loggers, metrics, owner

_PUBLISHED = 'published.json'
# Fields that may change when a workdir is resumed: bookkeeping, and where and
# in what portions the work is done, which changes results by rounding alone.
# `_may_change` adds those that some settings tie to the result.
_BOOKKEEPING = ('eval.every', 'run.checkpoint_every', 'run.keep',
                'run.progress', 'run.loggers', 'run.hang_minutes',
                'run.strict', 'task.allow_eval')
_LAYOUT = ('mesh.data', 'mesh.fsdp', 'mesh.tensor', 'mesh.expert',
           'rollout.tensor', 'rollout.expert', 'model.remat',
           'model.head_chunk', 'task.processes')
# Fields of a model that its weights do not depend on; and the others of its
# modules that they do.
_SAME_WEIGHTS = ('model.dtype', 'model.attention', 'model.remat',
                 'model.head_chunk', 'model.expert_form', 'model.pretrained',
                 'model.vocab_size')
_SAME_MODULES = ('mtp.kind', 'mtp.concat', 'mtp.hidden', 'mtp.lora_rank',
                 'mtp.lora_alpha', 'mtp.lora_targets')


class Run(NamedTuple):
  """What the phases of a run share.

  Attributes:
    config: `config.Config`, its vocabulary resolved.
    workdir: directory.
    task: see `tasks.Task`.
    mesh: the device mesh of training.
    key: PRNG key from `prng.run_key`.
  """
  config: config_lib.Config
  workdir: str
  task: Any
  mesh: jax.sharding.Mesh
  key: jax.Array

  def path(self, *names):
    """Return a path inside the workdir."""
    return os.path.join(self.workdir, *names)

  def checkpoints(self, phase):
    """Return the directory of a phase's checkpoints ('warmup' or 'rl').

    With warmup.init, the warm-up's are those of that workdir.
    """
    home = self.config.warmup.init if phase == 'warmup' else ''
    return os.path.join(home or self.workdir, 'checkpoints', phase)


def setup(config: config_lib.Config, workdir):
  """Check everything that can be checked before long work, and return a `Run`.

  Raises:
    config.ConfigError: one sentence on what is wrong and how to fix it.
  """
  validate.validate(config)
  if (config.mtp.regime.startswith('occ')
      and config.mtp.coef != config_lib.MTP().coef):
    metrics.note(f'mtp.coef={config.mtp.coef} has no effect, since mtp.regime='
                 f'{config.mtp.regime} computes lambda; mtp.regime=fixed holds '
                 'it fixed')
  distributed.be_patient(60 * config.run.hang_minutes)
  mesh = sharding.make_mesh(config.mesh)
  path = os.path.join(workdir, 'config.json')
  with distributed.together():
    if distributed.is_writer():
      loggers.check(config.run.loggers)
    checkpoint.prepare_workdir(workdir)
    owner.take(workdir)
    _same_config(path, config)
    _check_rows(workdir)
  task = distributed.in_turn(lambda: tasks.make(config))
  with distributed.together():
    if config.warmup.init:
      _same_model(config)
      task.tokenizer = _tokenizer_of_warmup(config.warmup.init)
      # Names damage now; the first row of metrics.jsonl is made from it.
      metrics.read(os.path.join(config.warmup.init, 'warmup.jsonl'), ('step',))
    _check_lengths(config, task)
    run = _run(config, workdir, task, mesh)
    published = _check_pretrained(run)
    start(config, task)
    _check_rewards(config, task)
  report = getattr(task, 'report', None)
  data = os.path.join(workdir, 'data.json')
  with distributed.together():
    if report is not None:
      _same_data(data, report)
  differing = distributed.differing({
      'config': config_io.to_dict(config),
      'tokenizer': task.tokenizer.to_dict(), 'data': report})
  if differing:
    raise config_lib.ConfigError(
        f'the processes differ in {", ".join(differing)}; start all of them '
        'with the same command on the same files')
  metrics.write_json(path, config_io.to_dict(config))
  metrics.write_json(os.path.join(workdir, 'tokenizer.json'),
                     task.tokenizer.to_dict())
  if published is not None:
    metrics.write_json(run.path(_PUBLISHED), published)
  if report is not None:
    metrics.write_json(data, report)
  return run


def _run(config: config_lib.Config, workdir, task, mesh):
  config = config_lib.with_vocabulary(config, task.tokenizer.vocab_size)
  return Run(config, workdir, task, mesh, prng.run_key(config.seed))


def reopen(config: config_lib.Config, workdir):
  """Return the `Run` of a workdir, under its config or a variant of it.

  Raises:
    config.ConfigError: the config cannot work, or the workdir is damaged.
  """
  validate.validate(config)
  distributed.be_patient(60 * config.run.hang_minutes)
  mesh = sharding.make_mesh(config.mesh)
  task = distributed.in_turn(lambda: tasks.make(config))
  with distributed.together():
    task.tokenizer = load_tokenizer(workdir)
  return _run(config, workdir, task, mesh)


def start(config: config_lib.Config, task):
  """Start what verifies a task's answers, before any is sampled.

  Raises:
    config.ConfigError: the processes do not start, or the tokenizer does not
      know the prompts.
  """
  _check_texts(config, task)
  if hasattr(task, 'start'):
    task.start()


def existing_checkpoints(run: Run, phase):
  """Return the directory of a phase's checkpoints in the run's own workdir.

  Raises:
    config.ConfigError: there is none.
  """
  where = run.path('checkpoints', phase)
  if not os.path.isdir(where):
    raise config_lib.ConfigError(f'{where} does not exist: this run has no '
                                 f'{phase} checkpoint yet; --phase names '
                                 'the other phase')
  return where


def _may_change(config: config_lib.Config):
  """Return the names of the fields that may change at a resume."""
  free = _BOOKKEEPING + _LAYOUT
  if config.optim.schedule == 'constant':  # others depend on it
    free += ('rl.steps',)
  if config.mtp.regime != 'occ_authors':  # whose lambda is one a microbatch
    free += ('rl.microbatches',)
  if not config.rollout.draft or config.rollout.verify == 'coupled':
    free += ('rollout.slots', 'rollout.draft_rows')  # the same tokens
  elif config.rollout.slots and config.rollout.draft_rows:
    # Each device begins to draft when its own slots are few.
    free = tuple(n for n in free if not n.startswith(('mesh.', 'rollout.')))
  return free


def _same_config(path, config: config_lib.Config):
  """Say how a config differs from the one that a workdir was begun with.

  Raises:
    config.ConfigError: in a field that must stay.
  """
  if not os.path.exists(path):
    return
  before, free = config_io.load(path), _may_change(config)
  different = config_io.differences(config, before)
  changed = [n for n in different if n not in free]
  if changed:
    raise config_lib.ConfigError(
        f'workdir {os.path.dirname(path)} belongs to a run that differs in '
        f'{", ".join(changed)}; choose another --workdir, or the same settings')
  moved = [n for n in different if n in free and n not in _BOOKKEEPING]
  if moved:
    metrics.note(f'the run goes on with {config_io.describe(config, moved)} '
                 f'instead of {config_io.describe(before, moved)}')


def _same_model(config: config_lib.Config):
  """Refuse a warm-up whose weights would compute something else here.

  Shapes are compared when they are read; many fields leave no trace in them.

  Raises:
    config.ConfigError: naming the fields.
  """
  path = os.path.join(config.warmup.init, 'config.json')
  if not os.path.exists(path):
    return
  before = config_io.load(path)
  modules = _SAME_MODULES if config.mtp.modules and before.mtp.modules else ()
  changed = [n for n in config_io.differences(config, before)
             if n in modules or (n.startswith('model.')
                                 and n not in _SAME_WEIGHTS)]
  if changed:
    raise config_lib.ConfigError(
        f'warmup.init={config.warmup.init} was trained with '
        f'{config_io.describe(before, changed)}, but here is '
        f'{config_io.describe(config, changed)}; set the same, or train '
        'another warm-up')


def _names(directory):
  return os.listdir(directory) if os.path.isdir(directory) else []


def _check_rows(workdir):
  """Raise ConfigError if rows are damaged, or belong to no checkpoint."""
  for name, keys in (('warmup', ()), ('metrics', ()), ('tokens', ()), (
      'samples', ('prompt', 'completion', 'answer', 'reward'))):
    path = os.path.join(workdir, f'{name}.jsonl')
    rows = metrics.read(path, ('step', *keys))
    where = os.path.join(workdir, 'checkpoints', 'rl')
    # The checkpoint of step 0 is made before step 1.
    if name == 'metrics' and rows and rows[-1]['step'] > 0 and not any(
        n.isdecimal() for n in _names(where)):
      raise config_lib.ConfigError(
          f'{path} has rows up to step {rows[-1]["step"]}, but {where} has no '
          'checkpoint; restore it, or choose another --workdir')


def _check_lengths(config: config_lib.Config, task):
  """Raise ConfigError if the longest texts of a task do not fit."""
  r = config.rollout
  probe = task.probe()
  if (config.warmup.steps and config.warmup.data == 'solutions'
      and not config.warmup.init and not any(e.solution for e in probe)):
    raise config_lib.ConfigError(
        f'task.name={config.task.name} gives no solution to imitate; set '
        'warmup.steps=0')
  for example in probe:
    prompts_lib.check_prompt(example.prompt,
                         len(task.tokenizer.encode(example.prompt)),
                         r.max_prompt)
    if (config.warmup.steps and config.warmup.data == 'solutions'
        and example.solution):
      prompts_lib.pad_supervised([example], task.tokenizer, r.max_prompt,
                             r.max_response)


def _check_texts(config: config_lib.Config, task):
  """Raise ConfigError if prompts have characters that nothing encodes."""
  known = getattr(task.tokenizer, 'characters', None)
  for example in task.prompts(0, 16) if known is not None else ():
    if unknown := ''.join(sorted(set(example.prompt) - set(known))):
      where = config.warmup.init
      raise config_lib.ConfigError(
          f'the prompt {example.prompt[:60]!r} of task.name={config.task.name} '
          f'has characters that the tokenizer does not know: {unknown!r}; '
          + (f'choose the task that warmup.init={where} was trained on'
             if where else 'choose the task that the workdir was trained on, '
             "or give a new task's tokenizer all its characters"))


def _check_rewards(config: config_lib.Config, task):
  """Raise ConfigError if a task does not give an answer one finite number."""
  example, name = task.prompts(0, 1)[0], f'task.name={config.task.name}'
  try:
    given = task.rewards([example], [example.solution or example.answer])
    found = np.asarray(given, np.float64)
  except Exception as e:  # a user's code can raise anything
    raise config_lib.ConfigError(
        f'the rewards of {name} fail on one answer to its own problem '
        f'{example.prompt[:60]!r} ({type(e).__name__}: {e}); correct the task'
        ) from e
  if found.shape != (1,) or not np.isfinite(found).all():
    raise config_lib.ConfigError(
        f'the rewards of {name} are {given!r} for one answer; return a list '
        'of one finite number an answer')


def _check_pretrained(run):
  """Return the config.json of the weights that the run begins with, or None.

  Raises:
    config.ConfigError: they are still to be read and do not fit.
  """
  config, where = run.config, run.checkpoints('warmup')
  started = os.path.isdir(where) and os.listdir(where)
  if config.model.pretrained and not started:
    return pretrained.check(config.model.pretrained, config.model,
                            config.mtp).config
  return published_config(config.warmup.init) if config.warmup.init else None


def published_config(workdir):
  """Return the config.json of a workdir's pretrained weights, or None.

  Raises:
    config.ConfigError: the file is damaged.
  """
  path = os.path.join(workdir, _PUBLISHED)
  if not os.path.exists(path):
    return None
  fix = 'remove it to write a new config.json without the original entries'
  return _object(path, config_io.read_json(path, fix), fix)


def _object(path, values, fix):
  """Return a dict of a JSON file; raises ConfigError if it is none."""
  if not isinstance(values, dict):
    raise config_lib.ConfigError(f'{path} is not what a run writes; {fix}')
  return values


def _same_data(path, report):
  """Raise ConfigError if data files have changed since the run began."""
  if os.path.exists(path):
    fix = 'remove it where the data is that of the run'
    found = _object(path, config_io.read_json(path, fix), fix)
    before = _object(path, found.get('sha256'), fix)
    changed = [n for n in before if before[n] != report['sha256'].get(n)]
    if changed:
      raise config_lib.ConfigError(
          f'the files of {", ".join(changed)} have changed since {path} was '
          'written; restore them, or choose another workdir')


def _tokenizer_of_warmup(workdir):
  """Return the tokenizer of a workdir whose warm-up is complete."""
  steps = config_io.load(os.path.join(workdir, 'config.json')).warmup.steps
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
  except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
    raise config_lib.ConfigError(
        f'{path} cannot be read ({e}); name the workdir of a run') from e
