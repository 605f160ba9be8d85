"""Statistics of `measure.Measures` over the rollouts of a checkpoint.

Same-batch alignment c and de-biased alignment c_cross are both divided by the
root mean squares of ||g_RL|| and ||g_MTP|| over the rollouts of the checkpoint,
so their ratio is the share of c that is signal. They are not divided by the
norms of their own rollout, which would bias c_cross again (a large c_cross
comes with long gradients), nor by de-biased norms, whose estimates may be near
0 or negative. The cosine of the expected gradients ('pooled'),
c_cross / sqrt(rl_cross v2_cross) of the means over rollouts, is reported where
the intervals of both de-biased norms exclude 0.
"""

import jax
import jax.numpy as jnp
import numpy as np

from mtp_rl.diagnose import measure, oracle
from mtp_rl.report import intervals, tables

FORMS = ('same', 'cross', 'curvature')
_RESAMPLES = 2000


def has_gradient(m):
  """Return whether a minibatch has both gradients (equal rewards give none)."""
  whole = m.scopes['all']
  return bool(m.eta > 0 and whole['rl'] > 0 and np.all(whole['v2'] > 0))


def best_lambda(grid, curves):
  """Return the lambda where the mean of curves is highest, and its interval.

  Args:
    grid: [N].
    curves: [n, N], one row per rollout.

  Returns:
    `intervals.Interval`; its ends are the 2.5 % and 97.5 % quantiles of the
    bootstrap over rollouts, which is too narrow if there are few of them.
  """
  n = len(curves)
  peak = jax.vmap(oracle.vertex, (None, 0))
  picks = np.random.default_rng(0).integers(0, n, (_RESAMPLES, n))
  means = np.concatenate([curves.mean(0)[None], curves[picks].mean(1)])
  first, *rest = np.asarray(peak(jnp.asarray(grid), jnp.asarray(means)))
  low, high = np.quantile(rest, (.025, .975)) if n > 1 else (None, None)
  return intervals.Interval(float(first), low, high, n)


def _sure(x, sign=0):
  """Return whether an interval excludes 0 (and, if sign is 1, is above it)."""
  return x.low is not None and (x.low > 0 or (x.high < 0 and sign <= 0))


def _alignment(products):
  """Return the numbers of one scope.

  Args:
    products: dict of arrays [n] or [n, K]; see `measure.Measures.scopes`.
  """
  norm = np.sqrt(np.mean(products['rl']) * np.mean(products['v2'], 0))
  norm = np.where(norm > 0, norm, np.inf)
  cosine = lambda c: intervals.interval(np.mean(c / norm, 1).tolist())
  each = {k: intervals.interval(np.sum(v, -1).tolist() if v.ndim > 1
                             else v.tolist()) for k, v in products.items()}
  share = lambda name: (each[name + '_cross'].mean / each[name].mean
                        if _sure(each[name]) else None)
  pooled = None
  if _sure(each['rl_cross'], 1) and _sure(each['v2_cross'], 1):
    square = each['rl_cross'].mean * np.mean(products['v2_cross'], 0)
    pooled = float(np.mean(np.mean(products['c_cross'], 0) / np.sqrt(
        np.where(square > 0, square, np.inf))))
  return {'same': cosine(products['c']), 'cross': cosine(products['c_cross']),
          'pooled': pooled, 'signal': {k: share(k) for k in ('c', 'rl', 'v2')}}


def summarise(step, measures, grid):
  """Return the statistics of the rollouts of one checkpoint, a dict.

  Args:
    step: of the checkpoint.
    measures: list of `measure.Measures` of NumPy arrays, one per rollout.
    grid: [N].
  """
  used = [m for m in measures if has_gradient(m)]
  out = {'step': step, 'rollouts': len(used),
         'silent': len(measures) - len(used)}
  if not used:
    return out
  stack = jax.tree.map(lambda *x: np.stack(x).astype(np.float64), *used)
  number = lambda x: intervals.interval(x.tolist())
  for name in ('rate', 'eta', 'ratio', 'smoothness', 'gain'):
    out[name] = number(getattr(stack, name))
  out['alignment'] = {s: _alignment(stack.scopes[s]) for s in measure.SCOPES}
  best = out['best'] = best_lambda(grid, stack.curve['achieved'])
  out['estimators'] = {}
  for name in [n for n in measure.NAMES if n in stack.lam]:
    lam = stack.lam[name]
    one = lam.mean(1)
    out['estimators'][name] = {
        'lam': number(one), 'modules': lam.mean(0).tolist(),
        'sign': float(np.mean(np.sign(one) == np.sign(best.mean))),
        'distance': float(np.mean(np.abs(one - best.mean))),
        **{f: number(getattr(stack, f)[name])
           for f in ('same', 'cross', 'achieved')}}
  out['curve'] = {'grid': list(map(float, grid)), **{
      f: stack.curve[f].mean(0).tolist() for f in FORMS},
      'achieved': [number(x) for x in stack.curve['achieved'].T]}
  return out


