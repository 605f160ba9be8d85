"""GLM-4.5-Air with DAPO, as in the paper; see configs/paper.py for the command.

The paper's mean avg@32 of six sets: Detach 65.9, OCC 67.6. Not run here.
"""

from configs import paper
from mtp_rl import config as config_lib


def get_config(presets=''):
  """Return the config; `presets` is the text after the colon of --config."""
  return config_lib.preset(paper.training('glm_4_5_air', 'dapo'), presets)
