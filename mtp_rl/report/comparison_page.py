"""comparison.html: one page of a comparison, in the style of a run's page."""

import os
import urllib.parse

import numpy as np

from mtp_rl.compare import summary
from mtp_rl.report import comparison_figures as figures
from mtp_rl.report import page, style


def _text(found, signed=False):
  """Return an `intervals.Interval` as text."""
  if found is None:
    return ''
  show = lambda x: f'{x:{"+" if signed else ""}.3f}'
  ends = '' if found.low is None else (
      f'\n[{show(found.low)},\N{NO-BREAK SPACE}{show(found.high)}]')
  return (show(found.mean) + ends).replace('-', '−')  # noqa: RUF001


def _means(rows):
  """Return the table of a group's means."""
  shown = [m for m in summary.METRICS if any(m in r['mean'] for r in rows)]
  return {'head': ['variant', 'regime', 'seeds',
                   *(summary.METRICS[m] for m in shown)],
          'rows': [[r['label'], r['regime'], str(len(r['seeds'])),
                    *(_text(r['mean'].get(m)) for m in shown)] for r in rows]}


def _forest(rows):
  """Return the panels of a group's paired differences."""
  panels = []
  for metric, name in figures.SHOWN.items():
    marks = [{'label': f'{label} − {other}', 'marks': [  # noqa: RUF001
        {'mean': found.mean, 'low': found.low, 'high': found.high,
         'label': f'minus {other}', **style.REGIMES[regime]._asdict()}]}
             for label, other, regime, found in figures.differences(
                 rows, metric)]
    used = {m['label']: m for r in marks for m in r['marks']}
    if marks:
      panels.append({'title': name, 'unit': 'difference',
                     'rows': marks, 'legend': list(used.values())})
  return panels


def _charts(variants, runs, curves, lines):
  """Return the charts of a group, and add their series to `curves`."""
  width = figures.smoothing(runs)
  over = f', mean of {width} steps' if width > 1 else ''
  share = dict(low=0, high=1)
  out = []
  for key, pick, name, unit, wide, more in (
      ('reward', figures.metric('reward/mean'), 'reward',
       'mean of the rollout' + over, width, share),
      ('greedy', figures.greedy, 'held-out greedy', 'share of the reward', 1,
       share),
      ('lambda', figures.metric('occ/lambda'), 'λ',
       'coefficient of the MTP gradient', 1, dict(log=True)),
      ('acceptance', figures.metric('mtp_1/accept_top1'),
       'foreseen by the argmax, depth 1', 'share of tokens', 1, share)):
    chart = page.chart(name, unit, [], **more)
    for v in variants:
      if key == 'lambda' and not v.config.mtp.regime.startswith('occ'):
        continue
      steps, mean, spread = figures.curve(runs[v.name], pick, wide)
      if not np.isfinite(mean).any():
        continue
      steps, mean, spread = (x[::-(-len(steps) // page.POINTS)]
                             for x in (steps, mean, spread))
      curves.add(f'{key}/{v.name}', steps, mean.tolist(), np.nan_to_num(
          spread).tolist() if len(runs[v.name]) > 1 else None)
      chart['series'].append({'name': f'{key}/{v.name}', 'label': v.label,
                              **lines[v.label]._asdict()})
    out.append(chart)
  return out


def payload(variants, runs, rows, path, workdir, title, missing):
  """Return the data of a comparison's page.

  Args:
    variants: list of `grid.Variant`.
    runs: dict from `compare.summary.collect`.
    rows: list from `compare.summary.compare`.
    path: function (variant's name, seed) -> workdir of a run.
    workdir: of the comparison, from which runs are linked.
    title: its title.
    missing: names of the runs that are not complete.
  """
  curves, tables, forests, charts = page.Curves(), [], [], []
  lines = figures.lines(variants)
  for i, group in enumerate(dict.fromkeys(v.group for v in variants)):
    mine = [r for r in rows if r['group'] == group]
    tables.append({'id': f'means{i}', 'title': f'{group}: means',
                   'note': 'Means over seeds with 95 % t-intervals.',
                   **_means(mine)})
    if panels := _forest(mine):
      forests.append({
          'id': f'forest{i}', 'title': f'{group}: differences',
          'note': 'Paired by seed, with 95 % t-intervals; by chance one in 20 '
                  'leaves 0 out.', 'panels': panels})
    charts.append({'id': f'curves{i}', 'title': f'{group}: curves',
                   'charts': _charts([v for v in variants if v.group == group],
                                     runs, curves, lines)})
  link = lambda name, seed: urllib.parse.quote(os.path.relpath(
      os.path.join(path(name, seed), 'report.html'), workdir))
  seeds = sorted({s for found in runs.values() for s in found})
  links = {
      'id': 'runs', 'title': 'Runs', 'note': 'Each links to its page.',
      'head': ['variant', *[f'seed {s}' for s in seeds]],
      'rows': [[v.name, *([f'seed {s}', link(v.name, s)]
                          if s in runs[v.name] else '–'  # noqa: RUF001
                          for s in seeds)] for v in variants]}
  done = sum(map(len, runs.values()))
  return {
      'title': title, 'state': 'unfinished' if missing else 'complete',
      'note': 'Bands: 1 standard deviation over the seeds.',
      'facts': [('complete runs', f'{done} of {done + len(missing)}'),
                ('variants', str(len(variants))), ('seeds', str(len(seeds)))],
      'tables': tables, 'links': links, 'forests': forests, 'charts': charts,
      'series': curves.series, 'steps': curves.steps}
