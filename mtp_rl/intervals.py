"""Means with 95 % intervals: Student's t, pairs by seed, the bootstrap."""

import math
import statistics
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
  """Mean over n seeds and its 95 % interval; low and high None for n < 2."""
  mean: float
  low: float | None
  high: float | None
  n: int


def t_quantile(confidence, freedom):
  """Return t with P(|T| < t) = confidence, for integer degrees of freedom.

  Source: Abramowitz and Stegun 26.7.3 and 26.7.4, solved by bisection.
  """
  def inside(t):
    angle = math.atan(t / math.sqrt(freedom))
    cosine, term, total = math.cos(angle), 1., 0.
    for k in range(freedom % 2, freedom - 1, 2):
      if k == 1:
        term = cosine
      elif k:
        term *= cosine ** 2 * (k - 1) / k
      total += term
    if freedom % 2:
      return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total

  low, high = 0., 1.
  while inside(high) < confidence:
    high *= 2
  for _ in range(100):
    middle = (low + high) / 2
    low, high = ((middle, high) if inside(middle) < confidence
                 else (low, middle))
  return high


def interval(values):
  """Return the `Interval` of a list of numbers, None where it is empty."""
  values = list(values)
  if not values:
    return None
  mean = statistics.fmean(values)
  if len(values) < 2:
    return Interval(mean, None, None, 1)
  half = (t_quantile(.95, len(values) - 1) * statistics.stdev(values)
          / math.sqrt(len(values)))
  return Interval(mean, mean - half, mean + half, len(values))


def paired(values, baseline):
  """Return the `Interval` of the differences over the seeds that both have.

  Args:
    values, baseline: dicts seed -> number.
  """
  return interval(values[s] - baseline[s] for s in sorted(values)
                  if s in baseline)


def bootstrap(scores, seed=0, draws=2000, level=.95):
  """Return the bootstrap interval (low, high) of a mean over problems.

  Percentiles of the means of `draws` resamples of the problems (Efron 1979);
  the samples of a problem stay together.

  Args:
    scores: float [N].
    seed: int; the interval is a function of its arguments.
    draws: resamples.
    level: of confidence.
  """
  scores = np.asarray(scores, np.float64)
  rng = np.random.default_rng(seed)
  means = [scores[rng.integers(0, len(scores), len(scores))].mean()
           for _ in range(draws)]
  low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
  return float(low), float(high)
