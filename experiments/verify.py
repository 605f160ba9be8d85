"""Check a workdir: settings, rows, checkpoints by checksum, summary.

    python -m experiments.verify --workdir=DIR

Prints a table of what it holds. Exits with 0 where all is whole, else with 2.
It changes nothing, uses no device and may run beside the run itself.
"""

from experiments import launch
from mtp_rl.run import endings


def main():
  """Check, and print the table."""
  from mtp_rl.report import tables
  from mtp_rl.run import inventory
  workdir = launch.WORKDIR.value
  items = inventory.inspect(workdir)
  print(tables.markdown(
      ['file', 'state', 'what it holds'],
      [[i.name, 'good' if i.good else 'DAMAGED', i.found] for i in items],
      aligned=True), end='')
  bad = [i.name for i in items if not i.good]
  if bad:
    launch.end(f'error: {workdir} is damaged in {", ".join(bad)}',
               endings.SETTING)


if __name__ == '__main__':
  launch.run(main)
