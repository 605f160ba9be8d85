r"""The paper's comparison in small: the quickstart with low lr and tight clip.

    python -m experiments.compare --config=configs/miniature.py \
        --workdir=DIR --preset=table1,table2 --seeds=5 --jobs=2

The learning rate is so low that the reward still rises when the run ends, and
the clip so tight that it is active, so that MTP's part of the gradient shows in
the reward. Results: experiments/results/miniature/.
"""

from configs import quickstart
from mtp_rl import config as config_lib


def get_config(presets='dapo'):
  """Return the config; `presets` is the text after the colon of --config."""
  config = quickstart.get_config('')
  config.rl.steps, config.rl.lr, config.optim.clip = 40, 1e-4, .3
  config.eval.every = 10
  return config_lib.preset(config, presets)
