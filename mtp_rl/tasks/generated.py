"""Base of tasks whose problems are drawn at random: streams and the split."""

import zlib

import numpy as np

from mtp_rl import tokenizers

HELD_OUT_SHARE = 8  # one prompt in 8, by checksum, is never trained on
TRAIN, SUPERVISED, PROBE, TEST = range(4)  # streams of random numbers


def is_held_out(prompt):
  """Return whether a prompt belongs to evaluation, by its text alone."""
  return zlib.crc32(prompt.encode()) % HELD_OUT_SHARE == 0


class Generated:
  """The members of `tasks.Task` that such tasks share.

  A subclass defines `draw(rng)`, which returns a `types.Example` with its
  solution, and `score(example, answer)`, the reward of what `extract` returns.
  """

  def __init__(self, name, characters, seed, held_out):
    """Draw the held-out set.

    Args:
      name: of the held-out set.
      characters: the characters of prompts and solutions.
      seed: int.
      held_out: problems to set apart; fewer where the task has fewer.
    """
    self.tokenizer = tokenizers.CharTokenizer(characters)
    self._name, self._seed = name, seed
    rng, test = self._rng(TEST, 0), {}
    # The draws are capped, since small tasks run out of new prompts.
    for _ in range(8 * HELD_OUT_SHARE * held_out):
      if len(test) == held_out:
        break
      example = self.draw(rng)
      if self.keeps_out(example.prompt):
        test.setdefault(example.prompt, example)
    self._test = list(test.values())

  def keeps_out(self, prompt):
    """Return whether a prompt belongs to evaluation."""
    return is_held_out(prompt)

  def _rng(self, stream, step):
    return np.random.default_rng([self._seed, stream, step])

  def _batch(self, stream, step, count, finish=lambda example, rng: example):
    rng, out = self._rng(stream, step), []
    while len(out) < count:
      example = self.draw(rng)
      if not self.keeps_out(example.prompt):
        out.append(finish(example, rng))
    return out

  def prompts(self, step, count):
    """Return training problems."""
    return self._batch(TRAIN, step, count)

  def supervised(self, step, count):
    """Return training problems with solutions, from a separate stream."""
    return self._batch(SUPERVISED, step, count, self.teach)

  def teach(self, example, rng):
    """Return the example as the warm-up shows it."""
    del rng
    return example

  def held_out(self):
    """Return the one evaluation set by the task's name."""
    return {self._name: self._test}

  def probe(self):
    """Return one problem; a task of several lengths returns its longest."""
    return self._batch(PROBE, 0, 1)

  def extract(self, completion):
    """Return the whole completion, stripped."""
    return completion.strip()

  def rewards(self, examples, completions):
    """Return each completion's reward."""
    return [float(self.score(e, self.extract(c)))
            for e, c in zip(examples, completions, strict=True)]

  def counts(self):
    """Return {}: this verifier cannot fail."""
    return {}

  def close(self):
    """Do nothing: there is no process to end."""
