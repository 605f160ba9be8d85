"""What the launchers share: flags, quiet logs, one-sentence errors."""

import pathlib
import re
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from mtp_rl import config as config_lib
from mtp_rl import config_io

ROOT = pathlib.Path(__file__).resolve().parent.parent
WORKDIR = flags.DEFINE_string('workdir', None, 'Directory of the run.')
flags.mark_flag_as_required('workdir')


def define_processes():
  """Define the flags of runs with several processes."""
  flags.DEFINE_bool('distributed', False, 'Join the processes that the cluster '
                    '(SLURM, GKE, TPU pod, Open MPI) has started.')
  flags.DEFINE_string('coordinator', None, 'HOST:PORT of process 0, if the '
                      'cluster does not set it.')
  flags.DEFINE_integer('processes', None, 'Number of processes, with '
                       '--coordinator.', lower_bound=1)
  flags.DEFINE_integer('process', None, 'Index of this process, from 0.',
                       lower_bound=0)


def _join():
  """Connect to the other processes, if the flags say that there are any."""
  if 'distributed' not in flags.FLAGS:
    return
  f = flags.FLAGS
  given = [v is not None for v in (f.coordinator, f.processes, f.process)]
  if any(given) and (not all(given) or f.distributed):
    raise config_lib.ConfigError(
        '--coordinator, --processes and --process go together, and without '
        '--distributed, with which the cluster sets all three')
  if f.distributed or all(given):
    from mtp_rl import distributed
    distributed.initialize(f.coordinator, f.processes, f.process)


def say(*lines):
  """Print lines, in process 0 alone."""
  from mtp_rl import distributed
  if distributed.is_writer():
    print(*lines, sep='\n')


def define_config(required=True):
  """Define --config, whose fields flags can override, and return it."""
  flag = config_flags.DEFINE_config_file('config', None, 'Config file.')
  if required:
    flags.mark_flag_as_required('config')
  return flag


def _parse(argv):
  """Parse the flags; an error exits with one sentence."""
  try:
    for arg in argv[1:]:
      if field := re.match(r'--?config\.([\w.]+)', arg):
        config_io.refuse_renamed(field[1])
    return flags.FLAGS(argv)
  except config_lib.ConfigError as e:
    sys.exit(f'error: {e}')
  except (flags.Error, KeyError, OSError) as e:
    _fail(e)


def _fail(error):
  """Exit with the last line of an error, which may hold a whole traceback."""
  lines = [line.strip() for line in str(error.args[0]).splitlines()]
  hint = '--help lists the flags, mtp_rl/config.py the config fields'
  if isinstance(error, OSError) and pathlib.Path.cwd() != ROOT:
    hint = f'launchers run from the root of a checkout, which is {ROOT}'
  sys.exit(f'error: {[line for line in lines if line][-1]} ({hint})')


def run(action):
  """Parse the flags and call action(); a ConfigError exits as one sentence."""
  def main(argv):
    if len(argv) > 1:
      sys.exit(f'error: unexpected argument {argv[1]!r}')
    if not flags.FLAGS['verbosity'].present:
      logging.set_verbosity(logging.WARNING)
    if 'config' in flags.FLAGS:
      try:  # a missing config file fails at the first read
        _ = flags.FLAGS['config'].value and flags.FLAGS['config'].value.seed
      except OSError as e:
        _fail(e)
    try:
      _join()
      action()
    except config_lib.ConfigError as e:
      sys.exit(f'error: {e}')
  app.run(main, flags_parser=_parse)
