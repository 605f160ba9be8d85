"""Resumable scoring of a workdir's checkpoint, one JSONL row per sample."""

import contextlib
import hashlib
import json
import os

import jax

from mtp_rl import config as config_lib
from mtp_rl import config_io, distributed, trainer, validate
from mtp_rl.evaluation import held_out
from mtp_rl.report import intervals, tables
from mtp_rl.run import checkpoint, metrics
from mtp_rl.run import workdir as workdir_lib

# Sections that --set may change; the others say how the model was trained.
MAY_SET = ('task.', 'rollout.', 'eval.', 'mesh.')
_IRRELEVANT = ('run', 'rl', 'optim', 'warmup', 'occ')


class RowLog:
  """The rows of one evaluation in a file, appended batch by batch.

  If a kill cut the last line short, it is dropped and sampled again.

  Attributes:
    resumed: whether the file had rows.
  """

  def __init__(self, path, identity):
    """Open the file, or begin it.

    Args:
      path: the JSONL file; its first line holds the identity.
      identity: JSON-ready dict of everything that determines the rows.

    Raises:
      config.ConfigError: the file holds rows of another evaluation.
    """
    found, self._rows = metrics.read(path), {}
    self.resumed = len(found) > 1
    if found and found[0] != {'identity': identity}:
      raise config_lib.ConfigError(
          f'{path} holds the samples of another evaluation (another config, '
          'checkpoint or version); move it away')
    for row in found[1:]:
      self._keep(row)
    self._file = None
    if not distributed.is_writer():
      return
    with open(path + '.part', 'w', encoding='utf-8') as f:
      for row in found or [{'identity': identity}]:
        f.write(json.dumps(row) + '\n')
    os.replace(path + '.part', path)
    self._file = open(path, 'a', encoding='utf-8')

  def _key(self, row):
    return row['set'], row['mode'], row['problem'], row['sample']

  def _keep(self, row):
    self._rows[self._key(row)] = row

  def get(self, name, mode, problems, k):
    """Return the k rows of each of some problems in order, or None."""
    rows = [self._rows.get((name, mode, i, j)) for i in problems
            for j in range(k)]
    return None if None in rows else rows

  def add(self, rows):
    """Append rows; process 0 has them on disk when this returns.

    Rows that the file has already, of a batch cut short by a kill, are skipped.
    """
    rows = [row for row in rows if self._key(row) not in self._rows]
    for row in rows:
      self._keep(row)
    if self._file is None:
      return
    self._file.writelines(json.dumps(row) + '\n' for row in rows)
    self._file.flush()
    os.fsync(self._file.fileno())

  def close(self):
    """Close the file."""
    if self._file is not None:
      self._file.close()


def configure(config: config_lib.Config, samples, settings):
  """Apply the settings of an evaluation to a workdir's config; return it.

  Args:
    config: `config.Config`, changed in place.
    samples: k; None: 32 for task math, else 16.
    settings: texts 'section.field=value'.

  Raises:
    config.ConfigError: a setting is unknown, not one of `MAY_SET`, or --k.
  """
  for setting in settings:
    name, equals, text = setting.partition('=')
    if not equals or not name.startswith(MAY_SET):
      raise config_lib.ConfigError(
          f'--set={setting} is not section.field=value with a section of '
          f'{", ".join(s[:-1] for s in MAY_SET)}')
    if name == 'eval.samples':
      raise config_lib.ConfigError(f'--set={setting}: use --k={text}')
    config_io.assign(config, name, text)
  config.eval.samples = samples or (32 if config.task.name == 'math' else 16)
  validate.validate(config)
  return config


