"""The supervised warm-up alone: next-token and MTP cross-entropy.

    python -m experiments.pretrain --config=configs/quickstart.py --workdir=DIR

Other runs start from it with --config.warmup.init=DIR, so that regimes can be
compared from one checkpoint. The same command resumes.
"""

import sys

from experiments import launch
from mtp_rl.run import endings

CONFIG = launch.define_config()
launch.define_processes()


def main():
  """Run the warm-up, and print where it is."""
  from mtp_rl import trainer  # late, so that typos in flags fail fast
  done = trainer.pretrain(CONFIG.value, launch.WORKDIR.value)
  launch.say(
      f'{"complete" if done else "interrupted; the same command resumes"}: '
      f'{launch.WORKDIR.value}/checkpoints/warmup')
  if not done:
    sys.exit(endings.STOPPED)


if __name__ == '__main__':
  launch.run(main)
