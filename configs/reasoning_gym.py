"""basic_arithmetic of reasoning-gym: warm-up on its answers, RL with OCC.

    python -m experiments.train --config=configs/reasoning_gym.py --workdir=DIR
"""

from mtp_rl import config as config_lib


def get_config(presets='dapo'):
  """Return the config; `presets` is the text after the colon of --config."""
  config = config_lib.Config()
  config.model = config_lib.Model(d_model=96, n_layers=2, n_heads=4,
                                  n_kv_heads=2, d_ff=256)
  config.task = config_lib.Task(
      name='reasoning_gym', dataset='basic_arithmetic', size=12000,
      options='{"min_terms": 3, "max_terms": 3, "min_digits": 1, '
              '"max_digits": 1, "operators": ["+", "-"], '
              '"allow_parentheses": false, "allow_negation": false}')
  config.rollout = config_lib.Rollout(max_prompt=24, max_response=6)
  config.warmup = config_lib.Warmup(steps=350, batch=128, lr=3e-3)
  config.rl = config_lib.RL(steps=200, prompts=32, group=16, minibatches=4,
                            lr=2e-4)
  config.optim = config_lib.Optim(schedule='linear')
  return config_lib.preset(config, presets)
