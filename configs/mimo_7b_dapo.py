"""MiMo-7B-RL with DAPO, as in the paper; see configs/paper.py for the command.

The paper's mean avg@32 of six sets: Detach 58.9, OCC 61.7. Not run here.
"""

from configs import paper
from mtp_rl import config as config_lib


def get_config(presets=''):
  """Return the config; `presets` is the text after the colon of --config."""
  return config_lib.preset(paper.training('mimo_7b', 'dapo'), presets)
