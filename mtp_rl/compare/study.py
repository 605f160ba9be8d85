"""A whole comparison in one directory: plan, run, report; resumable.

    DIR/warmup/seed_S     one warm-up a seed, from which all variants start
    DIR/<variant>/seed_S  a workdir each, with log.txt
    DIR/configs           the config of each process
    DIR/cache             compiled programs, shared by the processes
    DIR/comparison.{json,md}, DIR/figures
"""

import contextlib
import copy
import os
import pathlib
import sys
from typing import NamedTuple

import tqdm

from mtp_rl import checkpoint, metrics, signals
from mtp_rl import config as config_lib
from mtp_rl.compare import figures, jobs, report

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_IGNORED = ('warmup.init', 'run.progress')


class Study(NamedTuple):
  """What is compared, and where.

  Attributes:
    base: `config.Config` that the warm-ups run with.
    variants: list of `grid.Variant`, checked.
    seeds: list of ints.
    workdir: directory of the comparison.
  """
  base: config_lib.Config
  variants: list
  seeds: list
  workdir: str

  def path(self, name, seed):
    """Return the workdir of a variant's run, or of 'warmup'."""
    return os.path.join(self.workdir, name, f'seed_{seed}')


def _config(study, config, seed):
  """Return the config of one run: its seed, and the warm-up it starts from."""
  config = copy.deepcopy(config)
  config.seed = seed
  if not config.warmup.init and config.warmup.steps:
    config.warmup.init = study.path('warmup', seed)
  return config


def _warmed_up(config, workdir):
  return os.path.isdir(os.path.join(workdir, 'checkpoints', 'warmup',
                                    str(config.warmup.steps)))


def _job(study, name, seed, module, config, complete, after=''):
  """Write a process's config, refuse a foreign workdir; return its `Job`."""
  workdir = study.path(name, seed)
  found = os.path.join(workdir, 'config.json')
  if os.path.exists(found):
    changed = [n for n in config_lib.differences(config,
                                                 config_lib.load(found))
               if n not in _IGNORED]
    if changed:
      raise config_lib.ConfigError(
          f'{workdir} holds a run that differs in {", ".join(changed)}; '
          'choose another --workdir, or set the same')
  path = os.path.join(study.workdir, 'configs', f'{name}_seed_{seed}.json')
  metrics.write_json(path, config_lib.to_dict(config))
  command = [sys.executable, '-m', f'experiments.{module}',
             f'--config={_ROOT}/configs/from_json.py:{path}',
             f'--workdir={workdir}']
  return jobs.Job(f'{name}/seed_{seed}', command,
                  os.path.join(workdir, 'log.txt'), complete, after)


def plan(study):
  """Return the list of `jobs.Job`, all of one seed before the next.

  Raises:
    config.ConfigError: a run in the way has another config.
  """
  os.makedirs(os.path.join(study.workdir, 'configs'), exist_ok=True)
  out = []
  for seed in study.seeds:
    after = ''
    if study.base.warmup.steps and not study.base.warmup.init:
      config = copy.deepcopy(study.base)
      config.seed = seed
      workdir = study.path('warmup', seed)
      out.append(_job(study, 'warmup', seed, 'pretrain', config,
                      lambda c=config, w=workdir: _warmed_up(c, w)))
      after = out[-1].name
    for variant in study.variants:
      workdir = study.path(variant.name, seed)
      out.append(_job(study, variant.name, seed, 'train',
                      _config(study, variant.config, seed),
                      lambda w=workdir: report.is_complete(w), after))
  return out


@contextlib.contextmanager
def _alone(workdir):
  """Lock a comparison; its processes hold the lock on, should we be killed."""
  try:
    import fcntl  # POSIX only
  except ImportError:
    yield ()
    return
  with open(os.path.join(workdir, '.lock'), 'w', encoding='utf-8') as f:
    try:
      fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      raise config_lib.ConfigError(
          f'another comparison, or a run that it left behind, works in '
          f'{workdir}; wait for it, or end it') from None
    yield (f.fileno(),)


def _environment(workdir):
  out = dict(os.environ)
  out.setdefault('JAX_COMPILATION_CACHE_DIR',
                 os.path.abspath(os.path.join(workdir, 'cache')))
  out.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
  out['PYTHONPATH'] = os.pathsep.join(
      filter(None, [str(_ROOT), out.get('PYTHONPATH')]))
  return out


def run(study, slots):
  """Run what is not complete yet, several processes at a time.

  Args:
    study: `Study`.
    slots: processes at a time.

  Returns:
    dict name -> problem of the runs that failed, and whether a signal
    stopped the comparison.

  Raises:
    config.ConfigError: the workdir cannot be used.
  """
  checkpoint.prepare_workdir(study.workdir)
  with _alone(study.workdir) as lock, signals.interruptible() as stopped:
    todo = plan(study)
    done = sum(job.complete() for job in todo)
    with tqdm.tqdm(total=len(todo), initial=done, desc='runs', unit='run',
                   file=sys.stderr, disable=not study.base.run.progress,
                   dynamic_ncols=True, smoothing=.1) as bar:
      def note(job, problem):
        if problem:
          bar.write(f'failed: {job.name}: {problem}', file=sys.stderr)
        bar.update()
        bar.set_postfix_str(job.name)

      waiting = [job for job in todo if not job.complete()]
      ready = {job.name for job in todo} - {job.name for job in waiting}
      waiting = [job._replace(after='' if job.after in ready else job.after)
                 for job in waiting]
      failed = jobs.run(waiting, slots, stopped, note,
                        _environment(study.workdir), lock)
    return failed, stopped() and any(
        not job.complete() for job in todo if job.name not in failed)


def write_report(study, failed=None):
  """Write comparison.json, comparison.md and figures/ of the complete runs.

  Args:
    study: `Study`.
    failed: of `run`.

  Returns:
    path of comparison.md.

  Raises:
    config.ConfigError: no run is complete.
  """
  runs = report.collect(study.variants, study.seeds, study.path)
  if not any(runs.values()):
    raise config_lib.ConfigError(f'{study.workdir} holds no complete run of '
                                 'this comparison')
  rows = report.compare(study.variants, runs)
  task = study.base.task
  title = (f'{task.name} {task.dataset}'.strip() +
           f': {len(study.variants)} variants, seeds: {len(study.seeds)}, '
           f'RL steps: {study.base.rl.steps}')
  missing = [f'{v.name}/seed_{s}' for v in study.variants
             for s in study.seeds if s not in runs[v.name]]
  metrics.write_json(
      os.path.join(study.workdir, 'comparison.json'),
      {'title': title, 'seeds': study.seeds, 'missing': missing,
       'failed': failed or {}, 'variants': report.to_json(rows),
       'overrides': {v.name: {
           n: _field(v.config, n)
           for n in config_lib.differences(v.config, study.base)}
           for v in study.variants}})
  path = os.path.join(study.workdir, 'comparison.md')
  text = report.markdown(rows, title)
  if missing:
    text += f'\nWithout a complete run: {", ".join(missing)}.\n'
  with open(path, 'w', encoding='utf-8') as f:
    f.write(text)
  directory = os.path.join(study.workdir, 'figures')
  os.makedirs(directory, exist_ok=True)
  figures.draw_all(study.variants, runs, rows, directory, title)
  return path


def _field(config, name):
  section, _, field = name.rpartition('.')
  value = getattr(getattr(config, section) if section else config, field)
  return str(value) if isinstance(value, float) and abs(value) == float(
      'inf') else value
