r"""The config of another run: its config.json follows the colon.

    python -m experiments.train --workdir=DIR \
        --config=configs/from_json.py:OTHER/config.json

Any field can be overridden on top, as with every config.
"""

from mtp_rl import config as config_lib
from mtp_rl import config_io


def get_config(path=''):
  """Return the config in a JSON file; `path` is the text after the colon."""
  if not path:
    raise config_lib.ConfigError('configs/from_json.py needs the path of a '
                                 'config.json after a colon')
  return config_io.load(path)
