"""Running sums modulo 10, with written-out working and known headroom.

    prompt    385102=      solution   316779      answer   9

The solution writes the sum after each digit; only the last one is checked.
A solution is a chain of facts (running sum, digit) -> running sum, 100 in
all. In the warm-up, `noisy_facts` of them are written wrong with probability
`noise` (always the same wrong sum, and the working goes on from it): what
the warm-up teaches wrong is known, and RL has exactly that to repair.
"""

import zlib

import numpy as np

from mtp_rl import config as config_lib
from mtp_rl import tokenizers, types

BASE = 10
HELD_OUT_SHARE = 8  # one prompt in 8, by checksum, is never trained on
_TRAIN, _SUPERVISED, _FACTS, _TEST = range(4)


def make(task_config, seed):
  """Return the `Arithmetic` task of a `config.Task`."""
  return Arithmetic(task_config, seed)


def is_held_out(prompt):
  """Return whether a prompt belongs to evaluation, by its text alone."""
  return zlib.crc32(prompt.encode()) % HELD_OUT_SHARE == 0


class Arithmetic:
  """See the module's text; members as in `tasks.Task`."""

  def __init__(self, task_config, seed):
    t = task_config
    if not 2 <= t.min_terms <= t.max_terms:
      raise config_lib.ConfigError(
          f'task arithmetic is empty with task.min_terms={t.min_terms} and '
          f'task.max_terms={t.max_terms}; they need 2 <= min <= max')
    if t.noisy_facts > BASE ** 2 or t.noise > 1:
      raise config_lib.ConfigError(
          f'task.noisy_facts={t.noisy_facts} must be at most {BASE ** 2} and '
          f'task.noise={t.noise} at most 1')
    self._config, self._seed = t, seed
    self.tokenizer = tokenizers.CharTokenizer('0123456789=')
    rng = self._rng(_FACTS, 0)
    noisy = rng.permutation(BASE ** 2)[:t.noisy_facts]
    shifts = rng.integers(1, BASE, len(noisy))
    self._wrong = {(f // BASE, f % BASE): (f // BASE + f % BASE + d) % BASE
                   for f, d in zip(noisy.tolist(), shifts.tolist())}
    self._test = self._draw_test()

  def _rng(self, stream, step):
    return np.random.default_rng([self._seed, stream, step])

  def _draw(self, rng, held_out):
    """Draw one prompt of the training or the held-out side."""
    while True:
      terms = rng.integers(self._config.min_terms, self._config.max_terms + 1)
      digits = rng.integers(0, BASE, terms).tolist()
      prompt = ''.join(map(str, digits)) + '='
      if is_held_out(prompt) == held_out:
        return digits, prompt

  def _draw_test(self):
    rng, seen = self._rng(_TEST, 0), {}
    smallest = BASE ** self._config.max_terms // HELD_OUT_SHARE // 2
    for _ in range(min(self._config.held_out, smallest)):
      digits, prompt = self._draw(rng, held_out=True)
      while prompt in seen:
        digits, prompt = self._draw(rng, held_out=True)
      seen[prompt] = self._example(digits, prompt)
    return list(seen.values())

  def _work(self, digits, rng=None):
    """Return the working; with rng, noisy facts may be written wrong."""
    total, out = digits[0], [digits[0]]
    for digit in digits[1:]:
      fact = (total, digit)
      total = (total + digit) % BASE
      if rng is not None and fact in self._wrong:
        if rng.random() < self._config.noise:
          total = self._wrong[fact]
      out.append(total)
    return ''.join(map(str, out))

  def _example(self, digits, prompt, rng=None):
    return types.Example(prompt, self._work(digits)[-1],
                         self._work(digits, rng))

  def _batch(self, stream, step, count, noisy):
    rng = self._rng(stream, step)
    return [self._example(*self._draw(rng, held_out=False),
                          rng if noisy else None) for _ in range(count)]

  def prompts(self, step, count):
    """Return training problems with noiseless solutions."""
    return self._batch(_TRAIN, step, count, noisy=False)

  def supervised(self, step, count):
    """Return training problems with noisy solutions."""
    return self._batch(_SUPERVISED, step, count, noisy=True)

  def held_out(self):
    """Return {'arithmetic': problems}."""
    return {'arithmetic': self._test}

  def probe(self):
    """Return one problem of the greatest length."""
    digits = [0] * self._config.max_terms
    return [self._example(digits, '0' * len(digits) + '=')]

  def extract(self, completion):
    """Return the last sum, or '' where the text is not all digits."""
    text = completion.strip()
    return text[-1] if text.isascii() and text.isdigit() else ''

  def rewards(self, examples, completions):
    """Return 1.0 where the last sum is right, else 0.0."""
    return [float(self.extract(c) == e.answer)
            for e, c in zip(examples, completions, strict=True)]

  def counts(self):
    """Return {}: nothing can go wrong here."""
    return {}

  def close(self):
    """There is no process to end."""
