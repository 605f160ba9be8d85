"""A resumable comparison in one directory: plan, run, report.

    DIR/warmup/seed_S     one warm-up per seed, from which all variants start
                          that change none of warmup.*
    DIR/<variant>/seed_S  workdir of one run, with log.txt
    DIR/configs           the config of each process
    DIR/cache             compiled programs, shared by the processes
    DIR/comparison.{json,md,html}, DIR/figures
"""

import contextlib
import copy
import os
import pathlib
import sys
from typing import NamedTuple

import tqdm

from mtp_rl import config as config_lib
from mtp_rl import config_io
from mtp_rl.compare import grid, jobs, summary
from mtp_rl.report import comparison_figures, comparison_page, page
from mtp_rl.run import checkpoint, metrics, signals

_ROOT = pathlib.Path(__file__).resolve().parents[2]


class Study(NamedTuple):
  """A comparison: its variants, seeds and directory.

  Attributes:
    base: `config.Config` of the shared warm-ups.
    variants: list of `grid.Variant`, checked.
    seeds: list of ints.
    workdir: directory of the comparison.
  """
  base: config_lib.Config
  variants: list
  seeds: list
  workdir: str

  def shares_warmup(self, variant):
    """Return whether a variant starts from the warm-up of all."""
    warmup = self.base.warmup
    return bool(warmup.steps and not warmup.init
                and not grid.own_warmup(self.base, variant))

  def path(self, name, seed):
    """Return the workdir of a variant's run, or of 'warmup'."""
    return os.path.join(self.workdir, name, f'seed_{seed}')


def _config(study: Study, variant: grid.Variant, seed):
  """Return the config of one run: its seed, and the warm-up it starts from."""
  config = copy.deepcopy(variant.config)
  config.seed = seed
  if study.shares_warmup(variant):
    config.warmup.init = study.path('warmup', seed)
  return config


def _warmed_up(config: config_lib.Config, workdir):
  """Return whether a workdir has the complete warm-up of a config."""
  return os.path.isdir(os.path.join(workdir, 'checkpoints', 'warmup',
                                    str(config.warmup.steps)))


def _check(study: Study, config: config_lib.Config, workdir):
  """Reject a workdir that holds a run of another config.

  Where the comparison itself makes the warm-up, its directory may have moved.

  Raises:
    config.ConfigError: see above.
  """
  found = os.path.join(workdir, 'config.json')
  if not os.path.exists(found):
    return
  same = ['run.progress', 'task.allow_eval']
  if config.warmup.init == study.path('warmup', config.seed):
    same.append('warmup.init')
  changed = [n for n in config_io.differences(config, config_io.load(found))
             if n not in same]
  if changed:
    raise config_lib.ConfigError(
        f'{workdir} holds a run that differs in {", ".join(changed)}; '
        'choose another --workdir, or the same settings')


def _job(study: Study, name, seed, module, config: config_lib.Config, complete,
         after=''):
  """Write the config of a process and return its `jobs.Job`.

  Raises:
    config.ConfigError: the workdir holds a run of another config.
  """
  workdir = study.path(name, seed)
  _check(study, config, workdir)
  path = os.path.join(study.workdir, 'configs', f'{name}_seed_{seed}.json')
  metrics.write_json(path, config_io.to_dict(config))
  command = [sys.executable, '-m', f'experiments.{module}',
             f'--config={_ROOT}/configs/from_json.py:{path}',
             f'--workdir={workdir}']
  if config.task.allow_eval:  # no file can allow it
    command.append('--config.task.allow_eval=true')
  return jobs.Job(f'{name}/seed_{seed}', command,
                  os.path.join(workdir, 'log.txt'), complete, after)


def plan(study: Study):
  """Return the list of `jobs.Job`, seed by seed.

  Raises:
    config.ConfigError: a workdir holds a run of another config.
  """
  os.makedirs(os.path.join(study.workdir, 'configs'), exist_ok=True)
  out, shared = [], [v for v in study.variants if study.shares_warmup(v)]
  for seed in study.seeds:
    after = ''
    if shared:
      config = copy.deepcopy(study.base)
      config.seed = seed
      workdir = study.path('warmup', seed)
      out.append(_job(study, 'warmup', seed, 'pretrain', config,
                      lambda c=config, w=workdir: _warmed_up(c, w)))
      after = out[-1].name
    for variant in study.variants:
      workdir = study.path(variant.name, seed)
      out.append(_job(study, variant.name, seed, 'train',
                      _config(study, variant, seed),
                      lambda w=workdir: summary.is_complete(w),
                      after if variant in shared else ''))
  return out


