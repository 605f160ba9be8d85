"""Subset sums: a short warm-up on random solutions, then RL with OCC.

    python -m experiments.train --config=configs/subset_sum.py --workdir=DIR

Measured with --config.mtp.regime=detach, seed 0 alone: held-out greedy
accuracy .37 after the warm-up, .46 to .49 from RL step 50 on; avg@4 .34 and
.45, pass@4 .70 and .56. 45 seconds of CPU time. Other regimes and seeds are
not measured yet. A warm-up of 400 steps (another initialization) left
greedy accuracy .70.
"""

from mtp_rl import config as config_lib


def get_config(presets='dapo'):
  """Return the config; `presets` is the text after the colon of --config."""
  config = config_lib.Config()
  config.model = config_lib.Model(d_model=64, n_layers=2, n_heads=4,
                                  n_kv_heads=2, d_ff=192, head_chunk=0)
  config.task = config_lib.Task(name='subset_sum', min_terms=4, max_terms=4)
  config.rollout = config_lib.Rollout(max_prompt=8, max_response=5)
  config.warmup = config_lib.Warmup(steps=200, batch=128, lr=4e-3)
  config.rl = config_lib.RL(steps=100, prompts=32, group=8, minibatches=4,
                            lr=5e-4)
  config.eval = config_lib.Eval(every=25)
  config.optim = config_lib.Optim(ramp=20)
  return config_lib.preset(config, presets)
