"""Measure how the MTP gradient affects the RL objective during a run.

    python -m experiments.diagnose --workdir=DIR [--rollouts=8] [--steps=0,50]

Measured on fresh rollouts at each checkpoint: the alignment of the two
gradients, of one batch and de-biased; the lambda of every estimator; and the
change of J that a step with lambda achieves on held-out rollouts, compared with
what the equations predict. With --lookahead=1,5,20 also what a fixed lambda is
worth after so many updates. Writes DIR/diagnosis: diagnosis.{md,json},
rollouts.jsonl and three figures.
"""

from absl import flags

from experiments import launch

_ROLLOUTS = flags.DEFINE_integer('rollouts', 8, 'Rollouts per checkpoint.',
                                 lower_bound=1)
_STEPS = flags.DEFINE_list('steps', None, 'Checkpoints; default: all kept.')
_BOUND = flags.DEFINE_float('bound', 1., 'lambda lies in [-bound, bound].')
_POINTS = flags.DEFINE_integer('points', 17, 'Lambdas on the grid.',
                               lower_bound=3)
_PARTS = flags.DEFINE_integer(
    'disjoint_parts', None, 'Parts of a minibatch; '
    'default: occ.disjoint_parts.', lower_bound=1)
_AHEAD = flags.DEFINE_list(
    'lookahead', [], 'Also measure lambda after so many updates, like 1,5,20.')
_ALLOW_EVAL = flags.DEFINE_bool(
    'allow_eval', False, 'Let scorers run answers as Python, as '
    'task.allow_eval does in training.')
_PROGRESS = flags.DEFINE_bool('progress', True, 'Show a bar.')


def _whole_numbers(texts):
  return all(t.isdigit() for t in texts or ())


flags.register_validator('steps', _whole_numbers,
                         '--steps takes whole numbers, like 0,50,100')


flags.register_validator(
    'lookahead', lambda texts: all(t.isdigit() and int(t) for t in texts),
    '--lookahead takes whole numbers from 1, like 1,5,20')


def main():
  """Diagnose, and print the tables."""
  from mtp_rl.diagnose import study  # late, so that typos fail fast
  text, directory = study.diagnose(
      launch.WORKDIR.value, _ROLLOUTS.value,
      [int(s) for s in _STEPS.value or ()] or None, _BOUND.value,
      _POINTS.value, _PARTS.value, list(map(int, _AHEAD.value)),
      _PROGRESS.value, _ALLOW_EVAL.value)
  print(f'{text}\nsee {directory}')


if __name__ == '__main__':
  launch.run(main)
