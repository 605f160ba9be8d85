r"""The paper's comparison in small: the quickstart with low lr and tight clip.

    python -m experiments.compare --config=configs/miniature.py \
        --workdir=DIR --preset=table1,table2,trace --seeds=5 --jobs=2

The learning rate is so low that the reward still rises when the run ends, and
the clip so tight that it is active, so that MTP's part of the gradient shows in
the reward. Results: experiments/results/miniature/.

The coefficients of other papers, gac and pcr, beside ours; registered before
the run, without a pilot:

    R='mtp.regime=occ,occ.estimator'; G='occ.lambda_min=.053,occ.lambda_max=9'
    python -m experiments.compare --config=configs/miniature.py --workdir=DIR \
        --seeds=10 --jobs=2 --config.rl.dual_clip=3 --config.mtp.psi_loss=ce \
        --variants="detach:mtp.regime=detach;exact:$R=exact;cross-ema.9:$R=cross_fitted,occ.ema=.9;gac:$R=gac,$G;gac-ce:$R=gac,mtp.theta_loss=ce,$G;gac-ema.9-ce:$R=gac,mtp.theta_loss=ce,$G,occ.ema=.9;pcr:$R=pcr;pcr-ce:$R=pcr,mtp.theta_loss=ce"

- Hypothesis: gac, which may not take less than .053 of the MTP gradient, loses
  reward to detach; pcr, which only takes a share of the disagreement away, is
  not told from it.
- Measures, paired by seed against detach: mean reward of all steps; held-out
  avg@4 after the last step.
- Seeds 0 to 9, or those complete after 35 minutes on two cores. Holm's
  correction within the table.

Another model or more data, each against its own detach; registered before the
runs, after one warm-up of each model with seed 100 that was looked at alone:

    R='mtp.regime=occ,occ.estimator'; K='mtp.regime=fixed,mtp.theta_loss=kl'
    python -m experiments.compare --config=configs/miniature.py --workdir=DIR \
        --seeds=10 --jobs=2 --config.rl.dual_clip=3 --config.mtp.psi_loss=ce \
        FLAGS \
        --variants="detach:mtp.regime=detach;rl_only:mtp.regime=rl_only;ce-.1:mtp.regime=ce,mtp.coef=.1;policy-.1:mtp.regime=policy,mtp.coef=.1;kl-.1:$K,mtp.coef=.1;occ:$R=logprob;cross-ema.9:$R=cross_fitted,occ.ema=.9"

with FLAGS one of

    untied   --config.model.tie_embeddings=False
    deep     --config.model.n_layers=6
    groups   --config.rl.group=32
    steps    --config.rl.steps=160

- Hypothesis, one a setting: a variant with lambda other than 0 earns more than
  detach; none of those run with two tied layers, 8 samples and 40 steps did.
- Measures, paired by seed against detach: mean reward of all steps; held-out
  avg@4 after the last step.
- Seeds 0 to 9, or those complete after 20 minutes on two cores (`untied`: 35,
  changed while its first seed ran on a slower machine than foreseen, nothing
  read). Holm's correction within each table.

Run: `untied`, all ten seeds; not confirmed. The others not yet.
"""

from configs import quickstart
from mtp_rl import config as config_lib


def get_config(presets='dapo'):
  """Return the config; `presets` is the text after the colon of --config."""
  config = quickstart.get_config('')
  config.rl.steps, config.rl.lr, config.optim.clip = 40, 1e-4, .3
  config.eval.every = 10
  return config_lib.preset(config, presets)
