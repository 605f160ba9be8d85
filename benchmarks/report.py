"""What samples, tokens, page and figures cost in a quickstart.

    python -m benchmarks.report --workdir=DIR

Trains configs/quickstart.py in DIR, an empty directory, and prints the seconds
spent in each part of report/journal.py and their share of the whole run. The
first call of each is apart: it compiles the score of a minibatch, which the
first RL step would do otherwise.
"""

import argparse
import time

from configs import quickstart
from mtp_rl import trainer
from mtp_rl.report import journal


def timed(owner, name, spent):
  """Replace a function of a module or class by one that adds its seconds."""
  inner = getattr(owner, name)

  def outer(*args):
    start = time.perf_counter()
    try:
      return inner(*args)
    finally:
      spent.setdefault(name, []).append(time.perf_counter() - start)
  setattr(owner, name, outer)


def main():
  """Train, and print the shares."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--workdir', required=True)
  spent = {}
  timed(journal.Journal, 'rollout', spent)
  timed(journal.Journal, '_note_held_out', spent)
  timed(journal, 'write_page', spent)
  timed(journal, 'draw_figures', spent)
  config = quickstart.get_config()
  config.run.progress = False
  start = time.perf_counter()
  trainer.train(config, parser.parse_args().workdir)
  whole = time.perf_counter() - start
  for name, seconds in spent.items():
    rest = sum(seconds[1:])
    print(f'{name}: first call {seconds[0]:.2f} s, {len(seconds) - 1} more '
          f'{rest:.2f} s, {rest / whole:.2%}')
  print(f'whole run: {whole:.1f} s')


if __name__ == '__main__':
  main()
