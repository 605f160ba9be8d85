"""Score a checkpoint: greedy, avg@k, pass@k (unbiased), maj@k.

    python -m experiments.evaluate --workdir=DIR --k=16 [--step=50]

Writes evaluation/<phase>_<step>_k<k>.json and one JSONL row a completion.
"""

from absl import flags

from experiments import launch

_K = flags.DEFINE_integer('k', 16, 'Samples a problem.', lower_bound=1)
_STEP = flags.DEFINE_integer('step', None, 'Checkpoint; default: the latest.')
_PHASE = flags.DEFINE_enum('phase', 'rl', ['rl', 'warmup'], 'Whose checkpoint.')


def main():
  """Evaluate, and print a table."""
  from mtp_rl import trainer  # after the flags: a typo must not wait for it
  values, path = trainer.score_checkpoint(
      launch.WORKDIR.value, _PHASE.value, _STEP.value, _K.value)
  for name, value in values.items():
    if name.startswith('val/'):
      print(f'{name[4:]:40s} {100 * value:6.2f} %')
  print(f'see {path}')


if __name__ == '__main__':
  launch.run(main)
