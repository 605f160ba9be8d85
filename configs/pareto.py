r"""Path finding again, to ask what acceptance of drafts costs in reward.

    python -m experiments.compare --config=configs/pareto.py --workdir=DIR \
        --preset=pareto --seeds=10 --jobs=2

Registered before the run of these seeds (0 to 9), after a pilot on seeds 100,
101, 200 and 201 that chose the coefficients and the loss of the modules:

- Hypothesis: where theta also follows the KL or TV between main head and
  module, at a lambda of .3 to 3 or at the affordable one, more drafts are
  accepted than under Detach, by 3 points or more, and held-out accuracy is not
  lower.
- Measures, paired by seed against Detach: drafts accepted (mean over the last
  tenth of the steps) and held-out avg@4 on 1,000 unseen graphs after the last
  step. The goal is met by a variant whose interval of the first lies above 0
  with a mean of 3 points or more, and whose interval of the second lies above
  -1 point.
- Ten seeds, 100 RL steps, all variants of `compare.grid`'s preset pareto. It
  ends when all runs are complete; nothing is added or left out afterwards.
- Holm's correction within each table.

All variants, Detach as well, train the modules themselves by KL.
"""

from configs import path_finding


def get_config(presets='dapo'):
  """Return the config; `presets` is the text after the colon of --config."""
  config = path_finding.get_config(presets)
  config.task.held_out = 1000
  config.eval.every, config.eval.samples = 100, 4
  return config
