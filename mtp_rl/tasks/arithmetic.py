"""Running sums modulo 10, with written-out working and known errors.

    prompt    385102=      solution   316779      answer   9

The solution writes the sum after each digit; only the last one is checked.
A solution is a chain of facts (running sum, digit) -> running sum, of which
there are 100. In the warm-up, `noisy_facts` of them are written wrong with
probability `noise` (always the same wrong sum, and the working continues from
it). So it is known what the warm-up teaches wrong and RL has to correct.
"""

import dataclasses

from mtp_rl import config as config_lib
from mtp_rl import types
from mtp_rl.tasks import generated

BASE = 10
_FACTS = generated.PROBE  # this stream is free: probe() draws nothing here


def make(task_config: config_lib.Task, seed):
  """Return the `Arithmetic` task of a `config.Task`."""
  return Arithmetic(task_config, seed)


class Arithmetic(generated.Generated):
  """See the module's text; members as in `tasks.Task`."""

  def __init__(self, task_config: config_lib.Task, seed):
    t = task_config
    if not 2 <= t.min_terms <= t.max_terms:
      raise config_lib.ConfigError(
          f'task arithmetic is empty with task.min_terms={t.min_terms} and '
          f'task.max_terms={t.max_terms}; they need 2 <= min <= max')
    if t.noisy_facts > BASE ** 2 or t.noise > 1:
      raise config_lib.ConfigError(
          f'task.noisy_facts={t.noisy_facts} must be at most {BASE ** 2} and '
          f'task.noise={t.noise} at most 1')
    self._config = t
    super().__init__('arithmetic', '0123456789=', seed, t.held_out)
    rng = self._rng(_FACTS, 0)
    noisy = rng.permutation(BASE ** 2)[:t.noisy_facts]
    shifts = rng.integers(1, BASE, len(noisy))
    self._wrong = {(f // BASE, f % BASE): (f // BASE + f % BASE + d) % BASE
                   for f, d in zip(noisy.tolist(), shifts.tolist())}

  def draw(self, rng):
    """Return one problem with its correct working."""
    terms = rng.integers(self._config.min_terms, self._config.max_terms + 1)
    return _example(''.join(map(str, rng.integers(0, BASE, terms))))

  def teach(self, example, rng):
    """Return the example, its noisy facts written wrong with chance `noise`."""
    def slip(fact, total):
      noisy = fact in self._wrong and rng.random() < self._config.noise
      return self._wrong[fact] if noisy else total
    return dataclasses.replace(
        example, solution=_work(example.prompt[:-1], slip))

  def probe(self):
    """Return one problem of the greatest length."""
    return [_example('0' * self._config.max_terms)]

  def extract(self, completion):
    """Return the last sum, or '' where the text is not all digits."""
    text = completion.strip()
    return text[-1] if text.isascii() and text.isdigit() else ''

  def score(self, example, text):
    """Return 1.0 where the last sum is right, else 0.0."""
    return float(text == example.answer)


def _work(digits, slip=lambda fact, total: total):
  """Return the running sums as text; `slip` may change the sum of a fact."""
  total, out = int(digits[0]), digits[0]
  for digit in map(int, digits[1:]):
    total = slip((total, digit), (total + digit) % BASE)
    out += str(total)
  return out


def _example(digits):
  work = _work(digits)
  return types.Example(digits + '=', work[-1], work)
