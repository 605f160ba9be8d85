"""What the launchers share: flags, quiet logs, one-sentence errors."""

import contextlib
import errno
import os
import pathlib
import re
import sys
import traceback

from absl import app, flags, logging
from ml_collections import config_flags

from mtp_rl import config as config_lib
from mtp_rl import config_io
from mtp_rl.run import endings

ROOT = pathlib.Path(__file__).resolve().parent.parent
WORKDIR = flags.DEFINE_string('workdir', None, 'Directory of the run.')
flags.register_validator(
    'workdir', lambda value: bool(value) or (
        'dry_run' in flags.FLAGS and flags.FLAGS['dry_run'].value),
    message='--workdir=DIR must be given')
# What a machine, not a setting, refuses.
_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ENODEV,
            errno.ESTALE)


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


def define_dry_run():
  """Define --dry_run, without which --workdir is required, and return it."""
  return flags.DEFINE_bool('dry_run', False, 'Only say how many parameters and '
                           'tokens a run has and what memory it would take.')


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
    print(*lines, sep='\n', flush=True)


def define_config(required=True):
  """Define --config, whose fields flags can override, and return it."""
  flag = config_flags.DEFINE_config_file('config', None, 'Config file.')
  if required:
    flags.register_validator('config', lambda value: value is not None,
                             '--config=FILE must be given, and its get_config '
                             'must return a config.Config')
  return flag


def end(text, code):
  """Print a line to stderr, and exit with one of the codes of `endings`."""
  print(text, file=sys.stderr, flush=True)
  sys.exit(code)


def _leave(text, code):
  """Print a sentence and exit; other processes of the run learn of it."""
  print(f'error: {text}', file=sys.stderr, flush=True)
  if others := sys.modules.get('mtp_rl.distributed'):
    others.depart(code, text)
  sys.exit(code)


def _blame_the_disk(error):
  """Exit with a sentence where a full or broken disk is the cause."""
  if isinstance(error, OSError):
    if error.errno not in _MACHINE:
      return
    what = f'{error.strerror} ({error.filename or "a file of the run"})'
  else:  # tensorstore's errors are of other kinds
    what = re.search('No space left on device|Disk quota exceeded', str(error))
    if not what:
      return
    what = what[0]
  _leave(f'{what}; make room or repair the disk, and the same command goes on '
         'from the last checkpoint', endings.ENVIRONMENT)


def _crash(error):
  """Raise an error that nobody foresaw; other processes learn of it.

  Where it says that another process has gone, that is the sentence.
  """
  others = sys.modules.get('mtp_rl.distributed')
  if others is None or others.count() == 1:
    raise error
  text = str(error).strip().split('\n')[0][:200]
  if others.is_of_a_peer(error):
    _leave(f'another process of the run has gone ({text}); its output says '
           'why, and the same command goes on from the last checkpoint',
           endings.ENVIRONMENT)
  traceback.print_exception(error)
  others.depart(endings.DEFECT, f'{type(error).__name__}: {text}')


def _help():
  """Print the launcher's text and flags, and how to list the others."""
  doc = sys.modules['__main__'].__doc__ or ''
  own = (__name__, 'experiments.launch', sys.argv[0], '__main__')
  found = {f.name: f for module in own
           for f in flags.FLAGS.get_flags_for_module(module)}
  print(doc.strip(), '\nFlags:', sep='\n')
  for flag in found.values():
    no = '[no]' if flag.boolean else ''
    default = '' if flag.default in (None, '', []) else (
        ' [' + flag.default_as_str.strip("'") + ']')
    print(f'  --{no}{flag.name}: {flag.help}{default}')
  if 'config' in found:
    print('  --config.SECTION.FIELD=VALUE: any field of mtp_rl/config.py, as '
          '--config.rl.lr=1e-4')
  print("\n--helpfull lists the flags of all libraries as well. What a run's "
        'exit code says\nstands in experiments/README.md.')
  sys.exit(0)


def _parse(argv):
  """Parse the flags; an error exits with one sentence."""
  if {'--help', '-help', '-h', '-?'} & set(argv[1:]):
    _help()
  try:
    for arg in argv[1:]:
      if field := re.match(r'--?config\.([\w.]+)', arg):
        config_io.refuse_renamed(field[1])
    return flags.FLAGS(argv)
  except config_lib.ConfigError as e:
    end(f'error: {e}', endings.SETTING)
  except (flags.Error, KeyError, OSError) as e:
    _fail(e)
  except Exception as e:  # the code of a config file can raise anything
    _fail_in_config(e)


