"""Score a checkpoint: greedy, avg@k, pass@k (unbiased), maj@k.

    python -m experiments.evaluate --workdir=DIR --k=16 [--step=50]
    python -m experiments.evaluate --workdir=DIR --k=2 --set=task.evals=aime24 \
        --set=rollout.max_response=256 --set=eval.batch=8

Prints means over problems with 95 % bootstrap intervals. Writes one JSONL row
per sample as it goes, and evaluation/<phase>_<step>_k<k>.json at the end (with
--set, a suffix identifies the settings). The same command resumes after a kill.
"""

from absl import flags

from experiments import launch

_K = flags.DEFINE_integer(
    'k', None, 'Samples per problem; default: 32 for task math, else 16.',
    lower_bound=1)
_STEP = flags.DEFINE_integer('step', None, 'Checkpoint; default: the latest.')
_PHASE = flags.DEFINE_enum('phase', 'rl', ['rl', 'warmup'], 'Phase of the run.')
_SET = flags.DEFINE_multi_string(
    'set', [], 'section.field=value of task, rollout, eval or mesh.')
launch.define_processes()


def main():
  """Evaluate, and print a table."""
  # Imported late, so that typos in flags fail fast.
  from mtp_rl.evaluation import scoring
  values, path = scoring.score_checkpoint(
      launch.WORKDIR.value, _PHASE.value, _STEP.value, _K.value, _SET.value)
  for name, (mean, low, high) in values.items():
    launch.say(f'{name[4:]:40s} {100 * mean:6.2f} %  '
               f'[{100 * low:.2f}, {100 * high:.2f}]')
  launch.say(scoring.table(values), f'see {path}')


if __name__ == '__main__':
  launch.run(main)