def _identity(config: config_lib.Config, where, step, task):
  """Return what determines the samples of a checkpoint under a config."""
  values = {k: v for k, v in config_io.to_dict(config).items()
            if k not in _IRRELEVANT}
  values['eval'] = {k: v for k, v in values['eval'].items() if k != 'every'}
  values['task'] = {k: v for k, v in values['task'].items()
                    if k not in ('data_dir', 'cache_dir', 'processes')}
  values['data'] = getattr(task, 'report', {}).get('sha256')
  digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
  # The metadata has the time of saving, so it identifies a checkpoint and its
  # copies.
  with open(os.path.join(where, str(step), '_CHECKPOINT_METADATA'), 'rb') as f:
    digest.update(f.read())
  return {'step': step, 'k': config.eval.samples, 'sha256': digest.hexdigest()}


def score_checkpoint(workdir, phase, step, samples, settings=()):
  """Evaluate a checkpoint of a workdir on the held-out sets of its config.

  Args:
    workdir: of a run.
    phase: 'rl' or 'warmup'.
    step: int, or None for the latest.
    samples: k of avg@k, pass@k and maj@k; None: see `configure`.
    settings: texts 'section.field=value' for this evaluation.

  Returns:
    {name: (mean, low, high)} with 95 % bootstrap intervals over problems, and
    the path of the JSON file they were written to; the rows are beside it.

  Raises:
    config.ConfigError: there is no such checkpoint, it is damaged, or a
      setting cannot work.
  """
  config = configure(config_io.load(os.path.join(workdir, 'config.json')),
                     samples, settings)
  run = workdir_lib.reopen(config, workdir)
  where = workdir_lib.existing_checkpoints(run, phase)
  with jax.set_mesh(run.mesh), contextlib.closing(run.task):
    saved = checkpoint.Checkpoints(where, config.run.keep)
    workdir_lib.start(run.config, run.task)
    functions = trainer.prepare(run)
    step = saved.latest() if step is None else step
    params = saved.restore(functions.steps.abstract, step, params_only=True)
    os.makedirs(run.path('evaluation'), exist_ok=True)
    identity = _identity(config, where, step, run.task)
    name = f'{phase}_{step}_k{config.eval.samples}'
    if settings:
      name += '_' + identity['sha256'][:8]
    path = run.path('evaluation', name + '.json')
    with distributed.together():
      log = RowLog(run.path('evaluation', name + '.jsonl'), identity)
    with contextlib.closing(log):
      scores = held_out.measure(functions.examiner, params, log)
    values = {k: (float(v.mean()), *intervals.bootstrap(v))
              for k, v in scores.items()}
    metrics.write_json(path, {
        'step': step, **{k: v[0] for k, v in values.items()},
        'intervals': {k: v[1:] for k, v in values.items()},
        'problems': {k: len(v) for k, v in scores.items()},
        'verifier': _failures(run.task, log, path),
        'settings': list(settings)})
  return values, path


def _failures(task, log, path):
  """Return the verifier's failures; None where an earlier process had some."""
  mine = distributed.total(task.counts())
  if not log.resumed:
    return mine
  if not os.path.exists(path):
    return None
  return config_io.read_json(path, 'remove it').get('verifier')


def table(values):
  """Return a Markdown table of `score_checkpoint`'s values, a row per set.

  Values are percent with their 95 % interval. If there are several sets, the
  last row is the mean over sets, as in the paper.
  """
  # The name of a set may have slashes of its own.
  names = [k.split('/', 1)[1].rsplit('/', 1) for k in values]
  sets = list(dict.fromkeys(n for n, _ in names))
  columns = list(dict.fromkeys(c for _, c in names))
  show = lambda v: (f'{100 * v[0]:.1f} [{100 * v[1]:.1f}, {100 * v[2]:.1f}]')
  rows = [[n] + [show(values[f'val/{n}/{c}']) for c in columns] for n in sets]
  if len(sets) > 1:
    rows.append(['mean'] + [f'{100 * _mean(values, sets, c):.1f}'
                            for c in columns])
  return tables.markdown(['set (%)', *columns], rows).rstrip()


def _mean(values, sets, column):
  return sum(values[f'val/{n}/{column}'][0] for n in sets) / len(sets)
