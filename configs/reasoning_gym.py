"""spell_backward of reasoning-gym: warm-up on its answers, RL with OCC.

    python -m experiments.train --config=configs/reasoning_gym.py --workdir=DIR
"""

from mtp_rl import config as config_lib


def get_config(presets='dapo'):
  """Return the config; `presets` is the text after the colon of --config."""
  config = config_lib.Config()
  config.model = config_lib.Model(d_model=64, n_layers=2, n_heads=4,
                                  n_kv_heads=2, d_ff=192)
  config.task = config_lib.Task(
      name='reasoning_gym', dataset='spell_backward', size=8000,
      options='{"min_word_len": 5, "max_word_len": 5}')
  config.rollout = config_lib.Rollout(max_prompt=60, max_response=8)
  config.warmup = config_lib.Warmup(steps=270, batch=64, lr=4e-3)
  config.rl = config_lib.RL(steps=220, prompts=32, group=8, minibatches=4,
                            lr=4e-4)
  config.eval = config_lib.Eval(every=10)
  config.optim = config_lib.Optim(schedule='linear', warmup=10, b2=.99)
  return config_lib.preset(config, presets)
