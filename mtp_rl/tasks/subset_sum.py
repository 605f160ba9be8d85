"""Subset sums: every choice is right or wrong by the choices that follow.

    prompt    31424|07=      solution   +---+

The prompt gives digits and a target in two characters; the answer keeps (+)
or leaves (-) each digit in order so that the kept ones add up to the target.

Why this task: nothing but the end is checked, so the first choice has to
leave a remainder that the later digits can reach, which only a look ahead
tells; the last choices follow from what is left. Most targets have several
solutions. The warm-up imitates one drawn at random, so it leaves a policy
that mixes them, which is what RL can make up its mind on. Solutions are as
long as the digits, verification is one sum, and chance is well above 0, so a
small model learns a part of it in a minute.
"""

from mtp_rl import config as config_lib
from mtp_rl import types
from mtp_rl.tasks import generated

KEEP, LEAVE = '+-'


def make(task_config, seed):
  """Return the `SubsetSum` task of a `config.Task`."""
  return SubsetSum(task_config, seed)


class SubsetSum(generated.Generated):
  """See the module's text; members as in `tasks.Task`."""

  def __init__(self, task_config, seed):
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
    """Return 1.0 where one choice a digit reaches the target, else 0.0."""
    digits, target = example.prompt[:-1].split('|')
    if len(text) != len(digits) or set(text) - {KEEP, LEAVE}:
      return 0.
    kept = sum(int(d) for d, c in zip(digits, text) if c == KEEP)
    return float(kept == int(target))


def _example(digits, kept):
  """Return the problem of some digits and the ones (0 or 1) to keep.

  The target is drawn as a uniform choice makes it, so a solution given the
  prompt is uniform among all of them.
  """
  target = f'{sum(d * k for d, k in zip(digits, kept)):02d}'
  return types.Example(f'{"".join(map(str, digits))}|{target}=', target,
                       ''.join(KEEP if k else LEAVE for k in kept))
