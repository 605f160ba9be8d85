"""Paths in one random acyclic graph of 100 nodes, remembered and composed.

    python -m experiments.train --config=configs/dag_planning.py --workdir=DIR
"""

from mtp_rl import config as config_lib


def get_config(presets='dapo'):
  """Return the config; `presets` is the text after the colon of --config."""
  config = config_lib.Config()
  config.model = config_lib.Model(d_model=120, n_layers=1, n_heads=1,
                                  n_kv_heads=1, d_ff=320, head_chunk=0)
  config.task = config_lib.Task(name='dag_planning', nodes=100, edge_prob=.1,
                                taught=.05, held_out=1000)
  config.rollout = config_lib.Rollout(max_prompt=3, max_response=14)
  config.warmup = config_lib.Warmup(steps=1500, batch=128, lr=4e-3)
  config.rl = config_lib.RL(steps=60, prompts=64, group=8, minibatches=2,
                            lr=5e-4)
  config.eval = config_lib.Eval(every=30, batch=250)
  config.optim = config_lib.Optim(ramp=20)
  return config_lib.preset(config, presets)
