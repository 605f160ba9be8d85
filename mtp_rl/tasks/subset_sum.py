"""Subset sums: whether a choice is right depends on later choices.

    prompt    31424|07=      solution   +---+

The prompt gives digits and a target in two characters; the answer keeps (+)
or leaves (-) each digit in order so that the kept ones add up to the target.

Why this task: only the total is checked, so the first choices must leave a
remainder that the later digits can reach, which takes looking ahead; the last
choices follow from what is left. Most targets have several solutions. The
warm-up imitates one drawn at random, so its policy mixes them, and RL can learn
to settle on one. Solutions are as long as the digits, verification is one sum,
and random answers score well above 0, so a small model learns part of the task
in a minute.
"""

from mtp_rl import config as config_lib
from mtp_rl import types
from mtp_rl.tasks import generated

KEEP, LEAVE = '+-'


def make(task_config: config_lib.Task, seed):
  """Return the `SubsetSum` task of a `config.Task`."""
  return SubsetSum(task_config, seed)


class SubsetSum(generated.Generated):
  """See the module's text; members as in `tasks.Task`."""

  def __init__(self, task_config: config_lib.Task, seed):
    t = task_config
    if not 3 <= t.min_terms <= t.max_terms <= 11:
      raise config_lib.ConfigError(
          f'task subset_sum cannot have task.min_terms={t.min_terms} and '
          f'task.max_terms={t.max_terms}; it needs 3 <= min <= max <= 11')
    if not 2 <= t.largest <= 9:
      raise config_lib.ConfigError(
          f'task.largest={t.largest} must be a digit from 2 to 9')
    self._config = t
    super().__init__('subset_sum', '0123456789|=' + KEEP + LEAVE, seed,
                     t.held_out)

  def draw(self, rng):
    """Return one problem with the solution that made its target."""
    t = self._config
    terms = rng.integers(t.min_terms, t.max_terms + 1)
    return _example(rng.integers(1, t.largest + 1, terms).tolist(),
                    rng.integers(0, 2, terms).tolist())

  def probe(self):
    """Return one problem of the greatest length."""
    return [_example([1] * self._config.max_terms,
                     [1] * self._config.max_terms)]

  def score(self, example, text):
    """Return 1.0 if there is one choice per digit and the target is met."""
    digits, target = example.prompt[:-1].split('|')
    if len(text) != len(digits) or set(text) - {KEEP, LEAVE}:
      return 0.
    kept = sum(int(d) for d, c in zip(digits, text) if c == KEEP)
    return float(kept == int(target))


def _example(digits, kept):
  """Return the problem of some digits and the ones (0 or 1) to keep.

  `kept` is drawn uniformly and determines the target, so given the prompt it is
  uniform among all solutions.
  """
  target = f'{sum(d * k for d, k in zip(digits, kept)):02d}'
  return types.Example(f'{"".join(map(str, digits))}|{target}=', target,
                       ''.join(KEEP if k else LEAVE for k in kept))
