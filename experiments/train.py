"""One run: warm-up, RL with MTP, evaluation, report.html.

    python -m experiments.train --config=configs/quickstart.py --workdir=DIR

Any field can be overridden (--config.mtp.regime=detach --config.seed=1), and
objective presets follow the config's name after a colon
(--config=configs/quickstart.py:gspo,paper). The same command resumes. With
--dry_run, which needs no --workdir, it only says what a run would take.
"""

import os
import sys

from experiments import launch
from mtp_rl.run import endings

CONFIG = launch.define_config()
launch.define_processes()
_DRY_RUN = launch.define_dry_run()


def main():
  """Run, and say what was reached and where the results are."""
  if _DRY_RUN.value:
    from mtp_rl.aot import dry_run
    for line in dry_run.lines(CONFIG.value):
      launch.say(line)
    return
  from mtp_rl import trainer  # late, so that typos in flags fail fast
  from mtp_rl.report import closing
  from mtp_rl.run import metrics
  workdir = launch.WORKDIR.value
  summary = trainer.train(CONFIG.value, workdir)
  rows = metrics.read(os.path.join(workdir, 'metrics.jsonl'))
  launch.say(*closing.lines(rows, summary, workdir))
  if summary['status'] != 'complete':
    sys.exit(endings.STOPPED)


if __name__ == '__main__':
  launch.run(main)
