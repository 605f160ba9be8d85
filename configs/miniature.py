r"""The paper's comparison in small: the quickstart, slower, under a tight clip.

    python -m experiments.compare --config=configs/miniature.py \
        --workdir=DIR --preset=table1,table2 --seeds=5 --jobs=2

A learning rate at which the reward still rises when the run ends, and a clip
that bites, so that what MTP adds to the gradient shows in the reward. Results:
experiments/results/miniature/.
"""

from configs import quickstart
from mtp_rl import config as config_lib


def get_config(presets='dapo'):
  """Return the config; `presets` is the text after the colon of --config."""
  config = quickstart.get_config('')
  config.rl.steps, config.rl.lr, config.optim.clip = 40, 1e-4, .3
  config.eval.every = 10
  return config_lib.preset(config, presets)
