"""Curves from rows of metrics: gaps, names, and fewer points of long runs."""

import math


def series(rows, name, spacing=1):
  """Return steps and values of a metric; None, a gap, where there is none.

  A value is missing where it was not finite, or where the file has no row of a
  step; steps at which the metric is not measured are no gaps.

  Args:
    rows: dicts with 'step', in order.
    name: of the metric.
    spacing: steps from one row to the next.
  """
  x, y, last = [], [], None
  for row in rows:
    if last is not None and row['step'] > last + spacing:
      x.append(last + spacing)
      y.append(None)
    last = row['step']
    if name in row:
      x.append(last)
      y.append(row[name])
  return x, y


def thinned(x, y, limit):
  """Return at most about `limit` points: means of as many neighbours each.

  A gap among the neighbours stays as a gap after them.
  """
  each = math.ceil(len(x) / limit)
  if each <= 1:
    return x, y
  out_x, out_y = [], []
  for i in range(0, len(x), each):
    found = [v for v in y[i:i + each] if v is not None]
    if found:
      out_x.append(x[i:i + each][-1])
      out_y.append(sum(found) / len(found))
    if len(found) < len(y[i:i + each]):
      out_x.append(x[i:i + each][-1])
      out_y.append(None)
  return out_x, out_y


def names(rows, start='', end=''):
  """Return the sorted names of metrics that begin and end so."""
  found = {n for row in rows for n in row}
  return sorted(n for n in found if n.startswith(start) and n.endswith(end))


def measured(rows, what):
  """Return [(metric, estimator)] of an estimator's 'c', 'cos', .."""
  return [(n, n.split('/')[1]) for n in names(rows, 'occ/', '/' + what)
          if n.count('/') == 2]
