"""What the launchers share: flags, quiet logs, one-sentence errors."""

import sys

from absl import app, flags, logging
from ml_collections import config_flags

from mtp_rl import config as config_lib

WORKDIR = flags.DEFINE_string('workdir', None, 'Directory of the run.')
flags.mark_flag_as_required('workdir')


def define_config():
  """Define --config, whose fields flags can override, and return it."""
  flag = config_flags.DEFINE_config_file('config', None, 'Config file.')
  flags.mark_flag_as_required('config')
  return flag


def run(action):
  """Parse the flags and call action(); a ConfigError becomes one sentence."""
  def main(argv):
    if len(argv) > 1:
      raise app.UsageError(f'unexpected argument {argv[1]!r}')
    if not flags.FLAGS['verbosity'].present:
      logging.set_verbosity(logging.WARNING)
    try:
      action()
    except config_lib.ConfigError as e:
      sys.exit(f'error: {e}')
  try:
    app.run(main)
  except config_lib.ConfigError as e:  # from get_config, while flags are read
    sys.exit(f'error: {e}')