def _pm(x, form='+.3f'):
  if x is None:
    return '-'
  mean = format(x.mean, form)
  if x.low is None:
    return mean
  return f'{mean} ± {format(x.high - x.mean, form[1:])}'


def _cell(x, form):
  return '-' if x is None else format(x, form)


def _table(head, lines):
  return tables.markdown(head, lines, aligned=True) + '\n'


def _alignment_table(found):
  lines = []
  for s in found:
    for scope, a in s['alignment'].items():
      lines.append([str(s['step']), scope, _pm(a['same']), _pm(a['cross']),
                    _cell(a['pooled'], '+.2f'),
                    *[_cell(a['signal'][k], 'z.0%') for k in
                      ('c', 'rl', 'v2')]])
  return _table(['step', 'parameters', 'same batch', 'de-biased', 'pooled',
                 'signal of c', 'of g_RL', 'of g_MTP'], lines)


def _estimator_table(s):
  lines = []
  for name, e in s['estimators'].items():
    lam = _pm(e['lam'])
    if len(e['modules']) > 1:
      lam += ' (' + ', '.join(f'{x:+.2f}' for x in e['modules']) + ')'
    lines.append([name, lam, f'{e["sign"]:.0%}', f'{e["distance"]:.3f}',
                  f'{e["same"].mean:+.1e}', f'{e["cross"].mean:+.1e}',
                  _pm(e['achieved'], '+.1e')])
  return _table(['estimator', 'lambda', 'sign', 'distance', 'paper Delta',
                 'cross-fitted Delta', 'held-out Delta'], lines)


def nearest(s):
  """Return the estimator nearest to the held-out best, and that of most gain.

  The oracle is left out: it reads the rollouts that it would be judged on.
  """
  names = [n for n in s['estimators'] if n != 'oracle']
  each = s['estimators']
  return (min(names, key=lambda n: each[n]['distance']),
          max(names, key=lambda n: each[n]['achieved'].mean))


def markdown(summaries, title, notes):
  """Return the tables of all checkpoints.

  Args:
    summaries: list of dicts from `summarise`.
    title: first line.
    notes: list of sentences below it.
  """
  found = [s for s in summaries if s['rollouts']]
  out = [f'# {title}\n\n', *[f'{n}\n\n' for n in notes],
         'Mean ± half of the 95 % t-interval over rollouts.\n\n'
         '## Alignment of g_RL and g_MTP\n\n'
         'c over ||g_RL|| ||g_MTP|| (root mean squares): c of one batch, and '
         'c across disjoint prompts.\nPooled: cosine of the expected '
         'gradients. Signal: the share that is not sampling noise.\nA dash: '
         'not told from 0 by these rollouts.\n\n',
         _alignment_table(found)]
  for s in summaries:
    out.append(f'## Step {s["step"]}\n\n')
    if s['silent']:
      out.append(f'{s["silent"]} rollouts without a gradient (all rewards of '
                 'every group equal) are left out.\n\n')
    if not s['rollouts']:
      continue
    b = s['best']
    ends = '' if b.low is None else f' [{b.low:+.3f}, {b.high:+.3f}]'
    near, gains = nearest(s)
    verdict = f'Nearest: {near}; most gained: {gains} (oracle aside).'
    if not _sure(b):
      verdict = 'Its sign is open: more --rollouts would tell.'
    elif np.isclose(abs(b.mean), s['curve']['grid'][-1]):
      verdict += '\nIt lies at the bound: a wider --bound would look further.'
    out.append(
        f'Held-out best lambda: {b.mean:+.3f}{ends} (bootstrap over '
        f'{s["rollouts"]} rollouts). {verdict}\nThe '
        f'RL-only step gains {_pm(s["gain"], "+.1e")} held-out; L eta '
        f'{_pm(s["ratio"])}; learning rate {s["rate"].mean:.1e}.\n\n')
    out.append(_estimator_table(s))
  return ''.join(out).rstrip('\n') + '\n'
