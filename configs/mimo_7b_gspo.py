"""MiMo-7B-RL with GSPO, as in the paper; see configs/paper.py for the command.

The paper's mean avg@32 of six sets: Detach 57.8, OCC 60.1. Not run here.
"""

from configs import paper
from mtp_rl import config as config_lib


def get_config(presets=''):
  """Return the config; `presets` is the text after the colon of --config."""
  return config_lib.preset(paper.training('mimo_7b', 'gspo'), presets)
