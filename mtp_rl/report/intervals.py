"""Means and shares with 95 % intervals (t, Wilson, bootstrap), and tests."""

import math
import statistics
from typing import NamedTuple

import numpy as np
from scipy import stats


class Interval(NamedTuple):
  """Mean of n values and its 95 % interval; low, high are None if n < 2."""
  mean: float
  low: float | None
  high: float | None
  n: int


def interval(values):
  """Return the `Interval` of a list of numbers, None where it is empty."""
  values = list(values)
  if not values:
    return None
  mean = statistics.fmean(values)
  if len(values) < 2:
    return Interval(mean, None, None, 1)
  half = float(stats.t.ppf(.975, len(values) - 1)) * (
      statistics.stdev(values) / math.sqrt(len(values)))
  return Interval(mean, mean - half, mean + half, len(values))


def paired(values, baseline):
  """Return the `Interval` of the differences over the seeds that both have.

  Args:
    values, baseline: dicts seed -> number.
  """
  return interval(values[s] - baseline[s] for s in sorted(values)
                  if s in baseline)


def share(count, n):
  """Return Wilson's `Interval` (1927) of count of n; None where n is 0."""
  if not n:
    return None
  ends = stats.binomtest(count, n).proportion_ci(method='wilson')
  return Interval(count / n, float(ends.low), float(ends.high), n)


def shares_differ(a, b):
  """Return the two-sided p of Fisher's exact test (1922) of equal shares.

  Args:
    a, b: `Interval` of `share`, of different samples.
  """
  counts = [[round(x.mean * x.n), round((1 - x.mean) * x.n)] for x in (a, b)]
  return float(stats.fisher_exact(counts).pvalue)


def pairs_differ(a, b):
  """Return the two-sided p of McNemar's exact test (1947) of equal shares.

  Only seeds where one of two counts and the other does not bear on it: equal
  shares would make either as likely.

  Args:
    a, b: dicts seed -> bool; the seeds that both have are compared.
  """
  found = [a[s] for s in a if s in b and a[s] != b[s]]
  return float(stats.binomtest(sum(found), len(found)).pvalue) if found else 1.


def _spread(x):
  """Return whether values differ by more than rounding.

  Shares of few questions can agree by chance, and t then says nothing.
  """
  return x.low is not None and x.high - x.low > 1e-9 * abs(x.mean)


def told(x):
  """Return whether an `Interval`'s mean is told from 0, alone."""
  return _spread(x) and (x.low > 0 or x.high < 0)


def p_value(x):
  """Return the two-sided p of an `Interval`'s mean being 0 (Student's t)."""
  if not _spread(x):
    return 1.
  t = 2 * abs(x.mean) / (x.high - x.low) * stats.t.ppf(.975, x.n - 1)
  return float(2 * stats.t.sf(t, x.n - 1))


def holm(differences, level=.05):
  """Return which differences are told from 0, all tested together.

  Holm (1979): in ascending order of p the i-th of m stands while
  p <= level / (m - i + 1).

  Args:
    differences: dict name -> `Interval`.
    level: chance of any false one among them.

  Returns:
    set of names.
  """
  ps = sorted((p_value(x), str(n), n) for n, x in differences.items())
  stands = set()
  for i, (p, _, name) in enumerate(ps):
    if p > level / (len(ps) - i):
      break
    stands.add(name)
  return stands


def bootstrap(scores, seed=0, draws=2000, level=.95):
  """Return the bootstrap interval (low, high) of a mean over problems.

  Percentiles of the means of `draws` resamples of the problems (Efron 1979);
  the samples of a problem stay together.

  Args:
    scores: float [N].
    seed: int; equal arguments give equal intervals.
    draws: number of resamples.
    level: confidence level.
  """
  scores = np.asarray(scores, np.float64)
  rng = np.random.default_rng(seed)
  means = [scores[rng.integers(0, len(scores), len(scores))].mean()
           for _ in range(draws)]
  low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
  return float(low), float(high)
