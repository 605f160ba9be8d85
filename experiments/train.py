"""One run: warm-up, RL with MTP, evaluation, figures.

    python -m experiments.train --config=configs/quickstart.py --workdir=DIR

Any field can be overridden (--config.mtp.regime=detach --config.seed=1), and
objective presets follow the config's name after a colon
(--config=configs/quickstart.py:gspo,paper). The same command resumes.
"""

import sys

from experiments import launch
from mtp_rl.run import endings

CONFIG = launch.define_config()
launch.define_processes()


def main():
  """Run, and print where the results are."""
  from mtp_rl import trainer  # late, so that typos in flags fail fast
  workdir = launch.WORKDIR.value
  summary = trainer.train(CONFIG.value, workdir)
  for name, value in summary['last'].items():
    before = summary['after_warmup'].get(name, float('nan'))
    launch.say(f'{name}: {before:.3f} after the warm-up -> {value:.3f}')
  launch.say(f'{summary["status"]} at step {summary["step"]} of '
             f'{summary["steps"]}; see {workdir}/figures, metrics.jsonl and '
             'summary.json')
  if summary['status'] != 'complete':
    launch.say('the same command resumes')
    sys.exit(endings.STOPPED)


if __name__ == '__main__':
  launch.run(main)