def _fail_in_config(error):
  """Exit with the place and the words of an error of a config file."""
  last = [frame for frame in traceback.extract_tb(error.__traceback__)
          if not frame.filename.startswith('<')][-1]
  file, line = ((error.filename, error.lineno)
                if isinstance(error, SyntaxError)
                else (last.filename, last.lineno))
  end(f'error: --config cannot be read: {type(error).__name__} in {file}, line '
      f'{line}: {error}', endings.SETTING)


def _fail(error):
  """Exit with the last line of an error, which may hold a whole traceback."""
  lines = [line.strip() for line in str(error.args[0]).splitlines()]
  hint = '--help lists the flags, mtp_rl/config.py the config fields'
  if isinstance(error, OSError) and pathlib.Path.cwd() != ROOT:
    hint = f'launchers run from the root of a checkout, which is {ROOT}'
  end(f'error: {[line for line in lines if line][-1]} ({hint})',
      endings.SETTING)


class _Lasting:
  """A stream that goes on into nothing where its terminal or pipe is gone."""

  def __init__(self, stream):
    self._stream = stream or open(os.devnull, 'w', encoding='utf-8')

  def __getattr__(self, name):
    return getattr(self._stream, name)

  def _keep(self, action):
    try:
      return action()
    except OSError:
      nowhere = os.open(os.devnull, os.O_WRONLY)
      os.dup2(nowhere, self._stream.fileno())
      os.close(nowhere)

  def write(self, text):
    """Write text, or drop it."""
    return self._keep(lambda: self._stream.write(text))

  def flush(self):
    """Flush what can be flushed."""
    return self._keep(self._stream.flush)


def _place_workdir():
  """Expand ~ in --workdir, and refuse a name that this locale cannot hold."""
  if flags.FLAGS.workdir is None:
    return
  path = os.path.expanduser(flags.FLAGS.workdir)
  encoding = sys.getfilesystemencoding()
  try:
    same = os.fsencode(path) == path.encode()
  except UnicodeEncodeError:
    same = False
  if not same:
    raise config_lib.ConfigError(
        f'--workdir has characters beyond the encoding of this locale '
        f'({encoding}); set PYTHONUTF8=1, or LC_ALL=C.UTF-8')
  flags.FLAGS.workdir = path


@contextlib.contextmanager
def _one_sentence():
  """Turn what is nobody's defect into one sentence and an exit code."""
  try:
    yield
  except config_lib.ConfigError as e:
    _leave(str(e), endings.exit_code(e))
  except KeyboardInterrupt:
    sys.exit(130)  # 128 + SIGINT, as after a second signal
  except Exception as e:
    _blame_the_disk(e)
    _crash(e)


def run(action):
  """Parse the flags and call action(); a ConfigError exits as one sentence."""
  sys.stdout, sys.stderr = _Lasting(sys.stdout), _Lasting(sys.stderr)
  def main(argv):
    if len(argv) > 1:
      end(f'error: unexpected argument {argv[1]!r}', endings.SETTING)
    if not flags.FLAGS['verbosity'].present:
      logging.set_verbosity(logging.WARNING)
    # orbax logs, with its threads' tracebacks, what it raises as well.
    logging.get_absl_handler().addFilter(
        lambda r: not (r.exc_info and 'orbax' in r.pathname))
    if 'config' in flags.FLAGS:
      try:  # a missing config file fails here
        config = flags.FLAGS['config'].value
        getattr(config, 'seed', None)  # the first read
      except OSError as e:
        _fail(e)
      except config_lib.ConfigError as e:
        end(f'error: {e}', endings.SETTING)
      except Exception as e:
        _fail_in_config(e)
      if config is not None and not isinstance(config, config_lib.Config):
        end('error: get_config of --config must return a config.Config of '
            f'mtp_rl, not a {type(config).__name__}', endings.SETTING)
    with _one_sentence():
      _place_workdir()
      _join()
      action()
  app.run(main, flags_parser=_parse)
