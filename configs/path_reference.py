r"""Path finding again: the policy loss measured from the main head.

    C='mtp.regime=occ,occ.estimator=cross_fitted,occ.ema=.9'
    P='mtp.regime=policy'; O='mtp.reference=mtp_old'
    python -m experiments.compare --config=configs/path_reference.py \
        --workdir=DIR --seeds=10 --jobs=2 \
        --variants="detach:mtp.regime=detach;policy-1:$P,mtp.coef=1;policy-.3:$P,mtp.coef=.3;cross-ema.9:$C;own-1:$P,mtp.coef=1,$O;own-.3:$P,mtp.coef=.3,$O;own-cross-ema.9:$C,$O"

An earlier comparison in this setting (experiments/results/README.md, "Path
finding as it comes") took the ratio of its policy variants from the modules'
own old log-probs (mtp_old). The tokens come from the main head, so that is
off-policy without a correction; main_old, the paper's, corrects it. Registered
before the run:

- Hypothesis: with main_old the policy loss at lambda = 1 costs less reward than
  with mtp_old.
- Measures, paired by seed against detach, and main_old against mtp_old: mean
  reward of all steps; held-out greedy accuracy after the last.
- Ten seeds, 60 RL steps, the seven variants above. It ends when all runs are
  complete; nothing is added or left out afterwards.
- Holm's correction within the table.
"""

from configs import path_finding


def get_config(presets='dapo'):
  """Return the config; `presets` is the text after the colon of --config."""
  config = path_finding.get_config(presets)
  config.rl.steps, config.rl.dual_clip = 60, 3.
  config.eval.every, config.eval.samples = 10, 1
  return config
