"""The config of another run: its config.json follows the colon.

    python -m experiments.train --workdir=DIR \
        --config=configs/from_json.py:OTHER/config.json

Any field can be overridden on top, as with every config.
"""

from mtp_rl import config as config_lib


def get_config(path):
  """Return the config in a JSON file; `path` is the text after the colon."""
  return config_lib.load(path)
