"""Write report.html and the figures of a run again, from its files.

    python -m experiments.report --workdir=DIR

DIR is the workdir of a run, complete or not, also of an older version: what its
files lack is left out.
"""

import os

from experiments import launch


def main():
  """Write the page and the figures, and print where they are."""
  from mtp_rl import config_io  # late, so that typos in flags fail fast
  from mtp_rl.report import page, run_figures, style
  from mtp_rl.run import metrics
  workdir = launch.WORKDIR.value
  config = config_io.load(os.path.join(workdir, 'config.json'))
  path = page.write_run(workdir)
  read = lambda name: metrics.read(os.path.join(workdir, name))
  figures = os.path.join(workdir, 'figures')
  os.makedirs(figures, exist_ok=True)
  run_figures.draw_all(read('metrics.jsonl'), read('samples.jsonl'), figures,
                       style.title(config), page.warm_rows(workdir, config))
  print(f'see {path} and {figures}')


if __name__ == '__main__':
  launch.run(main)
