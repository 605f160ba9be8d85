r"""Sums in words, for a small instruct model: "What is 3 + 5?".

A problem has `task.min_terms` to `task.max_terms` numbers from 0 to
`task.largest`. The answer is boxed and matched as an integer (verifiers.py), so
copying "3 + 5" into the box earns nothing. The prompt has two worked examples,
because a small model never writes a box by itself, and ends with `task.prefix`,
the start of the answer, in which `{}` stands for the terms ("{} =": "3 + 5 =").
With a tokenizer of characters (task.tokenizer empty) it is a task for tests.
"""

import os
import string

import numpy as np

from mtp_rl import config as config_lib
from mtp_rl import tokenizers, types
from mtp_rl.tasks import generated, real_math, verifiers

PROMPT = ('1 + 2 = 3 = \\boxed{{3}}\n'
          '4 + 5 = 9 = \\boxed{{9}}\n'
          'What is {}?')


def make(task_config: config_lib.Task, seed):
  """Return the `Sums` task of a `config.Task`."""
  return Sums(task_config, seed)


class Sums(generated.Generated):
  """See the module's text; members as in `tasks.Task`."""

  def __init__(self, task_config: config_lib.Task, seed):
    t = self._config = task_config
    if not 1 <= t.min_terms <= t.max_terms:
      raise config_lib.ConfigError(
          f'task sums cannot have task.min_terms={t.min_terms} and '
          f'task.max_terms={t.max_terms}; it needs 1 <= min <= max')
    self._words = (tokenizers.load(os.path.expanduser(t.tokenizer))
                   if t.tokenizer else
                   tokenizers.CharTokenizer(string.printable))
    super().__init__('sums', '', seed, t.held_out)
    self.tokenizer = self._words

  def _example(self, numbers):
    terms, total = ' + '.join(map(str, numbers)), str(sum(numbers))
    prefix = self._config.prefix.replace('{}', terms)
    prompt = real_math.render(PROMPT.format(terms), self._words,
                              self._config.template)
    return types.Example(
        prompt + prefix, total,
        rf'{terms} = {total} = \boxed{{{total}}}'.removeprefix(prefix))

  def draw(self, rng):
    """Return one problem with its solution."""
    terms = rng.integers(self._config.min_terms, self._config.max_terms + 1)
    return self._example(
        rng.integers(0, self._config.largest + 1, terms).tolist())

  def keeps_out(self, prompt):
    """Return whether a prompt belongs to evaluation, one in 8.

    The checksum of `generated.is_held_out`, CRC32, is linear, so it does not
    split similar prompts 1 in 8 (but 17 of the 441 sums of two numbers up to
    20); a random generator seeded with the prompt does.
    """
    rng = np.random.default_rng(list(prompt.encode()))
    return rng.integers(generated.HELD_OUT_SHARE) == 0

  def probe(self):
    """Return the longest problem: most terms, each the largest number."""
    return [self._example([self._config.largest] * self._config.max_terms)]

  def extract(self, completion):
    """Return the normalised content of the last box."""
    return verifiers.answer(self._config.prefix + completion)

  def score(self, example, text):
    """Return 1.0 for the sum as an integer, else 0.0."""
    return float(text == example.answer)
