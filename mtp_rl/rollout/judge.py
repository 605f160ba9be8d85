"""Verifies completions, those that end early while others are sampled."""

from concurrent import futures

import numpy as np

from mtp_rl import distributed


class Judge:
  """Verifies completions, those that end early while others are sampled.

  Each process verifies its share of the rows, in a thread of its own.
  """

  def __init__(self, task, examples):
    self._task, self._examples = task, examples
    self._pool = futures.ThreadPoolExecutor(1)
    self._mine = distributed.share(len(examples))
    self._work = []
    self._taken = np.zeros(len(examples), bool)

  def __enter__(self):
    return self

  def __exit__(self, *unused):
    self._pool.shutdown(cancel_futures=True)

  def take(self, rows, responses):
    """Begin to verify rows, int [n], with responses int32 [n, S]."""
    # Whether a range has a NumPy integer is found element by element.
    own = [(row, response) for row, response in zip(rows.tolist(), responses)
           if row in self._mine]
    self._taken[rows] = True
    if own:
      self._work.append(self._pool.submit(self._verify, *zip(*own)))

  def _verify(self, rows, responses):
    decode = self._task.tokenizer.decode
    return rows, self._task.rewards([self._examples[i] for i in rows],
                                    [decode(x) for x in responses])

  def rewards(self, responses):
    """Return the rewards of all rows, float64 [B], from int32 [B, S]."""
    rest = np.flatnonzero(~self._taken)
    if len(rest):
      self.take(rest, responses[rest])
    found = np.zeros(len(self._examples))
    for work in self._work:
      rows, values = work.result()
      found[list(rows)] = values
    return distributed.split(lambda mine: found[mine], len(found))
