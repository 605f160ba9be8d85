r"""Regimes x estimators x seeds on one config, paired by seed.

    python -m experiments.compare --config=configs/quickstart.py \
        --workdir=DIR --preset=table1 --seeds=5 --jobs=2

One warm-up per seed, then each variant trains from it in a separate process.
Overrides such as --config.rl.steps=60 apply to all of them. Ctrl-C or SIGTERM
stops; the same command resumes. Variants can also be given freely, with presets
or without:
    --variants='a:mtp.regime=occ;b:mtp.regime=occ,occ.estimator=curvature'
A variant that changes warmup.* has a warm-up of its own, under all its own
settings; this compares supervised training alone:
    --config.mtp.regime=detach --config.rl.steps=0 \
    --variants='next:warmup.mtp_coef=0;joint:warmup.mtp_coef=1'
"""

import sys

from absl import flags
from ml_collections import config_flags

from experiments import launch
from mtp_rl.run import endings

CONFIG = launch.define_config()
_PRESET = flags.DEFINE_list('preset', [], 'table1, table2, trace, pareto.')
_VARIANTS = flags.DEFINE_string('variants', '', 'name:section.field=value,...;')
_CLIPS = flags.DEFINE_list('clips', ['paper', 'separate'], 'paper, separate.')
_OBJECTIVES = flags.DEFINE_list(
    'objectives', None, 'Of config.PRESETS; default: those of --preset.')
_ESTIMATORS = flags.DEFINE_list(
    'estimators', None, 'Of OCC; default: logprob, and all for trace.')
_COEF = flags.DEFINE_float(
    'coef', None, 'lambda of ce and policy in table1; default: 1 and .1.')
_SEEDS = flags.DEFINE_integer('seeds', 5, 'Number of seeds.', lower_bound=1)
_JOBS = flags.DEFINE_integer('jobs', 1, 'Runs at a time.', lower_bound=1)
_SOLVED = flags.DEFINE_float(
    'solved', None, 'Held-out greedy accuracy (mean of the sets) from which a '
    'seed counts as solved; comparison.md then has the shares.',
    lower_bound=0., upper_bound=1.)
_SECONDS = flags.DEFINE_bool(
    'seconds', False, 'Also compare rewards in equal seconds; run with '
    '--jobs=1 on a quiet machine.')
_REPORT_ONLY = flags.DEFINE_bool('report_only', False, 'Only write the report.')


def _refuse_unread(presets):
  """Refuse a flag that none of the presets given reads."""
  from mtp_rl import config as config_lib
  for name, readers in (('coef', ['table1']), ('estimators', presets),
                        ('objectives', presets),
                        ('clips', ['table1', 'table2', 'trace'])):
    if flags.FLAGS[name].present and not set(readers) & set(_PRESET.value):
      raise config_lib.ConfigError(
          f'--{name} is read by --preset={",".join(readers)} alone; leave it '
          'out, or set --preset')


def _study():
  from mtp_rl.compare import grid, study  # late, so that typos fail fast
  _refuse_unread(grid.PRESETS)
  base = CONFIG.value
  variants = [v for preset in _PRESET.value for v in grid.preset_variants(
      base, preset, _CLIPS.value, _ESTIMATORS.value, _COEF.value,
      _OBJECTIVES.value)]
  variants += grid.free_variants(base, _VARIANTS.value)
  overridden = config_flags.get_override_values(flags.FLAGS['config'])
  return study.Study(base, grid.check(base, variants, overridden),
                     [base.seed + i for i in range(_SEEDS.value)],
                     launch.WORKDIR.value)


def main():
  """Run, write tables and figures, and say what failed."""
  from mtp_rl.compare import study
  plan, failed, stopped = _study(), {}, False
  if not _REPORT_ONLY.value:
    failed, stopped = study.run(plan, _JOBS.value)
  if stopped:
    launch.end('interrupted; the same command resumes, and --report_only '
               'makes the tables of the runs that are complete',
               endings.STOPPED)
  path = study.write_report(plan, failed, _SOLVED.value, _SECONDS.value)
  print(f'see {path}, and comparison.html and figures beside it')
  if failed:
    sys.exit(f'error: {len(failed)} runs failed: {", ".join(failed)}; '
             'see their log.txt, the same command tries again')


if __name__ == '__main__':
  launch.run(main)