@contextlib.contextmanager
def _alone(workdir):
  """Lock a comparison; its processes keep the lock if this one is killed."""
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
          'another comparison, or a run that it left behind, is working in '
          f'{workdir}; wait for it, or end it') from None
    yield (f.fileno(),)


def _environment(workdir):
  out = dict(os.environ)
  out.setdefault('JAX_COMPILATION_CACHE_DIR',
                 os.path.abspath(os.path.join(workdir, 'cache')))
  out.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
  out.setdefault('GLIBC_TUNABLES', jobs.MALLOC)
  out['PYTHONPATH'] = os.pathsep.join(
      filter(None, [str(_ROOT), out.get('PYTHONPATH')]))
  return out


def run(study: Study, slots):
  """Run the jobs that are not complete yet, several at a time.

  Args:
    study: `Study`.
    slots: number of processes at a time.

  Returns:
    dict name -> problem of the runs that failed, and whether a signal
    stopped the comparison.

  Raises:
    config.ConfigError: the workdir cannot be used.
  """
  checkpoint.prepare_workdir(study.workdir)
  with _alone(study.workdir) as lock, signals.interruptible(
      at_once=jobs.kill) as stopped:
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


def _warmups(study: Study, runs):
  """Return name -> seed -> rows of warmup.jsonl; {} if all share one warm-up.

  Args:
    study: `Study`.
    runs: dict from `summary.collect`; seeds that it lacks are left out.

  Raises:
    config.ConfigError: a line of a file is no row of a warm-up.
  """
  if not any(grid.own_warmup(study.base, v) for v in study.variants):
    return {}
  home = {v.name: 'warmup' if study.shares_warmup(v) else v.name
          for v in study.variants}
  return {name: {s: rows for s in seeds if (rows := metrics.read(
      os.path.join(study.path(home[name], s), 'warmup.jsonl'),
      ('step', 'warmup/loss')))} for name, seeds in runs.items()}


def write_report(study: Study, failed=None, least=None, seconds=False):
  """Write comparison.{json,md,html} and figures/ of the complete runs.

  Args:
    study: `Study`.
    failed: dict from `run`, or None.
    least: held-out greedy accuracy from which a seed counts as solved; None:
      shares are left out.
    seconds: whether rewards are also compared in equal seconds.

  Returns:
    path of comparison.md.

  Raises:
    config.ConfigError: no run is complete, or one is of another config.
  """
  runs = summary.collect(study.variants, study.seeds, study.path)
  for variant in study.variants:
    for seed in runs[variant.name]:
      _check(study, _config(study, variant, seed),
             study.path(variant.name, seed))
  if not any(runs.values()):
    raise config_lib.ConfigError(f'{study.workdir} holds no complete run of '
                                 'this comparison')
  rows = summary.compare(study.variants, runs, seconds)
  task = study.base.task
  title = (f'{task.name} {task.dataset}'.strip() +
           f': {len(study.variants)} variants, seeds: {len(study.seeds)}, '
           f'RL steps: {study.base.rl.steps}')
  missing = [f'{v.name}/seed_{s}' for v in study.variants
             for s in study.seeds if s not in runs[v.name]]
  metrics.write_json(
      os.path.join(study.workdir, 'comparison.json'),
      {'title': title, 'seeds': study.seeds, 'missing': missing,
       'failed': failed or {}, 'variants': metrics.to_json(rows),
       'overrides': {v.name: {
           n: _field(v.config, n)
           for n in config_io.differences(v.config, study.base)}
           for v in study.variants}})
  path = os.path.join(study.workdir, 'comparison.md')
  text = summary.markdown(rows, title, least)
  if missing:
    text += f'\nWithout a complete run: {", ".join(missing)}.\n'
  with open(path, 'w', encoding='utf-8') as f:
    f.write(text)
  directory = os.path.join(study.workdir, 'figures')
  os.makedirs(directory, exist_ok=True)
  comparison_figures.draw_all(study.variants, runs, rows, directory, title)
  comparison_figures.warmups(study.variants, _warmups(study, runs), directory,
                             title)
  if seconds:
    comparison_figures.reward_by_seconds(study.variants, runs, rows, directory,
                                         title)
  for name, seeds in runs.items():
    for seed in seeds:  # runs of older versions have no page
      if not os.path.exists(os.path.join(study.path(name, seed),
                                         'report.html')):
        page.write_run(study.path(name, seed))
  page.write(os.path.join(study.workdir, 'comparison.html'),
             comparison_page.payload(study.variants, runs, rows, study.path,
                                     study.workdir, title, missing))
  return path


def _field(config: config_lib.Config, name):
  value = config_io.field(config, name)
  return str(value) if isinstance(value, float) and abs(value) == float(
      'inf') else value
