r"""Path finding on new seeds: does the policy loss at lambda = 1 pay?

    D='mtp.regime=detach'; P='mtp.regime=policy'
    python -m experiments.compare --config=configs/path_confirm.py \
        --workdir=DIR --seeds=20 --jobs=2 \
        --variants="detach:$D;policy-1:$P,mtp.coef=1;detach-ent.003:$D,rl.entropy_coef=.003;detach-ent.01:$D,rl.entropy_coef=.01"

Of seven variants of configs/path_reference.py one, policy with main_old at
lambda = 1, ended with a held-out greedy accuracy 2.1 points above detach (95 %
interval .7 to 3.4, not standing Holm's correction), and with more entropy. This
run asks that one question of other seeds and four times the questions.
Registered before the run:

- Hypothesis: policy at lambda = 1 has a higher held-out greedy accuracy than
  detach after 60 steps, and is not merely what an entropy bonus gives as well.
- Measure, paired by seed: held-out greedy accuracy on 1,000 unseen graphs after
  the last step. It is confirmed if the interval of policy-1 minus detach lies
  above 0. Beside it, not deciding: avg@4, mean reward, entropy, and the same
  differences of detach with two entropy bonuses.
- Twenty seeds, 100 to 119; it ends when all runs are complete; nothing is added
  or left out afterwards.
- One comparison decides, so no correction; Holm's stars are shown as always.
"""

from configs import path_finding


def get_config(presets='dapo'):
  """Return the config; `presets` is the text after the colon of --config."""
  config = path_finding.get_config(presets)
  config.seed = 100
  config.rl.steps, config.rl.dual_clip = 60, 3.
  config.task.held_out = 1000
  config.eval.every, config.eval.samples = 60, 4
  return config
